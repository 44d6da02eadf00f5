"""Times contenders in turn, each in its own process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker

import numpy as np

from segjax.benchmark import floor as floors
from segjax.benchmark.machine import cores, peak_bytes, quartiles, resident_bytes
from segjax.benchmark.rows import Row
from segjax.runtime import signals

OURS = "segjax"
# Largest accepted difference between contenders, relative to the largest logit or to the loss, by dtype.
CLOSE = {"float32": 1e-3, "bfloat16": 0.1}
SPELLINGS = {"bf16": "bfloat16"}
ROUND_SECONDS, ROUNDS, QUIET_SECONDS = 0.5, 15, 0.5


class BenchmarkError(ValueError):
    """Raised when a contender cannot be timed; the message states the reason."""


class OutOfMemoryError(BenchmarkError):
    """Raised when a contender's step does not fit into memory."""


class OutOfTimeError(BenchmarkError):
    """Raised when a contender has not finished at the end of the time."""


# ------------------------------------------------------------------------------------------------------- one contender


def _serve(connection, name: str, work: tuple) -> None:
    """The main function of a contender's process: prepares it, sends its outcome, and then runs steps on request."""
    threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()
    try:
        from segjax.runtime import environment

        # For torch too, which gains as much.
        environment.keep_freed_memory()
        import jax
        import torch

        from segjax.benchmark.contenders import CONTENDERS, Work, same_precision

        work = Work(*work)
        torch.set_num_threads(cores())
        if name != OURS:
            # jax only creates the weights, on the CPU; the GPU is for torch.
            jax.config.update("jax_platforms", "cpu")
        if not connection.recv():
            return
        same_precision(work)
        contender = CONTENDERS[name](work)
        before = resident_bytes()
        contender.run()
        peak = contender.memory if contender.memory is not None else max(0, peak_bytes() - before)
        connection.send((contender.outcome, contender.compile_seconds, peak))
        while steps := connection.recv():
            # An untimed step first brings the contender's data back into caches and memory.
            contender.run()
            since = time.perf_counter()
            contender.run(steps)
            connection.send((time.perf_counter() - since) / steps)
    except Exception as error:
        # The command may have ended already.
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _end_with_the_parent() -> None:
    """Ends this process, even during a compilation, when the command that started it has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Makes processes that start in the body immune to Ctrl-C, which a terminal sends to all; the command ends them.

    The signal is blocked, not ignored: if it arrives meanwhile, this process receives it afterwards.
    """
    # Started before the signal is blocked: the first process of multiprocessing starts the tracker, which unblocks it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Runner:
    """A contender in its own process, which starts while other contenders are prepared."""

    def __init__(self, name: str, work: tuple, *, until: float | None = None):
        """Starts the process.

        Args:
          name: Key of `contenders.CONTENDERS`.
          work: Fields of `contenders.Work`.
          until: Moment, on the clock of `time.monotonic`, until which to wait for answers.
        """
        context = multiprocessing.get_context("spawn")
        self.name = name
        # Largest difference of the outcome from that of the first contender.
        self.error = float("nan")
        self._until = until
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, work), daemon=True)
        with _without_ctrl_c():
            self._process.start()
        theirs.close()

    def make(self) -> None:
        self.outcome, self.compile_seconds, self.memory = self._answer_to(True)

    def seconds(self, steps: int) -> float:
        """Mean seconds per step of `steps` consecutive steps."""
        return self._answer_to(steps)

    def _answer_to(self, message):
        try:
            self._connection.send(message)
            if self._until is not None and not self._connection.poll(max(0, self._until - time.monotonic())):
                raise OutOfTimeError(f"{self.name}: not finished when the time was over")
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(10)
            raise BenchmarkError(f"{self.name}: its process died (exit status {self._process.exitcode})") from None
        if isinstance(answer, str):
            does_not_fit = re.search("RESOURCE_EXHAUSTED|out of memory", answer, re.IGNORECASE)
            raise (OutOfMemoryError if does_not_fit else BenchmarkError)(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(0)
        # A process that compiles reads no message for minutes.
        is_late = self._until is not None and time.monotonic() > self._until
        self._process.join(0 if signals.received() else 1 if is_late else 10)
        self._process.kill()


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(
    names: Sequence[str],
    work: tuple,
    *,
    ceiling: Mapping,
    rounds: int,
    say: Callable[[str], None],
    apart: bool = False,
    until: float | None = None,
    keep_going: bool = False,
) -> dict[str, object]:
    """Times contenders against each other; the first one is segjax.

    Args:
      names: Keys of `contenders.CONTENDERS`.
      work: Fields of `contenders.Work`.
      ceiling: Result of `floor.ceilings` for the same dtype.
      rounds: Number of rounds.
      say: Function that prints lines about the progress.
      apart: Whether to close each contender before the next one is prepared, instead of taking turns.
      until: End of the time, on the clock of `time.monotonic`; contenders that have not finished are skipped.
      keep_going: Whether to record the reason as "failed" for a rival that cannot be timed, instead of raising it.

    Raises:
      BenchmarkError: A contender cannot be prepared, or has other results.
      OutOfMemoryError: A contender does not fit into memory, even with `keep_going`.
      OutOfTimeError: segjax has not finished in time.
    """
    model, size, batch, mode, dtype, num_classes = work
    times, made, failed, cut = {}, {}, {}, False
    with contextlib.ExitStack() as stack:
        runners = [Runner(name, work, until=until) for name in names]
        for runner in runners:
            stack.callback(runner.close)
        # Computed while the processes start.
        floor = floors.floor_of(work, ceiling)
        for runner in runners:
            say(f"  {runner.name}: preparing ...")
            try:
                runner.make()
                runner.error = _difference(runner.outcome, runners[0].outcome)
                if not runner.error <= CLOSE[dtype]:
                    raise BenchmarkError(
                        f"the results of {runner.name} differ from those of {names[0]} by {runner.error:.1e}"
                    )
                made[runner.name] = runner
                if apart:
                    times |= _turns([runner], rounds)
                    runner.close()
            except OutOfMemoryError:
                raise
            except BenchmarkError as error:
                if not keep_going or runner is runners[0]:
                    raise
                runner.close()
                made.pop(runner.name, None)
                failed[runner.name] = str(error)
                cut |= isinstance(error, OutOfTimeError)
                say(f"  {error}")
        if not apart:
            times = _turns(list(made.values()), rounds)
    ours = np.array(times[names[0]])
    rows = []
    for name in names:
        if name in failed:
            rows.append({"name": name, "failed": failed[name]})
            continue
        middle = float(np.median(times[name]))
        rows.append(
            {
                "name": name,
                "milliseconds": quartiles(1e3 * np.array(times[name])),
                "ours_over_theirs": quartiles(ours / np.array(times[name])),
                "difference": made[name].error,
                "compile_seconds": made[name].compile_seconds,
                "memory_bytes": made[name].memory,
                "images_per_second": batch / middle,
                "flops_per_second": floor["flops"] / middle,
                "bytes_per_second": floor["bytes"] / middle,
                "share_of_floor": floor["milliseconds"] / (1e3 * middle),
            }
        )
    return {
        "model": model,
        "mode": mode,
        "batch": batch,
        "size": list(size),
        "dtype": dtype,
        "num_classes": num_classes,
        "rounds": rounds,
        "floor": floor,
        **({"cut_short": True} if cut else {}),
        "contenders": rows,
    }


def _turns(runners: Sequence[Runner], rounds: int) -> dict[str, list[float]]:
    """Seconds per step by contender, one number per round."""
    times = {runner.name: [] for runner in runners}
    steps = {runner.name: max(1, round(ROUND_SECONDS / runner.seconds(2))) for runner in runners}
    for number in range(rounds):
        # The order rotates, because a heavy contender may slow down the next one by heating the processor.
        start = number % len(runners)
        for runner in (*runners[start:], *runners[:start]):
            # Threads of the previous contender may spin for some tenths of a second.
            if len(runners) > 1:
                time.sleep(QUIET_SECONDS)
            times[runner.name].append(runner.seconds(steps[runner.name]))
    return times


def largest_that_fits(
    measure: Callable[[Row], dict[str, object]], row: Row, *, say: Callable[[str], None]
) -> dict[str, object]:
    """`measure(row)` with the batch halved until every contender has enough memory.

    All contenders have the same batch: the largest that fits all, within a factor of two.

    Returns:
      The result, with the names and batches that did not fit as "did_not_fit", and the duration as "seconds".

    Raises:
      OutOfMemoryError: Not even one image fits.
    """
    did_not_fit, since = [], time.monotonic()
    while True:
        try:
            result = measure(row)
        except OutOfMemoryError as error:
            name = str(error).partition(":")[0]
            if row.batch == 1:
                raise
            say(f"  a batch of {row.batch} does not fit {name}; half of it ...")
            did_not_fit.append({"name": name, "batch": row.batch})
            row = row._replace(batch=row.batch // 2)
        else:
            return result | {"did_not_fit": did_not_fit, "seconds": time.monotonic() - since}


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one - other).max() / np.abs(other).max())
