"""Decoders that fuse several levels with a 1x1 convolution: cheaper orders of their products, and row tiles on CPUs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import decoder, precision
from segjax.layers import functional
from segjax.layers.linear import Conv, Linear, bias_of, classify


def _conv1x1_at_low_resolution(layer: Conv, levels: Sequence[jax.Array], upsample: Callable) -> jax.Array:
    kernels = _slices_by_level(layer, levels)
    fused = _sum_of_levels([x.astype(layer.dtype) for x in levels], kernels, None, upsample)
    return fused if layer.bias is None else fused + layer.bias[...].astype(layer.dtype)


@functional.cheaper_order(_conv1x1_at_low_resolution)
def conv1x1_of_resized(
    layer: Conv, levels: Sequence[jax.Array], upsample: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Upsample maps to one size, concatenate them and apply a 1x1 convolution.

    Outside `published_implementations()` each level is convolved before it is upsampled, which is equal and cheaper.

    Args:
      layer: 1x1 `Conv` whose input channels are those of all levels, in their order.
      levels: Maps (B, h, w, C_level).
      upsample: Function that resizes a map to the common size (H, W).

    Returns:
      (B, H, W, C) in the dtype of `layer`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> conv = layers.Conv(3 + 5, 7, 1, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> levels = [jnp.ones((2, 8, 12, 3)), jnp.ones((2, 4, 6, 5))]
      >>> layers.conv1x1_of_resized(conv, levels, lambda x: layers.resize(x, (8, 12))).shape
      (2, 8, 12, 7)
    """
    return layer(jnp.concatenate([upsample(x) for x in levels], axis=-1))


def _slices_by_level(layer: Conv, levels: Sequence[jax.Array]) -> list[jax.Array]:
    """Each level's part of the kernel of a 1x1 convolution over concatenated levels, (C_level, C)."""
    ends = list(accumulate(x.shape[-1] for x in levels))
    return jnp.split(layer.kernel[...][0, 0].astype(layer.dtype), ends[:-1])


def _sum_of_levels(
    levels: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array] | None,
    upsample: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Sum of upsample(level @ kernel + bias): a 1x1 convolution of the upsampled and concatenated levels.

    A 1x1 convolution commutes with resizing, because the weights of resizing sum to one. Over a concatenation it is a
    sum over levels. So each level is multiplied by its slice of the kernel at its own resolution.
    """
    products = (functional.product(x, kernel) for x, kernel in zip(levels, kernels, strict=True))
    if biases is not None:
        products = (product + bias for product, bias in zip(products, biases, strict=True))
    return reduce(operator.add, map(upsample, products))


def project_and_fuse(
    levels: Sequence[jax.Array],
    projections: Sequence[Linear | Conv],
    fuse: Conv,
    upsample: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Project each level, upsample, concatenate and apply a 1x1 convolution, in a cheaper order.

    No operation between projection and convolution is non-linear, so the two are one matrix (C_level, C). The result
    also equals that of projections after the upsampling.

    Args:
      levels: Maps (B, h, w, C_level).
      projections: `Linear` or 1x1 `Conv` with bias per level, from C_level to C channels.
      fuse: 1x1 `Conv` from the concatenated projections to C channels.
      upsample: Function that resizes a map to the common size (H, W).

    Returns:
      (B, H, W, C) in the dtype of `fuse`.

    Raises:
      ValueError: A projection has no bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> kinds = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> projections = [layers.Linear(3, 7, **kinds), layers.Linear(5, 7, **kinds)]
      >>> levels = [jnp.ones((2, 8, 12, 3)), jnp.ones((2, 4, 6, 5))]
      >>> fuse = layers.Conv(2 * 7, 7, 1, **kinds)
      >>> layers.project_and_fuse(levels, projections, fuse, lambda x: layers.resize(x, (8, 12))).shape
      (2, 8, 12, 7)
    """
    kernels, biases = _fused_projections(projections, fuse)
    fused = _sum_of_levels([x.astype(fuse.dtype) for x in levels], kernels, biases, upsample)
    return fused if fuse.bias is None else fused + fuse.bias[...].astype(fuse.dtype)


def _fused_projections(projections: Sequence[Linear | Conv], fuse: Conv) -> tuple[list[jax.Array], list[jax.Array]]:
    """The product of each projection and its slice of `fuse`: a kernel (C_level, C) and a bias (C,) per level."""
    dtype = fuse.dtype
    # The matrices are multiplied in at least float32: rounding the product once loses less than rounding both factors.
    wide = jnp.promote_types(fuse.kernel[...].dtype, precision.at_least_float32(dtype))
    slices = jnp.split(fuse.kernel[...][0, 0].astype(wide), len(projections))  # (C, C) each
    matrices = [p.kernel[...].reshape(p.kernel.shape[-2:]).astype(wide) for p in projections]  # (C_level, C) each
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    kernels = [product(matrix, part).astype(dtype) for matrix, part in zip(matrices, slices, strict=True)]
    biases = [product(bias_of(p).astype(wide), part) for p, part in zip(projections, slices, strict=True)]
    return kernels, [bias.astype(dtype) for bias in biases]


def decode(
    levels: Sequence[jax.Array],
    fuse: Conv,
    finish: Callable[[jax.Array], jax.Array],
    classifier: Conv,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
    projections: Sequence[Linear | Conv] | None = None,
) -> jax.Array:
    """Fuse levels, apply `finish` and the classifier, in row tiles, for CPUs.

    Time with row tiles / without on two cores, and MiB of temporaries without -> with: SegFormer-B0's decoder for
    1x512x512 0.65, 80 -> 17; for 1x1024x2048 0.57, 640 -> 84; B2's for 1x512x512 0.64, 240 -> 31.

    Args:
      levels: Maps (B, h, w, C_level), in the order of their concatenation.
      fuse: 1x1 `Conv` over the upsampled and concatenated levels, or over their projections.
      finish: Elementwise function between `fuse` and the classifier.
      classifier: 1x1 `Conv` to K classes.
      mode: "bilinear" or "nearest", as in `torch.nn.functional.interpolate`.
      align_corners: Alignment of bilinear upsampling, as in `torch.nn.functional.interpolate`.
      projections: `Linear` or 1x1 `Conv` with bias per level, or None if `fuse` reads the levels themselves.

    Returns:
      Logits (B, H, W, K) in at least float32, (H, W) the size of the largest level. NotImplemented if a size is
      symbolic, as in an export, or if the largest level is not a whole multiple of each other one.

    Raises:
      ValueError: A projection has no bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> kinds = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> fuse, classifier = layers.Conv(3 + 5, 7, 1, **kinds), layers.Conv(7, 4, 1, **kinds)
      >>> levels = [jnp.ones((2, 8, 12, 3)), jnp.ones((2, 4, 6, 5))]
      >>> layers.decode(levels, fuse, layers.ReLU(), classifier).shape
      (2, 8, 12, 4)
    """
    if not decoder.are_multiples([x.shape for x in levels]):
        return NotImplemented
    dtype = fuse.dtype
    levels = [x.astype(dtype) for x in levels]
    if projections is None:
        kernels, bias = _slices_by_level(fuse, levels), jnp.zeros((), dtype)
    else:
        kernels, biases = _fused_projections(projections, fuse)
        bias = reduce(operator.add, biases)
    if fuse.bias is not None:
        bias = bias + fuse.bias[...].astype(dtype)
    classify_pixels = partial(classify, classifier)
    return decoder.decode_by_rows(
        levels, kernels, bias, finish, classify_pixels, mode=mode, align_corners=align_corners
    )
