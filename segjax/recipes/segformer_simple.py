"""The simple SegFormer: `--config configs/segformer_simple.py:b5,camvid`; a variant on streets, camvid or folder.

`default` has the sizes of the published package, `b5` those that jo-jstrm/segmentation_pytorch gives it in its table,
`small` is a narrow one for a CPU. The package comes without a recipe; that repository trains it as its SegFormer.
"""

from configs import common

VARIANTS = ("small", "default", "b5")


def get_config(argument=""):
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
    # Its norms are called so too; everything behind the encoder is the head.
    config.optim.lr_multipliers = (("to_fused|to_segmentation", 10.0),)
    # Its sides must divide by 32.
    if dataset == "camvid":
        config.augment.crop = (352, 480)
    if dataset in ("streets", "camvid"):
        common.from_scratch(config)
    if dataset == "streets":
        common.minutes_on_a_cpu(config)
    return config
