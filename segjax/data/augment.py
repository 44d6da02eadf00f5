"""Augmentation on the device: one compiled function from uint8, uint16 or float32 images to normalised float32.

The order is mmsegmentation's for Cityscapes and ADE20K: random scale, rotation, crop, flip, photometric distortion,
normalisation, padding. Padding comes last, so that a padded pixel is 0 after normalisation and has the ignore label.

The values of uint16 and float32 images have no fixed range. Brightness and contrast of these images are changed after
the normalisation, where the mean is 0 and the standard deviation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax.data import hooks, specs
from segjax.data.crops import AugmentSettings, crop_pixels, draw_crops, nearest_pixels, place, rarity_of

# Number that is folded into the key of a sample for `on_device`. `jax.random.split(key)` gives the keys of 0 and 1, and
# `crops` uses 2, 3 and 4.
_ON_DEVICE = 5
# One 8-bit grey level in standard deviations of ImageNet's pixels.
_LEVEL = float(1 / np.mean(specs.IMAGENET_STD))


def normalise(
    images: jax.Array | np.ndarray,
    mean: Sequence[float] = specs.IMAGENET_MEAN,
    std: Sequence[float] = specs.IMAGENET_STD,
) -> jax.Array:
    """Normalises images: (images - mean) / std.

    Args:
      images: (..., C), of any dtype.
      mean, std: C numbers in the units of the images; by default ImageNet's, for values in 0..255.

    Returns:
      float32 (..., C).

    Example:
      >>> import numpy as np
      >>> from segjax import data
      >>> data.normalise(np.full((2, 2, 3), 100, np.uint8), mean=(90, 100, 110), std=(10, 10, 10))[0, 0]
      Array([ 1.,  0., -1.], dtype=float32)
    """
    return (jnp.asarray(images, jnp.float32) - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def augment(
    keys: jax.Array,
    batch: dict[str, Any],
    settings: AugmentSettings,
    *,
    ignore_label: int,
    class_pixels: np.ndarray | None = None,
    normalise: Callable[[jax.Array], jax.Array] = normalise,
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch, each sample with its own key.

    Args:
      keys: (B,) random keys.
      batch: "image", uint8, uint16 or float32 (B, H, W, C); "label", uint8 or uint16 (B, H, W); "size", int32 (B, 2),
        height and width of each image without its padding, which is never read. "crop", optional: the `Crops` of the
        same keys, for a batch that holds only a window of each image.
      settings: The `augment` section of a config.
      ignore_label: Label of the padding.
      class_pixels: Number of pixels of each label value in the training split, (K,), for `class_balance`.
      normalise: Values (..., C) -> float32 (..., C); `partial(normalise, mean=..., std=...)` for other statistics.

    Returns:
      Normalised images, float32 (B, h, w, C), and labels (B, h, w) of the dtype in the batch; (h, w) is settings.crop.

    Raises:
      ValueError: Mean and deviation are for another number of channels, or the function of `on_device` cannot be used.
    """
    crops = batch["crop"] if "crop" in batch else draw_crops(keys, batch["size"], settings)
    if "crop" not in batch and needs_labels(settings):
        rarity = rarity_for(settings, class_pixels)
        put = partial(place, settings=settings, ignore_label=ignore_label, rarity=rarity)
        crops = jax.vmap(put)(keys, crops, batch["label"], batch["size"])

    has_range = batch["image"].dtype == jnp.uint8

    def one(key, image, label, size, crop):
        if settings.rotation:
            image, label, inside = _resample_rotated(image, label, size, crop, settings.crop, ignore_label)
        else:
            image, label, inside = _resample(image, label, size, crop, settings.crop, ignore_label)
        _, photometry = jax.random.split(key)
        if settings.photometric and has_range:
            image = distort(photometry, image)
        elif settings.brightness and has_range:
            image = change_brightness(photometry, image, settings.brightness)
        if settings.on_device:
            image, label = hooks.on_device(settings.on_device, jax.random.fold_in(key, _ON_DEVICE), image, label)
            label = _padded(label, inside, ignore_label)
        normalised = normalise(image)
        if normalised.shape != image.shape:
            raise ValueError(f"images of {image.shape[-1]} channels are normalised to {normalised.shape[-1]} channels")
        if not has_range:
            normalised = change_normalised(photometry, normalised, settings)
        return jnp.where(inside[..., None], normalised, 0.0), label

    return jax.vmap(one)(keys, batch["image"], batch["label"], batch["size"], crops)


def needs_labels(settings: AugmentSettings) -> bool:
    """Whether the positions of crops depend on labels."""
    return settings.cat_max_ratio < 1 or settings.class_balance > 0


