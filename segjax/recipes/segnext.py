"""SegNeXt (t, s, b or l) on streets (the default) or another dataset: `--config segnext:b,cityscapes`.

`small` is a narrow variant for CPUs. `segnext:b,ade20k,mmseg` is mmsegmentation's recipe.

Visual-Attention-Network/SegNeXt, local_configs/segnext, and section 4 of the paper: AdamW with learning rate 6e-5 (ten
times that in the head), weight decay 0.01 except for norms, poly decay of power 1 times a linear warm-up of 1500 steps
from 1e-6, 160,000 steps. Cityscapes: batches of 8 crops of 1024x1024, evaluation by a sliding window. ADE20K: batches
of 16 crops of 512x512 from images resized to (2048, 512), evaluation at that size in multiples of 32.

mmsegmentation has only ADE20K, with decoders of rank 16 in all sizes and without resizing to multiples of 32.
Deviations: its schedule is the warm-up followed by poly decay, which segjax multiplies; the temperature of its matrix
factorisation is 100, in segjax the authors' 1; in evaluation it pads images to multiples of 32.
"""

from ml_collections import ConfigDict

from segjax.recipes import common

VARIANTS = ("small", "t", "s", "b", "l")
SOURCES = {"mmseg": ("ade20k",)}


def get_config(argument: str = "") -> ConfigDict:
    """Return the config of a recipe.

    Args:
      argument: Words for variant, dataset and source, separated by commas, in any order; each may be omitted.

    Returns:
      The config of a run.

    Raises:
      ValueError: An unknown word, or a source without a recipe for the dataset.

    Example:
      >>> from segjax.recipes import segnext
      >>> segnext.get_config("b,ade20k,mmseg").model.name
      'segnext_b'
    """
    words = common.parse(argument, VARIANTS, SOURCES)
    common.refuse_source(words, SOURCES.get(words.source, ()))
    variant, dataset, source = words
    config = common.get_config(dataset)
    config.label = f"segnext-{variant}" + f"-{source}" * bool(source)
    config.model.name = "segnext_" + variant.replace("small", "t")
    # Drop path rate of the last block, and dropout of channels before the classifier.
    config.model.drop_path_rate = 0.3 if variant == "l" else 0.1
    config.model.dropout_rate = 0.1
    # Rank of the decoder's matrix factorisation.
    config.model.ham_rank = 64 if variant in ("b", "l") and not source else 16
    if variant == "small":
        config.model.dims = (16, 32, 80, 128)
        config.model.depths = (2, 2, 3, 2)
        config.model.mlp_ratios = (4, 4, 4, 4)
        config.model.ham_channels = 128
    # No pretrained encoder of the width of `small` is published.
    config.init.expected = "an encoder pretrained on ImageNet" if variant == "small" else f"mscan_{variant}.pth"
    repository = "mmsegmentation" if source else "Visual-Attention-Network/SegNeXt"
    if variant == "small":
        repository = f"no recipe is published for this size; this is the one of T: {repository}"
    published = "t" if variant == "small" else variant
    match dataset:
        case "cityscapes":
            config.recipe = f"{repository}, segnext {published} 1024x1024 city 160k"
            common.mmsegmentation(config, base_size=(2048, 1024), crop=(1024, 1024), batch=8)
            common.sliding_window(config)
        case "ade20k":
            config.recipe = f"{repository}, segnext {published} 512x512 ade 160k"
            common.mmsegmentation(config, base_size=(2048, 512), crop=(512, 512), batch=16)
            config.eval.base_size = (2048, 512)
            config.eval.size_divisor = 1 if source else 32
        case "camvid":
            common.camvid(config)
        case "streets":
            common.streets(config)
            config.model.drop_path_rate = 0.0
            config.model.dropout_rate = 0.0
        case _:
            common.unpublished(config, "SegNeXt")
    return config
