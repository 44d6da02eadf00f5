"""Bilinear resizing, plain and for integer factors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from segjax.kernels import choice, precision, units


def resize_plain(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Bilinear resizing with `align_corners=False`, half-pixel centres: (B, H, W, C) -> (B, *size, C).

    With its default antialias=True, jax applies a low-pass filter when downsampling; torch does not (differences up to
    1.8).
    """
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), method="bilinear", antialias=False)


def resize_by_phases(x: jax.Array, factors: Sequence[int]) -> jax.Array:
    """Half-pixel bilinear upsampling by integer factors: (B, H, W, C) -> (B, H * factors[0], W * factors[1], C).

    In phase p, every output pixel f * i + p blends input pixel i with the neighbour on the same side, by the same
    weight. So each of the f phases is one blend of the whole map with itself, shifted by one pixel with repeated edges:
    slices and a reshape instead of a gather.
    """
    once = units.once if choice.is_fast_on_cpu() else lambda x: x
    for axis, factor in zip((1, 2), factors, strict=True):
        if factor > 1:
            x = once(upsample_axis(once(x), axis, factor))
    return x


def _phases(factor: int) -> list[tuple[int, float]]:
    """The neighbour of the input pixel in each phase of the output, -1 or 1, and its weight.

    For a factor of 2: [(-1, 0.25), (1, 0.25)].
    """
    offsets = [(phase + 0.5) / factor - 0.5 for phase in range(factor)]
    return [(-1 if offset < 0 else 1, abs(offset)) for offset in offsets]


def _upsample_axis(x: jax.Array, axis: int, factor: int) -> jax.Array:
    """Upsamples one axis for `resize_by_phases`, with a backward pass that reads the gradient once."""
    length = x.shape[axis]
    ends = {-1: lax.slice_in_dim(x, 0, 1, axis=axis), 1: lax.slice_in_dim(x, length - 1, length, axis=axis)}
    neighbours = {
        -1: jnp.concatenate([ends[-1], lax.slice_in_dim(x, 0, length - 1, axis=axis)], axis),
        1: jnp.concatenate([lax.slice_in_dim(x, 1, length, axis=axis), ends[1]], axis),
    }
    phases = [x * (1 - weight) + neighbours[side] * weight for side, weight in _phases(factor)]
    shape = (*x.shape[:axis], length * factor, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis=axis + 1).reshape(shape)


upsample_axis = jax.custom_vjp(_upsample_axis, nondiff_argnums=(1, 2))


def _upsample_forward(x, axis, factor):
    return upsample_axis(x, axis, factor), None


