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
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from segjax import checkpoint, console, debug, metrics, optim, parts, pictures
from segjax.data import specs
from segjax.data.augment import augment, normalise
from segjax.data.pipeline import TrainBatches
from segjax.evaluate import evaluate
from segjax.log import Log
from segjax.settings import RunError, check, plain, refuse_other_run
from segjax.state import TrainState, params_sha256
from segjax.step import Parallel, TrainStep, eval_step

# What a shell reports for a program that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM.
BY_SIGNAL = 128
INTERRUPTED = BY_SIGNAL + signal.SIGINT


def default_workdir(config: ConfigDict) -> Path:
    """runs/<label>-<dataset>, for example runs/segformer-b0-streets."""
    return Path("runs") / f"{config.label}-{config.data.name}"


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains, or goes on training, and leaves everything in `workdir`.

    Writes checkpoints/, best/, metrics.jsonl and tensorboard/, and at the end result.json, curve.png and predictions/.

    Returns:
      Exit status: 0, or 130 or 143 where Ctrl-C or SIGTERM stopped the run after a save.

    Raises:
      RunError: settings that contradict one another or the run in `workdir`; a loss that is not finite.
      ValueError: data, weights or checkpoints that cannot be used.
    """
    check(config, workdir)
    if finished := _finished_result(config, workdir):
        console.already_finished(finished, config, workdir)
        return 0

    training, evaluation, spec = parts.load_data(config)
    parallel = Parallel(config.parallel)
    saved = checkpoint.RunCheckpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    skeleton = parts.make_skeleton(config, spec.num_classes, parallel, pretrained=not saved.steps())
    params, batch_stats = skeleton.arrays()
    trained = skeleton.trained(params)
    optimizer = optim.optimizer(config.optim, params, steps=config.train.steps)
    state = TrainState.start(params, batch_stats, optimizer.init(trained), ema=config.train.ema > 0)

    about = {
        "model": parts.model_record(config, spec),
        "config": plain(config),
        "dataset": parts.dataset_record(spec),
    }
    found = saved.restore(
        parts.weights_of(state),
        parts.training_of(state),
        refuse=lambda before: refuse_other_run(before, about, workdir),
        say=console.say,
    )
    first, scores = 0, Scores()
    if found:
        first, scores = found.step, Scores(**found.about["scores"])
        state = parts.restored(found, state, may_skip=config.train.may_skip)

    # An image too small for the model must not be found out after the training.
    height, width = min(evaluation.sizes.tolist(), key=min)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    jax.eval_shape(partial(eval_step, skeleton, normalise), params, batch_stats, image)

    batches = TrainBatches(training, batch_size=config.train.batch, seed=config.seed, parallel=parallel)
    train_step = TrainStep(
        skeleton=skeleton,
        optimizer=optimizer,
        augment=partial(augment, settings=config.augment, ignore_label=spec.ignore_label),
        criterion=parts.make_criterion(config, spec, training),
        aux_weight=config.loss.aux_weight,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema,
        may_skip=config.train.may_skip,
    )
    key = jax.random.key(config.seed)
    # Copies, because a step uses its buffers up and a fresh optimizer shares zeros among its own.
    state = parallel.replicate(jax.tree.map(jnp.copy, state))
    console.describe(config, workdir, params, training, evaluation, spec, parallel, first)
    step_fn = parallel.compile_train(train_step)
    if first < config.train.steps:
        step_fn = console.compiled(step_fn, (state, batches.at(first), key), parallel)
    predict = parallel.compile_eval(partial(eval_step, skeleton, normalise))
    rates = optim.learning_rates(config.optim, params, steps=config.train.steps)
    meter = console.Meter(config.train.batch)
    log = Log(workdir, first, finished=first >= config.train.steps)

    def save(step: int) -> None:
        log.cut(step)
        host = parallel.fetch(state)
        record = about | {"scores": dataclasses.asdict(scores)}
        saved.save(step, parts.weights_of(host), parts.training_of(host), record)

    def measure(step: int) -> tuple[dict, dict[int, np.ndarray]]:
        predict_now = partial(stop.refuse_when_requested, partial(predict, *state.evaluated))
        confusion, kept = evaluate(predict_now, evaluation, spec, batch_size=config.eval.batch, keep=shown)
        summary = metrics.summarise(confusion)
        by_class = dict(zip(spec.label_names, summary["per_class_iou"], strict=True))
        log.write({"step": step} | {key: summary[key] for key in ("mean_iou", "pixel_accuracy")} | {"iou": by_class})
        for number, labels in kept.items():
            log.picture(step, *_sample(evaluation, number), labels, spec)
        return summary, kept

    def read(step: int) -> dict[str, float | None]:
        """Means over the steps since the last call. It waits for the device, hence not at every step."""
        if not unread:
            return {}
        scalars = parallel.scalars(unread)
        unread.clear()
        if len(stopped := np.flatnonzero(scalars["stopped"])):
            bad = step - len(scalars["stopped"]) + int(stopped[0])
            names = [training.names[number] for number in batches.indices(bad)]
            host = parallel.fetch(state)
            culprit = debug.first_not_finite(train_step, host, batches.at(bad), key) if config.debug.nans else ""
            save(bad)
            saved.close()
            raise RunError(_not_finite(scalars["loss"][stopped[0]], bad, names, culprit, workdir))
        finite = np.isfinite(scalars["loss"]) & np.isfinite(scalars["gradient_norm"])
        for index in np.flatnonzero(~finite):
            names = ", ".join(training.names[number] for number in batches.indices(step - len(finite) + index))
            progress.say(f"step {step - len(finite) + index + 1} left out: loss {scalars['loss'][index]} on {names}")
        # A step that is left out does not move the schedule.
        rate = rates(step - 1 - int(parallel.fetch(state.skipped)[0]))
        if not finite.any():
            return {"loss": None, "gradient_norm": None, **rate}
        return {name: float(np.mean(scalars[name][finite])) for name in ("loss", "gradient_norm")} | rate

    shown = np.unique(np.linspace(0, len(evaluation.images) - 1, config.eval.pictures).astype(int)).tolist()
    done, unread = first, []
    with log, console.StopRequest() as stop, console.Progress(first, config.train.steps) as progress:
        try:
            if _evaluation_is_due(first, config) and log.evaluated(first) is None:
                # The run was stopped while it evaluated.
                scores = scores.after(first, measure(first)[0]["mean_iou"])
            while done < config.train.steps and not stop.requested and not scores.given_up(config.eval.patience):
                state, scalars = step_fn(state, batches.at(done), key)
                unread.append(scalars)
                done += 1
                is_last = done == config.train.steps
                if done == first + 1:
                    # The first step may wait for data, which is not training.
                    jax.block_until_ready(state)
                    meter.restart(done)
                if done % config.train.log_every == 0 or is_last:
                    values = read(done)
                    meter.lap(done)
                    log.write({"step": done, **values, "images_per_second": meter.images_per_second})
                    progress.show(done, values["loss"], meter)
                if _evaluation_is_due(done, config):
                    read(done)
                    score = measure(done)[0]["mean_iou"]
                    scores = scores.after(done, score)
                    progress.say(
                        f"step {done}: mIoU {console.score(score)}{', the best so far' * (scores.step == done)}"
                    )
                    if scores.step == done:
                        weights = parts.weights_of(parallel.fetch(state))
                        record = about | {"step": done, "mean_iou": score}
                        checkpoint.save_weights(workdir / "best", weights, about=record)
                    meter.restart(done)
                if done % config.checkpoint.every == 0 or is_last or scores.given_up(config.eval.patience):
                    read(done)
                    save(done)
                    meter.restart(done)
            if done < config.train.steps and not scores.given_up(config.eval.patience):
                raise console.StoppedError
            # Whatever happens while evaluating, the training is safe.
            saved.wait()
            console.say(f"evaluating on {len(evaluation.images)} images ({config.data.eval_split}) ...")
            log.begin_final(done)
            summary, predicted = measure(done)
        except console.StoppedError:
            read(done)
            save(done)
            saved.close()
            console.stopped(done, config, workdir)
            return BY_SIGNAL + stop.signal

    result = summary | {
        "step": done,
        "stopped_early": done < config.train.steps,
        "best": scores.after(done, summary["mean_iou"]).best,
        "images_per_second": meter.images_per_second,
        "config": plain(config),
        "params_sha256": params_sha256(parallel.fetch(state.evaluated[0])),
    }
    saved.close()
    draw(workdir, log, evaluation, spec, predicted)
    # Last, because its presence says that the run is finished.
    checkpoint.write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    console.report(result, spec, workdir)
    return 0


# ------------------------------------------------------------------------------------------------------------ pieces


@dataclasses.dataclass(frozen=True)
class Scores:
    """The best evaluation so far, and what stops a run early.

    Attributes:
      best: its mean IoU. step: when it was. worse: evaluations since then.
    """

    best: float | None = None
    step: int | None = None
    worse: int = 0

    def after(self, step: int, score: float | None) -> Scores:
        if score is not None and (self.best is None or score > self.best):
            return Scores(score, step, 0)
        return dataclasses.replace(self, worse=self.worse + 1)

    def given_up(self, patience: int) -> bool:
        """Whether so many evaluations in a row were no better; a patience of 0 never gives up."""
        return 0 < patience <= self.worse


def _evaluation_is_due(step: int, config: ConfigDict) -> bool:
    """The evaluation of the last step is that of the result."""
    every = config.eval.every
    return bool(every) and 0 < step < config.train.steps and step % every == 0


def _sample(split: specs.Split, number: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Name, image and label without their padding."""
    height, width = split.sizes[number]
    return split.names[number], split.images[number, :height, :width], split.labels[number, :height, :width]


