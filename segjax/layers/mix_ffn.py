"""Mix-FFN: feed-forward networks with a depthwise 3x3 convolution, as every encoder here has them."""

from __future__ import annotations

from collections.abc import Callable

import jax

from segjax.kernels import choice
from segjax.kernels.feed_forward import feed_forward_by_rows
from segjax.layers.linear import Conv

# ------------------------------------------------------------------------------- linear, depthwise 3x3, GELU, linear


def feed_forward(
    first,
    depthwise: Conv,
    last,
    x: jax.Array,
    *,
    in_steps: Callable[[jax.Array], jax.Array],
    pointwise: Conv | None = None,
) -> jax.Array:
    """in_steps(x) = last(gelu(pointwise(depthwise(first(x))))), the feed-forward network of every encoder here.

    On a CPU in bands of rows. Two cores, with / without: 32 to 256 and back to 32 channels at 128x128 pixels 0.53, 64
    to 512 at 64x64 0.74.

    Args:
      first, last: Linear, or Conv of 1x1. depthwise: 3x3, one or several outputs of each channel. pointwise: 1x1, or
        None for nothing. All with biases.
      x: (B, H, W, C).
      in_steps: calls the layers one by one.

    Returns:
      (B, H, W, out).
    """
    if not choice.fast_cpu_forms() or not all(isinstance(side, int) for side in x.shape):
        return in_steps(x)
    dtype = first.dtype
    parts = dict(first=first, depthwise=depthwise, pointwise=pointwise, last=last)
    arrays = {
        name: (layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype))
        for name, layer in parts.items()
        if layer is not None
    }
    return feed_forward_by_rows(arrays, x.astype(dtype))
