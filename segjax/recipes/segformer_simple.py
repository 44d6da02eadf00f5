"""The simple SegFormer: `--config segformer_simple:b5,camvid`; a variant, on streets (the default) or another dataset.

`default` has the sizes of the published package, `b5` those that jo-jstrm/segmentation_pytorch lists for it; `small` is
a narrow one for a CPU. The package has no recipe; that repository trains it like its SegFormer.
"""

from ml_collections import ConfigDict

from segjax.recipes import common

VARIANTS = ("small", "default", "b5")


def get_config(argument: str = "") -> ConfigDict:
    variant, dataset = common.parse(argument, VARIANTS)
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
    # Its norms have `norm` in their names, as optim.no_decay expects; the head is all that follows the encoder.
    config.optim.lr_multipliers = (("to_fused|to_segmentation", 10.0),)
    # The sides of its images must be multiples of 32.
    common.crop_in_multiples(config, 32)
    if dataset in ("streets", "camvid"):
        common.from_scratch(config)
    if dataset == "streets":
        common.minutes_on_a_cpu(config)
    return config
