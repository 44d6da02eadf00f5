"""Resumes a run: reads its result, if it has ended, and its newest checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

import jax
from ml_collections import ConfigDict
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from segjax.checkpoints import orbax_folder
from segjax.checkpoints.format_version import refuse_newer
from segjax.data import contents
from segjax.data.contents import RunData
from segjax.data.open import OpenSplit
from segjax.data.records import parts_of
from segjax.inference.engine import Protocol
from segjax.models.lora import NO_ADAPTERS, Adapters
from segjax.runtime import atomic, console
from segjax.runtime.reading import UnreadableError, checked, read_json
from segjax.train import schema
from segjax.train.config import RunError, refuse_other_run
from segjax.train.evaluator import Scores
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.state import TrainState, restored, training_of, weights_of

# The config that a run recorded, as JSON, with the sections of any version; sections are compared value by value.
_Config: Any = TypedDict(  # pyright: ignore[reportGeneralTypeIssues]: the names come from the table of settings
    "_Config",
    {section.name: dict[str, Any] for section in schema.SECTIONS if section.name},  # pyright: ignore
    total=False,
)


class _Result(TypedDict):
    """The entries of result.json that are read. Runs of segjax 0.1.0 have no `stopped_early`."""

    step: int
    mean_iou: FiniteFloat | None
    pixel_accuracy: FiniteFloat | None
    per_class_iou: list[FiniteFloat | None]
    config: _Config  # pyright: ignore[reportInvalidTypeForm]
    stopped_early: NotRequired[bool]


def read_result(path: Path) -> dict[str, Any]:
    """The content of a run's result.json, with its config in current terms.

    Raises:
      UnreadableError: The file is damaged; the message names the key.
      ValueError: A newer segjax wrote it.
    """
    result = read_json(path)
    # Checked first, because a newer segjax may write other entries.
    refuse_newer(result, path)
    checked(result, _Result, name=path)
    config = schema.in_current_terms(result["config"])
    # The settings of the evaluation are used, not only compared.
    for name in (*(field.name for field in dataclasses.fields(Protocol)), "patience"):
        if f"eval.{name}" not in schema.SETTINGS:
            # Runs are evaluated at a temperature of 1.
            continue
        value = config["eval"].get(name)
        if problem := schema.SETTINGS[f"eval.{name}"].problem(tuple(value) if isinstance(value, list) else value):
            raise UnreadableError(
                f"{path}: config.eval.{name} is {console.one_line(value, most=60)}; must be {problem}"
            )
    return {"stopped_early": False} | result | {"config": config}


def _result_of(workdir: Path) -> dict[str, Any] | None:
    """The result of the run in `workdir`, from `read_result`; None if the run has not ended."""
    path = workdir / "result.json"
    try:
        return read_result(path)
    except FileNotFoundError:
        return None
    except UnreadableError as error:
        raise RunError(f"{error}. Remove this file to continue from the newest checkpoint") from None


def recorded_config(workdir: Path) -> dict[str, Any] | None:
    """The config that the run in `workdir` recorded; None if nothing was saved.

    Raises:
      RunError: result.json is damaged.
      ValueError: A newer segjax wrote it.
    """
    if result := _result_of(workdir):
        return result["config"]
    steps = [folder for folder in (workdir / "checkpoints").glob("*") if orbax_folder.is_step(folder)]
    for folder in sorted(steps, key=lambda folder: int(folder.name), reverse=True):
        # Skips damaged checkpoints: the run resumes from the one before.
        with contextlib.suppress(orbax_folder.DamagedError):
            return checked(orbax_folder.read_metadata(folder).get("config", {}), _Config, name=f"{folder}: config")
    return None


def earlier_result(config: Mapping[str, Any], workdir: Path) -> dict[str, Any] | None:
    """The result of the run in `workdir`, from `read_result`; None if the run has not ended.

    Args:
      config: All settings of the run as configured now, from `config.plain`.
      workdir: Folder of the run.

    Raises:
      RunError: The run had other settings, or result.json is damaged.
      ValueError: A newer segjax wrote result.json.
    """
    if result := _result_of(workdir):
        refuse_other_run({"config": result["config"]}, {"config": config}, workdir)
    return result


def data_of(config: ConfigDict, *opened: OpenSplit) -> RunData | None:
    """The data of a run; None for generated data, and for data that were prepared before hashes were introduced."""
    prepared = opened[0].prepared
    if prepared is None:
        return None
    splits = [part for split in (config.data.train_split, config.data.eval_split) for part in parts_of(split)]
    found = contents.contents_of(prepared, dict.fromkeys(splits))
    source = prepared.metadata["source"]
    if found is None:
        return None
    return {"path": str(prepared.path.absolute()), "source": source, "contents": found}


def keep_data(workdir: Path, now: RunData | None, *, is_new: bool, accept: bool) -> None:
    """Writes the data of a run to `workdir`/data.json, or compares them with the data with which the run began.

    Args:
      workdir: Folder of the run.
      now: Data of the run now.
      is_new: Whether nothing was saved before.
      accept: Whether to continue with changed data.

    Raises:
      RunError: The data have changed and are not accepted; the message lists changed, added and removed images.
      UnreadableError: data.json is damaged.
    """
    path = workdir / contents.RUN_DATA
    before = None if is_new or now is None else contents.read_run_data(path)
    if now is None or now == before:
        return
    if before and (lines := contents.differences(before["contents"], now["contents"])):
        listed = f"the data of {workdir} have changed since the run began: {len(lines)} images differ:\n"
        listed += contents.listed_differences(lines)
        if not accept:
            raise RunError(
                f"{listed}\n  restore them, or give --config.data.changed=accept to go on with them, or another "
                "--workdir for a new run"
            )
        console.say(f"{listed}\n  accepted by data.changed")
    if before is None and not is_new:
        console.say(f"note: {path} is missing; the present data are recorded as those of this run")
    atomic.write_text(path, json.dumps(now))


def is_finished(result: Mapping[str, Any], *, steps: int, evaluation: Mapping[str, Any]) -> bool:
    """Whether the run with this result has nothing left to do.

    Args:
      result: Result of the run, from `read_result`.
      steps: `config.train.steps` now.
      evaluation: `config.eval` now, from `config.plain`. If it has changed, a run that stopped early continues. If its
        protocol has changed, a run is evaluated again.
    """
    before = result["config"]["eval"]
    if Protocol.of(before) != Protocol.of(evaluation):
        return False
    gave_up = result["stopped_early"] and before == evaluation
    return result["step"] >= steps or gave_up


class Start(NamedTuple):
    """The point at which a run begins or resumes.

    Attributes:
      step: Number of steps before.
      state: State on the host.
      scores: Scores of the evaluations before.
      window: Losses since the last line of the log, `RecentLosses.rows`.
      origin: Metadata about the origin of the weights.
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
    adapters: Adapters = NO_ADAPTERS,
) -> Start | None:
    """The point at which a run resumes from its newest undamaged checkpoint; None without a checkpoint.

    Args:
      checkpoints: Checkpoints of the run.
      state: Any state of the run, for its structure.
      metadata: Metadata of the run as configured now.
      workdir: Folder of the run.
      ended: Result of `earlier_result`.
      may_skip: `TrainStep.may_skip`.
      adapters: Adapters of the run.

    Raises:
      RunError: The checkpoint is of a run with other settings or data.
      CheckpointError: The checkpoint does not fit, or every checkpoint is damaged.
    """
    # Only shapes and dtypes: merging would compile a program for each shape.
    expected = jax.eval_shape(lambda state: (weights_of(state, adapters), training_of(state, adapters)), state)
    found = checkpoints.restore(
        *expected,
        refuse=lambda before: refuse_other_run(before, metadata, workdir),
        say=console.say,
    )
    if found is None:
        return None
    protocols = [Protocol.of(of["config"]["eval"]) for of in (found.metadata, metadata)]
    if protocols[0] != protocols[1]:
        console.say(f"earlier evaluations used {protocols[0]}; the best score starts over")
        scores = Scores()
    else:
        scores = Scores(**found.metadata["scores"])
    if ended and ended["step"] == found.step and Protocol.of(ended["config"]["eval"]) == protocols[1]:
        # The run had ended at this step. Its last evaluation came after the checkpoint, whose scores lack it.
        scores = scores.after(found.step, ended["mean_iou"])
    state = restored(found.weights, found.training, state, may_skip=may_skip, adapters=adapters)
    # Read from the checkpoint, because the initial weights may no longer exist.
    origin = {key: found.metadata[key] for key in ("licence", "provenance") if key in found.metadata}
    return Start(found.step, state, scores, found.metadata["window"], origin)
