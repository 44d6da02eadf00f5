"""Convolutions: XLA's own, a matrix product over disjoint patches, and depthwise as a sum of shifted products."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import precision, units


def conv_plain(x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[int, int], groups: int) -> jax.Array:
    """XLA's convolution: (B, H, W, in) and (kh, kw, in / groups, out) -> (B, H', W', out)."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding[0], padding[0]), (padding[1], padding[1])],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def conv_by_output(x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[int, int], groups: int) -> jax.Array:
    """`conv_plain` with the kernel transposed to cuDNN's layout, output channels first.

    XLA otherwise transposes the kernel itself, before each convolution.
    """
    return lax.conv_general_dilated(
        x,
        kernel.transpose(3, 0, 1, 2),
        window_strides=(stride, stride),
        padding=[(padding[0], padding[0]), (padding[1], padding[1])],
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        feature_group_count=groups,
    )


def conv_of_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution without padding, with a stride equal to its kernel size, as one product over disjoint patches.

    It equals `conv_plain(..., stride=r)`, which also drops rows and columns that do not fill a patch. Its input
    gradient is a product too, instead of XLA:CPU's slow dilated convolution (8x8 on 32 channels, forward and backward:
    0.5 instead of 3.3 ms).

    Args:
      x: (B, H, W, C).
      kernel: (r, r, C, out).
    """
    r, _, channels, out_channels = kernel.shape
    batch, height, width = x.shape[0], x.shape[1] // r, x.shape[2] // r
    whole = x[:, : height * r, : width * r].reshape(batch, height, r, width, r, channels)
    patches = whole.transpose(0, 1, 3, 2, 4, 5).reshape(batch * height * width, r * r * channels)
    product = jnp.matmul(patches, kernel.reshape(r * r * channels, out_channels))
    return product.reshape(batch, height, width, out_channels)


def padded(x: jax.Array, kernel_size: Sequence[int]) -> jax.Array:
    """Pads a map with the zeros that an odd kernel reads: (B, H, W, C) -> (B, H + kh - 1, W + kw - 1, C)."""
    top, left = (side // 2 for side in kernel_size)
    return jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))


def shifted(x: jax.Array, kernel_size: Sequence[int]) -> list[list[jax.Array]]:
    """The part (B, H, W, C) of a padded input (B, H + kh - 1, W + kw - 1, C) that each tap [i][j] multiplies."""
    (kernel_height, kernel_width) = kernel_size
    height, width = x.shape[1] - kernel_height + 1, x.shape[2] - kernel_width + 1
    return [[x[:, i : i + height, j : j + width] for j in range(kernel_width)] for i in range(kernel_height)]


def sum_of_taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution of a padded input, as a sum of shifted products.

    Args:
      x: (B, H + kh - 1, W + kw - 1, C).
      kernel: (kh, kw, 1, C).

    Returns:
      (B, H, W, C).
    """
    rows = enumerate(shifted(x, kernel.shape[:2]))
    return reduce(operator.add, (moved * kernel[i, j, 0] for i, row in rows for j, moved in enumerate(row)))


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution with stride 1 that keeps the size, as a sum of shifted products.

    It equals `conv_plain(..., groups=C)`. XLA:CPU lowers a grouped convolution to a scalar loop, 23 to 41 times slower
    than torch; it vectorises a sum of shifted products. The weight gradient has a custom rule for the same reason.

    Args:
      x: (B, H, W, C).
      kernel: (kh, kw, 1, C), both sides odd.
    """
    return _sum_of_shifted(x, kernel)


@units.compiled_apart
def _sum_of_shifted(x, kernel):
    return sum_of_taps(padded(x, kernel.shape[:2]), kernel)


def _depthwise_forward(x, kernel):
    return depthwise(x, kernel), (x, kernel)


def _depthwise_backward(residuals, gradient):
    x, kernel = residuals
    # The input's gradient is the same convolution with the kernel rotated by 180 degrees.
    input_gradient = depthwise(gradient, kernel[::-1, ::-1])
    return input_gradient, sums_of_products(_padded(x, kernel), _padded(gradient, kernel), kernel)


@units.compiled_apart
def _padded(x, kernel):
    return padded(x, kernel.shape[:2])


@units.compiled_apart
def sums_of_products(x: jax.Array, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of a depthwise kernel (kh, kw, 1, C), from the input and the output's gradient, both padded."""
    kernel_height, kernel_width = kernel.shape[:2]
    top, left = kernel_height // 2, kernel_width // 2
    inner = gradient[:, top : gradient.shape[1] - top, left : gradient.shape[2] - left]
    taps = jnp.stack([_sum_over_row_tiles(moved, inner) for row in shifted(x, kernel.shape[:2]) for moved in row])
    return jnp.sum(taps, axis=(1, 2, 3)).reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# Number of products up to which a GPU computes a sum of shifted products in little more than a kernel launch, ~5 us.
