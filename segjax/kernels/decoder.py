"""Decoders of several levels, computed one row tile at a time."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from segjax.kernels import units


def are_multiples(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether exactly one map is the largest, and its sides are whole multiples of those of all others."""
    if not all(isinstance(side, int) for shape in shapes for side in shape):
        return False
    largest = max(shape[1:3] for shape in shapes)
    others = [shape[1:3] for shape in shapes if shape[1:3] != largest]
    return len(others) == len(shapes) - 1 > 0 and all(
        large % small == 0 for other in others for large, small in zip(largest, other, strict=True)
    )


def decode_by_rows(
    levels: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    bias: jax.Array,
    finish: Callable[[jax.Array], jax.Array],
    classify: Callable[[jax.Array], jax.Array],
    *,
    mode: str,
    align_corners: bool,
) -> jax.Array:
    """Multiplies levels by their kernels, upsamples, sums, finishes and classifies: levels -> logits (B, H, W, K).

    No upsampled level is written to memory: a tile reads the few rows of each level that it depends on, and one
    compilation unit upsamples and sums them.

    Args:
      levels: Maps (B, h, w, C_level). The largest, (H, W), is a whole multiple of all others (`are_multiples`).
      kernels: Matrix (C_level, C) per level.
      bias: (C,), or () for a constant.
      finish: Elementwise function of the sum (B, rows, W, C).
      classify: Function per pixel, (B, rows, W, C) -> logits (B, rows, W, K).
      mode: "bilinear" or "nearest", as in `torch.nn.functional.interpolate`.
      align_corners: Alignment of bilinear upsampling, as in `torch.nn.functional.interpolate`.
    """
    height, width = (max(x.shape[axis] for x in levels) for axis in (1, 2))
    [(base, base_kernel)] = (
        (x, kernel) for x, kernel in zip(levels, kernels, strict=True) if x.shape[1:3] == (height, width)
    )
    coarse = []
    for x, kernel in zip(levels, kernels, strict=True):
        if x is base:
            continue
        y = jnp.matmul(x, kernel)
        coarse.append(
            (
                _edges_repeated(_edges_repeated(y, 1), 2),
                *(
                    blends(old, new // old, mode=mode, align_corners=align_corners)
                    for old, new in zip(x.shape[1:3], (height, width), strict=True)
                ),
            )
        )
    # The factors need not divide each other: an image of 112 rows has levels of 28, 14, 7 and 4.
    step = math.lcm(*(height // (y.shape[1] - 2) for y, *_ in coarse))
    B, dtype = len(levels[0]), kernels[0].dtype
    row_bytes = B * width * kernels[0].shape[1] * dtype.itemsize
    steps = [number for number in range(1, height // step + 1) if height // step % number == 0]
    rows = step * max(number for number in steps if number == 1 or number * step * row_bytes <= units.TILE_BYTES)

    def tile(number):
        part = jnp.matmul(lax.dynamic_slice_in_dim(base, number * rows, rows, axis=1), base_kernel)
        tall = [_taller(y, down, number, rows) for y, down, _ in coarse]

        @units.compiled_apart
        def finished(part, bias, *tall):
            total = part + bias
            for y, (_, _, across) in zip(tall, coarse, strict=True):
                blended = (
                    y[:, :, tap : tap + len(weights), None] * jnp.asarray(weights, dtype)[:, :, None]
                    for tap, weights in enumerate(across)
                    if weights.any()
                )
                wide = reduce(operator.add, blended)  # (B, rows, w, f, C)
                total = total + wide.reshape(total.shape)
            return finish(total)

        return classify(finished(part, bias, *tall))

    if rows == height:
        return tile(0)
    out = lax.map(tile, jnp.arange(height // rows))  # (tiles, B, rows, W, K)
    return jnp.moveaxis(out, 0, 1).reshape(B, height, width, -1)


def _edges_repeated(x: jax.Array, axis: int) -> jax.Array:
    """Repeats the first and the last row, or column.

    `jnp.pad(mode="edge")` would also slice the batch, which may be distributed over devices.
    """
    length = x.shape[axis]
    first, last = lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, length - 1, length, axis=axis)
    return jnp.concatenate([first, x, last], axis=axis)


def blends(length: int, factor: int, *, mode: str, align_corners: bool) -> np.ndarray:
    """Weights (3, length, factor) of the previous, same and next pixel in the upsampling of an axis by a whole factor.

    Pixel factor * j + p of the result blends pixels j - 1, j and j + 1. Edge pixels are repeated beyond the ends.
    """
    before, pixel = np.arange(factor), np.arange(length)[:, None]
    if mode == "nearest":
        offset = 0.0 * before * pixel
    elif align_corners:
        offset = (before * (length - 1) - pixel * (factor - 1)) / max(length * factor - 1, 1)
    else:
        offset = (before + 0.5) / factor - 0.5 + 0 * pixel
    return np.stack([np.maximum(-offset, 0), 1 - np.abs(offset), np.maximum(offset, 0)])


def _taller(y: jax.Array, weights: np.ndarray, number: jax.Array, rows: int) -> jax.Array:
    """Rows [number * rows, (number + 1) * rows) of a level (B, h + 2, w + 2, C) after upsampling of its height."""
    factor = weights.shape[-1]
    own = rows // factor
    part = lax.dynamic_slice_in_dim(y, number * own, own + 2, axis=1)
    taps = [tap for tap in range(3) if weights[tap].any()]
    table = lax.dynamic_slice_in_dim(jnp.asarray(weights[taps], y.dtype), number * own, own, axis=1)

    @units.compiled_apart
    def upsampled(part, table):
        blended = (part[:, tap : tap + own, None] * table[place, :, :, None, None] for place, tap in enumerate(taps))
        total = reduce(operator.add, blended)  # (B, own, f, w + 2, C)
        return total.reshape(len(part), rows, *part.shape[2:])

    return upsampled(part, table)
