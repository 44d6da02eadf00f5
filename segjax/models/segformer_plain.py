"""The SegFormer of jo-jstrm/segmentation_pytorch: the official encoder, and a decoder without activation.

Encoder and decoder projections are those of `segformer.py` (Xie et al., arXiv:2105.15203). The decoder has no
activation, unlike the official one. `fuse="conv"` is a 1x1 convolution with bias; `fuse="conv_bn"`, of a later version
of the repository (camlaedtke), adds a BatchNorm. Neither has a ReLU or dropout of channels.

Attribute names are the official ones. The repository omits their prefixes `backbone.` and `decode_head.` (key format
"segmentation_pytorch").

Deviations: logits have the dtype of the computation, at least float32; the original casts them to float32.
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
from segjax.models.segformer import MLPDecoder

# As in the paper, except that B1's decoder has the width of those of the larger variants, and no channel is dropped.
VARIANTS = {
    name: sizes | dict(decoder_dim=256 if name == "b0" else 768, dropout_rate=0.0)
    for name, sizes in segformer.VARIANTS.items()
}
FUSES = ("conv", "conv_bn")


class PlainHead(MLPDecoder):
    """The decoder, linear except for the dropout: four maps -> logits (B, H/4, W/4, K)."""

    # The repository initialises encoder and decoder in the same way.
    INIT: Mapping[str, Any] = types.MappingProxyType({})

    def __init__(self, *, fuse: str, **settings: Any):
        self.fuse = fuse
        super().__init__(**settings)

    def make_fuse(
        self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.linear_fuse = layers.Conv(in_channels, out_channels, 1, rngs=rngs, **kinds)
        self.linear_fuse_bn = (
            layers.BatchNorm(out_channels, epsilon=1e-5, momentum=0.1, **kinds) if self.fuse == "conv_bn" else None
        )

    def fusion(self) -> layers.Conv:
        return self.linear_fuse

    def finish(self, fused: jax.Array) -> jax.Array:
        return fused if self.linear_fuse_bn is None else self.linear_fuse_bn(fused)


class SegFormerPlain(segformer.SegFormer):
    """The plain SegFormer: normalised images (B, H, W, C) -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K), taps `feature0..feature3`.

    Args:
      fuse: "conv" or "conv_bn".
      **settings: Arguments of `segformer.SegFormer`.

    Raises:
      ValueError: Unknown `fuse`, or an error of `segformer.SegFormer`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> jax.eval_shape(lambda images: models.create("segformer_plain_b0", num_classes=5)(images)[0], images).shape
      (2, 16, 24, 5)
    """

    def __init__(self, *, fuse: str = "conv", **settings: Any):
        if fuse not in FUSES:
            raise ValueError(f"fuse is one of {', '.join(map(repr, FUSES))}; got {fuse!r}")
        self.fuse = fuse
        super().__init__(**settings)

    def make_head(self, **sizes: Any) -> PlainHead:
        return PlainHead(fuse=self.fuse, **sizes)
