"""Corruptions against Pillow, scipy and colorsys, and against their definitions."""

import colorsys
import io

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

from segjax.data import corruptions, specs
from segjax.data.corruptions import KINDS, SEVERITIES, CorruptedRecords
from segjax.data.records import SplitRecords
from tests.pixels import scene

SIZES = [(0, (40, 61)), (1, (15, 22))]


def corrupted(kind, image, severity):
    found = KINDS[kind](image, severity, np.random.default_rng(0))
    assert found.dtype == np.uint8 and found.shape == image.shape
    return found.astype(int)


@pytest.mark.parametrize("seed, size", SIZES)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_corruption_equals_pillows(seed, size, severity):
    image, file = scene(seed, *size), io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    expected = np.asarray(Image.open(file)).astype(int)
    found = corrupted("jpeg", image, severity)
    # Two versions of libjpeg may round differently.
    assert np.abs(found - expected).max() <= 3 and np.abs(found - expected).mean() < 0.1
    assert np.abs(found - image).mean() > 1


@pytest.mark.parametrize("seed, size", SIZES)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_equals_scipys(seed, size, severity):
    image = scene(seed, *size)
    sigma = (1, 2, 3, 4, 6)[severity - 1]
    expected = scipy.ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="mirror", truncate=3)
    assert np.abs(corrupted("blur", image, severity) - expected).max() < 1.5


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_is_an_addition_in_hsv(severity):
    image = scene(3, 12, 17)
    image[0, :3] = [[0, 0, 0], [255, 255, 255], [9, 0, 200]]
    expected = np.empty(image.shape)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255))
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, min(value + severity / 10, 1))
    assert np.abs(corrupted("brightness", image, severity) - 255 * expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_keeps_the_mean_colour(severity):
    image = scene(4, 30, 21)
    found, factor = corrupted("contrast", image, severity), (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    for channel in range(3):
        values = image[..., channel].astype(float)
        expected = factor * values + (1 - factor) * values.mean()
        assert np.abs(found[..., channel] - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_is_normal_with_the_right_deviation(severity):
    image = np.full((150, 200, 3), 127, np.uint8)
    noise = corrupted("gaussian noise", image, severity) - 127
    deviation = 255 * (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    inside = np.abs(noise) < 100
    found = scipy.stats.kstest(
        noise[inside], scipy.stats.truncnorm(-100 / deviation, 100 / deviation, 0, deviation).cdf
    )
    # Rounding to integers moves the distribution by up to half a step.
    assert found.statistic < 0.02 + 0.5 / deviation
    assert np.mean(inside) == pytest.approx(scipy.stats.norm.cdf(100 / deviation) * 2 - 1, abs=0.01)
    # Values and pixels are independent.
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.03


def split_of(names):
    images = np.stack([scene(int(name[1:]), 20, 30) for name in names])
    labels = np.full((len(names), 24, 33), 7, np.uint8)
    images = np.pad(images, ((0, 0), (0, 4), (0, 3), (0, 0)))
    return SplitRecords(specs.Split(images, labels, np.tile(np.int32((20, 30)), (len(names), 1)), tuple(names)))


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_of_an_image_does_not_depend_on_the_others(kind):
    every, some = (CorruptedRecords(split_of(names), kind, 3) for names in (["a0", "a1", "a2", "b2"], ["a2", "a1"]))
    assert len(every) == 4 and every.names == ("a0", "a1", "a2", "b2") and every.sizes.tolist() == [[20, 30]] * 4
    # Repeated, and in another order.
    for place, other in ((1, 1), (2, 0), (1, 1)):
        image, label = every[place]
        np.testing.assert_array_equal(image, some[other][0])
        assert image.shape == (20, 30, 3) and label.shape == (20, 30) and (label == 7).all()
    # Two images alike under two names: only noise tells them apart.
    assert (every[2][0] == every[3][0]).all() == (kind != "gaussian noise")
    milder = CorruptedRecords(split_of(["a1"]), kind, 1)[0][0].astype(int)
    assert np.abs(every[1][0] - scene(1, 20, 30).astype(int)).mean() > np.abs(milder - scene(1, 20, 30)).mean() > 0


def test_constants_increase_with_the_severity():
    for constants in (corruptions.NOISE, corruptions.BLUR, corruptions.BRIGHTNESS):
        assert list(constants) == sorted(constants) and len(constants) == 5
