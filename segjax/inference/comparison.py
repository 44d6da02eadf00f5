"""`segjax.compare_models`: the difference of two models on the same images, with an interval, and where they differ."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from segjax import metrics
from segjax.checkpoints.format_version import stamped
from segjax.checkpoints.state_dict import logger
from segjax.data import specs
from segjax.data.open import OpenSplit
from segjax.data.records import Records, records_of
from segjax.data.sources import listed
from segjax.inference import published_figure
from segjax.inference.engine import Inference, Protocol
from segjax.inference.evaluate_dataset import (
    are_the_same_classes,
    differing_names,
    inference_for,
    open_labelled,
    protocol_of_model,
    refuse_other_classes,
    refuse_other_images,
    with_temperature,
)
from segjax.inference.evaluation import SHOWN, Predict, predictions
from segjax.inference.exported_model import metadata_of
from segjax.inference.open_exported import Loaded, is_exported, opened
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import console, versions
from segjax.runtime.atomic import why_not_writable
from segjax.runtime.reading import user_path
from segjax.viz import comparison


def compare_models(
    source_a: str | Path | Loaded | SegmentationModel,
    source_b: str | Path | Loaded | SegmentationModel,
    data: str | OpenSplit,
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
    batch: int | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = False,
    weights_a: str | None = None,
    weights_b: str | None = None,
) -> dict[str, Any]:
    """Compare two models on the same images: IoU of B minus IoU of A, with intervals over images.

    Each model is evaluated as `segjax.evaluate_dataset` does it, in one pass over the images. The intervals are those
    of `segjax.metrics.bootstrap_difference`.

    Args:
      source_a: Argument or result of `segjax.load`, or a model; or an exported file, as for `segjax.open_exported`.
      source_b: The same; a model of the same classes in the same order.
      data: "NAME", "NAME:SPLIT" or an open split, as for `segjax.evaluate_dataset`.
      reference: Checkpoint that exported files were made from, as for `segjax.open_exported`.
      mean: Of exported files, as for `segjax.open_exported`.
      std: Of exported files, as for `segjax.open_exported`.
      data_source: As for `segjax.evaluate_dataset`.
      data_dir: As for `segjax.evaluate_dataset`.
      mode: As for `segjax.evaluate_dataset`; this and the following settings are those of both models. Without them,
        published weights by name have the protocol of their own published figure.
      crop: As for `segjax.evaluate_dataset`.
      stride: As for `segjax.evaluate_dataset`.
      scales: As for `segjax.evaluate_dataset`.
      flip: As for `segjax.evaluate_dataset`.
      size_divisor: As for `segjax.evaluate_dataset`.
      base_size: As for `segjax.evaluate_dataset`.
      threshold: As for `segjax.evaluate_dataset`.
      temperature: As for `segjax.evaluate_dataset`; "fitted" is each model's own.
      batch: As for `segjax.evaluate_dataset`.
      output: Folder for a report (index.html and results.json); by default none.
      progress: Whether to print a progress bar.
      weights_a: Set of weights of A, as for `segjax.load`.
      weights_b: Set of weights of B.

    Returns:
      "mean_iou_a" and "mean_iou_b" in [0, 1], or None if no pixel counts; "difference", B minus A, or None;
      "difference_interval", the ends of its 95% interval, or None for fewer than two labelled images;
      "differing_pixels", the fraction of labelled pixels whose predictions differ, or None; "classes", a list of a dict
      per class with "class", "iou_a", "iou_b", "difference", "interval" and "pixels"; and "images", the ten images
      whose own mean IoU differs most, the largest difference first, each a dict with "name", "mean_iou_a",
      "mean_iou_b" and "difference".

    Raises:
      CheckpointError: No model can be read from a source.
      ValueError: The models have different classes, settings contradict each other, the data cannot be used, its
        classes or images do not fit the models, or `output` cannot be written.
      TooLittleMemoryError: A batch of the largest images needs more memory than a device has.

    Example:
      >>> import segjax
      >>> (split,) = segjax.data.open_splits("streets", ["test"], num_images=[2], size=(64, 96), seed=0)
      >>> settings = dict(num_classes=split.spec.num_classes, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> first, second = (segjax.create("segformer_b0", seed=seed, **settings) for seed in (0, 1))
      >>> segjax.compare_models(first, first, split)["difference_interval"]
      [0.0, 0.0]
    """
    began = time.perf_counter()
    settings: dict[str, Any] = dict(
        mode=mode, crop=crop, stride=stride, scales=scales, flip=flip, size_divisor=size_divisor
    )
    settings |= dict(base_size=base_size, threshold=threshold)
    given = {key: value for key, value in settings.items() if value is not None}
    # Checked before an evaluation that may take hours.
    output = None if output is None else user_path(output)
    if output is not None and (problem := why_not_writable(output)):
        raise ValueError(f"the report cannot be written to {output}: {problem}; choose another folder")
    rows = [published_figure.row_of(source, data) for source in (source_a, source_b)]
    protocols = [published_figure.protocol_of(row, given) for row in rows]
    batch = batch or jax.local_device_count()
    origin = None if reference is None else opened(reference)
    normalisation: dict[str, Any] = dict(mean=mean, std=std, reference=origin)
    loaded = [
        opened(source, weights=weights, **(normalisation if is_exported(source) else {}))
        for source, weights in ((source_a, weights_a), (source_b, weights_b))
    ]
    refuse_different_classes(*loaded)
    config = origin.metadata.get("config") if origin else None
    images, split = open_labelled(loaded[0], data, config=config, data_source=data_source, data_dir=data_dir)
    protocols = [
        with_temperature(checkpoint, protocol_of_model(checkpoint, protocol, settings, images), temperature, source)
        for source, checkpoint, protocol in zip((source_a, source_b), loaded, protocols, strict=True)
    ]
    refuse_other_classes(loaded[1], images.spec)
    for checkpoint in loaded:
        refuse_other_images(checkpoint, images.image_kind, images.spec.name)
    for row in rows:
        if row is not None:
            published_figure.log_notes(row, images.spec.name)
    for letter, checkpoint, protocol in zip("AB", loaded, protocols, strict=True):
        model = checkpoint.model
        logger.info("%s        %s, %d classes, %s", letter, model.spec.name, model.spec.num_classes, protocol)
    records, name = records_of(images.data), f"{images.spec.name} {split}".strip()
    logger.info("data     %s, %d images", name, len(records))
    logger.info("device   %d x %s", jax.local_device_count(), jax.devices()[0].device_kind)
    logger.info("compiling; the first image of each size takes longer ...")
    inferences = [
        inference_for(checkpoint, images, protocol, batch=batch)
        for checkpoint, protocol in zip(loaded, protocols, strict=True)
    ]
    compared = _compared(inferences, images, batch=batch, shown=SHOWN, progress=progress)
    summary = compared.summary(images.spec, records.names)
    if output is not None:
        names = [
            str(source) if isinstance(source, str | Path) else checkpoint.model.spec.name
            for source, checkpoint in zip((source_a, source_b), loaded, strict=True)
        ]
        checkpoints = [_metadata_of(*each) for each in zip(names, loaded, protocols, strict=True)]
        metadata = stamped(
            {
                "a": checkpoints[0],
                "b": checkpoints[1],
                "data": {"name": images.spec.name, "split": split, "images": len(records)},
                "duration_s": round(time.perf_counter() - began, 1),
                "device": versions.of_devices(jax.local_devices()),
                "versions": versions.installed(),
            }
        )
        comparison.write(
            output,
            summary,
            images.spec,
            [_shown(records, number, pair) for number, pair in compared.predicted.items()],
            facts=_facts(checkpoints, protocols) | {"data": f"{name}, {len(records)} images"},
            metadata=metadata,
        )
    return summary


def refuse_different_classes(a: Loaded, b: Loaded) -> None:
    """Raises ValueError if two models do not have the same classes in the same order; see `are_the_same_classes`."""
    numbers = [checkpoint.model.spec.num_classes for checkpoint in (a, b)]
    of = [f" of {checkpoint.dataset['name']}" if checkpoint.dataset else "" for checkpoint in (a, b)]
    remedy = "compare models of the same classes in the same order"
    if numbers[0] != numbers[1]:
        raise ValueError(f"A has {numbers[0]} classes{of[0]}, and B has {numbers[1]}{of[1]}; {remedy}")
    if not (a.dataset and b.dataset):
        return
    names = [checkpoint["class_names"] for checkpoint in (a.dataset, b.dataset)]
    differing = differing_names(*names)
    if not are_the_same_classes(*names):
        raise ValueError(f"the classes of A{of[0]} are not those of B{of[1]}: {listed(differing)}; {remedy}")
    if differing:
        logger.info("classes with other names in A than in B: %s", listed(differing))


class _Pair(NamedTuple):
    """Predictions of one image by both models; `np.asarray` waits for them and stacks them to (2, H, W)."""

    a: Any
    b: Any

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        both = np.stack([np.asarray(self.a), np.asarray(self.b)])
        return both if dtype is None else both.astype(dtype)


def _both(begin_a: Predict, begin_b: Predict) -> Predict:
    def begin(images: list[np.ndarray]) -> list[_Pair]:
        return [_Pair(a, b) for a, b in zip(begin_a(images), begin_b(images), strict=True)]

    return begin


@dataclasses.dataclass(frozen=True)
class _Compared:
    """Counts of two models.

    Attributes:
      by_image: `metrics.class_counts` of each image, int32 (2, N, 3, K).
      numbers: Number in the split of each of the N images.
      labelled: Number of labelled pixels.
      differing: Number of labelled pixels whose predictions differ.
      predicted: Predictions (2, H, W) of the images whose own mean IoU differs most, by number, in order.
    """

    by_image: np.ndarray
    numbers: list[int]
    labelled: int
    differing: int
    predicted: dict[int, np.ndarray]

    def summary(self, spec: specs.DatasetSpec, names: Sequence[str]) -> dict[str, Any]:
        """The result of `compare_models`."""
        a, b = (_ious(counts.sum(axis=0, dtype=np.int64)) for counts in self.by_image)
        mean_a, mean_b = metrics.mean(a), metrics.mean(b)
        intervals = metrics.bootstrap_difference(*self.by_image)
        pixels = self.by_image[0, :, 1].sum(axis=0, dtype=np.int64).tolist()
        rows = zip(spec.label_names, a, b, intervals.per_class_iou, pixels, strict=True)
        places = {number: place for place, number in enumerate(self.numbers)}
        return {
            **_of_both(mean_a, mean_b),
            "difference_interval": None if intervals.mean_iou is None else list(intervals.mean_iou),
            "differing_pixels": self.differing / self.labelled if self.labelled else None,
            "classes": [
                {
                    "class": name,
                    "iou_a": iou_a,
                    "iou_b": iou_b,
                    "difference": _minus(iou_b, iou_a),
                    "interval": None if interval is None else list(interval),
                    "pixels": total,
                }
                for name, iou_a, iou_b, interval, total in rows
            ],
            "images": [
                {"name": names[number], **_of_both(*map(_mean_iou, self.by_image[:, places[number]]))}
                for number in self.predicted
            ],
        }


def _compared(
    inferences: Sequence[Inference], opened: OpenSplit, *, batch: int, shown: int, progress: bool
) -> _Compared:
    """Evaluates two models in one pass over a split."""
    a, b = inferences
    found = predictions(
        _both(a.begin, b.begin),
        opened.data,
        opened.spec,
        batch_size=min(inference.protocol.images_at_a_time(batch) for inference in inferences),
        key=lambda size: (a.protocol.input_sizes(size), b.protocol.input_sizes(size)),
    )
    if progress:
        found = console.ProgressBar("comparing", len(records_of(opened.data)), "images").over(found)
    by_image, numbers, labelled, differing = [], [], 0, 0
    most: list[tuple[float, int]] = []
    kept: dict[int, np.ndarray] = {}
    for number, truth, pair in found:
        valid = truth != opened.spec.ignore_label
        labelled += int(np.count_nonzero(valid))
        differing += int(np.count_nonzero((pair[0] != pair[1]) & valid))
        counts = np.stack([_counts(truth, predicted, opened.spec) for predicted in pair])
        by_image.append(counts.astype(np.int32))
        numbers.append(number)
        difference = _minus(*map(_mean_iou, counts))
        if difference:
            most = sorted([*most, (-abs(difference), number)])[:shown]
            kept = {k: pair if k == number else kept[k] for _, k in most}
    return _Compared(np.stack(by_image, axis=1), numbers, labelled, differing, kept)


def _counts(truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec) -> np.ndarray:
    settings = dict(num_classes=spec.num_classes, ignore_label=spec.ignore_label)
    return metrics.class_counts(metrics.confusion_matrix(truth, predicted, **settings))


def _ious(counts: np.ndarray) -> list[float | None]:
    """IoU of each class from `metrics.class_counts` (3, K), None for a class without true or predicted pixels."""
    right, truth, predicted = counts.astype(np.int64)
    union = truth + predicted - right
    return [float(hit / total) if total else None for hit, total in zip(right, union, strict=True)]


def _mean_iou(counts: np.ndarray) -> float | None:
    return metrics.mean(_ious(counts))


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _of_both(mean_a: float | None, mean_b: float | None) -> dict[str, float | None]:
    return {"mean_iou_a": mean_a, "mean_iou_b": mean_b, "difference": _minus(mean_b, mean_a)}


def _shown(records: Records, number: int, pair: np.ndarray) -> comparison.Shown:
    return comparison.Shown(records.names[number], *records[number], *pair)


def _metadata_of(name: str, checkpoint: Loaded, protocol: Protocol) -> dict[str, Any]:
    return {
        "checkpoint": name,
        "step": checkpoint.metadata.get("step"),
        "model": metadata_of(checkpoint.model),
        "protocol": protocol.record(),
    }


def _facts(checkpoints: Sequence[dict[str, Any]], protocols: Sequence[Protocol]) -> dict[str, str]:
    """What A and B are, for the report."""
    facts = {}
    for letter, about, protocol in zip("AB", checkpoints, protocols, strict=True):
        step = "" if about["step"] is None else f", step {about['step']}"
        facts[letter] = f"{about['checkpoint']}{step} ({about['model']['name']}, {protocol})"
    return facts
