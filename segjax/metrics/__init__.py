"""How good predictions are: IoU and accuracies, boundaries, single images, calibration, and scores of errors.

Every measure is a sum of counters, so that images can be measured one after the other and in several processes. Nothing
here needs a device.
"""

from segjax.metrics.boundary import boundary_band, boundary_counts, boundary_iou, boundary_width
from segjax.metrics.calibration import Calibration
from segjax.metrics.confusion import by_class, confusion_matrix, mean, summarise
from segjax.metrics.images import (
    Differences,
    bootstrap_difference,
    bootstrap_interval,
    class_counts,
    image_ious,
    over_images,
)
from segjax.metrics.ranking import ScoreCounts

__all__ = [
    "Calibration",
    "Differences",
    "ScoreCounts",
    "bootstrap_difference",
    "bootstrap_interval",
    "boundary_band",
    "boundary_counts",
    "boundary_iou",
    "boundary_width",
    "by_class",
    "class_counts",
    "confusion_matrix",
    "image_ious",
    "mean",
    "over_images",
    "summarise",
]
