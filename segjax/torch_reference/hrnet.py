"""The official HRNetV2 and HRNet-OCR in PyTorch, slow and obvious, as reference for the JAX models.

They were written from the papers and from the published checkpoints' key names, without code of any repository:
- Wang et al. 2019, "Deep High-Resolution Representation Learning for Visual Recognition" (arXiv 1908.07919);
- Yuan et al. 2019, "Object-Contextual Representations for Semantic Segmentation" (arXiv 1909.11065).

`parity/test_reference_hrnet.py` compares them with figures of the original code. Branches are counted from 0, the
finest: branch i has width * 2^i channels at stride 4 * 2^i.

Where the papers are silent, these are the published models' choices: every 3x3 convolution pads by 1, so a stride of 2
rounds sizes up; convolutions of the backbone and of `ocr_distri_head` have no bias, all others of the heads do;
BatchNorm eps 1e-5, momentum 0.1; bilinear resizing to the size of the finer map, not by a factor; `align_corners` is
one setting for the fuse layers and the head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels of the finest branch; each coarser branch has twice as many. Modules and blocks are the defaults below.
VARIANTS = {"w18": {"width": 18}, "w32": {"width": 32}, "w48": {"width": 48}}

STEM_CHANNELS = 64
BOTTLENECK_EXPANSION = 4


def batch_norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=1e-5, momentum=0.1)


def conv3x3(in_dim: int, dim: int, stride: int = 1) -> nn.Conv2d:
    """(B, C_in, H, W) -> (B, C, H', W') with H' = ceil(H / stride)."""
    return nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_dim: int, dim: int) -> nn.Conv2d:
    return nn.Conv2d(in_dim, dim, 1, bias=False)


