"""Whether a model's confidence matches its accuracy: calibration errors, proper scores and the risk-coverage curve.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (ECE, reliability diagrams); Nixon et al., "Measuring
Calibration in Deep Learning", 2019 (bins of equal mass); Brier, 1950; Geifman et al., ICLR 2019 (AURC).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from segjax.metrics import ranking

BINS = 15
# Counters, from which bins of equal mass and the curve of risk are computed, too. The first 14 of the equal bins have
# equal counters. In the last one, where a trained model has most pixels, the distance of a confidence from 1 matters:
# its counters divide each of 30 halvings of this distance.
PER_BIN, PER_HALVING, HALVINGS = 3584, 512, 30
_BEFORE_LAST = (BINS - 1) * PER_BIN
COUNTERS = _BEFORE_LAST + PER_HALVING * HALVINGS  # 65,536: a number of a counter has 16 bits
_STARTS = np.arange(BINS) * PER_BIN


def counter_of(uncertainty: Any, xp: Any = np) -> Any:
    """Number of the counter of a pixel, from 0 for the lowest confidence to 65,535.

    Args:
      uncertainty: 1 - confidence, floats of any shape, as an array of `xp`.
      xp: numpy or jax.numpy.

    Returns:
      Whole floats of the same shape.

    Example:
      >>> import numpy as np
      >>> from segjax.metrics import calibration
      >>> calibration.counter_of(np.array([1.0, 0.5, 0.0])).tolist()
      [0.0, 26879.0, 65535.0]
    """
    equal = xp.ceil((1 - uncertainty) * (BINS * PER_BIN)) - 1
    halvings = -xp.log2(xp.clip(uncertainty * BINS, 2.0**-HALVINGS, 1.0))
    last = _BEFORE_LAST + xp.clip(xp.floor(halvings * PER_HALVING), 0, PER_HALVING * HALVINGS - 1)
    # Written so that NaN is in the first counter.
    return xp.where(equal >= _BEFORE_LAST, last, xp.where(equal > 0, equal, 0.0))


def _middles() -> np.ndarray:
    """A confidence of each counter, float64 (65,536,)."""
    equal = (np.arange(_BEFORE_LAST) + 0.5) / (BINS * PER_BIN)
    halvings = (np.arange(COUNTERS - _BEFORE_LAST) + 0.5) / PER_HALVING
    return np.concatenate([equal, 1 - 2.0**-halvings / BINS])


MIDDLES = _middles()


@dataclasses.dataclass
class Calibration:
    """Counters of labelled pixels by confidence, the probability of the predicted class.

    Attributes:
      pixels: Number of pixels, int64 (65,536,), by `counter_of`.
      right: Number of those whose class is right, int64.
      confidence: Sum of their confidences, float64.
      brier: Sum over pixels of the squared distance between probabilities and the true class.
      nll: Sum over pixels of the negative logarithm of the true class's probability.

    Example:
      >>> import numpy as np
      >>> from segjax import metrics
      >>> found = metrics.Calibration()
      >>> found.add(np.array([0.9, 0.6]), np.array([True, False]), np.array([0.9, 0.4]), np.array([0.82, 0.52]))
      >>> figures = found.figures()
      >>> round(figures["ece"], 6), round(figures["brier"], 6)
      (0.35, 0.37)
    """

    pixels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(COUNTERS, np.int64))
    right: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(COUNTERS, np.int64))
    confidence: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(COUNTERS, np.float64))
    brier: float = 0.0
    nll: float = 0.0

    def add(self, confidence: np.ndarray, right: np.ndarray, of_label: np.ndarray, squares: np.ndarray) -> None:
        """Counts pixels. The caller removes ignored pixels first.

        Args:
          confidence: Probability of the predicted class of each pixel, floats (N,).
          right: Whether the predicted class is the true one, bool (N,).
          of_label: Probability of the true class, floats (N,).
          squares: Sum of the squared probabilities of all classes, floats (N,).
        """
        confidence = confidence.astype(np.float64)
        counter = counter_of(1 - confidence).astype(np.int64)
        self.pixels += np.bincount(counter, minlength=COUNTERS)
        self.right += np.bincount(counter[right], minlength=COUNTERS)
        self.confidence += np.bincount(counter, weights=confidence, minlength=COUNTERS)
        of_label = of_label.astype(np.float64)
        self.brier += float(np.sum(squares.astype(np.float64) - 2 * of_label + 1))
        self.nll -= float(np.sum(np.log(np.maximum(of_label, np.finfo(np.float32).tiny))))

    def add_counted(self, counter: np.ndarray, right: np.ndarray, *, brier: float, nll: float) -> None:
        """Counts pixels whose counters are known, such as those that a device computed.

        Their sum of confidences is that of the counters' middles: it is exact to 1e-5 per pixel, and mostly far better.

        Args:
          counter: `counter_of` each pixel, unsigned integers (N,).
          right: As for `add`.
          brier: Sum over these pixels, as in the attribute.
          nll: Sum over these pixels, as in the attribute.
        """
        pixels = np.bincount(counter, minlength=COUNTERS)
        self.pixels += pixels
        self.right += np.bincount(counter[right], minlength=COUNTERS)
        self.confidence += pixels * MIDDLES
        self.brier += brier
        self.nll += nll

    @classmethod
    def of_counters(cls, pixels: np.ndarray, right: np.ndarray, *, brier: float, nll: float) -> Calibration:
        """The same as one call of `add_counted` for all pixels, from the numbers of pixels of each counter.

        Args:
          pixels: As in the attribute.
          right: As in the attribute.
          brier: As in the attribute.
          nll: As in the attribute.
        """
        return cls(pixels, right, pixels * MIDDLES, brier, nll)

    def __add__(self, other: Calibration) -> Calibration:
        names = [field.name for field in dataclasses.fields(self)]
        return Calibration(*(getattr(self, name) + getattr(other, name) for name in names))

    def reliability(self) -> list[dict[str, float | int | None]]:
        """The reliability diagram: `pixels`, mean `confidence` and `accuracy` of each of the 15 equal bins.

        Both means are None for a bin without pixels.
        """
        rows = zip(*self._of_equal_bins(), strict=True)
        return [
            {
                "pixels": int(pixels),
                "confidence": float(confidence / pixels) if pixels else None,
                "accuracy": float(right / pixels) if pixels else None,
            }
            for pixels, right, confidence in rows
        ]

    def figures(self) -> dict[str, float | None]:
        """The measures over all pixels, all None without pixels.

        Returns:
          `ece`: expected calibration error with 15 equal bins. `adaptive_ece`: the same with 15 bins of equal mass.
          `brier`: mean squared distance between probabilities and the true class, from 0 to 2. `nll`: mean negative
          log-likelihood, nats. `aurc`: area under the curve of risk over coverage, the mean over k of the fraction of
          errors among the k pixels of highest confidence.
        """
        total = int(self.pixels.sum())
        if not total:
            return dict.fromkeys(("ece", "adaptive_ece", "brier", "nll", "aurc"))
        _, right, confidence = self._of_equal_bins()
        right_of_mass, confidence_of_mass = self._of_equal_mass(total)
        return {
            "ece": _gap(right, confidence, total),
            "adaptive_ece": _gap(right_of_mass, confidence_of_mass, total),
            "brier": _finite(self.brier / total),
            "nll": _finite(self.nll / total),
            "aurc": self._area(total),
        }

    def error_figures(self) -> dict[str, float | None]:
        """How well a low confidence finds errors, as `ScoreCounts.figures` of the score 1 - confidence."""
        return ranking.figures_of((self.pixels - self.right)[::-1], self.right[::-1])

    def _of_equal_bins(self) -> list[np.ndarray]:
        """Pixels, right pixels and sum of confidences of the 15 equal bins."""
        return [np.add.reduceat(part, _STARTS) for part in (self.pixels, self.right, self.confidence)]

    def _of_equal_mass(self, total: int) -> tuple[np.ndarray, np.ndarray]:
        """Right pixels and sum of confidences of 15 bins of equal mass.

        A counter that an edge falls into is divided in proportion.
        """
        edges = np.linspace(0, total, BINS + 1)
        before = np.concatenate([[0], np.cumsum(self.pixels)])
        # Cumulative counts repeat where counters are empty, and np.interp needs increasing values.
        steps = np.concatenate([[True], np.diff(before) > 0])

        def of_bins(part: np.ndarray) -> np.ndarray:
            cumulative = np.concatenate([[0.0], np.cumsum(part, dtype=np.float64)])
            return np.diff(np.interp(edges, before[steps], cumulative[steps]))

        return of_bins(self.right), of_bins(self.confidence)

    def _area(self, total: int) -> float:
        """Mean over k of errors(k) / k; within a counter, errors are spread evenly."""
        pixels, wrong = self.pixels[::-1], (self.pixels - self.right)[::-1]
        has = pixels > 0
        pixels, wrong = pixels[has].astype(np.float64), wrong[has].astype(np.float64)
        before, errors = np.cumsum(pixels) - pixels, np.cumsum(wrong) - wrong
        # The sum over j = 1..n of (e + r j) / (m + j) is r n + (e - r m) (H(m + n) - H(m)), H the harmonic numbers.
        rate = wrong / pixels
        harmonic = _harmonic(before + pixels) - _harmonic(before)
        return float(np.sum(rate * pixels + (errors - rate * before) * harmonic) / total)


def _finite(figure: float) -> float | None:
    """The figure; None where probabilities were not finite."""
    return figure if np.isfinite(figure) else None


def _gap(right: np.ndarray, confidence: np.ndarray, total: int) -> float:
    """Sum over bins of |right - confidence|, per pixel."""
    return float(np.abs(right - confidence).sum() / total)


def _harmonic(number: np.ndarray) -> np.ndarray:
    """The harmonic numbers H(n), n >= 0: exact to 1e-15 of their value."""
    small = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, 65))])
    large = np.maximum(number, 64)
    series = np.log(large) + np.euler_gamma + 1 / (2 * large) - 1 / (12 * large**2) + 1 / (120 * large**4)
    return np.where(number <= 64, small[np.minimum(number, 64).astype(np.int64)], series)
