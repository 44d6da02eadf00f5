"""The log of a run: metrics.jsonl, and the same records for TensorBoard and other trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from segjax.data import bands, specs
from segjax.runtime import atomic, console
from segjax.runtime.reading import UnreadableError, checked, parse_json, read_bytes
from segjax.train import tensorboard
from segjax.train.tensorboard import TensorBoard
from segjax.train.trackers import GUESTS, TENSORBOARD, Guests, Position
from segjax.viz import pictures


class _Record(TypedDict):
    """The common entry of all records; other entries are numbers, and dicts of numbers."""

    step: int


class Log:
    """metrics.jsonl, one record per line, and the trackers, without gaps or duplicates in resumed runs.

    Entering the context truncates metrics.jsonl and TensorBoard's files to the checkpoint, and opens the other
    trackers; its end closes them all.

    Attributes:
      records: All records so far, including those before the run was resumed.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        *,
        evaluated: bool,
        active: bool = True,
        trackers: Sequence[str] = (TENSORBOARD,),
        settings: Mapping[str, Any] = {},
    ):
        """Creates a log, which reads and writes no file yet.

        Args:
          workdir: Folder of the run.
          start: Step of the checkpoint; records of later steps are dropped.
          evaluated: Whether the checkpoint includes the evaluation after that step. Otherwise the run evaluates again,
            and the record of the evaluation is dropped too.
          active: Whether this process writes; only one of several processes does.
          trackers: Names of trackers, of `trackers.NAMES`.
          settings: Settings of the run, for the trackers.
        """
        self.records: list[dict[str, Any]] = []
        self._workdir, self._path, self._events = workdir, workdir / "metrics.jsonl", workdir / "tensorboard"
        self._start, self._evaluated, self._active = start, evaluated, active
        self._settings = settings
        self._guest_names = [name for name in trackers if name in GUESTS]
        self._board = TensorBoard(self._events, start) if active and TENSORBOARD in trackers else None
        self._guests: Guests | None = None

    def __enter__(self) -> Log:
        lines = read_bytes(self._path).split(b"\n") if self._path.exists() else []
        records = [(_parsed(line), line) for line in lines]
        self.records = [record for record, _ in records if record and self._is_kept(record)]
        # The last line is empty, or incomplete if the machine stopped.
        if odd := [line for record, line in records[:-1] if record is None and line.strip()]:
            console.say(f"{self._path}: {len(odd)} of {len(lines) - 1} lines are not records of a run and are skipped")
        if self._active:
            atomic.write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
            tensorboard.remove_after(self._events, self._start, evaluated=self._evaluated)
            reached = max((_position(record) for record, _ in records if record), default=(0, False))
            self._guests = Guests(self._guest_names, self._workdir, self._settings, start=self._start, reached=reached)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None)

    def _is_kept(self, record: Mapping[str, Any]) -> bool:
        if record["step"] == self._start:
            return self._evaluated or "mean_iou" not in record
        return record["step"] < self._start

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record of numbers and dicts of numbers, by name; "step" is its step."""
        self.records.append(dict(record))
        if not self._active:
            return
        with atomic.naming(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        values = dict(_scalars(record))
        if self._board is not None:
            self._board.scalars(record["step"], values)
        if self._guests is not None:
            self._guests.scalars(_position(record), values)

    def picture(
        self, step: int, name: str, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec
    ) -> None:
        """Writes image, truth and prediction of an evaluation, side by side, for the trackers only."""
        if not self._active:
            return
        row = [bands.as_picture(image), pictures.colourise(truth, spec), pictures.colourise(predicted, spec)]
        name, joined = f"predictions/{console.one_line(name)}", np.concatenate(row, axis=1)
        if self._board is not None:
            self._board.image(step, name, joined)
        if self._guests is not None:
            self._guests.image((step, True), name, joined)

    def artifact(self, path: Path, kind: str) -> None:
        """Gives a file of the run's folder to the trackers."""
        if self._guests is not None:
            self._guests.artifact(path, kind)

    def cut(self, step: int) -> None:
        """Begins an event file for the records after the checkpoint of `step`; call it before saving the checkpoint."""
        if self._board is not None:
            self._board.begin(f"from-{step:09d}")

    def begin_final(self, step: int) -> None:
        """Begins an event file for the evaluation after the last step, whose checkpoint is already saved."""
        if self._board is not None:
            self._board.begin(f"final-{step:09d}")

    def close(self, *, failed: bool = False) -> None:
        if self._board is not None:
            self._board.close(failed)
        if self._guests is not None:
            self._guests.close(failed)


def _position(record: Mapping[str, Any]) -> Position:
    return record["step"], "mean_iou" in record


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and number of each scalar of a record, without missing numbers, which TensorBoard does not have."""
    for key, value in record.items():
        named = (
            {f"{key}/{console.one_line(name)}": number for name, number in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
        yield from ((tag, number) for tag, number in named.items() if number is not None and tag != "step")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record in a line, or None."""
    try:
        record = parse_json(line, dict[str, float | dict[str, float | None] | None], name="metrics.jsonl")
        return checked(record, _Record, name="metrics.jsonl")
    except UnreadableError:
        return None
