"""Metadata of a checkpoint: the information that prediction needs in addition to the weights.

Metadata is JSON: the item `about` of an orbax folder, or the entry `segjax` in the metadata of a `.safetensors`. Parts:

    model           name, num_classes, overrides, param_dtype: the arguments to build the model
    dataset         name, class_names, colors, ignore_label; "guessed" if they only follow from the number of classes
    normalisation   mean and std of the training images, a number per channel, in the unit of their values
    image_dtype     uint8, uint16 or float32; missing if the training images were 8-bit RGB, or are unknown
    input_size      height and width at which images are evaluated, or null if these vary
    temperature     value, and data on which it was fitted; see `segjax.checkpoints.temperature`
    licence         a note
    provenance      the origin of the weights: source, sha256, dialect, package, verified
    format_version, segjax_version      see `segjax.checkpoints.format_version`

Metadata of other packages is translated into these parts. `Metadata` has their types. `checked_metadata` checks all
metadata from files, so that other code can rely on the types.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax import models
from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.errors import CheckpointError
from segjax.checkpoints.published import PublishedWeights
from segjax.data import specs
from segjax.data.class_lists import CLASS_LISTS, classes_of_dataset
from segjax.runtime.reading import UnreadableError, checked

logger = logging.getLogger("segjax")

IMAGENET = {"mean": list(specs.IMAGENET_MEAN), "std": list(specs.IMAGENET_STD)}
# Parts that stay valid when the weights are written to another file.
LASTING = ("dataset", "normalisation", "image_dtype", "input_size", "temperature", "licence")

_NVIDIA = (
    "NVIDIA's SegFormer and MiT weights, and weights trained from them, are under the NVIDIA Source Code License, "
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


# --------------------------------------------------------------------------------------------------------------- types

# Key of class names by number, from other packages; they are matched when the number of classes is known.
NUMBERED_NAMES = "numbered_names"

Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
Size = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
# Limits within which float32 stays finite.
Mean = Annotated[list[Annotated[FiniteFloat, Field(ge=-1e12, le=1e12)]], Field(min_length=1, max_length=65536)]
Deviation = Annotated[list[Annotated[FiniteFloat, Field(ge=1e-12, le=1e12)]], Field(min_length=1, max_length=65536)]


class Normalisation(TypedDict):
    """Mean and standard deviation of each channel, in the unit of the images (0..255 for RGB)."""

    mean: Mean
    std: Deviation


class Dataset(TypedDict):
    name: str
    class_names: Annotated[list[str], Field(min_length=1, max_length=specs.LARGEST_LABEL)]
    colors: list[Colour]
    ignore_label: Annotated[int, Field(ge=0, le=specs.LARGEST_LABEL)]
    guessed: NotRequired[bool]


class Temperature(TypedDict):
    """Divisor of the logits, the data on which it was fitted, and the NLL there in nats, before and after."""

    value: Annotated[FiniteFloat, Field(ge=1e-3, le=1e3)]
    data: NotRequired[str]
    nll_before: NotRequired[FiniteFloat]
    nll: NotRequired[FiniteFloat]


class Model(TypedDict):
    """Arguments to build the model; `_refuse_settings` checks the settings."""

    name: NotRequired[str]
    num_classes: NotRequired[Annotated[int, Field(ge=1, le=65536)]]
    overrides: NotRequired[dict[str, Any]]
    param_dtype: NotRequired[Literal["float64", "float32", "float16", "bfloat16"]]


class _Augment(TypedDict):
    crop: NotRequired[Size | None]


class _Config(TypedDict):
    """The part of a run's config that prediction reads."""

    augment: NotRequired[_Augment]


class Metadata(TypedDict):
    """Types of the metadata; training checks the further keys of runs."""

    model: NotRequired[Model | None]
    dataset: NotRequired[Dataset | None]
    normalisation: NotRequired[Normalisation | None]
    image_dtype: NotRequired[Literal["uint8", "uint16", "float32"] | None]
    input_size: NotRequired[Size | None]
    temperature: NotRequired[Temperature | None]
    config: NotRequired[_Config | None]
    step: NotRequired[int]
    mean_iou: NotRequired[float | None]
    sha256: NotRequired[str]


