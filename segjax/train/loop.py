"""The training loop: read `train`, then `_fit`.

`train` locks the workdir, checks the settings, fits those of the model to the initial weights (`start.fitted`),
returns if the run is finished, builds the run (`setup.build`: data, model, newest undamaged checkpoint or initial
weights, batches), compiles the step, and truncates the log to the checkpoint. Each iteration then takes a step, logs,
evaluates and saves, in this order. After the last step it evaluates and writes the result, with result.json last.

A resumed run first makes up for a missing evaluation at the step of its checkpoint. The batch and all random numbers
depend only on (seed, step), so a resumed run is bitwise equal to an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from segjax import metrics
from segjax.checkpoints.format_version import stamped
from segjax.models.functional import params_sha256
from segjax.runtime import atomic, console, lock, memory, versions
from segjax.runtime.distributed import from_lead, is_lead
from segjax.train import progress, resume, setup, start, unset
from segjax.train.config import RunError, check, plain
from segjax.train.evaluator import Evaluation
from segjax.train.progress import Progress, StoppedError, StopRequest
from segjax.train.run import Run
from segjax.train.state import TrainState
from segjax.viz import pictures

# The file in a workdir that the writing process locks.
LOCK = ".lock"


def default_workdir(config: ConfigDict) -> Path:
    """Return the folder of a run without an explicit workdir, runs/<label>-<dataset>.

    Args:
      config: Config of the run.

    Returns:
      Relative path.

    Example:
      >>> from segjax import train
      >>> from segjax.recipes import segformer
      >>> train.default_workdir(segformer.get_config("b0")).as_posix()
      'runs/segformer-b0-streets'
    """
    return Path("runs") / f"{config.label}-{config.data.name}"


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    given: Collection[str] | None = None,
    changes: Callable[[ConfigDict], Sequence[str]] = lambda config: (),
) -> int:
    """Train a model, or resume its training.

    It writes checkpoints/, best/, metrics.jsonl and, unless `config.train.trackers` lacks it, tensorboard/ in
    `workdir`, and at the end result.json, curve.png and predictions/.

    Args:
      config: Config of the run, as a recipe returns it.
      workdir: Folder of the run.
      given: Names of the settings in `config.model` that `config.init.checkpoint` may not replace, see `start.fitted`;
        by default all of them.
      changes: Function from the final config, checked and with unset settings chosen, to the settings to print, each as
        KEY=VALUE.

    Returns:
      Exit status: 0, or 130 or 143 if Ctrl-C or SIGTERM stopped the run, which is then saved.

    Raises:
      RunError: Settings cannot be used, or differ from those of the run in `workdir`; a loss is not finite; a step
        needs more memory than there is.
      ValueError: Data, weights or checkpoints cannot be used, or another process writes the run in `workdir`.

    Example:
      >>> import contextlib, io, pathlib, tempfile
      >>> from segjax import train
      >>> from segjax.recipes import segformer_simple
      >>> config = segformer_simple.get_config("small,streets")
      >>> config.model.update(dims=(4, 8, 10, 16), depths=(1, 1, 1, 1), decoder_dim=8)
      >>> config.data.update(train_images=4, eval_images=1, size=(64, 96))
      >>> config.augment.crop = (32, 64)
      >>> config.train.update(steps=0, batch=4)
      >>> config.eval.batch = 4
      >>> workdir = pathlib.Path(tempfile.mkdtemp())
      >>> with contextlib.redirect_stdout(io.StringIO()):  # the log
      ...     status = train.train(config, workdir)
      >>> status, (workdir / "result.json").exists()
      (0, True)
    """
    with contextlib.ExitStack() as stack:
        # The first of several processes holds the lock for all of them.
        remedy = "wait until it ends, stop it, or give another --workdir"
        held = lock.held(workdir / LOCK, what=f"{workdir}", remedy=remedy)
        from_lead(lambda: stack.enter_context(held))
        try:
            return _train(config, workdir, given, changes)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_exhausted(error):
                raise
            raise RunError(f"there is not enough memory. {setup.LESS_MEMORY}") from error


def _train(
    config: ConfigDict,
    workdir: Path,
    given: Collection[str] | None,
    changes: Callable[[ConfigDict], Sequence[str]],
) -> int:
    """`train` in a locked workdir."""
    before = from_lead(lambda: resume.recorded_config(workdir))
    check(config, workdir, resumes=before is not None)
    checkpoint = None
    if before is not None:
        config = unset.kept(start.resumed_config(config, before, given), before)
    elif checkpoint := start.read_start(config.init):
        config = start.fitted(config, checkpoint, given)
    config, chosen = unset.filled(config)
    recorded = plain(config)
    ended = from_lead(lambda: resume.earlier_result(recorded, workdir))
    if ended and resume.is_finished(ended, steps=config.train.steps, evaluation=recorded["eval"]):
        progress.already_finished(ended, workdir)
        return 0
    run, state = setup.build(config, workdir, ended, checkpoint)
    # Frees its arrays, which are as large as the model.
    del checkpoint
    progress.show_chosen(chosen)
    if lines := changes(config):
        progress.show_settings(lines)
    progress.describe(run.summary, run.warnings, start=run.first, steps=run.steps)
    program = setup.compile_step(run, state)
    run.evaluator.refuse_too_large(state)
    with run.log:
        with run.checkpoints, run.batches, StopRequest() as stop, Progress(run.first, run.steps) as bar:
            step, state, evaluation = _fit(run, program, state, stop, bar)
        if evaluation is None:
            return stop.exit_status
        _write_result(run, step, state, evaluation)
    return 0


def _fit(
    run: Run, program: setup.Program, state: TrainState, stop: StopRequest, bar: Progress
) -> tuple[int, TrainState, Evaluation | None]:
    """Trains until the last step, or until evaluations no longer improve, and evaluates.

    Returns:
      The number of steps taken, the state, and its evaluation. The evaluation is None if a stop was requested; the
      state is saved then.
    """
    step, evaluator, batches, meter = run.first, run.evaluator, run.batches, run.meter
    try:
        if evaluator.is_due(step) and evaluator.scores.evaluated != step:
            # The run was stopped before this evaluation ended.
            evaluator.evaluate(step, state, stop=stop)
        while step < run.steps and not evaluator.gave_up:
            stop.raise_if_requested()
            # Bounds how far the host runs ahead of the device.
            run.recent.wait()
            state, scalars = program(state, batches.at(step), run.key)
            run.recent.add(scalars)
            step += 1
            is_last = step == run.steps
            if step == run.first + 1:
                jax.block_until_ready(state)
                # Excludes the first step, which may have waited for the first batch.
                meter.restart(step, batches.waited)
            if step % run.log_every == 0 or is_last:
                run.read_losses(step, state)
                meter.lap(step, batches.waited)
                bar.show(step, run.write_means(step, state), meter)
                stop.agree()
            else:
                bar.tick(step, meter)
            if evaluator.is_due(step):
                run.read_losses(step, state)
                evaluator.evaluate(step, state, stop=stop)
                meter.restart(step, batches.waited)
            if step % run.save_every == 0 or is_last or evaluator.gave_up:
                run.read_losses(step, state)
                run.save(step, state)
                meter.restart(step, batches.waited)
        # The last checkpoint is on disk before the evaluation, which may fail.
        run.checkpoints.wait()
        if step < run.steps:
            console.say(f"stopped early at step {step}: no better mIoU in {evaluator.scores.worse} evaluations")
        console.say(f"evaluating on {len(run.evaluation)} images ({run.eval_split}) ...")
        run.log.begin_final(step)
        return step, state, evaluator.evaluate(step, state, stop=stop)
    except StoppedError:
        run.read_losses(step, state)
        run.save(step, state)
        run.checkpoints.wait()
        progress.stopped(step, run.steps, run.workdir)
        return step, state, None


def _write_result(run: Run, step: int, state: TrainState, evaluation: Evaluation) -> None:
    """Writes curve.png, predictions/ and result.json, and prints the metrics."""
    scores = run.evaluator.scores
    result = {
        **stamped(evaluation.metrics),
        # Classes of the entries of per_class_iou.
        "classes": list(run.spec.label_names),
        "step": step,
        "stopped_early": step < run.steps,
        "best": {"step": scores.step, "mean_iou": scores.best},
        "images_per_second": run.meter.images_per_second,
        # Time of the process that ended the run, including compilation and evaluation.
        "duration_s": round(time.perf_counter() - run.began, 1),
        "from_step": run.first,
        "device": versions.of_devices(run.parallel.devices),
        "versions": versions.installed(),
        "protocol": run.evaluator.protocol.record(),
        "config": run.metadata["config"],
        "params_sha256": params_sha256(run.model.adapters.merged(run.fetch(state.evaluated[0]))),
    }
    if is_lead():
        if run.save_adapter is not None and not run.evaluator.saves_best:
            # Otherwise those of the best weights are saved.
            metadata = {**run.metadata, "step": step, "mean_iou": evaluation.metrics["mean_iou"]}
            run.save_adapter(run.fetch(dataclasses.replace(state, teacher=())), metadata)
        draw(run, evaluation.predicted)
        # Written last, because it marks a run as finished.
        atomic.write_text(run.workdir / "result.json", json.dumps(result, indent=2) + "\n")
        for name in ("result.json", "curve.png"):
            run.log.artifact(run.workdir / name, "result")
    progress.report(result, run.spec, run.workdir)


def draw(run: Run, predicted: Mapping[int, np.ndarray]) -> None:
    """Draws curve.png, and a picture for each entry of `predicted`, labels (H, W) by image number."""
    pictures.save_curves(run.workdir / "curve.png", run.log.records)
    spec = run.spec
    for number, labels in predicted.items():
        name, (image, truth) = run.evaluation.names[number], run.evaluation[number]
        confusion = metrics.confusion_matrix(
            truth, labels, num_classes=spec.num_classes, ignore_label=spec.ignore_label
        )
        title = f"{name}   mIoU of this image {console.score(metrics.summarise(confusion)['mean_iou'])}"
        pictures.save_prediction(run.workdir / "predictions" / f"{name}.png", image, truth, labels, spec, title=title)
