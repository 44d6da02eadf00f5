"""Experiment trackers: programs that show the records of many runs next to each other.

`Writer` is the interface that a run uses. TensorBoard's writer, in `tensorboard.py`, is part of the run: an error of
its files ends the run. The others are guests, which `Guests` holds: one that raises is reported and skipped, and the
run continues.

Their servers, projects and accounts are set by their own environment variables: WANDB_MODE, WANDB_PROJECT,
MLFLOW_TRACKING_URI, TRACKIO_DIR and so on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from segjax.runtime import atomic, console
from segjax.runtime.reading import UnreadableError, checked, read_json

# The project, or experiment, of all runs.
PROJECT = "segjax"
# The file in a workdir with the id of its record, and the position that each tracker has reached in it.
STATE = "trackers.json"
# A record's step, and whether it is that of an evaluation, which follows the others of its step.
Position = tuple[int, bool]


class Writer(Protocol):
    """A tracker's record of one run.

    Example:
      >>> from segjax.train import trackers
      >>> class Printer:
      ...     def config(self, settings):
      ...         print(settings["train"]["batch"])
      ...
      ...     def scalars(self, step, values):
      ...         print(step, values)
      ...
      ...     def image(self, step, name, image):
      ...         print(step, name, image.shape)
      ...
      ...     def artifact(self, path, kind):
      ...         print(kind, path.name)
      ...
      ...     def close(self, failed):
      ...         print("failed" if failed else "done")
      >>> writer: trackers.Writer = Printer()
      >>> writer.scalars(50, {"loss": 0.25, "iou/road": 0.5})
      50 {'loss': 0.25, 'iou/road': 0.5}
    """

    def config(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings of the run, nested; called once by each process, before all others."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by name; a step may have several calls, and steps never decrease."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, RGB, uint8 (H, W, 3)."""

    def artifact(self, path: Path, kind: str) -> None:
        """Writes a file of the run's folder."""

    def close(self, failed: bool) -> None:
        """Waits until everything is written; `failed` if an error ended the run."""


