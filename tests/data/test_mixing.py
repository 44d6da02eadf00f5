"""CutMix and ClassMix: the source of every pixel's value, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.data import mixing
from segjax.data.augment import step_keys
from segjax.runtime.parallel import parallel_for
from segjax.train.schema import default_config

IGNORE, K = 255, 6


def settings_of(**given):
    settings = default_config("folder").augment
    settings.update(given)
    return settings


def draw(seed, *, batch=6, size=(20, 30), classes=K, ignore=IGNORE):
    """Images whose values name sample and place, and labels of few classes in blocks, a part of them ignored."""
    rng = np.random.default_rng(seed)
    images = np.arange(batch * size[0] * size[1], dtype=np.float32).reshape(batch, *size, 1) * np.ones(3, np.float32)
    blocks = rng.integers(0, max(classes, 2), (batch, size[0] // 5, size[1] // 5)).astype(np.uint8)
    labels = np.kron(blocks, np.ones((1, 5, 5), np.uint8))
    labels[rng.random(labels.shape) < 0.15] = ignore
    return images, labels


@functools.cache
def compiled(cutmix, classmix, classes, ignore):
    settings = settings_of(cutmix=cutmix, classmix=classmix)
    mix = functools.partial(mixing.mix, settings=settings, num_classes=classes, ignore_label=ignore)
    return jax.jit(lambda seed, images, labels: mix(step_keys(seed, 3, np.arange(len(labels)))[0], images, labels))


def mixed(images, labels, settings, *, seed=0, classes=K, ignore=IGNORE):
    program = compiled(settings.cutmix, settings.classmix, classes, ignore)
    found = program(jax.random.key(seed), images, labels)
    assert found[0].dtype == images.dtype and found[1].dtype == labels.dtype
    return tuple(map(np.asarray, found))


def taken(images, found):
    """Where a sample has the image of the next one, bool (B, h, w); every other pixel has its own."""
    others = np.roll(images, -1, axis=0)
    is_own, is_other = (found == images).all(-1), (found == others).all(-1)
    assert (is_own ^ is_other).all()
    return is_other


@pytest.mark.parametrize("given", [dict(cutmix=1.0), dict(classmix=1.0), dict(cutmix=0.4, classmix=0.4)])
@pytest.mark.parametrize("ignore", [IGNORE, 2])
@pytest.mark.parametrize("classes", [K, 1])
def test_every_pixel_and_its_label_come_from_the_same_position(given, ignore, classes):
    moved = 0
    for seed in range(4):
        images, labels = draw(seed, classes=classes, ignore=ignore)
        found, truth = mixed(images, labels, settings_of(**given), seed=seed, classes=classes, ignore=ignore)
        is_other = taken(images, found)
        np.testing.assert_array_equal(truth, np.where(is_other, np.roll(labels, -1, axis=0), labels))
        moved += ((truth == ignore) & is_other).sum()
    # Ignored pixels move along in boxes, and never as a class.
    assert bool(moved) == ("cutmix" in given)


@pytest.mark.parametrize("size", [(20, 30), (35, 15)])
def test_cutmix_pastes_boxes_of_the_crops_aspect_ratio_and_uniform_area(size):
    shares, corners = [], []
    for seed in range(4):
        images, labels = draw(seed, size=size, batch=90)
        for mask in taken(images, mixed(images, labels, settings_of(cutmix=1.0), seed=seed)[0]):
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            if len(rows):
                # A whole rectangle.
                assert mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
                assert abs(len(rows) / size[0] - len(columns) / size[1]) < 1 / min(size)
                corners.append((rows[0] == 0, rows[-1] == size[0] - 1))
            shares.append(mask.mean())
    # Of 360 uniform numbers: mean 1/2 and deviation 0.289, to four standard errors.
    assert abs(np.mean(shares) - 0.5) < 0.065 and abs(np.std(shares) - 0.289) < 0.04
    # Boxes lie at either end equally often, and mostly between.
    first, last = np.mean(corners, axis=0)
    assert abs(first - last) < 0.12 and first < 0.5


def test_classmix_pastes_half_of_the_classes_rounded_down():
    drawn = np.zeros(K)
    for seed in range(4):
        images, labels = draw(seed, batch=90)
        labels[0] = 4  # one class: half of it is none
        labels[1] = IGNORE
        others = np.roll(labels, -1, axis=0)
        found = mixed(images, labels, settings_of(classmix=1.0), seed=seed)[0]
        for mask, other in zip(taken(images, found), others, strict=True):
            present = set(np.unique(other)) - {IGNORE}
            chosen = set(np.unique(other[mask]))
            assert chosen <= present and len(chosen) == len(present) // 2
            np.testing.assert_array_equal(mask, np.isin(other, list(chosen)))
            drawn[list(chosen)] += 1
    # Classes are as likely as each other.
    assert drawn.min() > 0.8 * drawn.mean()


@pytest.mark.parametrize("cutmix, classmix", [(0.3, 0.0), (0.0, 0.6), (0.25, 0.5)])
def test_samples_are_mixed_with_the_given_probabilities(cutmix, classmix):
    counts = np.zeros(2)
    for seed in range(4):
        images, labels = draw(seed, batch=160)
        labels[:] = labels[:1]
        masks = taken(images, mixed(images, labels, settings_of(cutmix=cutmix, classmix=classmix), seed=seed)[0])
        for mask, other in zip(masks, labels, strict=True):
            by_class = np.array_equal(mask, np.isin(other, other[mask])) and not (other[mask] == IGNORE).any()
            counts += np.array([not by_class, by_class]) * mask.any()
    # Of 640 samples, to four standard errors; an empty box is rare.
    for share, expected in zip(counts / 640, (cutmix, classmix), strict=True):
        assert abs(share - expected) < 0.08
    assert not counts[np.array([cutmix, classmix]) == 0].any()


@pytest.mark.parametrize("kind, devices", [("jit", 2), ("jit", 4), ("pmap", 2), ("pmap", 4)])
def test_several_devices_mix_as_one_device_does(kind, devices):
    images, labels = draw(7, batch=8)
    settings = settings_of(cutmix=0.5, classmix=0.5)
    expected = mixed(images, labels, settings, seed=5)
    assert taken(images, expected[0]).any(axis=(1, 2)).sum() > 4
    parallel = parallel_for(kind, jax.devices()[:devices])

    def body(state, batch, key, *, axis_name=None):
        keys, _ = step_keys(key, 3, batch["position"])
        found = mixing.mix(
            keys, batch["image"], batch["label"], settings, num_classes=K, ignore_label=IGNORE, axis_name=axis_name
        )
        places = jnp.arange(8) == batch["position"][:, None]
        # Sums over devices of arrays in which other devices have zeros.
        whole = [jnp.einsum("bp,bhwc->phwc", places, x.reshape(*x.shape[:3], -1)) for x in found]
        return state, whole if axis_name is None else jax.lax.psum(whole, axis_name)

    batch = {"image": images, "label": labels, "position": np.arange(8, dtype=np.int32)}
    state = parallel.replicate({"nothing": np.zeros(3)})
    _, whole = parallel.compile_train(body)(state, parallel.spread(batch), jax.random.key(5))
    found = parallel.fetch(whole)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1][..., 0], expected[1])
