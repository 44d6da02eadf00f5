"""Probabilities from logits that are resized bilinearly to any size, by one program for each size of the logits.

A program that resizes to a fixed size would be compiled for each image size, and a dataset may have hundreds. These
programs compute tiles of one size; the position of a tile in the logits is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

# Height and width of a tile.
TILE = (32, 256)


class Samples(NamedTuple):
    """The position of n pixels along an axis of the result between two pixels of the logits, for B images.

    Attributes:
      low: First of the two pixels, int32 (B, n).
      high: Second of the two pixels, int32 (B, n).
      weight: Weight of `high`, (B, n), of the logits' dtype.
    """

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    def part(self, start: int, length: int) -> Samples:
        """The samples of `length` pixels from `start` on."""
        return Samples(*(array[:, start : start + length] for array in self))


class ImageSamples(NamedTuple):
    """`Samples` of all rows and columns of the results."""

    rows: Samples
    columns: Samples

    def of_tile(self, corner: tuple[int, int]) -> tuple[Samples, Samples]:
        """Rows and columns of the tile with this upper left corner."""
        return self.rows.part(corner[0], TILE[0]), self.columns.part(corner[1], TILE[1])


def grid(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Upper left corners (row, column) of tiles that cover images of all these sizes (height, width)."""
    height, width = np.max(sizes, axis=0).tolist()
    return [(top, left) for top in range(0, height, TILE[0]) for left in range(0, width, TILE[1])]


def samples(logits: jax.Array, sizes: Sequence[tuple[int, int]], *, flipped: bool, align_corners: bool) -> ImageSamples:
    """The positions at which to sample logits for results of given sizes.

    Args:
      logits: (B, h, w, K).
      sizes: (height, width) of the result of each image.
      flipped: Whether the logits are of mirrored images; the results are not mirrored.
      align_corners: As for `layers.resize`.
    """
    of_axes = []
    for axis, side in enumerate(TILE):
        old, new = logits.shape[1 + axis], [size[axis] for size in sizes]
        length = -(-max(new) // side) * side
        mirrored = flipped and axis == 1
        position = np.stack([_line(old, pixels, length, mirrored, align_corners) for pixels in new])
        low = np.floor(position).astype(np.int32)
        high = np.minimum(low + 1, old - 1)
        of_axes.append(Samples(low, high, (position - low).astype(logits.dtype)))
    return ImageSamples(*of_axes)


def _line(old: int, new: int, length: int, mirrored: bool, align_corners: bool) -> np.ndarray:
    """Positions, float64 (length,), of `new` pixels among `old` ones; positions after the last one repeat it."""
    numbers = np.minimum(np.arange(length), new - 1)
    if mirrored:
        numbers = new - 1 - numbers
    if align_corners:
        return numbers * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return ((numbers + 0.5) * (old / new) - 0.5).clip(0, old - 1)


@partial(jax.jit, donate_argnums=0)
def add_probabilities(
    total: jax.Array | None, logits: jax.Array, rows: Samples, columns: Samples, temperature: float = 1.0
) -> jax.Array:
    """Probabilities of a tile, (B, *TILE, K), added to `total`.

    Args:
      total: Sum so far, of the same shape, or None; its memory is reused.
      logits: (B, h, w, K).
      rows: Samples of the tile's rows.
      columns: Samples of the tile's columns.
      temperature: Divisor of the logits.
    """
    scores = _resized(logits, rows, columns) / temperature
    probabilities = jax.nn.sigmoid(scores) if scores.shape[-1] == 1 else jax.nn.softmax(scores)
    return probabilities if total is None else total + probabilities


@jax.vmap
def _resized(logits: jax.Array, rows: Samples, columns: Samples) -> jax.Array:
    below = rows.weight[:, None, None]
    lines = logits[rows.low] * (1 - below) + logits[rows.high] * below
    right = columns.weight[:, None]
    return lines[:, columns.low] * (1 - right) + lines[:, columns.high] * right


# Logits of a tile, (B, *TILE, K), before any temperature; arguments as for `add_probabilities`.
logits_of = jax.jit(_resized)
