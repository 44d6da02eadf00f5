"""The log of a run: metrics.jsonl, and the same records for TensorBoard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from segjax.data import bands, specs
from segjax.runtime import atomic, console
from segjax.runtime.reading import UnreadableError, checked, parse_json, read_bytes
from segjax.viz import pictures


class _Record(TypedDict):
    """The common entry of all records; other entries are numbers, and dicts of numbers."""

    step: int


class Log:
    """metrics.jsonl, one record per line, and TensorBoard's event files, without gaps or duplicates in resumed runs.

    Event files cannot be truncated. So there is one for each interval between two checkpoints, named after its first
    step. When a run resumes, the files that begin at its checkpoint or later are removed and written again.

    Entering the context truncates both to the checkpoint.

    Attributes:
      records: All records so far, including those before the run was resumed.
    """

    def __init__(self, workdir: Path, start: int, *, evaluated: bool, active: bool = True):
        """Creates a log, which reads and writes no file yet.

        Args:
          workdir: Folder of the run.
          start: Step of the checkpoint; records of later steps are dropped.
          evaluated: Whether the checkpoint includes the evaluation after that step. Otherwise the run evaluates again,
            and the record of the evaluation is dropped too.
          active: Whether this process writes; only one of several processes does.
        """
        self.records: list[dict[str, Any]] = []
        self._path = workdir / "metrics.jsonl"
        self._events = workdir / "tensorboard"
        self._start, self._evaluated, self._active = start, evaluated, active
        self._writer = None
        self._interval = f"from-{start:09d}"

    def __enter__(self) -> Log:
        lines = read_bytes(self._path).split(b"\n") if self._path.exists() else []
        records = [(_parsed(line), line) for line in lines]
        self.records = [record for record, _ in records if record and self._is_kept(record)]
        # The last line is empty, or incomplete if the machine stopped.
        if odd := [line for record, line in records[:-1] if record is None and line.strip()]:
            console.say(f"{self._path}: {len(odd)} of {len(lines) - 1} lines are not records of a run and are skipped")
        if self._active:
            atomic.write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
            for path in self._events.glob("*"):
                # The folder may hold files of other programs, such as TensorBoard's profiler.
                if found := re.search(r"\.(from|final)-(\d+)$", path.name):
                    begins = int(found[2])
                    if begins > self._start or (begins == self._start and (found[1] == "from" or not self._evaluated)):
                        path.unlink()
        return self

    def __exit__(self, *_) -> None:
        self.close()

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
        from tensorboardX import summary

        for tag, number in _scalars(record):
            self._event(record["step"], summary.scalar(tag, number))
        if self._writer is not None:
            with atomic.naming(self._events):
                self._writer.flush()

    def picture(
        self, step: int, name: str, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec
    ) -> None:
        """Writes image, truth and prediction, side by side, for TensorBoard only."""
        if self._active:
            from tensorboardX import summary

            row = [bands.as_picture(image), pictures.colourise(truth, spec), pictures.colourise(predicted, spec)]
            joined = np.concatenate(row, axis=1)
            self._event(step, summary.image(f"predictions/{console.one_line(name)}", joined, dataformats="HWC"))

    def _event(self, step: int, summary: Any) -> None:
        # Not tensorboardX's SummaryWriter, which writes in a thread: a full disk ends that thread, and the run then
        # waits for it forever.
        from tensorboardX import RecordWriter

        # protobuf creates the class at import, so type checkers do not see it.
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with atomic.naming(self._events):
            if self._writer is None:
                self._events.mkdir(parents=True, exist_ok=True)
                # TensorBoard reads files in the order of their names, which begin with the time.
                path = self._events / f"events.out.tfevents.{time.time():.6f}.{self._interval}"
                self._writer = RecordWriter(str(path))
                self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            self._writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def cut(self, step: int) -> None:
        """Begins an event file for the records after the checkpoint of `step`; call it before saving the checkpoint."""
        self._begin(f"from-{step:09d}")

    def begin_final(self, step: int) -> None:
        """Begins an event file for the evaluation after the last step, whose checkpoint is already saved."""
        self._begin(f"final-{step:09d}")

    def _begin(self, interval: str) -> None:
        self.close()
        self._interval = interval

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with atomic.naming(self._events):
                writer.close()


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