def _not_finite(loss: float, step: int, names: list[str], culprit: str, workdir: Path) -> str:
    return (
        f"the loss became {loss} at step {step + 1}, on {', '.join(names)}. {culprit}"
        f"The state before it is saved in {workdir}/checkpoints/{step}.\n"
        "  to go on from there with another rate, in another place:\n"
        f"    --workdir NEW --config.init.checkpoint={workdir} --config.optim.lr=..."
        " (or --config.optim.clip_norm=1.0)\n"
        "  to leave such steps out: --config.train.may_skip=N, at most N in a row\n"
        "  to find the layer: --config.debug.nans=True"
    )


def _finished_result(config: ConfigDict, workdir: Path) -> dict | None:
    """The result in `workdir` where nothing is left to do."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    gave_up = result["stopped_early"] and result["config"]["eval"] == plain(config)["eval"]
    if result["step"] < config.train.steps and not gave_up:
        return None
    refuse_other_run({"config": result["config"]}, {"config": plain(config)}, workdir)
    return result


def draw(workdir: Path, log: Log, split: specs.Split, spec: specs.DatasetSpec, predicted: dict) -> None:
    """curve.png, and one picture per prediction."""
    pictures.save_curves(workdir / "curve.png", log.records)
    for number, labels in predicted.items():
        name, image, truth = _sample(split, number)
        confusion = metrics.confusion_matrix(
            truth, labels, num_classes=spec.num_classes, ignore_label=spec.ignore_label
        )
        title = f"{name}   mIoU of this image {console.score(metrics.summarise(confusion)['mean_iou'])}"
        pictures.save_prediction(workdir / "predictions" / f"{name}.png", image, truth, labels, spec, title=title)
