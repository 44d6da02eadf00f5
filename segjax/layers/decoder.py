"""Decoders that fuse several levels: the order of their products, and row tiles on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import choice, decoder, precision
from segjax.layers.linear import Conv, Linear, classify

# ------------------------------------------------------------------------------------------- decoders of several levels


def conv1x1_of_resized(
    layer: Conv, levels: Sequence[jax.Array], enlarge: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Enlarges maps to one size, concatenates them and applies the 1x1 convolution `layer`, in a cheaper order.

    Args:
      levels: maps (B, h, w, C_level), their channels in the order of the kernel's.
      enlarge: resizes a map to the common size.

    Returns:
      (B, H, W, C).
    """
    if choice.as_published():
        return layer(jnp.concatenate([enlarge(x) for x in levels], axis=-1))
    kernels = slices_by_level(layer, levels)
    fused = _sum_of_levels([x.astype(layer.dtype) for x in levels], kernels, None, enlarge)
    return fused if layer.bias is None else fused + layer.bias[...].astype(layer.dtype)


def slices_by_level(layer: Conv, levels: Sequence[jax.Array]) -> list[jax.Array]:
    """Of a 1x1 convolution over concatenated levels: each level's part of the kernel, (C_level, C)."""
    ends = list(accumulate(x.shape[-1] for x in levels))
    return jnp.split(layer.kernel[...][0, 0].astype(layer.dtype), ends[:-1])


def _sum_of_levels(
    levels: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array] | None,
    enlarge: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Sum of enlarge(level @ kernel + bias): a 1x1 convolution of the enlarged and concatenated levels.

    A 1x1 convolution commutes with resizing, whose weights sum to one, and over a concatenation it is a sum: so each
    level is multiplied by its slice of the kernel at its own resolution.
    """
    total = None
    for index, (x, kernel) in enumerate(zip(levels, kernels, strict=True)):
        y = jnp.matmul(x, kernel)
        y = enlarge(y if biases is None else y + biases[index])
        total = y if total is None else total + y
    return total


def project_and_fuse(
    levels: Sequence[jax.Array],
    projections: Sequence[Linear | Conv],
    fuse: Conv,
    enlarge: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Projects each level, enlarges, concatenates and applies the 1x1 convolution `fuse`, in a cheaper order.

    Nothing non-linear stands between projection and convolution, so that their product is one matrix (C_level, C).
    A projection after the enlargement gives the same.

    Args:
      projections: 1x1, with bias, each to as many channels as `fuse` has outputs per level.

    Returns:
      (B, H, W, C) in the dtype of `fuse`.
    """
    kernels, biases = fused_projections(projections, fuse)
    fused = _sum_of_levels([x.astype(fuse.dtype) for x in levels], kernels, biases, enlarge)
    return fused if fuse.bias is None else fused + fuse.bias[...].astype(fuse.dtype)


def fused_projections(projections: Sequence[Linear | Conv], fuse: Conv) -> tuple[list[jax.Array], list[jax.Array]]:
    """What is left of each projection and its slice of `fuse`: a kernel (C_level, C) and a bias (C,) for each level."""
    dtype = fuse.dtype
    # The two matrices are multiplied wide: rounding their product once is closer than rounding each factor.
    wide = jnp.promote_types(fuse.kernel[...].dtype, precision.at_least_float32(dtype))
    slices = jnp.split(fuse.kernel[...][0, 0].astype(wide), len(projections))  # (C, C) each
    matrices = [p.kernel[...].reshape(p.kernel.shape[-2:]).astype(wide) for p in projections]  # (C_level, C) each
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    kernels = [product(matrix, part).astype(dtype) for matrix, part in zip(matrices, slices, strict=True)]
    biases = [product(p.bias[...].astype(wide), part) for p, part in zip(projections, slices, strict=True)]
    return kernels, [bias.astype(dtype) for bias in biases]


# ---------------------------------------------------------------------------------------------------------- decoders


def decode(
    levels: Sequence[jax.Array],
    fuse: Conv,
    finish: Callable[[jax.Array], jax.Array],
    classifier: Conv,
    *,
    placing: str,
    training: bool,
    fused: Callable[[], jax.Array],
    projections: Sequence[Linear | Conv] | None = None,
) -> jax.Array:
    """classify(finish(fused())), in evaluation on a CPU in bands of rows: levels -> logits (B, H, W, K).

    Two cores, with / without, and MiB of temporaries: SegFormer-B0's decoder for 1x512x512 0.65, 80 -> 17; for
    1x1024x2048 0.57, 640 -> 84; B2's for 1x512x512 0.64, 240 -> 31.

    Args:
      levels: maps (B, h, w, C_level), in the order in which they are concatenated.
      fuse: 1x1 convolution over the enlarged and concatenated levels, or their `projections`, where there are some.
      finish: what stands between it and the classifier, element by element unless `training`.
      placing: how levels are enlarged: "half" pixels, "aligned" corners, or the "nearest" pixel.
      training: finish takes the map as a whole.
      fused: computes the convolution in steps.
    """
    if training or not choice.fast_cpu_forms() or not decoder.are_multiples([x.shape for x in levels]):
        return classify(classifier, finish(fused()))
    dtype = fuse.dtype
    levels = [x.astype(dtype) for x in levels]
    if projections is None:
        kernels, bias = slices_by_level(fuse, levels), jnp.zeros((), dtype)
    else:
        kernels, biases = fused_projections(projections, fuse)
        bias = sum(biases)
    if fuse.bias is not None:
        bias = bias + fuse.bias[...].astype(dtype)
    return decoder.decode_by_rows(levels, kernels, bias, finish, partial(classify, classifier), placing=placing)
