"""IoU of single images, and how sure the mean over a data set is.

Wang et al., "Revisiting Evaluation Metrics for Semantic Segmentation: Optimization and Evaluation of Fine-grained
Intersection over Union", NeurIPS 2023 Datasets and Benchmarks, arXiv:2310.19252.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from segjax.metrics.confusion import mean


def class_counts(confusion: np.ndarray) -> np.ndarray:
    """Reduce a confusion matrix to what IoU needs.

    Args:
      confusion: Confusion matrix (K, K), rows by true class.

    Returns:
      int64 (3, K): number of pixels of each class that are right, in the truth, and in the prediction.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> metrics.class_counts(np.array([[3, 1], [0, 2]])).tolist()
      [[3, 2], [4, 2], [3, 3]]
    """
    return np.stack([np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)])


def image_ious(counts: np.ndarray) -> np.ndarray:
    """Compute the IoU of each class in each image.

    Args:
      counts: `class_counts` of N images, (N, 3, K).

    Returns:
      float64 (N, K), NaN where a class is not in the truth of an image.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> metrics.image_ious(np.array([[[3, 0], [4, 0], [3, 1]]])).tolist()
      [[0.75, nan]]
    """
    right, truth, predicted = np.moveaxis(counts.astype(np.float64), 1, 0)
    return np.divide(right, truth + predicted - right, out=np.full(right.shape, np.nan), where=truth > 0)


def over_images(counts: np.ndarray, *, worst: float = 0.05) -> dict[str, float | None]:
    """Average IoU over images instead of over pixels.

    Args:
      counts: `class_counts` of N images, (N, 3, K).
      worst: Fraction of the images that counts as the worst, at least one image.

    Returns:
      `image_iou`: mean over images of the mean IoU of the classes in the truth of an image. `class_iou`: mean over
      classes of the mean IoU over the images that have the class. `worst_image_iou`: as `image_iou`, of the worst
      images only. All in [0, 1], or None without labelled pixels.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> images = [[[4, 0], [0, 4]], [[2, 2], [0, 0]]]
      >>> found = metrics.over_images(np.stack([metrics.class_counts(np.array(image)) for image in images]))
      >>> found["image_iou"], found["class_iou"], found["worst_image_iou"]
      (0.75, 0.875, 0.5)
    """
    ious = image_ious(counts)
    present = ~np.isnan(ious)
    filled = np.where(present, ious, 0.0)
    of_images = [float(row[has].mean()) for row, has in zip(filled, present, strict=True) if has.any()]
    of_classes = [float(column[has].mean()) for column, has in zip(filled.T, present.T, strict=True) if has.any()]
    lowest = sorted(of_images)[: max(1, int(worst * len(of_images)))]
    return {"image_iou": mean(of_images), "class_iou": mean(of_classes), "worst_image_iou": mean(lowest)}


def bootstrap_interval(
    counts: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Estimate an interval for mIoU by drawing the images again, with replacement.

    The percentile bootstrap: Efron, "Bootstrap methods: another look at the jackknife", 1979. It tells how much mIoU
    would change with other images of the same kind, not with another training.

    Args:
      counts: `class_counts` of N images, (N, 3, K).
      level: Probability of the interval.
      draws: Number of drawn data sets.
      seed: Seed of the draws.

    Returns:
      Lower and upper end, or None for fewer than two images with labelled pixels.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> images = [[[9, 1], [0, 5]], [[5, 5], [1, 9]], [[8, 1], [2, 7]]]
      >>> counts = np.stack([metrics.class_counts(np.array(image)) for image in images])
      >>> low, high = metrics.bootstrap_interval(counts)
      >>> bool(0.4 < low < high < 1.0)
      True
    """
    found = [np.nanmean(ious, axis=1) for (ious,) in _drawn_ious(counts[None], draws=draws, seed=seed)]
    if not found:
        return None
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Differences(NamedTuple):
    """Intervals for the second of two models minus the first, see `bootstrap_difference`.

    Attributes:
      mean_iou: Lower and upper end for mIoU, or None for fewer than two images with labelled pixels.
      per_class_iou: The same for the IoU of each class, K entries; None for a class that has no IoU with one of the
        models.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> first, second = np.full((4, 3, 1), 9), np.full((4, 3, 1), 9)
      >>> metrics.bootstrap_difference(first, second).mean_iou
      (0.0, 0.0)
    """

    mean_iou: tuple[float, float] | None
    per_class_iou: list[tuple[float, float] | None]


