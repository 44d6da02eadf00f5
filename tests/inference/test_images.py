"""Conversion of users' images: PIL images of every mode, and files."""

import os

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

import segjax
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.inference.images import as_rgb
from tests.pixels import SPEC, Pixels, scene

# PIL's modes that keep colours, and how far they may be off on average of 255.
COLOURED = {"RGB": 0, "RGBA": 0, "RGBX": 0, "CMYK": 1, "YCbCr": 2, "HSV": 4}


@pytest.mark.parametrize("mode", COLOURED)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_picture_is_read_equally_in_every_mode_that_keeps_colours(mode, seed):
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


def test_one_bit_images_are_black_and_white():
    bits = np.random.default_rng(0).integers(0, 2, (9, 14)).astype(bool)
    np.testing.assert_array_equal(as_rgb(Image.fromarray(bits)), np.repeat(bits[..., None] * 255, 3, axis=2))


def test_16_bit_images_are_rounded_to_8_bits():
    fine = np.random.default_rng(1).integers(0, 65536, (9, 14), dtype=np.uint16)
    expected = np.round(fine / 257).astype(np.uint8)
    np.testing.assert_array_equal(as_rgb(Image.fromarray(fine)), np.stack([expected] * 3, axis=-1))
    np.testing.assert_array_equal(as_rgb(fine.astype(">u2")), np.stack([expected] * 3, axis=-1))


def kinds(array, folder):
    """The same numbers as an array, a PNG, a TIFF and, where it is grey, a PIL image."""
    cv2.imwrite(str(folder / "x.png"), array[..., ::-1] if array.ndim == 3 else array)
    tifffile.imwrite(folder / "x.tif", array, photometric="rgb" if array.ndim == 3 else "minisblack")
    return [array, folder / "x.png", folder / "x.tif", *([Image.fromarray(array)] if array.ndim == 2 else [])]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_65535_is_white_only_if_one_percent_is_in_the_upper_half(channels, seed, tmp_path):
    """One rule for arrays, PNG, TIFF and PIL images."""
    rng = np.random.default_rng(seed)
    size = (20, 50, 3)[: 2 + (channels == 3)]
    dark = rng.integers(0, 2**15, size, dtype=np.uint16)
    for bright in (0.005, 0.015):
        image = dark.copy()
        image.reshape(-1)[: int(bright * image.size)] = 60_000
        expected = np.round(image / 257).astype(np.uint8).reshape(20, 50, -1)
        for given in kinds(image, tmp_path):
            if bright > 0.01:
                np.testing.assert_array_equal(as_rgb(given), np.broadcast_to(expected, (20, 50, 3)))
            else:
                with pytest.raises(
                    ValueError, match=r"60000 of 65535, and 0\.5% are in the upper half.*--scale LOW HIGH"
                ):
                    as_rgb(given)
                # As it is, if a person says so.
                np.testing.assert_array_equal(as_rgb(given, scale=(0, 65535)), np.broadcast_to(expected, (20, 50, 3)))


@pytest.mark.parametrize("highest", [255, 1023, 4095, 5700, 10_000, 16_383, 32_767])
def test_dark_16_bit_images_need_a_scale(highest, tmp_path):
    image = scene(highest, 20, 31)
    stored = (image / 255 * highest).astype(np.uint16)
    for given in kinds(stored, tmp_path):
        with pytest.raises(ValueError, match=f"brightest value is {stored.max()} of 65535"):
            as_rgb(given)
        assert np.abs(as_rgb(given, scale=(0, highest)).astype(int) - image).max() <= 1


def test_black_images_need_no_scale(tmp_path):
    for given in kinds(np.zeros((9, 14), np.uint16), tmp_path):
        assert not as_rgb(given).any()


def test_alpha_does_not_affect_the_scale():
    colours = np.full((9, 14, 3), 3000, np.uint16)
    with pytest.raises(ValueError, match="3000 of 65535"):
        as_rgb(np.dstack([colours, np.full((9, 14), 65535, np.uint16)]))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint32, np.int64, np.float16, np.float32, np.float64])
