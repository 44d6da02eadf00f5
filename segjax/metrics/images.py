"""IoU of single images, and how sure the mean over a data set is.

Wang et al., "Revisiting Evaluation Metrics for Semantic Segmentation: Optimization and Evaluation of Fine-grained
Intersection over Union", NeurIPS 2023 Datasets and Benchmarks, arXiv:2310.19252.
"""

from __future__ import annotations

import numpy as np

from segjax.metrics.confusion import mean


def image_ious(confusions: np.ndarray) -> np.ndarray:
    """Compute the IoU of each class in each image.

    Args:
      confusions: Confusion matrices (N, K, K) of N images, rows by true class.

    Returns:
      float64 (N, K), NaN where a class is not in the truth of an image.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> metrics.image_ious(np.array([[[3, 1], [0, 0]]])).tolist()
      [[0.75, nan]]
    """
    confusions = confusions.astype(np.float64)
    right, truth = np.diagonal(confusions, axis1=1, axis2=2), confusions.sum(axis=2)
    union = truth + confusions.sum(axis=1) - right
    return np.divide(right, union, out=np.full(right.shape, np.nan), where=truth > 0)


def over_images(confusions: np.ndarray, *, worst: float = 0.05) -> dict[str, float | None]:
    """Average IoU over images instead of over pixels.

    Args:
      confusions: Confusion matrices (N, K, K) of N images, rows by true class.
      worst: Fraction of the images that counts as the worst, at least one image.

    Returns:
      `image_iou`: mean over images of the mean IoU of the classes in the truth of an image. `class_iou`: mean over
      classes of the mean IoU over the images that have the class. `worst_image_iou`: as `image_iou`, of the worst
      images only. All in [0, 1], or None without labelled pixels.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> found = metrics.over_images(np.array([[[4, 0], [0, 4]], [[2, 2], [0, 0]]]))
      >>> found["image_iou"], found["class_iou"], found["worst_image_iou"]
      (0.75, 0.875, 0.5)
    """
    ious = image_ious(confusions)
    present = ~np.isnan(ious)
    filled = np.where(present, ious, 0.0)
    of_images = [float(row[has].mean()) for row, has in zip(filled, present, strict=True) if has.any()]
    of_classes = [float(column[has].mean()) for column, has in zip(filled.T, present.T, strict=True) if has.any()]
    lowest = sorted(of_images)[: max(1, int(worst * len(of_images)))]
    return {"image_iou": mean(of_images), "class_iou": mean(of_classes), "worst_image_iou": mean(lowest)}


def bootstrap_interval(
    confusions: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Estimate an interval for mIoU by drawing the images again, with replacement.

    The percentile bootstrap: Efron, "Bootstrap methods: another look at the jackknife", 1979. It tells how much mIoU
    would change with other images of the same kind, not with another training.

    Args:
      confusions: Confusion matrices (N, K, K) of N images, rows by true class.
      level: Probability of the interval.
      draws: Number of drawn data sets.
      seed: Seed of the draws.

    Returns:
      Lower and upper end, or None for fewer than two images with labelled pixels.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> images = np.array([[[9, 1], [0, 5]], [[5, 5], [1, 9]], [[8, 1], [2, 7]]])
      >>> low, high = metrics.bootstrap_interval(images)
      >>> bool(0.4 < low < high < 1.0)
      True
    """
    flat = confusions.reshape(len(confusions), -1).astype(np.float64)
    flat = flat[flat.sum(axis=1) > 0]
    if len(flat) < 2:
        return None
    classes = confusions.shape[-1]
    # A class needs its true positives, and its pixels in the truth and in the prediction.
    matrices = flat.reshape(-1, classes, classes)
    right = np.diagonal(matrices, axis1=1, axis2=2)
    both = np.concatenate([right, matrices.sum(axis=2) + matrices.sum(axis=1) - right], axis=1)
    rng = np.random.default_rng(seed)
    found = []
    # In parts, so that memory does not grow with the number of draws.
    for start in range(0, draws, 1000):
        weights = rng.multinomial(len(flat), np.full(len(flat), 1 / len(flat)), size=min(1000, draws - start))
        hits, union = np.split(weights @ both, 2, axis=1)
        ious = np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)
        found.append(np.nanmean(ious, axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
