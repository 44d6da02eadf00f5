"""Opens exported files as models with classes and normalisation: segjax's own, and those that other packages wrote.

What a file takes and gives is read from its metadata and its graph, and from a trial run where a graph leaves sides
open. Other packages write no metadata: `FILE.json` next to it, in the form of segjax's, or the config.json and
preprocessor_config.json of transformers, may have it; else the caller names what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.checkpoints import huggingface, metadata
from segjax.checkpoints.errors import CheckpointError
from segjax.checkpoints.format_version import refuse_newer
from segjax.checkpoints.load import LoadedCheckpoint, as_loaded
from segjax.checkpoints.metadata import Colour, Deviation, Mean
from segjax.checkpoints.state_dict import logger
from segjax.inference.engine import Protocol
from segjax.inference.exported_model import ExportedModel
from segjax.inference.runtimes import SUFFIXES, Runnable, exported_path, files_of, metadata_path, open_file
from segjax.models.segmentation_model import ModelSpec, SegmentationModel
from segjax.runtime.reading import UnreadableError, checked, read_json, sha256_of, user_path

Loaded = LoadedCheckpoint[SegmentationModel] | LoadedCheckpoint[ExportedModel]

# Sides of the images of a trial run, where a file takes any; not square, to tell height from width.
_TRIAL = (128, 192)


class _Normalisation(TypedDict):
    mean: Mean
    std: Deviation
    dtype: NotRequired[str]
    inside: NotRequired[bool]


class Evaluated(TypedDict):
    """The evaluation of the run that a file was exported from."""

    mean_iou: Annotated[FiniteFloat, Field(ge=0, le=1)]
    data: str
    protocol: dict[str, Any]
    step: NotRequired[int | None]


class _About(TypedDict):
    """Metadata of an exported file; see `segjax.exports.export.file_metadata`. Any part may be missing."""

    model: NotRequired[str]
    dataset: NotRequired[str]
    guessed: NotRequired[bool]
    classes: NotRequired[Annotated[list[str], Field(min_length=1)]]
    colors: NotRequired[list[Colour]]
    ignore_label: NotRequired[int]
    normalisation: NotRequired[_Normalisation]
    size_multiple: NotRequired[Annotated[int, Field(ge=1, le=4096)]]
    align_corners: NotRequired[bool]
    output: NotRequired[Literal["logits", "probabilities", "labels"]]
    threshold: NotRequired[Annotated[float, Field(gt=0, lt=1)]]
    evaluated: NotRequired[Evaluated]
    sha256: NotRequired[str]


def is_exported(source: object) -> bool:
    """Whether a source is the path of an exported file."""
    return exported_path(source) is not None


def opened(
    source: str | Path | Loaded | SegmentationModel,
    *,
    weights: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reference: Loaded | None = None,
) -> Loaded:
    """`as_loaded`, and `open_exported` for the path of an exported file."""
    if isinstance(source, LoadedCheckpoint):
        return source
    path = exported_path(source)
    if path is not None:
        if weights is not None:
            raise CheckpointError(f"{path}: an exported file holds one set of weights; omit --weights {weights}")
        return open_exported(path, mean=mean, std=std, reference=reference)
    if mean is not None or std is not None:
        raise ValueError("mean and std are for exported files: a checkpoint has its own; omit them")
    return as_loaded(source, weights=weights)


def open_exported(
    path: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reference: str | Path | Loaded | None = None,
) -> LoadedCheckpoint[ExportedModel]:
    """Open an exported file, so that `segjax.evaluate_dataset` and `segjax.Predictor` take it as a checkpoint.

    Args:
      path: `*.onnx`, `*.xml` of OpenVINO, `*.stablehlo`, `*.pt2` or `*.tflite`, of segjax or of another exporter. The
        package that runs it must be installed.
      mean: Mean with which images are normalised before the file gets them, a number per channel in the unit of their
        values (RGB in 0..255), for a file that does not say. For a file that takes values as they are: 0, with `std` 1;
        for one that takes 0..1: 0 and 255.
      std: Standard deviation of that normalisation.
      reference: Checkpoint from which the file was made, argument or result of `segjax.load`. It has the normalisation,
        the classes and `align_corners` of a file that does not say.

    Returns:
      The file's model, which takes images of the file's sizes, with its classes, normalisation and metadata.

    Raises:
      CheckpointError: The package is missing, the file is no segmentation model, or something remains unknown; the
        message says how to tell it.
      OSError: The file does not exist or may not be read.

    Example:
      >>> import pathlib, tempfile
      >>> import segjax
      >>> model = segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.stablehlo"
      >>> segjax.export_model(model, path, size=(64, 96))
      >>> segjax.open_exported(path).model.size
      (64, 96)
    """
    path = user_path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path}: an exported file is named *{', *'.join(SUFFIXES)}")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file")
    reference = None if reference is None else opened(reference)
    try:
        beside = _beside(path)
        runnable = open_file(path)
        about = _about(path, runnable, beside)
        known = _known(path, about, reference)
    except UnreadableError as error:
        raise CheckpointError(str(error)) from None
    values, normalises = _normalisation(path, runnable, about, known, mean, std)
    model = _model(path, runnable, about, values, normalises, reference)
    count = model.spec.num_classes
    known |= {"normalisation": values} | _dataset(path, about, known.pop("dataset", None), count)
    if "evaluated" in about:
        known["evaluated"] = about["evaluated"]
    provenance = {"source": path.name}
    return LoadedCheckpoint(model, metadata.classes_of(known, count), known, model.mean, model.std, provenance)


# ------------------------------------------------------------------------------------------------------------ metadata


def _beside(path: Path) -> dict[str, Any]:
    """The metadata next to a file; {} if there are none.

    Raises:
      CheckpointError: They are of another file, as their hash shows.
      UnreadableError: They are damaged.
    """
    place = metadata_path(path)
    if not place.exists():
        return {}
    content = read_json(place)
    refuse_newer(content, place)
    checked(content, _About, name=place)
    files = files_of(path)
    if "sha256" in content and path.suffix.lower() == ".xml" and len(files) < 2:
        raise CheckpointError(f"{path}: {path.with_suffix('.bin').name}, its weights, is not next to it; copy it too")
    if "sha256" in content and content["sha256"] != sha256_of(files):
        weights = f" with the weights in {files[1].name}" if len(files) > 1 else ""
        raise CheckpointError(
            f"{path}: is not the file{weights} that {place.name} describes, by its SHA-256: one of the "
            f"{'three' if weights else 'two'} is damaged or was replaced; export the model again, or copy the files "
            "again"
        )
    return content


def _about(path: Path, runnable: Runnable, beside: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata in a file and those next to it, which have precedence."""
    # Files of other packages may have entries of the same names.
    about = dict(runnable.metadata) if "segjax_version" in runnable.metadata else {}
    about |= beside
    place = metadata_path(path) if beside else path
    refuse_newer(about, place)
    checked(about, _About, name=place)
    if "normalisation" in about:
        own = about["normalisation"]
        metadata.checked_normalisation({key: own[key] for key in ("mean", "std")}, name=f"{place}: normalisation")
    return about


