"""Common parts of recipes: the words after the colon, published pipelines, and settings without a published recipe.

The defaults of all settings are in segjax/train/schema.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ml_collections import ConfigDict

from segjax.data.specs import DATASETS
from segjax.train.schema import default_config, unset


class Words(NamedTuple):
    """The selection by the words after the colon; `source` is the recipe's publisher, "" for the model's authors."""

    variant: str
    dataset: str
    source: str


def parse(argument: str, variants: tuple[str, ...], sources: Collection[str] = ()) -> Words:
    """Parses words in any order, each of which may be omitted: "b2,camvid" -> ("b2", "camvid", "").

    Args:
      argument: Words, separated by commas.
      variants: Variants of the model, the default first.
      sources: Words for recipes of other publishers than the model's authors, such as "mmseg".

    Raises:
      ValueError: An unknown word; the message lists the known ones.
    """
    variant, dataset, source = variants[0], next(iter(DATASETS)), ""
    for word in filter(None, (word.strip() for word in argument.split(","))):
        if word in variants:
            variant = word
        elif word in DATASETS:
            dataset = word
        elif word in sources:
            source = word
        else:
            others = f", nor a recipe's source ({', '.join(sources)})" if sources else ""
            raise ValueError(
                f"{word!r} is not a variant ({', '.join(variants)}) or dataset ({', '.join(DATASETS)}){others}"
            )
    return Words(variant, dataset, source)


def refuse_source(words: Words, datasets: tuple[str, ...]) -> None:
    """Raises ValueError if the source in `words` has no recipe for the dataset in `words`."""
    if words.source and words.dataset not in datasets:
        raise ValueError(
            f"{words.source!r} has recipes for {' and '.join(datasets)} only; name such a dataset, or omit the word"
        )


def get_config(dataset: str) -> ConfigDict:
    """The defaults of all settings, with the dataset's own from the table of datasets (segjax/data/specs.py)."""
    config = default_config(dataset)
    config.data.eval_split = DATASETS[dataset].evaluated_split
    if crop := DATASETS[dataset].crop:
        config.augment.crop = crop
    if scenes := DATASETS[dataset].scenes:
        config.data.update(scenes._asdict())
    return config


def mmsegmentation(config: ConfigDict, *, base_size: tuple[int, int], crop: tuple[int, int], batch: int) -> None:
    """The training pipeline of mmsegmentation, shared by the repositories of NVlabs and SegNeXt: 160,000 steps."""
    config.augment.base_size = base_size
    config.augment.crop = crop
    config.augment.cat_max_ratio = 0.75
    config.train.batch = batch
    config.train.steps = 160_000
    config.loss.mean_over = "all"


def sliding_window(config: ConfigDict) -> None:
    """A sliding window of 1024x1024 every 768 pixels, as published for SegFormer and SegNeXt on Cityscapes."""
    config.eval.mode = "slide"
    config.eval.crop = (1024, 1024)
    config.eval.stride = (768, 768)


def unpublished(config: ConfigDict, family: str) -> None:
    """AdamW for data without a published recipe.

    Several settings stay unset, and a run chooses them from its images and its initial weights (segjax/train/unset.py):
    steps, warm-up, learning rates, the crop unless the table of datasets has one, and for a folder the evaluated split.

    Args:
      config: Config to change.
      family: Name of the model, for the description.
    """
    name = config.data.name
    config.recipe = f"no recipe is published for {family} on {'your data' if name == 'folder' else name}"
    config.init.expected = ""
    for key in ("train.steps", "optim.lr", "optim.lr_multipliers", "optim.warmup_steps"):
        unset(config, key)
    if DATASETS[name].crop is None:
        unset(config, "augment.crop")
    if name == "folder":
        unset(config, "data.eval_split")


def crop_in_multiples(config: ConfigDict, multiple: int) -> None:
    """Reduces both sides of the training crop to multiples of `multiple`."""
    if config.augment.crop is not None:
        height, width = config.augment.crop
        config.augment.crop = (height // multiple * multiple, width // multiple * multiple)


def camvid(config: ConfigDict) -> None:
    """CamVid from random weights, which need the same high rate for all parameters."""
    config.recipe = "segjax's own, for random weights"
    config.init.expected = ""
    config.train.steps = 20_000
    _from_scratch(config)


def streets(config: ConfigDict) -> None:
    """Streets from random weights, in minutes on a CPU: an even higher rate and little augmentation."""
    config.recipe = "segjax's own: minutes on a CPU, from random weights"
    config.init.expected = ""
    _from_scratch(config)
    config.train.steps = 800
    config.train.batch = 4
    config.train.log_every = 10
    config.checkpoint.every = 200
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50
    config.augment.scale = (0.75, 1.5)
    config.augment.photometric = False


def _from_scratch(config: ConfigDict) -> None:
    config.optim.lr = 2e-3
    config.optim.lr_multipliers = ()
    config.optim.warmup_steps = 200
