"""Resuming a run: reads its result, if it has ended, and its newest checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

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
from segjax.runtime import atomic, console
from segjax.runtime.reading import UnreadableError, checked, read_json
from segjax.train import schema
from segjax.train.config import RunError, refuse_other_run
from segjax.train.evaluator import Scores
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.state import TrainState, restored, training_of, weights_of

# The config that a run has recorded, as JSON, with all sections of any version; they are compared value by value.
_Config: Any = TypedDict(  # pyright: ignore[reportGeneralTypeIssues]: the names come from the table of settings
    "_Config",
    {section.name: dict[str, Any] for section in schema.SECTIONS if section.name},  # pyright: ignore
    total=False,
)


class _Result(TypedDict):
    """The entries of result.json that are read again. Runs of segjax 0.1.0 have no `stopped_early`."""

    step: int
    mean_iou: FiniteFloat | None
    pixel_accuracy: FiniteFloat | None
    per_class_iou: list[FiniteFloat | None]
    config: _Config  # pyright: ignore[reportInvalidTypeForm]
    stopped_early: NotRequired[bool]


def read_result(path: Path) -> dict[str, Any]:
    """The content of the result.json of a run, with its config in current terms.

    Raises:
      UnreadableError: it is damaged; the message names the key.
      ValueError: a newer segjax wrote it.
    """
    result = read_json(path)
    # A newer one may have other entries.
    refuse_newer(result, path)
    checked(result, _Result, name=path)
    config = schema.in_current_terms(result["config"])
    # Of all settings those of the evaluation are not only compared.
    for name in (*(field.name for field in dataclasses.fields(Protocol)), "patience"):
        value = config["eval"].get(name)
        if problem := schema.SETTINGS[f"eval.{name}"].problem(tuple(value) if isinstance(value, list) else value):
            raise UnreadableError(
                f"{path}: config.eval.{name} is {console.one_line(value, most=60)}; must be {problem}"
            )
    return {"stopped_early": False} | result | {"config": config}


def _result_of(workdir: Path) -> dict[str, Any] | None:
    """What `read_result` returns for the run in `workdir`; None where it has not ended."""
    path = workdir / "result.json"
    try:
        return read_result(path)
    except FileNotFoundError:
        return None
    except UnreadableError as error:
        raise RunError(f"{error}. Remove this file: the run then goes on from its newest checkpoint") from None


def recorded_config(workdir: Path) -> dict[str, Any] | None:
    """The config of the run in `workdir`, as it has recorded it; None where nothing was saved.

    Raises:
      RunError: result.json is damaged. ValueError: a newer segjax wrote it.
    """
    if result := _result_of(workdir):
        return result["config"]
    steps = [folder for folder in (workdir / "checkpoints").glob("*") if orbax_folder.is_step(folder)]
    for folder in sorted(steps, key=lambda folder: int(folder.name), reverse=True):
        # A run resumes from the checkpoint before a damaged one.
        with contextlib.suppress(orbax_folder.DamagedError):
            return checked(orbax_folder.read_metadata(folder).get("config", {}), _Config, name=f"{folder}: config")
    return None


def earlier_result(config: Mapping[str, Any], workdir: Path) -> dict[str, Any] | None:
    """What `read_result` returns for `workdir`, where a run writes it when it ends; None where there is none.

    Args:
      config: all settings of the run as it is configured now, as `config.plain` returns them.

    Raises:
      RunError: that run had other settings, or result.json is damaged.
      ValueError: a newer segjax wrote it.
    """
    if result := _result_of(workdir):
        refuse_other_run({"config": result["config"]}, {"config": config}, workdir)
    return result


def data_of(config: ConfigDict, *opened: OpenSplit) -> RunData | None:
    """The data that a run uses; None for generated data, and for data that were prepared before there were hashes."""
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
    """Writes the data of a run to `workdir`/data.json, or compares them with those that it began with.

    Args:
      is_new: whether nothing was saved before.
      accept: whether a run goes on with changed data.

    Raises:
      RunError: they are others, and not accepted; lists what was changed, added and removed.
      UnreadableError: data.json is damaged.
    """
    path = workdir / contents.RUN_DATA
    before = None if is_new or now is None else contents.read_run_data(path)
    if now is None or now == before:
        return
    if before and (lines := contents.differences(before["contents"], now["contents"])):
        listed = f"the data of {workdir} are no longer those that it began with, {len(lines)} images differ:\n"
        listed += contents.listed_differences(lines)
        if not accept:
            raise RunError(
                f"{listed}\n  restore them, or give --config.data.changed=accept to go on with them, or another "
                "--workdir for a new run"
            )
        console.say(f"{listed}\n  accepted by data.changed")
    if before is None and not is_new:
        console.say(f"note: {path} is missing; from now on the data of this run are those that it finds today")
    atomic.write_text(path, json.dumps(now))


def is_finished(result: Mapping[str, Any], *, steps: int, evaluation: Mapping[str, Any]) -> bool:
    """Whether the run with this result has nothing left to do.

    Args:
      steps: `config.train.steps` now.
      evaluation: `config.eval` now, as `config.plain` returns it. A run that stopped early goes on if it has changed. A
        run is evaluated once more if the protocol has.
    """
    before = result["config"]["eval"]
    if Protocol.of(before) != Protocol.of(evaluation):
        return False
    gave_up = result["stopped_early"] and before == evaluation
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
    protocols = [Protocol.of(of["config"]["eval"]) for of in (found.metadata, metadata)]
    if protocols[0] != protocols[1]:
        console.say(f"evaluations so far were of {protocols[0]}; the best one is looked for anew")
        scores = Scores()
    else:
        scores = Scores(**found.metadata["scores"])
    if ended and ended["step"] == found.step and Protocol.of(ended["config"]["eval"]) == protocols[1]:
        # The run had ended at this step. Its last evaluation came after the checkpoint, whose scores lack it.
        scores = scores.after(found.step, ended["mean_iou"])
    state = restored(found.weights, found.training, state, may_skip=may_skip)
    # From the checkpoint, because the initial weights may no longer exist.
    origin = {key: found.metadata[key] for key in ("licence", "provenance") if key in found.metadata}
    return Start(found.step, state, scores, found.metadata["window"], origin)
