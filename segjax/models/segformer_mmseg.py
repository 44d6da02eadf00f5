"""SegFormer as mmsegmentation 1.x trains it: the official encoder, and a decoder with a BatchNorm in every level.

Encoder of `segformer.py` (Xie et al., arXiv:2105.15203) with LayerNorm eps 1e-6 throughout. The decoder differs from
the paper's: each level's projection is a 1x1 convolution without bias, BatchNorm and ReLU, the levels are concatenated
from c1 to c4, and all variants are 256 wide. Because of the ReLU the projections cannot be merged into the fusion.

Attribute names of the encoder are the official ones, those of the decoder mmsegmentation's; its own names of the
encoder (`layers`, `in_proj`, `ffn`) are the dialect "mmseg".

Deviations: none in what is computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import layers, segformer
from segjax.models.segformer import MixTransformer

# Sizes of the paper's table 6; the decoder is 256 wide in every published configuration.
VARIANTS = {name: sizes | dict(decoder_dim=256) for name, sizes in segformer.VARIANTS.items()}


class ConvModule(nnx.Module):
    """1x1 convolution without bias, BatchNorm, ReLU: (B, H, W, in) -> (B, H, W, out)."""

    def __init__(self, in_channels, out_channels, *, dtype, param_dtype, rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        self.conv = layers.Conv(in_channels, out_channels, 1, use_bias=False, rngs=rngs, **kinds)
        self.bn = layers.BatchNorm(out_channels, epsilon=1e-5, momentum=0.1, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.activate(self.conv(x))

    def activate(self, x: jax.Array) -> jax.Array:
        """What follows the convolution."""
        return jax.nn.relu(self.bn(x))


class MMSegHead(nnx.Module):
    """Four maps -> logits (B, H/4, W/4, K)."""

    def __init__(self, *, dims, decoder_dim, num_classes, dropout_rate, dtype, param_dtype, rngs):
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.convs = nnx.List([ConvModule(dim, decoder_dim, **kinds) for dim in dims])
        self.fusion_conv = ConvModule(4 * decoder_dim, decoder_dim, **kinds)
        self.dropout = layers.Dropout2d(dropout_rate, rngs=rngs)
        self.conv_seg = layers.Conv(decoder_dim, num_classes, 1, kernel_init=layers.classifier_init, **kinds)

    def __call__(self, features: list[jax.Array]) -> jax.Array:
        projected = [conv(x) for conv, x in zip(self.convs, features, strict=True)]
        size = features[0].shape[1:3]
        fused = layers.conv1x1_of_resized(self.fusion_conv.conv, projected, lambda x: layers.resize(x, size))
        return layers.classify(self.conv_seg, self.dropout(self.fusion_conv.activate(fused)))


class SegFormerMMSeg(nnx.Module):
    """Images (B, H, W, 3), normalised -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K) and taps `feature0..feature3`.

    Args of the constructor: those of `segformer.SegFormer`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        decoder_dim: int,
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
        block_norm_eps: float = 1e-6,
        patch_norm_eps: float = 1e-6,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layers.require_four(dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        layers.require_whole_heads(dims, num_heads)
        kinds = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.backbone = MixTransformer(
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            drop_path_rate=drop_path_rate,
            block_norm_eps=block_norm_eps,
            patch_norm_eps=patch_norm_eps,
            # Its joint projection keeps torch's own start, and its Mix-FFN is made of 1x1 convolutions.
            qkv_init=layers.joint_projection_init,
            mlp_init=layers.fan_out_init,
            **kinds,
        )
        self.decode_head = MMSegHead(
            dims=dims, decoder_dim=decoder_dim, num_classes=num_classes, dropout_rate=dropout_rate, **kinds
        )

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        layers.require_images(images)
        features = self.backbone(images.astype(self.dtype))
        return self.decode_head(features), layers.feature_taps(features)
