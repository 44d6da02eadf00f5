"""What a run writes down as it goes: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from segjax.data import specs
from segjax.runtime import atomic
from segjax.viz import pictures


class Log:
    """metrics.jsonl, one record per line, and TensorBoard's event files, without gaps or doubles after a resumption.

    Event files cannot be cut, so that there is one for each stretch between two checkpoints, named after the step it
    begins at: on resuming, those that begin at the checkpoint or after it are removed, and made again.

    Args of the constructor:
      start: the step that the run goes on from; records of later ones are dropped.
      evaluated: whether the evaluation after that step is part of what the run goes on from; else it will be made
        again, and its record is dropped too.
      active: whether this process writes. Of several, one does.
    """

    def __init__(self, workdir: Path, start: int, *, evaluated: bool, active: bool = True):
        self._path = workdir / "metrics.jsonl"
        self._events = workdir / "tensorboard"
        self._active = active
        lines = self._path.read_text(errors="replace").splitlines() if self._path.exists() else []
        records = [record for record in map(_parsed, lines) if record and record["step"] <= start]
        self.records = [record for record in records if evaluated or record["step"] < start or "mean_iou" not in record]
        self._writer = None
        self._stretch = f"from-{start:09d}"
        if active:
            atomic.write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
            for path in self._events.glob("*"):
                # Others may keep files there: TensorBoard's profiler does.
                if found := re.search(r"\.(from|final)-(\d+)$", path.name):
                    begins = int(found[2])
                    if begins > start or (begins == start and (found[1] == "from" or not evaluated)):
                        path.unlink()

    def write(self, record: Mapping[str, object]) -> None:
        """One record of numbers and of dicts of numbers; "step" says where it belongs."""
        self.records.append(dict(record))
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        from tensorboardX import summary

        for tag, number in _scalars(record):
            self._event(record["step"], summary.scalar(tag, number))
        if self._writer is not None:
            self._writer.flush()

    def picture(
        self, step: int, name: str, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec
    ) -> None:
        """Image, truth and prediction side by side, for TensorBoard alone."""
        if self._active:
            from tensorboardX import summary

            row = [image, pictures.colourise(truth, spec), pictures.colourise(predicted, spec)]
            joined = np.concatenate(row, axis=1)
            self._event(step, summary.image(f"predictions/{name}", joined, dataformats="HWC"))

    def _event(self, step: int, summary) -> None:
        # Not tensorboardX's SummaryWriter: it writes in a thread of its own, and where that dies of a full disk, the
        # run waits for it for ever.
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event

        if self._writer is None:
            self._events.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads files in the order of their names.
            self._writer = RecordWriter(str(self._events / f"events.out.tfevents.{time.time():.6f}.{self._stretch}"))
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def cut(self, step: int) -> None:
        """To be called before a checkpoint of `step`: what was written belongs to it, what comes is made again."""
        self._begin(f"from-{step:09d}")

    def begin_final(self, step: int) -> None:
        """To be called before the evaluation of the last step, whose checkpoint is there."""
        self._begin(f"final-{step:09d}")

    def _begin(self, stretch: str) -> None:
        self.close()
        self._stretch = stretch

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _scalars(record: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """What TensorBoard shows of a record: it knows no missing numbers."""
    for key, value in record.items():
        named = {f"{key}/{name}": number for name, number in value.items()} if isinstance(value, dict) else {key: value}
        yield from ((tag, number) for tag, number in named.items() if number is not None and tag != "step")


def _parsed(line: str) -> dict | None:
    # The last line may be cut or garbled where the machine stopped.
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None
