"""A second SegFormer of mmsegmentation 1.x, built as its checkpoints are, to check their key names.

The keys of `MMSegStyleSegFormer().state_dict()` are those of a checkpoint. It shares nothing with the other references:
attention is torch's own `nn.MultiheadAttention` with one packed `in_proj`, the feed-forward network works on maps by
1x1 convolutions, and the encoder nests `layers.{stage}.{0: patch embedding, 1: blocks, 2: norm}`. Stages and blocks
count from 0. Weights are initialised by torch's defaults.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of every LayerNorm


class PatchEmbed(nn.Module):
    """(B, C_in, H, W) -> (B, N, C), (H', W')."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.projection = nn.Conv2d(in_dim, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        image = self.projection(image)
        return self.norm(image.flatten(2).mT), image.shape[2:]


class Attention(nn.Module):
    """(B, N, C), (H, W) -> (B, N, C). Queries are all tokens; keys and values come from the reduced map."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.sr = None
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        seen = tokens  # (B, M, C)
        if self.sr is not None:
            seen = self.norm(self.sr(tokens.mT.unflatten(2, size)).flatten(2).mT)
        return self.attn(tokens, seen, seen, need_weights=False)[0]


class FFN(nn.Module):
    """(B, N, C), (H, W) -> (B, N, C). Positions 3 and 5 of `layers` are dropouts of rate 0, without weights."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(dim, hidden_dim, 1),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim),
            nn.GELU(approximate="none"),
            nn.Identity(),
            nn.Conv2d(hidden_dim, dim, 1),
            nn.Identity(),
        )

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return self.layers(tokens.mT.unflatten(2, size)).flatten(2).mT


class Layer(nn.Module):
    """One transformer block: (B, N, C), (H, W) -> (B, N, C)."""

    def __init__(self, dim: int, *, num_heads: int, mlp_ratio: int, sr_ratio: int, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.ffn = FFN(dim, dim * mlp_ratio)
        self.drop_path_rate = drop_path_rate

    def drop_path(self, branch: Tensor) -> Tensor:
        """Drops whole samples of (B, N, C): `dropout` of one factor per sample, shared by its values."""
        ones = torch.ones(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device)
        return branch * F.dropout(ones, self.drop_path_rate, training=self.training)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.ffn(self.norm2(tokens), size))


class MiT(nn.Module):
    """(B, 3, H, W) -> four maps (B, C_i, H / 2^(i+2), W / 2^(i+2)), rounded up, i from 0."""

    def __init__(self, *, dims, depths, num_heads, mlp_ratios, sr_ratios, drop_path_rate: float):
        super().__init__()
        self.layers = nn.ModuleList()
        done, last = 0, max(sum(depths) - 1, 1)
        for i, dim in enumerate(dims):
            first = i == 0
            embed = PatchEmbed(3 if first else dims[i - 1], dim, kernel=7 if first else 3, stride=4 if first else 2)
            blocks = nn.ModuleList(
                Layer(
                    dim,
                    num_heads=num_heads[i],
                    mlp_ratio=mlp_ratios[i],
                    sr_ratio=sr_ratios[i],
                    drop_path_rate=drop_path_rate * (done + j) / last,
                )
                for j in range(depths[i])
            )
            done += depths[i]
            self.layers.append(nn.ModuleList([embed, blocks, nn.LayerNorm(dim, eps=EPS)]))

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for embed, blocks, norm in self.layers:
            tokens, size = embed(image)
            for block in blocks:
                tokens = block(tokens, size)
            image = norm(tokens).mT.unflatten(2, size)
            features.append(image)
        return features


class ConvModule(nn.Module):
    """1x1 convolution without bias, BatchNorm, ReLU: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim, eps=1e-5, momentum=0.1)

    def forward(self, image: Tensor) -> Tensor:
        return self.bn(self.conv(image)).relu()


class SegformerHead(nn.Module):
    """Four maps -> logits (B, K, H / 4, W / 4)."""

    def __init__(self, *, dims, decoder_dim: int, num_classes: int, dropout_rate: float):
        super().__init__()
        self.conv_seg = nn.Conv2d(decoder_dim, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout_rate)
        self.convs = nn.ModuleList(ConvModule(dim, decoder_dim) for dim in dims)
        self.fusion_conv = ConvModule(len(dims) * decoder_dim, decoder_dim)

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[2:]
        levels = []
        for conv, feature in zip(self.convs, features, strict=True):
            levels.append(F.interpolate(conv(feature), size=size, mode="bilinear", align_corners=False))
        return self.conv_seg(self.dropout(self.fusion_conv(torch.cat(levels, dim=1))))


class MMSegStyleSegFormer(nn.Module):
    """Images (B, 3, H, W), normalised -> logits (B, K, ceil(H / 4), ceil(W / 4)), taps `feature0` .. `feature3`.

    The arguments are those of `segjax.torch_reference.segformer_mmseg.SegFormerMMSeg` without the eps, which is 1e-6.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[int, ...] = (4, 4, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        decoder_dim: int = 256,
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
    ):
        super().__init__()
        self.backbone = MiT(
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            drop_path_rate=drop_path_rate,
        )
        self.decode_head = SegformerHead(
            dims=dims, decoder_dim=decoder_dim, num_classes=num_classes, dropout_rate=dropout_rate
        )

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(images_nchw)
        return self.decode_head(features), {f"feature{i}": feature for i, feature in enumerate(features)}
