"""Resuming a run: reads its result, if it has ended, and its newest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from segjax.checkpoints.format_version import refuse_newer
from segjax.runtime import console
from segjax.train.config import refuse_other_run
from segjax.train.evaluator import Scores
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.state import TrainState, restored, training_of, weights_of


def earlier_result(config: Mapping[str, Any], workdir: Path) -> dict[str, Any] | None:
    """The content of `workdir`/result.json, which a run writes when it ends; None where there is none.

    Args:
      config: all settings of the run as it is configured now, as `config.plain` returns them.

    Raises:
      RunError: that run had other settings.
      ValueError: a newer segjax wrote it.
    """
    path = workdir / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    refuse_newer(result, path)
    refuse_other_run({"config": result["config"]}, {"config": config}, workdir)
    return result


def is_finished(result: Mapping[str, Any], *, steps: int, evaluation: Mapping[str, Any]) -> bool:
    """Whether the run with this result has nothing left to do.

    Args:
      steps: `config.train.steps` now.
      evaluation: `config.eval` now, as `config.plain` returns it. A run that stopped early goes on if it has changed.
    """
    gave_up = result["stopped_early"] and result["config"]["eval"] == evaluation
    return result["step"] >= steps or gave_up


class Start(NamedTuple):
    """Where a run begins or resumes.

    Attributes:
      step: number of steps taken before.
      state: on the host.
      scores: the evaluations before. window: losses since the last line of the log, as `RecentLosses.rows`.
      origin: metadata about where the weights come from.
    """

    step: int
    state: TrainState
    scores: Scores
    window: list[list[float]]
    origin: Mapping[str, object]


def resumed(
    checkpoints: RunCheckpoints,
    state: TrainState,
    metadata: dict[str, Any],
    workdir: Path,
    ended: Mapping | None,
    *,
    may_skip: int,
) -> Start | None:
    """Where a run resumes from its newest whole checkpoint; None without a checkpoint.

    Args:
      state: a state of the run, for its structure.
      metadata: metadata of the run as it is configured now.
      ended: what `earlier_result` returned.
      may_skip: as `TrainStep` has it.

    Raises:
      RunError: the checkpoint is of a run with other settings or data.
      CheckpointError: it does not fit, or every checkpoint is damaged.
    """
    found = checkpoints.restore(
        weights_of(state),
        training_of(state),
        refuse=lambda before: refuse_other_run(before, metadata, workdir),
        say=console.say,
    )
    if found is None:
        return None
    scores = Scores(**found.metadata["scores"])
    if ended and ended["step"] == found.step:
        # The run had ended at this step. Its last evaluation came after the checkpoint, whose scores lack it.
        scores = scores.after(found.step, ended["mean_iou"])
    state = restored(found.weights, found.training, state, may_skip=may_skip)
    # From the checkpoint, because the initial weights may no longer exist.
    origin = {key: found.metadata[key] for key in ("licence", "provenance") if key in found.metadata}
    return Start(found.step, state, scores, found.metadata["window"], origin)