def resize(image: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """(B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(image, size=size, mode="bilinear", align_corners=align_corners)


# --- blocks ----------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, ReLU after the sum: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = conv3x3(dim, dim)
        self.bn1 = batch_norm(dim)
        self.conv2 = conv3x3(dim, dim)
        self.bn2 = batch_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(branch)))


class Bottleneck(nn.Module):
    """Residual block 1x1, 3x3, 1x1, ReLU after the sum: (B, C_in, H, W) -> (B, 4 * planes, H, W).

    `downsample` changes only the shortcut's width, and exists only if the width must change.
    """

    def __init__(self, in_dim: int, planes: int):
        super().__init__()
        dim = BOTTLENECK_EXPANSION * planes
        self.conv1 = conv1x1(in_dim, planes)
        self.bn1 = batch_norm(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = batch_norm(planes)
        self.conv3 = conv1x1(planes, dim)
        self.bn3 = batch_norm(dim)
        self.downsample = nn.Identity()
        if in_dim != dim:
            self.downsample = nn.Sequential(conv1x1(in_dim, dim), batch_norm(dim))

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        return F.relu(self.downsample(x) + self.bn3(self.conv3(branch)))


# --- the backbone ----------------------------------------------------------------------------------------------------


def transition(before: list[int], after: list[int]) -> nn.ModuleList:
    """Layers from the branches of one stage, of `before` channels, to those of the next, of `after` channels.

    A branch of the right width is unchanged, one of another width is convolved. The last branch is new, a stride-2
    convolution of the coarsest one. BatchNorm and ReLU follow each convolution.
    """
    layers = []
    for i, dim in enumerate(after):
        if i == len(before):
            down = nn.Sequential(conv3x3(before[-1], dim, stride=2), batch_norm(dim), nn.ReLU())
            layers.append(nn.Sequential(down))  # one level deeper than below, as in the published names
        elif before[i] != dim:
            layers.append(nn.Sequential(conv3x3(before[i], dim), batch_norm(dim), nn.ReLU()))
        else:
            layers.append(nn.Identity())
    return nn.ModuleList(layers)


def apply_transition(layers: nn.ModuleList, features: list[Tensor]) -> list[Tensor]:
    coarsest = len(features) - 1
    return [layer(features[min(i, coarsest)]) for i, layer in enumerate(layers)]


def fuse_layer(dims: list[int], target: int, source: int) -> nn.Module:
    """The layers from branch `source` to branch `target`, without the resizing of a coarser source.

    Coarser to finer: 1x1 convolution and BatchNorm. Finer to coarser: a stride-2 convolution and BatchNorm for each
    halving; all but the last have the source's width and a ReLU.
    """
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(conv1x1(dims[source], dims[target]), batch_norm(dims[target]))
    steps = [
        nn.Sequential(conv3x3(dims[source], dims[source], stride=2), batch_norm(dims[source]), nn.ReLU())
        for _ in range(target - source - 1)
    ]
    last = nn.Sequential(conv3x3(dims[source], dims[target], stride=2), batch_norm(dims[target]))
    return nn.Sequential(*steps, last)


class HighResolutionModule(nn.Module):
    """Multi-resolution parallel convolution, then fusion: features of all branches -> the same shapes.

    Every branch becomes the ReLU of the sum of all branches, each converted to its size and width.
    """

    def __init__(self, dims: list[int], num_blocks: int, align_corners: bool):
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(dim) for _ in range(num_blocks))) for dim in dims)
        branches = range(len(dims))
        self.fuse_layers = nn.ModuleList(nn.ModuleList(fuse_layer(dims, i, j) for j in branches) for i in branches)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        features = [branch(feature) for branch, feature in zip(self.branches, features, strict=True)]
        fused = []
        for i, layers in enumerate(cast("Iterable[nn.ModuleList]", self.fuse_layers)):
            size = (features[i].shape[2], features[i].shape[3])
            incoming = [layer(feature) for layer, feature in zip(layers, features, strict=True)]
            for j in range(i + 1, len(incoming)):
                incoming[j] = resize(incoming[j], size, self.align_corners)
            fused.append(F.relu(functools.reduce(torch.add, incoming)))
        return fused


class HighResolutionNet(nn.Module):
    """The backbone: images (B, C, H, W) -> four maps (B, width * 2^i, H / 2^(i+2), W / 2^(i+2)), rounded up.

    `conv1` .. `bn2`, `layer1`, `transition1` .. `transition3` and `stage2` .. `stage4` are the published names of its
    parts. They have no prefix, so the models below are this class with a head. `HRNet` describes the arguments.
    """

    def __init__(
        self,
        *,
        width: int,
        in_channels: int,
        stage1_channels: int,
        stage_modules: tuple[int, ...],
        stage_blocks: tuple[int, ...],
        align_corners: bool,
    ):
        super().__init__()
        if stage_modules[0] != 1:
            raise ValueError(f"stage 1 is one module of bottlenecks; stage_modules must start with 1: {stage_modules}")
        self.align_corners = align_corners
        dims = [width * 2**i for i in range(4)]
        stage1_dim = BOTTLENECK_EXPANSION * stage1_channels

        def stage(number: int) -> nn.Sequential:  # stage n has n branches
            return nn.Sequential(
                *(
                    HighResolutionModule(dims[:number], stage_blocks[number - 1], align_corners)
                    for _ in range(stage_modules[number - 1])
                )
            )

        self.conv1 = conv3x3(in_channels, STEM_CHANNELS, stride=2)
        self.bn1 = batch_norm(STEM_CHANNELS)
        self.conv2 = conv3x3(STEM_CHANNELS, STEM_CHANNELS, stride=2)
        self.bn2 = batch_norm(STEM_CHANNELS)
        self.layer1 = nn.Sequential(
            *(Bottleneck(STEM_CHANNELS if i == 0 else stage1_dim, stage1_channels) for i in range(stage_blocks[0]))
        )
        self.transition1 = transition([stage1_dim], dims[:2])
        self.stage2 = stage(2)
        self.transition2 = transition(dims[:2], dims[:3])
        self.stage3 = stage(3)
        self.transition3 = transition(dims[:3], dims)
        self.stage4 = stage(4)

    def forward(self, images_nchw: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(images_nchw)))
        x = F.relu(self.bn2(self.conv2(x)))
        features = [self.layer1(x)]
        features = self.stage2(apply_transition(self.transition1, features))
        features = self.stage3(apply_transition(self.transition2, features))
        return self.stage4(apply_transition(self.transition3, features))

    def concatenated(self, features: list[Tensor]) -> Tensor:
        """HRNetV2's representation, finest branch first: four maps -> (B, 15 * width, H / 4, W / 4)."""
        size = (features[0].shape[2], features[0].shape[3])
        coarser = [resize(feature, size, self.align_corners) for feature in features[1:]]
        return torch.cat([features[0], *coarser], dim=1)


def pixel_classifier(dim: int, num_classes: int) -> nn.Sequential:
    """1x1 convolution, BatchNorm, ReLU, 1x1 convolution, both with bias: (B, C, H, W) -> (B, K, H, W)."""
    return nn.Sequential(nn.Conv2d(dim, dim, 1), batch_norm(dim), nn.ReLU(), nn.Conv2d(dim, num_classes, 1))


def initialise(model: nn.Module, *, leave: tuple[str, ...] = ()) -> None:
    """The published initialisation: convolution weights are normal with standard deviation 0.001.

    Convolutions whose name contains one of `leave` keep torch's default weights. Biases, and norms with their ones and
    zeros, keep torch's default.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not any(part in name for part in leave):
            nn.init.normal_(module.weight, mean=0.0, std=0.001)


class HRNet(HighResolutionNet):
    """HRNetV2: normalised images (B, C, H, W) -> logits (B, K, ceil(H / 4), ceil(W / 4)), taps.

    Args:
        num_classes: Number of classes K.
        in_channels: Channels C of the images.
        width: Channels of the finest branch.
        stage1_channels: Inner width of stage 1's bottlenecks, whose output is 4 times as wide.
        stage_modules: Modules of each of the four stages; the first is 1.
        stage_blocks: Residual blocks per stage, in each branch of a module.
        align_corners: Alignment of every resizing. Published: False for Cityscapes, LIP and Pascal-Context with 59
            classes.

    `taps` holds `feature0` .. `feature3`, the four branches after stage 4.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        in_channels: int = 3,
        stage1_channels: int = 64,
        stage_modules: tuple[int, ...] = (1, 1, 4, 3),
        stage_blocks: tuple[int, ...] = (4, 4, 4, 4),
        align_corners: bool = False,
    ):
        super().__init__(
            width=width,
            in_channels=in_channels,
            stage1_channels=stage1_channels,
            stage_modules=stage_modules,
            stage_blocks=stage_blocks,
            align_corners=align_corners,
        )
        self.last_layer = pixel_classifier(15 * width, num_classes)
        initialise(self)

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = super().forward(images_nchw)
        logits = self.last_layer(self.concatenated(features))
        return logits, {f"feature{i}": feature for i, feature in enumerate(features)}


