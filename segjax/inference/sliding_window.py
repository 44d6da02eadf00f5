"""Sliding-window inference: an image is scored in overlapping crops, whose logits are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Positions of a sliding window of `crop` pixels along an axis: every `stride`, and the last one at the end."""
    return [min(start, max(length - crop, 0)) for start in range(0, max(length - crop, 0) + stride, stride)]


def row_tiles(
    logits_of: Callable[[np.ndarray], jax.Array],
    image: np.ndarray,
    *,
    crop: tuple[int, int],
    stride: tuple[int, int],
    batch: int,
) -> Iterator[jax.Array]:
    """Logits of an image by a sliding window, from top to bottom: arrays (h, W, K) whose h add up to H.

    Where crops overlap, their scores are averaged. Only the scores of one row of crops are kept at a time, so that
    memory does not grow with the height of the image.

    Args:
      logits_of: crops uint8 (B, h, w, 3) -> logits (B, h, w, K).
      image: uint8 (H, W, 3).
      crop, stride: height and width of a crop, and of the step from one to the next, pixels.
      batch: number of crops that are scored at a time.
    """
    height, width = map(min, crop, image.shape)
    tops, lefts = (window_starts(*sides) for sides in zip(image.shape, (height, width), stride, strict=False))
    across, down = (
        np.bincount(np.add.outer(starts, np.arange(side)).ravel()) for starts, side in ((lefts, width), (tops, height))
    )
    # Groups of one size, the last of which repeats its last crop.
    groups = [lefts[start : start + batch] for start in range(0, len(lefts), batch)]
    size = min(batch, len(lefts))
    tile = None
    for top, below in zip(tops, [*tops[1:], len(image)], strict=True):
        for group in groups:
            starts = group + group[-1:] * (size - len(group))
            logits = logits_of(np.stack([image[top : top + height, left : left + width] for left in starts]))
            if tile is None:
                tile = jnp.zeros((height, image.shape[1], logits.shape[-1]), logits.dtype)
            tile = _added(tile, logits, np.array(starts), len(group))
        done, tile = _split(tile, np.outer(down[top:below], across), rows=below - top)
        yield done


@partial(jax.jit, donate_argnums=0)
def _added(tile: jax.Array, logits: jax.Array, lefts: jax.Array, count: int) -> jax.Array:
    """A row tile (h, W, K) plus the first `count` of the crops (B, h, w, K), which begin at its columns `lefts`."""

    def add(number, tile):
        at = (0, lefts[number], 0)
        old = jax.lax.dynamic_slice(tile, at, logits.shape[1:])
        return jax.lax.dynamic_update_slice(tile, old + logits[number], at)

    return jax.lax.fori_loop(0, count, add, tile)


@partial(jax.jit, static_argnames="rows")
def _split(tile: jax.Array, counts: jax.Array, *, rows: int) -> tuple[jax.Array, jax.Array]:
    """The mean of the first rows, and a row tile that begins below them."""
    return tile[:rows] / counts[..., None].astype(tile.dtype), jnp.pad(tile[rows:], ((0, rows), (0, 0), (0, 0)))