MOST_PRODUCTS_OF_A_LAUNCH = 2**25


def is_fused_on_gpu(x: jax.Array, kernel: jax.Array, *, is_inference: bool) -> bool:
    """Whether a GPU computes `depthwise_fused` faster than cuDNN computes a grouped convolution and its neighbours.

    cuDNN's grouped convolution is not fused with anything. A sum of shifted products is fused with the bias, GELU and
    sums around it, but its arithmetic grows with the kernel: it pays off for 3x3 in 16 bits (lower bound of
    SegNeXt-B's training step on an H200: 59.9 instead of 64.0 ms), and for larger kernels on small maps.

    Args:
      x: (B, H, W, C).
      kernel: (kh, kw, 1, C), both sides odd.
      is_inference: Whether no gradient is computed.
    """
    taps = kernel.shape[0] * kernel.shape[1]
    if taps <= 9 and (is_inference or x.dtype.itemsize == 2):
        return True
    is_static = all(isinstance(side, int) for side in x.shape)
    return is_inference and is_static and x.size * taps <= MOST_PRODUCTS_OF_A_LAUNCH


@jax.custom_vjp
def depthwise_fused(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`depthwise` for GPUs, summed in at least float32. XLA fuses the sum with the operations around it.

    The kernel's gradient is that of XLA's convolution, which cuDNN computes.

    Args:
      x: (B, H, W, C).
      kernel: (kh, kw, 1, C), both sides odd.
    """
    # In 16-bit arithmetic, a GPU would round each product and each sum.
    wide = precision.at_least_float32(x.dtype)
    return sum_of_taps(padded(x, kernel.shape[:2]).astype(wide), kernel.astype(wide)).astype(x.dtype)


def _depthwise_fused_forward(x, kernel):
    return depthwise_fused(x, kernel), (x, kernel)


def _depthwise_fused_backward(residuals, gradient):
    x, kernel = residuals
    padding = (kernel.shape[0] // 2, kernel.shape[1] // 2)
    _, transpose = jax.vjp(lambda k: conv_plain(x, k, stride=1, padding=padding, groups=x.shape[-1]), kernel)
    return depthwise_fused(gradient, kernel[::-1, ::-1]), *transpose(gradient)


depthwise_fused.defvjp(_depthwise_fused_forward, _depthwise_fused_backward)


def _sum_over_row_tiles(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y, summed over row tiles in at least float32: (B, H, W, C) twice -> (B, H / tiles, W, C).

    This is the first step of a sum over pixels. XLA:CPU's reduction reads its input from memory; without this step that
    input would be the whole product (nine taps of 128 channels at 2x64x64: 0.8 instead
    of 2.4 ms).
    """
    height = x.shape[1]
    tiles = max(number for number in range(1, 9) if height % number == 0)
    wide = precision.at_least_float32(x.dtype)
    products = (
        one.astype(wide) * other.astype(wide)
        for one, other in zip(jnp.split(x, tiles, axis=1), jnp.split(y, tiles, axis=1), strict=True)
    )
    return reduce(operator.add, products)
