"""`segjax.evaluate_dataset`: mIoU and other metrics of any checkpoint on a split of a dataset, and a report."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.checkpoints import orbax_folder, published
from segjax.checkpoints import temperature as _temperature
from segjax.checkpoints.format_version import stamped
from segjax.checkpoints.huggingface import is_address
from segjax.checkpoints.load import load
from segjax.checkpoints.metadata import Size, Temperature
from segjax.checkpoints.state_dict import logger
from segjax.data import contents, specs
from segjax.data.builders import prepare
from segjax.data.open import OpenSplit, open_prepared_splits, open_splits
from segjax.data.prepared import open_prepared
from segjax.data.records import parts_of, records_of
from segjax.data.sources import DataError, listed
from segjax.inference import difference, published_figure, temperature_scaling
from segjax.inference.corrupted import evaluate_corrupted
from segjax.inference.engine import Inference, Protocol
from segjax.inference.evaluation import SHOWN, Measured, PredictCounted, measure
from segjax.inference.exported_model import ExportedModel, identity_of, metadata_of, weights_sha256
from segjax.inference.open_exported import Loaded, opened, protocol_for
from segjax.inference.runtimes import exported_path
from segjax.inference.unfinished import Unfinished
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import distributed, versions
from segjax.runtime.atomic import recover, why_not_writable
from segjax.runtime.reading import checked, type_name, user_path
from segjax.viz import report


class NoDataError(ValueError):
    """Raised when no data is named and the source is not the folder of a run, which has its own data."""


_Number = Annotated[int, Field(ge=1, le=1 << 31)]
_Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Evaluated(TypedDict):
    """The entries of a run's data that are read to find its evaluation split."""

    name: str
    eval_split: str
    source: str | list[str] | None
    dir: str | None


class _Drawn(TypedDict):
    """The entries of a run's data that are read to generate its images again."""

    name: str
    train_split: str
    eval_split: str
    train_images: _Number
    eval_images: _Number
    size: Size


class _Evaluation(TypedDict):
    """config.eval; a run that is older than a setting lacks it."""

    batch: _Number
    mode: NotRequired[Literal["whole", "slide"]]
    crop: NotRequired[Size | None]
    stride: NotRequired[Size | None]
    scales: NotRequired[Annotated[list[Annotated[FiniteFloat, Field(gt=0)]], Field(min_length=1)]]
    flip: NotRequired[bool]
    size_divisor: NotRequired[_Number]
    base_size: NotRequired[Size | None]
    threshold: NotRequired[Annotated[float, Field(gt=0, lt=1)]]


class _OfModel(TypedDict):
    dtype: Literal["float32", "float64", "bfloat16", "float16"]


class _RunConfig(TypedDict):
    model: _OfModel
    data: _Evaluated
    eval: _Evaluation


class _Generated(TypedDict):
    seed: _Seed
    data: _Drawn


