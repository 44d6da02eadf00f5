"""Counts of an evaluation that has not ended, so that the same command continues where a killed one stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from segjax import metrics
from segjax.metrics.calibration import COUNTERS
from segjax.runtime import atomic

# Name of the folder, inside the report's.
FOLDER = ".unfinished"


@dataclasses.dataclass
class Counts:
    """Counts over some of the images of a split.

    Integers are added up; floats are kept for each image, and summed in the order of the images at the end, so that the
    result does not depend on who counted which image.

    Attributes:
      confusion: Confusion matrix, int64 (K, K).
      boundary: Sum of `metrics.boundary_counts`, int64 (3, K).
      pixels: Number of labelled pixels of each counter of confidence, int64 (65,536,).
      right: Number of those whose class is right, int64.
      by_image: `metrics.class_counts` of each image, int32 (3, K), by its number.
      sums: `CountedLabels.sums` of each image, float64 (2 + G,), by its number; empty for predictions without counters.
      worst: (mean IoU, number) of the images with the lowest mean IoU, the lowest first.
      predicted: Train ids (H, W) of the images in `worst`, by number.
    """

    confusion: np.ndarray
    boundary: np.ndarray
    pixels: np.ndarray
    right: np.ndarray
    by_image: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    sums: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    worst: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    predicted: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_nothing(cls, num_classes: int) -> Self:
        """The counts of no images; `num_classes` is at least 2."""
        shapes = (num_classes, num_classes), (3, num_classes), (COUNTERS,), (COUNTERS,)
        confusion, boundary, pixels, right = (np.zeros(shape, np.int64) for shape in shapes)
        return cls(confusion, boundary, pixels, right)

    def keep_worst(self, iou: float, number: int, predicted: np.ndarray, *, shown: int) -> None:
        """Keeps the prediction of an image if it is among the `shown` worst."""
        self.worst = sorted([*self.worst, (iou, number)])[:shown]
        self.predicted = {k: predicted if k == number else self.predicted[k] for _, k in self.worst}

    def calibration(self) -> tuple[metrics.Calibration, np.ndarray] | None:
        """The counters of confidence, and the sums of NLL at further temperatures; None if there are none."""
        if not self.sums:
            return None
        total = np.sum([self.sums[number] for number in sorted(self.sums)], axis=0)
        counters = metrics.Calibration.of_counters(self.pixels, self.right, brier=float(total[0]), nll=float(total[1]))
        return counters, total[2:]


def joined(parts: Sequence[Counts], *, shown: int) -> Counts:
    """The counts of several parts of a split, which have no image in common."""
    first = parts[0]
    whole = Counts.of_nothing(len(first.confusion))
    for part in parts:
        for name in ("confusion", "boundary", "pixels", "right"):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        whole.by_image |= part.by_image
        whole.sums |= part.sums
        for iou, number in part.worst:
            whole.keep_worst(iou, number, part.predicted[number], shown=shown)
    return whole


class Unfinished:
    """Files with the counts of an evaluation, one file per process, in the folder of its report.

    Only an evaluation with the same identity reads them. They are a help, not the result: where they cannot be written,
    the evaluation goes on without them.
    """

    SECONDS = 30.0  # between two writes

    def __init__(self, report: Path, identity: Mapping[str, object]):
        """Uses files in the folder of a report.

        Args:
          report: Folder of the report.
          identity: What the counts depend on, as JSON.
        """
        self._folder = report / FOLDER
        self._name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._written = time.monotonic()

    @property
    def _own(self) -> Path:
        return self._folder / f"{self._name}-{jax.process_index()}.npz"

    def collected(self, *, shown: int) -> Counts | None:
        """Collects the counts of killed processes into the file of this process; None if there are none."""
        # This process's file comes first: it may already contain the others, if these were not removed in time.
        places = sorted(self._folder.glob(f"{self._name}-*.npz"), key=lambda place: (place != self._own, place.name))
        parts: list[Counts] = []
        for place in places:
            part = _read(place)
            if part is not None and not any(part.by_image.keys() & other.by_image.keys() for other in parts):
                parts.append(part)
        if not parts:
            return None
        whole = joined(parts, shown=shown)
        if places != [self._own] and self._write(whole):
            for place in places:
                if place != self._own:
                    place.unlink(missing_ok=True)
        return whole

    def keep(self, counts: Counts, *, now: bool = False) -> None:
        """Writes the counts of this process, if the last write was `SECONDS` ago or `now` is True."""
        if now or time.monotonic() - self._written >= self.SECONDS:
            self._write(counts)

    def _write(self, counts: Counts) -> bool:
        try:
            with atomic.replacing_file(self._own, durable=False) as temporary, temporary.open("wb") as file:
                np.savez(file, **_arrays(counts))
        except OSError:
            return False
        finally:
            self._written = time.monotonic()
        return True

    @property
    def _corrupted(self) -> Path:
        return self._folder / f"{self._name}-corrupted.json"

    def corrupted(self) -> dict[str, float | None]:
        """The mIoU on corrupted images that `keep_corrupted` has kept."""
        with contextlib.suppress(OSError, ValueError):
            figures = json.loads(self._corrupted.read_text())
            if isinstance(figures, dict) and all(isinstance(figure, float | None) for figure in figures.values()):
                return figures
        return {}

    def keep_corrupted(self, figures: Mapping[str, float | None]) -> None:
        """Writes the mIoU of kinds and severities of corruption, by their name."""
        with contextlib.suppress(OSError), atomic.replacing_file(self._corrupted, durable=False) as temporary:
            temporary.write_text(json.dumps(figures))

    def remove(self) -> None:
        """Removes all files, after the end of the evaluation."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _arrays(counts: Counts) -> dict[str, Any]:
    numbers = sorted(counts.by_image)
    arrays = {name: getattr(counts, name) for name in ("confusion", "boundary", "pixels", "right")}
    arrays |= {"numbers": np.array(numbers), "by_image": np.array([counts.by_image[number] for number in numbers])}
    if counts.sums:
        arrays["sums"] = np.array([counts.sums[number] for number in numbers])
    arrays["worst"] = np.array(counts.worst, np.float64).reshape(-1, 2)
    return arrays | {f"predicted {number}": labels for number, labels in counts.predicted.items()}


def _read(place: Path) -> Counts | None:
    """The counts in a file; None if it is damaged."""
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        place.open("rb") as file,
        np.load(file) as arrays,
    ):
        numbers = arrays["numbers"].tolist()
        return Counts(
            confusion=arrays["confusion"],
            boundary=arrays["boundary"],
            pixels=arrays["pixels"],
            right=arrays["right"],
            by_image=dict(zip(numbers, arrays["by_image"], strict=True)),
            sums=dict(zip(numbers, arrays["sums"], strict=True)) if "sums" in arrays else {},
            worst=[(iou, int(number)) for iou, number in arrays["worst"].tolist()],
            predicted={int(name.split()[1]): arrays[name] for name in arrays.files if name.startswith("predicted ")},
        )
    return None
