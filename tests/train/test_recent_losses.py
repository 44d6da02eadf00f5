"""Losses between two lines of the log: those that are counted, those that are reported, and those that end the run."""

import math

import jax
import pytest

from segjax.runtime.parallel import JitParallel, PmapParallel, ShardMapParallel
from segjax.train import recent_losses as recent_losses_module
from segjax.train.evaluator import Scores
from segjax.train.recent_losses import NotFinite, RecentLosses, not_finite_message

ALL = pytest.mark.parametrize("parallel_class", [JitParallel, PmapParallel, ShardMapParallel])


def window_of(parallel, steps, *, rows=()):
    """A window that was given the (loss, gradient norm, stopped) of several steps, on the devices."""
    window = RecentLosses(parallel, lambda step: [f"image{2 * step}", f"image{2 * step + 1}"], rows)
    for loss, norm, stopped in steps:
        window.add(parallel.replicate({"loss": loss, "gradient_norm": norm, "stopped": stopped}))
    return window


@ALL
def test_finite_steps_are_averaged_and_others_are_named_with_their_images(parallel_class):
    steps = [(1.0, 4.0, False), (math.nan, 1.0, False), (2.5, 0.5, False), (3.0, math.inf, False)]
    window = window_of(parallel_class(), steps, rows=[[0.5, 1.5]])
    assert window.read(9) == [
        NotFinite(6, "the loss became nan at step 7, on image12, image13", False),
        NotFinite(8, "the gradient became inf at step 9, on image16, image17", False),
    ]
    assert window.rows == [[0.5, 1.5], [1.0, 4.0], [2.5, 0.5]]
    # Every step is read once.
    assert window.read(9) == [] and len(window.rows) == 3
    assert window.take_means() == (4 / 3, 2.0)
    assert window.rows == [] and window.take_means() == (None, None)


@ALL
def test_steps_after_the_stopping_one_do_not_count(parallel_class):
    steps = [(1.0, 2.0, False), (math.inf, 1.0, True), (7.0, 7.0, True), (math.nan, 1.0, True)]
    window = window_of(parallel_class(), steps)
    assert window.read(4) == [NotFinite(1, "the loss became inf at step 2, on image2, image3", True)]
    assert window.rows == [[1.0, 2.0]]


def test_recorded_losses_of_a_checkpoint_do_not_change_with_the_window():
    rows = [[0.5, 1.5]]
    window = window_of(JitParallel(), [(1.0, 4.0, False)], rows=rows)
    window.read(1)
    window.take_means()
    assert rows == [[0.5, 1.5]]


def test_the_host_waits_for_a_step_a_fixed_number_behind(monkeypatch):
    waited = []
    monkeypatch.setattr(
        recent_losses_module.jax, "block_until_ready", lambda scalars: waited.append(float(scalars["loss"]))
    )
    window = RecentLosses(JitParallel(), lambda step: [])
    for step in range(6):
        window.wait()
        window.add({"loss": jax.numpy.float32(step)})
    assert waited == [0, 1, 2] and recent_losses_module.AHEAD == 3


@pytest.mark.parametrize("culprit", ["", "The first output that is not finite is that of stem. "])
def test_the_message_has_the_cause_the_saved_state_and_advice(culprit, tmp_path):
    message = not_finite_message(NotFinite(6, "the loss became nan at step 7, on a", True), culprit, tmp_path)
    start = f"the loss became nan at step 7, on a. {culprit}The state before it is saved in {tmp_path}/checkpoints/6.\n"
    assert message.startswith(start)
    assert ("debug.nans" in message) == (not culprit)


def test_scores_count_evaluations_since_the_best_and_each_step_once():
    scores = Scores()
    for step, score in ((2, None), (4, 0.5), (6, 0.5), (6, 0.9), (8, 0.25)):
        scores = scores.after(step, score)
    assert scores == Scores(best=0.5, step=4, worse=2, evaluated=8)
    assert [scores.given_up(patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
    assert scores.after(10, 0.75) == Scores(best=0.75, step=10, worse=0, evaluated=10)
