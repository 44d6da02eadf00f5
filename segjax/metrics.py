"""Mean intersection over union (mIoU) and accuracies from one confusion matrix, summed over all images first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, *, num_classes: int, ignore_label: int) -> np.ndarray:
    """Pixel counts by (truth, prediction): int64 (K, K); K = 2 for a binary model of one class.

    Args:
      labels, predicted: integer arrays of the same shape; pixels labelled `ignore_label` do not count.

    Raises:
      ValueError: a label that is neither a train id nor the ignore label; names the values.
    """
    classes = max(num_classes, 2)
    valid = labels != ignore_label
    truth = labels[valid].astype(np.int64)
    if truth.size and (truth.max() >= classes or truth.min() < 0):
        strangers = np.unique(truth[(truth >= classes) | (truth < 0)]).tolist()
        raise ValueError(
            f"label values {strangers} are neither in 0..{classes - 1} nor the ignore label {ignore_label}"
        )
    pairs = truth * classes + predicted[valid].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def summarise(confusion: np.ndarray) -> dict[str, Any]:
    """`mean_iou`, `pixel_accuracy` and `per_class_iou` of a confusion matrix (K, K).

    `per_class_iou` is a list of K numbers. A class that is in neither truth nor prediction has the IoU None and is not
    part of the mean. If no pixel was counted, the means are None.
    """
    right = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    per_class = [float(hit / total) if total else None for hit, total in zip(right, union, strict=True)]
    total = int(confusion.sum())
    return {
        "mean_iou": mean(per_class),
        "pixel_accuracy": float(right.sum() / total) if total else None,
        "per_class_iou": per_class,
    }


def by_class(confusion: np.ndarray) -> dict[str, list]:
    """Lists of K figures: `iou`, `accuracy`, `precision`, `recall`, `dice`, and `pixels`, the labelled ones of a class.

    Accuracy and recall are the same, mmsegmentation's two names for the fraction of a class's pixels that are predicted
    as that class. A figure whose denominator is zero is None.
    """
    right, truth, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)

    def share(hits, of):
        return [float(hit / total) if total else None for hit, total in zip(hits, of, strict=True)]

    return {
        "iou": share(right, truth + guessed - right),
        "accuracy": share(right, truth),
        "precision": share(right, guessed),
        "recall": share(right, truth),
        "dice": share(2 * right, truth + guessed),
        "pixels": truth.tolist(),
    }


def mean(figures: Iterable[float | None]) -> float | None:
    """Mean of the figures that are not None; None if all are."""
    present = [figure for figure in figures if figure is not None]
    return float(np.mean(present)) if present else None
