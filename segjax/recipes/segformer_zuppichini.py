"""The SegFormer of F. Zuppichini's article: `--config segformer_zuppichini:article,camvid`.

`article` has the sizes of the article, `small` is a narrow one for a CPU; on streets (the default) or another dataset.
The article ends before training; the recipe is SegFormer's (segjax/recipes/segformer.py).
"""

from ml_collections import ConfigDict

from segjax.recipes import common

VARIANTS = ("small", "article")


def get_config(argument: str = "") -> ConfigDict:
    variant, dataset = common.parse(argument, VARIANTS)
    config = common.get_config(dataset)
    config.label = f"segformer-zuppichini-{variant}"
    config.model.name = "segformer_zuppichini"
    # Drop path of the last block; the article's default.
    config.model.drop_path_rate = 0.0
    if variant == "small":
        config.model.dims = (32, 64, 160, 256)
        config.model.depths = (2, 2, 2, 2)
        config.model.num_heads = (1, 2, 5, 8)
    # Norms have numbers instead of names: these are the positions of the LayerNorms and of the head's BatchNorm.
    config.optim.no_decay = r"overlap_patch_merge\.1|blocks\.\d+\.[01]\.fn\.0|reducer\.1|\.norm\.|fuse\.2"
    config.optim.lr_multipliers = ((r"^(decoder|head)\.", 10.0),)
    # The sides of its images must be multiples of 32.
    common.crop_in_multiples(config, 32)
    if dataset in ("streets", "camvid"):
        common.from_scratch(config)
    if dataset == "streets":
        common.minutes_on_a_cpu(config)
    return config
