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
from segjax.inference.unfinished import Unfinished
from segjax.runtime import console, distributed


def evaluate_corrupted(
    predict: Predict,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    clean: float | None,
    batch_size: int,
    key: Callable[[tuple[int, int]], Hashable] | None = None,
    progress: bool = False,
    unfinished: Unfinished | None = None,
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
      unfinished: Keeps the mIoU of each kind and severity, so that an evaluation that is killed need not repeat it.

    Returns:
      "mean_iou", the mean over kinds and severities; "relative", the mean divided by `clean`; and "kinds", a dict by
      kind of "mean_iou", the mean over severities, and "severities", the mIoU of each. Figures are in [0, 1], or None
      if no pixel counts.
    """
    records = records_of(data)
    number = own_number(records, batch_size=batch_size, key=key)
    total = number * len(corruptions.KINDS) * len(corruptions.SEVERITIES)
    kinds = {}
    known = {} if unfinished is None else distributed.from_lead(unfinished.corrupted)
    with contextlib.ExitStack() as stack:
        bar = None
        if progress:
            bar = console.ProgressBar(labelled("corrupted"), total, "images", start=number * len(known))
            stack.enter_context(bar)
        for kind in corruptions.KINDS:
            severities = []
            for severity in corruptions.SEVERITIES:
                if (name := f"{kind} {severity}") in known:
                    severities.append(known[name])
                    continue
                corrupted = corruptions.CorruptedRecords(records, kind, severity)
                confusion = np.zeros((max(spec.num_classes, 2),) * 2, np.int64)
                for _, truth, predicted in predictions(predict, corrupted, spec, batch_size=batch_size, key=key):
                    confusion += metrics.confusion_matrix(
                        truth, predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label
                    )
                    if bar is not None:
                        bar.advance()
                known[name] = metrics.summarise(sum_over_processes(confusion))["mean_iou"]
                severities.append(known[name])
                if unfinished is not None and distributed.is_lead():
                    unfinished.keep_corrupted(known)
            kinds[kind] = {"mean_iou": metrics.mean(severities), "severities": severities}
    mean = metrics.mean(figure for figures in kinds.values() for figure in figures["severities"])
    return {"mean_iou": mean, "relative": mean / clean if mean is not None and clean else None, "kinds": kinds}