def rarity_for(settings: AugmentSettings, class_pixels: np.ndarray | None) -> np.ndarray | None:
    """Argument `rarity` of `place`, from the number of pixels of each class (K,); None without `class_balance`."""
    if not settings.class_balance:
        return None
    if class_pixels is None:
        raise ValueError("augment.class_balance needs class_pixels, the pixels of each class in the training split")
    return rarity_of(np.asarray(class_pixels))


def _resample(image, label, size, crop, lengths, ignore_label):
    """Crop, float32 (h, w, C), its labels (h, w), and bool (h, w), False in the padding."""
    rows, rows_inside = crop_pixels(lengths[0], crop.scaled[0], crop.offset[0])
    columns, columns_inside = crop_pixels(lengths[1], crop.scaled[1], crop.offset[1], flip=crop.flip)
    # One axis after the other: two small gathers instead of four per pixel.
    resampled = image.astype(jnp.float32)
    for axis, pixels in enumerate((rows, columns)):
        positions = _source_positions(pixels, size[axis], crop.scaled[axis])
        resampled = _interpolate(resampled, positions, size[axis], crop.origin[axis], axis=axis)
    nearest_rows = nearest_pixels(rows, size[0], crop.scaled[0]) - crop.origin[0]
    nearest_columns = nearest_pixels(columns, size[1], crop.scaled[1]) - crop.origin[1]
    inside = rows_inside[:, None] & columns_inside[None, :]
    return resampled, _padded(label[nearest_rows][:, nearest_columns], inside, ignore_label), inside


def _resample_rotated(image, label, size, crop, lengths, ignore_label):
    """`_resample`, rotated about the centre of the part of the crop that is inside the image.

    The result is that of mmsegmentation's `RandomRotate` on the scaled image, about this centre, before the crop:
    clockwise, bilinear for the image and nearest for labels. Pixels from outside the image are padding. But the image
    is resampled once, not twice, and pixels at its edge are not blended with the padding.
    """
    (rows, rows_inside), (columns, columns_inside) = (
        crop_pixels(lengths[0], crop.scaled[0], crop.offset[0]),
        crop_pixels(lengths[1], crop.scaled[1], crop.offset[1], flip=crop.flip),
    )
    centre = crop.offset + (jnp.minimum(jnp.array(lengths), crop.scaled - crop.offset) - 1) / 2
    down, right = rows[:, None] - centre[0], columns[None, :] - centre[1]
    cos, sin = jnp.cos(crop.angle), jnp.sin(crop.angle)
    # (h, w), in pixels of the scaled image.
    turned = centre[0] + cos * down - sin * right, centre[1] + sin * down + cos * right
    inside = rows_inside[:, None] & columns_inside[None, :]
    positions, weights, nearest = [], [], []
    for axis, pixels in enumerate(turned):
        inside &= (pixels >= -0.5) & (pixels < crop.scaled[axis] - 0.5)
        position = _source_positions(pixels, size[axis], crop.scaled[axis])
        before, after, weight = _neighbours(position, size[axis])
        positions.append((before - crop.origin[axis], after - crop.origin[axis]))
        weights.append((1 - weight, weight))
        whole = jnp.clip(jnp.floor(position + 0.5), 0, size[axis] - 1).astype(jnp.int32)
        nearest.append(whole - crop.origin[axis])
    resampled = jnp.zeros((*lengths, image.shape[-1]), jnp.float32)
    for row, row_weight in zip(positions[0], weights[0], strict=True):
        for column, column_weight in zip(positions[1], weights[1], strict=True):
            # Clipped, because pixels of the padding may lie outside the window.
            corner = image.at[row, column].get(mode="clip").astype(jnp.float32)
            resampled += (row_weight * column_weight)[..., None] * corner
    return resampled, _padded(label.at[tuple(nearest)].get(mode="clip"), inside, ignore_label), inside


def _padded(label, inside, ignore_label):
    return jnp.where(inside, label, jnp.array(ignore_label, label.dtype))


def _source_positions(pixels, size, scaled):
    """Positions in the image of pixels of the scaled image, along one axis; half-pixel centres as in cv2.resize."""
    return (pixels + 0.5) * (size / scaled) - 0.5


def _neighbours(positions, size):
    """Pixels before and after each position, int32, with edges repeated; and the weight of the pixel after it."""
    position = jnp.clip(positions, 0, size - 1)
    before = jnp.floor(position).astype(jnp.int32)
    return before, jnp.minimum(before + 1, size - 1), position - before


def _interpolate(image, positions, size, origin, *, axis):
    """Linear interpolation along `axis` at `positions`, edges repeated; `image` begins at `origin`."""
    before, after, weight = _neighbours(positions, size)
    shape = [1, 1, 1]
    shape[axis] = -1
    weight = weight.reshape(shape)
    return jnp.take(image, before - origin, axis) * (1 - weight) + jnp.take(image, after - origin, axis) * weight


