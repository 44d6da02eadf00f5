"""Evaluation as published: logits enlarged to the label's size, argmax, one confusion matrix over all images.

    python -m segjax.evaluate --workdir DIR [--best]

evaluates the last weights of a training, or its best ones, on the data and with the settings of that training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from segjax import metrics
from segjax.data import specs
from segjax.data.pipeline import Records, evaluation_batches, records_of


def evaluate(
    predict: Callable[[np.ndarray], np.ndarray],
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    *,
    batch_size: int,
    keep: Collection[int] = (),
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Runs `predict` over a split; of several processes, each over its part of it.

    Args:
      predict: uint8 images (B, H, W, 3) -> train ids (B, H, W). Of several processes, each calls its own on its own
        devices, as often as it has batches.
      keep: numbers of images whose prediction is wanted.

    Returns:
      int64 confusion matrix (K, K) over the whole split, in every process; and uint8 (H, W) train ids by number of
      image, of those of `keep` that this process has seen.

    Raises:
      ValueError: there is no image, or one that cannot be used.
    """
    if not len(records_of(data)):
        raise ValueError(f"there is no image in the evaluation split of {spec.name}")
    classes = max(spec.num_classes, 2)
    confusion, kept, pending = np.zeros((classes, classes), np.int64), {}, None

    def count(labels, numbers, predicted):
        predicted = np.asarray(predicted)[: len(numbers)]
        kept.update({number: predicted[row] for row, number in enumerate(numbers.tolist()) if number in keep})
        return metrics.confusion_matrix(
            labels[: len(numbers)], predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label
        )

    part = jax.process_index(), jax.process_count()
    # Two batches are in flight: the device computes one while the host counts the pixels of the other.
    with contextlib.closing(evaluation_batches(data, batch_size=batch_size, part=part)) as batches:
        for images, labels, numbers in batches:
            predicted = predict(images)
            if pending is not None:
                confusion += count(*pending)
            pending = labels, numbers, predicted
    if pending is not None:
        confusion += count(*pending)
    return _sum_over_processes(confusion), kept


def _sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Sum of the processes' int64 arrays, the same in each of them."""
    if jax.process_count() == 1:
        return counts
    # In halves, because without 64 bits jax would cut the counts off.
    halves = multihost_utils.process_allgather(counts.view(np.uint32))
    return np.ascontiguousarray(halves).view(np.int64).sum(axis=0)


def evaluate_run(workdir: Path, *, best: bool) -> dict[str, object]:
    """Evaluates what a training has saved, as the training itself does, and prints the table of classes.

    Returns:
      `metrics.summarise`, and "step".

    Raises:
      CheckpointError: there is nothing saved, or it is damaged. ValueError: its data cannot be used.
    """
    from ml_collections import ConfigDict

    from segjax import checkpoint, console, parts
    from segjax.data.augment import normalise
    from segjax.inference import predict_labels
    from segjax.step import Parallel

    weights, about = checkpoint.load_weights(workdir / "best" if best else workdir)
    config = ConfigDict(about["config"])
    data = parts.load_data(config)
    spec = data.spec
    parallel = Parallel("jit")
    skeleton = parts.make_skeleton(config, spec.num_classes, parallel, pretrained=False)
    arrays = parallel.replicate([{name: weights[name] for name in part} for part in skeleton.arrays()])
    predict = partial(parallel.compile_eval(partial(predict_labels, skeleton, normalise=normalise)), *arrays)
    console.say(
        f"evaluating step {about['step']} on {len(records_of(data.evaluation))} images ({config.data.eval_split}) ..."
    )
    confusion, _ = evaluate(predict, data.evaluation, spec, batch_size=config.eval.batch)
    summary = metrics.summarise(confusion) | {"step": about["step"]}
    console.table(summary, spec)
    return summary


def main(arguments: list[str] | None = None) -> int:
    from segjax import console, runtime

    parser = argparse.ArgumentParser(prog="python -m segjax.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="folder of a training")
    parser.add_argument("--best", action="store_true", help="the weights of its best evaluation, not the last ones")
    options = parser.parse_args(arguments)
    runtime.prepare()
    try:
        summary = evaluate_run(options.workdir, best=options.best)
    except (ValueError, OSError) as error:
        print(f"segjax.evaluate: {error}", file=sys.stderr)
        return 2
    result = options.workdir / "result.json"
    if result.exists() and not options.best:
        recorded = json.loads(result.read_text())
        same = all(recorded[key] == summary[key] for key in summary)
        console.say(f"{'exactly' if same else 'NOT'} what {result} says (mIoU {console.score(recorded['mean_iou'])})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