def evaluate_dataset(
    source: str | Path | Loaded | SegmentationModel,
    data: str | OpenSplit | None = None,
    *,
    reference: str | Path | Loaded | SegmentationModel | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    data_source: str | Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    mode: str | None = None,
    crop: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] | None = None,
    flip: bool | None = None,
    size_divisor: int | None = None,
    base_size: tuple[int, int] | None = None,
    threshold: float | None = None,
    temperature: float | str | None = None,
    fit_temperature: bool = False,
    batch: int | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = False,
    weights: str | None = None,
    corruptions: bool = False,
) -> dict[str, Any]:
    """Evaluate a checkpoint on a split: one confusion matrix over all images, with logits resized to the labels' sizes.

    Each of several processes that `jax.distributed` has connected evaluates a part of the images on its own devices.
    The result, in all of them, is that of one process, and the first writes the report.

    Args:
      source: Argument or result of `segjax.load`, or a model; or an exported file, as for `segjax.open_exported`.
      data: "NAME" or "NAME:SPLIT". NAME is a key of `segjax.data.DATASETS`. SPLIT is a split or a sum of splits, as in
        "train+val", by default the published evaluation split (for a folder, test or else val). Or a split from
        `segjax.data.open_splits`. None evaluates the run in the folder `source` on its own data, with the dtype of the
        run and the batch and protocol of its `config.eval`, and reproduces its metrics.
      reference: Checkpoint to evaluate in the same way, for the difference from it; for an exported file, the run that
        it was exported from. With `data` None its data and its protocol are used.
      mean: As for `segjax.open_exported`.
      std: As for `segjax.open_exported`.
      data_source: Files from which a dataset is prepared at first use, as `source` of `segjax.data.open_splits`; by
        default those of the run.
      data_dir: Folder of prepared datasets, as for `segjax.data.open_splits`; by default that of the run.
      mode: As for `segjax.Predictor`. For the name of published weights, on the dataset that they were trained on, this
        and the following settings are by default those of the published figure.
      crop: As for `segjax.Predictor`.
      stride: As for `segjax.Predictor`.
      scales: As for `segjax.Predictor`.
      flip: As for `segjax.Predictor`.
      size_divisor: Divisor of the input's sides: each scaled image is resized up to multiples of it (mmsegmentation's
        AlignedResize).
      base_size: (long, short) in pixels within which each image is first resized, with its aspect ratio; `scales` are
        factors of it. The published figures of ADE20K have (2048, 512).
      threshold: Probability above which a pixel belongs to the class, for a model of one class.
      temperature: Divisor of the logits before softmax or sigmoid; "fitted" for the one that is kept with the
        checkpoint. By default 1.
      fit_temperature: Whether to fit a temperature to the split, and to keep it with the checkpoint. `source` is a file
        or folder then, the model scores an image once, and the split should be none of those to evaluate on.
      batch: Number of images, or of crops with mode "slide", per call of the model; by default one per device.
      output: Folder for a report (index.html, results.json, classes.csv, confusion.csv and pictures); by default none.
        The counts of an evaluation that is killed stay there, and the next one with the same arguments uses them.
      progress: Whether to print a progress bar.
      weights: As for `segjax.load`; None for a run, whose folder holds one set.
      corruptions: Whether to evaluate on corrupted images too: 25 further evaluations, of five kinds at five severities
        (`segjax.data.corruptions`). The images must be RGB of 8 bits.

    Returns:
      "mean_iou", "pixel_accuracy", "mean_accuracy", "mean_precision", "mean_recall" and "mean_dice" in [0, 1], or None
      if no pixel counts; "per_class_iou", K numbers, None for a class without true or predicted pixels; "classes", a
      list of a dict per class with "class", "iou", "accuracy", "precision", "recall", "dice" and "pixels";
      "mean_boundary_iou" and "per_class_boundary_iou" (`segjax.metrics.boundary_iou`); "image_iou", "class_iou" and
      "worst_image_iou" (`segjax.metrics.over_images`); "mean_iou_interval", the ends of the 95% interval over images,
      or None (`segjax.metrics.bootstrap_interval`); "calibration", a dict with the "ece", "adaptive_ece", "brier",
      "nll" and "aurc" of `segjax.metrics.Calibration`, the "error_average_precision", "error_auroc" and "error_fpr95"
      of finding errors by 1 - confidence, and its "reliability", but not of a file that gives labels; with
      `fit_temperature` also "temperature", a dict with "value", "data", "nll_before" and "nll"; with `corruptions` also
      "corruptions", see `segjax.inference.corrupted.evaluate_corrupted`; and "step", the step of a run's checkpoint or
      None. For the name of published weights, on their dataset, also "published", a dict with "mean_iou" in [0, 1] or
      None, its "source", "is_multi_scale" and "is_same_protocol". With a `reference`, or for a file whose metadata have
      the mIoU of its run on this split, also "reference": "source", "mean_iou", "difference", "per_class_iou" and
      "is_same_protocol".

    Raises:
      CheckpointError: No model can be read from `source`.
      ValueError: Settings contradict each other, the data cannot be used, its classes or images do not fit the model,
        or `output` cannot be written.
      TooLittleMemoryError: A batch of the largest images needs more memory than a device has.

    Example:
      >>> import segjax
      >>> (split,) = segjax.data.open_splits("streets", ["test"], num_images=[2], size=(64, 96), seed=0)
      >>> model = segjax.create("segformer_b0", num_classes=split.spec.num_classes, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> sorted(key for key in segjax.evaluate_dataset(model, split) if key.startswith("mean_"))[:3]
      ['mean_accuracy', 'mean_boundary_iou', 'mean_dice']
    """
    began = time.perf_counter()
    place = _place_of_temperature(source, temperature) if fit_temperature else None
    settings: dict[str, Any] = dict(
        mode=mode, crop=crop, stride=stride, scales=scales, flip=flip, size_divisor=size_divisor
    )
    settings |= dict(base_size=base_size, threshold=threshold)
    row = published_figure.row_of(source, data)
    protocol = published_figure.protocol_of(row, {key: value for key, value in settings.items() if value is not None})
    # Checked before an evaluation that may take hours.
    output = None if output is None else user_path(output)
    if output is not None and (problem := distributed.from_lead(partial(why_not_writable, output))):
        raise ValueError(f"the report cannot be written to {output}: {problem}; choose another folder")
    if data is None:
        if protocol != Protocol() or batch is not None:
            raise ValueError("a run is evaluated as during training; to set the protocol or the batch, name the data")
        if weights is not None:
            raise ValueError(f"the folder of a run holds one set of weights, without a set {weights!r}")
        other = None
        given = _of_run(source if reference is None else reference, data_source=data_source, data_dir=data_dir)
        if reference is not None:
            other = given.checkpoint
            given = dataclasses.replace(given, checkpoint=opened(source, mean=mean, std=std, reference=other))
            refuse_other_classes(given.checkpoint, given.opened.spec)
    else:
        other = None if reference is None else opened(reference)
        given = _of_checkpoint(
            opened(source, weights=weights, mean=mean, std=std, reference=other),
            data,
            config=(other.metadata.get("config") if other else None),
            data_source=data_source,
            data_dir=data_dir,
            batch=batch,
            protocol=protocol,
        )
    if isinstance(given.checkpoint.model, ExportedModel):
        settings = _of_own(given.protocol) if data is None else settings
        own = protocol_of_model(given.checkpoint, given.protocol, settings, given.opened)
        given = dataclasses.replace(given, protocol=own)
    checkpoint, classes = given.checkpoint, given.opened.spec
    protocol = with_temperature(checkpoint, given.protocol, temperature, source)
    given = dataclasses.replace(given, protocol=protocol)
    if fit_temperature and protocol.passes > 1:
        raise ValueError(f"a temperature is fitted at one scale, and these are scores {protocol}; omit scales and flip")
    refuse_other_images(checkpoint, given.opened.image_kind, classes.name)
    if corruptions and not given.opened.image_kind.is_rgb:
        raise ValueError(
            f"corruptions are those of RGB images of 8 bits, and the images of {classes.name} have "
            f"{given.opened.image_kind}; omit corruptions"
        )
    if row is not None:
        published_figure.log_notes(row, classes.name)
    model, count = checkpoint.model, len(records_of(given.opened.data))
    logger.info("model    %s, %d classes", model.spec.name, model.spec.num_classes)
    logger.info("data     %s, %d images", given.name, count)
    logger.info("scored   %s", protocol)
    if isinstance(model, ExportedModel):
        logger.info("run by   %s", model.runnable.package)
    logger.info("device   %s", versions.devices_in_words())
    logger.info("compiling; the first image of each size takes longer ...")
    kind = given.opened.image_kind
    gives_scores = not isinstance(model, ExportedModel) or model.output != "labels"
    inference = inference_for(checkpoint, given.opened, protocol, batch=given.batch, counted=gives_scores)
    counted = partial(
        inference.begin_counted,
        ignore_label=classes.ignore_label,
        temperatures=temperature_scaling.GRID if fit_temperature else (),
    )
    shown = 0 if output is None else SHOWN
    identity = _identity(given, counted=gives_scores, fits=fit_temperature)
    same = {"corruptions": corruptions, "reference": reference is not None, "output": output is not None}
    distributed.refuse_different(identity | same)
    unfinished = None if output is None or identity["data"] is None else Unfinished(output, identity)
    measured = _measured(
        inference,
        given,
        shown=shown,
        progress=progress,
        counted=counted if gives_scores else None,
        unfinished=unfinished,
    )
    fitted = {} if place is None else {"temperature": distributed.from_lead(partial(_kept_fit, measured, place, given))}
    summary = report.summarise(measured.confusion, classes)
    against: dict[str, Any] = (
        {} if row is None else {"published": published_figure.figure_of(row, protocol, given.split)}
    )
    if other is not None:
        refuse_other_images(other, kind, classes.name)
        logger.info("then the reference, %s", _name(reference, other))
        reference_inference = inference_for(other, given.opened, protocol, batch=given.batch)
        theirs = report.summarise(_measured(reference_inference, given, shown=0, progress=progress).confusion, classes)
        against["reference"] = difference.evaluated(_name(reference, other), theirs, summary)
    elif known := difference.recorded(checkpoint.metadata, summary, data=given.address, protocol=protocol):
        against["reference"] = known
    details = measured.details()
    if corruptions:
        details["corruptions"] = evaluate_corrupted(
            inference.begin,
            given.opened.data,
            classes,
            clean=report.summarise(measured.confusion, classes)["mean_iou"],
            batch_size=protocol.images_at_a_time(given.batch),
            key=protocol.input_sizes,
            progress=progress,
            unfinished=unfinished,
        )
    if output is not None:
        name, duration = _name(source, checkpoint), time.perf_counter() - began
        write = partial(_write_report, output, measured, details | fitted, given, name, against, duration=duration)
        distributed.from_lead(write)
        if unfinished is not None:
            unfinished.remove()
    return summary | details | fitted | {"step": checkpoint.metadata.get("step"), **against}


