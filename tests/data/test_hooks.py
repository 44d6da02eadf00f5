"""A user's augmentation runs at the right stage and is reproducible; errors name its setting."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.data import crops, hooks, specs
from segjax.data.augment import augment, step_keys
from segjax.data.pipeline import StreamBatches, TrainBatches
from segjax.data.records import RecordError
from segjax.runtime.parallel import JitParallel
from segjax.train import setup
from segjax.train.config import RunError, check, check_crop
from segjax.train.schema import default_config
from tests.runs import make_config, run

IGNORE = 255
MEAN, STD = np.array(specs.IMAGENET_MEAN), np.array(specs.IMAGENET_STD)
CODE = '''
import jax
import numpy as np

def darker(key, image, label):
    """Halves the values, makes the label of the first column 3, and asks for more than there is beyond the image."""
    return image / 2, label.at[:, 0].set(3).at[-1, -1].set(4)

def noisy(key, image, label):
    return image + jax.random.uniform(key), label

def flip_and_noise(rng, image, label):
    # The shape of a function that calls Albumentations: it seeds another generator, and changes both in place.
    other = np.random.default_rng(int(rng.integers(2**32)))
    image += other.integers(0, 50, image.shape, dtype=np.uint8) * (image < 200)
    if other.random() < 0.5:
        image, label = image[:, ::-1], label[:, ::-1]
    return image, label

def gives_floats(key, image, label): return image.astype("float16"), label
def gives_less(key, image, label): return image[:-1], label[:-1]
def gives_one(key, image, label): return image
def gives_three(key, image, label): return image, label, label
def gives_wide_labels(key, image, label): return image, label.astype("int32")
def fails(key, image, label): raise KeyError("no fog here")

constant = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return str(path)


def settings_of(**changes):
    settings = default_config("folder").augment
    settings.update(dict(crop=(32, 48), scale=(0.6, 1.4)) | changes)
    return settings


def noise(seed, sizes=((40, 64), (64, 40), (30, 90), (52, 52))):
    """A split in memory, padded to its largest image."""
    rng, canvas = np.random.default_rng(seed), np.max(sizes, axis=0)
    images = rng.integers(0, 256, (len(sizes), *canvas, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (len(sizes), *canvas), dtype=np.uint8)
    return specs.Split(images, labels, np.array(sizes, np.int32), tuple(f"image{i}.png" for i in range(len(sizes))))


def batches_of(split, settings, *, seed=0, batch=3, start=0):
    return setup.make_batches(
        split,
        settings,
        ignore_label=IGNORE,
        class_pixels=None,
        batch_size=batch,
        seed=seed,
        parallel=JitParallel(jax.devices()[:1]),
        key=jax.random.key(seed),
        start=start,
        cache_gb=1.0,
    )


# ------------------------------------------------------------------------------------------------------- on the device


@pytest.mark.parametrize("seed", [0, 1])
def test_a_device_function_runs_after_colours_and_before_padding(seed, file):
    split, number = noise(seed), 4
    batch = {"image": split.images, "label": split.labels, "size": split.sizes}
    keys = jax.random.split(jax.random.key(seed), number)
    (plain, labels), (changed, changed_labels) = (
        jax.jit(partial(augment, settings=settings_of(on_device=address), ignore_label=IGNORE))(keys, batch)
        for address in ("", f"{file}:darker")
    )
    scaled = np.asarray(crops.draw_crops(keys, split.sizes, settings_of()).scaled)
    inside = np.zeros(labels.shape, bool)
    for i, (height, width) in enumerate(scaled):
        inside[i, :height, :width] = True
    assert 0.5 < inside.mean() < 1
    pixels = np.where(inside[..., None], (np.asarray(plain) * STD + MEAN) / 2, MEAN)
    np.testing.assert_allclose(np.asarray(changed) * STD + MEAN, pixels, rtol=0, atol=1e-3)
    expected = np.array(labels)
    expected[:, :, 0], expected[:, -1, -1] = 3, 4
    np.testing.assert_array_equal(changed_labels, np.where(inside, expected, IGNORE))
    assert (np.asarray(changed)[~inside] == 0).all()


def test_each_sample_has_its_own_key_that_no_other_draw_uses(file):
    image, key = np.full((1, 40, 64, 3), 100, np.uint8), jax.random.key(3)
    batch = {"image": image.repeat(5, 0), "label": np.zeros((5, 40, 64), np.uint8), "size": np.array([(40, 64)] * 5)}
    keys = jax.random.split(key, 5)
    settings = settings_of(scale=(1.0, 1.0), photometric=False, on_device=f"{file}:noisy")
    run_ = jax.jit(partial(augment, settings=settings, ignore_label=IGNORE))
    added = (np.asarray(run_(keys, batch)[0]) * STD + MEAN)[:, 0, 0, 0] - 100
    assert len(set(added.round(4))) == 5 and (added.round(4) >= 0).all() and added.max() < 1.001
    np.testing.assert_array_equal(run_(keys, batch)[0], run_(keys, batch)[0])
    # The keys that anything else is drawn from.
    others = [jax.random.fold_in(keys[0], i) for i in range(5)]
    assert all(abs(float(jax.random.uniform(other)) - added[0]) > 1e-3 for other in others)


def test_the_documented_gamma_function_works(tmp_path):
    example = hooks.__doc__.split("Gamma, for example:")[1].split("`on_host`")[0]
    path = tmp_path / "gamma.py"
    path.write_text("import jax\n" + "\n".join(line[4:] for line in example.strip("\n").splitlines()))
    image = jnp.full((4, 5, 3), 51.0)
    key = jax.random.key(1)
    out, _ = hooks.on_device(f"{path}:gamma", key, image, jnp.zeros((4, 5), jnp.uint8))
    np.testing.assert_allclose(out, 255 * 0.2 ** jax.random.uniform(key, minval=0.7, maxval=1.5), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------- on the host


@pytest.mark.usefixtures("newer_emitters")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_host_function_depends_on_seed_step_and_position(seed, file):
    split, settings = noise(seed), settings_of(on_host=f"{file}:flip_and_noise", cat_max_ratio=0.75)
    images = split.images.copy()
    finish = jax.jit(partial(augment, settings=settings, ignore_label=IGNORE))
    with batches_of(split, settings, seed=seed) as streamed:
        assert type(streamed) is StreamBatches
        for step in range(3):
            batch = streamed.at(step)
            keys, _ = step_keys(jax.random.key(seed), step, batch["position"])
            ours = finish(keys, batch)
            # The same by hand: change the whole images, and give them to the device as a resident batch.
            numbers, changed = streamed.indices(step), []
            for position, number in enumerate(numbers):
                height, width = split.sizes[number]
                pair = (array[number, :height, :width].copy() for array in (split.images, split.labels))
                seeds = np.random.SeedSequence((seed, step, position), spawn_key=(0,))
                changed.append(hooks.function_at("", f"{file}:flip_and_noise")(np.random.default_rng(seeds), *pair))
            whole = noise(9, [(64, 90)] * 3)
            for row, (image, label) in enumerate(changed):
                whole.images[row, : len(image), : image.shape[1]] = image
                whole.labels[row, : len(image), : image.shape[1]] = label
            resident = {"image": whole.images, "label": whole.labels, "size": split.sizes[numbers]}
            jax.tree.map(np.testing.assert_array_equal, ours, finish(keys, resident))
    np.testing.assert_array_equal(split.images, images)  # although the function changes its image in place
    with batches_of(split, settings, seed=seed, start=2) as again:
        np.testing.assert_array_equal(again.at(2)["image"], batch["image"])


def test_without_a_host_function_a_resident_split_is_not_streamed(file):
    with batches_of(noise(0), settings_of(on_device=f"{file}:noisy")) as batches:
        assert type(batches) is TrainBatches


def test_a_run_trains_with_functions_in_both_places(file, tmp_path):
    config = make_config(augment__on_host=f"{file}:flip_and_noise", augment__on_device=f"{file}:darker", train__steps=2)
    config.optim.warmup_steps = 1
    status, printed = run(config, tmp_path / "run")
    assert status == 0, printed


# -------------------------------------------------------------------------------------------------------------- errors

WRONG = {
    "mine:": r"must be empty, FILE\.py:function or package\.module:function",
    "nothing.py:darker": r"nothing\.py cannot be imported: there is no file .*nothing\.py",
    "no_such_package.code:darker": r"no_such_package\.code cannot be imported: No module named 'no_such_package'",
    "segjax.data.hooks:brighter": r"has no function brighter, only .*on_host",
}
WRONG_IN_FILE = {
    "brighter": r"has no function brighter, only darker, noisy, ",
    "constant": r"has no function constant",
}
WRONG_RESULTS = {
    "gives_floats": r"must return .*float32 \(32, 48, 3\) and uint8 \(32, 48\); it returned float16 \(32, 48, 3\) and",
    "gives_less": r"it returned float32 \(31, 48, 3\) and uint8 \(31, 48\)",
    "gives_one": r"it returned float32 \(32, 48, 3\)$",
    "gives_three": r"it returned float32 \(32, 48, 3\) and uint8 \(32, 48\) and uint8 \(32, 48\)",
    "gives_wide_labels": r"it returned float32 \(32, 48, 3\) and int32 \(32, 48\)",
    "fails": r"KeyError: 'no fog here'",
}


def refused(tmp_path, **changes):
    with pytest.raises(RunError) as caught:
        check(make_config(**changes), tmp_path / "run")
    return str(caught.value)


@pytest.mark.parametrize("setting", ["on_device", "on_host"])
def test_missing_functions_are_refused_with_their_setting(setting, file, tmp_path):
    cases = WRONG | {f"{file}:{name}": message for name, message in WRONG_IN_FILE.items()}
    for address, message in cases.items():
        told = refused(tmp_path, **{f"augment__{setting}": address})
        assert len(told.splitlines()) == 2 and f"config.augment.{setting}: '{address}'; " in told
        assert re.search(message, told), told


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_the_result_of_a_device_function_is_checked_before_data_are_read(name, file, tmp_path):
    told = refused(tmp_path, augment__on_device=f"{file}:{name}")
    assert f"config.augment.on_device: '{file}:{name}'; " in told
    with pytest.raises(ValueError, match=rf"(?m)augment\.on_device=.*{name}'; .*{WRONG_RESULTS[name]}"):
        hooks.on_device(f"{file}:{name}", jax.random.key(0), jnp.zeros((32, 48, 3)), jnp.zeros((32, 48), jnp.uint8))


@pytest.mark.parametrize("name, message", [("gives_less", r"it returned uint8 \(\d+, \d+, 3\)"), ("fails", "no fog")])
def test_an_image_for_which_a_host_function_fails_is_named(name, message, file):
    expected = rf"(?s)image\d\.png .*augment\.on_host='.*:{name}'; .*({message})"
    with (
        batches_of(noise(0), settings_of(on_host=f"{file}:{name}")) as batches,
        pytest.raises(RecordError, match=expected),
    ):
        batches.at(0)


def test_a_file_that_fails_to_import_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import numpy\n1 / 0\n")
    told = refused(tmp_path, augment__on_host=f"{path}:any")
    assert f"{path} cannot be imported: ZeroDivisionError: division by zero" in told


def test_a_module_on_the_python_path_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_package_of_fog").mkdir()
    (tmp_path / "my_package_of_fog" / "__init__.py").write_text("")
    (tmp_path / "my_package_of_fog" / "device.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert hooks.problem_on_device("my_package_of_fog.device:darker", (32, 48)) is None
    assert hooks.function_at("", "my_package_of_fog.device:darker").__module__ == "my_package_of_fog.device"
    sys.modules.pop("my_package_of_fog.device")


# ------------------------------------------------------------------------------------------------ settings that clash


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(augment__photometric=True, augment__brightness=10),
            r"augment\.brightness: 10; augment\.photometric",
        ),
        (
            dict(augment__scale=(0.5, 2.0), augment__scale_step=0.4),
            r"augment\.scale_step: 0\.4; must divide .*0\.5, 2\.0",
        ),
        (dict(augment__scale=(0.5, 2.0), augment__scale_step=2.0), r"augment\.scale_step: 2\.0; must divide"),
        (dict(augment__cat_max_ratio=0.5), r"augment\.cat_max_ratio: 0\.5; must be greater than 0\.5 and at most 1"),
        (
            dict(augment__base_size=(2048, 0)),
            r"augment\.base_size: \(2048, 0\); must be \(long, short\), each at least 1",
        ),
        (dict(augment__rotation=-1.0), r"augment\.rotation: -1\.0; must be at least 0 and at most 180"),
    ],
)
def test_incompatible_settings_of_augmentation_are_named(changes, message, tmp_path):
    told = refused(tmp_path, **changes)
    assert len(told.splitlines()) == 2 and re.search(message, told), told


@pytest.mark.parametrize(
    "changes",
    [
        dict(augment__scale=(0.5, 2.1), augment__scale_step=0.1),
        dict(augment__photometric=False, augment__brightness=10),
        dict(augment__base_size=(2048, 512), augment__cat_max_ratio=0.75),
        dict(augment__scale=(1.0, 1.0), augment__scale_step=0.1),
    ],
)
def test_published_settings_of_augmentation_are_accepted(changes, tmp_path):
    check(make_config(**changes), tmp_path / "run")


def test_the_padding_of_crops_follows_the_base_size():
    sizes, crop = np.array([(40, 64), (64, 30), (100, 130)]), (96, 128)
    for others in ({}, dict(scale=(0.5, 2.1), scale_step=0.1)):
        settings = settings_of(**(dict(crop=crop, base_size=(200, 80), scale=(0.5, 2.0)) | others))
        keys = jax.random.split(jax.random.key(3), 9000)
        scaled = np.asarray(crops.draw_crops(keys, sizes[np.arange(9000) % 3], settings).scaled)
        drawn = 1 - np.minimum(scaled / crop, 1).prod(axis=1).mean()
        assert check_crop(settings, sizes) == pytest.approx(drawn, abs=0.012)


def test_a_crop_larger_than_every_image_at_its_base_size_is_refused():
    with pytest.raises(RunError, match=r"best image has 82x160 with augment.base_size=\(80, 41\)"):
        check_crop(settings_of(crop=(96, 96), base_size=(80, 41), scale=(0.5, 2.0)), np.array([(1024, 2000)]))
    check_crop(settings_of(crop=(96, 96), base_size=(2048, 512), scale=(0.5, 2.0)), np.array([(30, 40)]))