class _Verified(TypedDict):
    against: str
    error: float


class Provenance(TypedDict):
    source: NotRequired[str]
    sha256: NotRequired[str]
    weights: NotRequired[str]
    step: NotRequired[int]
    package: NotRequired[str]
    dialect: NotRequired[str]
    verified: NotRequired[_Verified]
    made_from: NotRequired[Provenance]
    initial_weights: NotRequired[Provenance | None]


class _Origin(TypedDict):
    provenance: NotRequired[Provenance]


class _Licence(TypedDict):
    licence: NotRequired[str]


def checked_metadata(content: Mapping[str, Any], *, name: object) -> dict[str, Any]:
    """Checks the types of metadata from a file; drops parts that are None, and replaces text that UTF-8 cannot encode.

    A damaged provenance or licence is omitted and logged, because nothing depends on them.

    Raises:
      UnreadableError: A part has another type or an invalid value, or contradicts another part; the message begins with
        `name` and has the key.
    """
    try:
        metadata = {key: value for key, value in _as_utf8(content).items() if value is not None}
    except RecursionError:
        raise UnreadableError(f"{name}: nested too deeply") from None
    checked(metadata, Metadata, name=name)
    if "normalisation" in metadata:
        checked_normalisation(metadata["normalisation"], name=f"{name}: normalisation", key="normalisation.")
    for key, type_ in (("provenance", _Origin), ("licence", _Licence)):
        try:
            checked(metadata, type_, name=name)
        except UnreadableError as error:
            logger.info("%s; the %s is not used", error, key)
            del metadata[key]
    if "dataset" in metadata:
        _refuse_dataset(metadata["dataset"], name)
    if "model" in metadata:
        _refuse_settings(metadata["model"], name)
    return metadata


def checked_normalisation(content: Mapping[str, Any], *, name: object, key: str = "") -> Any:
    """Checks a normalisation from a file; `key` precedes "mean" and "std" in messages.

    Raises:
      UnreadableError: Types are wrong, or the numbers of means and deviations differ; the message begins with `name`.
    """
    checked(content, Normalisation, name=name)
    means, deviations = len(content["mean"]), len(content["std"])
    if means != deviations:
        raise UnreadableError(f"{name}: {key}mean has {means} numbers and {key}std {deviations}; they must agree")
    return content


def _as_utf8(content: Any) -> Any:
    """JSON with lone surrogates, which UTF-8 cannot encode, replaced."""
    if isinstance(content, str):
        return content.encode("utf-8", "replace").decode() if not content.isascii() else content
    if isinstance(content, Mapping):
        return {_as_utf8(key): _as_utf8(value) for key, value in content.items()}
    return [_as_utf8(value) for value in content] if isinstance(content, list) else content


def _refuse_dataset(dataset: Mapping, name: object) -> None:
    try:
        _spec_of(dataset)
    except ValueError as error:
        raise UnreadableError(f"{name}: dataset: {error}") from None


def _refuse_settings(model: Mapping, name: object) -> None:
    """Raises UnreadableError for settings that the model does not have, or values that it does not accept."""
    if "name" not in model:
        return
    place = f"{name}: model"
    if model["name"] not in models.MODELS:
        raise UnreadableError(f"{place}.name {model['name']!r} is not a model of segjax: {', '.join(models.MODELS)}")
    known = models.settings(model["name"])
    for key, value in model.get("overrides", {}).items():
        if key not in known:
            raise UnreadableError(f"{place}.overrides: {model['name']} has no setting {key!r}")
        if must_be := models.problem_of(model["name"], key, value):
            raise UnreadableError(f"{place}.overrides.{key} should be {must_be}; not {value!r:.60}")


# ------------------------------------------------------------------------------------------------------------- classes


