"""The SegFormer of jo-jstrm/segmentation_pytorch: the official encoder, and a decoder without activation.

Encoder and decoder projections are those of `segformer.py` (Xie et al., arXiv:2105.15203). Unlike there, nothing
non-linear stands in the decoder: `fuse="conv"` is a 1x1 convolution with bias and nothing else, `fuse="conv_bn"`, the
repository's later state (camlaedtke), adds a BatchNorm; neither has a ReLU, and no channel is dropped.

Attribute names are the official ones; the repository writes the same without `backbone.` and `decode_head.`
(dialect "segmentation_pytorch").

Deviations: logits stay in the type of the computation, at least float32, where the original ends in a cast to float32.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import layers, segformer
from segjax.models.segformer import MixTransformer, MLPDecoder

# As in the paper, but that B1's decoder is as wide as that of the larger ones.
VARIANTS = segformer.VARIANTS | {"b1": segformer.VARIANTS["b1"] | dict(decoder_dim=768)}
FUSES = ("conv", "conv_bn")


class PlainHead(MLPDecoder):
    """Four maps -> logits (B, H/4, W/4, K), linear but for the dropout."""

    # Encoder and decoder are one module there, which is initialised by one rule: the encoder's.
    INIT = types.MappingProxyType({})

    def __init__(self, *, fuse, **settings):
        self.fuse = fuse
        super().__init__(**settings)

    def make_fuse(self, in_channels, out_channels, *, dtype, param_dtype, rngs) -> None:
        kinds = dict(dtype=dtype, param_dtype=param_dtype)
        self.linear_fuse = layers.Conv(in_channels, out_channels, 1, rngs=rngs, **kinds)
        self.linear_fuse_bn = (
            layers.BatchNorm(out_channels, epsilon=1e-5, momentum=0.1, **kinds) if self.fuse == "conv_bn" else None
        )

    def fusion(self) -> layers.Conv:
        return self.linear_fuse

    def __call__(self, features: list[jax.Array]) -> jax.Array:
        fused = self.fuse_levels(features)
        if self.linear_fuse_bn is not None:
            fused = self.linear_fuse_bn(fused)
        return layers.classify(self.linear_pred, self.dropout(fused))


class SegFormerPlain(nnx.Module):
    """Images (B, H, W, 3), normalised -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K) and taps `feature0..feature3`.

    Args of the constructor: those of `segformer.SegFormer`, and
      fuse: "conv" or "conv_bn".
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
        fuse: str = "conv",
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.0,
        block_norm_eps: float = 1e-6,
        patch_norm_eps: float = 1e-5,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layers.require_four(dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        layers.require_whole_heads(dims, num_heads)
        if fuse not in FUSES:
            raise ValueError(f"fuse is one of {', '.join(map(repr, FUSES))}; got {fuse!r}")
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
            **kinds,
        )
        self.decode_head = PlainHead(
            fuse=fuse, dims=dims, decoder_dim=decoder_dim, num_classes=num_classes, dropout_rate=dropout_rate, **kinds
        )

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        layers.require_images(images)
        features = self.backbone(images.astype(self.dtype))
        return self.decode_head(features), layers.feature_taps(features)
