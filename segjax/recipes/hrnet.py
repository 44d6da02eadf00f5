"""HRNet, with and without OCR, on streets (the default) or another dataset: `--config hrnet:w48_ocr,cityscapes`.

The published variants are w18, w32, w48 and w18_ocr, w32_ocr, w48_ocr. `small` and `small_ocr` are narrow and shallow
variants for CPUs. `hrnet:w48,cityscapes,mmseg` is mmsegmentation's recipe (Cityscapes and ADE20K),
`hrnet:w48,cityscapes,jo-jstrm` that of jo-jstrm/segmentation_pytorch (Cityscapes).

HRNet/HRNet-Semantic-Segmentation, experiments: SGD with momentum 0.9, poly decay of power 0.9 without warm-up, flip and
scales 0.5, 0.6, ..., 2.1, for W48 and W48 with OCR. Cityscapes: learning rate 0.01, weight decay 5e-4 of all
parameters, 484 epochs of 2975 images in batches of 12 crops of 512x1024, class weights, the long side resized to 2048
times the scale. ADE20K: learning rate 0.02, weight decay 1e-4, 120 epochs of 20,210 images in batches of 16 crops of
520x520, the hardest 131,072 pixels of every four crops (OHEM), the long side resized to 520 times the scale, which is
at most 1.6 without OCR. With OCR the auxiliary loss is plain cross-entropy with a weight of 0.4. Deviations: segjax
pads with the mean colour, the original with black (a crop of Cityscapes has no padding); the original's learning rate
lags one step behind; the original resizes ADE20K images twice, to a short side of 520 first, and evaluates them in a
canvas of 520x520.

mmsegmentation, configs/hrnet and configs/ocrnet: SGD with learning rate 0.01, weight decay 5e-4, poly decay of power
0.9 to 1e-4, 160,000 steps of 8 crops of 512x1024 (Cityscapes) or 16 of 512x512 (ADE20K), photometric distortion, no
class weights; with OCR, corners are not aligned and there is no dropout.

jo-jstrm/segmentation_pytorch: SGD with learning rate 0.01, weight decay 5e-4, poly decay of power 0.9 to 1e-5 in
120,000 steps of 12 crops of 512x1024, class weights, brightness ±10. Deviations: the original pads on both sides,
computes in float16, and draws its largest scale, 2.0, twice as often as others.
"""

from ml_collections import ConfigDict

from segjax.recipes import common
from segjax.recipes.segformer import seed_repository

WIDTHS = ("small", "w18", "w32", "w48")
VARIANTS = (*WIDTHS, *(f"{width}_ocr" for width in WIDTHS))
SOURCES = {"mmseg": ("cityscapes", "ade20k"), "jo-jstrm": ("cityscapes",)}
# Widths with a recipe, by source; the model's authors ("") have recipes for W48.
PUBLISHED = {"": ("w48",), "mmseg": ("w18", "w48"), "jo-jstrm": WIDTHS[1:]}


