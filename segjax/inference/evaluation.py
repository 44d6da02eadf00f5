"""Evaluation of a split: a confusion matrix over all images, and the worst of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike

from segjax import metrics
from segjax.data import specs
from segjax.data.pipeline import evaluation_batches
from segjax.data.records import Records, records_of
from segjax.runtime import console

SHOWN = 10  # images of the report

# Images (H, W, C) -> train ids (H, W) of each: arrays, or what `np.asarray` makes arrays of.
Predict = Callable[[list[np.ndarray]], Sequence[ArrayLike]]


def evaluate(
    predict: Predict,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
    keep: Collection[int] = (),
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Runs `predict` over a split; each of several processes evaluates its part of the split.

    Args:
      predict: called with the images of a batch. Each process calls its own on its own devices, as often as it has
        batches.
      batch_size, key: number of images of a batch, and which make one, as for `evaluation_batches`.
      keep: numbers of the images whose predictions are returned.

    Returns:
      int64 confusion matrix (K, K) over the whole split, the same in every process; and train ids (H, W) by image
      number, for the images of `keep` that this process evaluated.

    Raises:
      ValueError: there is no image, or one that cannot be used.
    """
    confusion, kept = _nothing_counted(spec), {}
    for number, truth, predicted in predictions(predict, data, spec, batch_size=batch_size, key=key):
        confusion += _count(truth, predicted, spec)
        if number in keep:
            kept[number] = predicted
    return _sum_over_processes(confusion), kept


def predictions(
    predict: Predict,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, labels (H, W) and prediction (H, W) of every image of this process's part; see `evaluate`.

    Raises:
      ValueError: there is no image.
    """
    if not len(records_of(data)):
        raise ValueError(f"there is no image in the evaluation split of {spec.name}")
    part = jax.process_index(), jax.process_count()
    pending = ()
    # Two batches are in flight: the device computes one while the host counts the pixels of the other.
    with contextlib.closing(evaluation_batches(data, batch_size=batch_size, key=key, part=part)) as batches:
        for images, labels, numbers in batches:
            batch = numbers.tolist(), labels, predict(images)
            yield from _rows(*pending)
            pending = batch
    yield from _rows(*pending)


def _rows(numbers=(), labels=(), predicted=()) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    # The last batch of a key repeats its last image.
    return zip(numbers, labels, map(np.asarray, predicted), strict=False)


def _nothing_counted(spec: specs.DatasetSpec) -> np.ndarray:
    return np.zeros((max(spec.num_classes, 2),) * 2, np.int64)


def _count(truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec) -> np.ndarray:
    return metrics.confusion_matrix(truth, predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label)


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Sum of the processes' int64 arrays, the same in each of them."""
    if jax.process_count() == 1:
        return counts
    # As halves of 32 bits, because jax without x64 would truncate the counts.
    halves = multihost_utils.process_allgather(counts.view(np.uint32))
    return np.ascontiguousarray(halves).view(np.int64).sum(axis=0)


# ------------------------------------------------------------------------------------------------------- with a report


class Measured(NamedTuple):
    """The evaluation of a split, and its worst images.

    Attributes:
      confusion: int64 (K, K) over all images.
      worst: (mean IoU, number) of the images with the lowest mean IoU, the lowest first; images without a labelled
        pixel are not among them.
      predicted: train ids (H, W) of the images in `worst`, by number.
    """

    confusion: np.ndarray
    worst: list[tuple[float, int]]
    predicted: dict[int, np.ndarray]


def measure(
    predict: Predict,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
    shown: int = SHOWN,
    progress: bool = False,
) -> Measured:
    """`evaluate` in one process. Keeps the `shown` worst images; `progress` selects whether the progress is printed."""
    confusion = _nothing_counted(spec)
    worst: list[tuple[float, int]] = []
    kept: dict[int, np.ndarray] = {}
    found = predictions(predict, data, spec, batch_size=batch_size, key=key)
    if progress:
        found = console.ProgressBar("evaluating", len(records_of(data)), "images").over(found)
    for number, truth, predicted in found:
        counts = _count(truth, predicted, spec)
        confusion += counts
        iou = metrics.summarise(counts)["mean_iou"]
        if iou is not None:
            worst = sorted([*worst, (iou, number)])[:shown]
            kept = {k: predicted if k == number else kept[k] for _, k in worst}
    return Measured(confusion, worst, kept)
