"""What a person sees of a run: plain lines that fit 80 columns, a progress bar on a terminal, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from segjax.data import specs
from segjax.data.records import Records
from segjax.runtime import console, distributed
from segjax.runtime.parallel import Parallel
from segjax.train.config import RunError


def show_settings(changes: Sequence[str]) -> None:
    """KEY=VALUE of the settings that differ from the defaults."""
    console.say("settings other than the defaults:")
    # A setting stays on one line.
    joined = "  ".join(change.replace(" ", "\0") for change in changes)
    console.say(console.filled(joined, indent="  ").replace("\0", " "))


def describe(
    config: ConfigDict,
    workdir: Path,
    params: Mapping[str, jax.Array],
    training: Records,
    evaluation: Records,
    padding: float,
    spec: specs.DatasetSpec,
    parallel: Parallel,
    start: int,
) -> None:
    """What the run will do; `padding` is the share of the crops that no image covers."""
    height, width = config.augment.crop
    count = sum(array.size for array in params.values())
    kind = parallel.devices[0].device_kind
    console.say(f"model    {config.model.name}, {count:,} parameters, computes in {config.model.dtype}")
    console.say(f"data     {spec.name}, {spec.num_classes} classes")
    console.say(
        f"images   {len(training)} to train on ({config.data.train_split}), "
        f"{len(evaluation)} to evaluate ({config.data.eval_split})"
    )
    padded = f" ({padding:.0%} padding)" if padding >= 0.005 else ""
    console.say(
        f"steps    {config.train.steps} of {config.train.batch} crops of {height}x{width}{padded}, {config.optim.name}"
    )
    where = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    console.say(f"device   {len(parallel.devices)} x {kind}{where}, {parallel.kind}")
    console.say(f"workdir  {workdir}")
    if start:
        console.say(f"resuming at step {start} of {config.train.steps}")
    if start < config.train.steps:
        console.say("compiling the training step; the first time takes longest ...")


def already_finished(result: Mapping, config: ConfigDict, workdir: Path) -> None:
    console.say(
        f"{workdir} is finished: mIoU {console.score(result['mean_iou'])} at step {result['step']} (result.json)"
    )
    if result["stopped_early"]:
        patience = result["config"]["eval"]["patience"]
        console.say(f"  it stopped early:  no better mIoU in {patience} evaluations")
        console.say(f"  to train longer:   add --config.eval.patience={2 * patience} (0 never stops early)")
    else:
        console.say(f"  to train longer:   add --config.train.steps={2 * max(result['step'], 1)}")
    console.say(f"  to start anew:     --workdir NEW, or rm -r {workdir}")


def stopped(step: int, config: ConfigDict, workdir: Path) -> None:
    console.say(f"stopped at step {step} of {config.train.steps} and saved in {workdir}")
    console.say("  to go on: the same command again")


def table(result: Mapping, spec: specs.DatasetSpec) -> None:
    """IoU by class, and the means."""
    console.say("")
    ious = zip(spec.label_names, result["per_class_iou"], strict=True)
    cells = [f"{name:<20.20} {console.score(iou):>6}" for name, iou in ious]
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
    """The table of classes and where the files are."""
    table(result, spec)
    if result["images_per_second"]:
        console.say(f"trained at {result['images_per_second']:.1f} images per second")
    console.say(f"{workdir}/result.json")
    console.say("  beside it: curve.png, predictions/, checkpoints/, tensorboard/")


def compiled(step: Callable, arguments: tuple, parallel: Parallel) -> Callable:
    """The training step as a program, with how long that took and what memory it needs."""
    since = time.perf_counter()
    program = step.lower(*arguments).compile()
    seconds = time.perf_counter() - since
    analysis = program.memory_analysis()
    # Arguments that are used up are counted among the outputs too.
    needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    needed += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    there = (parallel.own_devices[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {console.amount(there)}" if there else ""
    console.say(f"compiled in {seconds:.1f} s; a step needs {console.amount(needed)}{of} on each device")
    if there and needed > there:
        raise RunError(
            f"a step needs {console.amount(needed)}, the device has {console.amount(there)}. What needs less:\n"
            "  --config.train.accumulate=2 (the same batch in two parts)\n"
            "  --config.train.remat=True\n"
            "  --config.model.dtype=bfloat16\n"
            "  or a smaller batch or crop"
        )
    return program


class Meter:
    """Images per second of training alone: saving, evaluating and compiling are left out."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._images = self._seconds = self._waited = 0.0
        self.restart(0, 0.0)

    def restart(self, step: int, waited: float) -> None:
        """Begins to count at `step`; `waited` is how long the run has waited for data so far, seconds."""
        self._step, self._since, self._waited_before = step, time.perf_counter(), waited

    def lap(self, step: int, waited: float) -> None:
        """Counts the steps since the last lap or restart; the device must have finished them."""
        self._images += (step - self._step) * self._batch_size
        self._seconds += time.perf_counter() - self._since
        self._waited += waited - self._waited_before
        self.restart(step, waited)

    @property
    def waiting(self) -> float | None:
        """Share of the time that was spent waiting for data."""
        return self._waited / self._seconds if self._seconds else None

    @property
    def images_per_second(self) -> float | None:
        """Mean so far; None before anything was counted."""
        return self._images / self._seconds if self._images else None

    def seconds_for(self, steps: int) -> float | None:
        """How long so many steps take at that rate."""
        return steps * self._batch_size * self._seconds / self._images if self._images else None


class Progress(console.Progress):
    """Steps of a training, with the loss and the images per second."""

    def __init__(self, start: int, total: int):
        super().__init__("step", total, start=start)
        self._steps = total

    def show(self, step: int, loss: float | None, meter: Meter) -> None:
        notes = [f"loss {console.score(loss)}"]
        if meter.images_per_second is not None:
            # The share of the time in which the device waits for data.
            waiting = f", {meter.waiting:.0%} waiting" if meter.waiting else ""
            notes.append(f"{meter.images_per_second:.1f} img/s{waiting}")
        left = meter.seconds_for(self._steps - step)
        self.advance(step - self.count, notes=notes, left=left, now=step == self._steps)

    def say(self, text: str) -> None:
        """Lines of their own, above the bar."""
        console.say(text)


class StoppedError(Exception):
    """A person or the system has asked to stop."""


class StopRequest:
    """Ctrl-C or SIGTERM asks to stop after the step; a second one stops at once, which leaves the last save whole.

    Of several processes all must stop at the same step: a request counts once they have agreed on it.

    Attributes:
      signal: the number of the first one that came to this process; None before.
      requested: whether to stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.signal: int | None = None
        self._agreed = False

    @property
    def requested(self) -> bool:
        return self._agreed or (self.signal is not None and jax.process_count() == 1)

    @property
    def exit_status(self) -> int:
        """What a shell reports for a program that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGTERM)

    def agree(self) -> None:
        """Asks the other processes; each of them has to, at the same step."""
        self._agreed = distributed.anywhere(self.signal is not None)

    def refuse_when_requested(self, function: Callable, *args):
        """`function(*args)`, or StoppedError."""
        if self.requested:
            raise StoppedError
        return function(*args)

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread alone, where a library user may not be.
        is_main = threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS if is_main}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(128 + number)
        self.signal = number
        # Not print: where the signal came in the middle of one, to stderr too, Python refuses a second.
        os.write(2, b"\nstopping after this step and saving; once more stops at once\n")
