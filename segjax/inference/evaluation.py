"""Evaluation of a split: a confusion matrix over all images, and the worst images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from numpy.typing import ArrayLike

from segjax import metrics
from segjax.checkpoints.state_dict import logger
from segjax.data import specs
from segjax.data.pipeline import evaluation_batches, evaluation_groups
from segjax.data.records import Records, records_of
from segjax.inference.certainty import CountedLabels
from segjax.inference.unfinished import Counts, Unfinished, joined
from segjax.runtime import console, distributed

SHOWN = 10  # images in the report

# Images (H, W, C) -> train ids (H, W) of each, as arrays or as objects that `np.asarray` converts.
Predict = Callable[[list[np.ndarray]], Sequence[ArrayLike]]
# Images and their true train ids (H, W) -> what `Inference.begin_counted` returns.
PredictCounted = Callable[[list[np.ndarray], list[np.ndarray]], Sequence[CountedLabels]]
Outcome = TypeVar("Outcome")


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
      predict: Function of the images of a batch. Each process calls its own on its own devices, once per batch.
      data: Split to evaluate.
      spec: Dataset of the split.
      batch_size: Number of images per batch.
      key: Key by image size; images of equal keys share a batch, as for `evaluation_batches`.
      keep: Numbers of the images whose predictions are returned.

    Returns:
      The int64 confusion matrix (K, K) over the whole split, equal in every process; and train ids (H, W) by image
      number, for the images of `keep` that this process evaluated.

    Raises:
      ValueError: There is no image, or an image cannot be used.
    """
    confusion, kept = _nothing_counted(spec), {}
    for number, truth, predicted in predictions(predict, data, spec, batch_size=batch_size, key=key):
        confusion += _count(truth, predicted, spec)
        if number in keep:
            kept[number] = predicted
    return sum_over_processes(confusion), kept