def dataset_metadata(spec: specs.DatasetSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "class_names": list(spec.class_names),
        "colors": [list(color) for color in spec.colors],
        "ignore_label": spec.ignore_label,
    }


def classes_of(metadata: Mapping, num_classes: int) -> specs.DatasetSpec:
    """The classes in the metadata; if it names none, they are named by their numbers.

    Raises:
      CheckpointError: There are more classes than 16-bit labels, or the metadata contradicts itself.
    """
    dataset = metadata.get("dataset")
    if not dataset and num_classes > specs.LARGEST_LABEL:
        raise CheckpointError(
            f"the classes of this checkpoint cannot be used: there are {num_classes:,}, and 16-bit labels have room "
            f"for {specs.LARGEST_LABEL:,}"
        )
    try:
        return _spec_of(dataset or _unnamed(num_classes))
    except ValueError as error:
        raise CheckpointError(f"the classes of this checkpoint cannot be used: {error}") from None


def _spec_of(dataset: Mapping) -> specs.DatasetSpec:
    colors = tuple(tuple(color) for color in dataset["colors"])
    return specs.DatasetSpec(dataset["name"], tuple(dataset["class_names"]), colors, dataset["ignore_label"])


def _unnamed(num_classes: int) -> dict[str, Any]:
    names = [f"class {number}" for number in range(num_classes)]
    ignore_label = specs.default_ignore_label(num_classes)
    return {"name": "unknown", "class_names": names, "colors": _palette(num_classes), "ignore_label": ignore_label}


def _palette(num_classes: int) -> list[list[int]]:
    return [list(color) for color in specs.distinct_colors(num_classes)]


def guessed(num_classes: int) -> dict[str, Any]:
    """{"dataset": ...} of the known dataset with this number of classes; {} if there is none."""
    spec = specs.guess(num_classes)
    return {"dataset": dataset_metadata(spec) | {"guessed": True}} if spec else {}


def of_names(
    names: Sequence[str], *, colors: Sequence | None = None, ignore_label: int | None = None
) -> dict[str, Any]:
    """{"dataset": ...} of class names, with name and colours of the known dataset that shares most of them.

    {} if the classes do not fit into 16 bits, or a name is not a string.
    """
    names = [_as_utf8(name) for name in names]
    if not 0 < len(names) <= specs.LARGEST_LABEL or not all(isinstance(name, str) for name in names):
        if names:
            logger.info("its %d class names are not used: they are not text, or do not fit into 16 bits", len(names))
        return {}
    candidates = [spec for spec in (specs.guess(len(names)), *CLASS_LISTS.values()) if spec]
    known = next((spec for spec in candidates if _has_most(names, spec.class_names)), None)
    dataset = (
        dataset_metadata(known)
        if known
        else {"name": "unknown", "ignore_label": specs.default_ignore_label(len(names))}
    )
    dataset["class_names"] = names
    dataset["colors"] = _colors(colors, len(names)) or dataset.get("colors") or _palette(len(names))
    # Other values, such as -100 or 0, cannot be ignore labels; the file then has none.
    if isinstance(ignore_label, int) and max(len(names), 2) <= ignore_label <= specs.LARGEST_LABEL:
        dataset["ignore_label"] = ignore_label
    return {"dataset": dataset}


def _has_most(names: Sequence[str], known: Sequence[str]) -> bool:
    """Whether more than half of the names equal the known ones, in the same order, and their numbers are equal."""
    same = sum(a.lower() == b for a, b in zip(names, known, strict=False))
    return len(names) == len(known) and 2 * same > len(names)


def matched(numbered: Mapping[int, str], num_classes: int) -> list[str] | None:
    """Names of all classes from names by number; logs numbers that do not fit, and returns None if none can be used."""
    numbers = sorted(numbered)
    place = "id2label in config.json"
    if numbers == list(range(num_classes)):
        return [numbered[number] for number in numbers]
    if numbers == list(range(1, num_classes + 1)):
        logger.info("note: %s counts from 1; its names are those of classes 0 to %d", place, num_classes - 1)
        return [numbered[number] for number in numbers]
    shown = ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
    if len(numbers) < num_classes and numbers[0] >= 0 and numbers[-1] < num_classes:
        logger.info("note: %s names %d of %d classes (%s)", place, len(numbers), num_classes, shown)
        return [numbered.get(number, f"class {number}") for number in range(num_classes)]
    logger.info("note: %s names classes %s, and the model has %d; its names are not used", place, shown, num_classes)
    return None


