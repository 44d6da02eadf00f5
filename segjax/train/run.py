"""A run: everything that the training loop needs, built by `setup.build`."""

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
from segjax.train.evaluator import Evaluator, SaveAdapter
from segjax.train.metrics_log import Log
from segjax.train.progress import Meter
from segjax.train.recent_losses import NotFinite, RecentLosses, not_finite_message
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.state import TrainState, training_of, weights_of
from segjax.train.step import TrainStep

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The parts of a run, without the training state, which the loop passes from step to step.

    Attributes:
      workdir: Folder of the run.
      began: `time.perf_counter()` when this process began to build the run.
      first: Number of steps before this process: 0, or the step of its checkpoint.
      steps: Number of the last step.
      log_every: Steps between two lines of the log.
      save_every: Steps between two checkpoints.
      search_nans: Whether to search for the layer with the first output that is not finite.
      spec: Dataset.
      evaluation: Evaluated images.
      eval_split: Name of their split.
      parallel: Parallelism over devices.
      model: Model.
      train_step: Step that trains the model.
      key: Key of all random numbers of the training.
      batches: Training batches by step.
      checkpoints: Checkpoints of the run.
      log: Log of metrics, which the loop opens.
      recent: Losses since the last line of the log.
      evaluator: Evaluations so far.
      save_adapter: Function that saves the adapters of a state; None without adapters.
      meter: Speed so far.
      rates: Function from a step to its learning rates by name, for the log.
      metadata: Metadata of every checkpoint.
      summary: Lines that describe the run, by label.
      warnings: Sentences to print after them.
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
    save_adapter: SaveAdapter | None
    meter: Meter
    rates: Callable[[int], dict[str, float]]
    metadata: Mapping[str, object]
    summary: Mapping[str, str]
    warnings: Sequence[str]

    def fetch(self, tree: T) -> T:
        """Copies of the arrays on the host, with stacks separated into the parameters of the model."""
        return self.model.stacks.apart(self.parallel.fetch(tree))

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save everything that a resumed run needs."""
        self.log.cut(step)
        host = self.fetch(dataclasses.replace(state, teacher=()))
        scores = dataclasses.asdict(self.evaluator.scores)
        metadata = {**self.metadata, "step": step, "scores": scores, "window": self.recent.rows}
        adapters = self.model.adapters
        self.checkpoints.save(step, weights_of(host, adapters), training_of(host, adapters), metadata)

    def read_losses(self, step: int, state: TrainState) -> None:
        """Waits for the losses of all steps up to `step`, and reports skipped steps.

        Raises:
          RunError: A step that may not be skipped is not finite. The state before it is saved.
        """
        for problem in self.recent.read(step):
            if problem.stopped:
                self._end_before(problem, state)
            console.say(f"{problem.text}: skipped")

    def _end_before(self, problem: NotFinite, state: TrainState) -> None:
        # The state is that before the problem, because later steps did not change it.
        self.save(problem.step, state)
        self.checkpoints.wait()
        culprit = ""
        if self.search_nans and jax.process_count() == 1:
            batch = self.batches.at(problem.step)
            culprit = nan_search.first_not_finite(self.train_step, self.fetch(state), batch, self.key)
        raise RunError(not_finite_message(problem, culprit, self.workdir))

    def write_means(self, step: int, state: TrainState) -> float | None:
        """Writes a line of the log. Returns the mean loss, or None if no step since the last line was finite."""
        loss, gradient_norm = self.recent.take_means()
        # A skipped step does not advance the schedule.
        rates = self.rates(step - 1 - int(self.parallel.fetch(state.skipped)[0]))
        means = {"loss": loss, "gradient_norm": gradient_norm, **rates}
        speed = {"images_per_second": self.meter.images_per_second, "waiting": self.meter.waiting}
        self.log.write({"step": step, **means, **speed})
        return loss
