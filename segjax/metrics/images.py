"""IoU of single images, and how sure the mean over a data set is.

Wang et al., "Revisiting Evaluation Metrics for Semantic Segmentation: Optimization and Evaluation of Fine-grained
Intersection over Union", NeurIPS 2023 Datasets and Benchmarks, arXiv:2310.19252.
"""

from __future__ import annotations

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
    counts = counts[counts[:, 1].sum(axis=1) > 0].astype(np.float64)
    if len(counts) < 2:
        return None
    right, truth, predicted = np.moveaxis(counts, 1, 0)
    both = np.concatenate([right, truth + predicted - right], axis=1)
    rng = np.random.default_rng(seed)
    found = []
    # In parts, so that memory does not grow with the number of draws.
    for start in range(0, draws, 1000):
        weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=min(1000, draws - start))
        hits, union = np.split(weights @ both, 2, axis=1)
        ious = np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)
        found.append(np.nanmean(ious, axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