class _Wandb:
    """Weights & Biases; with WANDB_MODE=offline, it writes to the folder wandb/ of the run."""

    def __init__(self, workdir: Path, name: str, id: str):
        self._wandb: Any = importlib.import_module("wandb")
        settings = self._wandb.Settings(console="off", silent=True)
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=id,
            resume="allow",
            dir=str(workdir),
            settings=settings,
        )

    def config(self, settings: Mapping[str, Any]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def artifact(self, path: Path, kind: str) -> None:
        self._run.log_artifact(str(path), name=f"{self._run.id}-{path.name}", type=kind)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """MLflow; without MLFLOW_TRACKING_URI, it writes to mlflow.db next to the folder of the run, for all runs there."""

    MOST_PARAMS, MOST_METRICS, MOST_CHARACTERS = 100, 1000, 6000  # per call, and per value

    def __init__(self, workdir: Path, name: str, id: str):
        # Since 3.2, MLflow sends telemetry to its developers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow: Any = importlib.import_module("mlflow")
        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        self._entities = mlflow.entities
        folder = workdir.absolute().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = client = mlflow.MlflowClient(uri or f"sqlite:///{folder / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(PROJECT)
        if experiment is None:
            files = None if uri else (folder / "mlartifacts").as_uri()
            number = client.create_experiment(PROJECT, artifact_location=files)
        else:
            number = experiment.experiment_id
        found = client.search_runs([number], f"tags.`segjax.id` = '{id}'")
        tags = {"segjax.id": id, "mlflow.runName": name}
        self._id = (found[0] if found else client.create_run(number, tags=tags)).info.run_id
        client.update_run(self._id, status="RUNNING")

    def config(self, settings: Mapping[str, Any]) -> None:
        # A parameter keeps its first value; that of a resumed run is in its result.
        known = self._client.get_run(self._id).data.params
        flat = {_allowed(key): str(value)[: self.MOST_CHARACTERS] for key, value in _flattened(settings).items()}
        params = [self._entities.Param(key, value) for key, value in flat.items() if key not in known]
        for at in range(0, len(params), self.MOST_PARAMS):
            self._client.log_batch(self._id, params=params[at : at + self.MOST_PARAMS])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metric = self._entities.Metric
        metrics = [metric(_allowed(key), value, now, step) for key, value in values.items()]
        for at in range(0, len(metrics), self.MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[at : at + self.MOST_METRICS])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._client.log_image(self._id, image, key=_allowed(name), step=step)

    def artifact(self, path: Path, kind: str) -> None:
        self._client.log_artifact(self._id, str(path), artifact_path=kind)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class _Trackio:
    """Trackio, which shows its records with `trackio show`."""

    def __init__(self, workdir: Path, name: str, id: str):
        # Trackio identifies a run by its name.
        self._name = f"{name}-{id}"
        # Gradio, on which Trackio is built, sends telemetry to its developers.
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        self._trackio: Any = importlib.import_module("trackio")
        self._run: Any = None

    def config(self, settings: Mapping[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = self._trackio.init(
                project=PROJECT,
                name=self._name,
                config=dict(settings),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def artifact(self, path: Path, kind: str) -> None:
        self._run.log_artifact(str(path), name=f"{self._name}-{path.name}", type=kind)

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            # Not `self._run.finish()`: trackio would still consider the run active, and end it at exit.
            self._trackio.finish()


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in settings.items():
        flat |= _flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _allowed(name: str) -> str:
    """A name with the characters that MLflow accepts."""
    return re.sub(r"[^\w./ -]", "_", name)


TENSORBOARD = "tensorboard"
# Writers by name of the guest, which is also the name of the package and the extra that it needs.
GUESTS: dict[str, Callable[[Path, str, str], Writer]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
NAMES = (TENSORBOARD, *GUESTS)


def why_missing(names: Sequence[str]) -> str | None:
    """The reason, with its remedy, why these trackers cannot be used; None if their packages are installed."""
    missing = [name for name in dict.fromkeys(names) if name in GUESTS and importlib.util.find_spec(name) is None]
    if not missing:
        return None
    extras = ",".join(missing)
    return (
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install 'segjax[{extras}]'"
    )


class _State(TypedDict):
    id: Annotated[str, Field(pattern=r"^[0-9a-z]{1,64}$")]
    reached: NotRequired[dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]]
    active: NotRequired[list[str]]


class Guests:
    """The trackers of other programs. One that raises is reported once and skipped; the others and the run continue."""

    def __init__(
        self, names: Sequence[str], workdir: Path, settings: Mapping[str, Any], *, start: int, reached: Position
    ):
        """Begins a record in each tracker, or continues it for a run that resumes.

        Args:
          names: Keys of `GUESTS`.
          workdir: Folder of the run.
          settings: Settings of the run.
          start: Step of the checkpoint; a run that begins at 0 begins a new record.
          reached: Last record of the run before it was resumed. Records after the checkpoint are repeated, except for
            trackers that already have them.
        """
        self._writers: dict[str, Writer] = {}
        self._start, self._reached, self._path = start, {}, workdir / STATE
        old = _state_of(self._path) if start else None
        if not names and old is None:
            return
        self._id = old["id"] if old else secrets.token_hex(4)
        found = old.get("reached", {}) if old else {}
        # A tracker that was not active, or had failed, lacks the last records.
        active = old.get("active", list(found)) if old else []
        self._has: dict[str, Position] = {
            name: max(reached, (step, bool(evaluated))) if name in active else (step, bool(evaluated))
            for name, (step, evaluated) in found.items()
        }
        self._reached = {name: self._has[name] for name in names if name in self._has}
        self._has |= {name: (start, True) for name in names if name not in self._has}
        self._keep(names)
        for name in dict.fromkeys(names):
            with self._guarded(name):
                self._writers[name] = GUESTS[name](workdir, workdir.absolute().name, self._id)
        self._each(lambda writer: writer.config(settings))

    def scalars(self, position: Position, values: Mapping[str, float]) -> None:
        """`Writer.scalars` of a record."""
        self._each(lambda writer: writer.scalars(position[0], values), position)

    def image(self, position: Position, name: str, image: np.ndarray) -> None:
        """`Writer.image` of a record."""
        self._each(lambda writer: writer.image(position[0], name, image), position)

    def artifact(self, path: Path, kind: str) -> None:
        """`Writer.artifact`."""
        self._each(lambda writer: writer.artifact(path, kind))

    def close(self, failed: bool) -> None:
        """`Writer.close`."""
        self._each(lambda writer: writer.close(failed))
        self._writers = {}

    def _each(self, call: Callable[[Writer], None], position: Position | None = None) -> None:
        for name, writer in list(self._writers.items()):
            # The evaluation at the checkpoint itself is repeated if its protocol has changed.
            is_known = position and self._start < position[0] and position <= self._reached.get(name, (0, False))
            if not is_known:
                with self._guarded(name):
                    call(writer)
                    self._has[name] = max(position or self._has[name], self._has[name])

    def _keep(self, active: Iterable[str]) -> None:
        """Writes the id of the record, the position that each tracker has reached, and which trackers are active."""
        reached = {name: [step, int(evaluated)] for name, (step, evaluated) in self._has.items()}
        content = {"id": self._id, "reached": reached, "active": sorted(set(active))}
        atomic.write_text(self._path, json.dumps(content) + "\n")

    @contextlib.contextmanager
    def _guarded(self, name: str):
        try:
            yield
        except Exception as error:
            self._writers.pop(name, None)
            # Neither an error of a guest nor one of its bookkeeping ends the run.
            with contextlib.suppress(OSError):
                self._keep(self._writers)
            reason = console.one_line(f"{type(error).__name__}: {error}", most=200)
            console.say(
                f"warning: {name} fails and is skipped; the run continues, and metrics.jsonl has all records. {reason}"
            )


def _state_of(path: Path) -> _State | None:
    try:
        return checked(read_json(path), _State, name=path)
    except FileNotFoundError:
        return None
    except UnreadableError as error:
        console.say(f"warning: {error}; trackers begin a new record")
        return None
