"""HRNet, with and without OCR: `--config hrnet:w48_ocr,camvid`; a variant, on streets (the default) or another dataset.

w18, w32, w48 and w18_ocr, w32_ocr, w48_ocr are the published models; `small` and `small_ocr` are narrow and shallow
ones for a CPU.

Recipe of HRNet-Semantic-Segmentation for Cityscapes: SGD with momentum 0.9, learning rate 0.01 for everything, decay
5e-4 of everything, poly decay of power 0.9, no warm-up, 484 epochs of 2975 images in batches of 12 at 512x1024, random
scale 0.5 to 2, flip; the auxiliary loss of OCR weighs 0.4. It is written for weights pretrained on ImageNet; for
CamVid from random weights see `camvid_from_scratch`.
"""

from ml_collections import ConfigDict

from segjax.data.specs import DATASETS
from segjax.recipes import common

WIDTHS = ("small", "w18", "w32", "w48")
VARIANTS = (*WIDTHS, *(f"{width}_ocr" for width in WIDTHS))


def get_config(argument: str = "") -> ConfigDict:
    variant, dataset = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"hrnet-{variant.replace('_', '-')}"
    config.model.name = "hrnet_" + variant.replace("small", "w18")
    if variant.startswith("small"):
        config.model.width = 12
        config.model.stage1_channels = 16
        config.model.stage_modules = (1, 1, 2, 1)
        config.model.stage_blocks = (2, 2, 2, 2)
    # Of every bilinear upsampling, as published for Cityscapes.
    config.model.align_corners = variant.endswith("_ocr")
    if variant.endswith("_ocr"):
        # Of the channels before the classifier.
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
        camvid_from_scratch(config)
    if dataset == "streets":
        common.minutes_on_a_cpu(config)
        config.optim.lr = 0.03
        if "dropout_rate" in config.model:
            config.model.dropout_rate = 0.0
    return config


def camvid_from_scratch(config: ConfigDict) -> None:
    """367 images of 360x480 and random weights; `python -m benchmarks.camvid` trains w48_ocr with them by default.

    Why this family: without pretraining, the bias of convolutions makes up for some of the data that attention would
    need; poles, signs and riders are a few pixels wide, and only HRNet keeps stride 4 from end to end; the auxiliary
    loss of OCR supervises the backbone directly, from which random weights benefit. No value here was chosen by a score
    on the test split.
    """
    # 523 epochs: between BiSeNetV2's 436 (10,000 steps of 16) and FC-DenseNet's and LMFFNet's 700 to 1000.
    config.train.steps = 12_000
    config.train.batch = 16
    # An average over the last thousand steps, 44 epochs: on small datasets weights fluctuate from batch to batch.
    config.train.ema = 0.999
    # Strong augmentation of 367 images. A quarter of test and a sixth of train is at dusk: brightness must not matter.
    config.augment.scale = (0.5, 2.0)
    config.augment.photometric = True
    # Road to bicyclist is 1 to 10. By median frequency it would be 1 to 110, which gains recall and loses precision.
    config.loss.class_weights = DATASETS["camvid"].class_weights
    # Closer to the metric than cross-entropy only; nnU-Net uses both, and also trains from scratch on little data.
    # Lovász would be closer still, and sorts all pixels of each class at every step.
    config.loss.dice = 1.0
    # SGD's 0.01 is for pretrained weights, which move little. AdamW needs no tuning by depth; the decay is ConvNeXt's,
    # strong, for few images. Gradients of the first steps are large.
    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.05
    config.optim.warmup_steps = 500
    config.optim.clip_norm = 1.0
    config.checkpoint.every = 2000
