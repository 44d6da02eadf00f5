"""Augmentation against cv2, colorsys and counting, with one setting at a time."""

import colorsys
from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.data import augment, specs
from segjax.recipes import common
from segjax.train.schema import default_config

pytestmark = pytest.mark.one_python

IGNORE = 255
MEAN, STD = np.array(specs.IMAGENET_MEAN), np.array(specs.IMAGENET_STD)


def settings_of(crop, *, scale=(1.0, 1.0), flip=0.0, photometric=False, **others):
    settings = default_config("folder").augment
    settings.update(crop=crop, scale=scale, flip=flip, photometric=photometric, **others)
    return settings


def stored(images, labels, canvas=None, junk=0):
    """A batch as the pipeline gives it: every sample in the top left of a canvas of one size."""
    height, width = canvas or np.max([label.shape for label in labels], axis=0)
    image = np.full((len(images), height, width, 3), junk, np.uint8)
    label = np.full((len(images), height, width), junk, np.uint8)
    for i, (one, truth) in enumerate(zip(images, labels, strict=True)):
        image[i, : one.shape[0], : one.shape[1]], label[i, : one.shape[0], : one.shape[1]] = one, truth
    size = np.array([truth.shape for truth in labels], np.int32)
    return {"image": image, "label": label, "size": size}


def keys_of(seed, batch):
    return jax.random.split(jax.random.key(seed), batch)


def run(batch, settings, *, seed=0, keys=None):
    """-> images in 0..255 float64 (the normalisation undone), labels, and the normalised images."""
    keys = keys_of(seed, len(batch["label"])) if keys is None else keys
    compiled = jax.jit(partial(augment.augment, settings=settings, ignore_label=IGNORE))
    images, labels = compiled(keys, batch)
    assert images.dtype == jnp.float32 and labels.dtype == jnp.uint8
    assert images.shape == (*labels.shape, 3) == (len(batch["label"]), *settings.crop, 3)
    images = np.asarray(images)
    return images.astype(np.float64) * STD + MEAN, np.asarray(labels), images


def noise(seed, *sizes, classes=5):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return images, [rng.integers(0, classes, size, dtype=np.uint8) for size in sizes]


def smooth(seed, *sizes):
    """Images without sharp edges: noise of a few pixels, upsampled."""
    rng = np.random.default_rng(seed)
    images = [
        cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
        for size in sizes
    ]
    return images, [np.zeros(size, np.uint8) for size in sizes]


# ------------------------------------------------------------------------------------------------------ normalisation


