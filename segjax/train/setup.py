"""Builds a run from its config.

Of the functions here only `build` reads the whole config. Those that make the parts of a run take their own sections:
`config.data`, `config.optim` and so on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from segjax import layers, losses, models
from segjax.checkpoints.files import provenance_at
from segjax.checkpoints.initialize import initialize
from segjax.checkpoints.metadata import IMAGENET, dataset_metadata, licence_of
from segjax.checkpoints.state_dict import model_metadata
from segjax.data import class_weights, pipeline, specs
from segjax.data.augment import AugmentSettings, augment, normalise
from segjax.data.open import OpenSplit, open_splits
from segjax.data.records import Records, records_of
from segjax.inference.engine import predict_labels
from segjax.models.functional import FunctionalModel
from segjax.models.segmentation_model import SegmentationModel
from segjax.models.stacked import Stacks
from segjax.runtime import console
from segjax.runtime.distributed import is_lead
from segjax.runtime.parallel import Parallel, parallel_for
from segjax.train import optim
from segjax.train.config import RunError, check_crop, model_overrides, plain
from segjax.train.evaluator import Evaluator, Scores
from segjax.train.metrics_log import Log
from segjax.train.progress import Meter
from segjax.train.recent_losses import RecentLosses
from segjax.train.resume import Start, resumed
from segjax.train.run import Run
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.state import TrainState
from segjax.train.step import TrainStep

# A compiled step: (state, batch, key) -> (state, scalars).
Program = Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def build(config: ConfigDict, workdir: Path, ended: Mapping | None) -> tuple[Run, TrainState]:
    """Builds a run, and its state on the devices: that of the newest whole checkpoint in `workdir`, or a new one.

    Args:
      ended: what `resume.earlier_result` returned.

    Raises:
      RunError: `workdir` holds a run with other settings, or the crop is larger than every image.
      ValueError: data, weights or checkpoints that cannot be used.
    """
    training, evaluation = load_data(config.data, seed=config.seed)
    spec, images = training.spec, records_of(training.data)
    padding = check_crop(config.augment, images.sizes)
    criterion = make_criterion(config.loss, training)
    parallel = parallel_for(config.parallel)
    checkpoints = RunCheckpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    is_new = not checkpoints.steps()
    module = create_model(config.model, num_classes=spec.num_classes, seed=config.seed)
    if is_new:
        load_initial_weights(module, config.init)
    model = make_functional(module, config.optim, config.train, axis_name=parallel.axis_name)
    optimizer, state = make_optimizer(model, config.optim, config.train)

    metadata = run_metadata(plain(config), model_metadata(module), spec)
    start = resumed(checkpoints, state, metadata, workdir, ended, may_skip=config.train.may_skip)
    if start is None:
        start = Start(0, state, Scores(), [], origin_metadata(config.model.name, config.init))
    metadata |= start.origin
    _refuse_small_images(model, records_of(evaluation.data).sizes)

    train_step = TrainStep(
        model=model,
        optimizer=optimizer,
        augment=partial(augment, settings=config.augment, ignore_label=spec.ignore_label),
        criterion=criterion,
        aux_weight=config.loss.aux_weight,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema,
        may_skip=config.train.may_skip,
    )
    key = jax.random.key(config.seed)
    batches = make_batches(
        training.data,
        config.augment,
        batch_size=config.train.batch,
        seed=config.seed,
        parallel=parallel,
        key=key,
        start=start.step,
        cache_gb=config.data.cache_gb,
    )
    log = Log(workdir, start.step, evaluated=start.scores.evaluated == start.step, active=is_lead())
    evaluator = Evaluator(
        config.eval,
        model,
        evaluation.data,
        spec,
        parallel=parallel,
        steps=config.train.steps,
        log=log,
        best=workdir / "best",
        metadata=metadata,
        scores=start.scores,
    )
    steps = summary_of_steps(config.train, config.augment, config.optim, padding=padding)
    run = Run(
        workdir=workdir,
        first=start.step,
        steps=config.train.steps,
        log_every=config.train.log_every,
        save_every=config.checkpoint.every,
        search_nans=config.debug.nans,
        spec=spec,
        evaluation=records_of(evaluation.data),
        eval_split=config.data.eval_split,
        parallel=parallel,
        model=model,
        train_step=train_step,
        key=key,
        batches=batches,
        checkpoints=checkpoints,
        log=log,
        recent=RecentLosses(parallel, partial(_image_names, batches, images), start.window),
        evaluator=evaluator,
        meter=Meter(config.train.batch),
        rates=optim.learning_rates(config.optim, model.arrays()[0], steps=config.train.steps),
        metadata=metadata,
        summary=summary(
            workdir, training, evaluation, model, parallel, dtype=config.model.dtype, data=config.data, steps=steps
        ),
    )
    return run, _on_devices(start.state, model, parallel)


def summary(
    workdir: Path,
    training: OpenSplit,
    evaluation: OpenSplit,
    model: FunctionalModel,
    parallel: Parallel,
    *,
    dtype: str,
    data: ConfigDict,
    steps: str,
) -> dict[str, str]:
    """A line of text for each part of a run, by label.

    Args:
      dtype: `config.model.dtype`. data: `config.data`.
      steps: what `summary_of_steps` returned.
    """
    count, devices = sum(array.size for array in model.arrays()[0].values()), parallel.devices
    of = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return {
        "model": f"{model.spec.name}, {count:,} parameters, computes in {dtype}",
        "data": f"{training.spec.name}, {training.spec.num_classes} classes",
        "images": f"{len(records_of(training.data))} to train on ({data.train_split}), "
        f"{len(records_of(evaluation.data))} to evaluate ({data.eval_split})",
        "steps": steps,
        "device": f"{len(devices)} x {devices[0].device_kind}{of}, {parallel.kind}",
        "workdir": f"{workdir}",
    }


def summary_of_steps(training: ConfigDict, augmentation: ConfigDict, optimizer: ConfigDict, *, padding: float) -> str:
    """The steps of a run in words, from `config.train`, `config.augment` and `config.optim`.

    Args:
      padding: share of the pixels of crops that no image covers.
    """
    height, width = augmentation.crop
    padded = f" ({padding:.0%} padding)" if padding >= 0.005 else ""
    return f"{training.steps} of {training.batch} crops of {height}x{width}{padded}, {optimizer.name}"


# ---------------------------------------------------------------------------------------------------------------- data


def load_data(settings: ConfigDict, *, seed: int) -> tuple[OpenSplit, OpenSplit]:
    """The training and the evaluation split of `config.data`; those that fit into `resident_gb` are read into memory.

    Raises:
      ValueError: data that cannot be used, or a split without published labels.
    """
    generated: dict[str, Any] = {}
    if specs.is_generated(settings.name):
        numbers = (settings.train_images, settings.eval_images)
        generated = dict(num_images=numbers, size=tuple(settings.size), seed=seed)
    training, evaluation = open_splits(
        settings.name,
        (settings.train_split, settings.eval_split),
        source=settings.source,
        data_dir=settings.dir,
        resident_gb=settings.resident_gb,
        say=console.say,
        **generated,
    )
    return training, evaluation


def make_batches(
    split: specs.Split | Records,
    augmentation: AugmentSettings,
    *,
    batch_size: int,
    seed: int,
    parallel: Parallel,
    key: jax.Array,
    start: int,
    cache_gb: float,
) -> pipeline.TrainBatches | pipeline.StreamBatches:
    """Training batches: from the memory of the devices where the split is in memory, streamed otherwise.

    Args:
      augmentation: `config.augment`.
      key: key of the run. start: the first step to ask for.
      cache_gb: gigabytes of decoded images that a stream keeps in memory.
    """
    if isinstance(split, specs.Split):
        return pipeline.TrainBatches(split, batch_size=batch_size, seed=seed, parallel=parallel)
    return pipeline.StreamBatches(
        split,
        batch_size=batch_size,
        seed=seed,
        parallel=parallel,
        settings=augmentation,
        key=key,
        start=start,
        cache_bytes=1e9 * cache_gb,
    )


def _image_names(batches: pipeline.TrainBatches | pipeline.StreamBatches, images: Records, step: int) -> list[str]:
    """The names of the images in the batch of a step."""
    numbers: list[int] = batches.indices(step).tolist()
    return [images.names[number] for number in numbers]


# ------------------------------------------------------------------------------------------------- model, loss and step


def create_model(settings: ConfigDict, *, num_classes: int, seed: int) -> SegmentationModel:
    """The model of `config.model` with random weights."""
    overrides, dtype = model_overrides(settings), jnp.dtype(settings.dtype)
    return models.create(settings.name, num_classes=num_classes, seed=seed, dtype=dtype, **overrides)


def load_initial_weights(module: SegmentationModel, settings: ConfigDict) -> None:
    """Fills a model from the checkpoint that `config.init` names, if any."""
    if settings.checkpoint:
        console.say(f"initial weights from {settings.checkpoint}")
        with console.log_to(console.say):
            initialize(module, settings.checkpoint, keep=settings.keep)


def make_functional(
    module: SegmentationModel, optimizer: ConfigDict, training: ConfigDict, *, axis_name: str | None
) -> FunctionalModel:
    """The functional model that a training step calls.

    Args:
      optimizer: `config.optim`, which names the frozen parameters.
      training: `config.train`, which selects how equal blocks run.
      axis_name: `Parallel.axis_name`.
    """
    module.set_attributes(axis_name=axis_name, raise_if_not_found=False)
    params = FunctionalModel(module).arrays()[0]
    execution = layers.BlockExecution.of(scan_blocks=training.scan_blocks, remat=training.remat)
    return FunctionalModel(
        module,
        frozen=optim.frozen_names(optimizer.frozen, params),
        execution=execution,
        stacks=Stacks.of(params, shortest=execution.scan_from, alike=optim.rules(optimizer, params)),
    )


def make_criterion(settings: ConfigDict, training: OpenSplit) -> losses.Criterion:
    """The loss of `config.loss`, with class weights that may depend on the training split."""
    choice, spec = settings.class_weights, training.spec
    counts = training.pixel_counts() if choice == "median_frequency" else None
    return losses.criterion(
        settings,
        num_classes=spec.num_classes,
        ignore_label=spec.ignore_label,
        class_weights=class_weights.class_weights(choice, spec, counts),
    )


def make_optimizer(
    model: FunctionalModel, settings: ConfigDict, training: ConfigDict
) -> tuple[optax.GradientTransformationExtraArgs, TrainState]:
    """The optimizer of `config.optim`, and the state before the first step; `training` is `config.train`."""
    params, batch_stats = model.arrays()
    optimizer = optim.optimizer(settings, params, steps=training.steps, stacks=model.stacks)
    # Compiled as one program; otherwise every shape of the model would compile one of its own.
    opt_state = jax.jit(optimizer.init)(model.trained(params))
    return optimizer, TrainState.start(params, batch_stats, opt_state, ema=training.ema > 0)


def compile_step(run: Run, state: TrainState) -> Program:
    """The training step as a program for `run.parallel`, compiled now where that is possible.

    Raises:
      RunError: a step needs more memory than a device has.
    """
    program = run.parallel.compile_train(run.train_step)
    if run.first < run.steps and run.parallel.compiles_ahead:
        return _compiled(program, (state, run.batches.at(run.first), run.key), run.parallel)
    return program


def _compiled(program: Program, arguments: tuple, parallel: Parallel) -> Program:
    """Compiles a step, and prints the time that took and the memory that a step needs."""
    since = time.perf_counter()
    compiled: jax.stages.Compiled = program.lower(*arguments).compile()
    seconds = time.perf_counter() - since
    analysis = compiled.memory_analysis()
    if analysis is None:
        console.say(f"compiled in {seconds:.1f} s")
        return compiled
    # Donated arguments are also counted among the outputs, as aliases.
    needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    needed += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    available = (parallel.own_devices[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {console.amount(available)}" if available else ""
    console.say(f"compiled in {seconds:.1f} s; a step needs {console.amount(needed)}{of} on each device")
    if available and needed > available:
        raise RunError(
            f"a step needs {console.amount(needed)}, the device has {console.amount(available)}. These need less:\n"
            "  --config.train.accumulate=2 (the same batch in two parts)\n"
            "  --config.train.remat=True\n"
            "  --config.model.dtype=bfloat16\n"
            "  or a smaller batch or crop"
        )
    return compiled


def _on_devices(state: TrainState, model: FunctionalModel, parallel: Parallel) -> TrainState:
    # Copied, because a step donates its buffers, and a new optimizer state uses one buffer of zeros several times.
    copied = jax.jit(lambda state: model.stacks.stacked(jax.tree.map(jnp.copy, state)))
    return parallel.replicate(copied(state))


def _refuse_small_images(model: FunctionalModel, sizes: np.ndarray) -> None:
    """Raises ValueError where an image is too small for the model, before the training rather than after it."""
    height, width = min(sizes.tolist(), key=min)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    jax.eval_shape(partial(predict_labels, model, normalise=normalise), *model.arrays(), image)


# ------------------------------------------------------------------------------------------------------------ metadata


def run_metadata(config: Mapping[str, Any], model: Mapping[str, Any], spec: specs.DatasetSpec) -> dict[str, Any]:
    """Metadata that every checkpoint of a run has.

    Args:
      config: all settings, as `config.plain` returns them.
      model: what `state_dict.model_metadata` returned.
    """
    return {
        "model": model,
        "config": config,
        "dataset": dataset_metadata(spec),
        "normalisation": IMAGENET,
        "input_size": config["augment"]["crop"],
    }


def origin_metadata(model_name: str, settings: ConfigDict) -> dict[str, object]:
    """Metadata about where the weights of a new run come from; `settings` is `config.init`."""
    if not settings.checkpoint:
        return {
            "licence": "trained from random weights; the terms of its data hold",
            "provenance": {"initial_weights": None},
        }
    return {"licence": licence_of(model_name), "provenance": {"initial_weights": provenance_at(settings.checkpoint)}}