def _name(source: object, loaded: Loaded) -> str:
    if isinstance(loaded.model, ExportedModel):
        return str(loaded.model.path)
    return str(source) if isinstance(source, str | Path) else loaded.model.spec.name


def _measured(
    inference: Inference,
    given: _Given,
    *,
    shown: int,
    progress: bool,
    counted: PredictCounted | None = None,
    unfinished: Unfinished | None = None,
) -> Measured:
    """Evaluates a model on a split, with the protocol and batch of `given`; see `measure`."""
    protocol = given.protocol
    return measure(
        inference.begin,
        given.opened.data,
        given.opened.spec,
        batch_size=protocol.images_at_a_time(given.batch),
        key=protocol.input_sizes,
        shown=shown,
        progress=progress,
        counted=counted,
        unfinished=unfinished,
    )


def _identity(given: _Given, *, counted: bool, fits: bool) -> dict[str, Any]:
    """What the counts of an evaluation depend on, as JSON; its "data" is None where it cannot be told."""
    checkpoint, opened = given.checkpoint, given.opened
    content: Any = None
    if isinstance(opened.data, specs.Split):
        # In memory.
        content = [contents.hash_of(array.tobytes()) for array in (opened.data.images, opened.data.labels)]
    elif opened.prepared is not None and given.split:
        content = contents.contents_of(opened.prepared, parts_of(given.split))
    return {
        "weights": weights_sha256(checkpoint.model),
        "model": identity_of(checkpoint.model),
        "normalisation": [list(map(float, checkpoint.mean)), list(map(float, checkpoint.std))],
        "protocol": given.protocol.record(),
        "data": None if content is None else contents.hash_of(json.dumps(content, sort_keys=True).encode()),
        "split": given.address,
        "classes": list(opened.spec.class_names),
        "ignore_label": opened.spec.ignore_label,
        "counted": [counted, fits],
        "device": jax.devices()[0].device_kind,
        "versions": versions.installed(),
    }


