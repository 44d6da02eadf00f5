"""The simple SegFormer on streets (the default) or another dataset: `--config segformer_simple:b5,cityscapes`.

`default` has the sizes of the published package, `b5` those that jo-jstrm/segmentation_pytorch lists for it; `small` is
a narrow variant for CPUs. The package has no recipe. jo-jstrm/segmentation_pytorch trains it like its SegFormer, on
Cityscapes.
"""

from ml_collections import ConfigDict

from segjax.recipes import common, segformer

VARIANTS = ("small", "default", "b5")


def get_config(argument: str = "") -> ConfigDict:
    """Return the config of a recipe.

    Args:
      argument: Words for variant and dataset, separated by commas, in any order; each may be omitted.

    Returns:
      The config of a run.

    Raises:
      ValueError: An unknown word.

    Example:
      >>> from segjax.recipes import segformer_simple
      >>> segformer_simple.get_config("small").model.dims
      (16, 32, 80, 128)
    """
    variant, dataset, _ = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"segformer-simple-{variant}"
    config.model.name = "segformer_simple"
    if variant == "small":
        config.model.dims = (16, 32, 80, 128)
        config.model.decoder_dim = 128
    elif variant == "b5":
        config.model.dims = (64, 128, 320, 512)
        config.model.depths = (3, 6, 40, 3)
        config.model.mlp_ratios = (4, 4, 4, 4)
        config.model.decoder_dim = 768
    match dataset:
        case "cityscapes":
            segformer.seed_repository(config, crop=(1024, 1024))
            config.train.batch = 8
            config.train.steps = 160_000
            config.optim.lr_multipliers = ()
            config.init.expected = "an encoder pretrained on ImageNet"
        case "camvid":
            common.camvid(config)
        case "streets":
            common.streets(config)
        case _:
            common.unpublished(config, "the simple SegFormer")
    # The sides of its images must be multiples of 32.
    common.crop_in_multiples(config, 32)
    return config
