"""SegFormer: `--config segformer:b2,camvid`; a variant, on streets (the default) or another dataset.

b0 to b5 are the official models, plain_b0 to plain_b5 those of jo-jstrm/segmentation_pytorch, mmseg_b0 to mmseg_b5
those of mmsegmentation.

Recipe of the paper's section 4.1: AdamW, learning rate 6e-5 (ten times that in the head), weight decay 0.01 except for
norms, linear warm-up and then poly decay of power 1, random scale 0.5 to 2, flip and crop. It is written for weights
pretrained on ImageNet; from scratch, as on streets and camvid here, a higher rate learns sooner.
"""

from ml_collections import ConfigDict

from segjax.recipes import common

SIZES = ("b0", "b1", "b2", "b3", "b4", "b5")
VARIANTS = tuple(prefix + size for prefix in ("", "plain_", "mmseg_") for size in SIZES)


def get_config(argument: str = "") -> ConfigDict:
    variant, dataset = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"segformer-{variant.replace('_', '-')}"
    config.model.name = f"segformer_{variant}"
    # Drop path of the last block, and dropout of the channels before the classifier (section 4.1; plain models have
    # no dropout).
    config.model.drop_path_rate = 0.1
    config.model.dropout_rate = 0.0 if variant.startswith("plain_") else 0.1
    if dataset in ("streets", "camvid"):
        common.from_scratch(config)
    if dataset == "streets":
        common.minutes_on_a_cpu(config)
        config.model.drop_path_rate = 0.0
        config.model.dropout_rate = 0.0
    return config
