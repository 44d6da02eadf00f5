"""SegFormer: a hierarchical transformer without position codes, and a decoder of linear layers.

Xie, Wang, Yu, Anandkumar, Alvarez, Luo: "SegFormer: Simple and Efficient Design for Semantic Segmentation with
Transformers", NeurIPS 2021, arXiv:2105.15203. Sizes are from its table 6. Attribute names are the keys of the published
checkpoints. Settings that the paper does not state are those of the official code, inferred from its outputs:
LayerNorm eps 1e-6 in blocks and after stages, 1e-5 in patch embeddings and after the spatial reduction; exact GELU;
a drop path rate that grows linearly over all blocks; dropout of whole channels before the classifier.

Deviations: none in the results. The decoder computes its products in an equal, cheaper order
(`layers.project_and_fuse`).
"""

from __future__ import annotations

import abc
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import layers
from segjax.models.segmentation_model import SegmentationModel

# Widths C1..C4, blocks per stage and decoder width C of table 6. B0 is the smallest, B5 the largest.
VARIANTS = {
    "b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), decoder_dim=256),
    "b1": dict(dims=(64, 128, 320, 512), depths=(2, 2, 2, 2), decoder_dim=256),
    "b2": dict(dims=(64, 128, 320, 512), depths=(3, 4, 6, 3), decoder_dim=768),
    "b3": dict(dims=(64, 128, 320, 512), depths=(3, 4, 18, 3), decoder_dim=768),
    "b4": dict(dims=(64, 128, 320, 512), depths=(3, 8, 27, 3), decoder_dim=768),
    "b5": dict(dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), decoder_dim=768),
}


class OverlapPatchEmbed(nnx.Module):
    """Overlapping patches by a strided convolution, then LayerNorm: (B, H, W, in) -> (B, ⌈H/s⌉, ⌈W/s⌉, out)."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        kernel_size: int,
        stride: int,
        norm_eps: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.proj = layers.Conv(
            in_channels, dim, kernel_size, stride=stride, padding=kernel_size // 2, rngs=rngs, **kinds
        )
        self.norm = layers.LayerNorm(dim, epsilon=norm_eps, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.proj(x))


class Attention(nnx.Module):
    """Efficient self-attention: keys and values come from a map reduced `sr_ratio` times on each side (eq. 2)."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        sr_ratio: int,
        norm_eps: float,
        qkv_init: Callable,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.num_heads = num_heads
        self.q = layers.Linear(dim, dim, kernel_init=qkv_init, rngs=rngs, **kinds)
        self.kv = layers.Linear(dim, 2 * dim, kernel_init=qkv_init, rngs=rngs, **kinds)
        self.proj = layers.Linear(dim, dim, rngs=rngs, **kinds)
        if sr_ratio > 1:
            self.sr = layers.Conv(dim, dim, sr_ratio, stride=sr_ratio, rngs=rngs, **kinds)
            self.norm = layers.LayerNorm(dim, epsilon=norm_eps, **kinds)
        else:
            self.sr = self.norm = None

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        heads, width = self.num_heads, C // self.num_heads
        reduced = x if self.sr is None or self.norm is None else self.norm(self.sr(x))  # (B, H/r, W/r, C)
        # Pixels become tokens before channels become heads: one reshape of both has no sharding under a mesh.
        query = self.q(x).reshape(B, -1, C)  # (B, N, C)
        query = query.reshape(B, -1, heads, width).transpose(0, 2, 1, 3)  # (B, h, N, D)
        key_value = self.kv(reduced).reshape(B, -1, 2 * C)  # (B, M, 2C)
        key, value = key_value.reshape(B, -1, 2, heads, width).transpose(2, 0, 3, 1, 4)  # (2, B, h, M, D)
        mixed = layers.attention(query, key, value)  # (B, h, N, D)
        return self.proj(mixed.transpose(0, 2, 1, 3).reshape(B, -1, C).reshape(B, H, W, C))


