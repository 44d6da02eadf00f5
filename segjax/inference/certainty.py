"""How sure a model is of each pixel, computed next to its scores: only small arrays leave the device.

Scores of 19 classes at 1024x2048 pixels take 152 MiB. What is counted or drawn of them takes two bytes a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from segjax import layers
from segjax.metrics.calibration import counter_of

# Number of pixels that are computed together, on a CPU and on a GPU. On a CPU their exponentials stay in the cache:
# 1024x2048 pixels of 19 classes take 0.2 s of processor time, and many times that all at once.
_TOGETHER, _TOGETHER_ON_GPU = 2**13, 2**18
Array = jax.Array | np.ndarray


class CountedLabels(NamedTuple):
    """The prediction for an image, and what calibration counts of it.

    Attributes:
      labels: Train ids (H, W), or an object that `np.asarray` converts.
      counter: `metrics.calibration.counter_of` each pixel, uint16 (H, W), or an object that `np.asarray` converts.
      parts: Results `sums` of `counts` for the parts of a batch.
      number: Index of the image in the batch.
    """

    labels: ArrayLike
    counter: ArrayLike
    parts: Sequence[jax.Array]
    number: int

    def sums(self) -> np.ndarray:
        """Sums over the labelled pixels, float64 (2 + G,): Brier score, NLL, and NLL at the G further temperatures."""
        return np.sum([np.asarray(part, np.float64)[:, self.number].sum(axis=0) for part in self.parts], axis=0)


def counts(
    scores: Array,
    labels: Array,
    truth: Array,
    *,
    ignore_label: int,
    are_logits: bool,
    temperatures: Sequence[float] = (1.0,),
) -> tuple[jax.Array, jax.Array]:
    """Counters of confidence, and sums of proper scores.

    A model of one class counts as one of two, background and class.

    Args:
      scores: Logits or probabilities (B, H, W, K).
      labels: Predicted train ids (B, H, W).
      truth: True train ids (B, H, W).
      ignore_label: Label of the pixels that do not enter the sums.
      are_logits: Whether `scores` are logits instead of probabilities.
      temperatures: The temperature that divides logits, and G others at which only NLL is computed.

    Returns:
      counter: `counter_of` the confidence, the probability of the predicted class, uint16 (B, H, W).
      sums: float32 (n, B, 2 + G), whose sums over n are Brier score, NLL, and NLL at the other temperatures.
    """
    rows = _rows_together(scores)
    return _counts(
        scores, labels, truth, ignore_label, np.asarray(temperatures, np.float32), are_logits=are_logits, rows=rows
    )


@partial(jax.jit, static_argnames=("are_logits", "rows"))
def _counts(scores, labels, truth, ignore_label, temperatures, *, are_logits, rows):
    def of_tile(scores, labels, truth, is_new):
        own, true = (_is_class(array, scores) for array in (labels, truth))
        weights, logarithms = _weights(scores, temperatures[0], are_logits)
        others, total = jnp.where(own, 0, weights).sum(-1), weights.sum(-1)
        log_true = jnp.where(true, logarithms, 0).sum(-1) - jnp.log(total)
        squares = (weights * weights).sum(-1) / (total * total)
        pixels = [squares - 2 * jnp.exp(log_true) + 1, -log_true]
        is_counted = (truth != ignore_label) & is_new

        def summed(pixel):
            return jnp.where(is_counted, pixel, 0).sum(axis=(1, 2))

        def nll(temperature):
            # At the first temperature, logits have already been divided by it.
            scaled = logarithms * (temperatures[0] / temperature)
            return summed(jnp.log(jnp.exp(scaled).sum(-1)) - jnp.where(true, scaled, 0).sum(-1))

        further = lax.map(nll, temperatures[1:]) if len(temperatures) > 1 else ()
        sums = jnp.stack([*map(summed, pixels), *further], axis=-1)
        return counter_of(others / total, jnp).astype(jnp.uint16), sums

    return _in_row_tiles(of_tile, (_of_two(scores, are_logits), labels, truth), rows)


def maps(scores: Array, labels: Array, *, are_logits: bool, temperature: float = 1.0) -> jax.Array:
    """Maps of confidence and entropy.

    Args:
      scores: Logits or probabilities (B, H, W, K).
      labels: Predicted train ids (B, H, W).
      are_logits: Whether `scores` are logits instead of probabilities.
      temperature: Divisor of logits.

    Returns:
      uint8 (B, H, W, 2), in the order of `outputs.MAPS`: 255 times the probability of the predicted class, and 255
      times the entropy over its largest value, log K (log 2 for models of one class).
    """
    rows = _rows_together(scores)
    return _maps(scores, labels, np.float32(temperature), are_logits=are_logits, rows=rows)


@partial(jax.jit, static_argnames=("are_logits", "rows"))
def _maps(scores, labels, temperature, *, are_logits, rows):
    def of_tile(scores, labels, _):
        weights, logarithms = _weights(scores, temperature, are_logits)
        total = weights.sum(-1)
        confidence = jnp.where(_is_class(labels, scores), weights, 0).sum(-1) / total
        entropy = (jnp.log(total) - (weights * logarithms).sum(-1) / total) / np.log(scores.shape[-1])
        both = jnp.stack([confidence, entropy], axis=-1)
        return jnp.round(255 * jnp.clip(both, 0, 1)).astype(jnp.uint8), jnp.zeros(0)

    return _in_row_tiles(of_tile, (_of_two(scores, are_logits), labels), rows)[0]


def _of_two(scores: jax.Array, are_logits: bool) -> jax.Array:
    """Scores (..., 2) of background and class for those (..., 1) of a model of one class; others unchanged."""
    if scores.shape[-1] > 1:
        return scores
    return jnp.concatenate([jnp.zeros_like(scores) if are_logits else 1 - scores, scores], axis=-1)


def _weights(scores: jax.Array, temperature: jax.Array, are_logits: bool) -> tuple[jax.Array, jax.Array]:
    """Numbers (..., K) in proportion to the probabilities, the largest of logits being 1, and their logarithms."""
    if are_logits:
        logarithms = (scores - scores.max(-1, keepdims=True)) / temperature
        return jnp.exp(logarithms), logarithms
    return scores, jnp.log(jnp.maximum(scores, jnp.finfo(scores.dtype).tiny))


def _is_class(labels: jax.Array, scores: jax.Array) -> jax.Array:
    """bool (..., K): whether a class is the label (...)."""
    return jnp.arange(scores.shape[-1]) == labels[..., None].astype(jnp.int32)


def _rows_together(scores: Array) -> int:
    """Number of rows of a tile; it does not depend on how many devices share the images."""
    shape = scores.sharding.shard_shape(scores.shape) if isinstance(scores, jax.Array) else scores.shape
    together = _TOGETHER_ON_GPU if layers.is_fast_on_gpu() else _TOGETHER
    return max(1, together // (shape[0] * shape[2]))


def _in_row_tiles(of_tile: Callable[..., tuple[Any, Any]], arrays: Sequence[jax.Array], rows: int) -> tuple[Any, Any]:
    """Applies a function to tiles of a few rows, one after the other.

    Args:
      of_tile: Function of tiles (B, rows, W, ...) of the arrays, and of bool (rows, 1), whether a row is in no earlier
        tile. It returns an array (B, rows, W, ...), and another one.
      arrays: (B, H, W, ...).
      rows: Number of rows of a tile, unless there are fewer.

    Returns:
      The first result of all rows (B, H, W, ...), and the second one of all tiles, (n, ...).
    """
    height = arrays[0].shape[1]
    rows = min(rows, height)
    if rows == height:
        joined, further = of_tile(*arrays, jnp.ones((rows, 1), bool))
        return joined, further[None]
    count = -(-height // rows)

    def tile(number):
        # The last tile begins inside the image, too.
        start = jnp.minimum(number * rows, height - rows)
        is_new = jnp.arange(rows)[:, None] >= number * rows - start
        return start, of_tile(*(lax.dynamic_slice_in_dim(array, start, rows, 1) for array in arrays), is_new)

    def body(number, results):
        start, (part, further) = tile(number)
        return (
            lax.dynamic_update_slice_in_dim(results[0], part, start, 1),
            lax.dynamic_update_index_in_dim(results[1], further, number, 0),
        )

    part, further = jax.eval_shape(lambda: tile(0)[1])
    joined = jnp.zeros((part.shape[0], height, *part.shape[2:]), part.dtype)
    return lax.fori_loop(0, count, body, (joined, jnp.zeros((count, *further.shape), further.dtype)))