def get_config(argument: str = "") -> ConfigDict:
    """Return the config of a recipe.

    Args:
      argument: Words for variant, dataset and source, separated by commas, in any order; each may be omitted.

    Returns:
      The config of a run.

    Raises:
      ValueError: An unknown word, or a source without a recipe for the dataset.

    Example:
      >>> from segjax.recipes import hrnet
      >>> hrnet.get_config("w48_ocr,cityscapes").model.name
      'hrnet_w48_ocr'
    """
    words = common.parse(argument, VARIANTS, SOURCES)
    common.refuse_source(words, SOURCES.get(words.source, ()))
    variant, dataset, source = words
    has_ocr = variant.endswith("_ocr")
    config = common.get_config(dataset)
    config.label = f"hrnet-{variant.replace('_', '-')}" + f"-{source}" * bool(source)
    config.model.name = "hrnet_" + variant.replace("small", "w18")
    if variant.startswith("small"):
        config.model.width = 12
        config.model.stage1_channels = 16
        config.model.stage_modules = (1, 1, 2, 1)
        config.model.stage_blocks = (2, 2, 2, 2)
    # Applies to every bilinear upsampling, including that of the logits.
    config.model.align_corners = has_ocr
    if has_ocr:
        # Drops channels before the classifier.
        config.model.dropout_rate = 0.05
    if variant == "small_ocr":
        config.model.ocr_channels = 64
        config.model.ocr_key_channels = 32
    config.augment.photometric = False
    width = variant.removesuffix("_ocr")
    # No pretrained encoder of the width of `small` is published.
    pretrained = "an encoder pretrained on ImageNet" if width == "small" else f"hrnetv2_{width}_imagenet_pretrained.pth"
    config.init.expected = pretrained
    match dataset, source:
        case "cityscapes" | "ade20k", "mmseg":
            mmsegmentation(config, dataset, has_ocr=has_ocr)
        case "cityscapes", "jo-jstrm":
            sgd(config, lr=0.01, weight_decay=5e-4, end_lr=1e-5)
            seed_repository(config, crop=(512, 1024))
            config.train.batch = config.eval.batch = 12
            config.train.steps = 120_000
        case "cityscapes", _:
            cityscapes(config)
        case "ade20k", _:
            ade20k(config, has_ocr=has_ocr)
        case "camvid", _:
            camvid_from_scratch(config, variant)
        case "streets", _:
            sgd(config, lr=0.01, weight_decay=5e-4)
            common.streets(config)
            config.optim.lr = 0.03
            if "dropout_rate" in config.model:
                config.model.dropout_rate = 0.0
        case _:
            config.augment.photometric = True
            common.unpublished(config, "HRNet")
            # As in ConvNeXt: all weights decay, except scales of norms, and biases.
            config.optim.weight_decay = 0.05
            config.optim.no_decay = r"(scale|bias)$"
    if dataset in ("cityscapes", "ade20k") and width not in PUBLISHED[source]:
        config.recipe = f"no recipe is published for this width; this is the one of W48: {config.recipe}"
    return config


def sgd(config: ConfigDict, *, lr: float, weight_decay: float, end_lr: float = 0.0) -> None:
    """SGD with momentum 0.9, the same rate and weight decay for all parameters, and poly decay of power 0.9."""
    config.optim.name = "sgd"
    config.optim.lr = lr
    config.optim.end_lr = end_lr
    config.optim.momentum = 0.9
    config.optim.weight_decay = weight_decay
    config.optim.power = 0.9
    config.optim.warmup_steps = 0
    config.optim.no_decay = ""
    config.optim.lr_multipliers = ()


