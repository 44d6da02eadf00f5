"""Evaluations during and after training, the best weights, and early stopping."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from segjax import metrics
from segjax.checkpoints import orbax_folder
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.data.records import Records, records_of
from segjax.inference import evaluation
from segjax.inference.engine import Inference, Protocol
from segjax.models.functional import FunctionalModel
from segjax.runtime import console, memory
from segjax.runtime.distributed import is_lead
from segjax.runtime.parallel import Parallel
from segjax.train.config import RunError
from segjax.train.metrics_log import Log
from segjax.train.progress import StopRequest
from segjax.train.state import TrainState, weights_of

# A function of a state on the host, and of metadata.
SaveAdapter = Callable[[TrainState, Mapping[str, object]], None]

LESS_MEMORY = (
    "These need less:\n"
    "  --config.eval.mode=slide, with a smaller --config.eval.crop\n"
    "  --config.model.dtype=bfloat16\n"
    "  a smaller --config.eval.batch"
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The best evaluation so far, and the count for early stopping. Part of a checkpoint.

    Attributes:
      best: Mean IoU of the best evaluation, in [0, 1]; None before the first.
      step: Step of the best evaluation.
      worse: Number of evaluations since the best one.
      evaluated: Step of the last evaluation.
    """

    best: float | None = None
    step: int | None = None
    worse: int = 0
    evaluated: int | None = None

    def after(self, step: int, score: float | None) -> Scores:
        """The scores after one more evaluation; unchanged if the evaluation of `step` is already counted."""
        if step == self.evaluated:
            return self
        if score is not None and (self.best is None or score > self.best):
            return Scores(best=score, step=step, evaluated=step)
        return dataclasses.replace(self, worse=self.worse + 1, evaluated=step)

    def given_up(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought no improvement; a patience of 0 never gives up."""
        return 0 < patience <= self.worse


class Evaluation(NamedTuple):
    """Metrics and predictions of an evaluation.

    Attributes:
      metrics: Result of `metrics.summarise` over the whole split.
      predicted: Predicted labels (H, W) by image number, of the images to draw that this process evaluated.
    """

    metrics: dict[str, Any]
    predicted: dict[int, np.ndarray]


class Evaluator:
    """Evaluates the weights of a run on a split, and saves the best ones in a folder.

    Attributes:
      scores: Scores so far.
      protocol: Protocol of the evaluations.
    """

    def __init__(
        self,
        settings: ConfigDict,
        model: FunctionalModel,
        split: specs.Split | Records,
        spec: specs.DatasetSpec,
        *,
        parallel: Parallel,
        steps: int,
        log: Log,
        best: Path,
        metadata: Mapping[str, object],
        scores: Scores,
        normalise: Callable[[jax.Array], jax.Array] = normalise,
        image_dtype: str | None = "uint8",
        save_adapter: SaveAdapter | None = None,
    ):
        """Creates an evaluator, which compiles nothing yet.

        Args:
          settings: `config.eval`.
          model: Functional model of the run.
          split: Images and labels to evaluate.
          spec: Dataset of the split.
          parallel: Parallelism of the run. Each of several processes evaluates a part of the images on its own devices.
          steps: Last step. Its evaluation is the result of the run, not one during training.
          log: Log of the evaluations.
          best: Folder for the best weights, written only if the run evaluates during training.
          metadata: Metadata of the run, saved with the best weights.
          scores: Scores so far.
          normalise: Function from images to the model's input.
          image_dtype: Dtype of the images.
          save_adapter: Function that also saves the adapters of the best weights.
        """
        self.scores, self.protocol = scores, Protocol.of(settings)
        self._settings, self._split, self._spec, self._steps = settings, split, spec, steps
        self._log, self._best, self._metadata = log, best, metadata
        self._adapters, self._save_adapter = model.adapters, save_adapter
        self._fetch = lambda tree: model.stacks.apart(parallel.fetch(tree))
        self._parallel = parallel
        # Number of images, or crops of a sliding window, that this process computes at a time.
        self._batch = settings.batch // jax.process_count()
        self._inference = Inference(
            model,
            self.protocol,
            batch=self._batch,
            normalise=normalise,
            image_dtype=image_dtype,
            devices=parallel.own_devices,
        )
        self._records = records_of(split)
        shown = np.linspace(0, len(self._records) - 1, settings.pictures).astype(int)
        self._shown = np.unique(shown).tolist()

    @property
    def saves_best(self) -> bool:
        """Whether the run saves its best weights."""
        return bool(self._settings.every)

    @property
    def gave_up(self) -> bool:
        """Whether training must stop early."""
        return self.scores.given_up(self._settings.patience)

    def is_due(self, step: int) -> bool:
        """Whether the run evaluates after `step` steps, during training."""
        every = self._settings.every
        return bool(every) and 0 < step < self._steps and step % every == 0

    def refuse_too_large(self, state: TrainState) -> None:
        """Compiles the program for the largest images.

        Raises:
          RunError: The program needs more memory than a device has.
        """
        with _less_memory():
            sizes = np.unique(self._records.sizes, axis=0).tolist()
            batch = self.protocol.images_at_a_time(self._batch)
            self._inference_of(state).refuse_too_large(((height, width) for height, width in sizes), batch=batch)

    def _inference_of(self, state: TrainState) -> Inference:
        arrays = state.evaluated
        if self._adapters.layers:
            # On the host, so that exactly the saved weights are evaluated.
            params, batch_stats = self._fetch(arrays)
            return self._inference.with_arrays((self._adapters.merged(params), batch_stats))
        if self._parallel.kind == "pmap" or jax.process_count() > 1:
            arrays = self._parallel.fetch(arrays)
        return self._inference.with_arrays(arrays)

    def evaluate(self, step: int, state: TrainState, *, stop: StopRequest) -> Evaluation:
        """Evaluates a state. The first evaluation of a step is also logged and scored; the best weights are saved.

        Raises:
          StoppedError: `stop` was requested before the last batch; nothing is logged or scored then.
          RunError: There is not enough memory.
        """
        inference = self._inference_of(state)
        with _less_memory():
            confusion, predicted = evaluation.evaluate(
                partial(stop.refuse_when_requested, inference.begin),
                self._split,
                self._spec,
                batch_size=self.protocol.images_at_a_time(self._batch),
                key=self.protocol.input_sizes,
                keep=self._shown,
            )
        found = Evaluation(metrics.summarise(confusion), predicted)
        if self.scores.evaluated != step:
            self._write(step, found)
            self._score(step, state, found.metrics["mean_iou"])
        return found

    def _write(self, step: int, found: Evaluation) -> None:
        means = {key: found.metrics[key] for key in ("mean_iou", "pixel_accuracy")}
        by_class = dict(zip(self._spec.label_names, found.metrics["per_class_iou"], strict=True))
        self._log.write({"step": step, **means, "iou": by_class})
        for number, labels in found.predicted.items():
            name, (image, truth) = self._records.names[number], self._records[number]
            self._log.picture(step, name, image, truth, labels, self._spec)

    def _score(self, step: int, state: TrainState, mean_iou: float | None) -> None:
        self.scores = self.scores.after(step, mean_iou)
        is_best = self.scores.step == step
        if is_best and self.saves_best and is_lead():
            protocol = self.protocol.record()
            metadata = {**self._metadata, "step": step, "mean_iou": mean_iou, "protocol": protocol}
            host = self._fetch(state)
            weights = {name: np.asarray(array) for name, array in weights_of(host, self._adapters).items()}
            orbax_folder.save_weights(self._best, weights, metadata=metadata)
            if self._save_adapter is not None:
                self._save_adapter(host, metadata)
        if step < self._steps:
            console.say(f"step {step}: mIoU {console.score(mean_iou)}{', the best so far' * is_best}")


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    """Turns out-of-memory errors into RunErrors that name the settings of evaluations."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        is_known = isinstance(error, memory.TooLittleMemoryError)
        why = f": {error}" if is_known else ""
        raise RunError(f"there is not enough memory for the evaluation{why}. {LESS_MEMORY}") from error
