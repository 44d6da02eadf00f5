"""SegNeXt: `--config segnext:b,camvid`; t, s, b or l, on streets (the default) or another dataset.

`small` is a narrow one for a CPU.

Recipe of the paper's section 4 for Cityscapes: AdamW, learning rate 6e-5 (ten times that in the head), weight decay
0.01 except for norms, linear warm-up over 1500 steps and then poly decay of power 1, 160,000 steps of 8 images at
1024x1024, random scale 0.5 to 2, flip and photometric distortion. It is written for weights pretrained on ImageNet.
"""

from ml_collections import ConfigDict

from segjax.recipes import common

VARIANTS = ("small", "t", "s", "b", "l")


def get_config(argument: str = "") -> ConfigDict:
    variant, dataset = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"segnext-{variant}"
    config.model.name = "segnext_" + variant.replace("small", "t")
    # Drop path of the last block, and dropout of the channels before the classifier.
    config.model.drop_path_rate = 0.3 if variant == "l" else 0.1
    config.model.dropout_rate = 0.1
    # Rank of the decoder's matrix factorisation.
    config.model.ham_rank = 64 if variant in ("b", "l") else 16
    if variant == "small":
        config.model.dims = (16, 32, 80, 128)
        config.model.depths = (2, 2, 3, 2)
        config.model.mlp_ratios = (4, 4, 4, 4)
        config.model.ham_channels = 128
    if dataset in ("cityscapes", "folder"):
        config.augment.crop = (1024, 1024)
    config.train.batch = 8
    config.train.steps = 160_000
    if dataset == "camvid":
        config.train.steps = 20_000
    if dataset in ("streets", "camvid"):
        common.from_scratch(config)
    if dataset == "streets":
        common.minutes_on_a_cpu(config)
        config.model.drop_path_rate = 0.0
        config.model.dropout_rate = 0.0
    return config
