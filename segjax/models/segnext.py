"""SegNeXt: attention as a product with multi-scale convolutions, and a decoder that factorises its map.

Guo, Lu, Hou, Liu, Cheng, Hu: "SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation", NeurIPS
2022, arXiv:2209.08575. Sizes are from its table 2. The decoder's "Hamburger" is from Geng et al.: "Is Attention Better
Than Matrix Decomposition?", ICLR 2021, arXiv:2109.04553. Attribute names are the keys of the published checkpoints
(Visual-Attention-Network/SegNeXt).

The Hamburger is a non-negative matrix factorisation X ≈ bases @ coefficients by multiplicative updates, which start
from random bases. The published code draws new bases at every forward pass, in evaluation too, which changes logits by
0.1 to 0.3 from run to run. segjax draws new bases in training, one set per image. Evaluation starts from fixed bases
(`evaluation_bases`), so that predictions are reproducible; `model(images, bases=...)` takes others. Checkpoints do not
store the rank R of the factorisation: for B and L it is 16 in mmsegmentation's configurations and 64 in the official
ones.

Deviations: the fixed bases in evaluation. The factorisation is computed in at least float32, because its intermediates
reach 4e4, near float16's limit. The squeezing 1x1 convolution runs in the equal, cheaper order of
`layers.conv1x1_of_resized`.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from segjax import layers
from segjax.models.segmentation_model import SegmentationModel

# Widths and blocks of table 2; width and rank of the decoder from the official configurations.
VARIANTS = {
    "t": dict(dims=(32, 64, 160, 256), depths=(3, 3, 5, 2), ham_channels=256, ham_rank=16),
    "s": dict(dims=(64, 128, 320, 512), depths=(2, 2, 4, 2), ham_channels=256, ham_rank=16),
    "b": dict(dims=(64, 128, 320, 512), depths=(3, 3, 12, 3), ham_channels=512, ham_rank=64),
    "l": dict(dims=(64, 128, 320, 512), depths=(3, 5, 27, 3), ham_channels=1024, ham_rank=64, drop_path_rate=0.3),
}
# Lengths of the pairs of strip convolutions.
STRIPS = (7, 11, 21)
LAYER_SCALE = 1e-2
GROUPS = 32
TRAINING_STEPS, EVALUATION_STEPS = 6, 7
# Keeps the denominators of the multiplicative updates above zero.
NMF_EPS = 1e-6


def batch_norm(channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype) -> layers.BatchNorm:
    return layers.BatchNorm(channels, epsilon=1e-5, momentum=0.1, dtype=dtype, param_dtype=param_dtype)


class StemConv(nnx.Module):
    """Two 3x3 convolutions of stride 2: (B, H, W, in) -> (B, ⌈H/4⌉, ⌈W/4⌉, dim)."""

    def __init__(self, in_channels: int, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.proj = layers.Sequential(
            [
                layers.Conv(in_channels, dim // 2, 3, stride=2, padding=1, rngs=rngs, **kinds),
                batch_norm(dim // 2, **kinds),
                layers.GELU(),
                layers.Conv(dim // 2, dim, 3, stride=2, padding=1, rngs=rngs, **kinds),
                batch_norm(dim, **kinds),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(x)


class OverlapPatchEmbed(nnx.Module):
    """3x3 convolution of stride 2 and BatchNorm: (B, H, W, in) -> (B, ⌈H/2⌉, ⌈W/2⌉, dim)."""

    def __init__(self, in_channels: int, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.proj = layers.Conv(in_channels, dim, 3, stride=2, padding=1, rngs=rngs, **kinds)
        self.norm = batch_norm(dim, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return layers.conv_norm(self.proj, self.norm, x)


class AttentionModule(nnx.Module):
    """Multi-scale convolutional attention, multiplied by the input (eq. 1 and 2): (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(groups=dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv0 = layers.Conv(dim, dim, 5, padding=2, **kinds)
        for index, length in enumerate(STRIPS):
            reach = length // 2
            setattr(self, f"conv{index}_1", layers.Conv(dim, dim, (1, length), padding=(0, reach), **kinds))
            setattr(self, f"conv{index}_2", layers.Conv(dim, dim, (length, 1), padding=(reach, 0), **kinds))
        self.conv3 = layers.Conv(dim, dim, 1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        near = self.conv0(x)
        total = near
        for index in range(len(STRIPS)):
            total = total + getattr(self, f"conv{index}_2")(getattr(self, f"conv{index}_1")(near))
        return self.conv3(total) * x


class SpatialAttention(nnx.Module):
    """1x1, GELU, attention, 1x1, with a shortcut: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.proj_1 = layers.Conv(dim, dim, 1, **kinds)
        self.spatial_gating_unit = AttentionModule(dim, **kinds)
        self.proj_2 = layers.Conv(dim, dim, 1, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj_2(self.spatial_gating_unit(layers.gelu(self.proj_1(x)))) + x


class DWConv(nnx.Module):
    """Depthwise 3x3 convolution: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dwconv = layers.Conv(dim, dim, 3, padding=1, groups=dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dwconv(x)


class Mlp(nnx.Module):
    """1x1, depthwise 3x3, GELU, 1x1: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = layers.Conv(dim, hidden_dim, 1, **kinds)
        self.dwconv = DWConv(hidden_dim, **kinds)
        self.fc2 = layers.Conv(hidden_dim, dim, 1, **kinds)

    @layers.cpu_implementation(lambda self, x: layers.feed_forward(self.fc1, self.dwconv.dwconv, self.fc2, x))
    def __call__(self, x: jax.Array) -> jax.Array:
        activated = layers.recomputed(lambda hidden: self.fc2(layers.gelu(hidden)))
        return activated(self.dwconv(self.fc1(x)))


class Block(nnx.Module):
    """Attention and MLP, each with a BatchNorm before, a scale per channel, and its own drop path and shortcut."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float,
        drop_path_rate: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.dtype = dtype
        self.norm1 = batch_norm(dim, **kinds)
        self.attn = SpatialAttention(dim, rngs=rngs, **kinds)
        self.norm2 = batch_norm(dim, **kinds)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), rngs=rngs, **kinds)
        self.layer_scale_1 = nnx.Param(jnp.full((dim,), LAYER_SCALE, param_dtype))
        self.layer_scale_2 = nnx.Param(jnp.full((dim,), LAYER_SCALE, param_dtype))
        self.drop_path1 = layers.DropPath(drop_path_rate, rngs=rngs)
        self.drop_path2 = layers.DropPath(drop_path_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = (scale[...].astype(self.dtype) for scale in (self.layer_scale_1, self.layer_scale_2))
        x = layers.residual(x, self.drop_path1(first * self.attn(self.norm1(x))))
        return layers.residual(x, self.drop_path2(second * self.mlp(self.norm2(x))))


class MSCAN(nnx.Module):
    """The encoder: (B, H, W, C) -> four maps at 1/4, 1/8, 1/16 and 1/32 of the image's size, rounded up."""

    def __init__(
        self,
        *,
        in_channels: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        drop_path_rate: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.execution = layers.PLAIN
        rates = [float(rate) for rate in np.linspace(0, drop_path_rate, sum(depths))]
        for stage in range(4):
            if stage == 0:
                embed = StemConv(in_channels, dims[0], rngs=rngs, **kinds)
            else:
                embed = OverlapPatchEmbed(dims[stage - 1], dims[stage], rngs=rngs, **kinds)
            blocks = [
                Block(
                    dims[stage],
                    mlp_ratio=mlp_ratios[stage],
                    drop_path_rate=rates[sum(depths[:stage]) + index],
                    rngs=rngs,
                    **kinds,
                )
                for index in range(depths[stage])
            ]
            setattr(self, f"patch_embed{stage + 1}", embed)
            setattr(self, f"block{stage + 1}", nnx.List(blocks))
            setattr(self, f"norm{stage + 1}", layers.LayerNorm(dims[stage], epsilon=1e-5, **kinds))

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for stage in range(1, 5):
            x = getattr(self, f"patch_embed{stage}")(x)
            x = layers.run_blocks(getattr(self, f"block{stage}"), x, self.execution)
            x = getattr(self, f"norm{stage}")(x)
            features.append(x)
        return features


# -------------------------------------------------------------------------------------------------------- the decoder


@functools.cache
def evaluation_bases(channels: int, rank: int) -> np.ndarray:
    """The initial bases of evaluation, float64 (C, R), equal on every machine and in every version."""
    drawn = np.random.RandomState(0).uniform(size=(channels, rank))
    return drawn / np.linalg.norm(drawn, axis=0)


def factorise(x: jax.Array, bases: jax.Array, *, steps: int) -> jax.Array:
    """Approximates `x` by a non-negative factorisation with multiplicative updates (algorithm 2 of Hamburger).

    Args:
      x: Non-negative array (B, N, C).
      bases: Initial bases (B, C, R), of length 1 over C.
      steps: Number of updates of the bases.

    Returns:
      The product of the factors, (B, N, C), of rank R.
    """
    coefficients = jax.nn.softmax(_product("bnc,bcr->bnr", x, bases), axis=-1)  # (B, N, R)
    for _ in range(steps):
        coefficients = _updated_coefficients(x, bases, coefficients)
        numerator = _product("bnc,bnr->bcr", x, coefficients)  # (B, C, R)
        squares = _product("bnr,bns->brs", coefficients, coefficients)  # (B, R, R)
        denominator = _product("bcr,brs->bcs", bases, squares)  # (B, C, R)
        bases = bases * numerator / (denominator + NMF_EPS)
    coefficients = _updated_coefficients(x, bases, coefficients)
    return _product("bnr,bcr->bnc", coefficients, bases)


# By default a GPU or TPU would round float32 products to fewer bits, in each of the updates.
_product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _updated_coefficients(x: jax.Array, bases: jax.Array, coefficients: jax.Array) -> jax.Array:
    numerator = _product("bnc,bcr->bnr", x, bases)  # (B, N, R)
    squares = _product("bcr,bcs->brs", bases, bases)  # (B, R, R)
    denominator = _product("bnr,brs->bns", coefficients, squares)  # (B, N, R)
    return coefficients * numerator / (denominator + NMF_EPS)


class Bread(nnx.Module):
    """1x1 convolution `conv`, with a GroupNorm `gn` instead of a bias if `norm`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.conv = layers.Conv(in_channels, out_channels, 1, use_bias=not norm, rngs=rngs, **kinds)
        self.gn = layers.GroupNorm(GROUPS, out_channels, epsilon=1e-5, **kinds) if norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.normalise(self.conv(x))

    def normalise(self, x: jax.Array) -> jax.Array:
        """The layers after the convolution."""
        return x if self.gn is None else self.gn(x)


class Hamburger(nnx.Module):
    """The factorisation between two 1x1 convolutions, with a shortcut: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, rank: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.channels, self.rank, self.dtype = channels, rank, dtype
        self.deterministic = True
        self.axis_name: str | None = None
        self.ham_in = Bread(channels, channels, norm=False, **kinds)
        self.ham_out = Bread(channels, channels, norm=True, **kinds)
        self.stream = rngs.dropout.fork()

    def __call__(self, x: jax.Array, bases: jax.Array | None) -> jax.Array:
        B, H, W, C = x.shape
        enjoy = jax.nn.relu(self.ham_in(x))
        wide = enjoy.astype(layers.at_least_float32(self.dtype)).reshape(B, H * W, C)
        start = self.bases_for(wide) if bases is None else jnp.asarray(bases, wide.dtype)
        if start.shape != (B, self.channels, self.rank):
            raise ValueError(
                f"bases must be (B, C, R) = {(B, self.channels, self.rank)}, normalised over C; got {start.shape}"
            )
        steps = EVALUATION_STEPS if self.deterministic else TRAINING_STEPS
        ham = factorise(wide, _sharded_like(wide, start), steps=steps).reshape(B, H, W, C)
        return jax.nn.relu(self.ham_out(ham.astype(self.dtype)) + x)

    def bases_for(self, x: jax.Array) -> jax.Array:
        """Initial bases (B, C, R) of the factorisation: random in training, fixed in evaluation."""
        if self.deterministic:
            fixed = jnp.asarray(evaluation_bases(self.channels, self.rank), x.dtype)
            return jnp.broadcast_to(fixed, (x.shape[0], *fixed.shape))

        def draw(key, samples):
            drawn = jax.random.uniform(key, (samples, self.channels, self.rank), x.dtype)
            return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)

        return layers.draw_per_sample(draw, self.stream, x, self.axis_name)


def _sharded_like(x: jax.Array, bases: jax.Array) -> jax.Array:
    """`bases` (B, C, R) sharded over the batch as `x` (B, ...), as products require under a mesh with explicit axes."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return bases
    return jax.sharding.reshard(bases, PartitionSpec(jax.typeof(x).sharding.spec[0]))


class LightHamHead(nnx.Module):
    """Decoder over the last three levels (section 3.2): four maps -> logits (B, ⌈H/8⌉, ⌈W/8⌉, K)."""

    def __init__(
        self,
        *,
        dims: tuple[int, ...],
        ham_channels: int,
        ham_rank: int,
        num_classes: int,
        dropout_rate: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.squeeze = Bread(sum(dims[1:]), ham_channels, norm=True, **kinds)
        self.hamburger = Hamburger(ham_channels, ham_rank, **kinds)
        self.align = Bread(ham_channels, ham_channels, norm=True, **kinds)
        self.dropout = layers.Dropout2d(dropout_rate, rngs=rngs)
        self.conv_seg = layers.Conv(ham_channels, num_classes, 1, kernel_init=layers.classifier_init, **kinds)

    def __call__(self, features: list[jax.Array], bases: jax.Array | None) -> jax.Array:
        levels = features[1:]
        size = levels[0].shape[1:3]
        squeezed = layers.conv1x1_of_resized(self.squeeze.conv, levels, lambda x: layers.resize(x, size))
        x = jax.nn.relu(self.squeeze.normalise(squeezed))
        x = self.hamburger(x, bases)
        x = jax.nn.relu(self.align(x))
        return layers.classify(self.conv_seg, self.dropout(x))


class SegNeXt(SegmentationModel):
    """SegNeXt: normalised images (B, H, W, C) -> logits (B, ⌈H/8⌉, ⌈W/8⌉, K) and taps `feature0..feature3`.

    `model(images, bases=...)` starts the factorisation from bases (B, ham_channels, ham_rank), of length 1 over
    channels. `models.create` sets the sizes of a variant.

    Args:
      num_classes: Number of classes K.
      in_channels: Channels C of the images.
      dims: Widths of the four stages.
      depths: Blocks per stage.
      ham_channels: Width of the decoder, a multiple of 32.
      ham_rank: Rank R of the decoder's factorisation.
      mlp_ratios: Width of the MLP relative to that of the stage, per stage.
      drop_path_rate: Rate of the last block; rates grow linearly from 0 in the first.
      dropout_rate: Probability to drop a channel before the classifier.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the stored parameters.
      rngs: Random streams `params` and `dropout`.

    Raises:
      ValueError: A setting per stage does not have four numbers, or `ham_channels` is not a multiple of 32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> jax.eval_shape(lambda images: models.create("segnext_t", num_classes=5)(images)[0], images).shape
      (2, 8, 12, 5)
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        ham_channels: int,
        ham_rank: int,
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layers.require_four(dims=dims, depths=depths, mlp_ratios=mlp_ratios)
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.in_channels = in_channels
        self.backbone = MSCAN(
            in_channels=in_channels,
            dims=dims,
            depths=depths,
            mlp_ratios=mlp_ratios,
            drop_path_rate=drop_path_rate,
            **kinds,
        )
        self.decode_head = LightHamHead(
            dims=dims,
            ham_channels=ham_channels,
            ham_rank=ham_rank,
            num_classes=num_classes,
            dropout_rate=dropout_rate,
            **kinds,
        )

    def __call__(self, images: jax.Array, bases: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        layers.require_images(images, channels=self.in_channels)
        features = self.backbone(images.astype(self.dtype))
        return self.decode_head(features, bases), layers.feature_taps(features)
