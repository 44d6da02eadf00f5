"""The official SegFormer in PyTorch, slow and obvious, as a reference for the JAX model.

It was written from the paper, Xie et al. 2021, "SegFormer: Simple and Efficient Design for Semantic Segmentation with
Transformers" (arXiv 2105.15203), and from the published checkpoints' key names, without code of any repository.
`parity/test_reference.py` compares it with recorded outputs of the original code and with transformers. The layout is
the paper's: tokens (B, N, C) with N = H * W in row-major order, together with their (H, W).

Where the paper is silent, these are the published model's choices: biases everywhere except in `linear_fuse.conv`;
LayerNorm eps 1e-6 in blocks and after stages, 1e-5 in patch embeddings and after the spatial reduction; exact (erf)
GELU; bilinear resizing with align_corners False; concatenation from stage 4 down to stage 1; Dropout2d before the
classifier. The checkpoints' unused `decode_head.conv_seg` does not exist here: drop it before a strict load.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The paper's settings of the MiT series (C_i, L_i) and its decoder widths. All variants have the same heads and ratios,
# the defaults of SegFormer. Parameter counts of the published models confirm all but the heads; transformers confirms
# those.
VARIANTS = {
    "b0": {"dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2), "decoder_dim": 256},
    "b1": {"dims": (64, 128, 320, 512), "depths": (2, 2, 2, 2), "decoder_dim": 256},
    "b2": {"dims": (64, 128, 320, 512), "depths": (3, 4, 6, 3), "decoder_dim": 768},
    "b3": {"dims": (64, 128, 320, 512), "depths": (3, 4, 18, 3), "decoder_dim": 768},
    "b4": {"dims": (64, 128, 320, 512), "depths": (3, 8, 27, 3), "decoder_dim": 768},
    "b5": {"dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3), "decoder_dim": 768},
}


def to_tokens(image: Tensor) -> tuple[Tensor, int, int]:
    """(B, C, H, W) -> (B, N, C), H, W with N = H * W."""
    _, _, H, W = image.shape
    return image.flatten(2).transpose(1, 2), H, W


def to_image(tokens: Tensor, H: int, W: int) -> Tensor:
    """(B, N, C) -> (B, C, H, W) with N = H * W."""
    B, _, C = tokens.shape
    return tokens.transpose(1, 2).reshape(B, C, H, W)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops the whole branch of a sample with probability `rate`.

    (B, N, C) -> (B, N, C). Surviving branches are divided by the probability of survival, so evaluation is the
    identity.
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
        survives = torch.rand(x.shape[0], 1, 1, device=x.device) < keep
        return x * survives.to(x.dtype) / keep


class OverlapPatchEmbed(nn.Module):
    """Overlapped patch merging, section 3.1: a strided convolution whose patches overlap, then LayerNorm.

    (B, C_in, H, W) -> (B, N, C), H', W' with H' = ceil(H / stride): padding by patch_size // 2 keeps every pixel.
    """

    def __init__(self, in_dim: int, dim: int, patch_size: int, stride: int, eps: float):
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, patch_size, stride=stride, padding=patch_size // 2)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        tokens, H, W = to_tokens(self.proj(image))
        return self.norm(tokens), H, W


class EfficientSelfAttention(nn.Module):
    """Efficient self-attention, section 3.1: keys and values come from a map reduced by `sr_ratio`.

    (B, N, C), H, W -> (B, N, C). The paper writes the reduction as a reshape and a Linear. The published weights are a
    convolution of kernel and stride R without padding, followed by LayerNorm. So rows and columns that do not fill a
    patch are dropped, and H and W must be at least R. With R = 1 there is no reduction and no norm.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, eps: float):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # keys first, values second
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=eps)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, h, N, d) with C = h * d: a head is d neighbouring channels."""
        B, N, C = tokens.shape
        return tokens.reshape(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)

    def forward(self, tokens: Tensor, H: int, W: int) -> Tensor:
        B, N, C = tokens.shape
        reduced = tokens  # (B, M, C), M tokens to attend to
        if self.sr_ratio > 1:
            reduced, _, _ = to_tokens(self.sr(to_image(tokens, H, W)))
            reduced = self.norm(reduced)
        keys, values = self.kv(reduced).split(C, dim=-1)  # (B, M, C) each
        q, k, v = self.split_heads(self.q(tokens)), self.split_heads(keys), self.split_heads(values)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.num_heads)  # (B, h, N, M)
        context = scores.softmax(dim=-1) @ v  # (B, h, N, d)
        return self.proj(context.transpose(1, 2).reshape(B, N, C))


class DepthwiseConv(nn.Module):
    """Mix-FFN's 3x3 depthwise convolution: (B, N, C), H, W -> (B, N, C). Its zero padding encodes positions."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, H: int, W: int) -> Tensor:
        tokens, _, _ = to_tokens(self.dwconv(to_image(tokens, H, W)))
        return tokens


