"""Chooses the settings that a recipe leaves unset, from the images and from what the run starts from.

Recipes do so for data that none is published for: a crop that suits the images, a length that suits their number, and
a learning rate for pretrained or for random weights.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from segjax.checkpoints.architectures import family_of
from segjax.data import builders, specs
from segjax.data.records import parts_of
from segjax.train import schema
from segjax.train.config import RunError

# Pixels; crops of the published recipes are 512x512 for images of any size, and 1024x1024 for those of Cityscapes.
LARGEST_CROP = 512
# Sides of a crop are multiples of this, because some models need it and none is hurt.
MULTIPLE = 32
# Published: 430 epochs for the 2975 images of Cityscapes, 127 for the 20,210 of ADE20K.
EPOCHS, LEAST_STEPS, MOST_STEPS = 200, 2_000, 80_000
LR_PRETRAINED, LR_RANDOM = 6e-5, 1e-3
# What a pretrained encoder does not have, by family: a regular expression for names of parameters.
_HRNET = r"^(last_layer|ocr_|conv3x3_ocr|cls_head|aux_head)"
HEADS = {
    **dict.fromkeys(("segformer", "segformer_plain", "segformer_mmseg", "segnext"), "head"),
    "segformer_simple": "to_fused|to_segmentation",
    "segformer_zuppichini": r"^(decoder|head)\.",
    "hrnet": _HRNET,
    "hrnet_ocr": _HRNET,
}
KEYS = ("data.eval_split", "augment.crop", "train.steps", "optim.warmup_steps", "optim.lr", "optim.lr_multipliers")


class Chosen(NamedTuple):
    """The value of a setting, and the reason in a few words."""

    value: Any
    reason: str


def kept(config: ConfigDict, recorded: Mapping[str, Any]) -> ConfigDict:
    """The config of a run that is resumed, in which settings that are unset have the values that it chose at first.

    Args:
      recorded: the config in the metadata of the run, as JSON. The images may have changed since.
    """
    values = schema.flattened(config)
    before = schema.flattened(ConfigDict(schema.in_current_terms(recorded)))
    missing = {key: before[key] for key in KEYS if values[key] is None and before.get(key) is not None}
    if not missing:
        return config
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key: _from_json(value) for key, value in missing.items()})
    return config


def _from_json(value: object) -> object:
    return tuple(map(_from_json, value)) if isinstance(value, list | tuple) else value


def filled(config: ConfigDict) -> tuple[ConfigDict, dict[str, Chosen]]:
    """A config in which every setting has a value, and the settings that were chosen here, by dotted key.

    Raises:
      RunError: no split to evaluate. ValueError: data that cannot be used.
    """
    values = schema.flattened(config)
    missing = [key for key in KEYS if values[key] is None]
    if not missing:
        return config, {}
    config = config.copy_and_resolve_references()
    chosen: dict[str, Chosen] = {}
    data = config.data
    sizes, labelled = np.zeros((0, 2), int), ()
    if not specs.is_generated(data.name):
        prepared = builders.prepare(data.name, source=data.source, data_dir=data.dir)
        labelled = prepared.labelled
        sizes = np.concatenate([prepared.records(part).sizes for part in parts_of(data.train_split)])
    elif {"augment.crop", "train.steps"} & set(missing):
        sizes = np.tile(data.size, (data.train_images, 1))
    for key in missing:
        chosen[key] = _choice(key, config, sizes, labelled)
        config.update_from_flattened_dict({key: chosen[key].value})
    return config, chosen


def _choice(key: str, config: ConfigDict, sizes: np.ndarray, labelled: Collection[str]) -> Chosen:
    if key == "data.eval_split":
        return Chosen(evaluated_split(labelled, config.data), "has labels and is not trained on")
    if key == "augment.crop":
        return Chosen(crop(sizes), f"median size of the images, at most {LARGEST_CROP}, in multiples of {MULTIPLE}")
    if key == "train.steps":
        return Chosen(steps(len(sizes), config.train.batch), f"{EPOCHS} epochs, from {LEAST_STEPS} to {MOST_STEPS}")
    if key == "optim.warmup_steps":
        return Chosen(min(1500, config.train.steps // 10), "a tenth of the steps, at most 1500")
    if key == "optim.lr_multipliers":
        if not config.init.checkpoint:
            return Chosen((), "random weights learn at one rate")
        return Chosen(
            ((HEADS[family_of(config.model.name)], 10.0),), "the head learns faster than a pretrained encoder"
        )
    if config.init.checkpoint:
        return Chosen(LR_PRETRAINED, "for pretrained weights")
    return Chosen(LR_RANDOM, "for random weights")


def crop(sizes: np.ndarray) -> tuple[int, int]:
    """(height, width) of a crop in pixels for images of the sizes (N, 2)."""
    height, width = np.median(sizes, axis=0) if len(sizes) else (LARGEST_CROP, LARGEST_CROP)
    sides = (max(MULTIPLE, min(int(side), LARGEST_CROP) // MULTIPLE * MULTIPLE) for side in (height, width))
    height, width = sides
    return height, width


def steps(images: int, batch: int) -> int:
    """Number of steps for so many images."""
    return min(max(round(EPOCHS * images / batch), LEAST_STEPS), MOST_STEPS)


def evaluated_split(labelled: Collection[str], data: ConfigDict) -> str:
    """The split to evaluate: val, or else test; RunError where neither has labels and is not trained on.

    Args:
      labelled: the splits with labels. data: `config.data`.
    """
    for split in ("val", "test"):
        if split in labelled and split not in parts_of(data.train_split):
            return split
    paths = f"--source {shlex.quote(str(data.source))}" + (f" --data-dir {shlex.quote(data.dir)}" if data.dir else "")
    raise RunError(
        "config.data.eval_split is not set, and no val or test split with labels is left next to "
        f"config.data.train_split={data.train_split}; the splits with labels are {', '.join(sorted(labelled))}. Add "
        "images/val and labels/val; or name a split, such as --config.data.eval_split=train to evaluate on the images "
        "that are trained on; or divide the images once, and train again as now:\n"
        f"  segjax data prepare {data.name} {paths} --val-share 0.2"
    )
