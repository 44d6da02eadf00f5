"""Crops: the scale and rotation of an image, the position of its crop, and the window of the image that holds the crop.

`draw_crops` draws everything that depends only on the size of an image. With `cat_max_ratio` or `class_balance`, labels
then decide the position of the crop: `place` finds it on the device, for a split in device memory; `HostPlacement`
finds it in NumPy, for a streamed split, whose windows are cut on the host. Both use the same random numbers and only
integers, so that they find the same positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Numbers that are folded into the key of a sample. `jax.random.split(key)` gives the keys of 0 and 1.
_ANGLE, _REDRAWS, _BALANCE = 2, 3, 4
# mmsegmentation's `RandomCrop` draws once, and then up to ten times again.
REDRAWS = 10


class AugmentSettings(Protocol):
    """The `augment` section of a config; see `segjax.train.schema`."""

    @property
    def crop(self) -> Sequence[int]: ...

    @property
    def base_size(self) -> Sequence[int] | None: ...

    @property
    def scale(self) -> Sequence[float]: ...

    @property
    def scale_step(self) -> float: ...

    @property
    def cat_max_ratio(self) -> float: ...

    @property
    def class_balance(self) -> float: ...

    @property
    def rotation(self) -> float: ...

    @property
    def flip(self) -> float: ...

    @property
    def photometric(self) -> bool: ...

    @property
    def brightness(self) -> int: ...

    @property
    def cutmix(self) -> float: ...

    @property
    def classmix(self) -> float: ...

    @property
    def on_device(self) -> str: ...

    @property
    def on_host(self) -> str: ...


class Crops(NamedTuple):
    """Position of the crop of each sample, and of the window of its image that is stored.

    Attributes:
      scaled: Height and width of the scaled image, int32 (B, 2).
      offset: First row and column of the crop in the scaled image, int32 (B, 2).
      flip: Whether the crop is mirrored horizontally, bool (B,).
      angle: Radians by which the content of the crop is rotated clockwise about the crop's centre, float32 (B,).
      origin: First row and column of the image that are stored, int32 (B, 2); 0 if the whole image is stored.
    """

    scaled: jax.Array | np.ndarray
    offset: jax.Array | np.ndarray
    flip: jax.Array | np.ndarray
    angle: jax.Array | np.ndarray
    origin: jax.Array | np.ndarray


# -------------------------------------------------------------------------------------------------------------- draws


def draw_crops(keys: jax.Array, sizes: jax.Array | np.ndarray, settings: AugmentSettings) -> Crops:
    """Draws scale, position, flip and angle of each sample, from its key (B,) and the size (B, 2) of its image."""

    def one(key, size):
        geometry, _ = jax.random.split(key)
        scale_key, *offset_keys, flip_key = jax.random.split(geometry, 4)
        scaled = scaled_size(size, _draw_scale(scale_key, settings), settings.base_size)
        offset = _draw_offset(offset_keys, scaled, settings.crop)
        flip = jax.random.bernoulli(flip_key, settings.flip)
        angle = jnp.float32(0)
        if settings.rotation:
            most = math.radians(settings.rotation)
            angle = jax.random.uniform(jax.random.fold_in(key, _ANGLE), minval=-most, maxval=most).astype(jnp.float32)
        return Crops(scaled, offset, flip, angle, jnp.zeros(2, jnp.int32))

    return jax.vmap(one)(keys, sizes)


def discrete_scales(scale: Sequence[float], step: float) -> list[float]:
    """The scales of `scale_step`, which are equally likely: 0.5, 0.6 ... 2.1 in the training of HRNet."""
    low, high = scale
    return [low + step * i for i in range(round((high - low) / step) + 1)]


def _draw_scale(key, settings):
    if settings.scale_step:
        values = jnp.array(discrete_scales(settings.scale, settings.scale_step), jnp.float32)
        return values[jax.random.randint(key, (), 0, len(values))]
    return jax.random.uniform(key, minval=settings.scale[0], maxval=settings.scale[1])


def _draw_offset(keys, scaled, crop):
    room = jnp.maximum(scaled - jnp.array(crop), 0)
    offset = [jax.random.randint(key, (), 0, most + 1) for key, most in zip(keys, room, strict=True)]
    return jnp.stack(offset).astype(jnp.int32)


def _redraw_offset(key, number, scaled, crop):
    """Offset that replaces a rejected one, int32 (2,); `number` counts the replacements, 0 to 9."""
    redraw_key = jax.random.fold_in(jax.random.fold_in(key, _REDRAWS), number)
    return _draw_offset(jax.random.split(redraw_key), scaled, crop)


def scaled_size(size: jax.Array | np.ndarray, scale: jax.Array | float, base_size: Sequence[int] | None) -> jax.Array:
    """Height and width of a scaled image: int32 (..., 2) -> int32 (..., 2).

    Without a base size, round(side * scale). With a base size, as in `Resize` of mmsegmentation 0.x: the edges of the
    base size times the scale are rounded down; the image is resized, with its aspect ratio, to the largest size whose
    long side fits the long edge and whose short side fits the short edge; each side is rounded to the nearest integer,
    halves up. Evaluation follows mmcv 2.x, whose sizes may differ by a pixel: `segjax.inference.engine.scaled_size`.
    """
    size = jnp.asarray(size)
    if base_size is None:
        scaled = jnp.round(size * scale).astype(jnp.int32)
    else:
        long, short = ((edge * scale).astype(jnp.int32) for edge in map(jnp.float32, (max(base_size), min(base_size))))
        of_long = _rounded_fraction(size, long, size.max(axis=-1, keepdims=True))
        of_short = _rounded_fraction(size, short, size.min(axis=-1, keepdims=True))
        # The size for the smaller factor, because rounding keeps the order.
        scaled = jnp.minimum(of_long, of_short).astype(jnp.int32)
    return jnp.maximum(scaled, 1)


def _rounded_fraction(number, numerator, denominator):
    quotient, remainder = _divide_product(number, numerator, denominator)
    return quotient + (2 * remainder >= denominator)


def _divide_product(a, b, divisor):
    """Quotient and remainder of a * b / divisor; exact for quotients below 2**21, even if a * b exceeds int32.

    The compiler repeats this for each pixel of a crop, where an integer division costs more than reading the label.
    """
    guess = jnp.floor(a * (b / divisor)).astype(jnp.int32)
    # float32 misses the quotient by one at most. Both products may overflow, but their difference does not.
    remainder = a * b - guess * divisor
    missing = (remainder >= divisor).astype(jnp.int32) - (remainder < 0).astype(jnp.int32)
    return guess + missing, remainder - missing * divisor


# --------------------------------------------------------------------------------------------------- pixels of a crop


def crop_pixels(length, scaled, offset, *, flip=False):
    """Pixels of the scaled image in a crop, along one axis.

    Args:
      length: Length of the crop.
      scaled: Length of the scaled image.
      offset: Offset of the crop in the scaled image.
      flip: Whether to mirror the part of the crop that is inside the image.

    Returns:
      Positions in the scaled image, integers (length,); and bool (length,), False in the padding, where positions have
      no meaning.
    """
    inside_length = jnp.minimum(length, scaled - offset)
    target = jnp.arange(length)
    mirrored = jnp.where(flip, inside_length - 1 - target, target)
    return mirrored + offset, target < inside_length


def nearest_pixels(pixels, size, scaled):
    """Pixels of the image that are nearest to pixels of the scaled image, by their centres, along one axis.

    floor((pixel + 1/2) * size / scaled) in exact integer arithmetic; of two equally near pixels, the later one.
    """
    nearest, _ = _divide_product(2 * pixels + 1, size, 2 * scaled)
    return jnp.clip(nearest, 0, size - 1)


# ---------------------------------------------------------------------------------------------- crops placed by labels


def place(
    key: jax.Array,
    crop: Crops,
    label: jax.Array,
    size: jax.Array,
    settings: AugmentSettings,
    *,
    ignore_label: int,
    rarity: np.ndarray | None,
) -> Crops:
    """Places the crop of one sample by the labels of its whole image, on the device.

    `cat_max_ratio` works as in mmsegmentation's `RandomCrop`: while one class has at least this share of the labelled
    pixels of the crop, or no pixel is labelled, another offset is drawn, up to ten times; the tenth is accepted without
    a check. The labels are those before `rotation`. With `class_balance`, some crops are placed around a pixel of a
    class, and `cat_max_ratio` does not apply to them.

    `_is_dominated` uses plain sums, because in a histogram by scatter, all threads of a GPU would add to the counters
    of a few classes. All samples of a batch leave the loop together, usually before its first round. Each check gathers
    the label of each pixel of the crops. Before each round, the host waits for a flag, which `jit` over several devices
    also reduces over the devices.

    Args:
      key: Key of the sample.
      crop: Drawn crop of the sample.
      label: Labels of the whole image, integers (H, W).
      size: Height and width of the image without padding, int32 (2,).
      settings: The `augment` section of a config.
      ignore_label: Label of pixels that do not count.
      rarity: Result of `rarity_of`, for `class_balance`.
    """
    offset = crop.offset
    if settings.cat_max_ratio < 1:

        def is_rejected(offset):
            return _is_dominated(label, size, crop.scaled, offset, settings, ignore_label)

        def redraw(state):
            number, *_ = state
            offset = _redraw_offset(key, number, crop.scaled, settings.crop)
            return number + 1, offset, is_rejected(offset)

        start = jnp.int32(0), offset, is_rejected(offset)
        _, offset, _ = jax.lax.while_loop(lambda state: (state[0] < REDRAWS) & state[2], redraw, start)
    if settings.class_balance:
        assert rarity is not None
        inside = (jnp.arange(label.shape[0])[:, None] < size[0]) & (jnp.arange(label.shape[1]) < size[1])
        classes = jnp.arange(len(rarity))[:, None, None]
        counts = jnp.sum(inside & (label == classes), axis=(1, 2), dtype=jnp.int32)  # (K,)
        aim = _draw_aim(key, counts, settings, rarity)
        pixel = _nth_pixel(inside & (label == aim.label), aim.nth)
        scaled_pixel, _ = _divide_product(2 * pixel + 1, crop.scaled, 2 * size)
        room = jnp.maximum(crop.scaled - jnp.array(settings.crop), 0)
        offset = jnp.where(aim.is_taken, jnp.clip(scaled_pixel - aim.within, 0, room), offset)
    return crop._replace(offset=offset)


def _is_dominated(label, size, scaled, offset, settings, ignore_label):
    """Whether a class has the share `cat_max_ratio` of the labelled pixels of a crop, or no pixel is labelled.

    The share is more than one half, so such a class has the majority in every bit of its number. One sum per bit
    therefore finds the only candidate, and one more sum counts its pixels.
    """
    pixels = [crop_pixels(*axis) for axis in zip(settings.crop, scaled, offset, strict=True)]
    (rows, rows_inside), (columns, columns_inside) = pixels
    seen = label[nearest_pixels(rows, size[0], scaled[0])][:, nearest_pixels(columns, size[1], scaled[1])]
    labelled = rows_inside[:, None] & columns_inside & (seen != ignore_label)
    number = jnp.sum(labelled, dtype=jnp.int32)
    bits = [jnp.sum(labelled & (seen >> bit & 1 == 1), dtype=jnp.int32) for bit in range(8 * seen.dtype.itemsize)]
    candidate = sum(jnp.where(2 * count > number, 1 << bit, 0) for bit, count in enumerate(bits))
    return jnp.sum(labelled & (seen == candidate), dtype=jnp.int32) >= dominant_count(number, settings.cat_max_ratio)


def dominant_count(number, ratio: float):
    """The smallest count that is at least `ratio` of `number` pixels; exact for ratios of up to three decimals."""
    share = Fraction(ratio).limit_denominator(1000)
    p, q = share.numerator, share.denominator
    # ceil(number * p / q), without the product, which may exceed int32.
    return number // q * p - (-(number % q) * p) // q


def rarity_of(class_pixels: np.ndarray) -> np.ndarray:
    """Integers proportional to 1 / pixels of each class, int32 (K,), of sum below 2**31; 0 for one without pixels."""
    pixels = np.where(class_pixels > 0, class_pixels, np.inf)
    weights = np.maximum(pixels.min() / np.maximum(class_pixels, 1) * (2**30 // len(pixels)), 1)
    return np.where(class_pixels > 0, weights, 0).astype(np.int32)


class _Aim(NamedTuple):
    """The pixel that a crop is placed around.

    Attributes:
      is_taken: Whether the crop is placed around this pixel.
      label: Class of the pixel.
      nth: Number of the pixel among those of its class, row by row.
      within: Row and column of the pixel in the crop, int32 (2,), unless a border of the image shifts the crop.
    """

    is_taken: jax.Array
    label: jax.Array
    nth: jax.Array
    within: jax.Array


def _draw_aim(key, counts, settings, rarity):
    """Draws the `_Aim` of a sample whose whole image has `counts` pixels of each class, int32 (K,)."""
    taken_key, label_key, nth_key, *within_keys = jax.random.split(jax.random.fold_in(key, _BALANCE), 5)
    # A class of the image. Integers, because sums of floats may differ between host and device.
    ends = jnp.cumsum(jnp.where(counts > 0, jnp.array(rarity), 0))
    label = jnp.sum(ends <= jax.random.randint(label_key, (), 0, jnp.maximum(ends[-1], 1)))
    is_taken = jax.random.bernoulli(taken_key, settings.class_balance) & (ends[-1] > 0)
    nth = jax.random.randint(nth_key, (), 0, jnp.maximum(counts[label], 1))
    within = [jax.random.randint(key, (), 0, length) for key, length in zip(within_keys, settings.crop, strict=True)]
    return _Aim(is_taken, label, nth, jnp.stack(within))


def _nth_pixel(mask, nth):
    """Row and column, int32 (2,), of the n-th True of a mask, bool (H, W), row by row."""
    in_rows = jnp.sum(mask, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(in_rows)
    row = jnp.sum(ends <= nth)
    column = jnp.sum(jnp.cumsum(mask[row], dtype=jnp.int32) <= nth - (ends[row] - in_rows[row]))
    return jnp.stack([row, column]).astype(jnp.int32)


class HostPlacement:
    """`place` in NumPy, with random numbers that XLA draws on the CPU, for one sample at a time."""

    def __init__(
        self,
        key: jax.Array,
        sample_key: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        settings: AugmentSettings,
        *,
        ignore_label: int,
        rarity: np.ndarray | None,
    ):
        """Compiles the draws.

        Args:
          key: Key of the run.
          sample_key: (key of the run, int32 step, position in the batch) -> key of a sample.
          settings, ignore_label, rarity: As in `place`.
        """
        self._settings, self._ignore_label = settings, ignore_label

        def redraw(key, step, position, scaled):
            sample = sample_key(key, step, position)
            return jax.vmap(lambda number: _redraw_offset(sample, number, scaled, settings.crop))(jnp.arange(REDRAWS))

        def aim(key, step, position, counts):
            return _draw_aim(sample_key(key, step, position), counts, settings, rarity)

        number = np.int32(0)
        if settings.cat_max_ratio < 1:
            self._redraw = compiled_on_host(redraw, key, number, number, np.zeros(2, np.int32))
        if settings.class_balance:
            assert rarity is not None
            self._classes = len(rarity)
            self._aim = compiled_on_host(aim, key, number, number, np.zeros(self._classes, np.int32))

    def __call__(self, step: int, position: np.int32, crop: Crops, label: np.ndarray) -> Crops:
        """Places the crop of a sample.

        Args:
          step: Step of the training, from 0.
          position: Position of the sample in the batch.
          crop: Drawn crop of the sample, without a batch axis.
          label: Labels of the whole image, (H, W).
        """
        offset, scaled = (np.asarray(array, np.int64) for array in (crop.offset, crop.scaled))
        step_number = np.int32(step)
        if self._settings.cat_max_ratio < 1 and self._is_dominated(label, scaled, offset):
            # All are drawn at once, because most of the time of a call is overhead.
            offsets = np.asarray(self._redraw(step_number, position, crop.scaled), np.int64)
            accepted = (number for number in range(REDRAWS) if not self._is_dominated(label, scaled, offsets[number]))
            offset = offsets[next(accepted, REDRAWS - 1)]
        if self._settings.class_balance:
            counts = np.bincount(label.ravel(), minlength=self._ignore_label + 1)[: self._classes].astype(np.int32)
            aim = jax.tree.map(np.asarray, self._aim(step_number, position, counts))
            if aim.is_taken:
                pixel = np.array(np.unravel_index(np.flatnonzero(label == aim.label)[aim.nth], label.shape))
                scaled_pixel = (2 * pixel + 1) * scaled // (2 * np.array(label.shape))
                offset = np.clip(scaled_pixel - aim.within, 0, np.maximum(scaled - self._settings.crop, 0))
        return crop._replace(offset=offset.astype(np.int32))

    def _is_dominated(self, label, scaled, offset):
        rows, columns = (
            (2 * np.arange(first, min(first + length, whole)) + 1) * size // (2 * whole)
            for first, length, whole, size in zip(offset, self._settings.crop, scaled, label.shape, strict=True)
        )
        counts = np.bincount(label[rows][:, columns].ravel(), minlength=self._ignore_label + 1)
        counts[self._ignore_label] = 0
        return counts.max() >= dominant_count(counts.sum(), self._settings.cat_max_ratio)


def compiled_on_host(function: Callable, key: jax.Array, *arguments: np.ndarray | np.generic) -> Callable:
    """Compiles `function(key, ...)` for the CPU, for this key and for the shapes and dtypes of `arguments`.

    It is compiled here, because `jax.enable_x64` of this thread does not apply to the threads that call the result.
    """
    key = jax.device_put(key, jax.local_devices(backend="cpu")[0])
    return partial(jax.jit(function).lower(key, *arguments).compile(), key)


# ------------------------------------------------------------------------------------------------------------- windows

# Number of image rows that a crop may need in addition to the distance between its first and last row: 1 because both
# ends count, 2 for interpolation and 2 for rounding on the device (one on each side).
_MARGIN = 5


def window_size(sizes: np.ndarray, settings: AugmentSettings) -> tuple[int, int]:
    """Height and width of the smallest window that contains any crop of any image of the sizes (N, 2).

    The window is the whole image if the image is small, or is scaled to less than the crop. A single image that a base
    size reduces very much makes all windows large.
    """
    kinds = np.unique(sizes, axis=0)
    scaled = np.asarray(scaled_size(kinds, settings.scale[0], settings.base_size))
    needed = np.ceil(_largest_box(settings) * (kinds / scaled)).astype(int) + _MARGIN
    height, width = np.minimum(kinds, needed).max(axis=0).tolist()
    return height, width


def _largest_box(settings):
    """Height and width of an upright box around a crop that is rotated by up to `rotation`, float (2,)."""
    height, width = settings.crop
    largest = math.radians(settings.rotation)

    def extent(along, across):
        # along * cos + across * sin grows up to atan(across / along).
        angle = min(largest, math.atan2(across, along))
        return along * math.cos(angle) + across * math.sin(angle)

    return np.array([extent(height, width), extent(width, height)])


def with_origins(crops: Crops, sizes: np.ndarray, window: tuple[int, int], settings: AugmentSettings) -> Crops:
    """The same crops with the origins of windows (h, w), for images of the sizes (..., 2); computed on the host."""
    scaled, offset, angle = np.asarray(crops.scaled), np.asarray(crops.offset), np.asarray(crops.angle, np.float64)
    # The crop extends by `half` on both sides of its centre; after its rotation, by `turned`.
    half = (np.minimum(settings.crop, scaled - offset) - 1) / 2
    turned = np.abs(np.cos(angle))[..., None] * half + np.abs(np.sin(angle))[..., None] * half[..., ::-1]
    first = np.floor((offset + (half - turned) + 0.5) * (sizes / scaled) - 0.5).astype(np.int32) - _MARGIN // 2
    origin = np.clip(first, 0, np.maximum(sizes - window, 0)).astype(np.int32)
    return crops._replace(origin=origin)
