"""Decoders that fuse several levels by a 1x1 convolution: cheaper orders of their products, and row tiles on a CPU."""

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
    """Upsamples maps to one size, concatenates them and applies the 1x1 convolution `layer`.

    Args:
      levels: maps (B, h, w, C_level), their channels in the order of the kernel's.
      upsample: resizes a map to the common size.

    Returns:
      (B, H, W, C).
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

    A 1x1 convolution commutes with resizing, whose weights sum to one, and over a concatenation it is a sum: so each
    level is multiplied by its slice of the kernel at its own resolution.
    """
    products = (jnp.matmul(x, kernel) for x, kernel in zip(levels, kernels, strict=True))
    if biases is not None:
        products = (product + bias for product, bias in zip(products, biases, strict=True))
    return reduce(operator.add, map(upsample, products))


def project_and_fuse(
    levels: Sequence[jax.Array],
    projections: Sequence[Linear | Conv],
    fuse: Conv,
    upsample: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Projects each level, upsamples, concatenates and applies the 1x1 convolution `fuse`, in a cheaper order.

    Nothing between projection and convolution is non-linear, so that their product is one matrix (C_level, C). A
    projection after the upsampling gives the same.

    Args:
      projections: 1x1, with bias, each to as many channels as `fuse` has outputs per level.

    Returns:
      (B, H, W, C) in the dtype of `fuse`.
    """
    kernels, biases = _fused_projections(projections, fuse)
    fused = _sum_of_levels([x.astype(fuse.dtype) for x in levels], kernels, biases, upsample)
    return fused if fuse.bias is None else fused + fuse.bias[...].astype(fuse.dtype)


def _fused_projections(projections: Sequence[Linear | Conv], fuse: Conv) -> tuple[list[jax.Array], list[jax.Array]]:
    """The product of each projection and its slice of `fuse`: a kernel (C_level, C) and a bias (C,) for each level."""
    dtype = fuse.dtype
    # The two matrices are multiplied wide: rounding their product once is closer than rounding each factor.
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
    """Fuses levels, applies `finish` and the classifier, in row tiles: levels -> logits (B, H, W, K). For a CPU.

    Two cores, time with / without row tiles, and MiB of temporaries without -> with: SegFormer-B0's decoder for
    1x512x512 0.65, 80 -> 17; for 1x1024x2048 0.57, 640 -> 84; B2's for 1x512x512 0.64, 240 -> 31.

    Args:
      levels: maps (B, h, w, C_level), in the order in which they are concatenated.
      fuse: 1x1 convolution over the upsampled and concatenated levels, or over their `projections` where given.
      finish: elementwise function between `fuse` and the classifier.
      classifier: 1x1 convolution to K classes.
      mode, align_corners: of the upsampling: "bilinear" or "nearest", as `torch.nn.functional.interpolate` has them.

    Returns:
      NotImplemented for the symbolic sizes of an export, and where the largest level is no whole multiple of the rest.
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