def _colors(colors: object, count: int) -> list[list[int]] | None:
    try:
        array = np.asarray(colors)
        return array.astype(np.uint8).tolist() if array.shape == (count, 3) else None
    except (TypeError, ValueError):
        return None


def of_mmseg(loaded: object, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Metadata from a file of mmsegmentation.

    `meta` has CLASSES and PALETTE; since version 1.0, its `dataset_meta` has them in lower case. Mean and standard
    deviation come from the preprocessor if they were saved.
    """
    translated = {}
    meta = loaded.get("meta") if isinstance(loaded, Mapping) else None
    if isinstance(meta, Mapping):
        meta = meta["dataset_meta"] if isinstance(meta.get("dataset_meta"), Mapping) else meta
        found = {key.lower(): value for key, value in meta.items() if isinstance(key, str)}
        if isinstance(found.get("classes"), list | tuple):
            translated |= of_names(found["classes"], colors=found.get("palette"))
    place = "data_preprocessor"
    found = {key: value for key in ("mean", "std") if (value := weights.get(f"{place}.{key}")) is not None}
    if found:
        normalisation = {key: value.astype(np.float64).ravel().tolist() for key, value in found.items()}
        try:
            translated["normalisation"] = checked_normalisation(normalisation, name=f"its normalisation, {place}")
        except UnreadableError as error:
            raise CheckpointError(str(error)) from None
    return translated


def licence_of(name: str) -> str:
    """Note on the licence of weights from other sources, by the name of their model."""
    published = _LICENCES.get(family_of(name))
    return "that of the source" + (f"; {published}" if published else "")


def with_published(metadata: Mapping[str, Any], row: PublishedWeights) -> dict[str, Any]:
    """Metadata of published weights: that of their file, completed from the table.

    The table's settings take precedence, because the published figures were measured with them. The file's class names
    take precedence over the table's.
    """
    model = metadata.get("model") or {}
    model = {**model, "overrides": {**model.get("overrides", {}), **row.settings}}
    known = {**metadata, "model": model, "licence": row.licence}
    if row.dataset and not metadata.keys() & {"dataset", NUMBERED_NAMES}:
        known["dataset"] = dataset_metadata(classes_of_dataset(row.dataset))
    return known


def completed(metadata: Mapping, *, channels: int) -> dict[str, Any]:
    """Adds defaults for parts that older files and other packages lack: `default_normalisation`, and no input size.

    Args:
      metadata: Metadata of a checkpoint.
      channels: Number of channels that the model takes.

    Raises:
      CheckpointError: The normalisation has another number of channels.
    """
    known = {key: value for key, value in metadata.items() if value is not None}
    known = {"normalisation": default_normalisation(channels), "input_size": None, **known}
    numbers = len(known["normalisation"]["mean"])
    if numbers != channels:
        raise CheckpointError(
            f"it contradicts itself: its normalisation has {numbers} numbers in mean and std, and its model takes "
            f"images of {specs.ImageKind(channels, None)}"
        )
    return known


def default_normalisation(channels: int) -> dict[str, list[float]]:
    """ImageNet's normalisation for three channels; for other numbers, mean 0 and deviation 1, which change nothing."""
    return IMAGENET if channels == 3 else {"mean": [0.0] * channels, "std": [1.0] * channels}


def carried(metadata: Mapping, provenance: Mapping) -> dict[str, Any]:
    """Metadata for a file that is written from a checkpoint with this metadata and provenance."""
    return {key: metadata[key] for key in LASTING if key in metadata} | {"provenance": dict(provenance)}