class MixFFN(nn.Module):
    """Mix-FFN, section 3.1, without its residual: (B, N, C), H, W -> (B, N, C)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = DepthwiseConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, H: int, W: int) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), H, W), approximate="none"))


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, C), H, W -> (B, N, C). Each branch is dropped independently."""

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
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=block_norm_eps)
        self.attn = EfficientSelfAttention(dim, num_heads, sr_ratio, eps=patch_norm_eps)
        self.norm2 = nn.LayerNorm(dim, eps=block_norm_eps)
        self.mlp = MixFFN(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Tensor, H: int, W: int) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), H, W))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), H, W))


class MixTransformer(nn.Module):
    """The hierarchical encoder, section 3.1: (B, C, H, W) -> four maps (B, C_i, H / 2^(i+1), W / 2^(i+1)), rounded up.

    `patch_embed1` .. `patch_embed4`, `block1` .. `block4` and `norm1` .. `norm4` are the published names of its parts.
    """

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
    ):
        super().__init__()
        # Linear from 0 in the first block to the full rate in the last, as Python floats: a tensor would have no values
        # under torch.device("meta").
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depths))])

        self.patch_embed1 = OverlapPatchEmbed(in_channels, dims[0], patch_size=7, stride=4, eps=patch_norm_eps)
        self.patch_embed2 = OverlapPatchEmbed(dims[0], dims[1], patch_size=3, stride=2, eps=patch_norm_eps)
        self.patch_embed3 = OverlapPatchEmbed(dims[1], dims[2], patch_size=3, stride=2, eps=patch_norm_eps)
        self.patch_embed4 = OverlapPatchEmbed(dims[2], dims[3], patch_size=3, stride=2, eps=patch_norm_eps)

        def stage(i: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(
                    dims[i],
                    num_heads=num_heads[i],
                    mlp_ratio=mlp_ratios[i],
                    sr_ratio=sr_ratios[i],
                    drop_path_rate=next(rates),
                    block_norm_eps=block_norm_eps,
                    patch_norm_eps=patch_norm_eps,
                )
                for _ in range(depths[i])
            )

        self.block1 = stage(0)
        self.norm1 = nn.LayerNorm(dims[0], eps=block_norm_eps)
        self.block2 = stage(1)
        self.norm2 = nn.LayerNorm(dims[1], eps=block_norm_eps)
        self.block3 = stage(2)
        self.norm3 = nn.LayerNorm(dims[2], eps=block_norm_eps)
        self.block4 = stage(3)
        self.norm4 = nn.LayerNorm(dims[3], eps=block_norm_eps)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for patch_embed, blocks, norm in (
            (self.patch_embed1, self.block1, self.norm1),
            (self.patch_embed2, self.block2, self.norm2),
            (self.patch_embed3, self.block3, self.norm3),
            (self.patch_embed4, self.block4, self.norm4),
        ):
            tokens, H, W = patch_embed(image)
            for block in blocks:
                tokens = block(tokens, H, W)
            image = to_image(norm(tokens), H, W)
            features.append(image)
        return features


