"""Losses and gradient norms since the last line of the log, and the steps where they are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from segjax.runtime.parallel import Parallel

# Number of steps that the host may enqueue before it waits for the device. It is large enough to keep the device busy,
# and small enough that the time spent waiting for data is measured.
AHEAD = 3


class NotFinite(NamedTuple):
    """A step whose loss or gradient is not finite.

    Attributes:
      step: Number of steps before it.
      text: Clause with the value, the step and its images.
      stopped: Whether it ended the training; otherwise it was skipped.
    """

    step: int
    text: str
    stopped: bool


class RecentLosses:
    """Loss and gradient norm of every step since the last line of the log.

    Reading the scalars of a step waits for the device. So the scalars stay on the device until `read`, which a run
    calls only before it logs, evaluates or saves.

    Attributes:
      rows: [loss, gradient norm] of each finite step that was read. Part of a checkpoint.
    """

    def __init__(self, parallel: Parallel, names_of: Callable[[int], Iterable[str]], rows: Iterable[list[float]] = ()):
        """Starts with the `rows` of a checkpoint.

        Args:
          parallel: Parallelism of the run.
          names_of: Function from a step (from 0) to the names of its images.
          rows: Rows of the checkpoint.
        """
        self.rows = list(rows)
        self._parallel, self._names_of = parallel, names_of
        self._unread: list[dict[str, jax.Array]] = []

    def wait(self) -> None:
        """Waits until the device is fewer than `AHEAD` steps behind the host."""
        if len(self._unread) >= AHEAD:
            jax.block_until_ready(self._unread[-AHEAD])

    def add(self, scalars: dict[str, jax.Array]) -> None:
        """Adds the scalars of the next step from `TrainStep`, without waiting for them."""
        self._unread.append(scalars)

    def read(self, step: int) -> list[NotFinite]:
        """Waits for all steps up to `step` and returns those that are not finite; only the last may have stopped."""
        if not self._unread:
            return []
        scalars, self._unread = self._parallel.scalars(self._unread), []
        found = []
        rows = zip(*(scalars[name].tolist() for name in ("loss", "gradient_norm", "stopped")), strict=True)
        for number, (loss, gradient_norm, stopped) in enumerate(rows, step - len(scalars["loss"])):
            if np.isfinite([loss, gradient_norm]).all():
                self.rows.append([loss, gradient_norm])
                continue
            became = f"the gradient became {gradient_norm}" if np.isfinite(loss) else f"the loss became {loss}"
            names = ", ".join(self._names_of(number))
            found.append(NotFinite(number, f"{became} at step {number + 1}, on {names}", stopped))
            if stopped:
                # Later steps did not change the state.
                break
        return found

    def take_means(self) -> tuple[float | None, float | None]:
        """Returns the mean loss and gradient norm, None without a finite step, and removes the rows."""
        loss, gradient_norm = np.mean(self.rows, axis=0).tolist() if self.rows else (None, None)
        self.rows.clear()
        return loss, gradient_norm


def not_finite_message(problem: NotFinite, culprit: str, workdir: Path) -> str:
    """The message of the error that ends a run at a step that is not finite, with the remedies.

    Args:
      problem: The step.
      culprit: Sentence from `nan_search.first_not_finite`, or "" without a search.
      workdir: Folder of the run.
    """
    find = "" if culprit else "\n  to find the layer: --config.debug.nans=True"
    return (
        f"{problem.text}. {culprit}The state before it is saved in {workdir}/checkpoints/{problem.step}.\n"
        "  to continue in another folder with a lower rate or clipped gradients:\n"
        f"    --workdir=NEW --config.init.checkpoint={workdir}\n"
        "    --config.optim.lr=... or --config.optim.clip_norm=1.0\n"
        f"  to skip such steps: --config.train.may_skip=N, at most N consecutive ones{find}"
    )
