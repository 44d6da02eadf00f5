"""The one loop over training steps: read `train` top to bottom.

Order of a start: check the settings, load data, make the model, take up the newest checkpoint that is whole or else the
weights to start from, then step, log, evaluate and save until the last step, then evaluate and write the result. A
batch and all random numbers follow from (seed, step) alone, so that a run that was stopped goes on exactly as if it had
not been.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from segjax import metrics
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.format_version import refuse_newer, stamped
from segjax.data import specs
from segjax.data.augment import augment, normalise
from segjax.data.records import Records, records_of
from segjax.inference.engine import predict_labels
from segjax.inference.evaluation import evaluate
from segjax.models.functional import params_sha256
from segjax.runtime import atomic, console
from segjax.runtime.distributed import from_lead, is_lead
from segjax.runtime.parallel import Parallel
from segjax.train import nan_search, optim, run_checkpoints, setup
from segjax.train import progress as train_progress
from segjax.train.config import RunError, check, check_crop, plain, refuse_other_run
from segjax.train.metrics_log import Log
from segjax.train.progress import (
    Meter,
    Progress,
    StoppedError,
    StopRequest,
    already_finished,
    compiled,
    describe,
    report,
    show_settings,
)
from segjax.train.state import TrainState
from segjax.train.step import TrainStep
from segjax.viz import pictures

# What a shell reports for a program that Ctrl-C has ended.
INTERRUPTED = 128 + signal.SIGINT
# Steps that the host may hand to the device before it waits: enough to keep it busy, and few enough that waiting for
# data shows as such.
AHEAD = 3


def default_workdir(config: ConfigDict) -> Path:
    """runs/<label>-<dataset>, for example runs/segformer-b0-streets."""
    return Path("runs") / f"{config.label}-{config.data.name}"


def train(config: ConfigDict, workdir: Path, *, changes: Sequence[str] = ()) -> int:
    """Trains, or goes on training, and leaves everything in `workdir`.

    Writes checkpoints/, best/, metrics.jsonl and tensorboard/, and at the end result.json, curve.png and predictions/.

    Args:
      changes: KEY=VALUE of the settings worth telling, those other than the defaults.

    Returns:
      Exit status: 0, or 130 or 143 where Ctrl-C or SIGTERM stopped the run after a save.

    Raises:
      RunError: settings that contradict one another or the run in `workdir`; a loss that is not finite.
      ValueError: data, weights or checkpoints that cannot be used.
    """
    check(config, workdir)
    ended = from_lead(lambda: _earlier_result(config, workdir))
    if ended and _is_finished(ended, config):
        already_finished(ended, config, workdir)
        return 0

    data = setup.load_data(config)
    spec, training, evaluation = data.spec, records_of(data.training), records_of(data.evaluation)
    padding = check_crop(config, training.sizes)
    criterion = setup.make_criterion(config, data)
    parallel = Parallel(config.parallel)
    saved = run_checkpoints.RunCheckpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    skeleton = setup.make_skeleton(config, spec.num_classes, parallel, pretrained=not saved.steps())
    params, batch_stats = skeleton.arrays()
    trained = skeleton.trained(params)
    stacks = skeleton.stacks
    optimizer = optim.optimizer(config.optim, params, steps=config.train.steps, stacks=stacks)
    # Compiled as a whole: array by array, every shape of the model would be a program of its own.
    state = TrainState.start(params, batch_stats, jax.jit(optimizer.init)(trained), ema=config.train.ema > 0)

    about = setup.run_record(config, spec)
    found = saved.restore(
        setup.weights_of(state),
        setup.training_of(state),
        refuse=lambda before: refuse_other_run(before, about, workdir),
        say=console.say,
    )
    first, scores, window = 0, Scores(), []
    if found:
        first, scores, window = found.step, Scores(**found.about["scores"]), found.about["window"]
        if ended and ended["step"] == first:
            # The run had ended here, with an evaluation after its last checkpoint, and is to go on.
            scores = scores.after(first, ended["mean_iou"])
        state = setup.restored(found, state, may_skip=config.train.may_skip)
        # The weights that it started from may be gone.
        about |= {key: found.about[key] for key in ("licence", "provenance") if key in found.about}
    else:
        about |= setup.origin_record(config)

    # An image too small for the model must not be found out after the training.
    height, width = min(evaluation.sizes.tolist(), key=min)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    jax.eval_shape(partial(predict_labels, skeleton, normalise=normalise), params, batch_stats, image)

    train_step = TrainStep(
        skeleton=skeleton,
        optimizer=optimizer,
        augment=partial(augment, settings=config.augment, ignore_label=spec.ignore_label),
        criterion=criterion,
        aux_weight=config.loss.aux_weight,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema,
        may_skip=config.train.may_skip,
    )
    key = jax.random.key(config.seed)
    batches = setup.make_batches(config, data, parallel, key, first)
    # Copies, because a step uses its buffers up and a fresh optimizer shares zeros among its own.
    state = parallel.replicate(jax.jit(lambda state: stacks.stacked(jax.tree.map(jnp.copy, state)))(state))
    if changes:
        show_settings(changes)
    describe(config, workdir, params, training, evaluation, padding, spec, parallel, first)
    step_fn = parallel.compile_train(train_step)
    # Compiled ahead of time, a pmap wants the arrays of all processes at once.
    if first < config.train.steps and (parallel.kind == "jit" or jax.process_count() == 1):
        step_fn = compiled(step_fn, (state, batches.at(first), key), parallel)
    # Of several processes, each evaluates its part of the images by itself.
    local = Parallel(config.parallel, parallel.own_devices)
    predict = local.compile_eval(partial(predict_labels, skeleton, normalise=normalise))
    rates = optim.learning_rates(config.optim, params, steps=config.train.steps)
    meter = Meter(config.train.batch)
    log = Log(workdir, first, evaluated=scores.evaluated == first, active=is_lead())

    def fetched(tree):
        return stacks.apart(parallel.fetch(tree))

    def save(step: int) -> None:
        log.cut(step)
        host = fetched(state)
        record = about | {"step": step, "scores": dataclasses.asdict(scores), "window": window}
        saved.save(step, setup.weights_of(host), setup.training_of(host), record)

    def measure(step: int) -> tuple[dict, dict[int, np.ndarray]]:
        arrays = state.evaluated
        if jax.process_count() > 1:
            arrays = local.replicate(parallel.fetch(arrays))
        predict_now = partial(stop.refuse_when_requested, partial(predict, *arrays))
        batch_size = config.eval.batch // jax.process_count()
        confusion, kept = evaluate(predict_now, data.evaluation, spec, batch_size=batch_size, keep=shown)
        summary = metrics.summarise(confusion)
        if scores.evaluated != step:
            means = {key: summary[key] for key in ("mean_iou", "pixel_accuracy")}
            by_class = dict(zip(spec.label_names, summary["per_class_iou"], strict=True))
            log.write({"step": step, **means, "iou": by_class})
            for number, labels in kept.items():
                log.picture(step, evaluation.names[number], *evaluation[number], labels, spec)
        return summary, kept

    def judged(step: int, summary: dict) -> None:
        """The weights that reached the best mean IoU are kept in best/."""
        nonlocal scores
        score = summary["mean_iou"]
        scores = scores.after(step, score)
        if scores.step == step and config.eval.every and is_lead():
            weights = setup.weights_of(fetched(state))
            orbax_folder.save_weights(workdir / "best", weights, metadata=about | {"step": step, "mean_iou": score})
        if step < config.train.steps:
            progress.say(f"step {step}: mIoU {console.score(score)}{', the best so far' * (scores.step == step)}")

    def read(step: int) -> None:
        """Puts what the last steps gave into `window`. It waits for the device, hence not at every step."""
        if not unread:
            return
        scalars = parallel.scalars(unread)
        unread.clear()
        rows = zip(*(scalars[name].tolist() for name in ("loss", "gradient_norm", "stopped")), strict=True)
        for number, (loss, gradient_norm, stopped) in enumerate(rows, step - len(scalars["loss"])):
            if np.isfinite([loss, gradient_norm]).all():
                window.append([loss, gradient_norm])
                continue
            names = ", ".join(training.names[image] for image in batches.indices(number))
            became = f"the gradient became {gradient_norm}" if np.isfinite(loss) else f"the loss became {loss}"
            what = f"{became} at step {number + 1}, on {names}"
            if stopped:
                stop_before(number, what)
            progress.say(f"{what}: left out")

    def stop_before(step: int, what: str) -> None:
        """The state that the steps since then have left as it was is saved."""
        save(step)
        saved.wait()
        culprit = ""
        if config.debug.nans and jax.process_count() == 1:
            culprit = nan_search.first_not_finite(train_step, fetched(state), batches.at(step), key)
        raise RunError(_not_finite(what, culprit, step, workdir))

    def log_window(step: int) -> float | None:
        """Writes the means since the last call; returns that of the loss."""
        loss, gradient_norm = np.mean(window, axis=0).tolist() if window else (None, None)
        window.clear()
        # A step that is left out does not move the schedule.
        rate = rates(step - 1 - int(parallel.fetch(state.skipped)[0]))
        means = {"loss": loss, "gradient_norm": gradient_norm, **rate}
        log.write({"step": step, **means, "images_per_second": meter.images_per_second, "waiting": meter.waiting})
        return loss

    shown = np.unique(np.linspace(0, len(evaluation) - 1, config.eval.pictures).astype(int)).tolist()
    done, unread = first, []
    with saved, log, batches, StopRequest() as stop, Progress(first, config.train.steps) as progress:
        try:
            if _evaluation_is_due(first, config) and scores.evaluated != first:
                # The run was stopped while it evaluated.
                judged(first, measure(first)[0])
            while done < config.train.steps and not stop.requested and not scores.given_up(config.eval.patience):
                if len(unread) >= AHEAD:
                    jax.block_until_ready(unread[-AHEAD])
                state, scalars = step_fn(state, batches.at(done), key)
                unread.append(scalars)
                done += 1
                is_last = done == config.train.steps
                if done == first + 1:
                    # The first step may wait for data, which is not training.
                    jax.block_until_ready(state)
                    meter.restart(done, batches.waited)
                if done % config.train.log_every == 0 or is_last:
                    read(done)
                    meter.lap(done, batches.waited)
                    progress.show(done, log_window(done), meter)
                    stop.agree()
                if _evaluation_is_due(done, config):
                    read(done)
                    judged(done, measure(done)[0])
                    meter.restart(done, batches.waited)
                if done % config.checkpoint.every == 0 or is_last or scores.given_up(config.eval.patience):
                    read(done)
                    save(done)
                    meter.restart(done, batches.waited)
            if done < config.train.steps and not scores.given_up(config.eval.patience):
                raise StoppedError
            # Whatever happens while evaluating, the training is safe.
            saved.wait()
            if done < config.train.steps:
                console.say(f"stopped early at step {done}: no better mIoU in {scores.worse} evaluations")
            console.say(f"evaluating on {len(evaluation)} images ({config.data.eval_split}) ...")
            log.begin_final(done)
            summary, predicted = measure(done)
            if scores.evaluated != done:
                judged(done, summary)
        except StoppedError:
            read(done)
            save(done)
            saved.wait()
            train_progress.stopped(done, config, workdir)
            return stop.exit_status

    result = stamped(summary) | {
        "step": done,
        "stopped_early": done < config.train.steps,
        "best": {"step": scores.step, "mean_iou": scores.best},
        "images_per_second": meter.images_per_second,
        "config": plain(config),
        "params_sha256": params_sha256(fetched(state.evaluated[0])),
    }
    if is_lead():
        draw(workdir, log, evaluation, spec, predicted)
        # Last, because its presence says that the run is finished.
        atomic.write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    report(result, spec, workdir)
    return 0


# ------------------------------------------------------------------------------------------------------------ pieces


@dataclasses.dataclass(frozen=True)
class Scores:
    """The best evaluation so far, and what stops a run early.

    Attributes:
      best: its mean IoU. step: when it was. worse: evaluations since then.
      evaluated: the step of the last one.
    """

    best: float | None = None
    step: int | None = None
    worse: int = 0
    evaluated: int | None = None

    def after(self, step: int, score: float | None) -> Scores:
        """These and one more; the same where that one is among them."""
        if step == self.evaluated:
            return self
        if score is not None and (self.best is None or score > self.best):
            return Scores(best=score, step=step, evaluated=step)
        return dataclasses.replace(self, worse=self.worse + 1, evaluated=step)

    def given_up(self, patience: int) -> bool:
        """Whether so many evaluations in a row were no better; a patience of 0 never gives up."""
        return 0 < patience <= self.worse


def _evaluation_is_due(step: int, config: ConfigDict) -> bool:
    """The evaluation of the last step is that of the result."""
    every = config.eval.every
    return bool(every) and 0 < step < config.train.steps and step % every == 0


def _not_finite(what: str, culprit: str, step: int, workdir: Path) -> str:
    find = "" if culprit else "\n  to find the layer: --config.debug.nans=True"
    return (
        f"{what}. {culprit}The state before it is saved in {workdir}/checkpoints/{step}.\n"
        "  to go on from there in another place, with a lower rate or clipped gradients:\n"
        f"    --workdir=NEW --config.init.checkpoint={workdir}\n"
        "    --config.optim.lr=... or --config.optim.clip_norm=1.0\n"
        f"  to leave such steps out: --config.train.may_skip=N, at most N in a row{find}"
    )


def _earlier_result(config: ConfigDict, workdir: Path) -> dict | None:
    """What the run in `workdir` has ended with, where it has."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    refuse_newer(result, path)
    refuse_other_run({"config": result["config"]}, {"config": plain(config)}, workdir)
    return result


def _is_finished(result: dict, config: ConfigDict) -> bool:
    gave_up = result["stopped_early"] and result["config"]["eval"] == plain(config)["eval"]
    return result["step"] >= config.train.steps or gave_up


def draw(workdir: Path, log: Log, evaluation: Records, spec: specs.DatasetSpec, predicted: dict) -> None:
    """curve.png, and one picture per prediction."""
    pictures.save_curves(workdir / "curve.png", log.records)
    for number, labels in predicted.items():
        name, (image, truth) = evaluation.names[number], evaluation[number]
        confusion = metrics.confusion_matrix(
            truth, labels, num_classes=spec.num_classes, ignore_label=spec.ignore_label
        )
        title = f"{name}   mIoU of this image {console.score(metrics.summarise(confusion)['mean_iou'])}"
        pictures.save_prediction(workdir / "predictions" / f"{name}.png", image, truth, labels, spec, title=title)