def _known(path: Path, about: Mapping[str, Any], reference: Loaded | None) -> dict[str, Any]:
    """Classes, normalisation and image dtype, in the terms of a checkpoint's metadata, as far as they are known."""
    known: dict[str, Any] = {}
    if reference is not None:
        known |= {key: reference.metadata[key] for key in ("dataset", "image_dtype") if key in reference.metadata}
        known["normalisation"] = {"mean": list(reference.mean), "std": list(reference.std)}
    if not about:
        known |= huggingface.names_and_normalisation(path.parent)
    if "normalisation" in about:
        own = about["normalisation"]
        known["normalisation"] = {key: own[key] for key in ("mean", "std")}
        if own.get("dtype", "unknown") != "unknown":
            known["image_dtype"] = own["dtype"]
    return metadata.checked_metadata(known, name=path)


def _dataset(path: Path, about: Mapping[str, Any], other: Mapping | None, count: int) -> dict[str, Any]:
    """{"dataset": ...} of the names in a file's metadata, or of those known from elsewhere; else a guess, or {}."""
    names, colors = about.get("classes", []), about.get("colors")
    if count == 1 and len(names) == 2:
        # Names by label value: the background comes before the only class.
        names, colors = names[1:], colors[1:] if colors else None
    if names and len(names) != count:
        raise CheckpointError(f"{path}: its metadata name {len(names)} classes, and its output has {count}")
    if not names or names == [f"class {number}" for number in range(count)]:
        if other and len(other["class_names"]) == count:
            return {"dataset": dict(other)}
        if other:
            logger.info("%d class names are not used: %s has %d classes", len(other["class_names"]), path.name, count)
        return metadata.guessed(count)
    found = metadata.of_names(names, colors=colors, ignore_label=about.get("ignore_label"))
    if found:
        found["dataset"]["name"] = about.get("dataset", found["dataset"]["name"])
        found["dataset"] |= {"guessed": True} if about.get("guessed") else {}
    return found


