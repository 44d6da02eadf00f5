"""Sliding-window inference: scores an image in overlapping crops and averages their logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Maximum number of columns of a `Panel`, unless four crops are wider.
WIDEST = 4096


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Positions of a sliding window of `crop` pixels along an axis: every `stride` pixels, the last one at the end."""
    return [min(start, max(length - crop, 0)) for start in range(0, max(length - crop, 0) + stride, stride)]


def crops_together(crops: int, batch: int, devices: int) -> int:
    """Number of crops scored at a time, at most `batch`: of a row of fewer crops, a multiple of the devices."""
    return min(batch, -(-crops // devices) * devices)


class Pixels(Protocol):
    """An image (H, W, C) that is read in parts, such as a NumPy array or a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: tuple[slice, slice], /) -> np.ndarray: ...


class Panel(NamedTuple):
    """Columns of an image that are scored from top to bottom before those on their right.

    Attributes:
      lefts: First columns of the crops that reach into the panel.
      left: First column. Scores of the crops outside the panel are not used.
      right: Column after the last.
    """

    lefts: list[int]
    left: int
    right: int


class RowTile(NamedTuple):
    """A part of an image: its upper left corner, and its logits (h, w, K) in the columns `part` of an array.

    The arrays of all panels have the same width, so that they share programs and memory.
    """

    top: int
    left: int
    logits: jax.Array
    part: slice


def panels(width: int, crop: int, stride: int) -> list[Panel]:
    """Panels of an image from left to right, each at most as wide as `WIDEST` or four crops.

    They bound the memory of wide images. A crop that reaches into two panels is scored for both; with the default
    sliding window, one in ten crops does.
    """
    starts = window_starts(width, crop, stride)
    found, begin = [], 0
    while begin < len(starts):
        first = next(number for number, start in enumerate(starts) if start + crop > starts[begin])
        most = starts[first] + max(WIDEST, 4 * crop)
        end = begin + 1
        while end < len(starts) and starts[end] + crop <= most:
            end += 1
        found.append(Panel(starts[first:end], starts[begin], starts[end] if end < len(starts) else width))
        begin = end
    return found


def row_tiles(
    logits_of: Callable[[np.ndarray], jax.Array],
    image: Pixels,
    *,
    crop: tuple[int, int],
    stride: tuple[int, int],
    batch: int,
    devices: int = 1,
) -> Iterator[RowTile]:
    """Logits of an image by a sliding window, in tiles that cover it, panel by panel, each from top to bottom.

    The scores of overlapping crops are averaged. Only the scores of one row of a panel's crops are in memory at a time,
    so memory does not grow with the image.

    Args:
      logits_of: Function from crops (B, h, w, C) to logits (B, h, w, K).
      image: (H, W, C).
      crop: Height and width of a crop in pixels.
      stride: Height and width of the step between crops in pixels.
      batch: Number of crops that are scored at a time.
      devices: Number of devices that share them.
    """
    height, width = map(min, crop, image.shape)
    tops = window_starts(image.shape[0], height, stride[0])
    down, across = (
        np.bincount(np.add.outer(window_starts(*sides), np.arange(sides[1])).ravel())
        for sides in zip(image.shape, (height, width), stride, strict=False)
    )
    parts = panels(image.shape[1], width, stride[1])
    columns = max(lefts[-1] + width - lefts[0] for lefts, _, _ in parts)
    # After the last row of a panel this array is zero, and the next panel reuses it.
    tile = None
    for lefts, left, right in parts:
        start, end = lefts[0], lefts[-1] + width
        # 1 in columns without scores.
        counts = np.ones(columns, across.dtype)
        counts[: end - start] = across[start:end]
        # All groups have one size; the last group repeats its last crop.
        groups = [lefts[at : at + batch] for at in range(0, len(lefts), batch)]
        size = crops_together(len(lefts), batch, devices)
        for top, below in zip(tops, [*tops[1:], image.shape[0]], strict=True):
            band = image[top : top + height, start:end]
            for group in groups:
                places = [place - start for place in group + group[-1:] * (size - len(group))]
                logits = logits_of(np.stack([band[:, place : place + width] for place in places]))
                if tile is None:
                    tile = jnp.zeros((height, columns, logits.shape[-1]), logits.dtype)
                tile = _added(tile, logits, np.array(places), len(group))
                # A CPU would otherwise score several groups at once, each in its own memory.
                if all(device.platform == "cpu" for device in tile.devices()):
                    tile.block_until_ready()
                # Freed before the next group needs memory.
                del logits
            done = _mean(tile, down[top:below], counts)
            yield RowTile(top, left, done, slice(left - start, right - start))
            del done
            tile = _below(tile, rows=below - top)


@partial(jax.jit, donate_argnums=0)
def _added(tile: jax.Array, logits: jax.Array, lefts: jax.Array, count: int) -> jax.Array:
    """A row tile (h, W, K) plus the logits (B, h, w, K) of the first `count` crops, at the tile's columns `lefts`."""

    def add(number, tile):
        at = (0, lefts[number], 0)
        old = jax.lax.dynamic_slice(tile, at, logits.shape[1:])
        return jax.lax.dynamic_update_slice(tile, old + logits[number], at)

    return jax.lax.fori_loop(0, count, add, tile)


@jax.jit
def _mean(tile: jax.Array, down: jax.Array, across: jax.Array) -> jax.Array:
    """The first rows of a row tile, divided by the number of added scores, `down` x `across`."""
    counts = (down[:, None] * across)[..., None].astype(tile.dtype)
    return tile[: len(down)] / counts


@partial(jax.jit, static_argnames="rows", donate_argnums=0)
def _below(tile: jax.Array, *, rows: int) -> jax.Array:
    """The row tile that begins `rows` rows below."""
    return jnp.pad(tile[rows:], ((0, rows), (0, 0), (0, 0)))
