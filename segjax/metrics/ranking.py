"""How well a score tells pixels apart that are to be found, such as anomalies or errors, from all others."""

from __future__ import annotations

import dataclasses

import numpy as np

# Scores are sorted by the first 17 bits of their float32: sign, exponent, and eight bits of the fraction.
BITS = 17


@dataclasses.dataclass
class ScoreCounts:
    """Counters of pixels by their score, which is high where something is to be found.

    Average precision, AUROC and FPR95 as in Blum et al., "The Fishyscapes Benchmark", IJCV 2021. Scores that agree in
    sign, exponent and eight bits of the fraction (differences of less than 0.4%) are taken as equal.

    Attributes:
      found: Number of pixels that are to be found, by score, int64 (131,072,).
      others: Number of all other pixels.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> counts = metrics.ScoreCounts()
      >>> counts.add(np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, False, True, False]))
      >>> figures = counts.figures()
      >>> round(figures["average_precision"], 6), figures["auroc"], figures["fpr95"]
      (0.833333, 0.75, 0.5)
    """

    found: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1 << BITS, np.int64))
    others: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(1 << BITS, np.int64))

    def add(self, score: np.ndarray, is_found: np.ndarray) -> None:
        """Counts pixels; pixels that are ignored must be omitted before.

        Args:
          score: Floats (N,), without NaN.
          is_found: Whether a pixel is to be found, bool (N,).

        Raises:
          ValueError: A score is NaN.
        """
        if np.isnan(score).any():
            raise ValueError(f"{np.isnan(score).sum()} of {score.size} scores are NaN")
        counter = _sortable(score.astype(np.float32)) >> np.uint32(32 - BITS)
        self.found += np.bincount(counter[is_found], minlength=1 << BITS)
        self.others += np.bincount(counter[~is_found], minlength=1 << BITS)

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        return ScoreCounts(self.found + other.found, self.others + other.others)

    def figures(self) -> dict[str, float | None]:
        """The measures, None where there is nothing to find or nothing else.

        Returns:
          `average_precision`: area under precision over recall, as a sum of steps. `auroc`: probability that a pixel to
          be found has a higher score than another pixel, ties counted as half. `fpr95`: fraction of the other pixels
          above the threshold that finds 95%.
        """
        return figures_of(self.found, self.others)


def figures_of(found: np.ndarray, others: np.ndarray) -> dict[str, float | None]:
    """`ScoreCounts.figures` of numbers of pixels by their score, which rises: two integer arrays of one length."""
    positive, negative = (np.cumsum(part[::-1]).astype(np.float64) for part in (found, others))
    if not positive[-1] or not negative[-1]:
        return dict.fromkeys(("average_precision", "auroc", "fpr95"))
    recall, false = positive / positive[-1], negative / negative[-1]
    taken = positive + negative
    precision = np.divide(positive, taken, out=np.zeros_like(taken), where=taken > 0)
    return {
        "average_precision": float(np.sum(np.diff(recall, prepend=0) * precision)),
        "auroc": float(np.sum(np.diff(false, prepend=0) * (recall + np.concatenate([[0], recall[:-1]])) / 2)),
        "fpr95": float(false[np.searchsorted(recall, 0.95)]),
    }


def _sortable(score: np.ndarray) -> np.ndarray:
    """uint32 numbers in the order of float32 numbers."""
    # The two zeros are one number.
    bits = (score + np.float32(0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
