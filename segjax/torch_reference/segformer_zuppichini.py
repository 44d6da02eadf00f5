"""The SegFormer of F. Zuppichini's article "Implementing SegFormer in PyTorch" (2022), slow and obvious.

Written from the key names and measured figures of that code; none of it is copied. `parity/test_reference_variants.py`
ties it to figures of the original. Everything is a map (B, C, H, W). Where it leaves the paper:

- patch embeddings have no bias; every LayerNorm has eps 1e-5;
- the spatial reduction, with its LayerNorm, is there at every ratio, 1 too;
- the feed-forward network widens in its 3x3 convolution: 1x1 from C to C, 3x3 in C groups from C to 4C, 1x1 back to C;
- drop path is only in the feed-forward branch, and drops it for the whole batch at once;
- the decoder upsamples by fixed factors with align_corners True, before it projects; activation comes before BatchNorm.

Initialisation is torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segjax.torch_reference.segformer import to_image, to_tokens


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of every pixel: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-5)

    def forward(self, image: Tensor) -> Tensor:
        tokens, H, W = to_tokens(image)
        return to_image(super().forward(tokens), H, W)


class BatchDropPath(nn.Module):
    """In training, drops the branch of all samples together with probability `rate`; what survives is scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        survives = torch.rand((), device=x.device) < keep
        return x * survives.to(x.dtype) / keep


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class Attention(nn.Module):
    """Efficient self-attention: (B, C, H, W) -> (B, C, H, W). Keys and values come from the reduced map.

    The reduction has no padding, so H and W must be at least `sr_ratio`.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.reducer = nn.Sequential(nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio), LayerNorm2d(dim))
        self.att = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        reduced, _, _ = to_tokens(self.reducer(image))  # (B, M, C)
        tokens, H, W = to_tokens(image)  # (B, N, C)
        attended, _ = self.att(tokens, reduced, reduced, need_weights=False)
        return to_image(attended, H, W)


def block(dim: int, *, num_heads: int, mlp_ratio: int, sr_ratio: int, drop_path_rate: float) -> nn.Sequential:
    """One transformer block, norm first: (B, C, H, W) -> (B, C, H, W)."""
    hidden_dim = dim * mlp_ratio
    ffn = nn.Sequential(
        nn.Conv2d(dim, dim, 1),
        nn.Conv2d(dim, hidden_dim, 3, padding=1, groups=dim),
        nn.GELU(approximate="none"),
        nn.Conv2d(hidden_dim, dim, 1),
    )
    return nn.Sequential(
        Residual(nn.Sequential(LayerNorm2d(dim), Attention(dim, num_heads, sr_ratio))),
        Residual(nn.Sequential(LayerNorm2d(dim), ffn, BatchDropPath(drop_path_rate))),
    )


class Stage(nn.Module):
    """Patch embedding, blocks, norm: (B, C_in, H, W) -> (B, C, H / stride, W / stride), rounded up."""

    def __init__(self, in_dim: int, dim: int, *, patch_size: int, stride: int, blocks: list[nn.Module]):
        super().__init__()
        self.overlap_patch_merge = nn.Sequential(
            nn.Conv2d(in_dim, dim, patch_size, stride=stride, padding=patch_size // 2, bias=False), LayerNorm2d(dim)
        )
        self.blocks = nn.Sequential(*blocks)
        self.norm = LayerNorm2d(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.blocks(self.overlap_patch_merge(image)))


class Encoder(nn.Module):
    """(B, C, H, W) -> four maps (B, C_i, H / 2^(i+2), W / 2^(i+2)), rounded up, i from 0."""

    def __init__(
        self,
        *,
        in_channels: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        mlp_ratios: tuple[int, ...],
        sr_ratios: tuple[int, ...],
        drop_path_rate: float,
    ):
        super().__init__()
        # Linear from 0 at the first block of all to the full rate at the last.
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depths))])
        in_dims, patch_sizes, strides = (in_channels, *dims[:3]), (7, 3, 3, 3), (4, 2, 2, 2)
        self.stages = nn.ModuleList(
            Stage(
                in_dims[i],
                dims[i],
                patch_size=patch_sizes[i],
                stride=strides[i],
                blocks=[
                    block(
                        dims[i],
                        num_heads=num_heads[i],
                        mlp_ratio=mlp_ratios[i],
                        sr_ratio=sr_ratios[i],
                        drop_path_rate=next(rates),
                    )
                    for _ in range(depths[i])
                ],
            )
            for i in range(4)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            image = stage(image)
            features.append(image)
        return features


class Decoder(nn.Module):
    """Four maps -> four maps (B, D, H / 4, W / 4), from stage 4 down to stage 1: upsampled first, projected second.

    Upsampling is by 8, 4, 2 and 1, whatever the maps' sizes are: ValueError where they do not come out equal.
    """

    def __init__(self, dims: tuple[int, ...], decoder_dim: int):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=True), nn.Conv2d(dim, decoder_dim, 1)
            )
            for dim, factor in zip(reversed(dims), (8, 4, 2, 1), strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        projected = [stage(feature) for stage, feature in zip(self.stages, reversed(features), strict=True)]
        sizes = [tuple(p.shape[2:]) for p in projected]
        if any(size != sizes[0] for size in sizes):
            raise ValueError(
                f"upsampled maps of stages 4 to 1 differ in size, {sizes}: H and W must be multiples of 32"
            )
        return projected


class Head(nn.Module):
    """Four maps (B, D, H / 4, W / 4) -> logits (B, K, H / 4, W / 4)."""

    def __init__(self, decoder_dim: int, num_classes: int):
        super().__init__()
        self.fuse = nn.Sequential(
            nn.Conv2d(4 * decoder_dim, decoder_dim, 1, bias=False),
            nn.ReLU(),
            nn.BatchNorm2d(decoder_dim, eps=1e-5, momentum=0.1),
        )
        self.predict = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, projected: list[Tensor]) -> Tensor:
        return self.predict(self.fuse(torch.cat(projected, dim=1)))


class SegFormerZuppichini(nn.Module):
    """Images (B, C, H, W), normalised -> logits (B, K, H / 4, W / 4), taps. The defaults are the article's.

    Args:
        num_classes: K. in_channels: C of the images.
        dims, depths, num_heads, mlp_ratios, sr_ratios: one integer for each of the four stages.
        decoder_dim: width of the decoder.
        drop_path_rate: that of the last block; the first has 0 and the others lie on the line between.

    `taps` holds `feature0` .. `feature3`, (B, dims[i], H / 2^(i+2), W / 2^(i+2)), after the stage norms. H and W must
    be multiples of 32, or up to three pixels less: what counts is stage 1's map, a multiple of 8.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        mlp_ratios: tuple[int, ...] = (4, 4, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        decoder_dim: int = 256,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.encoder = Encoder(
            in_channels=in_channels,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            drop_path_rate=drop_path_rate,
        )
        self.decoder = Decoder(dims, decoder_dim)
        self.head = Head(decoder_dim, num_classes)

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.encoder(images_nchw)
        return self.head(self.decoder(features)), {f"feature{i}": feature for i, feature in enumerate(features)}
