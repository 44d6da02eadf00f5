"""Sliding-window inference: an image is scored in overlapping crops, whose logits are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Columns of the widest `Panel`, except of crops of more than a quarter of them.
WIDEST = 4096


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Positions of a sliding window of `crop` pixels along an axis: every `stride`, and the last one at the end."""
    return [min(start, max(length - crop, 0)) for start in range(0, max(length - crop, 0) + stride, stride)]


class Pixels(Protocol):
    """An image (H, W, C) that is read in parts: a NumPy array is one, and so is a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: tuple[slice, slice], /) -> np.ndarray: ...


class Panel(NamedTuple):
    """Columns of an image that are scored from top to bottom before those on their right.

    Attributes:
      lefts: first columns of the crops that reach into the panel.
      left, right: its columns; the scores of crops outside of it are not used.
    """

    lefts: list[int]
    left: int
    right: int


class RowTile(NamedTuple):
    """A part of an image: its upper left corner, and its logits (h, w, K) in the columns `part` of an array.

    The arrays of all panels have one width, so that they share programs and memory.
    """

    top: int
    left: int
    logits: jax.Array
    part: slice


def panels(width: int, crop: int, stride: int) -> list[Panel]:
    """Panels of an image from left to right, each as wide as `WIDEST` or four crops allow.

    They bound the memory of wide images. Crops that reach into two panels are scored for both: with the defaults of
    a sliding window, one in ten.
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
) -> Iterator[RowTile]:
    """Logits of an image by a sliding window, in tiles that cover it: panel by panel, each from top to bottom.

    Where crops overlap, their scores are averaged. Only the scores of one row of crops of a panel are kept at a time:
    memory does not grow with the image.

    Args:
      logits_of: crops (B, h, w, C) -> logits (B, h, w, K).
      image: (H, W, C).
      crop, stride: height and width of a crop, and of the step from one to the next, pixels.
      batch: number of crops that are scored at a time.
    """
    height, width = map(min, crop, image.shape)
    tops = window_starts(image.shape[0], height, stride[0])
    down, across = (
        np.bincount(np.add.outer(window_starts(*sides), np.arange(sides[1])).ravel())
        for sides in zip(image.shape, (height, width), stride, strict=False)
    )
    parts = panels(image.shape[1], width, stride[1])
    columns = max(lefts[-1] + width - lefts[0] for lefts, _, _ in parts)
    # Below the last row of a panel there is nothing, and the next panel begins with it.
    tile = None
    for lefts, left, right in parts:
        start, end = lefts[0], lefts[-1] + width
        # 1 where there are no scores.
        counts = np.ones(columns, across.dtype)
        counts[: end - start] = across[start:end]
        # Groups of one size, the last of which repeats its last crop.
        groups = [lefts[at : at + batch] for at in range(0, len(lefts), batch)]
        size = min(batch, len(lefts))
        for top, below in zip(tops, [*tops[1:], image.shape[0]], strict=True):
            band = image[top : top + height, start:end]
            for group in groups:
                places = [place - start for place in group + group[-1:] * (size - len(group))]
                logits = logits_of(np.stack([band[:, place : place + width] for place in places]))
                if tile is None:
                    tile = jnp.zeros((height, columns, logits.shape[-1]), logits.dtype)
                tile = _added(tile, logits, np.array(places), len(group))
                # A CPU would score several groups at once, in the memory of as many.
                if all(device.platform == "cpu" for device in tile.devices()):
                    tile.block_until_ready()
                # Before the next ones need memory, so that each group finds the same.
                del logits
            done = _mean(tile, down[top:below], counts)
            yield RowTile(top, left, done, slice(left - start, right - start))
            del done
            tile = _below(tile, rows=below - top)


@partial(jax.jit, donate_argnums=0)
def _added(tile: jax.Array, logits: jax.Array, lefts: jax.Array, count: int) -> jax.Array:
    """A row tile (h, W, K) plus the first `count` of the crops (B, h, w, K), which begin at its columns `lefts`."""

    def add(number, tile):
        at = (0, lefts[number], 0)
        old = jax.lax.dynamic_slice(tile, at, logits.shape[1:])
        return jax.lax.dynamic_update_slice(tile, old + logits[number], at)

    return jax.lax.fori_loop(0, count, add, tile)


@jax.jit
def _mean(tile: jax.Array, down: jax.Array, across: jax.Array) -> jax.Array:
    """The first rows of a row tile, to which `down` x `across` scores were added, divided by their number."""
    counts = (down[:, None] * across)[..., None].astype(tile.dtype)
    return tile[: len(down)] / counts


@partial(jax.jit, static_argnames="rows", donate_argnums=0)
def _below(tile: jax.Array, *, rows: int) -> jax.Array:
    """A row tile that begins so many rows below."""
    return jnp.pad(tile[rows:], ((0, rows), (0, 0), (0, 0)))
