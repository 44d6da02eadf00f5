"""What becomes of the images that people have: PIL images of every mode, and files."""

import numpy as np
import pytest
from PIL import Image

import segjax
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.inference.images import as_rgb
from tests.pixels import SPEC, Pixels, scene

# PIL's modes that keep colours, and how far they may be off on average of 255.
COLOURED = {"RGB": 0, "RGBA": 0, "RGBX": 0, "CMYK": 1, "YCbCr": 2, "HSV": 4}


@pytest.mark.parametrize("mode", COLOURED)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_picture_is_the_same_in_every_mode_that_keeps_colours(mode, seed):
    picture = scene(seed, 21, 30)
    found = as_rgb(Image.fromarray(picture).convert(mode))
    assert found.dtype == np.uint8 and found.shape == (21, 30, 3)
    assert np.abs(found.astype(int) - picture).mean() <= COLOURED[mode]


@pytest.mark.parametrize("transparency", [None, 0, bytes(range(64))])
def test_indices_of_a_palette_are_not_taken_for_grey(transparency):
    picture = scene(2, 21, 30) // 64 * 64
    image = Image.fromarray(picture).quantize(64)
    if transparency is not None:
        image.info["transparency"] = transparency
    np.testing.assert_array_equal(as_rgb(image), picture)


@pytest.mark.parametrize("seed", [0, 1])
def test_grey_is_repeated_and_its_alpha_dropped(seed):
    grey = scene(seed, 13, 22)[..., 0]
    alpha = scene(seed + 5, 13, 22)[..., 0]
    expected = np.stack([grey] * 3, axis=-1)
    image = Image.fromarray(grey)
    np.testing.assert_array_equal(as_rgb(image), expected)
    with_alpha = image.convert("LA")
    with_alpha.putalpha(Image.fromarray(alpha))
    np.testing.assert_array_equal(as_rgb(with_alpha), expected)


def test_one_bit_is_black_and_white():
    bits = np.random.default_rng(0).integers(0, 2, (9, 14)).astype(bool)
    np.testing.assert_array_equal(as_rgb(Image.fromarray(bits)), np.repeat(bits[..., None] * 255, 3, axis=2))


def test_16_bits_are_rounded_to_8():
    fine = np.random.default_rng(1).integers(0, 65536, (9, 14), dtype=np.uint16)
    expected = np.round(fine / 257).astype(np.uint8)
    np.testing.assert_array_equal(as_rgb(Image.fromarray(fine)), np.stack([expected] * 3, axis=-1))
    np.testing.assert_array_equal(as_rgb(fine.astype(">u2")), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_brightest_value_are_refused_with_a_remedy(mode):
    with pytest.raises(ValueError, match=rf"PIL's mode '{mode}' has no brightest value; scale it to 0\.\.255"):
        as_rgb(Image.new(mode, (14, 9)))


def test_a_predictor_takes_a_path_a_pil_image_and_an_array(tmp_path):
    predict = segjax.Predictor(LoadedCheckpoint(Pixels(5), SPEC))
    picture = scene(3, 33, 50)
    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = predict(picture)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(picture), picture):
        np.testing.assert_array_equal(predict(image), expected)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: is no image that can be decoded"):
        predict(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        predict(tmp_path / "absent.png")
