"""The one loop over training steps: read `train` top to bottom.

Order of a start: check the settings, load data, make the model, take up the newest checkpoint if there is one, then
step, log, save and evaluate until the last step, then evaluate and write the result. A batch and all random numbers
follow from (seed, step) alone, so that a run that was stopped goes on exactly as if it had not been.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from segjax import checkpoint, console, metrics, models, optim, pictures
from segjax.data import specs
from segjax.data.augment import augment, normalise
from segjax.data.pipeline import TrainBatches
from segjax.evaluate import evaluate
from segjax.state import Skeleton, TrainState, params_sha256
from segjax.step import Parallel, eval_step, train_step

# Settings that may differ when a run is taken up again: none of them changes what was computed so far.
FREE_ON_RESUME = ("train.steps", "train.log_every", "eval.", "checkpoint.", "data.source", "data.dir", "parallel")
# What a shell reports for a program that Ctrl-C has ended.
INTERRUPTED = 130


class RunError(ValueError):
    """A run that cannot go on as asked; the message says why and what to do."""


def default_workdir(config: ConfigDict) -> Path:
    """runs/<label>-<dataset>, for example runs/segformer-b0-streets."""
    return Path("runs") / f"{config.label}-{config.data.name}"


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains, or goes on training, and leaves everything in `workdir`.

    Writes checkpoints/ and metrics.jsonl, and at the end result.json, curve.png and predictions/.

    Returns:
      Exit status: 0, or 130 where Ctrl-C stopped the run after a save.

    Raises:
      RunError: settings that contradict one another or the run in `workdir`; a loss that is not finite.
      ValueError: data that cannot be used.
    """
    check(config)
    if finished := _finished_result(config, workdir):
        console.already_finished(finished, config, workdir)
        return 0

    training, evaluation, spec = load_data(config)
    parallel = Parallel(config.parallel)
    skeleton = make_skeleton(config, spec.num_classes, parallel)
    params, batch_stats = skeleton.arrays()
    optimizer = optim.optimizer(config.optim, params, steps=config.train.steps)
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))

    about = {"model": models_record(config, spec), "config": plain(config), "dataset": dataset_record(spec)}
    saved = checkpoint.RunCheckpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    start = saved.newest() or 0
    if start:
        refuse_other_run(saved.read_about(start), about, workdir)
        state = restored(saved, start, state)
    console.describe(config, workdir, params, training, evaluation, spec, parallel, start)

    # An image too small for the model must not be found out after the training.
    height, width = min(evaluation.sizes.tolist(), key=min)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    jax.eval_shape(partial(eval_step, skeleton, normalise), params, batch_stats, image)

    batches = TrainBatches(training, batch_size=config.train.batch, seed=config.seed, parallel=parallel)
    augmentation = partial(augment, settings=config.augment, ignore_label=spec.ignore_label)
    step_fn = parallel.compile_train(
        partial(train_step, skeleton, optimizer, augmentation, spec.ignore_label, config.train.aux_weight)
    )
    predict = parallel.compile_eval(partial(eval_step, skeleton, normalise))
    key = jax.random.key(config.seed)
    # Copies, because a step uses its buffers up and a fresh optimizer shares zeros among its own.
    state = parallel.replicate(jax.tree.map(jnp.copy, state))
    log = MetricsLog(workdir / "metrics.jsonl", start, finished=start >= config.train.steps)
    schedule = optim.schedule(config.optim, steps=config.train.steps)
    meter = console.Meter(config.train.batch)

    def save(step: int) -> None:
        refuse_not_finite(losses, step)
        host = parallel.fetch(state)
        saved.save(step, host.params | host.batch_stats, flat_training(host), about)

    def measure(step: int, keep=()) -> tuple[dict, dict[int, np.ndarray]]:
        predict_now = partial(predict, state.params, state.batch_stats)
        confusion, kept = evaluate(predict_now, evaluation, spec, batch_size=config.eval.batch, keep=keep)
        summary = metrics.summarise(confusion)
        log.write({"step": step, "mean_iou": summary["mean_iou"], "pixel_accuracy": summary["pixel_accuracy"]})
        return summary, kept

    done, losses = start, []
    with console.StopRequest() as stop, console.Progress(start, config.train.steps) as progress:
        while done < config.train.steps and not stop.requested:
            state, scalars = step_fn(state, batches.at(done), key)
            losses.append(scalars["loss"])
            done += 1
            if done == start + 1:
                # The first step waits for the compiler, which is not training.
                jax.block_until_ready(state)
                meter.restart(done)
            if done % config.train.log_every == 0 or done == config.train.steps:
                # Reading a value waits for the device, hence once in log_every steps.
                loss = refuse_not_finite(losses, done)
                losses.clear()
                meter.lap(done)
                rate = float(schedule(done - 1))
                log.write({"step": done, "loss": loss, "lr": rate, "images_per_second": meter.images_per_second})
                progress.show(done, loss, meter)
            if done % config.checkpoint.every == 0 or done == config.train.steps:
                save(done)
                meter.restart(done)
            if config.eval.every and done % config.eval.every == 0 and done < config.train.steps:
                progress.say(f"step {done}: mIoU {console.score(measure(done)[0]['mean_iou'])}")
                meter.restart(done)
    if stop.requested and done < config.train.steps:
        # Here and not in the loop: the request may have come at any line of it.
        save(done)
        saved.close()
        console.stopped(done, config, workdir)
        return INTERRUPTED
    # Whatever happens while evaluating, the training is safe.
    saved.wait()

    console.say(f"evaluating on {len(evaluation.images)} images ({config.data.eval_split}) ...")
    shown = np.unique(np.linspace(0, len(evaluation.images) - 1, config.eval.pictures).astype(int)).tolist()
    summary, predicted = measure(done, keep=shown)
    result = summary | {
        "step": done,
        "images_per_second": meter.images_per_second,
        "config": plain(config),
        "params_sha256": params_sha256(parallel.fetch(state).params),
    }
    saved.close()
    draw(workdir, log, evaluation, spec, predicted)
    # Last, because its presence says that the run is finished.
    checkpoint.write_text(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    console.report(result, spec, workdir)
    return 0


# ------------------------------------------------------------------------------------------------------------ pieces


def check(config: ConfigDict) -> None:
    """Everything that is wrong with the settings, in one error, before anything slow happens."""
    devices = jax.device_count()
    crop, scale = config.augment.crop, config.augment.scale
    wrong = {
        f"model.name: no model {config.model.name!r}": config.model.name not in models.MODELS,
        f"model.dtype is 'float32' or 'bfloat16', not {config.model.dtype!r}": (
            config.model.dtype not in ("float32", "bfloat16")
        ),
        f"parallel is 'jit' or 'pmap', not {config.parallel!r}": config.parallel not in ("jit", "pmap"),
        f"optim.name is 'adamw' or 'sgd', not {config.optim.name!r}": config.optim.name not in ("adamw", "sgd"),
        f"train.batch={config.train.batch} does not divide among {devices} devices": (
            config.train.batch < 1 or config.train.batch % devices
        ),
        f"eval.batch={config.eval.batch} does not divide among {devices} devices": (
            config.eval.batch < 1 or config.eval.batch % devices
        ),
        f"augment.crop is (height, width), at least 32 each, not {tuple(crop)}": (
            len(crop) != 2 or not all(isinstance(side, int) and side >= 32 for side in crop)
        ),
        f"augment.scale is (smallest, largest), not {tuple(scale)}": len(scale) != 2 or not 0 < scale[0] <= scale[1],
        f"optim.no_decay is no regular expression: {config.optim.no_decay}": not _is_pattern(config.optim.no_decay),
        f"optim.head is no regular expression: {config.optim.head}": not _is_pattern(config.optim.head),
        f"augment.flip is a probability, not {config.augment.flip}": not 0 <= config.augment.flip <= 1,
        f"optim.warmup_steps must not be negative: {config.optim.warmup_steps}": config.optim.warmup_steps < 0,
        f"eval.every must not be negative: {config.eval.every}": config.eval.every < 0,
        f"eval.pictures must not be negative: {config.eval.pictures}": config.eval.pictures < 0,
        f"train.steps must not be negative: {config.train.steps}": config.train.steps < 0,
        f"train.log_every must be at least 1: {config.train.log_every}": config.train.log_every < 1,
        f"checkpoint.every must be at least 1: {config.checkpoint.every}": config.checkpoint.every < 1,
        f"checkpoint.keep must be at least 1: {config.checkpoint.keep}": config.checkpoint.keep < 1,
    }
    if problems := [message for message, is_wrong in wrong.items() if is_wrong]:
        raise RunError("the settings cannot be used:\n" + "\n".join(f"  config.{line}" for line in problems))


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def load_data(config: ConfigDict) -> tuple[specs.Split, specs.Split, specs.DatasetSpec]:
    """Training split, evaluation split, and what the dataset is."""
    if config.data.name == "streets":
        from segjax.data import streets

        size, seed = tuple(config.data.size), config.seed
        console.say(f"drawing {config.data.train_images + config.data.eval_images} street scenes ...")
        training = streets.load(config.data.train_split, num_images=config.data.train_images, size=size, seed=seed)
        evaluation = streets.load(config.data.eval_split, num_images=config.data.eval_images, size=size, seed=seed)
        return training, evaluation, specs.STREETS
    from segjax.data import builders

    prepared = builders.prepare(config.data.name, source=config.data.source, data_dir=config.data.dir)
    return prepared.load(config.data.train_split), prepared.load(config.data.eval_split), prepared.spec


def make_skeleton(config: ConfigDict, num_classes: int, parallel: Parallel) -> Skeleton:
    model = models.create(
        config.model.name,
        num_classes=num_classes,
        seed=config.seed,
        dtype=jnp.dtype(config.model.dtype),
        **_overrides(config),
    )
    model.set_attributes(axis_name=parallel.axis_name, raise_if_not_found=False)
    return Skeleton(model)


def _overrides(config: ConfigDict) -> dict[str, object]:
    return {key: value for key, value in config.model.items() if key not in ("name", "dtype")}


def models_record(config: ConfigDict, spec: specs.DatasetSpec) -> dict[str, object]:
    """How to build the model again, as `checkpoint.load_model` reads it."""
    return {
        "name": config.model.name,
        "num_classes": spec.num_classes,
        "overrides": _overrides(config),
        "param_dtype": "float32",
    }


def dataset_record(spec: specs.DatasetSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "class_names": list(spec.class_names),
        "colors": [list(color) for color in spec.colors],
        "ignore_label": spec.ignore_label,
    }


def refuse_not_finite(losses: list, step: int) -> float | None:
    """Mean of the losses since the last log line, None where there are none; RunError where one is not finite."""
    if not losses:
        return None
    loss = float(np.mean([np.ravel(value)[0] for value in jax.device_get(losses)]))
    if not math.isfinite(loss):
        raise RunError(
            f"the loss became {loss} before step {step}; nothing of it was saved. Try a lower config.optim.lr, "
            "in another --workdir"
        )
    return loss


def plain(config: ConfigDict) -> dict[str, object]:
    """The config as JSON has it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def refuse_other_run(before: dict, now: dict, workdir: Path) -> None:
    """Raises RunError where the run in `workdir` was made with settings or data that cannot be mixed with these."""
    old, new = (_flat({part: about[part] for part in ("config", "dataset")}) for about in (before, now))
    differing = [
        f"  {key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.removeprefix("config.").startswith(FREE_ON_RESUME)
    ]
    if differing:
        raise RunError(
            f"{workdir} holds a run with other settings:\n"
            + "\n".join(differing)
            + "\n  give those settings again to go on with it, or another --workdir to start anew"
        )


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _finished_result(config: ConfigDict, workdir: Path) -> dict | None:
    """The result in `workdir` where it already reaches the steps asked for."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["step"] < config.train.steps:
        return None
    refuse_other_run({"config": result["config"], "dataset": {}}, {"config": plain(config), "dataset": {}}, workdir)
    return result


def flat_training(state: TrainState) -> dict[str, np.ndarray]:
    """What a checkpoint holds besides the weights, by name."""
    leaves = jax.tree_util.tree_leaves_with_path({"step": state.step, "optimizer": state.opt_state})
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def restored(saved: checkpoint.RunCheckpoints, step: int, state: TrainState) -> TrainState:
    """The state of a checkpoint, in the structure of `state`."""
    weights, training = saved.restore(step, state.params | state.batch_stats, flat_training(state))
    names = list(flat_training(state))
    structure = jax.tree.structure({"step": state.step, "optimizer": state.opt_state})
    rest = jax.tree.unflatten(structure, [training[name] for name in names])
    return TrainState(
        step=rest["step"],
        params={name: weights[name] for name in state.params},
        batch_stats={name: weights[name] for name in state.batch_stats},
        opt_state=rest["optimizer"],
    )


def draw(workdir: Path, log: MetricsLog, split: specs.Split, spec: specs.DatasetSpec, predicted: dict) -> None:
    """curve.png, and one picture per prediction."""
    pictures.save_curves(workdir / "curve.png", log.records)
    for number, labels in predicted.items():
        height, width = labels.shape
        image, truth = split.images[number, :height, :width], split.labels[number, :height, :width]
        name = split.names[number]
        confusion = metrics.confusion_matrix(
            truth, labels, num_classes=spec.num_classes, ignore_label=spec.ignore_label
        )
        title = f"{name}   mIoU of this image {console.score(metrics.summarise(confusion)['mean_iou'])}"
        pictures.save_prediction(workdir / "predictions" / f"{name}.png", image, truth, labels, spec, title=title)


class MetricsLog:
    """metrics.jsonl: one record per line; on resuming, records of steps that will be made again are dropped."""

    def __init__(self, path: Path, start: int, *, finished: bool):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        records = [record for record in map(_parsed, lines) if record and record["step"] <= start]
        # Where no step is left to do, what is made again is the evaluation of the last one.
        redone = start if finished else None
        self.records = [record for record in records if "mean_iou" not in record or record["step"] != redone]
        checkpoint.write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def write(self, record: dict) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _parsed(line: str) -> dict | None:
    # The last line may be cut where the machine stopped.
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
