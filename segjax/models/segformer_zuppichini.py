"""The SegFormer of F. Zuppichini's article "Implementing SegFormer in PyTorch" (2021).

It follows Xie et al., arXiv:2105.15203, but is a different network: patch convolutions without bias; torch's multi-head
attention with one joint projection; the reducing convolution and its norm at every ratio, including 1; a Mix-FFN of a
1x1 from C to C, a grouped 3x3 from C to 4C, GELU and a 1x1; drop path only on the FFN branch and for the whole batch at
once (torchvision's mode "batch"); levels upsampled with aligned corners before their 1x1 convolution; ReLU before
BatchNorm in the head; no dropout before the classifier. LayerNorm eps is 1e-5 everywhere. Levels are upsampled by whole
factors, so height and width of an image must be multiples of 32.

Sizes are the article's, initial weights torch's defaults. Attribute names are the article's keys; numbers are indices
in a torch Sequential.

Deviations: none in the results. The decoder computes its products in the equal, cheaper order of
`layers.project_and_fuse`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import layers
from segjax.models.segmentation_model import SegmentationModel

VARIANTS = {
    "": dict(
        dims=(64, 128, 256, 512),
        depths=(3, 4, 6, 3),
        num_heads=(1, 2, 4, 8),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(8, 4, 2, 1),
        decoder_dim=256,
    )
}
# Kernel and stride of the four patch embeddings.
PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))
NORM_EPS = 1e-5
TORCH_INIT: dict[str, Any] = dict(kernel_init=layers.fan_in_init, bias_init=layers.fan_in_bias_init)


class MultiheadAttention(nnx.Module):
    """torch.nn.MultiheadAttention of tokens (B, N, C) to tokens (B, M, C): (B, N, C)."""

    def __init__(self, dim: int, *, num_heads: int, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.dtype = dtype
        # Rows of queries, keys and values, (3C, C): torch's layout.
        joint = layers.joint_projection_init(rngs.params(), (dim, 3 * dim), param_dtype).T
        self.in_proj_weight = nnx.Param(joint)
        self.in_proj_bias = nnx.Param(jnp.zeros((3 * dim,), param_dtype))
        self.out_proj = layers.Linear(
            dim, dim, kernel_init=layers.fan_in_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, tokens: jax.Array, others: jax.Array) -> jax.Array:
        B, N, C = tokens.shape
        heads, width = self.num_heads, C // self.num_heads
        weight, bias = self.in_proj_weight[...].astype(self.dtype), self.in_proj_bias[...].astype(self.dtype)
        query = layers.product(tokens.astype(self.dtype), weight[:C].T) + bias[:C]  # (B, N, C)
        key_value = layers.product(others.astype(self.dtype), weight[C:].T) + bias[C:]  # (B, M, 2C)
        query = query.reshape(B, N, heads, width).transpose(0, 2, 1, 3)  # (B, h, N, D)
        key, value = key_value.reshape(B, -1, 2, heads, width).transpose(2, 0, 3, 1, 4)  # (2, B, h, M, D)
        mixed = layers.attention(query, key, value)  # (B, h, N, D)
        return self.out_proj(mixed.transpose(0, 2, 1, 3).reshape(B, N, C))


class EfficientMultiHeadAttention(nnx.Module):
    """Attention of all pixels to a map reduced `sr_ratio` times on each side: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self, dim: int, *, num_heads: int, sr_ratio: int, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.reducer = layers.Sequential(
            [
                layers.Conv(dim, dim, sr_ratio, stride=sr_ratio, rngs=rngs, **kinds, **TORCH_INIT),
                layers.LayerNorm(dim, epsilon=NORM_EPS, **kinds),
            ]
        )
        self.att = MultiheadAttention(dim, num_heads=num_heads, rngs=rngs, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        reduced = self.reducer(x).reshape(B, -1, C)  # (B, M, C)
        return self.att(x.reshape(B, H * W, C), reduced).reshape(B, H, W, C)


class MixMLP(layers.Sequential):
    """1x1 from C to C, 3x3 in C groups to `hidden_dim`, GELU, 1x1 back to C: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs, **TORCH_INIT)
        super().__init__(
            [
                layers.Conv(dim, dim, 1, **kinds),
                layers.Conv(dim, hidden_dim, 3, padding=1, groups=dim, **kinds),
                layers.GELU(),
                layers.Conv(hidden_dim, dim, 1, **kinds),
            ]
        )

    def row_tiles(self, x: jax.Array) -> jax.Array:
        """The network in row tiles, for CPUs."""
        first, depthwise, _, last = self
        return layers.feed_forward(first, depthwise, last, x)

    @layers.cpu_implementation(row_tiles)
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x)


class ResidualAdd(nnx.Module):
    """x + fn(x)."""

    def __init__(self, fn: Callable[[jax.Array], jax.Array]):
        self.fn = fn

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.residual(x, self.fn(x))


class EncoderStage(nnx.Module):
    """Patch embedding, blocks, LayerNorm: (B, H, W, in) -> (B, ⌈H/s⌉, ⌈W/s⌉, dim)."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        patch: tuple[int, int],
        drop_path_rates: list[float],
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        kernel_size, stride = patch
        self.overlap_patch_merge = layers.Sequential(
            [
                layers.Conv(
                    in_channels,
                    dim,
                    kernel_size,
                    stride=stride,
                    padding=kernel_size // 2,
                    use_bias=False,
                    kernel_init=layers.fan_in_init,
                    rngs=rngs,
                    **kinds,
                ),
                layers.LayerNorm(dim, epsilon=NORM_EPS, **kinds),
            ]
        )
        blocks = []
        for rate in drop_path_rates:
            attention = EfficientMultiHeadAttention(dim, num_heads=num_heads, sr_ratio=sr_ratio, rngs=rngs, **kinds)
            mlp = MixMLP(dim, round(dim * mlp_ratio), rngs=rngs, **kinds)
            attend = [layers.LayerNorm(dim, epsilon=NORM_EPS, **kinds), attention]
            feed = [
                layers.LayerNorm(dim, epsilon=NORM_EPS, **kinds),
                mlp,
                layers.DropPathOfBatch(rate, rngs=rngs),
            ]
            blocks.append(
                layers.Sequential([ResidualAdd(layers.Sequential(attend)), ResidualAdd(layers.Sequential(feed))])
            )
        self.execution = layers.PLAIN
        self.blocks = layers.Sequential(blocks)
        self.norm = layers.LayerNorm(dim, epsilon=NORM_EPS, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(layers.run_blocks(self.blocks, self.overlap_patch_merge(x), self.execution))


class Encoder(nnx.Module):
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
        drop_path_rate: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        rates = [float(rate) for rate in np.linspace(0, drop_path_rate, sum(depths))]
        self.stages = nnx.List(
            [
                EncoderStage(
                    in_channels if stage == 0 else dims[stage - 1],
                    dims[stage],
                    patch=patch,
                    drop_path_rates=rates[sum(depths[:stage]) : sum(depths[: stage + 1])],
                    num_heads=num_heads[stage],
                    mlp_ratio=mlp_ratios[stage],
                    sr_ratio=sr_ratios[stage],
                    dtype=dtype,
                    param_dtype=param_dtype,
                    rngs=rngs,
                )
                for stage, patch in enumerate(PATCHES)
            ]
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Upsample(nnx.Module):
    """Bilinear upsampling by a whole factor with aligned corners."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: jax.Array) -> jax.Array:
        size = (x.shape[1] * self.factor, x.shape[2] * self.factor)
        return layers.resize(x, size, align_corners=True)


class Decoder(nnx.Module):
    """Upsamples each level to 1/4 and projects it with a 1x1 convolution; the deepest level comes first."""

    def __init__(
        self, *, dims: tuple[int, ...], decoder_dim: int, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.stages = nnx.List(
            [
                layers.Sequential([Upsample(2**stage), layers.Conv(dims[stage], decoder_dim, 1, **kinds, **TORCH_INIT)])
                for stage in (3, 2, 1, 0)
            ]
        )

    def __call__(self, features: list[jax.Array]) -> list[jax.Array]:
        return [stage(x) for stage, x in zip(self.stages, features[::-1], strict=True)]


class Head(nnx.Module):
    """Fusion of the concatenated levels (1x1 without bias, ReLU, BatchNorm), and the classifier."""

    def __init__(self, *, decoder_dim: int, num_classes: int, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.fuse = layers.Sequential(
            [
                layers.Conv(
                    4 * decoder_dim,
                    decoder_dim,
                    1,
                    use_bias=False,
                    kernel_init=layers.fan_in_init,
                    rngs=rngs,
                    **kinds,
                ),
                layers.ReLU(),
                layers.BatchNorm(decoder_dim, epsilon=1e-5, momentum=0.1, **kinds),
            ]
        )
        self.predict = layers.Conv(decoder_dim, num_classes, 1, rngs=rngs, **kinds, **TORCH_INIT)


class SegFormerZuppichini(SegmentationModel):
    """Zuppichini's SegFormer: normalised images (B, H, W, C) -> logits (B, H/4, W/4, K) and taps `feature0..feature3`.

    H and W must be multiples of 32. `models.create` sets the sizes.

    Args:
      num_classes: Number of classes K.
      in_channels: Channels C of the images.
      dims: Widths of the four stages.
      depths: Blocks per stage.
      num_heads: Attention heads per stage.
      mlp_ratios: Width of the Mix-FFN relative to that of the stage, per stage; whole numbers.
      sr_ratios: Factor per stage by which attention reduces each side of the map of keys and values.
      decoder_dim: Width of the decoder.
      drop_path_rate: Rate of the last block; rates grow linearly from 0 in the first.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the stored parameters.
      rngs: Random streams `params` and `dropout`.

    Raises:
      ValueError: A setting does not have four numbers, a number of heads does not divide its width, or a ratio of
        `mlp_ratios` is not whole.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> jax.eval_shape(lambda images: models.create("segformer_zuppichini", num_classes=5)(images)[0], images).shape
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
        mlp_ratios: tuple[int, ...],
        sr_ratios: tuple[int, ...],
        decoder_dim: int,
        drop_path_rate: float = 0.0,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layers.require_four(dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        layers.require_whole_heads(dims, num_heads)
        if any(ratio != round(ratio) for ratio in mlp_ratios):
            raise ValueError(f"mlp_ratios must be whole numbers: the 3x3 has one group per channel; got {mlp_ratios}")
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.in_channels = in_channels
        self.encoder = Encoder(
            in_channels=in_channels,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            drop_path_rate=drop_path_rate,
            **kinds,
        )
        self.decoder = Decoder(dims=dims, decoder_dim=decoder_dim, **kinds)
        self.head = Head(decoder_dim=decoder_dim, num_classes=num_classes, **kinds)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        layers.require_images(images, channels=self.in_channels, multiple=self.size_multiple)
        features = self.encoder(images.astype(self.dtype))
        return self.decode(features), layers.feature_taps(features)

    def row_tiles(self, features: list[jax.Array]) -> jax.Array:
        """`decode` in row tiles, for CPUs; NotImplemented in training, where BatchNorm needs whole maps."""
        convolution, relu, norm = self.head.fuse
        if not norm.use_running_average:
            return NotImplemented
        projections = [stage[1] for stage in self.decoder.stages]
        return layers.decode(
            features[::-1],
            convolution,
            lambda fused: norm(relu(fused)),
            self.head.predict,
            align_corners=True,
            projections=projections,
        )

    @layers.cpu_implementation(row_tiles)
    def decode(self, features: list[jax.Array]) -> jax.Array:
        """Four maps -> logits (B, H/4, W/4, K)."""
        _, relu, norm = self.head.fuse
        return layers.classify(self.head.predict, norm(relu(self.fuse_levels(features))))

    def fuse_at_low_resolution(self, features: list[jax.Array]) -> jax.Array:
        """`fuse_levels` with all products at the levels' own resolutions."""
        size = features[0].shape[1:3]
        projections = [stage[1] for stage in self.decoder.stages]
        return layers.project_and_fuse(
            features[::-1], projections, self.head.fuse[0], lambda x: layers.resize(x, size, align_corners=True)
        )

    @layers.cheaper_order(fuse_at_low_resolution)
    def fuse_levels(self, features: list[jax.Array]) -> jax.Array:
        """Upsamples to 1/4, projects, concatenates (deepest first), applies a 1x1 convolution: (B, H/4, W/4, C)."""
        return self.head.fuse[0](jnp.concatenate(self.decoder(features), axis=-1))
