"""Zuppichini's SegFormer on streets (the default) or another dataset: `--config segformer_zuppichini:article,camvid`.

`article` has the sizes of the article, `small` is a narrow variant for CPUs. The article does not train the model, so
no recipe is published. Cityscapes and ADE20K have the recipe of SegFormer-B0 (segjax/recipes/segformer.py).
"""

from ml_collections import ConfigDict

from segjax.recipes import common

VARIANTS = ("small", "article")


def get_config(argument: str = "") -> ConfigDict:
    """Return the config of a recipe.

    Args:
      argument: Words for variant and dataset, separated by commas, in any order; each may be omitted.

    Returns:
      The config of a run.

    Raises:
      ValueError: An unknown word.

    Example:
      >>> from segjax.recipes import segformer_zuppichini
      >>> segformer_zuppichini.get_config("article,camvid").model.name
      'segformer_zuppichini'
    """
    variant, dataset, _ = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"segformer-zuppichini-{variant}"
    config.model.name = "segformer_zuppichini"
    # Drop path rate of the last block; the article's default.
    config.model.drop_path_rate = 0.0
    if variant == "small":
        config.model.dims = (32, 64, 160, 256)
        config.model.depths = (2, 2, 2, 2)
        config.model.num_heads = (1, 2, 5, 8)
    # Norms have indices instead of names: these are the LayerNorms and the head's BatchNorm.
    config.optim.no_decay = r"overlap_patch_merge\.1|blocks\.\d+\.[01]\.fn\.0|reducer\.1|\.norm\.|fuse\.2"
    match dataset:
        case "cityscapes" | "ade20k":
            other = f"this is the one of SegFormer-B0 on {dataset}"
            config.recipe = f"no recipe is published for Zuppichini's SegFormer; {other}"
            config.optim.lr_multipliers = ((r"^(decoder|head)\.", 10.0),)
            config.init.expected = "an encoder pretrained on ImageNet"
            if dataset == "cityscapes":
                common.mmsegmentation(config, base_size=(2048, 1024), crop=(1024, 1024), batch=8)
                common.sliding_window(config)
            else:
                common.mmsegmentation(config, base_size=(2048, 512), crop=(512, 512), batch=16)
                config.eval.base_size = (2048, 512)
                config.eval.size_divisor = 32
        case "camvid":
            common.camvid(config)
        case "streets":
            common.streets(config)
        case _:
            common.unpublished(config, "Zuppichini's SegFormer")
    # The sides of its images must be multiples of 32.
    common.crop_in_multiples(config, 32)
    return config