def _of_own(protocol: Protocol) -> dict[str, Any]:
    """The settings of a run's protocol that are not defaults, which a file may replace."""
    fields = {field.name: getattr(protocol, field.name) for field in dataclasses.fields(Protocol)}
    return {name: value for name, value in fields.items() if value != getattr(Protocol(), name)}


def _place_of_temperature(source: object, given: float | str | None) -> Path:
    """The file for a temperature to be fitted. Raises ValueError if there is no place for it, or one was given."""
    if given is not None:
        raise ValueError("a temperature is either fitted or given; omit one of the two")
    if exported_path(source) is not None:
        raise ValueError(f"{source}: fit the temperature of the checkpoint, and export that with --temperature fitted")
    place = _temperature.place_for(source)
    if place is None:
        name = source if isinstance(source, str | Path) else f"a {type_name(source)}"
        raise ValueError(
            f"{name} is no file or folder of this machine, next to which a temperature could be kept; convert it to one"
        )
    if problem := why_not_writable(place.parent):
        raise ValueError(f"the temperature cannot be written to {place}: {problem}; copy the checkpoint elsewhere")
    return place


def _kept_fit(measured: Measured, place: Path, given: _Given) -> Temperature:
    """Fits a temperature, and writes it."""
    model = given.checkpoint.model
    assert not isinstance(model, ExportedModel) and measured.calibration is not None and measured.nlls is not None
    found = temperature_scaling.fit(measured.nlls, int(measured.calibration.pixels.sum()))
    if not found.is_inside:
        logger.info(
            "note: NLL is lowest at the end of the temperatures from 1/16 to 16; are there enough errors on %s?",
            given.name,
        )
    kept = Temperature(value=found.temperature, data=given.name, nll_before=found.nll_before, nll=found.nll)
    _temperature.keep(place, model, kept)
    logger.info(
        "temperature %.4g: NLL %.4f instead of %.4f; kept in %s", found.temperature, found.nll, found.nll_before, place
    )
    return kept


