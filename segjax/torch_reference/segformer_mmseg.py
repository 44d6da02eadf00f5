"""The SegFormer of mmsegmentation 1.x in PyTorch: the official encoder with another eps, and another head.

It was written from the key names and measured facts of that package, and uses none of its code. The encoder is the
official one with the official names, and eps 1e-6 in every LayerNorm. The head projects each level by a 1x1 convolution
without bias, BatchNorm and ReLU, instead of the official Linear; it concatenates from stage 1 to stage 4, in the
reverse of the official order; it is 256 wide for every variant.

`parity/mmseg_style.py` is the same model with mmsegmentation's own key names;
`parity/test_reference_variants.py` moves weights between the two. The initialisation here is the official one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segjax.torch_reference.segformer import VARIANTS as OFFICIAL
from segjax.torch_reference.segformer import Fuse, MixTransformer, initialise

VARIANTS = {name: {**sizes, "decoder_dim": 256} for name, sizes in OFFICIAL.items()}


class MMSegHead(nn.Module):
    """Four maps -> logits (B, K, H / 4, W / 4). `convs` are the projections of c1 .. c4, in this order."""

    def __init__(self, *, dims: tuple[int, ...], decoder_dim: int, num_classes: int, dropout_rate: float):
        super().__init__()
        self.convs = nn.ModuleList(Fuse(dim, decoder_dim) for dim in dims)
        self.fusion_conv = Fuse(4 * decoder_dim, decoder_dim)
        self.dropout = nn.Dropout2d(dropout_rate)
        self.conv_seg = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        size = features[0].shape[2:]
        projected = [conv(feature) for conv, feature in zip(self.convs, features, strict=True)]
        resized = [F.interpolate(p, size=size, mode="bilinear", align_corners=False) for p in projected]
        return self.conv_seg(self.dropout(self.fusion_conv(torch.cat(resized, dim=1))))


class SegFormerMMSeg(nn.Module):
    """Normalised images (B, C, H, W) -> logits (B, K, ceil(H / 4), ceil(W / 4)), taps.

    Arguments and taps are those of `segjax.torch_reference.segformer.SegFormer`; only the defaults of the two eps and
    of the decoder's width differ.
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
        decoder_dim: int = 256,
        drop_path_rate: float = 0.1,
        dropout_rate: float = 0.1,
        block_norm_eps: float = 1e-6,
        patch_norm_eps: float = 1e-6,
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
        self.decode_head = MMSegHead(
            dims=dims, decoder_dim=decoder_dim, num_classes=num_classes, dropout_rate=dropout_rate
        )
        self.apply(initialise)

    def forward(self, images_nchw: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(images_nchw)
        return self.decode_head(features), {f"feature{i}": feature for i, feature in enumerate(features)}
