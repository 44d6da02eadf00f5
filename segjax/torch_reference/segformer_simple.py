"""The "simple" SegFormer in PyTorch, slow and obvious, as reference for the JAX model.

It is the SegFormer of the package segformer-pytorch 0.0.6 (PyPI, MIT licence), a free reading of Xie et al. 2021
(arXiv 2105.15203). It was written from the paper, the package's behaviour and its key names, and shares no code with
it. `parity/test_reference_simple.py` compares it with the package and with figures of the original. All maps are
(B, C, H, W).

Differences from the official SegFormer: patches are unfolded and pass a 1x1 convolution; no norm follows a patch
embedding, a stage or the spatial reduction; the norm adds eps to the standard deviation; attention has no biases, and
one strided convolution computes keys and values; a 1x1 convolution follows the feed-forward network's 3x3 depthwise
one; the decoder upsamples by repeating pixels, concatenates from stage 1 to stage 4, and ends in two 1x1 convolutions
with nothing between. There is no dropout, so training and evaluation are equal.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patches(nn.Module):
    """Overlapping patches as channels: (B, C, H, W) -> (B, C * k * k, H / stride, W / stride), rounded up.

    The values of a patch are ordered by channel, and within a channel by row. Padding by k // 2 keeps every pixel.
    """

    def __init__(self, patch_size: int, stride: int):
        super().__init__()
        self.patch_size = patch_size
        self.stride = stride

    def forward(self, image: Tensor) -> Tensor:
        _, _, H, W = image.shape
        patches = F.unfold(image, self.patch_size, stride=self.stride, padding=self.patch_size // 2)  # (B, C*k*k, N)
        # Rounded up in integers, as in torch's own code, so that `torch.export` can keep the sizes symbolic.
        return patches.unflatten(2, ((H + self.stride - 1) // self.stride, (W + self.stride - 1) // self.stride))


class ChannelNorm(nn.Module):
    """(x - mean) / (deviation + 1e-5) * g + b over the channels of each pixel: (B, C, H, W) -> (B, C, H, W).

    The deviation is the square root of the biased variance; eps is outside the root, unlike in torch's LayerNorm. The
    gradient is NaN in a pixel whose channels are all equal.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.eps = 1e-5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
        return centred / (deviation + self.eps) * self.g + self.b


class EfficientSelfAttention(nn.Module):
    """Attention whose keys and values come from a map reduced by `sr_ratio`: (B, C, H, W) -> (B, C, H, W).

    One convolution of kernel and stride `sr_ratio` computes both, keys first. H and W must be at least `sr_ratio`.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.to_q = nn.Conv2d(dim, dim, 1, bias=False)
        self.to_kv = nn.Conv2d(dim, 2 * dim, sr_ratio, stride=sr_ratio, bias=False)
        self.to_out = nn.Conv2d(dim, dim, 1, bias=False)

    def split_heads(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h, N, d) with C = h * d and N = H * W: a head is d neighbouring channels."""
        B, C, H, W = image.shape
        return image.reshape(B, self.num_heads, C // self.num_heads, H * W).transpose(2, 3)

    def forward(self, image: Tensor) -> Tensor:
        B, C, H, W = image.shape
        keys, values = self.to_kv(image).split(C, dim=1)  # (B, C, H / r, W / r) each
        q, k, v = self.split_heads(self.to_q(image)), self.split_heads(keys), self.split_heads(values)
        scores = q @ k.transpose(2, 3) / math.sqrt(C // self.num_heads)  # (B, h, N, M)
        context = scores.softmax(dim=-1) @ v  # (B, h, N, d)
        return self.to_out(context.transpose(2, 3).reshape(B, C, H, W))


class DepthwiseSeparable(nn.Module):
    """3x3 depthwise, then 1x1 convolution, under the published name `net`: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.Conv2d(dim, dim, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


class MixFFN(nn.Module):
    """1x1 to the hidden width, depthwise separable 3x3, exact GELU, 1x1 back: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(dim, hidden_dim, 1),
            DepthwiseSeparable(hidden_dim),
            nn.GELU(approximate="none"),
            nn.Conv2d(hidden_dim, dim, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


class NormThen(nn.Module):
    """x + fn(norm(x)): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.fn = fn

    def forward(self, image: Tensor) -> Tensor:
        return image + self.fn(self.norm(image))


class MixTransformer(nn.Module):
    """The encoder: (B, C, H, W) -> four maps (B, C_i, H / 2^(i+2), W / 2^(i+2)), i from 0.

    The keys of a stage are `0` patches, `1` their embedding, `2` blocks; those of a block are `0` attention, `1`
    feed-forward network.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        mlp_ratios: tuple[int, ...],
        sr_ratios: tuple[int, ...],
    ):
        super().__init__()

        def stage(i: int, in_dim: int, patch_size: int, stride: int) -> nn.Sequential:
            dim = dims[i]
            embedding = nn.Conv2d(in_dim * patch_size * patch_size, dim, 1)
            blocks = (
                nn.Sequential(
                    NormThen(dim, EfficientSelfAttention(dim, num_heads[i], sr_ratios[i])),
                    NormThen(dim, MixFFN(dim, dim * mlp_ratios[i])),
                )
                for _ in range(depths[i])
            )
            return nn.Sequential(Patches(patch_size, stride), embedding, nn.Sequential(*blocks))

        self.stages = nn.ModuleList(
            [
                stage(0, in_channels, patch_size=7, stride=4),
                stage(1, dims[0], patch_size=3, stride=2),
                stage(2, dims[1], patch_size=3, stride=2),
                stage(3, dims[2], patch_size=3, stride=2),
            ]
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            image = stage(image)
            features.append(image)
        return features


class SegFormerSimple(nn.Module):
    """The simple SegFormer: normalised images (B, C, H, W) -> logits (B, K, H / 4, W / 4), taps.

    Args:
        num_classes: Number of classes K.
        in_channels: Channels C of the images.
        dims, depths, num_heads, mlp_ratios, sr_ratios: One integer for each of the four stages.
        decoder_dim: Width of the decoder.

    `taps` holds `feature0` .. `feature3`, (B, dims[i], H / 2^(i+2), W / 2^(i+2)). H and W must be multiples of 32,
    because the decoder upsamples by whole factors. Initialisation is torch's default, drawn in the package's order.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        dims: tuple[int, ...] = (32, 64, 160, 256),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[int, ...] = (8, 8, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        decoder_dim: int = 256,
    ):
        super().__init__()
        self.mit = MixTransformer(
            in_channels=in_channels,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
        )
        # Each stage is projected to the decoder's width, and its pixels are repeated up to the size of stage 1.
        self.to_fused = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, decoder_dim, 1), nn.Upsample(scale_factor=factor, mode="nearest"))
            for dim, factor in zip(dims, (1, 2, 4, 8), strict=True)
        )
        self.to_segmentation = nn.Sequential(
            nn.Conv2d(4 * decoder_dim, decoder_dim, 1), nn.Conv2d(decoder_dim, num_classes, 1)
        )

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        _, _, H, W = images_nchw.shape
        if H % 32 or W % 32:
            raise ValueError(f"height and width must be multiples of 32, got {H} x {W}")
        features = self.mit(images_nchw)
        resized = [to_fused(feature) for to_fused, feature in zip(self.to_fused, features, strict=True)]
        logits = self.to_segmentation(torch.cat(resized, dim=1))
        return logits, {f"feature{i}": feature for i, feature in enumerate(features)}