class Projection(nn.Module):
    """A Linear on every pixel, with the published name `proj`: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(in_dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        tokens, H, W = to_tokens(image)
        return to_image(self.proj(tokens), H, W)


class Fuse(nn.Module):
    """1x1 convolution, BatchNorm, ReLU: (B, C, H, W) -> (B, D, H, W). BatchNorm's shift makes a bias superfluous."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim, eps=1e-5, momentum=0.1)

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(image)))


class SegFormerHead(nn.Module):
    """The all-MLP decoder, section 3.2: four maps -> logits (B, K, H / 4, W / 4)."""

    def __init__(self, *, dims: tuple[int, ...], decoder_dim: int, num_classes: int, dropout_rate: float):
        super().__init__()
        self.linear_c4 = Projection(dims[3], decoder_dim)
        self.linear_c3 = Projection(dims[2], decoder_dim)
        self.linear_c2 = Projection(dims[1], decoder_dim)
        self.linear_c1 = Projection(dims[0], decoder_dim)
        self.linear_fuse = Fuse(4 * decoder_dim, decoder_dim)
        self.dropout = nn.Dropout2d(dropout_rate)
        self.linear_pred = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        c1, c2, c3, c4 = features
        size = c1.shape[2:]
        projected = [self.linear_c4(c4), self.linear_c3(c3), self.linear_c2(c2), self.linear_c1(c1)]
        # Stage 1's map is resized too, which is the identity, so that one rule holds for all four.
        resized = [F.interpolate(p, size=size, mode="bilinear", align_corners=False) for p in projected]
        return self.linear_pred(self.dropout(self.linear_fuse(torch.cat(resized, dim=1))))


class SegFormer(nn.Module):
    """The official SegFormer: normalised images (B, C, H, W) -> logits (B, K, ceil(H / 4), ceil(W / 4)), taps.

    Args:
        num_classes: Number of classes K.
        in_channels: Channels C of the images.
        dims, depths, num_heads, mlp_ratios, sr_ratios: One integer for each of the four stages.
        decoder_dim: Width of the decoder.
        drop_path_rate: Rate of the last block; rates grow linearly from 0 in the first.
        dropout_rate: Probability of dropping a whole channel before the classifier.
        block_norm_eps: Eps of the LayerNorms in blocks and after stages (1e-5 in transformers).
        patch_norm_eps: Eps of the LayerNorms in patch embeddings and after the spatial reduction.

    `taps` holds `feature0` .. `feature3`, (B, dims[i], H / 2^(i+2), W / 2^(i+2)) rounded up, after the stage norms.
    With the default ratios H and W must exceed 28 pixels, so that stage 1's map holds one 8 x 8 patch.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int = 3,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[int, ...] = (4, 4, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        decoder_dim: int,
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
        block_norm_eps: float = 1e-6,
        patch_norm_eps: float = 1e-5,
    ):
        super().__init__()
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
        )
        self.decode_head = SegFormerHead(
            dims=dims, decoder_dim=decoder_dim, num_classes=num_classes, dropout_rate=dropout_rate
        )
        self.apply(initialise)

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(images_nchw)
        return self.decode_head(features), {f"feature{i}": feature for i, feature in enumerate(features)}


def initialise(module: nn.Module) -> None:
    """The published initialisation of one layer; norms keep torch's default of ones and zeros.

    Linear: truncated normal with standard deviation 0.02. Convolution: normal with variance 2 / fan-out, where fan-out
    is kernel area times output channels over groups (`nn.init.kaiming_normal_` ignores the groups). Biases: zero.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        kernel_height, kernel_width = module.kernel_size
        fan_out = kernel_height * kernel_width * module.out_channels // module.groups
        nn.init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
