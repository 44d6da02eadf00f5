"""Augmentation on the device, one compiled function from uint8 to normalised float32.

The order is mmsegmentation's for Cityscapes and ADE20K: random scale, crop, flip, photometric distortion, normalise,
pad. Padding comes last, so that a padded pixel is 0 after normalisation and carries the ignore label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from segjax.data import specs


def normalise(images: jax.Array) -> jax.Array:
    """RGB 0..255 (..., 3) of any type -> float32 with ImageNet's mean and deviation removed."""
    mean, std = (jnp.array(values, jnp.float32) for values in (specs.IMAGENET_MEAN, specs.IMAGENET_STD))
    return (images.astype(jnp.float32) - mean) / std


def augment(
    keys: jax.Array, batch: dict[str, jax.Array], settings, *, ignore_label: int
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch, each sample by its own key.

    Args:
      keys: (B,) random keys.
      batch: "image" uint8 (B, H, W, 3), "label" uint8 (B, H, W), "size" int32 (B, 2): height and width of what is not
        padding.
      settings: the `augment` part of a config.

    Returns:
      float32 (B, h, w, 3), normalised, and uint8 (B, h, w); (h, w) is settings.crop.
    """

    def one(key, image, label, size):
        geometry, photometry = jax.random.split(key)
        image, label, inside = _scale_crop_flip(geometry, image, label, size, settings, ignore_label)
        if settings.photometric:
            image = distort(photometry, image)
        return jnp.where(inside[..., None], normalise(image), 0.0), label

    return jax.vmap(one)(keys, batch["image"], batch["label"], batch["size"])


def _scale_crop_flip(key, image, label, size, settings, ignore_label):
    """-> float32 (h, w, 3) in 0..255, uint8 (h, w), bool (h, w): what is not padding."""
    scale_key, top_key, left_key, flip_key = jax.random.split(key, 4)
    scale = jax.random.uniform(scale_key, minval=settings.scale[0], maxval=settings.scale[1])
    scaled = jnp.maximum(jnp.round(size * scale).astype(jnp.int32), 1)
    rows, rows_inside = _source_positions(top_key, settings.crop[0], size[0], scaled[0], flip=False)
    flip = jax.random.bernoulli(flip_key, settings.flip)
    columns, columns_inside = _source_positions(left_key, settings.crop[1], size[1], scaled[1], flip=flip)
    # One axis after the other: two small gathers instead of four of every pixel.
    resampled = _interpolate(_interpolate(image.astype(jnp.float32), rows, size[0], axis=0), columns, size[1], axis=1)
    nearest = label[_nearest(rows, size[0])][:, _nearest(columns, size[1])]
    inside = rows_inside[:, None] & columns_inside[None, :]
    return resampled, jnp.where(inside, nearest, ignore_label).astype(jnp.uint8), inside


def _source_positions(key, length, size, scaled, *, flip):
    """Where the pixels of a crop lie in the source along one axis.

    Args:
      length: of the crop. size: of the image. scaled: of the scaled image. flip: mirrors what is inside.

    Returns:
      float32 (length,) positions in source pixels, half-pixel centres as in cv2.resize; bool (length,) inside.
    """
    offset = jax.random.randint(key, (), 0, jnp.maximum(scaled - length, 0) + 1)
    inside_length = jnp.minimum(length, scaled - offset)
    target = jnp.arange(length)
    mirrored = jnp.where(flip, inside_length - 1 - target, target)
    position = (mirrored + offset + 0.5) * (size / scaled) - 0.5
    return position, target < inside_length


def _interpolate(image, positions, size, *, axis):
    """Linear interpolation along `axis` at `positions`, edges repeated."""
    position = jnp.clip(positions, 0, size - 1)
    before = jnp.floor(position).astype(jnp.int32)
    after = jnp.minimum(before + 1, size - 1)
    shape = [1, 1, 1]
    shape[axis] = -1
    weight = (position - before).reshape(shape)
    return jnp.take(image, before, axis) * (1 - weight) + jnp.take(image, after, axis) * weight


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
