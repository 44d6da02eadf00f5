"""The SegFormer of F. Zuppichini's article "Implementing SegFormer in PyTorch" (2022), slow and obvious.

It was written from the key names and measured figures of that code, and copies none of it.
`parity/test_reference_variants.py` compares it with figures of the original. All maps are (B, C, H, W). Differences
from the paper:

- patch embeddings have no bias; every LayerNorm has eps 1e-5;
- the spatial reduction with its LayerNorm exists at every ratio, including 1;
- the feed-forward network widens in its 3x3 convolution: 1x1 from C to C, 3x3 in C groups from C to 4C, 1x1 back to C;
- drop path is only in the feed-forward branch, and drops it for the whole batch at once;
- the decoder upsamples by fixed factors with align_corners True before it projects; activation precedes BatchNorm.

Initialisation is torch's default.
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
    """In training, drops the branch of all samples together with probability `rate`; surviving branches are scaled."""

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
    """Efficient self-attention, with keys and values from a reduced map: (B, C, H, W) -> (B, C, H, W).

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
        # Linear from 0 in the first of all blocks to the full rate in the last.
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
    """Four maps -> four maps (B, D, H / 4, W / 4), from stage 4 to stage 1, first upsampled and then projected.

    The factors are 8, 4, 2 and 1 for any sizes. Raises ValueError if the results have different sizes.
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
    """Normalised images (B, C, H, W) -> logits (B, K, H / 4, W / 4), taps. The defaults are the article's.

    Args:
        num_classes: Number of classes K.
        in_channels: Channels C of the images.
        dims, depths, num_heads, mlp_ratios, sr_ratios: One integer for each of the four stages.
        decoder_dim: Width of the decoder.
        drop_path_rate: Rate of the last block; rates grow linearly from 0 in the first.

    `taps` holds `feature0` .. `feature3`, (B, dims[i], H / 2^(i+2), W / 2^(i+2)), after the stage norms. H and W must
    be multiples of 32, or up to three pixels less, so that the sides of stage 1's map are multiples of 8.
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
