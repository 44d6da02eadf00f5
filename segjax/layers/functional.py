"""Operations without parameters, and which implementation of each runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from segjax.kernels import choice, convolution
from segjax.kernels.attention import MOST_SCORES, attention_by_rows, attention_plain
from segjax.kernels.gelu import gelu_by_slope, gelu_plain
from segjax.kernels.resize import resize_aligned, resize_by_phases, resize_plain


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[int, int], groups: int) -> jax.Array:
    """Convolution (B, H, W, in) with an HWIO kernel, in whichever of the equal forms below is fastest.

    A 1x1 kernel is a matrix product (XLA:CPU: 7.0 ms against 10.9 ms for 270 channels at 128x128), on a CPU so is a
    kernel that steps by its own size, and a depthwise kernel of stride 1 goes to `depthwise`; all else is `conv_plain`.
    """
    kernel_height, kernel_width, in_per_group, out_channels = kernel.shape
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0) and groups == 1:
        return jnp.matmul(x, kernel[0, 0])
    if kernel.shape[:2] == (stride, stride) and padding == (0, 0) and groups == 1 and choice.fast_cpu_forms():
        return convolution.conv_of_patches(x, kernel)
    keeps_size = padding == (kernel_height // 2, kernel_width // 2) and kernel_height % 2 and kernel_width % 2
    if in_per_group == 1 and stride == 1 and keeps_size and choice.fast_cpu_forms():
        # Where a channel has several outputs, they are neighbours.
        repeated = x if groups == out_channels else jnp.repeat(x, out_channels // groups, axis=-1)
        return convolution.depthwise(repeated, kernel)
    return convolution.conv_plain(x, kernel, stride=stride, padding=padding, groups=groups)


# -------------------------------------------------------------------------------------------- activations, attention


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by the error function; jax's default is the tanh approximation, 4.7e-4 away."""
    return gelu_by_slope(x) if choice.fast_cpu_forms() else gelu_plain(x)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q kᵀ / sqrt(D)) v with the softmax in at least float32.

    Args:
      query: (B, h, N, D); key, value: (B, h, M, D). Head-major, so that both products are plain batched ones.

    Returns:
      (B, h, N, D) in the dtype of `query`. `jax.nn.dot_product_attention` is not used: its softmax is float32 even for
      float64 inputs (1e-7).
    """
    (B, h, N, _), M = query.shape, key.shape[2]
    # Of sizes that an exported program leaves open nobody knows whether the scores are many.
    if not choice.fast_cpu_forms() or not all(isinstance(size, int) for size in (B, N, M)):
        return attention_plain(query, key, value)
    rows = max(1, MOST_SCORES // (B * h * M))
    if rows >= N:
        return attention_plain(query, key, value)
    return attention_by_rows(query, key, value, rows=-(-N // -(-N // rows)))


# ------------------------------------------------------------------------------------------------------------ resize


def resize(x: jax.Array, size: tuple[int, int], *, align_corners: bool = False) -> jax.Array:
    """torch.nn.functional.interpolate(mode="bilinear", size=size): (B, H, W, C) -> (B, *size, C).

    Args:
      align_corners: True maps the centres of the corner pixels onto each other; False (torch's default) the outer
        edges of the images.
    """
    if x.shape[1:3] == tuple(size):
        return x
    if align_corners:
        return resize_aligned(x, size)
    factors = [new // old if new % old == 0 else 0 for old, new in zip(x.shape[1:3], size, strict=True)]
    if all(factors) and choice.fast_cpu_forms():
        return resize_by_phases(x, tuple(factors))
    return resize_plain(x, size)


def enlarge_nearest(x: jax.Array, factor: int) -> jax.Array:
    """torch.nn.Upsample(mode="nearest", scale_factor=factor): (B, H, W, C) -> (B, H * factor, W * factor, C)."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)