# --- object-contextual representations -------------------------------------------------------------------------------


def gather_regions(features: Tensor, aux_logits: Tensor) -> Tensor:
    """Object region representations, section 3.2: (B, C, H, W), (B, K, H, W) -> (B, C, K, 1).

    Region k is the mean of all pixels' features, weighted by the softmax of class k's logits over the pixels.
    """
    weights = aux_logits.flatten(2).softmax(dim=2)  # (B, K, H * W)
    regions = weights @ features.flatten(2).transpose(1, 2)  # (B, K, H * W) @ (B, H * W, C) = (B, K, C)
    return regions.transpose(1, 2).unsqueeze(3)


def norm_relu(dim: int) -> nn.Sequential:
    return nn.Sequential(batch_norm(dim), nn.ReLU())


class ObjectAttention(nn.Module):
    """Attention of pixels to regions, section 3.2: (B, C, H, W), regions (B, C, K, 1) -> context (B, C, H, W).

    The paper's transforms phi, psi, delta and rho are `f_pixel`, `f_object`, `f_down` and `f_up`. Each of their
    convolutions has no bias and is followed by BatchNorm and ReLU. There is one head of `key_dim` channels.
    """

    def __init__(self, dim: int, key_dim: int):
        super().__init__()
        self.key_dim = key_dim
        self.f_pixel = nn.Sequential(
            conv1x1(dim, key_dim), norm_relu(key_dim), conv1x1(key_dim, key_dim), norm_relu(key_dim)
        )
        self.f_object = nn.Sequential(
            conv1x1(dim, key_dim), norm_relu(key_dim), conv1x1(key_dim, key_dim), norm_relu(key_dim)
        )
        self.f_down = nn.Sequential(conv1x1(dim, key_dim), norm_relu(key_dim))
        self.f_up = nn.Sequential(conv1x1(key_dim, dim), norm_relu(dim))

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        B, _, H, W = features.shape
        query = self.f_pixel(features).flatten(2).transpose(1, 2)  # (B, H * W, D)
        key = self.f_object(regions).flatten(2)  # (B, D, K)
        value = self.f_down(regions).flatten(2).transpose(1, 2)  # (B, K, D)
        relation = (query @ key * self.key_dim**-0.5).softmax(dim=2)  # (B, H * W, K): over regions
        context = relation @ value  # (B, H * W, D)
        return self.f_up(context.transpose(1, 2).reshape(B, self.key_dim, H, W))