def predictions(
    predict: Predict,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, labels (H, W) and prediction (H, W) of every image in this process's part; see `evaluate`.

    Raises:
      ValueError: There is no image.
    """
    outcomes = _outcomes(lambda images, _: predict(images), data, spec, batch_size=batch_size, key=key)
    for number, truth, predicted in outcomes:
        yield number, truth, np.asarray(predicted)


def _outcomes(
    predict: Callable[[list[np.ndarray], list[np.ndarray]], Sequence[Outcome]],
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None,
    done: Collection[int] = (),
) -> Iterator[tuple[int, np.ndarray, Outcome]]:
    """`predictions` for a function of images and labels, whose results are not read."""
    if not len(records_of(data)):
        raise ValueError(f"there is no image in the evaluation split of {spec.name}")
    part = jax.process_index(), jax.process_count()
    pending: tuple = ((), (), ())
    # Two batches are in flight: the device computes one while the host counts pixels of the other.
    with contextlib.closing(evaluation_batches(data, batch_size=batch_size, key=key, part=part, done=done)) as batches:
        for images, labels, numbers in batches:
            batch = numbers.tolist(), labels, predict(images, labels)
            # The last batch of a key repeats its last image.
            yield from zip(*pending, strict=False)
            pending = batch
    yield from zip(*pending, strict=False)


def _nothing_counted(spec: specs.DatasetSpec) -> np.ndarray:
    return np.zeros((max(spec.num_classes, 2),) * 2, np.int64)


def _count(truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec) -> np.ndarray:
    return metrics.confusion_matrix(truth, predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label)


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Sum of the int64 arrays of all processes, equal in each process, which waits for the others."""
    distributed.wait_for_all()
    return np.sum(distributed.gathered(counts), axis=0)


def own_number(
    data: specs.Split | Records,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None,
    done: Collection[int] = (),
) -> int:
    """Number of images in this process's part."""
    part = jax.process_index(), jax.process_count()
    return sum(map(len, evaluation_groups(records_of(data), batch_size=batch_size, key=key, part=part, done=done)))


def labelled(what: str) -> str:
    """The label of a progress bar, which is that of the first process."""
    count = jax.process_count()
    return f"{what}, 1 of {count} processes" if count > 1 else what


# ------------------------------------------------------------------------------------------------------- with a report


class Measured(NamedTuple):
    """The evaluation of a split, and its worst images.

    Attributes:
      confusion: Confusion matrix over all images, int64 (K, K).
      boundary: Sum over images of `metrics.boundary_counts`, int64 (3, K).
      by_image: `metrics.class_counts` of each image, int32 (N, 3, K).
      worst: (mean IoU, number) of the images with the lowest mean IoU, the lowest first, without images that have no
        labelled pixel.
      predicted: Train ids (H, W) of the images in `worst`, by number.
      calibration: Counters of confidence; None for predictions without.
      nlls: Sums over pixels of NLL at further temperatures, float64 (G,); see `Inference.begin_counted`.
    """

    confusion: np.ndarray
    boundary: np.ndarray
    by_image: np.ndarray
    worst: list[tuple[float, int]]
    predicted: dict[int, np.ndarray]
    calibration: metrics.Calibration | None = None
    nlls: np.ndarray | None = None

    def details(self) -> dict[str, object]:
        """The measures of `metrics.boundary_iou` and `metrics.over_images`, "mean_iou_interval", and "calibration".

        The interval contains mIoU in 95% of data sets drawn from these images; see `metrics.bootstrap_interval`.
        Calibration has `Calibration.figures`, those of errors found by a low confidence with "error_" before their
        name, and "reliability", a dict for each of 15 equal bins. It is missing for predictions without counters.
        """
        interval = metrics.bootstrap_interval(self.by_image)
        return {
            **metrics.boundary_iou(self.boundary),
            **metrics.over_images(self.by_image),
            "mean_iou_interval": None if interval is None else list(interval),
            **({} if self.calibration is None else {"calibration": _summary_of(self.calibration)}),
        }


def _summary_of(calibration: metrics.Calibration) -> dict[str, object]:
    of_errors = {f"error_{name}": figure for name, figure in calibration.error_figures().items()}
    return {**calibration.figures(), **of_errors, "reliability": calibration.reliability()}


def measure(
    predict: Predict,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
    shown: int = SHOWN,
    progress: bool = False,
    counted: PredictCounted | None = None,
    unfinished: Unfinished | None = None,
) -> Measured:
    """`evaluate` that also counts by image, and keeps the `shown` worst images; `progress` turns on a progress bar.

    With `counted`, it is called in place of `predict`, and the result has a calibration. With `unfinished`, images that
    an evaluation that was killed has counted are not evaluated again. Each of several processes evaluates its part of
    the split, and the result is equal in every process, whatever their number.
    """

    def call(images: list[np.ndarray], labels: list[np.ndarray]) -> Sequence[Any]:
        return predict(images) if counted is None else counted(images, labels)

    counts = Counts.of_nothing(max(spec.num_classes, 2))
    done: list[int] = []
    if unfinished is not None:
        # The first process goes on with what all have counted.
        earlier = unfinished.collected(shown=shown) if distributed.is_lead() else None
        counts = earlier or counts
        done = distributed.gathered(sorted(counts.by_image))[0]
    if done:
        logger.info("%d of %d images were evaluated before", len(done), len(records_of(data)))
    found = _outcomes(call, data, spec, batch_size=batch_size, key=key, done=done)
    if progress:
        number = own_number(data, batch_size=batch_size, key=key, done=done)
        found = console.ProgressBar(labelled("evaluating"), number, "images").over(found)
    settings = dict(num_classes=spec.num_classes, ignore_label=spec.ignore_label)
    for number, truth, outcome in found:
        predicted = np.asarray(outcome if counted is None else outcome.labels)
        confusion = _count(truth, predicted, spec)
        counts.confusion += confusion
        if counted is not None:
            valid = truth != spec.ignore_label
            counter, right = np.asarray(outcome.counter)[valid], (predicted == truth)[valid]
            counts.pixels += np.bincount(counter, minlength=len(counts.pixels))
            counts.right += np.bincount(counter[right], minlength=len(counts.right))
            counts.sums[number] = outcome.sums()
        counts.by_image[number] = metrics.class_counts(confusion).astype(np.int32)
        counts.boundary += metrics.boundary_counts(truth, predicted, **settings)
        iou = metrics.summarise(confusion)["mean_iou"]
        if iou is not None:
            counts.keep_worst(iou, number, predicted, shown=shown)
        if unfinished is not None:
            unfinished.keep(counts)
    if unfinished is not None:
        # Another process may be lost, and a reference or corrupted images may follow.
        unfinished.keep(counts, now=True)
    distributed.wait_for_all()
    whole = joined(distributed.gathered(counts), shown=shown)
    by_image = np.stack([whole.by_image[number] for number in sorted(whole.by_image)])
    calibration, nlls = whole.calibration() or (None, None)
    return Measured(whole.confusion, whole.boundary, by_image, whole.worst, whole.predicted, calibration, nlls)
