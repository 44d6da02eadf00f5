"""The SegFormer of the repository jo-jstrm/segmentation_pytorch in PyTorch: the official encoder, a plainer decoder.

It was written from the key names and measured figures of that code, and copies none of it.
`parity/test_reference_variants.py` compares both of its versions with figures of the original. Their decoders differ
from the official one only between the concatenation and the classifier:

- `fuse="conv"` (jo-jstrm) is only a 1x1 convolution with bias. Without an activation the whole decoder is affine in the
  encoder's features.
- `fuse="conv_bn"` (the later version, by camlaedtke) is the same convolution with bias, then BatchNorm without ReLU.

Key names are the repository's with the prefixes `backbone.` and `decode_head.`, which the repository omits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segjax.torch_reference.segformer import MixTransformer, Projection, initialise

# The encoders of the official series. Decoders are 768 wide from b1 on; the official b1 has 256.
VARIANTS = {
    "b0": {"dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2), "decoder_dim": 256},
    "b1": {"dims": (64, 128, 320, 512), "depths": (2, 2, 2, 2), "decoder_dim": 768},
    "b2": {"dims": (64, 128, 320, 512), "depths": (3, 4, 6, 3), "decoder_dim": 768},
    "b3": {"dims": (64, 128, 320, 512), "depths": (3, 4, 18, 3), "decoder_dim": 768},
    "b4": {"dims": (64, 128, 320, 512), "depths": (3, 8, 27, 3), "decoder_dim": 768},
    "b5": {"dims": (64, 128, 320, 512), "depths": (3, 6, 40, 3), "decoder_dim": 768},
}


class PlainHead(nn.Module):
    """The decoder without activation: four maps -> logits (B, K, H / 4, W / 4)."""

    def __init__(self, *, dims: tuple[int, ...], decoder_dim: int, num_classes: int, dropout_rate: float, fuse: str):
        super().__init__()
        if fuse not in ("conv", "conv_bn"):
            raise ValueError(f'fuse must be "conv" or "conv_bn", got {fuse!r}')
        self.fuse = fuse
        self.linear_c4 = Projection(dims[3], decoder_dim)
        self.linear_c3 = Projection(dims[2], decoder_dim)
        self.linear_c2 = Projection(dims[1], decoder_dim)
        self.linear_c1 = Projection(dims[0], decoder_dim)
        self.linear_fuse = nn.Conv2d(4 * decoder_dim, decoder_dim, 1)
        if fuse == "conv_bn":
            self.linear_fuse_bn = nn.BatchNorm2d(decoder_dim, eps=1e-5, momentum=0.1)
        self.dropout = nn.Dropout2d(dropout_rate)
        self.linear_pred = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        c1, c2, c3, c4 = features
        size = c1.shape[2:]
        projected = [self.linear_c4(c4), self.linear_c3(c3), self.linear_c2(c2), self.linear_c1(c1)]
        resized = [F.interpolate(p, size=size, mode="bilinear", align_corners=False) for p in projected]
        fused = self.linear_fuse(torch.cat(resized, dim=1))  # (B, D, H / 4, W / 4)
        if self.fuse == "conv_bn":
            fused = self.linear_fuse_bn(fused)
        return self.linear_pred(self.dropout(fused))


class SegFormerPlain(nn.Module):
    """Normalised images (B, C, H, W) -> logits (B, K, ceil(H / 4), ceil(W / 4)), taps.

    Arguments and taps are those of `segformer.SegFormer`, and `fuse`, "conv" or "conv_bn", see the docstring of this
    file. The classifier is preceded by a dropout of whole channels, whose default rate is 0.
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
        fuse: str = "conv",
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.0,
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
        self.decode_head = PlainHead(
            dims=dims, decoder_dim=decoder_dim, num_classes=num_classes, dropout_rate=dropout_rate, fuse=fuse
        )
        self.apply(initialise)

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(images_nchw)
        return self.decode_head(features), {f"feature{i}": feature for i, feature in enumerate(features)}