def cityscapes(config: ConfigDict) -> None:
    """The authors' recipe for Cityscapes, bs_12_epoch484."""
    config.recipe = "HRNet/HRNet-Semantic-Segmentation, cityscapes 512x1024 lr1e-2 wd5e-4 bs12 epoch484"
    sgd(config, lr=0.01, weight_decay=5e-4)
    config.augment.base_size = (2048, 2048)
    config.augment.scale = (0.5, 2.1)
    config.augment.scale_step = 0.1
    config.augment.crop = (512, 1024)
    # 12 divides among one, two, three, four or six devices.
    config.train.batch = config.eval.batch = 12
    config.train.steps = 484 * (2975 // 12)
    config.loss.class_weights = "cityscapes"
    # For runs that turn OHEM on: the hardest 131,072 pixels of a GPU's three crops.
    config.loss.ohem_images = 3
    config.loss.ohem_threshold = 0.9
    config.loss.ohem_min_kept = 131_072 / (3 * 512 * 1024)
    config.loss.aux = "cross_entropy"


def ade20k(config: ConfigDict, *, has_ocr: bool) -> None:
    """The authors' recipe for ADE20K, ohem_bs_16_epoch120."""
    config.recipe = "HRNet/HRNet-Semantic-Segmentation, ade20k 520x520 ohem lr2e-2 wd1e-4 bs16 epoch120"
    sgd(config, lr=0.02, weight_decay=1e-4)
    config.model.align_corners = True
    config.augment.base_size = (520, 520)
    config.augment.scale = (0.5, 2.1 if has_ocr else 1.6)
    config.augment.scale_step = 0.1
    config.augment.crop = (520, 520)
    config.train.batch = 16
    config.train.steps = 120 * (20_210 // 16)
    config.loss.cross_entropy = 0.0
    config.loss.ohem = 1.0
    config.loss.ohem_images = 4
    config.loss.ohem_threshold = 0.9
    config.loss.ohem_min_kept = 131_072 / (4 * 520 * 520)
    config.loss.aux = "cross_entropy"
    config.eval.base_size = (520, 520)


def mmsegmentation(config: ConfigDict, dataset: str, *, has_ocr: bool) -> None:
    """The recipe of mmsegmentation, configs/hrnet and configs/ocrnet, with 160,000 steps."""
    config.recipe = f"mmsegmentation, {'ocrnet' if has_ocr else 'fcn'}_hr, {dataset} 160k"
    sgd(config, lr=0.01, weight_decay=5e-4, end_lr=1e-4)
    config.model.align_corners = False
    if has_ocr:
        config.model.dropout_rate = 0.0
    config.augment.photometric = True
    if dataset == "cityscapes":
        common.mmsegmentation(config, base_size=(2048, 1024), crop=(512, 1024), batch=8)
    else:
        common.mmsegmentation(config, base_size=(2048, 512), crop=(512, 512), batch=16)
        config.eval.base_size = (2048, 512)


def camvid_from_scratch(config: ConfigDict, variant: str) -> None:
    """CamVid, 367 images of 360x480, from random weights, for `python -m benchmarks.camvid` (w32_ocr; small on a CPU).

    Reasons for this family: without pretraining, the inductive bias of convolutions replaces some of the data that
    attention would need; poles, signs and riders are a few pixels wide, and only HRNet keeps stride 4 throughout; the
    auxiliary loss of OCR supervises the backbone directly, which helps random weights. No value was chosen by a score
    on the test split.
    """
    config.recipe = "segjax's own, for random weights"
    config.init.expected = ""
    # 367 images need strong augmentation. Smaller scales would be mostly padding. A quarter of test and a sixth of
    # train is at dusk, so the model must not depend on brightness.
    config.augment.scale = (0.75, 2.0)
    config.augment.photometric = True
    # The weights of road and bicyclist have a ratio of 1 to 10. By median frequency it would be 1 to 110, which gains
    # recall and loses precision.
    config.loss.class_weights = "inverse_sqrt"
    # With Dice, the loss is closer to the metric than cross-entropy only; nnU-Net uses both, and also trains from
    # scratch on little data. Lovász would be closer still, but sorts all pixels of each class at every step.
    config.loss.dice = 1.0
    # SGD's rate of 0.01 is for pretrained weights, which change little. AdamW needs no tuning by depth. The weight
    # decay is ConvNeXt's: strong, for few images, and without norms and biases. Clipping is for the large gradients of
    # the first steps.
    config.optim.name = "adamw"
    config.optim.lr = 1e-3
    config.optim.weight_decay = 0.05
    config.optim.no_decay = r"(scale|bias)$"
    config.optim.lr_multipliers = ()
    config.optim.power = 0.9
    config.optim.clip_norm = 1.0
    # On small datasets weights fluctuate from batch to batch; their average over about a thousand steps does not.
    config.train.ema = 0.999
    config.checkpoint.every = 500
    if variant.startswith("small"):
        # Two hours on two cores, 147 epochs: W18's width, shallow, with crops that are never padded.
        config.model.width = 18
        config.model.stage1_channels = 32
        config.augment.crop = (256, 320)
        config.train.batch = 4
        config.train.steps = 13_500
        config.optim.warmup_steps = 300
    else:
        # Minutes on a GPU, 698 epochs; FC-DenseNet and LMFFNet have 700 to 1000.
        config.train.batch = 16
        config.train.steps = 16_000
        config.optim.warmup_steps = 500
        if variant.endswith("_ocr"):
            # The 3x3 convolution over all branches is the largest cost of OCR; a quarter of its channels is enough for
            # 11 classes.
            config.model.ocr_channels = 128
            config.model.ocr_key_channels = 64
