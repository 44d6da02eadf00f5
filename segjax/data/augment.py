"""Augmentation on the device, one compiled function from uint8 to normalised float32.

The order is mmsegmentation's for Cityscapes and ADE20K: random scale, crop, flip, photometric distortion, normalise,
pad. Padding comes last, so that a padded pixel is 0 after normalisation and carries the ignore label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from segjax.data import specs


class Crops(NamedTuple):
    """Position of the crop of each sample, and of the window of its image that is stored.

    Attributes:
      scaled: int32 (B, 2), height and width of the scaled image.
      offset: int32 (B, 2), first row and column of the crop in the scaled image.
      flip: bool (B,), whether the crop is mirrored horizontally.
      origin: int32 (B, 2), first row and column of the image that are stored; 0 if the whole image is stored.
    """

    scaled: jax.Array | np.ndarray
    offset: jax.Array | np.ndarray
    flip: jax.Array | np.ndarray
    origin: jax.Array | np.ndarray


class AugmentSettings(Protocol):
    """The `augment` section of a config, see `segjax.train.schema`."""

    @property
    def crop(self) -> Sequence[int]: ...

    @property
    def scale(self) -> Sequence[float]: ...

    @property
    def flip(self) -> float: ...

    @property
    def photometric(self) -> bool: ...


def normalise(
    images: jax.Array | np.ndarray,
    mean: Sequence[float] = specs.IMAGENET_MEAN,
    std: Sequence[float] = specs.IMAGENET_STD,
) -> jax.Array:
    """(images - mean) / std: RGB in 0..255 (..., 3) of any dtype -> float32; mean and std default to ImageNet's."""
    return (jnp.asarray(images, jnp.float32) - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def augment(
    keys: jax.Array, batch: dict[str, Any], settings: AugmentSettings, *, ignore_label: int
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch, each sample with its own key.

    Args:
      keys: (B,) random keys.
      batch: "image" uint8 (B, H, W, 3), "label" uint8 (B, H, W), "size" int32 (B, 2): height and width of the image
        without its padding, which is never read. "crop", optional: the result of `draw_crops` for the same keys, of a
        batch that holds only a window of each image.
      settings: the `augment` section of a config.
      ignore_label: label of the padding.

    Returns:
      float32 (B, h, w, 3), normalised, and uint8 (B, h, w); (h, w) is settings.crop.
    """
    crops = batch["crop"] if "crop" in batch else draw_crops(keys, batch["size"], settings)

    def one(key, image, label, size, crop):
        image, label, inside = _scale_crop_flip(image, label, size, crop, settings.crop, ignore_label)
        if settings.photometric:
            _, photometry = jax.random.split(key)
            image = distort(photometry, image)
        return jnp.where(inside[..., None], normalise(image), 0.0), label

    return jax.vmap(one)(keys, batch["image"], batch["label"], batch["size"], crops)


def draw_crops(keys: jax.Array, sizes: jax.Array, settings: AugmentSettings) -> Crops:
    """Random crop: scale, position and flip of each sample, from its key (B,) and the size (B, 2) of its image."""

    def one(key, size):
        geometry, _ = jax.random.split(key)
        scale_key, *offset_keys, flip_key = jax.random.split(geometry, 4)
        scale = jax.random.uniform(scale_key, minval=settings.scale[0], maxval=settings.scale[1])
        scaled = jnp.maximum(jnp.round(size * scale).astype(jnp.int32), 1)
        room = jnp.maximum(scaled - jnp.array(settings.crop), 0)
        offset = [jax.random.randint(key, (), 0, most + 1) for key, most in zip(offset_keys, room, strict=True)]
        flip = jax.random.bernoulli(flip_key, settings.flip)
        return Crops(scaled, jnp.stack(offset).astype(jnp.int32), flip, jnp.zeros(2, jnp.int32))

    return jax.vmap(one)(keys, sizes)


# Rows of an image that a crop may need in addition to the distance between its first and last row: 1, since both ends
# count, 2 for interpolation and 2 for rounding on the device, one on each side.
_MARGIN = 5


def window_size(sizes: np.ndarray, settings: AugmentSettings) -> tuple[int, int]:
    """Height and width of a window of an image that contains any crop of any image of the sizes (N, 2)."""
    # A scaled side is rounded, by at most half a pixel, before the positions of its pixels are computed.
    needed = (math.ceil((side + 0.5) / settings.scale[0]) + _MARGIN for side in settings.crop)
    height, width = (min(side, int(largest)) for side, largest in zip(needed, sizes.max(axis=0), strict=True))
    return height, width


def with_origins(crops: Crops, sizes: np.ndarray, window: tuple[int, int]) -> Crops:
    """The same crops, taken from windows (h, w) of images of the sizes (B, 2); computed on the host."""
    scaled, offset, flip, _ = map(np.asarray, crops)
    first = np.floor((offset + 0.5) * (sizes / scaled) - 0.5).astype(np.int32) - _MARGIN // 2
    origin = np.clip(first, 0, np.maximum(sizes - window, 0)).astype(np.int32)
    return Crops(scaled, offset, flip, origin)


def _scale_crop_flip(image, label, size, crop, lengths, ignore_label):
    """-> float32 (h, w, 3) in 0..255, uint8 (h, w), bool (h, w): False in the padding."""
    rows, rows_inside = _source_positions(lengths[0], size[0], crop.scaled[0], crop.offset[0], flip=False)
    columns, columns_inside = _source_positions(lengths[1], size[1], crop.scaled[1], crop.offset[1], flip=crop.flip)
    # One axis after the other: two small gathers instead of four of every pixel.
    resampled = _interpolate(image.astype(jnp.float32), rows, size[0], crop.origin[0], axis=0)
    resampled = _interpolate(resampled, columns, size[1], crop.origin[1], axis=1)
    nearest = label[_nearest(rows, size[0]) - crop.origin[0]][:, _nearest(columns, size[1]) - crop.origin[1]]
    inside = rows_inside[:, None] & columns_inside[None, :]
    return resampled, jnp.where(inside, nearest, ignore_label).astype(jnp.uint8), inside


def _source_positions(length, size, scaled, offset, *, flip):
    """Positions of the pixels of a crop in the image along one axis.

    Args:
      length: of the crop. size: of the image. scaled: of the scaled image. offset: of the crop in the scaled image.
      flip: mirrors the part of the crop that is inside the image.

    Returns:
      float32 (length,) positions in pixels of the image, half-pixel centres as in cv2.resize; bool (length,), False in
      the padding.
    """
    inside_length = jnp.minimum(length, scaled - offset)
    target = jnp.arange(length)
    mirrored = jnp.where(flip, inside_length - 1 - target, target)
    position = (mirrored + offset + 0.5) * (size / scaled) - 0.5
    return position, target < inside_length


def _interpolate(image, positions, size, origin, *, axis):
    """Linear interpolation along `axis` at `positions`, edges repeated; `image` begins at `origin`."""
    position = jnp.clip(positions, 0, size - 1)
    before = jnp.floor(position).astype(jnp.int32)
    after = jnp.minimum(before + 1, size - 1)
    shape = [1, 1, 1]
    shape[axis] = -1
    weight = (position - before).reshape(shape)
    return jnp.take(image, before - origin, axis) * (1 - weight) + jnp.take(image, after - origin, axis) * weight


def _nearest(positions, size):
    return jnp.clip(jnp.floor(positions + 0.5), 0, size - 1).astype(jnp.int32)


def distort(key: jax.Array, image: jax.Array) -> jax.Array:
    """Photometric distortion of SSD (Liu et al., 2016) with mmsegmentation's ranges: float32 (h, w, 3) in 0..255.

    Each with probability one half: brightness ±32, contrast 0.5..1.5 (before or after the colour changes),
    saturation 0.5..1.5, hue ±36 degrees.
    """
    keys = jax.random.split(key, 9)

    def maybe(index, neutral, low, high):
        value = jax.random.uniform(keys[index], minval=low, maxval=high)
        return jnp.where(jax.random.bernoulli(keys[index + 4]), value, neutral)

    brightness, contrast = maybe(0, 0.0, -32.0, 32.0), maybe(1, 1.0, 0.5, 1.5)
    saturation, hue = maybe(2, 1.0, 0.5, 1.5), maybe(3, 0.0, -0.1, 0.1)
    contrast_first = jax.random.bernoulli(keys[8])
    image = jnp.clip(image + brightness, 0, 255)
    image = jnp.clip(image * jnp.where(contrast_first, contrast, 1.0), 0, 255)
    image = change_colour(image, saturation=saturation, hue=hue)
    return jnp.clip(image * jnp.where(contrast_first, 1.0, contrast), 0, 255)


def change_colour(image: jax.Array, *, saturation: jax.Array, hue: jax.Array) -> jax.Array:
    """Multiplies the saturation and turns the hue (in turns of the circle) in HSV: float32 (h, w, 3) in 0..255."""
    value = jnp.max(image, axis=-1)
    chroma = value - jnp.min(image, axis=-1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    sector = jnp.where(
        value == red,
        ((green - blue) / safe) % 6,
        jnp.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    # Saturation is chroma / value and may not exceed one.
    chroma = jnp.minimum(chroma * saturation, value)
    sector = (sector + 6 * hue) % 6
    # Each channel falls from `value` by the chroma times a trapezoid of the hue, shifted by a third of the circle.
    phase = (jnp.array([5.0, 3.0, 1.0]) + sector[..., None]) % 6
    fall = jnp.clip(jnp.minimum(phase, 4 - phase), 0, 1)
    return value[..., None] - chroma[..., None] * fall


def step_keys(key: jax.Array, step: jax.Array | int, positions: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Random keys of a step: (B,), one for each sample at `positions` of the batch, and one for dropout."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
    return jax.vmap(partial(jax.random.fold_in, augment_key))(positions), dropout_key
