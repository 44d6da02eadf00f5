"""The official SegNeXt in PyTorch, slow and obvious, as reference for the JAX model.

It was written from the papers, Guo et al. 2022, "SegNeXt: Rethinking Convolutional Attention Design for Semantic
Segmentation" (arXiv 2209.08575) and Geng et al. 2021, "Is Attention Better Than Matrix Decomposition?" (arXiv
2109.04553), and from the published checkpoints' key names, without code of any repository.
`parity/test_reference_segnext.py` compares it with figures of the original code. All maps are (B, C, H, W).

Where the papers are silent, these are the published model's choices: biases everywhere except in the head's `squeeze`,
`ham_out` and `align`; BatchNorm (eps 1e-5) before each branch of a block, LayerNorm (eps 1e-5) after each stage; exact
(erf) GELU, also between the first 1x1 convolution of the attention and its gate; the *normalised* input as the
attention's own shortcut; bilinear resizing with align_corners False; concatenation from stage 2 to stage 4; GroupNorm
of 32 groups (eps 1e-5); Dropout2d before the classifier; gradients through every step of the factorisation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Table 2 of the paper (C_i, L_i). The head's width and rank, and the drop path of L, are those of the published models.
VARIANTS = {
    "t": {"dims": (32, 64, 160, 256), "depths": (3, 3, 5, 2), "ham_channels": 256, "ham_rank": 16},
    "s": {"dims": (64, 128, 320, 512), "depths": (2, 2, 4, 2), "ham_channels": 256, "ham_rank": 16},
    "b": {"dims": (64, 128, 320, 512), "depths": (3, 3, 12, 3), "ham_channels": 512, "ham_rank": 64},
    "l": {
        "dims": (64, 128, 320, 512),
        "depths": (3, 5, 27, 3),
        "ham_channels": 1024,
        "ham_rank": 64,
        "drop_path_rate": 0.3,
    },
}

GROUPS = 32  # of the head's GroupNorms; a group has neighbouring channels
TRAINING_STEPS = 6
EVALUATION_STEPS = 7
FACTORISATION_EPS = 1e-6  # added to every denominator of the factorisation


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops the whole branch of a sample with probability `rate`.

    (B, C, H, W) -> (B, C, H, W). Surviving branches are divided by their probability, so evaluation is the identity.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        survives = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep
        return x * survives.to(x.dtype) / keep


def batch_norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=1e-5, momentum=0.1)


# --- encoder ---------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Two strided 3x3 convolutions: (B, C, H, W) -> (B, C, H / 4, W / 4), each half rounded up."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1),
            batch_norm(dim // 2),
            nn.GELU(approximate="none"),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            batch_norm(dim),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class PatchEmbed(nn.Module):
    """One strided 3x3 convolution: (B, C_in, H, W) -> (B, C, H / 2, W / 2), rounded up."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = batch_norm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image))


def depthwise(dim: int, height: int, width: int) -> nn.Conv2d:
    """Depthwise convolution with zero padding that keeps the size: (B, C, H, W) -> (B, C, H, W)."""
    return nn.Conv2d(dim, dim, (height, width), padding=(height // 2, width // 2), groups=dim)


class MultiScaleGate(nn.Module):
    """Multi-scale convolutional attention, equations 1 and 2: (B, C, H, W) -> (B, C, H, W).

    A 5x5 depthwise convolution gathers the neighbourhood. Three pairs of strip convolutions (1 x k, then k x 1, with k
    = 7, 11 and 21) on its output reach further. A 1x1 convolution mixes the sum of the four, and the result multiplies
    the input.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv0 = depthwise(dim, 5, 5)
        self.conv0_1 = depthwise(dim, 1, 7)
        self.conv0_2 = depthwise(dim, 7, 1)
        self.conv1_1 = depthwise(dim, 1, 11)
        self.conv1_2 = depthwise(dim, 11, 1)
        self.conv2_1 = depthwise(dim, 1, 21)
        self.conv2_2 = depthwise(dim, 21, 1)
        self.conv3 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.conv0(x)
        strip7 = self.conv0_2(self.conv0_1(near))
        strip11 = self.conv1_2(self.conv1_1(near))
        strip21 = self.conv2_2(self.conv2_1(near))
        return self.conv3(near + strip7 + strip11 + strip21) * x


class Attention(nn.Module):
    """1x1 convolution, GELU, gate, 1x1 convolution, plus the input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.spatial_gating_unit = MultiScaleGate(dim)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.spatial_gating_unit(F.gelu(self.proj_1(x), approximate="none"))
        return x + self.proj_2(gated)


class DepthwiseConv(nn.Module):
    """The feed-forward network's 3x3 depthwise convolution, with the published name `dwconv`."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = depthwise(dim, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x)


class FeedForward(nn.Module):
    """1x1 to the hidden width, 3x3 depthwise, GELU, 1x1 back: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x)), approximate="none"))


