"""Evaluation as published: logits enlarged to the label's size, argmax, one confusion matrix over all images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import jax
import numpy as np
from jax.experimental import multihost_utils

from segjax import metrics
from segjax.data import specs
from segjax.data.pipeline import Records, evaluation_batches, records_of


def evaluate(
    predict: Callable[[np.ndarray], np.ndarray],
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    keep: Collection[int] = (),
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Runs `predict` over a split; of several processes, each over its part of it.

    Args:
      predict: uint8 images (B, H, W, 3) -> train ids (B, H, W). Of several processes, each calls its own on its own
        devices, as often as it has batches.
      keep: numbers of images whose prediction is wanted.

    Returns:
      int64 confusion matrix (K, K) over the whole split, in every process; and uint8 (H, W) train ids by number of
      image, of those of `keep` that this process has seen.

    Raises:
      ValueError: there is no image, or one that cannot be used.
    """
    if not len(records_of(data)):
        raise ValueError(f"there is no image in the evaluation split of {spec.name}")
    classes = max(spec.num_classes, 2)
    confusion, kept, pending = np.zeros((classes, classes), np.int64), {}, None

    def count(labels, numbers, predicted):
        predicted = np.asarray(predicted)[: len(numbers)]
        kept.update({number: predicted[row] for row, number in enumerate(numbers.tolist()) if number in keep})
        return metrics.confusion_matrix(
            labels[: len(numbers)], predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label
        )

    part = jax.process_index(), jax.process_count()
    # Two batches are in flight: the device computes one while the host counts the pixels of the other.
    with contextlib.closing(evaluation_batches(data, batch_size=batch_size, part=part)) as batches:
        for images, labels, numbers in batches:
            predicted = predict(images)
            if pending is not None:
                confusion += count(*pending)
            pending = labels, numbers, predicted
    if pending is not None:
        confusion += count(*pending)
    return _sum_over_processes(confusion), kept


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Sum of the processes' int64 arrays, the same in each of them."""
    if jax.process_count() == 1:
        return counts
    # In halves, because without 64 bits jax would cut the counts off.
    halves = multihost_utils.process_allgather(counts.view(np.uint32))
    return np.ascontiguousarray(halves).view(np.int64).sum(axis=0)