@dataclasses.dataclass(frozen=True)
class _Given:
    """A checkpoint and the split on which to evaluate it.

    Attributes:
      checkpoint: Loaded checkpoint.
      opened: Split.
      split: Name of the split, or "" if unknown.
      batch: Number of images, or of crops, per call of the model.
      protocol: Protocol of the scores.
    """

    checkpoint: Loaded
    opened: OpenSplit
    split: str
    batch: int
    protocol: Protocol

    @property
    def name(self) -> str:
        return f"{self.opened.spec.name} {self.split}".strip()

    @property
    def address(self) -> str:
        """As a command names it, "NAME:SPLIT"."""
        return f"{self.opened.spec.name}:{self.split}"


def _of_run(
    source: str | Path | Loaded | SegmentationModel,
    *,
    data_source: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
) -> _Given:
    """The newest checkpoint of a run, with the run's own evaluation split and protocol."""
    if not isinstance(source, str | Path):
        raise NoDataError(f"a {type_name(source)} is not the folder of a run, which has its own data; name the data")
    if exported_path(source) is not None and user_path(source).exists():
        raise NoDataError(f"{source} is an exported file, which has no data; name the data")
    folder = user_path(source)
    if not folder.exists() and not is_address(source) and published.find(source) is None:
        raise ValueError(f"{source}: there is no such file or folder{published.hint_for(source)}")
    recover(folder)
    config = orbax_folder.load_metadata(folder).get("config") if folder.is_dir() else None
    if not config:
        raise NoDataError(f"{source} is not the folder of a run, which has its own data; name the data")
    checked(config, _RunConfig, name=f"{folder}: config")
    checkpoint = load(source, dtype=jnp.dtype(config["model"]["dtype"]))
    data = config["data"]
    opened = _data_of_run(folder, config, data_source=data_source, data_dir=data_dir)
    return _Given(checkpoint, opened, data["eval_split"], config["eval"]["batch"], Protocol.of(config["eval"]))


def _data_of_run(
    folder: Path,
    config: Mapping,
    *,
    data_source: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
) -> OpenSplit:
    """The evaluation split of a run, as prepared for the run, or prepared again from a source.

    Raises:
      ValueError: The split cannot be used, or its images or masks differ from those with which the run began.
    """
    data, run = config["data"], contents.read_run_data(folder / contents.RUN_DATA)
    name, split = data["name"], data["eval_split"]
    if run and not data_source and not data_dir and (Path(run["path"]) / "dataset_info.json").is_file():
        # Prepared data is preferred, because the source may have been moved or changed.
        logger.info("data as prepared for the run, %s", run["path"])
        (opened,) = open_prepared_splits(open_prepared(Path(run["path"])), [split])
    else:
        source = data_source or (run["source"] if run and data["source"] else data["source"])
        opened = _opened(name, split, config, data_source=source, data_dir=data_dir or data["dir"])
    if run and opened.prepared:
        parts = parts_of(split)
        now = contents.contents_of(opened.prepared, parts)
        before = {part: run["contents"].get(part, {}) for part in parts}
        if now and (lines := contents.differences(before, now)):
            raise DataError(
                f"{len(lines)} images differ from those of {folder}:\n{contents.listed_differences(lines)}\n"
                f"  give the original --source, or add --data {name}:{split} to evaluate on other data"
            )
    return opened


def _of_checkpoint(
    checkpoint: Loaded,
    data: str | OpenSplit,
    *,
    config: Mapping | None,
    data_source: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
    batch: int | None,
    protocol: Protocol,
) -> _Given:
    """A checkpoint, and a split with the classes of the checkpoint; `config` is that of a run it came from."""
    opened, split = open_labelled(checkpoint, data, config=config, data_source=data_source, data_dir=data_dir)
    return _Given(checkpoint, opened, split, batch or jax.local_device_count(), protocol)


