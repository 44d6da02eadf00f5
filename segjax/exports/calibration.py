"""Images for the ranges of an INT8 file, and what quantisation changes on other images.

Figures of the float file and of the INT8 file, both run by the same package, are printed and kept in the metadata next
to the INT8 file. A file that loses more than a point of mIoU is refused.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.checkpoints.state_dict import logger
from segjax.data import specs
from segjax.data.open import OpenSplit
from segjax.data.records import PickedRecords, read, records_of
from segjax.exports import int8
from segjax.exports.format import ExportFormat
from segjax.inference.comparison import compare_models
from segjax.inference.engine import Inference, Protocol
from segjax.inference.evaluate_dataset import open_labelled, refuse_other_images
from segjax.inference.exported_model import ExportedModel
from segjax.inference.images import as_image, upright_size
from segjax.inference.open_exported import open_exported, protocol_for
from segjax.inference.planning import IMAGES
from segjax.inference.runtimes import files_of, write_metadata
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import console
from segjax.runtime.reading import user_path

MOST = 32  # images that set the ranges
LARGEST_LOSS = 0.01  # of mIoU
_ROUNDS, _SECONDS = 15, 20.0  # to time a file


class LossError(Exception):
    """Raised when an INT8 file loses more than `LARGEST_LOSS`; the file is not kept."""


class CalibrationData(NamedTuple):
    """Images for the ranges, and others to measure on; a single image is for both.

    Attributes:
      name: Data in words, "camvid test".
      read: Image (H, W, C) by its number.
      calibrating: Numbers of the images for the ranges.
      measured: Numbers of the images to measure on.
      sizes: Height and width of the images, each size once, as far as they are known.
      kind: Channels and dtype of the images.
      labelled: Split with all images; None for images without labels.
    """

    name: str
    read: Callable[[int], np.ndarray]
    calibrating: Sequence[int]
    measured: Sequence[int]
    sizes: set[tuple[int, int]]
    kind: specs.ImageKind
    labelled: OpenSplit | None = None

    @property
    def shown(self) -> str:
        """`name` for a line of text."""
        return console.one_line(self.name, most=30)


def open_data(
    loaded: LoadedCheckpoint[SegmentationModel],
    data: str | os.PathLike[str] | OpenSplit,
    *,
    data_source: str | Sequence[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> CalibrationData:
    """Opens the images for the ranges of a model: at most `MOST`, and at most half, evenly spaced.

    Args:
      loaded: Checkpoint of the model.
      data: "NAME" or "NAME:SPLIT" of a dataset, or an open split, as for `evaluate_dataset`; or an image or a folder of
        images, which have no labels.
      data_source: As for `evaluate_dataset`.
      data_dir: As for `evaluate_dataset`.

    Raises:
      ValueError: There is no such data, no image, or the images or their classes are not those of the model.
    """
    if isinstance(data, OpenSplit) or str(data).partition(":")[0] in specs.DATASETS:
        data = data if isinstance(data, OpenSplit) else str(data)
        opened, split = open_labelled(loaded, data, data_source=data_source, data_dir=data_dir)
        refuse_other_images(loaded, opened.image_kind, opened.spec.name)
        records, name = records_of(opened.data), f"{opened.spec.name} {split}".strip()
        sizes = {(height, width) for height, width in records.sizes.tolist()}
        numbers = _divided(len(records), name)
        return CalibrationData(
            name, lambda number: read(records, number)[0], *numbers, sizes, opened.image_kind, opened
        )
    path, kind = user_path(data), loaded.image_kind
    if data_source is not None or data_dir is not None:
        raise ValueError("data_source and data_dir are for data that is given by its name; omit them")
    if not path.exists():
        raise ValueError(
            f"{path}: no dataset and no folder of images; the datasets are {', '.join(specs.DATASETS)}, as NAME or "
            "NAME:SPLIT"
        )
    files = sorted(file for file in path.rglob("*") if _is_image(file, path)) if path.is_dir() else [path]
    sizes = {size for file in files if (size := upright_size(file))}
    numbers = _divided(len(files), str(path))
    return CalibrationData(str(data), lambda number: as_image(files[number], kind), *numbers, sizes, kind)


def _is_image(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in IMAGES and not is_hidden and file.is_file()


def _divided(count: int, name: str) -> tuple[list[int], list[int]]:
    """Numbers of the images that calibrate, and of those to measure on."""
    if not count:
        raise ValueError(f"{name}: there is no image to calibrate with")
    picked = np.linspace(0, count - 1, min(MOST, max(count // 2, 1))).round().astype(int).tolist()
    return picked, [number for number in range(count) if number not in set(picked)] or picked


def refuse_larger(data: CalibrationData, export_format: ExportFormat) -> None:
    """Raises CheckpointError for images that a file of labels with one size cannot take, which need no windows."""
    height, width = export_format.size
    larger = sorted(size for size in data.sizes if size[0] > height or size[1] > width)
    if larger and export_format.argmax and not export_format.dynamic:
        raise CheckpointError(
            f"{data.shown} has images of {larger[-1][0]}x{larger[-1][1]}, and a file that gives labels takes whole "
            f"images of at most its size, {height}x{width}: give a larger --size, or omit --with-argmax"
        )


def settings_of(loaded: LoadedCheckpoint[SegmentationModel], export_format: ExportFormat) -> dict[str, Any]:
    """The protocol of a run's evaluation, as settings that differ from the defaults; {} for a file of labels.

    The sliding window of a file with one size has that size.
    """
    config = loaded.metadata.get("config") or {}
    if export_format.argmax or "eval" not in config:
        return {}
    protocol = Protocol.of(config["eval"])
    fields = {field.name: getattr(protocol, field.name) for field in dataclasses.fields(Protocol)}
    settings = {name: value for name, value in fields.items() if value != getattr(Protocol(), name)}
    if not export_format.dynamic and settings.get("crop") not in (None, export_format.size):
        del settings["crop"], settings["stride"]
    return settings


def quantise(
    source: Path,
    target: Path,
    data: CalibrationData,
    *,
    settings: Mapping[str, Any],
    metadata: Mapping[str, Any],
    accept_loss: bool = False,
) -> None:
    """Writes the INT8 file of a float32 file, with its metadata next to it, and logs what changed.

    Args:
      source: Exported file of float32.
      target: File to write, in another folder.
      data: Images.
      settings: Settings of a `Protocol` that are not defaults.
      metadata: Metadata of the file.
      accept_loss: Whether to keep a file that loses more than `LARGEST_LOSS`.

    Raises:
      LossError: It loses more.
      ValueError: The file does not take these images.
    """
    before = open_exported(source)
    number = len(data.calibrating)
    logger.info("quantising to INT8, with %d image%s of %s", number, "s" * (number != 1), data.shown)
    protocol = protocol_for(before.model, settings, data.sizes)
    inputs = calibration_inputs(before, protocol, data)
    tool = int8.quantise(source, target, inputs)
    after = open_exported(target)
    figures = _compared(before, after, data, settings, protocol)
    times = _milliseconds([loaded.model.runnable.outputs for loaded in (before, after)], inputs[0][:1])
    sizes = [sum(file.stat().st_size for file in files_of(path)) for path in (source, target)]
    of_each = [
        {**({} if iou is None else {"mean_iou": iou}), "bytes": size, "ms_per_image": round(taken, 2)}
        for iou, size, taken in zip(figures.mean_ious, sizes, times, strict=True)
    ]
    record = {
        "quantised_by": tool,
        "run_by": after.model.runnable.package,
        "data": data.name,
        "calibration_images": len(data.calibrating),
        "measured_images": len(data.measured),
        "protocol": protocol.record(),
        "float32": of_each[0],
        "int8": of_each[1],
        "agreement": figures.agreement,
        "timed_size": list(inputs[0].shape[1:3] if before.model.channels_last else inputs[0].shape[2:]),
        "cores": os.cpu_count(),
    }
    for line in _table(record, data.shown):
        logger.info("%s", line)
    loss = _loss(figures.mean_ious)
    if loss is None:
        logger.info("  without labels there is no mIoU: evaluate the file on data with labels")
    elif loss > LARGEST_LOSS and not accept_loss:
        raise LossError(
            f"not written, because INT8 loses {100 * loss:.1f} points of mIoU on {data.shown}, and more than "
            f"{100 * LARGEST_LOSS:.0f} is refused; --accept-loss writes it all the same"
        )
    write_metadata(target, {**metadata, "quantisation": record})


def calibration_inputs(
    loaded: LoadedCheckpoint[ExportedModel], protocol: Protocol, data: CalibrationData
) -> list[np.ndarray]:
    """What an evaluation gives the file: of each image one input, of several windows or scales another one each time.

    Raises:
      ValueError: The file does not take an image, or it cannot be read.
    """
    given: list[np.ndarray] = []
    outputs: dict[tuple[int, ...], dict[str, np.ndarray]] = {}

    def record(images: np.ndarray) -> dict[str, np.ndarray]:
        given.append(images[:1])
        # Only the inputs are wanted.
        if images.shape not in outputs:
            outputs[images.shape] = loaded.model.runnable.outputs(images)
        return outputs[images.shape]

    recorder = dataclasses.replace(loaded.model, runnable=loaded.model.runnable._replace(outputs=record))
    inference = Inference(recorder, protocol, normalise=loaded.normalise, image_dtype=data.kind.dtype)
    inputs = []
    for place, number in enumerate(data.calibrating):
        given.clear()
        inference.labels([data.read(number)])
        inputs.append(given[place % len(given)])
    return inputs


class _Compared(NamedTuple):
    """MIoU of the float file and of the INT8 file, None without labels, and the share of equal labels."""

    mean_ious: tuple[float | None, float | None]
    agreement: float | None


def _compared(
    before: LoadedCheckpoint[ExportedModel],
    after: LoadedCheckpoint[ExportedModel],
    data: CalibrationData,
    settings: Mapping[str, Any],
    protocol: Protocol,
) -> _Compared:
    if data.labelled is not None:
        records = PickedRecords(records_of(data.labelled.data), data.measured)
        split = data.labelled._replace(data=records, kind=data.kind)
        found = compare_models(before, after, split, **settings, progress=True)
        differing = found["differing_pixels"]
        return _Compared((found["mean_iou_a"], found["mean_iou_b"]), None if differing is None else 1 - differing)
    inferences = [
        Inference(loaded.model, protocol, normalise=loaded.normalise, image_dtype=data.kind.dtype)
        for loaded in (before, after)
    ]
    equal = pixels = 0
    for number in console.ProgressBar("comparing", len(data.measured), "images").over(data.measured):
        one, other = (inference.labels([data.read(number)])[0] for inference in inferences)
        equal += int(np.count_nonzero(one == other))
        pixels += one.size
    return _Compared((None, None), equal / pixels)


def _milliseconds(runs: Sequence[Callable[[np.ndarray], Any]], given: np.ndarray) -> list[float]:
    """Median time of each run, in turn, after one to warm up."""
    for run in runs:
        run(given)
    began, times = time.perf_counter(), [[] for _ in runs]
    while len(times[0]) < 3 or (len(times[0]) < _ROUNDS and time.perf_counter() - began < _SECONDS):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(given)
            taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def _loss(mean_ious: tuple[float | None, float | None]) -> float | None:
    before, after = mean_ious
    return None if before is None or after is None else before - after


def _table(record: Mapping[str, Any], name: str) -> Iterable[str]:
    """The record as lines of at most 80 columns; `name` is that of the data."""
    before, after = record["float32"], record["int8"]
    height, width = record["timed_size"]
    yield f"  {'':<10} {'float32':>10} {'INT8':>10}   on {record['measured_images']} images of {name}"
    if "mean_iou" in before and "mean_iou" in after:
        difference = after["mean_iou"] - before["mean_iou"]
        yield f"  {'mIoU':<10} {before['mean_iou']:>10.4f} {after['mean_iou']:>10.4f}   {difference:+.4f}"
    if record["agreement"] is not None:
        yield f"  {'agreement':<10} {'':>10} {record['agreement']:>10.2%}   of the labels are those of float32"
    sizes = (f"{entry['bytes'] / 2**20:.1f} MiB" for entry in (before, after))
    yield f"  {'size':<10} {next(sizes):>10} {next(sizes):>10}"
    times = (f"{entry['ms_per_image']:.1f} ms" for entry in (before, after))
    yield f"  {'time':<10} {next(times):>10} {next(times):>10}   an image of {height}x{width}, {record['cores']} cores"
