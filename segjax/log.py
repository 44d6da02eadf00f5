"""What a run writes down as it goes: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from segjax import checkpoint, pictures
from segjax.data import specs


class Log:
    """metrics.jsonl, one record per line, and TensorBoard's event files, without gaps or doubles after a resumption.

    Event files cannot be cut, so that there is one for each stretch between two checkpoints, named after the step it
    begins at: on resuming, those that begin at the checkpoint or after it are removed, and made again.

    Args of the constructor:
      start: the step that the run goes on from; records of later ones are dropped.
      finished: no step is left to do; what is made again is the evaluation of the last one.
      active: whether this process writes. Of several, one does.
    """

    def __init__(self, workdir: Path, start: int, *, finished: bool, active: bool = True):
        self._path = workdir / "metrics.jsonl"
        self._events = workdir / "tensorboard"
        self._active = active
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        records = [record for record in map(_parsed, lines) if record and record["step"] <= start]
        redone = start if finished else None
        self.records = [record for record in records if "mean_iou" not in record or record["step"] != redone]
        self._writer = None
        if active:
            checkpoint.write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
            for path in self._events.glob("*"):
                kind, step = re.search(r"\.(from|final)-(\d+)$", path.name).groups()
                if int(step) > start or (int(step) == start and (kind == "from" or finished)):
                    path.unlink()
            self._open(f"from-{start:09d}")

    def evaluated(self, step: int) -> dict | None:
        """The record of the evaluation after so many steps."""
        found = [record for record in self.records if record["step"] == step and "mean_iou" in record]
        return found[-1] if found else None

    def write(self, record: Mapping[str, object]) -> None:
        """One record of numbers and of dicts of numbers; "step" says where it belongs."""
        self.records.append(dict(record))
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if isinstance(value, dict):
                for name, number in value.items():
                    self._scalar(f"{key}/{name}", number, record["step"])
            elif key != "step":
                self._scalar(key, value, record["step"])

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self._writer.add_scalar(tag, value, step)

    def picture(
        self, step: int, name: str, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec
    ) -> None:
        """Image, truth and prediction side by side, for TensorBoard alone."""
        if self._active:
            row = [image, pictures.colourise(truth, spec), pictures.colourise(predicted, spec)]
            self._writer.add_image(f"predictions/{name}", np.concatenate(row, axis=1), step, dataformats="HWC")

    def cut(self, step: int) -> None:
        """To be called before a checkpoint of `step`: what was written belongs to it, what comes is made again."""
        self._reopen(f"from-{step:09d}")

    def begin_final(self, step: int) -> None:
        """To be called before the evaluation of the last step, whose checkpoint is there."""
        self._reopen(f"final-{step:09d}")

    def _reopen(self, suffix: str) -> None:
        if self._active:
            self._writer.close()
            self._open(suffix)

    def _open(self, suffix: str) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(self._events), filename_suffix=f".{suffix}")

    def close(self) -> None:
        if self._active:
            self._writer.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _parsed(line: str) -> dict | None:
    # The last line may be cut where the machine stopped.
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