class ObjectContext(nn.Module):
    """Augmented representations, section 3.2: (B, C, H, W), regions (B, C, K, 1) -> (B, C, H, W)."""

    def __init__(self, dim: int, key_dim: int, dropout_rate: float):
        super().__init__()
        self.object_context_block = ObjectAttention(dim, key_dim)
        self.conv_bn_dropout = nn.Sequential(conv1x1(2 * dim, dim), norm_relu(dim), nn.Dropout2d(dropout_rate))

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        context = self.object_context_block(features, regions)
        return self.conv_bn_dropout(torch.cat([context, features], dim=1))


class HRNetOCR(HighResolutionNet):
    """HRNetV2 with OCR: normalised images (B, C, H, W) -> logits (B, K, ceil(H / 4), ceil(W / 4)), taps.

    Args: Those of `HRNet` (`align_corners` is True in every published OCR model), and
        ocr_channels: Channels C of the pixel and region representations.
        ocr_key_channels: Channels D of queries, keys and values.
        dropout_rate: Probability to drop a whole channel before the classifier.

    `taps` holds `feature0` .. `feature3`, the four branches after stage 4, and `aux_logits`, of the logits' shape. They
    gather the regions, and gradients flow through them.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        width: int,
        in_channels: int = 3,
        stage1_channels: int = 64,
        stage_modules: tuple[int, ...] = (1, 1, 4, 3),
        stage_blocks: tuple[int, ...] = (4, 4, 4, 4),
        align_corners: bool = True,
        ocr_channels: int = 512,
        ocr_key_channels: int = 256,
        dropout_rate: float = 0.05,
    ):
        super().__init__(
            width=width,
            in_channels=in_channels,
            stage1_channels=stage1_channels,
            stage_modules=stage_modules,
            stage_blocks=stage_blocks,
            align_corners=align_corners,
        )
        self.conv3x3_ocr = nn.Sequential(
            nn.Conv2d(15 * width, ocr_channels, 3, padding=1), batch_norm(ocr_channels), nn.ReLU()
        )
        self.ocr_distri_head = ObjectContext(ocr_channels, ocr_key_channels, dropout_rate)
        self.cls_head = nn.Conv2d(ocr_channels, num_classes, 1)
        self.aux_head = pixel_classifier(15 * width, num_classes)
        initialise(self, leave=("cls", "aux", "ocr"))

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = super().forward(images_nchw)
        concatenated = self.concatenated(features)
        aux_logits = self.aux_head(concatenated)
        pixels = self.conv3x3_ocr(concatenated)
        regions = gather_regions(pixels, aux_logits)
        logits = self.cls_head(self.ocr_distri_head(pixels, regions))
        taps = {f"feature{i}": feature for i, feature in enumerate(features)}
        return logits, taps | {"aux_logits": aux_logits}
