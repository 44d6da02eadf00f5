"""SegFormer: `--config configs/segformer.py:b2,camvid`; b0 to b5 on streets (the default), camvid or folder.

Recipe of the paper's section 4.1: AdamW, learning rate 6e-5 (ten times that in the head), weight decay 0.01 but for
norms, linear warm-up and then poly decay of power 1, random scale 0.5 to 2, flip and crop. It is written for weights
pretrained on ImageNet; from scratch, as on streets and camvid here, a higher rate learns sooner.
"""

from configs import common

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")


def get_config(argument=""):
    variant, dataset = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.model.name = f"segformer_{variant}"
    # Of the last block, and of the channels in front of the classifier (section 4.1).
    config.model.drop_path_rate = 0.1
    config.model.dropout_rate = 0.1
    if dataset in ("streets", "camvid"):
        # Random weights want one high rate throughout, and a short training no regularisation.
        config.optim.lr = 2e-3
        config.optim.head_multiplier = 1.0
        config.optim.warmup_steps = 200
    if dataset == "streets":
        # Minutes on two cores.
        config.train.steps = 800
        config.train.batch = 4
        config.train.log_every = 10
        config.checkpoint.every = 200
        config.optim.lr = 3e-3
        config.optim.warmup_steps = 50
        config.augment.scale = (0.75, 1.5)
        config.augment.photometric = False
        config.model.drop_path_rate = 0.0
        config.model.dropout_rate = 0.0
    return config
