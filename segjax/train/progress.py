"""A run's output in the terminal: lines of at most 80 columns, a progress bar, and the response to Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from segjax.data import specs
from segjax.runtime import console, distributed, signals

T = TypeVar("T")


def show_chosen(chosen: Mapping[str, tuple[object, str]]) -> None:
    """Prints the value and the reason of each setting that the run chose (segjax/train/unset.py)."""
    if chosen:
        console.say("settings that the recipe leaves unset, chosen for these images and this start:")
        for key, (value, reason) in chosen.items():
            console.say(f"  {key}={value}: {reason}")


def show_settings(changes: Sequence[str]) -> None:
    """Prints the settings that differ from the defaults, as KEY=VALUE."""
    console.say("settings that differ from the defaults:")
    # A setting stays on one line.
    joined = "  ".join(change.replace(" ", console.NO_BREAK) for change in changes)
    console.say(console.filled(joined, indent="  "))


def describe(summary: Mapping[str, str], warnings: Sequence[str], *, start: int, steps: int) -> None:
    """Prints a line for each entry of `summary` and each warning, and the step at which the run resumes."""
    width = max(map(len, summary), default=0)
    for label, text in summary.items():
        console.say(f"{label:<{width}} {text}")
    for text in warnings:
        console.say(f"warning: {text}")
    if start:
        console.say(f"resuming at step {start} of {steps}")
    if start < steps:
        console.say("compiling the training step; the first time takes longer ...")


def already_finished(result: Mapping, workdir: Path) -> None:
    """Prints the `result` of a finished run, and how to train longer or start a new run."""
    console.say(
        f"{workdir} is finished: mIoU {console.score(result['mean_iou'])} at step {result['step']} (result.json)"
    )
    if result["stopped_early"]:
        patience = result["config"]["eval"]["patience"]
        console.say(f"  it stopped early:  no better mIoU in {patience} evaluations")
        console.say(f"  to train longer:   add --config.eval.patience={2 * patience} (0 never stops early)")
    else:
        console.say(f"  to train longer:   add --config.train.steps={2 * max(result['step'], 1)}")
    console.say(f"  to start over:     --workdir NEW, or rm -r {workdir}")


def stopped(step: int, steps: int, workdir: Path) -> None:
    """Prints that a run was stopped and saved, and how to resume it."""
    console.say(f"stopped at step {step} of {steps} and saved in {workdir}")
    console.say("  to continue: run the same command")


def table(result: Mapping, spec: specs.DatasetSpec) -> None:
    """Prints the IoU of every class, mIoU and pixel accuracy."""
    console.say("")
    ious = zip(spec.label_names, result["per_class_iou"], strict=True)
    cells = [f"{console.cell(name, 20)} {console.score(iou):>6}" for name, iou in ious]
    half = (len(cells) + 1) // 2
    console.say(f"{'class':<20} {'IoU':>6}      {'class':<20} {'IoU':>6}")
    for row in range(half):
        right = cells[row + half] if row + half < len(cells) else ""
        console.say(f"{cells[row]}      {right}".rstrip())
    console.say("")
    console.say(
        f"mIoU {console.score(result['mean_iou'])}   pixel accuracy {console.score(result['pixel_accuracy'])}   "
        f"step {result['step']}"
    )


def report(result: Mapping, spec: specs.DatasetSpec, workdir: Path) -> None:
    """Prints the table of classes and the paths of the files."""
    table(result, spec)
    if result["images_per_second"]:
        console.say(f"trained at {result['images_per_second']:.1f} images per second")
    console.say(f"{workdir}/result.json")
    others = ("curve.png", "predictions", "checkpoints", "adapter", "tensorboard")
    found = [f"{name}{'/' * (workdir / name).is_dir()}" for name in others if (workdir / name).exists()]
    console.say(f"  next to it: {', '.join(found)}")


class Meter:
    """Measures images per second during training, without the time for saving, evaluating and compiling."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._images = self._seconds = self._waited = 0.0
        self.restart(0, 0.0)

    def restart(self, step: int, waited: float) -> None:
        """Starts to count at `step`; `waited` is the total time in seconds that the run has waited for data."""
        self._step, self._since, self._waited_before = step, time.perf_counter(), waited

    def lap(self, step: int, waited: float) -> None:
        """Counts the steps since the last lap or restart, which the device must have finished."""
        self._images += (step - self._step) * self._batch_size
        self._seconds += time.perf_counter() - self._since
        self._waited += waited - self._waited_before
        self.restart(step, waited)

    @property
    def waiting(self) -> float | None:
        """Share of the time spent waiting for data; None before the first lap."""
        return self._waited / self._seconds if self._seconds else None

    @property
    def images_per_second(self) -> float | None:
        """Mean speed so far; None before the first lap."""
        return self._images / self._seconds if self._images else None

    def seconds_for(self, steps: int) -> float | None:
        """Seconds that `steps` steps take at the mean speed so far; None before the first lap."""
        return steps * self._batch_size * self._seconds / self._images if self._images else None


class Progress(console.ProgressBar):
    """Progress bar of a training: steps, loss and images per second."""

    def __init__(self, start: int, total: int):
        super().__init__("step", total, start=start)
        self._steps = total
        self._notes: list[str] = []

    def tick(self, step: int, meter: Meter) -> None:
        """Counts a step between two lines of the log, and keeps the figures of the last line."""
        self.advance(step - self.count, notes=self._notes, left=meter.seconds_for(self._steps - step))

    def show(self, step: int, loss: float | None, meter: Meter) -> None:
        self._notes = notes = [f"loss {console.score(loss)}"]
        if meter.images_per_second is not None:
            # The share of the time that the run waits for data.
            waiting = f", {meter.waiting:.0%} waiting" if meter.waiting else ""
            notes.append(f"{meter.images_per_second:.1f} img/s{waiting}")
        left = meter.seconds_for(self._steps - step)
        self.advance(step - self.count, notes=notes, left=left, now=step == self._steps)


class StoppedError(Exception):
    """Raised when a stop was requested by Ctrl-C or SIGTERM."""


class StopRequest:
    """Ctrl-C or SIGTERM requests a stop after the step. A second one stops at once; the last complete save remains.

    Several processes must all stop at the same step: a request takes effect when they have agreed on it.

    Attributes:
      signal: Number of the first signal that this process received; None before.
      requested: Whether to stop.
    """

    def __init__(self):
        self.signal: int | None = None
        self._answers = contextlib.ExitStack()
        self._agreed = False

    @property
    def requested(self) -> bool:
        return self._agreed or (self.signal is not None and jax.process_count() == 1)

    @property
    def exit_status(self) -> int:
        """The exit status for a program that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return signals.status_of(self.signal or signal.SIGTERM)

    def agree(self) -> None:
        """Agrees with the other processes whether to stop; each process must call this at the same step."""
        self._agreed = distributed.anywhere(self.signal is not None)

    def raise_if_requested(self) -> None:
        """Raises StoppedError if a stop is requested."""
        if self.requested:
            raise StoppedError

    def refuse_when_requested(self, function: Callable[..., T], *args: object) -> T:
        """Returns `function(*args)`, or raises StoppedError if a stop is requested."""
        self.raise_if_requested()
        return function(*args)

    def __enter__(self) -> StopRequest:
        self._answers.enter_context(
            signals.answered(
                self._on_signal,
                first="\nstopping after this step and saving; press again to stop at once",
                second="stopped at once; the last complete save remains",
            )
        )
        return self

    def __exit__(self, *_) -> None:
        self._answers.close()

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(signals.status_of(number))
        self.signal = number
