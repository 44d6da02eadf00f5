"""Metadata of a checkpoint: what predicting needs to know in addition to the weights.

It is JSON: the item `about` of an orbax folder, the entry `segjax` in the metadata of a `.safetensors`. Its parts:

    model           name, num_classes, overrides, param_dtype: how to build it
    dataset         name, class_names, colors, ignore_label; "guessed" where all of it follows from a number of classes
    normalisation   mean and std of the training images, RGB in 0..255
    input_size      height and width of the training crops, or null
    licence         a note
    provenance      the origin of the weights: source, sha256, dialect, package, verified
    format_version, segjax_version      see `segjax.checkpoints.format_version`

Metadata of other packages is translated into these parts.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.data import specs

IMAGENET = {"mean": list(specs.IMAGENET_MEAN), "std": list(specs.IMAGENET_STD)}
# Parts that remain true when the weights are written to another file.
LASTING = ("dataset", "normalisation", "input_size", "licence")

_NVIDIA = (
    "NVIDIA's SegFormer and MiT weights, and what was trained from them, are under the NVIDIA Source Code License, "
    "non-commercial"
)
_HRNET = "the weights that HRNet's authors publish are under the MIT licence"
_LICENCES = {
    "segformer": _NVIDIA,
    "segformer_plain": _NVIDIA,
    "segformer_mmseg": _NVIDIA,
    "hrnet": _HRNET,
    "hrnet_ocr": _HRNET,
    "segnext": "SegNeXt's authors publish theirs under Apache-2.0 and ask to be contacted for commercial use",
}


def dataset_metadata(spec: specs.DatasetSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "class_names": list(spec.class_names),
        "colors": [list(color) for color in spec.colors],
        "ignore_label": spec.ignore_label,
    }


def classes_of(metadata: Mapping, num_classes: int) -> specs.DatasetSpec:
    """The classes that metadata names; where it names none, they are called by their numbers.

    Raises:
      CheckpointError: more classes than an 8-bit label can hold, or metadata that contradicts itself.
    """
    try:
        dataset = metadata.get("dataset") or _unnamed(num_classes)
        colors = tuple(tuple(color) for color in dataset["colors"])
        return specs.DatasetSpec(dataset["name"], tuple(dataset["class_names"]), colors, dataset["ignore_label"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the classes of this checkpoint cannot be used: {error}") from None


def _unnamed(num_classes: int) -> dict[str, Any]:
    names = [f"class {number}" for number in range(num_classes)]
    return {"name": "unknown", "class_names": names, "colors": _palette(num_classes), "ignore_label": 255}


def _palette(num_classes: int) -> list[list[int]]:
    """Distinct colours: hues by the golden ratio, three brightnesses."""
    return [
        [round(255 * part) for part in colorsys.hsv_to_rgb(0.618033988749895 * k % 1, 0.75, (1.0, 0.8, 0.6)[k % 3])]
        for k in range(num_classes)
    ]


def guessed(num_classes: int) -> dict[str, Any]:
    """{"dataset": ...} of the known dataset with this number of classes; {} where there is none."""
    spec = specs.guess(num_classes)
    return {"dataset": dataset_metadata(spec) | {"guessed": True}} if spec else {}


def of_names(
    names: Sequence[str], *, colors: Sequence | None = None, ignore_label: int | None = None
) -> dict[str, Any]:
    """{"dataset": ...} of class names, with name and colours of the known dataset that has most of them.

    {} where the classes do not fit into 8 bits, or a name is no string.
    """
    names = list(names)
    if not 0 < len(names) < 255 or not all(isinstance(name, str) for name in names):
        return {}
    known = specs.guess(len(names))
    if known and 2 * sum(a.lower() == b for a, b in zip(names, known.class_names, strict=True)) <= len(names):
        known = None
    dataset = dataset_metadata(known) if known else {"name": "unknown", "ignore_label": 255}
    dataset["class_names"] = names
    dataset["colors"] = _colors(colors, len(names)) or dataset.get("colors") or _palette(len(names))
    # Other values, such as -100 or 0, are no label that could be ignored: the file has none.
    if isinstance(ignore_label, int) and max(len(names), 2) <= ignore_label <= 255:
        dataset["ignore_label"] = ignore_label
    return {"dataset": dataset}


def _colors(colors: object, count: int) -> list[list[int]] | None:
    try:
        array = np.asarray(colors)
        return array.astype(np.uint8).tolist() if array.shape == (count, 3) else None
    except (TypeError, ValueError):
        return None


def of_mmseg(loaded: object, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Metadata from a file of mmsegmentation: `meta` with CLASSES and PALETTE, from 1.0 on in its `dataset_meta` in
    lower case; and mean and standard deviation of its preprocessor, where they were saved."""
    translated = {}
    meta = loaded.get("meta") if isinstance(loaded, Mapping) else None
    if isinstance(meta, Mapping):
        meta = meta["dataset_meta"] if isinstance(meta.get("dataset_meta"), Mapping) else meta
        found = {key.lower(): value for key, value in meta.items() if isinstance(key, str)}
        if isinstance(found.get("classes"), list | tuple):
            translated |= of_names(found["classes"], colors=found.get("palette"))
    mean, std = (weights.get(f"data_preprocessor.{name}") for name in ("mean", "std"))
    if mean is not None and std is not None and mean.size == std.size == 3:
        translated["normalisation"] = {"mean": mean.ravel().tolist(), "std": std.ravel().tolist()}
    return translated


def licence_of(name: str) -> str:
    """A note for weights from elsewhere, by the name of their model."""
    published = _LICENCES.get(family_of(name))
    return "that of the source" + (f"; {published}" if published else "")


def completed(metadata: Mapping) -> dict[str, Any]:
    """Metadata with defaults for parts that older files and other packages lack: ImageNet's normalisation, and the crop
    in the config of a run."""
    size = metadata.get("config", {}).get("augment", {}).get("crop")
    known = {key: value for key, value in metadata.items() if value is not None}
    return {"normalisation": IMAGENET, "input_size": size, **known}


def carried(metadata: Mapping, provenance: Mapping) -> dict[str, Any]:
    """The metadata of a file that is written from a checkpoint with `metadata`, which is called `provenance`."""
    return {key: metadata[key] for key in LASTING if key in metadata} | {"provenance": dict(provenance)}