def bootstrap_difference(
    first: np.ndarray, second: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Differences:
    """Estimate intervals for the difference between two models by drawing the images again, the same for both.

    The paired percentile bootstrap. Images that are hard for both models do not widen the interval, as they widen those
    of `bootstrap_interval` for each. An interval without 0 means that other images of the same kind would hardly change
    which model is better. A drawn data set without a class does not count for the interval of this class.

    Args:
      first: `class_counts` of N images by the first model, (N, 3, K).
      second: The same by the second model, for the same images in the same order.
      level: Probability of each interval.
      draws: Number of drawn data sets.
      seed: Seed of the draws.

    Returns:
      Intervals for IoU of the second model minus IoU of the first.

    Raises:
      ValueError: The two are not counts of the same images.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> def counts(images):
      ...     return np.stack([metrics.class_counts(np.array(image)) for image in images])
      >>> worse = counts([[[9, 1], [2, 5]], [[5, 5], [1, 9]], [[8, 2], [2, 7]]])
      >>> better = counts([[[10, 0], [2, 5]], [[9, 1], [1, 9]], [[10, 0], [2, 7]]])
      >>> low, high = metrics.bootstrap_difference(worse, better).mean_iou
      >>> bool(0 < low < high < 1)
      True
    """
    if first.shape != second.shape or (first[:, 1] != second[:, 1]).any():
        raise ValueError(f"counts of shapes {first.shape} and {second.shape} are not those of the same labels")
    means, classes = [], []
    for one, other in _drawn_ious(np.stack([first, second]), draws=draws, seed=seed):
        means.append(np.nanmean(other, axis=1) - np.nanmean(one, axis=1))
        classes.append(other - one)
    if not means:
        return Differences(None, [None] * first.shape[2])
    ends = (1 - level) / 2, (1 + level) / 2
    low, high = np.quantile(np.concatenate(means), ends)
    columns = (column[~np.isnan(column)] for column in np.concatenate(classes).T)
    quantiles = (np.quantile(column, ends).tolist() if len(column) else None for column in columns)
    return Differences((float(low), float(high)), [None if pair is None else (pair[0], pair[1]) for pair in quantiles])


def _drawn_ious(counts: np.ndarray, *, draws: int, seed: int) -> Iterator[np.ndarray]:
    """IoU of each class in data sets that are drawn from the labelled images, in parts of at most 1,000 draws.

    Args:
      counts: `class_counts` of N images by M models, (M, N, 3, K).
      draws: Number of drawn data sets.
      seed: Seed of the draws.

    Yields:
      float64 (M, D, K), NaN for a class without pixels; nothing for fewer than two images with labelled pixels.
    """
    counts = counts[:, counts[0, :, 1].sum(axis=1) > 0].astype(np.float64)
    images = counts.shape[1]
    if images < 2:
        return
    right, truth, predicted = np.moveaxis(counts, 2, 0)
    both = np.concatenate([right, truth + predicted - right], axis=2)  # (M, N, 2 K)
    rng = np.random.default_rng(seed)
    # In parts, so that memory does not grow with the number of draws.
    for start in range(0, draws, 1000):
        weights = rng.multinomial(images, np.full(images, 1 / images), size=min(1000, draws - start))
        hits, union = np.split(weights @ both, 2, axis=2)
        yield np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)
