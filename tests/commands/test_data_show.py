"""The page of samples shows the input of the model, and the command reports the file."""

import cv2
import jax
import numpy as np
import pytest

from segjax.commands import data_show as show
from segjax.data import specs
from segjax.data.augment import augment, step_keys
from segjax.data.pipeline import TrainBatches
from segjax.runtime import memory
from segjax.runtime.parallel import JitParallel
from segjax.train.schema import default_config
from segjax.viz import pictures
from tests import made_bands

SPEC = specs.DatasetSpec("noise", tuple("abcde"), tuple((40 * k, 250 - 40 * k, 30 * k) for k in range(5)), 255)


def make_split(sizes, seed=0):
    """Noise, padded, with labels in broad stripes."""
    rng = np.random.default_rng(seed)
    height, width = np.max(sizes, axis=0)
    images = rng.integers(0, 256, (len(sizes), height, width, 3), dtype=np.uint8)
    labels = np.broadcast_to((np.arange(width) * 5 // width).astype(np.uint8), (len(sizes), height, width)).copy()
    return specs.Split(images, labels, np.array(sizes, np.int32), tuple(f"image{i}" for i in range(len(sizes))))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_samples_are_the_first_batch_of_a_run_with_that_seed(seed, tmp_path, monkeypatch):
    split = make_split([(40, 60), (33, 70), (50, 50), (40, 60), (45, 61)])
    settings = default_config("folder").augment
    settings.crop = (24, 30)
    drawn = {}
    monkeypatch.setattr(pictures, "save_samples", lambda path, *given, **rest: drawn.update(given=given, **rest))
    show.show(split, SPEC, settings, seed=seed, num=3, path=tmp_path / "page.png")
    batches = TrainBatches(split, batch_size=3, seed=seed, parallel=JitParallel(jax.devices()[:1]))
    keys, _ = step_keys(jax.random.key(seed), 0, np.arange(3))
    images, labels = augment(keys, batches.at(0), settings, ignore_label=255)
    pixels, given_labels, spec = drawn["given"]
    np.testing.assert_array_equal(given_labels, labels)
    # Half a grey value, where one of the two was rounded.
    undone = np.asarray(images, np.float64) * specs.IMAGENET_STD + specs.IMAGENET_MEAN
    np.testing.assert_allclose(pixels, undone, rtol=0, atol=0.5 + 1e-3)
    assert pixels.dtype == np.uint8 and spec is SPEC
    for title, number in zip(drawn["titles"], batches.indices(0), strict=True):
        height, width = split.sizes[number]
        assert title.startswith(f"image{number}   {height}x{width} × ")


@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_page_shows_every_image_and_the_colours_of_its_classes(number, tmp_path):
    size = (40, 50)
    shades = np.arange(number, dtype=np.uint8) * 20 + 130
    images = np.broadcast_to(shades[:, None, None, None], (number, *size, 3))
    labels = np.broadcast_to((np.arange(50) // 10).astype(np.uint8), (number, *size)).copy()
    labels[labels == 2] = 255
    path = tmp_path / "new folder" / "page.png"
    pictures.save_samples(path, images, labels, SPEC, titles=[f"image {i}" for i in range(number)])
    page = cv2.imread(str(path))[..., ::-1].reshape(-1, 3)
    colors, counts = np.unique(page, axis=0, return_counts=True)
    seen = {tuple(color): count for color, count in zip(colors.tolist(), counts.tolist(), strict=True)}
    for shade in shades.tolist():
        assert seen[shade, shade, shade] > 1000
    for k, color in enumerate(SPEC.colors):
        assert (color in seen) == (k != 2)
    # The stripes' grey.
    assert seen[135, 135, 135] > 500 * number


def test_the_command_draws_streets_without_any_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert show.main(["--num", "2", "--crop", "48", "64"]) == 0
    assert capsys.readouterr().out == "show-streets.png: 2 samples of 48x64 from streets train, seed 0\n"
    assert cv2.imread("show-streets.png").shape[1] > 1000
    other = tmp_path / "other" / "page.png"
    assert show.main(["streets", "--num", "1", "--split", "val", "--crop", "48", "64", "--output", str(other)]) == 0
    assert other.exists()


def test_the_command_reports_an_error_in_one_line(capsys):
    assert show.main(["streets", "--split", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("segjax data show: streets: no split 'nowhere'")
    with pytest.raises(SystemExit):
        show.main(["--scale", "2", "1"])
    assert "--scale is the smallest and the largest" in capsys.readouterr().err


@pytest.mark.parametrize("available, of", [(3 * 40 * 56 * 28 - 1, "host"), (3 * 40 * 56 * 12, "limit")])
def test_samples_that_do_not_fit_into_memory_are_refused(available, of, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # All that the program needs does not fit where its output hardly does.
    monkeypatch.setattr(memory, of, lambda *_, **__: available)
    assert show.main(["--num", "3", "--crop", "40", "56"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("segjax data show: a page of 3 samples of 40x56 needs 0.")
    assert said.endswith("; give a smaller --num or --crop") and list(tmp_path.iterdir()) == []


def test_samples_beyond_all_memory_are_refused_before_opening_a_dataset(capsys, monkeypatch):
    monkeypatch.setattr(memory, "host", lambda: 64 * 2**30)
    monkeypatch.setattr(show, "_data", lambda _: pytest.fail("opens the dataset"))
    assert show.main(["--num", "20", "--crop", "16384", "16384"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "20 samples of 16384x16384 needs 140.00 GiB, and the machine has 64.00 GiB" in said


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (4, "uint16"), (13, "float32")])
def test_samples_with_other_channels_are_shown_by_their_first_bands(channels, dtype, tmp_path, monkeypatch):
    made_bands.folder(tmp_path / "given", channels, dtype)
    shown = {}
    monkeypatch.setattr(pictures, "save_samples", lambda path, images, labels, spec, titles: shown.update(all=images))
    paths = ["--source", tmp_path / "given", "--data-dir", tmp_path / "data", "--output", tmp_path / "page.png"]
    assert show.main(["folder", *map(str, paths), "--num", "3", "--crop", "32", "40", "--scale", "1", "1"]) == 0
    images = shown["all"]
    assert images.shape == (3, 32, 40, 3) and images.dtype == np.uint8
    # From black to white, of one channel in grey.
    assert all(image.min() < 10 and image.max() > 245 for image in images) or channels == 1
    assert (np.ptp(images.astype(int), axis=3) == 0).all() == (channels == 1)
