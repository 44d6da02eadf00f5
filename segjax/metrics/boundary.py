"""Boundary IoU: the IoU of the pixels near contours, where large objects and thin ones count alike.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021, arXiv:2103.16562.
"""

from __future__ import annotations

import math

import numpy as np

from segjax.metrics.confusion import mean


def boundary_width(size: tuple[int, int]) -> int:
    """Return the width of the boundary that the paper uses: 2% of the image's diagonal.

    Args:
      size: Height and width of the image, pixels.

    Returns:
      Pixels, at least 1.

    Example:
      >>> from segjax import metrics
      >>> metrics.boundary_width((1024, 2048))
      46
    """
    return max(1, round(0.02 * math.hypot(*size)))


def boundary_band(labels: np.ndarray, width: int) -> np.ndarray:
    """Find the pixels within `width` of the contour of their own class, for all classes at once.

    A pixel is near the contour of its class if and only if the largest and the smallest label in the square window
    around it differ. So two filters do what the paper's code does by eroding the mask of each class. As there, the
    border of the image is a contour.

    Args:
      labels: Integers (H, W), non-negative and less than 65,535.
      width: Distance from the contour, pixels.

    Returns:
      bool (H, W).

    Raises:
      ValueError: A label is out of range.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> metrics.boundary_band(np.array([[0, 0, 0, 0, 0, 0, 1, 1, 1]] * 9), 2)[4].astype(int).tolist()
      [1, 1, 0, 0, 1, 1, 1, 1, 1]
    """
    import cv2

    if labels.size and not 0 <= labels.min() <= labels.max() < 65_535:
        raise ValueError(f"labels are from 0 to 65,534, and there are {labels.min()} and {labels.max()}")
    kind, outside = (np.uint8, 255) if not labels.size or labels.max() < 255 else (np.uint16, 65_535)
    padded = np.pad(labels.astype(kind), width, constant_values=outside)
    window = np.ones((2 * width + 1,) * 2, np.uint8)
    inside = slice(width, -width)
    return (cv2.dilate(padded, window) != cv2.erode(padded, window))[inside, inside]


def boundary_counts(
    labels: np.ndarray, predicted: np.ndarray, *, num_classes: int, ignore_label: int, width: int | None = None
) -> np.ndarray:
    """Count, for each class, the pixels of the boundaries of an image: of both, of the truth, of the prediction.

    Pixels with the ignore label do not count. Classes end where they begin, in the prediction too.

    Args:
      labels: True classes, integers (H, W).
      predicted: Predicted classes, integers (H, W).
      num_classes: Number of classes K; a binary model of one class counts as K = 2.
      ignore_label: Label of the pixels that do not count.
      width: Width of the boundary, pixels; by default `boundary_width` of the image.

    Returns:
      int64 (3, K): pixels in both boundaries of a class, in that of the truth, in that of the prediction. The sums
      over images are what `boundary_iou` takes.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> labels = np.repeat([[0, 0, 0, 1, 1, 1]], 6, axis=0)
      >>> metrics.boundary_counts(labels, labels, num_classes=2, ignore_label=255, width=1).tolist()
      [[14, 14], [14, 14], [14, 14]]
    """
    classes = max(num_classes, 2)
    width = boundary_width(labels.shape) if width is None else width
    valid = labels != ignore_label
    # One number for all that is ignored: class K.
    truth, guess = (np.where(valid, array, classes).astype(np.int64) for array in (labels, predicted))
    # Class K again for all pixels away from a contour.
    truth, guess = (np.where(boundary_band(array, width), array, classes) for array in (truth, guess))
    return np.stack(
        [
            np.bincount(array.ravel(), minlength=classes + 1)[:classes]
            for array in (np.where(truth == guess, truth, classes), truth, guess)
        ]
    )


def boundary_iou(counts: np.ndarray) -> dict[str, object]:
    """Compute Boundary IoU from the sums of `boundary_counts` over images.

    Args:
      counts: Integers (3, K).

    Returns:
      `mean_boundary_iou` and `per_class_boundary_iou`, a list of K numbers, all in [0, 1]. A class without boundaries
      is None and does not enter the mean.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> metrics.boundary_iou(np.array([[3, 0], [4, 0], [5, 0]]))
      {'mean_boundary_iou': 0.5, 'per_class_boundary_iou': [0.5, None]}
    """
    both, truth, guess = counts.astype(np.int64)
    union = truth + guess - both
    per_class = [float(hit / total) if total else None for hit, total in zip(both, union, strict=True)]
    return {"mean_boundary_iou": mean(per_class), "per_class_boundary_iou": per_class}
