"""HRNet, with and without OCR: `--config configs/hrnet.py:w48_ocr,camvid`; on streets (the default)
or another of common.DATASETS.

w18, w32, w48 and w18_ocr, w32_ocr, w48_ocr are the published models; `small` and `small_ocr` are narrow and shallow
ones for a CPU.

Recipe of HRNet-Semantic-Segmentation for Cityscapes: SGD with momentum 0.9, learning rate 0.01 for everything, decay
5e-4 of everything, poly decay of power 0.9, no warm-up, 484 epochs of 2975 images in batches of 12 at 512x1024, random
scale 0.5 to 2, flip; the auxiliary loss of OCR weighs 0.4. It is written for weights pretrained on ImageNet.
"""

from configs import common

WIDTHS = ("small", "w18", "w32", "w48")
VARIANTS = (*WIDTHS, *(f"{width}_ocr" for width in WIDTHS))


def get_config(argument=""):
    variant, dataset = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"hrnet-{variant.replace('_', '-')}"
    config.model.name = "hrnet_" + variant.replace("small", "w18")
    if variant.startswith("small"):
        config.model.width = 12
        config.model.stage1_channels = 16
        config.model.stage_modules = (1, 1, 2, 1)
        config.model.stage_blocks = (2, 2, 2, 2)
    # Of every bilinear enlargement: as published for Cityscapes.
    config.model.align_corners = variant.endswith("_ocr")
    if variant.endswith("_ocr"):
        # Of the channels in front of the classifier.
        config.model.dropout_rate = 0.05
    if variant == "small_ocr":
        config.model.ocr_channels = 64
        config.model.ocr_key_channels = 32
    if dataset in ("cityscapes", "folder"):
        config.augment.crop = (512, 1024)
    config.augment.photometric = False
    config.train.batch = 12
    config.train.steps = 484 * (2975 // 12)
    config.optim.name = "sgd"
    config.optim.lr = 0.01
    config.optim.momentum = 0.9
    config.optim.weight_decay = 5e-4
    config.optim.power = 0.9
    config.optim.warmup_steps = 0
    config.optim.no_decay = ""
    config.optim.lr_multipliers = ()
    if dataset == "camvid":
        config.train.steps = 20_000
    if dataset == "streets":
        common.minutes_on_a_cpu(config)
        config.optim.lr = 0.03
        if "dropout_rate" in config.model:
            config.model.dropout_rate = 0.0
    return config
