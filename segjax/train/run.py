"""A run: everything that the training loop needs, built once by `setup.build`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from segjax.data import pipeline, specs
from segjax.data.records import Records
from segjax.models.functional import FunctionalModel
from segjax.runtime import console
from segjax.runtime.parallel import Parallel
from segjax.train import nan_search
from segjax.train.config import RunError
from segjax.train.evaluator import Evaluator
from segjax.train.metrics_log import Log
from segjax.train.progress import Meter
from segjax.train.recent_losses import NotFinite, RecentLosses, not_finite_message
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.state import TrainState, training_of, weights_of
from segjax.train.step import TrainStep

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The parts of a run. The loop passes the training state from step to step; no part holds it.

    Attributes:
      began: `time.perf_counter()` when this process began to build the run.
      first: number of steps taken when this process begins: 0, or the step of the checkpoint it resumes from.
      steps: number of the last step. log_every, save_every: steps between two lines of the log and two checkpoints.
      search_nans: whether to search for the layer whose output was the first that is not finite.
      spec, evaluation, eval_split: the dataset, the images that it is evaluated on, and the name of their split.
      model, train_step: the model, and the step that trains it.
      key: key of all random numbers of the training.
      batches: training batches by step.
      checkpoints, log: where the run is saved, and where metrics are written. `log` opens with the loop.
      recent, evaluator, meter: losses since the last line of the log, evaluations so far, speed so far.
      rates: step -> learning rates by name, for the log.
      metadata: of the run; part of every checkpoint.
      summary: lines that describe the run, by label. warnings: sentences that follow them.
    """

    workdir: Path
    began: float
    first: int
    steps: int
    log_every: int
    save_every: int
    search_nans: bool
    spec: specs.DatasetSpec
    evaluation: Records
    eval_split: str
    parallel: Parallel
    model: FunctionalModel
    train_step: TrainStep
    key: jax.Array
    batches: pipeline.TrainBatches | pipeline.StreamBatches
    checkpoints: RunCheckpoints
    log: Log
    recent: RecentLosses
    evaluator: Evaluator
    meter: Meter
    rates: Callable[[int], dict[str, float]]
    metadata: Mapping[str, object]
    summary: Mapping[str, str]
    warnings: Sequence[str]

    def fetch(self, tree: T) -> T:
        """Copies of arrays on the host, one for each parameter of the model."""
        return self.model.stacks.apart(self.parallel.fetch(tree))

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save everything that a resumed run needs."""
        self.log.cut(step)
        host = self.fetch(state)
        scores = dataclasses.asdict(self.evaluator.scores)
        metadata = {**self.metadata, "step": step, "scores": scores, "window": self.recent.rows}
        self.checkpoints.save(step, weights_of(host), training_of(host), metadata)

    def read_losses(self, step: int, state: TrainState) -> None:
        """Waits for the losses of all steps up to `step`, and reports those that were skipped.

        Raises:
          RunError: a step that may not be skipped is not finite. The state before it is saved.
        """
        for problem in self.recent.read(step):
            if problem.stopped:
                self._end_before(problem, state)
            console.say(f"{problem.text}: skipped")

    def _end_before(self, problem: NotFinite, state: TrainState) -> None:
        # The state is still that before the problem, because later steps did not change it.
        self.save(problem.step, state)
        self.checkpoints.wait()
        culprit = ""
        if self.search_nans and jax.process_count() == 1:
            batch = self.batches.at(problem.step)
            culprit = nan_search.first_not_finite(self.train_step, self.fetch(state), batch, self.key)
        raise RunError(not_finite_message(problem, culprit, self.workdir))

    def write_means(self, step: int, state: TrainState) -> float | None:
        """Writes a line of the log; returns the mean loss, None where no step since the last line was finite."""
        loss, gradient_norm = self.recent.take_means()
        # A skipped step does not advance the schedule.
        rates = self.rates(step - 1 - int(self.parallel.fetch(state.skipped)[0]))
        means = {"loss": loss, "gradient_norm": gradient_norm, **rates}
        speed = {"images_per_second": self.meter.images_per_second, "waiting": self.meter.waiting}
        self.log.write({"step": step, **means, **speed})
        return loss
