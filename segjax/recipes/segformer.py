"""SegFormer on streets (the default) or another dataset: `--config segformer:b2,cityscapes`.

b0 to b5 are the official models, plain_b0 to plain_b5 those of jo-jstrm/segmentation_pytorch, mmseg_b0 to mmseg_b5
those of mmsegmentation. Each has the recipe of its own repository.

NVlabs/SegFormer, local_configs/segformer: AdamW with learning rate 6e-5 (ten times that in the head), weight decay 0.01
except for norms, poly decay of power 1 times a linear warm-up of 1500 steps from 1e-6, 160,000 steps. Cityscapes:
batches of 8 crops of 1024x1024, evaluation by a sliding window. ADE20K: batches of 16 crops of 512x512 (B5: 640x640)
from images resized to (2048, 512) (B5: (2048, 640)), evaluation at that size in multiples of 32.

mmsegmentation: the same, without the multiples of 32 on ADE20K. Deviation: its schedule is the warm-up followed by
poly decay; segjax multiplies the two. The rates differ by at most 1%.

jo-jstrm/segmentation_pytorch: Cityscapes with HRNet's class weights and scales, brightness ±10 as the only photometric
distortion, the same rate for all parameters. Deviations: the original pads on both sides, computes in float16, and
draws its largest scale, 2.0, twice as often as others.
"""

from ml_collections import ConfigDict

from segjax.recipes import common

SIZES = ("b0", "b1", "b2", "b3", "b4", "b5")
VARIANTS = tuple(prefix + size for prefix in ("", "plain_", "mmseg_") for size in SIZES)


def get_config(argument: str = "") -> ConfigDict:
    """Return the config of a recipe.

    Args:
      argument: Words for variant and dataset, separated by commas, in any order; each may be omitted.

    Returns:
      The config of a run.

    Raises:
      ValueError: An unknown word.

    Example:
      >>> from segjax.recipes import segformer
      >>> segformer.get_config("b2,cityscapes").model.name
      'segformer_b2'
    """
    variant, dataset, _ = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"segformer-{variant.replace('_', '-')}"
    config.model.name = f"segformer_{variant}"
    # Drop path rate of the last block, and dropout of channels before the classifier (section 4.1 of the paper; plain
    # models have no dropout).
    config.model.drop_path_rate = 0.1
    config.model.dropout_rate = 0.0 if variant.startswith("plain_") else 0.1
    prefix, size = variant[:-2], variant[-2:]
    config.init.expected = f"mit_{size}.pth"
    match dataset, prefix:
        case "cityscapes", "plain_":
            seed_repository(config, crop=(1024, 1024))
            config.train.batch = 8
            config.train.steps = 160_000
            config.optim.lr_multipliers = ()
        case "cityscapes", _:
            config.recipe = source_of(prefix, f"{size}.1024x1024.city.160k")
            common.mmsegmentation(config, base_size=(2048, 1024), crop=(1024, 1024), batch=8)
            common.sliding_window(config)
        case "ade20k", "" | "mmseg_":
            side = 640 if size == "b5" else 512
            config.recipe = source_of(prefix, f"{size}.{side}x{side}.ade.160k")
            common.mmsegmentation(config, base_size=(2048, side), crop=(side, side), batch=16)
            config.eval.base_size = (2048, side)
            config.eval.size_divisor = 1 if prefix == "mmseg_" else 32
        case "camvid", _:
            common.camvid(config)
        case "streets", _:
            common.streets(config)
            config.model.drop_path_rate = 0.0
            config.model.dropout_rate = 0.0
        case _:
            common.unpublished(config, f"SegFormer {variant}")
    return config


def source_of(prefix: str, name: str) -> str:
    """The publication of a recipe."""
    if prefix == "mmseg_":
        return f"mmsegmentation, segformer mit-{name}"
    return f"NVlabs/SegFormer, segformer.{name}"


def seed_repository(config: ConfigDict, *, crop: tuple[int, int]) -> None:
    """Augmentation and class weights of jo-jstrm/segmentation_pytorch for Cityscapes."""
    config.recipe = "jo-jstrm/segmentation_pytorch"
    config.augment.base_size = (2048, 2048)
    config.augment.scale = (0.5, 2.0)
    config.augment.scale_step = 0.1
    config.augment.crop = crop
    config.augment.photometric = False
    config.augment.brightness = 10
    config.loss.class_weights = "cityscapes"
