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
    if dataset == "streets":
        config.train.steps = 1000
        config.train.batch = 4
        config.train.log_every = 10
        config.checkpoint.every = 250
        config.optim.lr = 5e-4
        config.optim.warmup_steps = 50
        config.optim.head_multiplier = 2.0
    elif dataset == "camvid":
        config.optim.lr = 5e-4
        config.optim.warmup_steps = 500
        config.optim.head_multiplier = 2.0
    return config