class Distortion(NamedTuple):
    """Random photometric changes; each has its neutral value with probability one half.

    Attributes:
      brightness: Summand in -32..32.
      contrast: Factor in 0.5..1.5.
      saturation: Factor in 0.5..1.5.
      hue: Summand in -0.1..0.1 of a full turn.
      contrast_first: Whether contrast comes before saturation and hue.
    """

    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    hue: jax.Array
    contrast_first: jax.Array


def draw_distortion(key: jax.Array) -> Distortion:
    """Draws the random numbers of `distort`."""
    keys = jax.random.split(key, 9)

    def maybe(index, neutral, low, high):
        value = jax.random.uniform(keys[index], minval=low, maxval=high)
        return jnp.where(jax.random.bernoulli(keys[index + 4]), value, neutral)

    brightness, contrast = maybe(0, 0.0, -32.0, 32.0), maybe(1, 1.0, 0.5, 1.5)
    saturation, hue = maybe(2, 1.0, 0.5, 1.5), maybe(3, 0.0, -0.1, 0.1)
    return Distortion(brightness, contrast, saturation, hue, jax.random.bernoulli(keys[8]))


def distort(key: jax.Array, image: jax.Array) -> jax.Array:
    """Photometric distortion of SSD (Liu et al., 2016) with mmsegmentation's ranges: float32 (h, w, C) in 0..255.

    Each change is made with probability one half: brightness ±32, contrast 0.5..1.5 (before or after the colour
    changes), saturation 0.5..1.5, hue ±36 degrees. Only the brightness and contrast of images without three channels
    are changed.
    """
    brightness, contrast, saturation, hue, contrast_first = draw_distortion(key)
    image = jnp.clip(image + brightness, 0, 255)
    if image.shape[-1] != 3:
        return jnp.clip(image * contrast, 0, 255)
    image = jnp.clip(image * jnp.where(contrast_first, contrast, 1.0), 0, 255)
    image = change_colour(image, saturation=saturation, hue=hue)
    return jnp.clip(image * jnp.where(contrast_first, 1.0, contrast), 0, 255)


def change_brightness(key: jax.Array, image: jax.Array, largest: int) -> jax.Array:
    """Adds an integer in -largest..largest with probability one half, as in HRNet: float32 (h, w, C) in 0..255."""
    return jnp.clip(image + _drawn_brightness(key, largest), 0, 255)


def change_normalised(key: jax.Array, image: jax.Array, settings: AugmentSettings) -> jax.Array:
    """`distort` or `change_brightness` for a normalised image, float32 (h, w, C), whose values have no fixed range.

    One standard deviation counts as ImageNet's, about 58 grey levels of 8 bits. Contrast changes about the mean. Values
    are not clipped, and colours do not change.
    """
    if settings.photometric:
        brightness, contrast, *_ = draw_distortion(key)
        return image * contrast + brightness * _LEVEL
    if settings.brightness:
        return image + _drawn_brightness(key, settings.brightness) * _LEVEL
    return image


def _drawn_brightness(key: jax.Array, largest: int) -> jax.Array:
    """An integer in -largest..largest with probability one half, else 0."""
    value_key, is_key = jax.random.split(key)
    value = jax.random.randint(value_key, (), -largest, largest + 1)
    return jnp.where(jax.random.bernoulli(is_key), value, 0)


def change_colour(image: jax.Array, *, saturation: jax.Array, hue: jax.Array) -> jax.Array:
    """Multiplies the saturation and turns the hue (in turns of the circle) in HSV: float32 (h, w, 3) in 0..255."""
    value = jnp.max(image, axis=-1)
    chroma = value - jnp.min(image, axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    # Not value == red: if the compiler computes a channel twice, with different rounding, no channel equals the value.
    sector = jnp.where(
        (red >= green) & (red >= blue),
        ((green - blue) / safe) % 6,
        jnp.where(green >= blue, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    # Saturation is chroma / value and may not exceed one.
    chroma = jnp.minimum(chroma * saturation, value)
    sector = (sector + 6 * hue) % 6
    # Each channel falls from `value` by the chroma times a trapezoid of the hue, shifted by a third of the circle.
    phase = (jnp.array([5.0, 3.0, 1.0]) + sector[..., None]) % 6
    fall = jnp.clip(jnp.minimum(phase, 4 - phase), 0, 1)
    return value[..., None] - chroma[..., None] * fall


def step_keys(key: jax.Array, step: jax.Array | int, positions: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Random keys of a step: one per sample at `positions` of the batch, (B,), and one for dropout."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
    return jax.vmap(partial(jax.random.fold_in, augment_key))(positions), dropout_key
