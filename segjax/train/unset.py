"""Chooses the settings that a recipe leaves unset, from the images and the initial weights of the run.

Recipes leave settings unset for data without a published recipe: the crop depends on the sizes of the images, the
length on their number, and the learning rate on pretrained or random weights.
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

# Pixels. Published recipes crop 512x512, whatever the size of the images, and 1024x1024 on Cityscapes.
LARGEST_CROP = 512
# The sides of a crop are multiples of this. Some models need it, and it harms none.
MULTIPLE = 32
# Published: 430 epochs for the 2975 images of Cityscapes, 127 for the 20,210 of ADE20K.
EPOCHS, LEAST_STEPS, MOST_STEPS = 200, 2_000, 80_000
LR_PRETRAINED, LR_RANDOM = 6e-5, 1e-3
# Regular expression by family for the parameters that a pretrained encoder lacks.
_HRNET = r"^(last_layer|ocr_|conv3x3_ocr|cls_head|aux_head)"
HEADS = {
    **dict.fromkeys(("segformer", "segformer_plain", "segformer_mmseg", "segnext"), "head"),
    "segformer_simple": "to_fused|to_segmentation",
    "segformer_zuppichini": r"^(decoder|head)\.",
    "hrnet": _HRNET,
    "hrnet_ocr": _HRNET,
}
KEYS = ("data.eval_split", "augment.crop", "train.steps", "optim.warmup_steps", "optim.lr", "optim.lr_multipliers")
# `lora.with_full` chooses this one, which depends on the initial weights.
OF_WEIGHTS = "lora.full"


class Chosen(NamedTuple):
    """The value of a setting, and its reason in a few words."""

    value: Any
    reason: str


def kept(config: ConfigDict, recorded: Mapping[str, Any]) -> ConfigDict:
    """The config of a resumed run, with the values that the run first chose for unset settings.

    They are not chosen again, because the images may have changed.

    Args:
      config: Config of the run now.
      recorded: Config in the metadata of the run, as JSON.
    """
    values = schema.flattened(config)
    before = schema.flattened(ConfigDict(schema.in_current_terms(recorded)))
    keys = (*KEYS, OF_WEIGHTS)
    missing = {key: before[key] for key in keys if values[key] is None and before.get(key) is not None}
    if not missing:
        return config
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key: _from_json(value) for key, value in missing.items()})
    return config


def _from_json(value: object) -> object:
    return tuple(map(_from_json, value)) if isinstance(value, list | tuple) else value


def filled(config: ConfigDict) -> tuple[ConfigDict, dict[str, Chosen]]:
    """A config with a value for every setting, and the settings that were chosen here, by dotted key.

    Raises:
      RunError: There is no split to evaluate.
      ValueError: The data cannot be used.
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
            return Chosen((), "random weights: the same rate for all parameters")
        return Chosen(
            ((HEADS[family_of(config.model.name)], 10.0),), "the head learns faster than a pretrained encoder"
        )
    if config.init.checkpoint:
        return Chosen(LR_PRETRAINED, "for pretrained weights")
    return Chosen(LR_RANDOM, "for random weights")


def crop(sizes: np.ndarray) -> tuple[int, int]:
    """Height and width of a crop in pixels, for images of the sizes (N, 2)."""
    height, width = np.median(sizes, axis=0) if len(sizes) else (LARGEST_CROP, LARGEST_CROP)
    sides = (max(MULTIPLE, min(int(side), LARGEST_CROP) // MULTIPLE * MULTIPLE) for side in (height, width))
    height, width = sides
    return height, width


def steps(images: int, batch: int) -> int:
    """Number of steps for this number of images."""
    return min(max(round(EPOCHS * images / batch), LEAST_STEPS), MOST_STEPS)


def evaluated_split(labelled: Collection[str], data: ConfigDict) -> str:
    """The split to evaluate: val, or else test, if it has labels and is not trained on.

    Args:
      labelled: The splits with labels.
      data: `config.data`.

    Raises:
      RunError: There is no such split.
    """
    for split in ("val", "test"):
        if split in labelled and split not in parts_of(data.train_split):
            return split
    paths = f"--source {shlex.quote(str(data.source))}" + (f" --data-dir {shlex.quote(data.dir)}" if data.dir else "")
    raise RunError(
        "config.data.eval_split is not set, and there is no val or test split with labels apart from "
        f"config.data.train_split={data.train_split}; the splits with labels are {', '.join(sorted(labelled))}. Add "
        "images/val and labels/val; or name a split, such as --config.data.eval_split=train to evaluate on the images "
        "that are trained on; or divide the images once, with this command, then run the same training again:\n"
        f"  segjax data prepare {data.name} {paths} --val-share 0.2"
    )
