"""HRNet: parallel branches at four resolutions, which exchange their features after every module.

Wang, Sun, Cheng et al.: "Deep High-Resolution Representation Learning for Visual Recognition", TPAMI 2020,
arXiv:1908.07919 (HRNetV2: all four branches are upsampled and concatenated). Sizes are from its section 3. Attribute
names are the keys of the published checkpoints (HRNet/HRNet-Semantic-Segmentation), which jo-jstrm/segmentation_pytorch
shares.

`align_corners` applies to every bilinear upsampling: in the fusions, in the head and of the logits. It is False for
the checkpoints of Cityscapes without OCR, LIP and Pascal-Context, and True for ADE20K, COCO-Stuff and all with OCR.
Checkpoints do not store it.

Initial weights: normal with std 0.001 for every convolution, torch's default for biases. BatchNorm has momentum 0.1,
as in the code's branch with OCR; the master branch has 0.01.

Deviations: jo-jstrm/segmentation_pytorch upsamples the logits to its crop size; segjax's logits stay at 1/4. The 1x1
convolution over the concatenated branches runs in the equal, cheaper order of `layers.conv1x1_of_resized`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segjax import layers
from segjax.models.segmentation_model import MOST_BLOCKS, SegmentationModel

# Width of the branch with the highest resolution; the others have 2, 4 and 8 times as many channels.
VARIANTS = {"w18": dict(width=18), "w32": dict(width=32), "w48": dict(width=48)}
STEM_CHANNELS = 64
BOTTLENECK_EXPANSION = 4


def conv_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Normal with std 0.001."""
    return 0.001 * jax.random.normal(key, shape, dtype)