class Block(nn.Module):
    """Pre-norm MSCAN block: (B, C, H, W) -> (B, C, H, W). Branches are scaled per channel and dropped independently."""

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path_rate: float):
        super().__init__()
        self.norm1 = batch_norm(dim)
        self.attn = Attention(dim)
        self.norm2 = batch_norm(dim)
        self.mlp = FeedForward(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        scale_1, scale_2 = self.layer_scale_1.reshape(1, -1, 1, 1), self.layer_scale_2.reshape(1, -1, 1, 1)
        x = x + self.drop_path(scale_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(scale_2 * self.mlp(self.norm2(x)))


def normalise_pixels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm over the channels of each pixel: (B, C, H, W) -> (B, C, H, W)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MSCAN(nn.Module):
    """The encoder: (B, C, H, W) -> four maps (B, C_i, H / 2^(i+2), W / 2^(i+2)), i from 0, rounded up.

    `patch_embed1` .. `patch_embed4`, `block1` .. `block4` and `norm1` .. `norm4` are the published names of its parts.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratios: tuple[float, ...],
        drop_path_rate: float,
    ):
        super().__init__()
        # Linear from 0 in the first block to the full rate in the last, as Python floats: a tensor would have no values
        # under torch.device("meta").
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depths))])

        def stage(i: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(dims[i], mlp_ratio=mlp_ratios[i], drop_path_rate=next(rates)) for _ in range(depths[i])
            )

        self.patch_embed1 = Stem(in_channels, dims[0])
        self.block1 = stage(0)
        self.norm1 = nn.LayerNorm(dims[0], eps=1e-5)
        self.patch_embed2 = PatchEmbed(dims[0], dims[1])
        self.block2 = stage(1)
        self.norm2 = nn.LayerNorm(dims[1], eps=1e-5)
        self.patch_embed3 = PatchEmbed(dims[1], dims[2])
        self.block3 = stage(2)
        self.norm3 = nn.LayerNorm(dims[2], eps=1e-5)
        self.patch_embed4 = PatchEmbed(dims[2], dims[3])
        self.block4 = stage(3)
        self.norm4 = nn.LayerNorm(dims[3], eps=1e-5)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for patch_embed, blocks, norm in (
            (self.patch_embed1, self.block1, self.norm1),
            (self.patch_embed2, self.block2, self.norm2),
            (self.patch_embed3, self.block3, self.norm3),
            (self.patch_embed4, self.block4, self.norm4),
        ):
            image = patch_embed(image)
            for block in blocks:
                image = block(image)
            image = normalise_pixels(norm, image)
            features.append(image)
        return features


# --- head ------------------------------------------------------------------------------------------------------------


def factorise(x: Tensor, bases: Tensor, steps: int) -> Tensor:
    """Non-negative matrix factorisation (Lee and Seung 2000): (B, C, N) -> its rank-R approximation (B, C, N).

    It searches for non-negative bases D (B, C, R) and coefficients A (B, N, R) with x close to D A^T, for non-negative
    x. It starts from the given bases, and from each pixel's softmax over its similarity to the bases (temperature 1) as
    coefficients. Each step multiplies first the coefficients, then the bases, by factors that bring the product closer
    to x. A last update adapts the coefficients to the last bases.
    """
    coefficients = (x.transpose(1, 2) @ bases).softmax(dim=-1)  # (B, N, R)
    for _ in range(steps):
        coefficients = update_coefficients(x, bases, coefficients)
        bases = update_bases(x, bases, coefficients)
    coefficients = update_coefficients(x, bases, coefficients)
    return bases @ coefficients.transpose(1, 2)  # (B, C, N)


def update_coefficients(x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
    """x (B, C, N), bases (B, C, R), coefficients (B, N, R) -> coefficients (B, N, R)."""
    wanted = x.transpose(1, 2) @ bases  # (B, N, R)
    present = coefficients @ (bases.transpose(1, 2) @ bases)  # (B, N, R) @ (B, R, R)
    return coefficients * wanted / (present + FACTORISATION_EPS)


def update_bases(x: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
    """x (B, C, N), bases (B, C, R), coefficients (B, N, R) -> bases (B, C, R)."""
    wanted = x @ coefficients  # (B, C, R)
    present = bases @ (coefficients.transpose(1, 2) @ coefficients)  # (B, C, R) @ (B, R, R)
    return bases * wanted / (present + FACTORISATION_EPS)


def draw_bases(batch: int, dim: int, rank: int, like: Tensor) -> Tensor:
    """Uniform in 0 .. 1, scaled to length 1 over the channels: (B, C, R) of the dtype and on the device of `like`."""
    bases = torch.rand(batch, dim, rank, dtype=like.dtype, device=like.device)
    return bases / bases.square().sum(dim=1, keepdim=True).sqrt()


class ConvBias(nn.Module):
    """1x1 convolution with bias, with the published name `conv`."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)


class ConvNorm(nn.Module):
    """1x1 convolution without bias, then GroupNorm, without activation: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.gn = nn.GroupNorm(GROUPS, dim, eps=1e-5)

    def forward(self, image: Tensor) -> Tensor:
        return self.gn(self.conv(image))


class Hamburger(nn.Module):
    """Two "breads" around a factorisation, plus the input: (B, C, H, W), bases (B, C, R) -> (B, C, H, W)."""

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.rank = rank
        self.ham_in = ConvBias(dim, dim)
        self.ham_out = ConvNorm(dim, dim)

    def forward(self, image: Tensor, bases: Tensor | None) -> Tensor:
        B, C, H, W = image.shape
        if bases is None:
            bases = draw_bases(B, C, self.rank, like=image)
        if bases.shape != (B, C, self.rank):
            raise ValueError(f"bases must be (B, C, R) = {(B, C, self.rank)}, got {tuple(bases.shape)}")
        steps = TRAINING_STEPS if self.training else EVALUATION_STEPS
        x = F.relu(self.ham_in(image))
        x = factorise(x.flatten(2), bases, steps).reshape(B, C, H, W)
        return F.relu(image + self.ham_out(x))


class LightHamburgerHead(nn.Module):
    """The decoder, which does not use stage 1: stages 2 to 4, bases (B, C, R) -> logits (B, K, H / 8, W / 8)."""

    def __init__(
        self, *, dims: tuple[int, ...], ham_channels: int, ham_rank: int, num_classes: int, dropout_rate: float
    ):
        super().__init__()
        self.squeeze = ConvNorm(sum(dims[1:]), ham_channels)
        self.hamburger = Hamburger(ham_channels, ham_rank)
        self.align = ConvNorm(ham_channels, ham_channels)
        self.dropout = nn.Dropout2d(dropout_rate)
        self.conv_seg = nn.Conv2d(ham_channels, num_classes, 1)

    def forward(self, features: list[Tensor], bases: Tensor | None) -> Tensor:
        _, c2, c3, c4 = features
        size = c2.shape[2:]
        # Stage 2's map is resized too, which is the identity, for one rule for all three.
        resized = [F.interpolate(c, size=size, mode="bilinear", align_corners=False) for c in (c2, c3, c4)]
        x = F.relu(self.squeeze(torch.cat(resized, dim=1)))
        x = self.hamburger(x, bases)
        x = F.relu(self.align(x))
        return self.conv_seg(self.dropout(x))


class SegNeXt(nn.Module):
    """The official SegNeXt: normalised images (B, C, H, W) -> logits (B, K, ceil(H / 8), ceil(W / 8)), taps.

    Args:
        num_classes: Number of classes K.
        in_channels: Channels C of the images.
        dims, depths, mlp_ratios: One integer for each of the four stages.
        ham_channels: Width of the head, a multiple of 32.
        ham_rank: Number of bases R. No weight has this size, so weights load with a wrong R and give other outputs.
        drop_path_rate: Rate of the last block; rates grow linearly from 0 in the first.
        dropout_rate: Probability to drop a whole channel before the classifier.

    The factorisation starts from `bases`, (B, ham_channels, ham_rank), non-negative and of length 1 over the channels.
    Without them every forward pass draws its own, as published, in evaluation too: outputs differ from run to run.
    `taps` holds `feature0` .. `feature3`, (B, dims[i], H / 2^(i+2), W / 2^(i+2)) rounded up, after the stage norms.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        mlp_ratios: tuple[int, ...] = (8, 8, 4, 4),
        ham_channels: int,
        ham_rank: int,
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
    ):
        super().__init__()
        self.backbone = MSCAN(
            in_channels=in_channels,
            dims=dims,
            depths=depths,
            mlp_ratios=mlp_ratios,
            drop_path_rate=drop_path_rate,
        )
        self.decode_head = LightHamburgerHead(
            dims=dims,
            ham_channels=ham_channels,
            ham_rank=ham_rank,
            num_classes=num_classes,
            dropout_rate=dropout_rate,
        )
        self.apply(initialise)
        nn.init.normal_(self.decode_head.conv_seg.weight, mean=0.0, std=0.01)

    def forward(self, images_nchw: Tensor, bases: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(images_nchw)
        return self.decode_head(features, bases), {f"feature{i}": feature for i, feature in enumerate(features)}


def initialise(module: nn.Module) -> None:
    """The published initialisation of one layer except the classifier; norms keep torch's default of ones and zeros.

    Convolution: normal with variance 2 / fan-out, where fan-out is kernel area times output channels over groups; bias
    zero. The classifier is normal with standard deviation 0.01.
    """
    if isinstance(module, nn.Conv2d):
        kernel_height, kernel_width = module.kernel_size
        fan_out = kernel_height * kernel_width * module.out_channels // module.groups
        nn.init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
