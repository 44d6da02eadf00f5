"""TensorBoard's event files of a run."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segjax.runtime import atomic


class TensorBoard:
    """Event files in a folder of the run, without gaps or duplicates in resumed runs; a `trackers.Writer`.

    Event files cannot be truncated. So there is one for each interval between two checkpoints, named after its first
    step. When a run resumes, the files that begin at its checkpoint or later are removed and written again.
    """

    def __init__(self, folder: Path, start: int):
        """Creates a writer, which reads and writes no file yet.

        Args:
          folder: Folder of the event files.
          start: Step of the checkpoint.
        """
        self._folder = folder
        self._writer = None
        self._interval = f"from-{start:09d}"

    def config(self, settings: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX import summary

        for tag, number in values.items():
            self._event(step, summary.scalar(tag, number))
        self._flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        from tensorboardX import summary

        self._event(step, summary.image(name, image, dataformats="HWC"))
        self._flush()

    def artifact(self, path: Path, kind: str) -> None:
        """Writes nothing."""

    def begin(self, interval: str) -> None:
        """Begins an event file for an interval, "from-STEP" or "final-STEP"."""
        self.close(False)
        self._interval = interval

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with atomic.naming(self._folder):
                writer.close()

    def _flush(self) -> None:
        if self._writer is not None:
            with atomic.naming(self._folder):
                self._writer.flush()

    def _event(self, step: int, summary: Any) -> None:
        # Not tensorboardX's SummaryWriter, which writes in a thread: a full disk ends that thread, and the run then
        # waits for it forever.
        from tensorboardX import RecordWriter

        # protobuf creates the class at import, so type checkers do not see it.
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with atomic.naming(self._folder):
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # TensorBoard reads files in the order of their names, which begin with the time.
                path = self._folder / f"events.out.tfevents.{time.time():.6f}.{self._interval}"
                self._writer = RecordWriter(str(path))
                self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            self._writer.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())


def remove_after(folder: Path, start: int, *, evaluated: bool) -> None:
    """Removes the event files that begin at a checkpoint or later; `metrics_log.Log` has the arguments."""
    for path in folder.glob("*"):
        # The folder may hold files of other programs, such as TensorBoard's profiler.
        if found := re.search(r"\.(from|final)-(\d+)$", path.name):
            begins = int(found[2])
            if begins > start or (begins == start and (found[1] == "from" or not evaluated)):
                path.unlink()