def conv3x3(
    in_channels: int, out_channels: int, *, stride: int = 1, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> layers.Conv:
    return layers.Conv(
        in_channels,
        out_channels,
        3,
        stride=stride,
        padding=1,
        use_bias=False,
        kernel_init=conv_init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def conv1x1(
    in_channels: int, out_channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> layers.Conv:
    return layers.Conv(
        in_channels,
        out_channels,
        1,
        use_bias=False,
        kernel_init=conv_init,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def batch_norm(channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype) -> layers.BatchNorm:
    return layers.BatchNorm(channels, epsilon=1e-5, momentum=0.1, dtype=dtype, param_dtype=param_dtype)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolution with a shortcut: (B, H, W, in) -> (B, H, W, 4 * planes)."""

    def __init__(self, in_channels: int, planes: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        out_channels = BOTTLENECK_EXPANSION * planes
        self.conv1 = conv1x1(in_channels, planes, rngs=rngs, **kinds)
        self.bn1 = batch_norm(planes, **kinds)
        self.conv2 = conv3x3(planes, planes, rngs=rngs, **kinds)
        self.bn2 = batch_norm(planes, **kinds)
        self.conv3 = conv1x1(planes, out_channels, rngs=rngs, **kinds)
        self.bn3 = batch_norm(out_channels, **kinds)
        if in_channels == out_channels:
            self.downsample = None
        else:
            self.downsample = layers.Sequential(
                [conv1x1(in_channels, out_channels, rngs=rngs, **kinds), batch_norm(out_channels, **kinds)]
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(layers.conv_norm(self.conv1, self.bn1, x))
        y = jax.nn.relu(layers.conv_norm(self.conv2, self.bn2, y))
        y = layers.conv_norm(self.conv3, self.bn3, y)
        return layers.once(jax.nn.relu(y + (x if self.downsample is None else self.downsample(x))))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions with a shortcut: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.conv1 = conv3x3(channels, channels, rngs=rngs, **kinds)
        self.bn1 = batch_norm(channels, **kinds)
        self.conv2 = conv3x3(channels, channels, rngs=rngs, **kinds)
        self.bn2 = batch_norm(channels, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(layers.conv_norm(self.conv1, self.bn1, x))
        return layers.once(jax.nn.relu(layers.conv_norm(self.conv2, self.bn2, y) + x))


def halving(
    in_channels: int, out_channels: int, *, relu: bool, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> layers.Sequential:
    """3x3 convolution of stride 2 and BatchNorm, followed by ReLU if `relu`."""
    kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    parts = [conv3x3(in_channels, out_channels, stride=2, rngs=rngs, **kinds), batch_norm(out_channels, **kinds)]
    return layers.Sequential([*parts, layers.ReLU()] if relu else parts)


class HighResolutionModule(nnx.Module):
    """Blocks in every branch, then a fusion: each branch becomes the sum of all branches, resized (figure 3).

    n maps (B, h, w, C) -> n maps of the same shapes.
    """

    def __init__(
        self,
        channels: list[int],
        num_blocks: int,
        *,
        align_corners: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.align_corners = align_corners
        self.execution = layers.PLAIN
        self.branches = nnx.List(
            [
                layers.Sequential([BasicBlock(width, rngs=rngs, **kinds) for _ in range(num_blocks)])
                for width in channels
            ]
        )
        self.fuse_layers = nnx.List(
            [
                nnx.List([_exchange(channels, source, target, rngs=rngs, **kinds) for source in range(len(channels))])
                for target in range(len(channels))
            ]
        )

    def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
        maps = [layers.run_blocks(branch, x, self.execution) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for target, exchanges in enumerate(self.fuse_layers):
            exchanged = (x if exchange is None else exchange(x) for exchange, x in zip(exchanges, maps, strict=True))
            size = maps[target].shape[1:3]
            resized = (layers.resize(x, size, align_corners=self.align_corners) for x in exchanged)
            fused.append(layers.once(jax.nn.relu(reduce(operator.add, resized))))
        return fused


def _exchange(
    channels: list[int], source: int, target: int, *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> layers.Sequential | None:
    """Layers that convert branch `source` to the channels of branch `target`; None if they are the same branch.

    They also downsample a larger branch to the size of `target`. The module upsamples a smaller one.
    """
    kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    if source == target:
        return None
    if source > target:
        parts = [conv1x1(channels[source], channels[target], rngs=rngs, **kinds), batch_norm(channels[target], **kinds)]
        return layers.Sequential(parts)
    # Only the last halving changes the number of channels; it has no ReLU.
    inner = [
        halving(channels[source], channels[source], relu=True, rngs=rngs, **kinds) for _ in range(target - source - 1)
    ]
    last = halving(channels[source], channels[target], relu=False, rngs=rngs, **kinds)
    return layers.Sequential([*inner, last])


def transition(
    before: list[int], after: list[int], *, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.List:
    """Layers between two stages: a 3x3 convolution where the channels change, and a halving for the new branch."""
    kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
    parts = nnx.List([])
    for source, target in zip(before, after, strict=False):
        if source == target:
            parts.append(None)
        else:
            convolution = conv3x3(source, target, rngs=rngs, **kinds)
            parts.append(layers.Sequential([convolution, batch_norm(target, **kinds), layers.ReLU()]))
    parts.append(layers.Sequential([halving(before[-1], after[-1], relu=True, rngs=rngs, **kinds)]))
    return parts


def apply_transition(parts: nnx.List, maps: list[jax.Array]) -> list[jax.Array]:
    """Applies a transition, which computes the new branch from the smallest map."""
    sources = [*maps, maps[-1]]
    return [x if part is None else part(x) for part, x in zip(parts, sources, strict=True)]


class HighResolutionNet(SegmentationModel):
    """The backbone: a base class, because its keys in checkpoints have no prefix."""

    def __init__(
        self,
        *,
        width: int,
        in_channels: int = 3,
        stage1_channels: int = 64,
        stage_modules: tuple[int, ...] = (1, 1, 4, 3),
        stage_blocks: tuple[int, ...] = (4, 4, 4, 4),
        align_corners: bool = False,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        layers.require_four(stage_modules=stage_modules, stage_blocks=stage_blocks)
        if stage_modules[0] != 1:
            raise ValueError(f"stage_modules: the first stage has one module; got {stage_modules[0]}")
        # Stage n has n branches.
        blocks = sum(m * b * n for m, b, n in zip(stage_modules, stage_blocks, (1, 2, 3, 4), strict=True))
        if blocks > MOST_BLOCKS:
            raise ValueError(f"stage_modules and stage_blocks give {blocks:,} blocks; the maximum is {MOST_BLOCKS}")
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        self.dtype = dtype
        self.align_corners = align_corners
        self.execution = layers.PLAIN
        self.in_channels = in_channels
        self.conv1 = conv3x3(in_channels, STEM_CHANNELS, stride=2, rngs=rngs, **kinds)
        self.bn1 = batch_norm(STEM_CHANNELS, **kinds)
        self.conv2 = conv3x3(STEM_CHANNELS, STEM_CHANNELS, stride=2, rngs=rngs, **kinds)
        self.bn2 = batch_norm(STEM_CHANNELS, **kinds)
        wide = BOTTLENECK_EXPANSION * stage1_channels
        self.layer1 = layers.Sequential(
            [
                Bottleneck(STEM_CHANNELS if index == 0 else wide, stage1_channels, rngs=rngs, **kinds)
                for index in range(stage_blocks[0])
            ]
        )
        channels = [wide]
        for stage in (2, 3, 4):
            before, channels = channels, [width * 2**level for level in range(stage)]
            setattr(self, f"transition{stage - 1}", transition(before, channels, rngs=rngs, **kinds))
            modules = [
                HighResolutionModule(channels, stage_blocks[stage - 1], align_corners=align_corners, rngs=rngs, **kinds)
                for _ in range(stage_modules[stage - 1])
            ]
            setattr(self, f"stage{stage}", layers.Sequential(modules))

    def branches(self, images: jax.Array) -> list[jax.Array]:
        """Images (B, H, W, C) -> four maps at 1/4, 1/8, 1/16 and 1/32 of the image's size, rounded up."""
        layers.require_images(images, channels=self.in_channels)
        x = images.astype(self.dtype)
        x = jax.nn.relu(layers.conv_norm(self.conv1, self.bn1, x))
        x = jax.nn.relu(layers.conv_norm(self.conv2, self.bn2, x))
        maps = [layers.run_blocks(self.layer1, x, self.execution)]
        for stage in (2, 3, 4):
            maps = apply_transition(getattr(self, f"transition{stage - 1}"), maps)
            maps = layers.run_blocks(getattr(self, f"stage{stage}"), maps, self.execution)
        return maps

    def upsample_to(self, size: Sequence[int]) -> Callable[[jax.Array], jax.Array]:
        """The head's upsampling: a function that resizes maps to `size` (H, W)."""
        return partial(layers.resize, size=size, align_corners=self.align_corners)


class HRNet(HighResolutionNet):
    """HRNet: normalised images (B, H, W, C) -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K) and taps `feature0..feature3`, the branches.

    Args:
      num_classes: Number of classes K.
      width: Channels of the branch with the highest resolution.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the stored parameters.
      rngs: Random stream `params`.
      **settings: Arguments of the backbone: `in_channels`, channels C of the images; `stage1_channels`, inner width of
        the first stage's bottlenecks; `stage_modules`, modules per stage, 1 in the first; `stage_blocks`, blocks per
        stage in each branch of a module; `align_corners`, of every bilinear upsampling, including that of the logits.

    Raises:
      ValueError: A setting per stage does not have four numbers, the first stage has more than one module, or there are
        more than `MOST_BLOCKS` blocks.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
      >>> jax.eval_shape(lambda images: models.create("hrnet_w18", num_classes=5)(images)[0], images).shape
      (2, 16, 24, 5)
    """

    def __init__(
        self, *, num_classes: int, width: int, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs, **settings: Any
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        super().__init__(width=width, rngs=rngs, **kinds, **settings)
        total = 15 * width
        biased: dict[str, Any] = dict(kernel_init=conv_init, bias_init=layers.fan_in_bias_init, rngs=rngs, **kinds)
        self.last_layer = layers.Sequential(
            [
                layers.Conv(total, total, 1, **biased),
                batch_norm(total, **kinds),
                layers.ReLU(),
                layers.Conv(total, num_classes, 1, **biased),
            ]
        )

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        maps = self.branches(images)
        return self.decode(maps), layers.feature_taps(maps)

    def row_tiles(self, maps: list[jax.Array]) -> jax.Array:
        """`decode` in row tiles, for CPUs; NotImplemented in training, where BatchNorm needs whole maps."""
        convolution, norm, relu, classifier = self.last_layer
        if not norm.use_running_average:
            return NotImplemented
        return layers.decode(
            maps, convolution, lambda fused: relu(norm(fused)), classifier, align_corners=self.align_corners
        )

    @layers.cpu_implementation(row_tiles)
    def decode(self, maps: list[jax.Array]) -> jax.Array:
        """The branches -> logits (B, ⌈H/4⌉, ⌈W/4⌉, K)."""
        convolution, norm, relu, classifier = self.last_layer
        fused = layers.conv1x1_of_resized(convolution, maps, self.upsample_to(maps[0].shape[1:3]))
        return layers.classify(classifier, relu(norm(fused)))
