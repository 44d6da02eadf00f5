"""SegFormer as mmsegmentation 1.x trains it: the official encoder, and a decoder with a BatchNorm in every level.

The encoder is that of `segformer.py` (Xie et al., arXiv:2105.15203) with LayerNorm eps 1e-6 everywhere. The decoder
differs from the paper's: each level's projection is a 1x1 convolution without bias, BatchNorm and ReLU; the levels are
concatenated from c1 to c4; all variants are 256 wide. Because of the ReLU the projections cannot be merged into the
fusion.

Attribute names of the encoder are the official ones, those of the decoder mmsegmentation's. mmsegmentation's names of
the encoder (`layers`, `in_proj`, `ffn`) belong to the key format "mmseg".

Deviations: none in the results.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segjax import layers
from segjax.models import segformer

# Sizes of the paper's table 6. The decoder is 256 wide in every published configuration.
VARIANTS = {name: sizes | dict(decoder_dim=256, patch_norm_eps=1e-6) for name, sizes in segformer.VARIANTS.items()}


class ConvModule(nnx.Module):
    """Bias-free 1x1 convolution, BatchNorm and ReLU: (B, H, W, in) -> (B, H, W, out)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.conv = layers.Conv(in_channels, out_channels, 1, use_bias=False, rngs=rngs, **kinds)
        self.bn = layers.BatchNorm(out_channels, epsilon=1e-5, momentum=0.1, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activate(self.conv(x))

    def activate(self, x: jax.Array) -> jax.Array:
        """The layers after the convolution."""
        return jax.nn.relu(self.bn(x))


class MMSegHead(nnx.Module):
    """The decoder: four maps -> logits (B, H/4, W/4, K)."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        decoder_dim: int,
        num_classes: int,
        dropout_rate: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.convs = nnx.List([ConvModule(dim, decoder_dim, **kinds) for dim in dims])
        self.fusion_conv = ConvModule(4 * decoder_dim, decoder_dim, **kinds)
        self.dropout = layers.Dropout2d(dropout_rate, rngs=rngs)
        self.conv_seg = layers.Conv(decoder_dim, num_classes, 1, kernel_init=layers.classifier_init, **kinds)

    def project(self, features: list[jax.Array]) -> list[jax.Array]:
        """Projects each level at its own resolution to `decoder_dim` channels."""
        return [conv(x) for conv, x in zip(self.convs, features, strict=True)]

    def row_tiles(self, features: list[jax.Array]) -> jax.Array:
        """The decoder in row tiles, for CPUs; NotImplemented in training, where BatchNorm needs whole maps."""
        if not self.dropout.deterministic:
            return NotImplemented
        fuse = self.fusion_conv
        return layers.decode(self.project(features), fuse.conv, fuse.activate, self.conv_seg)

    @layers.cpu_implementation(row_tiles)
    def __call__(self, features: list[jax.Array]) -> jax.Array:
        size = features[0].shape[1:3]
        fused = layers.conv1x1_of_resized(
            self.fusion_conv.conv, self.project(features), lambda x: layers.resize(x, size)
        )  # (B, H/4, W/4, C)
        return layers.classify(self.conv_seg, self.dropout(self.fusion_conv.activate(fused)))


class SegFormerMMSeg(segformer.SegFormer):
    """mmsegmentation's SegFormer: normalised images (B, H, W, C) -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K) and taps.

    The taps are `feature0..feature3`. The arguments are those of `segformer.SegFormer`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> jax.eval_shape(lambda images: models.create("segformer_mmseg_b0", num_classes=5)(images)[0], images).shape
      (2, 16, 24, 5)
    """

    # mmsegmentation keeps torch's initial weights of the joint QKV projection; its Mix-FFN is 1x1 convolutions.
    ENCODER_INIT: Mapping[str, Any] = types.MappingProxyType(
        dict(qkv_init=layers.joint_projection_init, mlp_init=layers.fan_out_init)
    )

    def make_head(self, **sizes: Any) -> MMSegHead:
        return MMSegHead(**sizes)