def test_other_dtypes_need_a_scale_and_are_clipped_to_it(dtype):
    values = np.array([[-1, 0, 1, 50, 100, 120]] * 2).astype(dtype)
    if dtype == np.uint32:
        values[:, 0] = 0
    with pytest.raises(ValueError, match=rf"it has {np.dtype(dtype)} values from .* to 120.*scale=\(low, high\)"):
        as_rgb(values)
    expected = [0, 0, 3, 128, 255, 255]
    np.testing.assert_array_equal(as_rgb(values, scale=(0, 100))[0, :, 1], expected)


def test_a_scale_does_not_apply_to_8_bit_images():
    image = scene(0, 9, 14)
    np.testing.assert_array_equal(as_rgb(image, scale=(0, 3000)), image)
    np.testing.assert_array_equal(as_rgb(Image.fromarray(image), scale=(0, 3000)), image)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_counted_and_refused(strange):
    image = np.random.default_rng(0).random((9, 14, 3), np.float32)
    image[2, 3:6, 0] = strange
    with pytest.raises(ValueError, match="3 of its values are NaN or infinite"):
        as_rgb(image, scale=(0, 1))


@pytest.mark.parametrize("scale", [(1, 1), (2, 1), (np.nan, 1), (0, np.inf)])
def test_an_invalid_scale_is_refused_everywhere(scale):
    with pytest.raises(ValueError, match="scale has two numbers"):
        as_rgb(scene(0, 9, 14), scale=scale)
    with pytest.raises(ValueError, match="scale has two numbers"):
        segjax.Predictor(LoadedCheckpoint(Pixels(5), SPEC), scale=scale)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pil_modes_with_wide_values_need_a_scale(mode):
    image = scene(1, 9, 14)[..., 0]
    wide = Image.fromarray(image).convert(mode)
    with pytest.raises(ValueError, match="scale is not known"):
        as_rgb(wide)
    np.testing.assert_array_equal(as_rgb(wide, scale=(0, 255))[..., 0], image)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_pil_is_read_as_pil_displays_it(mode):
    image = Image.fromarray(scene(4, 21, 30))
    via = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode)
    given = (image.convert(via) if via else image).convert(mode)
    shown = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    expected = (given.convert(shown) if shown else given).convert("RGB")
    np.testing.assert_array_equal(as_rgb(given), np.asarray(expected))


def test_a_predictor_applies_its_scale_and_its_limit_on_pixels(tmp_path):
    image = scene(2, 33, 50)
    stored = image.astype(np.uint16) * 10
    (tmp_path / "a.tif").write_bytes(b"")
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb")
    predict = segjax.Predictor(LoadedCheckpoint(Pixels(5), SPEC), scale=(0, 2550))
    expected = segjax.Predictor(LoadedCheckpoint(Pixels(5), SPEC))(image)
    np.testing.assert_array_equal(predict(stored), expected)
    np.testing.assert_array_equal(predict(tmp_path / "a.tif"), expected)
    small = segjax.Predictor(LoadedCheckpoint(Pixels(5), SPEC), scale=(0, 2550), max_pixels=33 * 50 - 1)
    with pytest.raises(ValueError, match=r"a\.tif: has 33x50 pixels.*max_pixels"):
        small(tmp_path / "a.tif")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_fifo_is_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError) as caught:
        as_rgb(tmp_path / "a.png")
    assert str(caught.value) == f"{tmp_path / 'a.png'}: a FIFO, not a file"
    with pytest.raises(ValueError, match="null: a device"):
        as_rgb("/dev/null")


def test_a_predictor_takes_a_path_a_pil_image_and_an_array(tmp_path):
    predict = segjax.Predictor(LoadedCheckpoint(Pixels(5), SPEC))
    picture = scene(3, 33, 50)
    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = predict(picture)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(picture), picture):
        np.testing.assert_array_equal(predict(image), expected)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: is not an image that can be decoded"):
        predict(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        predict(tmp_path / "absent.png")
