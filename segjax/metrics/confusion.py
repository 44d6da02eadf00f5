"""Mean intersection over union (mIoU) and accuracies, from one confusion matrix summed over all images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, *, num_classes: int, ignore_label: int) -> np.ndarray:
    """Count pixels by true and predicted class.

    Args:
      labels: Integer array of any shape, with true classes.
      predicted: Integer array of the same shape, with predicted classes.
      num_classes: Number of classes K; a binary model of one class counts as K = 2.
      ignore_label: Label of the pixels that do not count.

    Returns:
      int64 (K, K), rows by true class, columns by predicted class.

    Raises:
      ValueError: A label is neither a train id nor the ignore label; the message lists such labels.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> labels, predicted = np.array([[0, 1, 1], [2, 2, 255]]), np.array([[0, 1, 2], [2, 2, 0]])
      >>> metrics.confusion_matrix(labels, predicted, num_classes=3, ignore_label=255).tolist()
      [[1, 0, 0], [0, 1, 1], [0, 0, 2]]
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
    """Compute mIoU and pixel accuracy.

    Args:
      confusion: Confusion matrix (K, K), rows by true class.

    Returns:
      `mean_iou`, `pixel_accuracy` and `per_class_iou`, a list of K numbers, all in [0, 1]. The IoU of a class without
      true or predicted pixels is None and does not enter the mean. Without any pixels the means are None.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> metrics.summarise(np.array([[3, 1], [0, 2]]))["per_class_iou"]
      [0.75, 0.6666666666666666]
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
    """Compute the figures of each class.

    Args:
      confusion: Confusion matrix (K, K), rows by true class.

    Returns:
      Lists of K figures: `iou`, `accuracy`, `precision`, `recall`, `dice`, all in [0, 1], and `pixels`, the number of
      true pixels. Accuracy and recall are equal: mmsegmentation has both names for the fraction of a class's pixels
      that are predicted as that class. A figure whose denominator is 0 is None.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> metrics.by_class(np.array([[3, 1], [0, 2]]))["recall"]
      [0.75, 1.0]
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
    """Average the figures that are not None.

    Args:
      figures: Numbers and None.

    Returns:
      The mean, or None without numbers.

    Example:
      >>> from segjax import metrics
      >>> metrics.mean([0.5, None, 1.0])
      0.75
    """
    present = [figure for figure in figures if figure is not None]
    return float(np.mean(present)) if present else None