def open_labelled(
    checkpoint: Loaded,
    data: str | OpenSplit,
    *,
    config: Mapping | None = None,
    data_source: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
) -> tuple[OpenSplit, str]:
    """Opens a split with the classes of a checkpoint, as `data` of `evaluate_dataset`; and its name, or "" if unknown.

    `config` is that of a run that the checkpoint came from, for a checkpoint without one.

    Raises:
      ValueError: There is no such data, it cannot be used, or its classes are others.
    """
    if isinstance(data, str):
        name, _, split = data.partition(":")
        if name not in specs.DATASETS:
            raise DataError(f"no dataset {name!r}; the datasets are {', '.join(specs.DATASETS)}")
        split = split or _default_split(name, data_source=data_source, data_dir=data_dir)
        config = checkpoint.metadata.get("config") or config
        data = _opened(name, split, config, data_source=data_source, data_dir=data_dir)
    elif data_source is not None or data_dir is not None:
        raise ValueError("data_source and data_dir are for data that is given by its name; omit them")
    else:
        split = ""
    refuse_other_classes(checkpoint, data.spec)
    return data, split


def _default_split(
    name: str, *, data_source: str | Sequence[str] | None, data_dir: str | os.PathLike[str] | None
) -> str:
    """The published evaluation split; for a folder, which has its own splits, test or else val."""
    published = specs.DATASETS[name].evaluated_split
    if specs.DATASETS[name].spec is not None:
        return published
    labelled = prepare(name, source=data_source, data_dir=data_dir).labelled
    return next((split for split in (published, "val") if split in labelled), published)


def _opened(
    name: str,
    split: str,
    config: Mapping | None,
    *,
    data_source: str | Sequence[str] | None,
    data_dir: str | os.PathLike[str] | None,
) -> OpenSplit:
    """Opens a split with labels. A generated split has the images of the run with this config, if there is one.

    Raises:
      ValueError: There is no such split, or it cannot be used.
    """
    generated: dict[str, Any] = {}
    if config and config.get("data", {}).get("name") == name and specs.is_generated(name):
        checked(config, _Generated, name="the checkpoint's config")
        run = config["data"]
        only_trained_on = split == run["train_split"] != run["eval_split"]
        number = run["train_images"] if only_trained_on else run["eval_images"]
        generated = dict(num_images=[number], size=tuple(run["size"]), seed=config["seed"])
    (opened,) = open_splits(name, [split], source=data_source, data_dir=data_dir, say=logger.info, **generated)
    return opened


def inference_for(
    checkpoint: Loaded, opened: OpenSplit, protocol: Protocol, *, batch: int, counted: bool = False
) -> Inference:
    """The inference of a checkpoint on a split, with its largest program compiled; see `Inference.refuse_too_large`.

    Raises:
      ValueError: The model has several classes and the protocol a threshold.
      TooLittleMemoryError: A batch of the largest images needs more memory than a device has.
    """
    dtype = opened.image_kind.dtype
    inference = Inference(checkpoint.model, protocol, batch=batch, normalise=checkpoint.normalise, image_dtype=dtype)
    sizes = np.unique(records_of(opened.data).sizes, axis=0).tolist()
    at_a_time = protocol.images_at_a_time(batch)
    inference.refuse_too_large(((height, width) for height, width in sizes), batch=at_a_time, counted=counted)
    return inference


def protocol_of_model(
    checkpoint: Loaded, protocol: Protocol, settings: Mapping[str, Any], opened: OpenSplit
) -> Protocol:
    """The protocol on a split, which for an exported file depends on what it takes and gives; see `protocol_for`."""
    if not isinstance(checkpoint.model, ExportedModel):
        return protocol
    return protocol_for(checkpoint.model, settings, _sizes_of(opened))


def with_temperature(
    checkpoint: Loaded, protocol: Protocol, temperature: float | str | None, source: object
) -> Protocol:
    """The protocol with the temperature that was asked for; see `temperature.chosen`."""
    return dataclasses.replace(protocol, temperature=_temperature.chosen(temperature, checkpoint.metadata, source))


def _sizes_of(opened: OpenSplit) -> list[tuple[int, int]]:
    """Height and width of the images, each size once."""
    return [(height, width) for height, width in np.unique(records_of(opened.data).sizes, axis=0).tolist()]


