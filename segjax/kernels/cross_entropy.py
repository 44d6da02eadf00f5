"""Cross-entropy of logits that are smaller than the labels, computed one row tile at a time.

Upsampled to the labels' size, the logits of 150 classes are by far the largest arrays of a training step. Upsampling is
linear and the loss is a sum over pixels. So one row tile at a time is upsampled, its loss and gradient are computed,
and the gradient is reduced to the small size, all while the tile is in the cache. The result equals `losses.Criterion`
without tiles. On XLA:CPU, forward and backward of 2x256x256 pixels and 150 classes fall from 39 to 14 ms, their memory
from 225 to 21 MiB. With align_corners=True the loss is computed without tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import resize, units

# Bytes of a row tile's upsampled logits, a fraction of a core's share of the cache.
TILE_BYTES = 8 * 2**20


def pays(logits: jax.Array, size: Sequence[int]) -> bool:
    """Whether `cross_entropy` is faster than upsampling all logits to `size` (H, W) at once, align_corners False."""
    height, width, num_classes = logits.shape[1:]
    whole = size[0] % height == 0 and size[1] % width == 0
    return whole and num_classes > 1 and _rows(logits, size) < height


def _rows(logits: jax.Array, size: Sequence[int]) -> int:
    """Number of rows of the small logits per tile, a divisor of their height."""
    batch, height, _, num_classes = logits.shape
    row = batch * (size[0] // height) * size[1] * num_classes * logits.dtype.itemsize
    return max(rows for rows in range(1, height + 1) if height % rows == 0 and (rows == 1 or rows * row <= TILE_BYTES))


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of weights * -log p(label) over the pixels of bilinearly upsampled logits, align_corners False.

    Args:
      logits: (B, h, w, K), float32 or wider, K > 1.
      labels: Integers (B, H, W), H and W multiples of h and w. A label that is not a class needs a weight of 0.
      weights: (B, H, W), of the logits' dtype; they receive no gradient.
    """
    return _with_gradient(logits, labels, weights)[0]


def _with_gradient(logits, labels, weights):
    height = logits.shape[1]
    factors = labels.shape[1] // height, labels.shape[2] // logits.shape[2]
    rows = _rows(logits, labels.shape[1:3])
    # A tile reads one more row on each side, with the edge rows repeated beyond the edges.
    padded = jnp.concatenate([logits[:, :1], logits, logits[:, -1:]], axis=1)

    def add(sums, start):
        total, gradient = sums
        cut = partial(lax.dynamic_slice_in_dim, axis=1)
        tile = _upsampled(factors)(cut(padded, start, rows + 2))
        loss, slope = _loss_and_slope(
            tile, *(cut(pixels, start * factors[0], rows * factors[0]) for pixels in (labels, weights))
        )
        moved = cut(gradient, start, rows + 2) + _reduced(factors)(slope)
        return (total + loss, lax.dynamic_update_slice_in_dim(gradient, moved, start, axis=1)), None

    nothing = jnp.zeros((), logits.dtype), jnp.zeros_like(padded)
    (total, gradient), _ = lax.scan(add, nothing, jnp.arange(0, height, rows))
    gradient = gradient.at[:, 1].add(gradient[:, 0]).at[:, -2].add(gradient[:, -1])
    return total, gradient[:, 1:-1]


def _backward(gradient, cotangent):
    return gradient * cotangent, None, None


cross_entropy.defvjp(_with_gradient, _backward)

# Each of these is a compilation unit: otherwise XLA:CPU would upsample again for every reader of the upsampled logits.


def _upsampled(factors: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """(B, rows + 2, w, K) -> (B, rows * f, w * f, K)."""

    @units.compiled_apart
    def upsample(tile):
        taller = resize.upsample_axis(tile, 1, factors[0])[:, factors[0] : -factors[0]]
        return resize.upsample_axis(taller, 2, factors[1])

    return upsample


def _reduced(factors: tuple[int, int]) -> Callable[[jax.Array], jax.Array]:
    """The transpose of `_upsampled`."""

    @units.compiled_apart
    def reduce(gradient):
        narrower = resize.upsample_axis_backward(2, factors[1], None, gradient)[0]
        around = ((0, 0), (factors[0], factors[0]), (0, 0), (0, 0))
        return resize.upsample_axis_backward(1, factors[0], None, jnp.pad(narrower, around))[0]

    return reduce


@units.compiled_apart
def _loss_and_slope(logits, labels, weights):
    """Weighted sum of -log softmax(logits)[label], and its gradient."""
    labels, weights = labels.astype(jnp.int32)[..., None], weights[..., None]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(logits - largest)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, labels, axis=-1, mode="clip")
    is_chosen = labels == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    slope = powers * (weights / total) - jnp.where(is_chosen, weights, 0)
    return jnp.sum(weights * (jnp.log(total) + largest - chosen)), slope