def test_normalising_removes_the_mean_and_deviation_of_imagenet():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images / 255 - mean) / deviation
    for given in (images, images.astype(np.float32)):
        normalised = augment.normalise(jnp.array(given))
        assert normalised.dtype == jnp.float32
        np.testing.assert_allclose(normalised, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_with_everything_off_augmentation_only_normalises(seed):
    images, labels = noise(seed, (33, 48), (33, 48), (33, 48))
    _, given, normalised = run(stored(images, labels), settings_of((33, 48)), seed=seed)
    np.testing.assert_allclose(normalised, augment.normalise(np.stack(images)), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(given, labels)


# -------------------------------------------------------------------------------------------------- scale, crop, flip


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3, 2.0])
def test_a_scaled_image_equals_that_of_cv2_within_0_01(scale):
    images, labels = noise(3, (38, 57), (38, 57))
    size = tuple(round(side * scale) for side in (38, 57))
    given, _, _ = run(stored(images, labels), settings_of(size, scale=(scale, scale)))
    for one, image in zip(given, images, strict=True):
        expected = cv2.resize(image.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(one, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_a_scaled_label_takes_the_nearest_pixel_by_centres(scale):
    images, labels = noise(4, (30, 47), (30, 47))
    size = tuple(round(side * scale) for side in (30, 47))
    _, given, _ = run(stored(images, labels), settings_of(size, scale=(scale, scale)))
    for one, label in zip(given, labels, strict=True):
        expected = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize("seed", range(3))
def test_image_and_label_stay_aligned_through_scale_crop_and_flip(seed):
    # Blocks whose colour is their label: where a pixel is purely one colour, its label must say the same.
    rng = np.random.default_rng(seed)
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
    labels = [np.kron(rng.integers(0, 5, (6, 7)), np.ones((9, 11))).astype(np.uint8) for _ in range(8)]
    batch = stored([colors[label] for label in labels], labels)
    images, given, _ = run(batch, settings_of((40, 64), scale=(0.5, 2.0), flip=0.5), seed=seed)
    pure = np.abs(images[..., None, :] - colors).max(-1) < 0.5  # (B, h, w, 5)
    known = pure.any(-1) & (given != IGNORE)
    assert known.mean() > 0.5
    np.testing.assert_array_equal(pure.argmax(-1)[known], given[known])
    for k in range(5):
        assert (given[known] == k).mean() > 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_a_crop_is_a_window_of_the_image_at_any_position(seed):
    # Every pixel has a colour of its own, which tells where it came from.
    rows, columns = np.mgrid[:36, :42].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    batch = stored([image] * 200, [rows] * 200)
    images, labels, _ = run(batch, settings_of((32, 38)), seed=seed)
    top, left = np.rint(images[:, 0, 0, 0]).astype(int), np.rint(images[:, 0, 0, 1]).astype(int)
    for one, label, i, j in zip(images, labels, top, left, strict=True):
        np.testing.assert_allclose(one, image[i : i + 32, j : j + 38], rtol=0, atol=1e-3)
        np.testing.assert_array_equal(label, rows[i : i + 32, j : j + 38])
    assert set(zip(top, left, strict=True)) == {(i, j) for i in range(5) for j in range(5)}


@pytest.mark.parametrize("seed", [0, 1])
def test_scales_are_drawn_evenly_from_the_whole_range(seed):
    # The share of the canvas that is not padding is the square of the scale.
    label = np.zeros((40, 60), np.uint8)
    batch = stored([np.zeros((40, 60, 3), np.uint8)] * 400, [label] * 400)
    _, labels, _ = run(batch, settings_of((80, 120), scale=(0.5, 2.0)), seed=seed)
    heights, widths = (labels[:, :, 0] != IGNORE).sum(1), (labels[:, 0] != IGNORE).sum(1)
    np.testing.assert_allclose(heights / 40, widths / 60, rtol=0, atol=1 / 60 + 1 / 40)  # one scale for both sides
    scales = widths / 60
    assert scales.min() >= 0.5 and scales.max() <= 2.0
    # 400 draws: each fifth of the range is hit 80 ± 8 times.
    counts, _ = np.histogram(scales, bins=5, range=(0.5, 2.0))
    assert counts.min() > 48 and counts.max() < 112


def test_a_flip_with_probability_one_mirrors_image_and_label():
    images, labels = noise(5, (33, 40), (33, 40), (33, 40))
    given, truth, _ = run(stored(images, labels), settings_of((33, 40), flip=1.0))
    np.testing.assert_allclose(given, np.stack(images)[:, :, ::-1], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(truth, np.stack(labels)[:, :, ::-1])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_flip_happens_with_its_probability(seed):
    columns = np.broadcast_to(np.arange(32, dtype=np.uint8), (32, 32))
    batch = stored([np.zeros((32, 32, 3), np.uint8)] * 400, [columns] * 400)
    for probability, low, high in ((0.5, 160, 240), (0.1, 16, 64)):  # four standard deviations
        _, labels, _ = run(batch, settings_of((32, 32), flip=probability), seed=seed)
        assert low < (labels[:, 0, 0] == 31).sum() < high


# ------------------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("photometric", [False, True])
def test_padding_is_zero_and_ignored_and_at_the_bottom_and_right(flip, photometric):
    images, labels = noise(6, (20, 50), (40, 30), (40, 50))
    settings = settings_of((48, 64), flip=flip, photometric=photometric)
    _, given, normalised = run(stored(images, labels, junk=77), settings)
    for one, truth, label in zip(normalised, given, labels, strict=True):
        height, width = label.shape
        np.testing.assert_array_equal(truth[:height, :width], label[:, ::-1] if flip else label)
        outside = np.ones((48, 64), bool)
        outside[:height, :width] = False
        assert (truth[outside] == IGNORE).all() and (one[outside] == 0).all()
        assert np.abs(one[:height, :width]).max() > 1


@pytest.mark.parametrize("seed", range(3))
def test_padding_of_the_stored_arrays_is_never_used(seed):
    images, labels = smooth(seed, (34, 60), (60, 34), (41, 47), (60, 60))
    labels = [np.full_like(label, 1) for label in labels]
    settings = settings_of((40, 52), scale=(0.5, 2.0), flip=0.5)
    results = [run(stored(images, labels, canvas=(64, 70), junk=junk), settings, seed=seed) for junk in (0, 2, 255)]
    for images_, labels_, _ in results[1:]:
        np.testing.assert_array_equal(images_, results[0][0])
        np.testing.assert_array_equal(labels_, results[0][1])
    assert set(np.unique(results[0][1])) == {1, IGNORE}


def test_an_image_smaller_than_its_stored_array_is_the_whole_image():
    images, labels = noise(8, (37, 43), (37, 43), (37, 43))
    settings = settings_of((48, 40), scale=(0.6, 1.7), flip=0.5)
    tight, loose = (run(stored(images, labels, canvas), settings, seed=2) for canvas in ((37, 43), (50, 90)))
    np.testing.assert_allclose(tight[0], loose[0], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(tight[1], loose[1])


def test_an_ignored_pixel_of_the_label_stays_ignored():
    images, labels = noise(9, (32, 40), (32, 40))
    labels[0][5:9], labels[1][:, 30:] = IGNORE, IGNORE
    _, given, _ = run(stored(images, labels), settings_of((32, 40), photometric=True))
    np.testing.assert_array_equal(given, labels)


# --------------------------------------------------------------------------------------------------------- randomness

EVERYTHING = settings_of((40, 48), scale=(0.5, 2.0), flip=0.5, photometric=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_key_determines_the_sample(seed):
    image, label = (part[0] for part in noise(10, (44, 52)))
    batch = stored([image] * 6, [label] * 6)
    first, again, other = (run(batch, EVERYTHING, seed=s) for s in (seed, seed, seed + 100))
    np.testing.assert_array_equal(first[2], again[2])
    np.testing.assert_array_equal(first[1], again[1])
    for i in range(6):
        assert not np.array_equal(first[2][i], other[2][i])
        for j in range(i):
            assert not np.array_equal(first[2][i], first[2][j])
            assert not np.array_equal(first[1][i], first[1][j])


def test_a_sample_does_not_depend_on_the_others_or_its_position():
    images, labels = noise(11, (44, 52), (44, 52), (44, 52), (44, 52))
    strangers = noise(12, (44, 52), (44, 52), (44, 52), (44, 52))
    keys, other_keys = keys_of(0, 4), keys_of(1, 4)
    together = run(stored(images, labels), EVERYTHING, keys=keys)
    # Sample 2 among strangers, in place 1.
    for part, own in zip(strangers, (images, labels), strict=True):
        part[1] = own[2]
    among = run(stored(*strangers), EVERYTHING, keys=other_keys.at[1].set(keys[2]))
    np.testing.assert_array_equal(among[2][1], together[2][2])
    np.testing.assert_array_equal(among[1][1], together[1][2])
    assert not np.array_equal(among[2][0], together[2][0])


@pytest.mark.parametrize("seed", [0, 1])
def test_scale_flip_position_and_colour_are_drawn_independently(seed):
    # The label says where a pixel came from, and the image, one grey, how it was distorted.
    rows, columns = np.mgrid[:80, :80].astype(np.uint8)
    number, grey = 1600, np.full((80, 80, 3), 100, np.uint8)
    settings = settings_of((32, 32), scale=(0.6, 1.8), flip=0.5, photometric=True)
    images, left, _ = run(stored([grey] * number, [columns] * number), settings, seed=seed)
    _, top, _ = run(stored([grey] * number, [rows] * number), settings, seed=seed)
    left, top = left.astype(float), top.astype(float)
    scale = 31 / np.abs(left[:, 0, -1] - left[:, 0, 0])
    flipped = left[:, 0, -1] < left[:, 0, 0]
    # The crop's offset as a share of the room that the scale leaves it.
    places = [lines.min((1, 2)) / (80 - 32 / scale) for lines in (left, top)]
    drawn_values = np.stack([scale, flipped, *places, images[:, 0, 0, 0]])
    correlation = np.corrcoef(drawn_values)
    assert np.abs(correlation - np.eye(5)).max() < 0.1  # 1 / sqrt(1600) is 0.025
    assert drawn_values.std(1).min() > 0.2


def test_augmentation_accepts_the_default_settings():
    settings = common.get_config("folder").augment
    settings.crop = (33, 47)
    images, labels = noise(13, (60, 70), (60, 70))
    given, truth, _ = run(stored(images, labels), settings)
    assert given.shape == (2, 33, 47, 3) and set(np.unique(truth)) <= {*range(5), IGNORE}


# ------------------------------------------------------------------------------------------------------------- colour


def change_by_hand(pixel, saturation, hue):
    """In HSV of the standard library; everything in 0..255."""
    h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
    return 255 * np.array(colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v))


@pytest.mark.parametrize("seed", [0, 1])
def test_colours_change_as_in_the_standard_librarys_hsv(seed):
    rng = np.random.default_rng(seed)
    # Random colours, greys, and colours of two equal or no channels, where sectors of the hue meet.
    pixels = np.concatenate([rng.uniform(0, 255, (60, 3)), np.repeat(rng.uniform(0, 255, (5, 1)), 3, 1)])
    pixels = np.concatenate([pixels, 255.0 * np.array(np.meshgrid(*[[0, 0.4, 1]] * 3)).reshape(3, -1).T])
    change = jax.jit(augment.change_colour)
    for saturation in (0.5, 0.83, 1.0, 1.5):
        for hue in (-0.1, 0.0, 0.03, 0.1):
            given = change(jnp.array(pixels, jnp.float32)[None], saturation=saturation, hue=hue)[0]
            expected = [change_by_hand(pixel, saturation, hue) for pixel in pixels]
            np.testing.assert_allclose(given, expected, rtol=0, atol=2e-3)


def test_a_grey_pixel_is_not_changed_by_saturation_and_hue():
    grey = jnp.repeat(jnp.arange(256, dtype=jnp.float32)[None, :, None], 3, -1)
    np.testing.assert_allclose(augment.change_colour(grey, saturation=1.5, hue=0.1), grey, rtol=0, atol=1e-4)


def drawn(seed, number=4000):
    """Brightness, contrast, saturation and hue of `number` distortions, read off three pixels that never clip."""
    grey, other_grey, colour = np.array([100.0] * 3), np.array([60.0] * 3), np.array([110.0, 90.0, 75.0])
    image = jnp.array(np.stack([grey, other_grey, colour])[None], jnp.float32)  # (1, 3, 3)
    out = np.asarray(jax.jit(jax.vmap(augment.distort, (0, None)))(keys_of(seed, number), image), np.float64)[:, 0]
    contrast = (out[:, 0, 0] - out[:, 1, 0]) / 40
    brightness = out[:, 0, 0] / contrast - 100
    before = (colour + brightness[:, None]) / 255
    after = out[:, 2] / contrast[:, None] / 255
    hsv = [[colorsys.rgb_to_hsv(*pixel) for pixel in pixels] for pixels in (before, after)]
    (h0, s0, _), (h1, s1, _) = np.array(hsv).transpose(0, 2, 1)
    hue = (h1 - h0 + 0.5) % 1 - 0.5
    return {"brightness": brightness, "contrast": contrast, "saturation": s1 / s0, "hue": hue}


RANGES = {
    "brightness": (0.0, -32.0, 32.0),
    "contrast": (1.0, 0.5, 1.5),
    "saturation": (1.0, 0.5, 1.5),
    "hue": (0.0, -0.1, 0.1),
}


@pytest.mark.parametrize("seed", [0, 1])
def test_each_distortion_has_probability_one_half_and_spans_its_range(seed):
    values = drawn(seed)
    for name, (neutral, low, high) in RANGES.items():
        span = high - low
        there = np.abs(values[name] - neutral) > 1e-4 * span
        # 4000 draws of probability one half: 2000 ± 32.
        assert abs(there.sum() - 2000) < 130, name
        drawn_values = values[name][there]
        assert low - 1e-4 * span <= drawn_values.min() < low + 0.01 * span, name
        assert high + 1e-4 * span >= drawn_values.max() > high - 0.01 * span, name
        counts, _ = np.histogram(drawn_values, bins=4, range=(low - 1e-3 * span, high + 1e-3 * span))
        assert counts.min() > 400 and counts.max() < 600, name  # 500 ± 20


@pytest.mark.parametrize("seed", [0, 1])
def test_the_four_distortions_are_drawn_independently(seed):
    values = drawn(seed)
    columns = np.stack([values[name] for name in RANGES])
    there = np.stack(
        [np.abs(values[name] - neutral) > 1e-4 * (high - low) for name, (neutral, low, high) in RANGES.items()]
    )
    for table in (columns, there):
        correlation = np.corrcoef(table)
        assert np.abs(correlation - np.eye(4)).max() < 0.07  # 1 / sqrt(4000) is 0.016
    # None of the four in one case of sixteen: 250 ± 15.
    assert 185 < (~there.any(0)).sum() < 315


def test_contrast_precedes_the_colours_in_half_of_the_cases():
    # Contrast first clips the red channel here, so that the colour changes start from another value.
    color, number = np.array([200.0, 120.0, 40.0]), 10_000
    image = jnp.array(color, jnp.float32)[None, None]
    out = np.asarray(jax.jit(jax.vmap(augment.distort, (0, None)))(keys_of(3, number), image), np.float64)[:, 0, 0]
    values = drawn(3, number)
    telling = np.flatnonzero((values["contrast"] > 1.3) & (values["brightness"] > -1e-3) & (values["saturation"] < 0.9))
    first = 0
    for i in telling:
        bright = np.minimum(color + values["brightness"][i], 255)
        contrast, change = values["contrast"][i], (values["saturation"][i], values["hue"][i])
        before = change_by_hand(np.minimum(bright * contrast, 255), *change)
        after = np.minimum(change_by_hand(bright, *change) * contrast, 255)
        errors = [np.abs(out[i] - candidate).max() for candidate in (before, after)]
        assert min(errors) < 0.02 < 0.5 < max(errors)
        first += errors[0] < errors[1]
    assert len(telling) > 100
    assert abs(first / len(telling) - 0.5) < 2 / np.sqrt(len(telling))  # four standard deviations


@pytest.mark.parametrize("seed", [0, 1])
def test_distorted_values_stay_within_8_bits(seed):
    images = jnp.array(np.random.default_rng(seed).choice([0.0, 255.0, 130.0], (64, 5, 7, 3)), jnp.float32)
    out = jax.jit(jax.vmap(augment.distort))(keys_of(seed, 64), images)
    assert out.min() >= 0 and out.max() <= 255 and np.unique(out).size > 100