class DWConv(nnx.Module):
    """The 3x3 depthwise convolution of the Mix-FFN, which replaces position codes: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dwconv = layers.Conv(dim, dim, 3, padding=1, groups=dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dwconv(x)


class Mlp(nnx.Module):
    """Mix-FFN (eq. 3): linear, depthwise 3x3, GELU, linear; (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        kernel_init: Callable,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = layers.Linear(dim, hidden_dim, kernel_init=kernel_init, **kinds)
        self.dwconv = DWConv(hidden_dim, **kinds)
        self.fc2 = layers.Linear(hidden_dim, dim, kernel_init=kernel_init, **kinds)

    @layers.cpu_implementation(lambda self, x: layers.feed_forward(self.fc1, self.dwconv.dwconv, self.fc2, x))
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(layers.gelu(self.dwconv(self.fc1(x))))


class Block(nnx.Module):
    """Pre-norm transformer block with drop path on both branches: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        drop_path_rate: float,
        block_norm_eps: float,
        patch_norm_eps: float,
        qkv_init: Callable,
        mlp_init: Callable,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.norm1 = layers.LayerNorm(dim, epsilon=block_norm_eps, **kinds)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            sr_ratio=sr_ratio,
            norm_eps=patch_norm_eps,
            qkv_init=qkv_init,
            rngs=rngs,
            **kinds,
        )
        self.norm2 = layers.LayerNorm(dim, epsilon=block_norm_eps, **kinds)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), kernel_init=mlp_init, rngs=rngs, **kinds)
        self.drop_path1 = layers.DropPath(drop_path_rate, rngs=rngs)
        self.drop_path2 = layers.DropPath(drop_path_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = layers.residual(x, self.drop_path1(self.attn(self.norm1(x))))
        return layers.residual(x, self.drop_path2(self.mlp(self.norm2(x))))


class MixTransformer(nnx.Module):
    """The MiT encoder: (B, H, W, C) -> four maps at 1/4, 1/8, 1/16 and 1/32 of the image's size, rounded up."""

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
        block_norm_eps: float,
        patch_norm_eps: float,
        qkv_init: Callable = layers.linear_init,
        mlp_init: Callable = layers.linear_init,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.sr_ratios = sr_ratios
        self.execution = layers.PLAIN
        rates = [float(rate) for rate in np.linspace(0, drop_path_rate, sum(depths))]
        for stage in range(4):
            embed = OverlapPatchEmbed(
                in_channels if stage == 0 else dims[stage - 1],
                dims[stage],
                kernel_size=7 if stage == 0 else 3,
                stride=4 if stage == 0 else 2,
                norm_eps=patch_norm_eps,
                rngs=rngs,
                **kinds,
            )
            blocks = [
                Block(
                    dims[stage],
                    num_heads=num_heads[stage],
                    mlp_ratio=mlp_ratios[stage],
                    sr_ratio=sr_ratios[stage],
                    drop_path_rate=rates[sum(depths[:stage]) + index],
                    block_norm_eps=block_norm_eps,
                    patch_norm_eps=patch_norm_eps,
                    qkv_init=qkv_init,
                    mlp_init=mlp_init,
                    rngs=rngs,
                    **kinds,
                )
                for index in range(depths[stage])
            ]
            setattr(self, f"patch_embed{stage + 1}", embed)
            setattr(self, f"block{stage + 1}", nnx.List(blocks))
            setattr(self, f"norm{stage + 1}", layers.LayerNorm(dims[stage], epsilon=block_norm_eps, **kinds))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for stage in range(4):
            x = getattr(self, f"patch_embed{stage + 1}")(x)
            # Not min(): it cannot compare two symbolic sizes of an export.
            if any(side < self.sr_ratios[stage] for side in x.shape[1:3]):
                # A map of stage s has ⌈side / stride⌉ pixels, with a stride of 4 * 2**s.
                least = max((ratio - 1) * 4 * 2**s + 1 for s, ratio in enumerate(self.sr_ratios))
                raise ValueError(
                    f"the image is too small: stage {stage + 1} sees a map of {x.shape[1]}x{x.shape[2]} and reduces it "
                    f"{self.sr_ratios[stage]} times; use images of at least {least}x{least} pixels"
                )
            x = layers.run_blocks(getattr(self, f"block{stage + 1}"), x, self.execution)
            x = getattr(self, f"norm{stage + 1}")(x)
            features.append(x)
        return features


class LevelProjection(nnx.Module):
    """The decoder's linear layer of one level, "MLP" in the paper: (B, h, w, C_level) -> (B, h, w, C)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        **init: Any,
    ):
        self.proj = layers.Linear(in_features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(x)


class ConvModule(nnx.Module):
    """1x1 convolution without bias and its BatchNorm."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.conv = layers.Conv(in_channels, out_channels, 1, use_bias=False, rngs=rngs, **kinds)
        self.bn = layers.BatchNorm(out_channels, epsilon=1e-5, momentum=0.1, **kinds)


class MLPDecoder(nnx.Module):
    """The decoder (section 3.2): projects each level, upsamples to 1/4, concatenates, fuses and classifies.

    Its two subclasses differ only in their fusing layers: `SegFormerHead` (SegFormer) and `PlainHead` (SegFormerPlain,
    in `segformer_plain.py`). Each defines three methods:

    - `make_fuse` creates the fusing layers; the constructor calls it once.
    - `fusion` returns the 1x1 convolution among them.
    - `finish` applies the layers between that convolution and the dropout.

    Which implementation runs:

    - `row_tiles` on a CPU, in evaluation.
    - `__call__` everywhere else, with `fuse_at_low_resolution` in place of `fuse_levels`.
    - `__call__` with `fuse_levels`, the equation, inside `layers.published_implementations()`.
    """

    # The published code keeps torch's default initialisation for the decoder's projections and classifier.
    INIT: Mapping[str, Any] = types.MappingProxyType(
        dict(kernel_init=layers.fan_in_init, bias_init=layers.fan_in_bias_init)
    )

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
        self.linear_c4 = LevelProjection(dims[3], decoder_dim, **kinds, **self.INIT)
        self.linear_c3 = LevelProjection(dims[2], decoder_dim, **kinds, **self.INIT)
        self.linear_c2 = LevelProjection(dims[1], decoder_dim, **kinds, **self.INIT)
        self.linear_c1 = LevelProjection(dims[0], decoder_dim, **kinds, **self.INIT)
        self.make_fuse(4 * decoder_dim, decoder_dim, **kinds)
        self.dropout = layers.Dropout2d(dropout_rate, rngs=rngs)
        self.linear_pred = layers.Conv(decoder_dim, num_classes, 1, **kinds, **self.INIT)

    def row_tiles(self, features: list[jax.Array]) -> jax.Array:
        """The decoder in row tiles, for CPUs; NotImplemented in training, where BatchNorm needs whole maps."""
        if not self.dropout.deterministic:
            return NotImplemented
        levels = features[::-1]
        return layers.decode(levels, self.fusion(), self.finish, self.linear_pred, projections=self.levels())

    @layers.cpu_implementation(row_tiles)
    def __call__(self, features: list[jax.Array]) -> jax.Array:
        fused = self.finish(self.fuse_levels(features))  # (B, H/4, W/4, C)
        return layers.classify(self.linear_pred, self.dropout(fused))

    def levels(self) -> list[layers.Linear]:
        """The four projections in the order of the concatenation: deepest level first."""
        return [self.linear_c4.proj, self.linear_c3.proj, self.linear_c2.proj, self.linear_c1.proj]

    def fuse_at_low_resolution(self, features: list[jax.Array]) -> jax.Array:
        """`fuse_levels` with all products at the levels' own resolutions."""
        size = features[0].shape[1:3]
        return layers.project_and_fuse(features[::-1], self.levels(), self.fusion(), lambda x: layers.resize(x, size))

    @layers.cheaper_order(fuse_at_low_resolution)
    def fuse_levels(self, features: list[jax.Array]) -> jax.Array:
        """Projects each level, upsamples to 1/4, concatenates, applies a 1x1 convolution: (B, H/4, W/4, C)."""
        size = features[0].shape[1:3]
        projected = [level(x) for level, x in zip(self.levels(), features[::-1], strict=True)]
        upsampled = [layers.resize(x, size) for x in projected]
        return self.fusion()(jnp.concatenate(upsampled, axis=-1))

    @abc.abstractmethod
    def make_fuse(
        self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Creates the fusing layers as attributes, named as in the checkpoints of the subclass."""

    @abc.abstractmethod
    def fusion(self) -> layers.Conv:
        """The 1x1 convolution that fuses the concatenated levels, (B, H/4, W/4, 4C) -> (B, H/4, W/4, C)."""

    @abc.abstractmethod
    def finish(self, fused: jax.Array) -> jax.Array:
        """The layers between the fusing convolution and the dropout, pixel by pixel in evaluation."""


class SegFormerHead(MLPDecoder):
    """All-MLP decoder (section 3.2): four maps -> logits (B, H/4, W/4, K)."""

    def make_fuse(
        self, in_channels: int, out_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.linear_fuse = ConvModule(in_channels, out_channels, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def fusion(self) -> layers.Conv:
        return self.linear_fuse.conv

    def finish(self, fused: jax.Array) -> jax.Array:
        return jax.nn.relu(self.linear_fuse.bn(fused))


class SegFormer(SegmentationModel):
    """SegFormer: normalised images (B, H, W, C) -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K) and taps `feature0..feature3`.

    `models.create` sets the sizes of a variant.

    Args:
      num_classes: Number of classes K.
      dims: Widths of the four stages.
      depths: Blocks per stage.
      decoder_dim: Width of the decoder.
      in_channels: Channels C of the images.
      num_heads: Attention heads per stage.
      mlp_ratios: Width of the Mix-FFN relative to that of the stage, per stage.
      sr_ratios: Factor per stage by which attention reduces each side of the map of keys and values.
      drop_path_rate: Rate of the last block; rates grow linearly from 0 in the first.
      dropout_rate: Probability to drop a channel before the classifier.
      block_norm_eps: LayerNorm eps in blocks and after stages.
      patch_norm_eps: LayerNorm eps in patch embeddings and after the spatial reduction.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the stored parameters.
      rngs: Random streams `params` and `dropout`.

    Raises:
      ValueError: A setting does not have four numbers, or a number of heads does not divide its width.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> jax.eval_shape(lambda images: models.create("segformer_b0", num_classes=5)(images)[0], images).shape
      (2, 16, 24, 5)
    """

    # Encoder initialisers that a subclass overrides.
    ENCODER_INIT: Mapping[str, Any] = types.MappingProxyType({})

    def __init__(
        self,
        *,
        num_classes: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        decoder_dim: int,
        in_channels: int = 3,
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
        block_norm_eps: float = 1e-6,
        patch_norm_eps: float = 1e-5,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layers.require_four(dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)
        layers.require_whole_heads(dims, num_heads)
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.in_channels = in_channels
        self.backbone = MixTransformer(
            in_channels=in_channels,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            drop_path_rate=drop_path_rate,
            block_norm_eps=block_norm_eps,
            patch_norm_eps=patch_norm_eps,
            **self.ENCODER_INIT,
            **kinds,
        )
        self.decode_head = self.make_head(
            dims=dims, decoder_dim=decoder_dim, num_classes=num_classes, dropout_rate=dropout_rate, **kinds
        )

    def make_head(self, **sizes: Any) -> nnx.Module:
        """Creates the decoder; subclasses override it."""
        return SegFormerHead(**sizes)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        layers.require_images(images, channels=self.in_channels)
        features = self.backbone(images.astype(self.dtype))
        return self.decode_head(features), layers.feature_taps(features)
