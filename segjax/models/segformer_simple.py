"""The "simple" SegFormer of P. Wang (lucidrains, segformer-pytorch on PyPI), which is `segformer_simple.py` in
jo-jstrm/segmentation_pytorch.

It follows Xie et al., arXiv:2105.15203, but is a different network. Patches are unfolded and pass a 1x1 convolution,
without a norm. LayerNorm is (x - mean) / (sqrt(var) + 1e-5) over channels. Attention has no biases; one strided
convolution, without a norm, computes keys and values. A pointwise convolution follows the Mix-FFN's depthwise one.
Stages end without a norm. The decoder is linear and upsamples by nearest neighbours. There is no dropout. Every stage
downsamples its map by a whole factor, so height and width of an image must be multiples of 32.

Sizes are the package's defaults, initial weights torch's defaults. Attribute names are the package's keys; numbers are
indices in a torch ModuleList or Sequential.

Deviations: none in the results. Unfolding and its 1x1 convolution run as one equal k x k convolution, the decoder's
products in the order of `layers.project_and_fuse`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segjax import layers
from segjax.models.segmentation_model import SegmentationModel

VARIANTS = {
    "": dict(
        dims=(32, 64, 160, 256),
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(8, 8, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        decoder_dim=256,
    )
}
# Kernel, stride and padding of the four patch embeddings.
PATCHES = ((7, 4, 3), (3, 2, 1), (3, 2, 1), (3, 2, 1))
TORCH_INIT: dict[str, Any] = dict(kernel_init=layers.fan_in_init, bias_init=layers.fan_in_bias_init)


class LayerNorm(nnx.Module):
    """(x - mean) / (sqrt(var) + 1e-5) * g + b over channels, with eps outside the root, unlike in all other norms."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.dtype = dtype
        self.g = nnx.Param(jnp.ones((1, dim, 1, 1), param_dtype))
        self.b = nnx.Param(jnp.zeros((1, dim, 1, 1), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(layers.at_least_float32(self.dtype))
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        scale, shift = (value[...].reshape(-1).astype(wide.dtype) for value in (self.g, self.b))  # (C,)
        return (centered / (jnp.sqrt(variance) + 1e-5) * scale + shift).astype(self.dtype)


class PreNorm(nnx.Module):
    """fn(norm(x))."""

    def __init__(self, dim: int, fn: Callable[[jax.Array], jax.Array], *, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.fn = fn
        self.norm = LayerNorm(dim, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fn(self.norm(x))


class EfficientSelfAttention(nnx.Module):
    """Attention without biases; one convolution of kernel and stride `sr_ratio` computes keys and values."""

    def __init__(
        self, dim: int, *, num_heads: int, sr_ratio: int, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        kinds: dict[str, Any] = dict(
            use_bias=False, kernel_init=layers.fan_in_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.num_heads = num_heads
        self.to_q = layers.Conv(dim, dim, 1, **kinds)
        self.to_kv = layers.Conv(dim, 2 * dim, sr_ratio, stride=sr_ratio, **kinds)
        self.to_out = layers.Conv(dim, dim, 1, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        heads, width = self.num_heads, C // self.num_heads
        # Pixels become tokens before channels become heads: one reshape of both has no sharding under a mesh.
        query = self.to_q(x).reshape(B, -1, C)  # (B, N, C)
        query = query.reshape(B, -1, heads, width).transpose(0, 2, 1, 3)  # (B, h, N, D)
        key_value = self.to_kv(x).reshape(B, -1, 2 * C)  # (B, M, 2C)
        key, value = key_value.reshape(B, -1, 2, heads, width).transpose(2, 0, 3, 1, 4)  # (2, B, h, M, D)
        mixed = layers.attention(query, key, value)  # (B, h, N, D)
        return self.to_out(mixed.transpose(0, 2, 1, 3).reshape(B, -1, C).reshape(B, H, W, C))


class DsConv2d(nnx.Module):
    """Depthwise 3x3 and pointwise convolution: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs, **TORCH_INIT)
        self.net = layers.Sequential(
            [layers.Conv(dim, dim, 3, padding=1, groups=dim, **kinds), layers.Conv(dim, dim, 1, **kinds)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x)


class MixFeedForward(nnx.Module):
    """1x1, depthwise 3x3 and 1x1, GELU, 1x1: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.net = layers.Sequential(
            [
                layers.Conv(dim, hidden_dim, 1, **kinds, **TORCH_INIT),
                DsConv2d(hidden_dim, **kinds),
                layers.GELU(),
                layers.Conv(hidden_dim, dim, 1, **kinds, **TORCH_INIT),
            ]
        )

    def row_tiles(self, x: jax.Array) -> jax.Array:
        """The network in row tiles, for CPUs."""
        first, middle, _, last = self.net
        depthwise, pointwise = middle.net
        return layers.feed_forward(first, depthwise, last, x, pointwise=pointwise)

    @layers.cpu_implementation(row_tiles)
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net(x)


class Unfold(nnx.Module):
    """Overlapping patches as channels, each channel's pixels contiguous: (B, H, W, C) -> (B, H/s, W/s, C * k * k)."""

    def __init__(self, kernel_size: int, stride: int, padding: int):
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated_patches(
            x,
            (self.kernel_size, self.kernel_size),
            (self.stride, self.stride),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def embed_by_one_convolution(unfold: Unfold, projection: layers.Conv, x: jax.Array) -> jax.Array:
    """`embed_patches` as one equal k x k convolution."""
    side, channels = unfold.kernel_size, x.shape[-1]
    kernel = projection.kernel[...].reshape(channels, side, side, -1).transpose(1, 2, 0, 3)  # (k, k, C, dim)
    dtype = projection.dtype
    padding = (unfold.padding, unfold.padding)
    y = layers.conv(x.astype(dtype), kernel.astype(dtype), stride=unfold.stride, padding=padding, groups=1)
    return y if projection.bias is None else y + projection.bias[...].astype(dtype)


@layers.cheaper_order(embed_by_one_convolution)
def embed_patches(unfold: Unfold, projection: layers.Conv, x: jax.Array) -> jax.Array:
    """Projects overlapping patches: (B, H, W, C) -> (B, H/s, W/s, dim)."""
    return projection(unfold(x))


def _block(parts: nnx.List, x: jax.Array) -> jax.Array:
    """Attention and feed-forward, each with a shortcut."""
    for part in parts:
        x = layers.residual(x, part(x))
    return x


class MiT(nnx.Module):
    """The encoder: (B, H, W, C) -> four maps at 1/4, 1/8, 1/16 and 1/32."""

    def __init__(
        self,
        *,
        in_channels: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        sr_ratios: tuple[int, ...],
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.execution = layers.PLAIN
        stages = []
        for stage, (kernel_size, stride, padding) in enumerate(PATCHES):
            dim, channels = dims[stage], in_channels if stage == 0 else dims[stage - 1]
            projection = layers.Conv(channels * kernel_size**2, dim, 1, rngs=rngs, **kinds, **TORCH_INIT)
            blocks = []
            for _ in range(depths[stage]):
                attention = EfficientSelfAttention(
                    dim, num_heads=num_heads[stage], sr_ratio=sr_ratios[stage], rngs=rngs, **kinds
                )
                feed_forward = MixFeedForward(dim, round(dim * mlp_ratios[stage]), rngs=rngs, **kinds)
                blocks.append(nnx.List([PreNorm(dim, attention, **kinds), PreNorm(dim, feed_forward, **kinds)]))
            stages.append(nnx.List([Unfold(kernel_size, stride, padding), projection, nnx.List(blocks)]))
        self.stages = nnx.List(stages)

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for unfold, projection, blocks in self.stages:
            x = embed_patches(unfold, projection, x)
            x = layers.run_blocks(blocks, x, self.execution, _block)
            features.append(x)
        return features


class Upsample(nnx.Module):
    """Upsampling by nearest neighbours."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.upsample_nearest(x, self.factor)


class SegFormerSimple(SegmentationModel):
    """The simple SegFormer: normalised images (B, H, W, C) -> logits (B, H/4, W/4, K) and taps `feature0..feature3`.

    H and W must be multiples of 32. `models.create` sets the sizes.

    Args:
      num_classes: Number of classes K.
      in_channels: Channels C of the images.
      dims: Widths of the four stages.
      depths: Blocks per stage.
      num_heads: Attention heads per stage.
      mlp_ratios: Width of the Mix-FFN relative to that of the stage, per stage.
      sr_ratios: Factor per stage by which attention reduces each side of the map of keys and values.
      decoder_dim: Width of the decoder.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the stored parameters.
      rngs: Random stream `params`.

    Raises:
      ValueError: A setting does not have four numbers, or a number of heads does not divide its width.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> jax.eval_shape(lambda images: models.create("segformer_simple", num_classes=5)(images)[0], images).shape
      (2, 16, 24, 5)
    """

    size_multiple = 32

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        sr_ratios: tuple[int, ...],
        decoder_dim: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layers.require_four(dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        layers.require_whole_heads(dims, num_heads)
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.in_channels = in_channels
        self.mit = MiT(
            in_channels=in_channels,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            **kinds,
        )
        self.to_fused = nnx.List(
            [
                layers.Sequential([layers.Conv(dim, decoder_dim, 1, **kinds, **TORCH_INIT), Upsample(2**stage)])
                for stage, dim in enumerate(dims)
            ]
        )
        self.to_segmentation = layers.Sequential(
            [
                layers.Conv(4 * decoder_dim, decoder_dim, 1, **kinds, **TORCH_INIT),
                layers.Conv(decoder_dim, num_classes, 1, **kinds, **TORCH_INIT),
            ]
        )

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        layers.require_images(images, channels=self.in_channels, multiple=self.size_multiple)
        features = self.mit(images.astype(self.dtype))
        return self.decode(features), layers.feature_taps(features)

    def row_tiles(self, features: list[jax.Array]) -> jax.Array:
        """`decode` in row tiles, for CPUs."""
        fuse, classifier = self.to_segmentation
        projections = [level[0] for level in self.to_fused]
        return layers.decode(features, fuse, lambda fused: fused, classifier, mode="nearest", projections=projections)

    @layers.cpu_implementation(row_tiles)
    def decode(self, features: list[jax.Array]) -> jax.Array:
        """Four maps -> logits (B, H/4, W/4, K)."""
        _, classifier = self.to_segmentation
        return layers.classify(classifier, self.fuse_levels(features))

    def fuse_at_low_resolution(self, features: list[jax.Array]) -> jax.Array:
        """`fuse_levels` with all products at the levels' own resolutions."""
        height = features[0].shape[1]
        fuse, _ = self.to_segmentation
        projections = [level[0] for level in self.to_fused]
        return layers.project_and_fuse(
            features, projections, fuse, lambda x: layers.upsample_nearest(x, height // x.shape[1])
        )

    @layers.cheaper_order(fuse_at_low_resolution)
    def fuse_levels(self, features: list[jax.Array]) -> jax.Array:
        """Projects, upsamples to 1/4, concatenates (largest map first), applies a 1x1 convolution: (B, H/4, W/4, C)."""
        fuse, _ = self.to_segmentation
        return fuse(jnp.concatenate([level(x) for level, x in zip(self.to_fused, features, strict=True)], axis=-1))
