"""Evaluation as published: logits enlarged to the label's size, argmax, one confusion matrix over all images."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from segjax import metrics
from segjax.data import specs
from segjax.data.pipeline import evaluation_batches


def evaluate(
    predict: Callable[[np.ndarray], np.ndarray],
    split: specs.Split,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    keep: Collection[int] = (),
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Runs `predict` over a split.

    Args:
      predict: uint8 images (B, H, W, 3) -> train ids (B, H, W).
      keep: numbers of images whose prediction is wanted.

    Returns:
      int64 confusion matrix (K, K) and uint8 (H, W) train ids by number of image.
    """
    # Two batches are in flight: the device computes one while the host counts the pixels of the other.
    confusion, kept, pending = 0, {}, None

    def count(labels, numbers, predicted):
        predicted = np.asarray(predicted)[: len(numbers)]
        kept.update({number: predicted[row] for row, number in enumerate(numbers) if number in keep})
        return metrics.confusion_matrix(
            labels[: len(numbers)], predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label
        )

    for images, labels, numbers in evaluation_batches(split, batch_size=batch_size):
        predicted = predict(images)
        if pending is not None:
            confusion = confusion + count(*pending)
        pending = labels, numbers, predicted
    if pending is None:
        raise ValueError(f"there is no image in the evaluation split of {spec.name}")
    return confusion + count(*pending), kept
