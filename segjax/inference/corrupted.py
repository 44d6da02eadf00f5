"""Evaluation on corrupted images: mIoU of every kind and severity, and their mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from segjax import metrics
from segjax.data import corruptions, specs
from segjax.data.records import Records, records_of
from segjax.inference.evaluation import Predict, labelled, own_number, predictions, sum_over_processes
from segjax.runtime import console


def evaluate_corrupted(
    predict: Predict,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    clean: float | None,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a split once for each kind and severity in `segjax.data.corruptions`; of several processes each a part.

    Args:
      predict: As for `evaluation.evaluate`.
      data: Split of RGB images of 8 bits.
      spec: Dataset of the split.
      clean: MIoU on the images themselves.
      batch_size: As for `evaluation.evaluate`.
      key: As for `evaluation.evaluate`.
      progress: Whether to print a progress bar over all of it.

    Returns:
      "mean_iou", the mean over kinds and severities; "relative", the mean divided by `clean`; and "kinds", a dict by
      kind of "mean_iou", the mean over severities, and "severities", the mIoU of each. Figures are in [0, 1], or None
      if no pixel counts.
    """
    records = records_of(data)
    number = own_number(records, batch_size=batch_size, key=key)
    total = number * len(corruptions.KINDS) * len(corruptions.SEVERITIES)
    kinds = {}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(console.ProgressBar(labelled("corrupted"), total, "images")) if progress else None
        for kind in corruptions.KINDS:
            severities = []
            for severity in corruptions.SEVERITIES:
                corrupted = corruptions.CorruptedRecords(records, kind, severity)
                confusion = np.zeros((max(spec.num_classes, 2),) * 2, np.int64)
                for _, truth, predicted in predictions(predict, corrupted, spec, batch_size=batch_size, key=key):
                    confusion += metrics.confusion_matrix(
                        truth, predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label
                    )
                    if bar is not None:
                        bar.advance()
                severities.append(metrics.summarise(sum_over_processes(confusion))["mean_iou"])
            kinds[kind] = {"mean_iou": metrics.mean(severities), "severities": severities}
    mean = metrics.mean(figure for figures in kinds.values() for figure in figures["severities"])
    return {"mean_iou": mean, "relative": mean / clean if mean is not None and clean else None, "kinds": kinds}