def _normalisation(
    path: Path,
    runnable: Runnable,
    about: Mapping[str, Any],
    known: Mapping[str, Any],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[dict[str, list[float]], bool]:
    """Mean and deviation, and whether the file itself normalises with them."""
    if (mean is None) != (std is None):
        raise CheckpointError(f"{path}: mean and std belong together; give both")
    if mean is not None and std is not None:
        given = {"mean": list(map(float, mean)), "std": list(map(float, std))}
        try:
            metadata.checked_normalisation(given, name="the normalisation that was given")
        except UnreadableError as error:
            raise CheckpointError(str(error)) from None
        # Of integers, the file itself normalises: a mean is only the colour of its padding.
        return given, runnable.dtype.kind in "ui"
    if "normalisation" in about:
        return known["normalisation"], about["normalisation"].get("inside", False)
    if runnable.dtype.kind in "ui":
        # Normalised images are no integers.
        return known.get("normalisation", metadata.IMAGENET), True
    if "normalisation" not in known:
        raise CheckpointError(
            f"{path}: does not say how its images are normalised. Give --mean and --std, in units of 0..255: "
            "123.675 116.28 103.53 and 58.395 57.12 57.375 are ImageNet's, which most models take; 0 0 0 and 1 1 1 for "
            "a file that takes images as they are; or --reference CHECKPOINT, from which it was made"
        )
    logger.info("%s does not say how its images are normalised: as %s", path.name, _source_of(path, about))
    return known["normalisation"], False


def _source_of(path: Path, about: Mapping[str, Any]) -> str:
    return (
        huggingface.PREPROCESSOR if not about and (path.parent / huggingface.PREPROCESSOR).exists() else "the reference"
    )


# ----------------------------------------------------------------------------------------------------- its computation


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The output of a file for one image: its name, dtype and values, and whether the scores are in the last axis."""

    name: str
    values: np.ndarray
    kind: str
    scores_last: bool


def _model(
    path: Path,
    runnable: Runnable,
    about: Mapping[str, Any],
    normalisation: Mapping[str, list[float]],
    normalises: bool,
    reference: Loaded | None,
) -> ExportedModel:
    channels = len(normalisation["mean"])
    multiple = about.get("size_multiple") or (1 if reference is None else reference.model.size_multiple)
    placeholder = ModelSpec(about.get("model", path.stem), 1, ())
    found: list[tuple[ExportedModel, _Trial]] = []
    problems = []
    for channels_last in _layouts(path, runnable, channels):
        model = ExportedModel(
            path,
            runnable,
            placeholder,
            output="logits",
            mean=tuple(normalisation["mean"]),
            std=tuple(normalisation["std"]),
            normalises=normalises,
            channels_last=channels_last,
            scores_last=channels_last,
            output_name="",
            size_multiple=multiple,
        )
        try:
            found.append((model, _trial(model, _counts(about, reference))))
        except (CheckpointError, ValueError) as error:
            problems.append(str(error))
    if not found:
        raise CheckpointError(f"{path}: {problems[0].removeprefix(f'{path.name} ')}")
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: takes images both as (B, C, H, W) and as (B, H, W, C); export it with {channels} channels fixed"
        )
    ((model, trial),) = found
    return _described(model, trial, about, reference)


def _layouts(path: Path, runnable: Runnable, channels: int) -> list[bool]:
    """Whether channels may be in the last axis of the images, in the order to try."""
    if len(runnable.shape) != 4:
        raise CheckpointError(f"{path}: takes an input of shape {_shown(runnable.shape)}, which is no batch of images")
    if runnable.dtype.kind not in "uif":
        raise CheckpointError(f"{path}: takes an input of {runnable.dtype}, which is no batch of images")
    sides = {False: runnable.shape[1], True: runnable.shape[3]}
    exact = [last for last, side in sides.items() if side == channels]
    # With both sides open, a trial tells.
    possible = exact or [last for last, side in sides.items() if side is None and set(sides.values()) == {None}]
    if not possible:
        raise CheckpointError(
            f"{path}: takes images of shape {_shown(runnable.shape)}, and the normalisation is that of {channels} "
            f"channel{'s' * (channels > 1)}; give --mean and --std with a number for each channel"
        )
    if len(possible) > 1 and exact:
        raise CheckpointError(f"{path}: {_shown(runnable.shape)} may be (B, C, H, W) and (B, H, W, C)")
    return possible


def _shown(shape: Iterable[int | None]) -> str:
    return f"({', '.join('any' if side is None else str(side) for side in shape)})"


def _counts(about: Mapping[str, Any], reference: Loaded | None) -> set[int]:
    """Numbers of classes that a file may have; empty if nothing names them."""
    if reference is not None:
        return {reference.model.spec.num_classes}
    names = about.get("classes", ())
    # Of two names, the first may be that of the background of a model of one class.
    return {1, 2} if len(names) == 2 else {len(names)} - {0}


def _trial(model: ExportedModel, counts: set[int]) -> _Trial:
    """Runs the file once, on noise. `counts` decide which axis has the classes where the shape leaves it open."""
    size = model.size or _TRIAL
    noise = np.random.default_rng(0).integers(0, 256, (1, *size, model.in_channels), dtype=np.uint8)
    given, padded = model.input_of(noise)
    if model.runnable.shape[0]:
        given = np.repeat(given, model.runnable.shape[0], axis=0)
    outputs = model._outputs(given)
    name = _chosen(outputs, model.path)
    values = outputs[name]
    shape = _shown(values.shape)
    if values.dtype.kind in "uib" and values.ndim == 3:
        return _Trial(name, values, "labels", model.channels_last)
    if values.dtype.kind in "uib" and values.ndim == 4 and 1 in (values.shape[1], values.shape[3]):
        return _Trial(name, values, "labels", values.shape[3] == 1)
    if values.dtype.kind != "f" or values.ndim != 4:
        raise CheckpointError(
            f"{model.path.name} gives {values.dtype} {shape} for images of {padded[0]}x{padded[1]}: neither scores "
            "(B, K, h, w) or (B, h, w, K) nor labels (B, h, w) of integers"
        )
    fits = {last: _is_scaled(values.shape[1:3] if last else values.shape[2:4], padded) for last in (True, False)}
    if not any(fits.values()):
        raise CheckpointError(
            f"{model.path.name} gives {shape} for images of {padded[0]}x{padded[1]}: no map of scores"
        )
    if fits[True] and fits[False] and counts:
        fits = {last: values.shape[3 if last else 1] in counts for last in (True, False)}
    scores_last = fits[True] if fits[True] != fits[False] else model.channels_last
    return _Trial(name, values, "logits", scores_last)


def _chosen(outputs: Mapping[str, np.ndarray], path: Path) -> str:
    """The name of the output that is read."""
    named = [name for name in outputs if name in ("logits", "labels")]
    maps = [name for name, values in outputs.items() if values.ndim in (3, 4)]
    for names in (named, list(outputs), maps):
        if len(names) == 1:
            return names[0]
    given = ", ".join(f"{name} {_shown(values.shape)}" for name, values in outputs.items())
    raise CheckpointError(f"{path.name} gives {len(outputs)} outputs ({given}); export one, or one called `logits`")


def _is_scaled(small: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether a map has the proportions of images of `size`, up to rounding, at a whole or a larger stride."""
    strides = [side / part for side, part in zip(size, small, strict=True)]
    return min(strides) > 0.99 and all(
        abs(size[axis] / strides[1 - axis] - small[axis]) < 1.01 * max(1, 1 / strides[1 - axis]) for axis in (0, 1)
    )


def _described(
    model: ExportedModel, trial: _Trial, about: Mapping[str, Any], reference: Loaded | None
) -> ExportedModel:
    """The model with what its output is known to mean."""
    names = about.get("classes")
    if trial.kind == "labels":
        count = reference and reference.model.spec.num_classes
        if names:
            # Of two names the first is that of the background, if there is a threshold.
            count = 1 if len(names) == 2 and "threshold" in about else len(names)
        if not count:
            raise CheckpointError(
                f"{model.path}: gives labels, and does not say of how many classes. Give --reference CHECKPOINT, from "
                f"which it was made, or write their names to {metadata_path(model.path).name}: "
                '{"classes": ["road", ...]}'
            )
    else:
        count = trial.values.shape[3 if trial.scores_last else 1]
    if reference is not None and count != (of_reference := reference.model.spec.num_classes):
        raise CheckpointError(f"{model.path}: has {count} classes, and its reference has {of_reference}")
    output = about.get("output") or ("labels" if trial.kind == "labels" else _kind_of_scores(trial))
    if (output == "labels") != (trial.kind == "labels"):
        raise CheckpointError(f"{model.path}: its metadata say that it gives {output}, and it gives {trial.kind}")
    if output == "probabilities" and "output" not in about:
        logger.info("%s gives probabilities, by their values", model.path.name)
    align_corners = about.get("align_corners")
    if align_corners is None:
        align_corners = reference is not None and reference.model.align_corners
        if reference is None and output != "labels":
            logger.info("%s does not say how to enlarge its scores: align_corners=False is assumed", model.path.name)
    return dataclasses.replace(
        model,
        spec=dataclasses.replace(model.spec, num_classes=count),
        output=output,
        scores_last=trial.scores_last,
        output_name=trial.name,
        align_corners=align_corners,
        threshold=about.get("threshold", 0.5),
    )


def _kind_of_scores(trial: _Trial) -> str:
    """Whether the scores of another exporter's file are logits or probabilities, by their values."""
    axis = 3 if trial.scores_last else 1
    values = trial.values.astype(np.float64)
    if values.min() < 0 or values.max() > 1:
        return "logits"
    sums_to_one = np.abs(values.sum(axis=axis) - 1).max() < 1e-2
    return "probabilities" if sums_to_one or values.shape[axis] == 1 else "logits"


# ------------------------------------------------------------------------------------------------------------ protocol


def protocol_for(
    model: SegmentationModel | ExportedModel,
    settings: Mapping[str, Any],
    sizes: Iterable[tuple[int, int]] | None = None,
) -> Protocol:
    """The protocol with these settings, as far as they are not None, for a model.

    A file that takes images of one size scores larger ones by a sliding window of that size, unless `settings` name a
    mode. Labels that a file gives can be read only for whole images at their own size.

    Args:
      model: Model, or exported file.
      settings: Arguments of `Protocol`.
      sizes: Height and width of the images, where they are known before.

    Raises:
      ValueError: Settings contradict each other, or the file cannot be used with them.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if not isinstance(model, ExportedModel):
        return Protocol(**given)
    if model.output == "labels":
        given.setdefault("threshold", model.threshold)
        if given["threshold"] != model.threshold:
            raise ValueError(
                f"{model.path.name} gives labels above a probability of {model.threshold:g}; omit threshold"
            )
        protocol = Protocol(**given)
        if protocol.mode != "whole" or not protocol.is_one_pass:
            raise ValueError(
                f"{model.path.name} gives labels, and windows, scales, flips and resized images need scores: omit "
                "them, or export it without --with-argmax"
            )
        return protocol
    if model.size is None:
        return Protocol(**given)
    if "mode" not in given:
        protocol = Protocol(**given)
        inputs = {size for image in sizes or () for size in protocol.input_sizes(image)}
        if inputs and all(side <= most for size in inputs for side, most in zip(size, model.size, strict=True)):
            return protocol
        given["mode"] = "slide"
        if inputs:
            logger.info("%s takes images of %dx%d: larger ones by a sliding window", model.path.name, *model.size)
    if given["mode"] == "slide":
        crop = tuple(given.setdefault("crop", model.size))
        if crop != model.size:
            raise ValueError(
                f"{model.path.name} takes crops of {model.size[0]}x{model.size[1]}, not of {crop[0]}x{crop[1]}; omit "
                "crop"
            )
    return Protocol(**given)