def upsample_axis_backward(axis: int, factor: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """The transpose of `upsample_axis`: divides the length of the axis by `factor`."""
    if factor == 1:
        return (gradient,)  # the only phase gives its neighbour a weight of zero
    length = gradient.shape[axis] // factor
    by_phase = gradient.reshape(*gradient.shape[:axis], length, factor, *gradient.shape[axis + 1 :])
    parts = [lax.index_in_dim(by_phase, phase, axis + 1, keepdims=False) for phase in range(factor)]
    weighted = list(zip(parts, _phases(factor), strict=True))
    own = reduce(operator.add, (part * (1 - weight) for part, (_, weight) in weighted))
    to_side = {
        side: reduce(operator.add, (part * weight for part, (to, weight) in weighted if to == side)) for side in (-1, 1)
    }
    ends = {
        -1: lax.slice_in_dim(to_side[-1], 0, 1, axis=axis),
        1: lax.slice_in_dim(to_side[1], length - 1, length, axis=axis),
    }
    # Pixel i receives the shares that pixel i + 1 gives to its previous pixel and pixel i - 1 to its next pixel. An
    # edge pixel is its own neighbour and keeps its share.
    from_next = jnp.concatenate([lax.slice_in_dim(to_side[-1], 1, length, axis=axis), ends[1]], axis)
    from_previous = jnp.concatenate([ends[-1], lax.slice_in_dim(to_side[1], 0, length - 1, axis=axis)], axis)
    return (own + from_next + from_previous,)


upsample_axis.defvjp(_upsample_forward, upsample_axis_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def resize_by_repeats(x: jax.Array, factors: tuple[int, int]) -> jax.Array:
    """`resize_by_phases` as sums of shifted copies of the repeated map, in at least float32.

    Repeats, shifts and sums are all fused into the operation that reads the result: on a GPU, the sum of four levels of
    256 channels at 128x128 and the BatchNorm after it are one kernel that moves 20 MB, whereas
    `resize_by_phases` is 15 kernels that move 107 MB.

    Args:
      x: (B, H, W, C).
      factors: Integer factors of height and width.

    Returns:
      (B, H * factors[0], W * factors[1], C) of the dtype of `x`.
    """
    wide = x.astype(precision.at_least_float32(x.dtype))
    for axis, factor in zip((1, 2), factors, strict=True):
        if factor > 1:
            repeated = jnp.repeat(wide, factor, axis=axis)
            parts = (
                _shifted(repeated, axis, shift) * _along(weight, axis, wide.dtype)
                for shift, weight in _shifts(x.shape[axis], factor)
            )
            wide = reduce(operator.add, parts)
    return wide.astype(x.dtype)


def _shifts(length: int, factor: int) -> list[tuple[int, np.ndarray]]:
    """Shifts of the repeated map, each with weights (length * factor,); the weighted copies sum to the upsampled map.

    An upsampled pixel blends the pixel before its centre with the one after it. Shifts bring in zeros at the ends,
    where the single neighbour has the whole weight.
    """
    place = (np.arange(length * factor) + 0.5) / factor - 0.5
    before = np.floor(place)
    after_weight = np.where(before < 0, 1.0, np.where(before < length - 1, place - before, 0.0))
    before_weight = np.where(before < 0, 0.0, 1.0 - after_weight)
    return [(factor // 2, before_weight), (factor // 2 - factor, after_weight)]


def _shifted(x: jax.Array, axis: int, shift: int) -> jax.Array:
    padding = [(shift, -shift, 0) if dimension == axis else (0, 0, 0) for dimension in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), padding)


def _along(weight: np.ndarray, axis: int, dtype: jnp.dtype) -> np.ndarray:
    return weight.reshape([-1 if dimension == axis else 1 for dimension in range(4)]).astype(dtype)


def _repeats_forward(x, factors):
    return resize_by_repeats(x, factors), None


def _repeats_backward(factors, _, gradient):
    B, H, W, C = gradient.shape
    (of_rows, of_columns), wide = factors, precision.at_least_float32(gradient.dtype)
    height, width = H // of_rows, W // of_columns
    parts = [
        _shifted(_shifted(gradient.astype(wide) * _along(down, 1, wide) * _along(across, 2, wide), 1, -y), 2, -x)
        for y, down in _shifts(height, of_rows)
        for x, across in _shifts(width, of_columns)
    ]
    # A single reduction, which computes the parts as it reads the gradient.
    of_copies = reduce(operator.add, parts).reshape(B, height, of_rows, width, of_columns, C)
    return (jnp.sum(of_copies, axis=(2, 4)).astype(gradient.dtype),)


resize_by_repeats.defvjp(_repeats_forward, _repeats_backward)


def resize_aligned(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Bilinear resizing with `align_corners=True` by two matrix products: (B, H, W, C) -> (B, *size, C).

    The products have full precision, as in `jax.image.resize`: the default of a GPU or TPU would round the pixels.
    """
    rows, columns = (matrix(old, new, x.dtype, align_corners=True) for old, new in zip(x.shape[1:3], size, strict=True))
    return by_matrices(x, rows, columns)


def by_matrices(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Product of (B, h, w, C) and interpolation weights (H, h) and (W, w) in full precision: (B, H, W, C)."""
    return jnp.einsum("ph,bhwc,qw->bpqc", rows, x, columns, precision=lax.Precision.HIGHEST)


def matrix(old: int, new: int, dtype: jnp.dtype, *, align_corners: bool) -> jax.Array:
    """Interpolation weights (new, old); with aligned corners a single output pixel is the first one, as in torch."""
    index = jnp.arange(new, dtype=precision.at_least_float32(dtype))
    if align_corners:
        position = index * ((old - 1) / (new - 1) if new > 1 else 0.0)
    else:
        position = jnp.clip((index + 0.5) * (old / new) - 0.5, 0, old - 1)
    distance = jnp.abs(position[:, None] - jnp.arange(old, dtype=position.dtype)[None, :])
    return jnp.maximum(0, 1 - distance).astype(dtype)