def refuse_other_images(checkpoint: Loaded, images: specs.ImageKind, name: str) -> None:
    """Raises ValueError if the model of a checkpoint does not take the images of a dataset."""
    takes = checkpoint.image_kind
    if takes.channels != images.channels or takes.dtype not in (None, images.dtype):
        raise ValueError(
            f"the model takes images of {takes}, and those of {name} have {images}; evaluate it on images as it was "
            "trained on"
        )


def refuse_other_classes(checkpoint: Loaded, classes: specs.DatasetSpec) -> None:
    """Raises ValueError if the classes of a checkpoint are not those of a dataset, in the same order.

    Names that `are_the_same_classes` allows to differ are logged.
    """
    dataset, own = checkpoint.dataset, checkpoint.model.spec.num_classes
    of = f" of {dataset['name']}" if dataset else ""
    if own != classes.num_classes:
        raise ValueError(
            f"the model has {own} classes{of}, but {classes.name} has {classes.num_classes}: the metrics would be "
            "meaningless; choose the dataset that it was trained on"
        )
    if not dataset:
        logger.info("the checkpoint does not name its classes; those of %s are assumed, in their order", classes.name)
        return
    differing = differing_names(dataset["class_names"], classes.class_names)
    if not are_the_same_classes(dataset["class_names"], classes.class_names):
        raise ValueError(
            f"the classes of the model{of} are not those of {classes.name}: {listed(differing)}; choose the dataset "
            "that it was trained on, or one with the same classes in the same order"
        )
    if differing:
        logger.info("classes with different names in the checkpoint: %s", listed(differing))


def are_the_same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists of equal length name the same classes in the same order.

    Up to a quarter of the names may differ, because packages spell some differently, but none may have moved to another
    place.
    """
    folded = ([name.strip().casefold() for name in each] for each in (names, others))
    differing = [(one, other) for one, other in zip(*folded, strict=True) if one != other]
    # ADE20K has two screens, one of which some packages call "crt screen": a name may also be at another place.
    moved = {one for one, _ in differing} & {other for _, other in differing}
    return len(differing) <= len(names) / 4 and not moved


def differing_names(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The classes with other names in two lists of equal length, as texts for a message."""
    return [
        f"{number} is {name!r}, not {other!r}"
        for number, (name, other) in enumerate(zip(names, others, strict=True))
        if name.strip().casefold() != other.strip().casefold()
    ]


# -------------------------------------------------------------------------------------------------------------- report


def _write_report(
    folder: Path,
    measured: Measured,
    details: Mapping[str, Any],
    given: _Given,
    name: str,
    against: Mapping[str, Any],
    *,
    duration: float,
) -> None:
    """Writes the report of an evaluation.

    Args:
      folder: Folder of the report.
      measured: Result of the evaluation.
      details: `measured.details()`.
      given: Checkpoint and split.
      name: Name of the checkpoint, or of a model without a checkpoint.
      against: "published", a `published_figure.PublishedFigure`, and "reference", a `difference.Reference`, as far as
        there are such figures.
      duration: Duration in seconds, including preparation, reading and compilation.
    """
    model, classes, records = given.checkpoint.model, given.opened.spec, records_of(given.opened.data)
    step, predicted = given.checkpoint.metadata.get("step"), measured.predicted
    worst = [report.Shown(records.names[number], *records[number], predicted[number]) for _, number in measured.worst]
    facts = {
        "checkpoint": name if step is None else f"{name}, step {step}",
        "data": f"{given.name}, {len(records)} images, {classes.num_classes} classes",
        "protocol": str(given.protocol),
    }
    summary = report.summarise(measured.confusion, classes)
    if isinstance(model, ExportedModel):
        facts["run by"] = model.runnable.package
    if "published" in against:
        facts["published"] = published_figure.compared(against["published"], summary["mean_iou"])
    if "reference" in against:
        facts["reference"] = difference.compared(against["reference"], summary)
    metadata = stamped(
        {
            "checkpoint": name,
            "step": step,
            "model": metadata_of(model),
            "data": {"name": classes.name, "split": given.split, "images": len(records)},
            "protocol": given.protocol.record(),
            # In the terms of a training's result.json.
            "duration_s": round(duration, 1),
            "device": versions.of_devices(jax.devices()),
            "versions": versions.installed(),
            **against,
        }
    )
    title = f"{model.spec.name} on {given.name}"
    report.write(
        folder, measured.confusion, classes, worst, title=title, facts=facts, metadata=metadata, details=details
    )
