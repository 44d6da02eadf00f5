"""Builds a run from its config.

`build` reads the whole config. Most functions that make a part of the run receive only their sections, such as
`config.data` or `config.optim`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from segjax import layers, losses, models
from segjax.checkpoints.checkpoint import Checkpoint, shorten
from segjax.checkpoints.metadata import IMAGENET, dataset_metadata
from segjax.checkpoints.state_dict import model_metadata
from segjax.data import class_weights, hooks, mixing, pipeline, specs
from segjax.data.augment import augment, normalise
from segjax.data.crops import AugmentSettings
from segjax.data.open import OpenSplit, open_splits, shared_splits
from segjax.data.records import Records, records_of
from segjax.inference.engine import Protocol, predict_labels
from segjax.models.functional import FunctionalModel
from segjax.models.lora import NO_ADAPTERS, Adapters
from segjax.models.segmentation_model import SegmentationModel
from segjax.models.stacked import NO_STACKS, stacks_for
from segjax.runtime import console, memory
from segjax.runtime.distributed import from_lead, is_lead
from segjax.runtime.parallel import Parallel, parallel_for
from segjax.train import lora, optim
from segjax.train.config import RunError, check_crop, model_overrides, plain
from segjax.train.distillation import load_teacher
from segjax.train.evaluator import Evaluator, Scores
from segjax.train.metrics_log import Log
from segjax.train.progress import Meter
from segjax.train.recent_losses import RecentLosses
from segjax.train.resume import Start, data_of, keep_data, resumed
from segjax.train.run import Run
from segjax.train.run_checkpoints import RunCheckpoints
from segjax.train.start import load_initial_weights, origin_metadata, resumed_from
from segjax.train.state import TrainState
from segjax.train.step import TrainStep

WARNING_COLUMNS = 80 - len("warning: ")

# A compiled step: (state, batch, key) -> (state, scalars).
Program = Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]

LESS_MEMORY = (
    "These need less:\n"
    "  --config.train.accumulate=2 (the same batch in two parts)\n"
    "  --config.train.remat=True (on a CPU, with --config.train.scan_blocks=True)\n"
    "  --config.model.dtype=bfloat16\n"
    "  a smaller --config.train.batch or --config.augment.crop"
)


def build(
    config: ConfigDict, workdir: Path, ended: Mapping | None, checkpoint: Checkpoint | None = None
) -> tuple[Run, TrainState]:
    """Builds a run and its state on the devices, from the newest undamaged checkpoint in `workdir` or a new one.

    Args:
      config: Config of the run.
      workdir: Folder of the run.
      ended: Result of `resume.earlier_result`.
      checkpoint: Result of `start.read_start`, for a new run.

    Raises:
      RunError: `workdir` holds a run with other settings, or the crop is larger than every image.
      ValueError: Data, weights or checkpoints cannot be used.
    """
    began = time.perf_counter()
    training, evaluation = load_data(config.data, seed=config.seed)
    spec, images = training.spec, records_of(training.data)
    kind = training.image_kind
    _refuse_channels(config, kind, evaluation.image_kind)
    mean, std = normalisation(config.data, training)
    normalised = partial(normalise, mean=mean, std=std)
    padding = check_crop(config.augment, images.sizes)
    checkpoints = RunCheckpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    is_new, data = not checkpoints.steps(), data_of(config, training, evaluation)
    accept = config.data.changed == "accept"
    from_lead(lambda: keep_data(workdir, data, is_new=is_new, accept=accept))
    criterion = make_criterion(config.loss, training)
    parallel = parallel_for(config.parallel)
    module = create_model(config.model, num_classes=spec.num_classes, seed=config.seed, channels=kind.channels)
    begins = ""
    if is_new:
        begins, random = load_initial_weights(module, config.init, checkpoint)
        config = lora.with_full(config, module, random)
    model = make_functional(
        module,
        config.optim,
        config.train,
        axis_name=parallel.axis_name,
        adapters=lora.adapters_for(module, config.lora, seed=config.seed),
        full=config.lora.full or (),
    )
    optimizer, state = make_optimizer(model, config.optim, config.train)
    teacher = None
    if config.loss.distill:
        teacher = load_teacher(config.loss, spec, kind, crop=config.augment.crop, mean=mean, std=std)
        state = dataclasses.replace(state, teacher=teacher.arrays())

    size = _evaluated_size(records_of(evaluation.data).sizes, Protocol.of(config.eval))
    metadata = run_metadata(plain(config), model_metadata(module), spec, size)
    metadata["normalisation"] = {"mean": list(mean), "std": list(std)}
    if not kind.is_rgb:
        metadata["image_dtype"] = kind.dtype
    if teacher is not None:
        metadata["teacher"] = teacher.metadata(config.loss.distill)
    start = resumed(
        checkpoints, state, metadata, workdir, ended, may_skip=config.train.may_skip, adapters=model.adapters
    )
    if start is None:
        start = Start(0, state, Scores(), [], origin_metadata(config.model.name, config.init))
    else:
        begins = resumed_from(start.step, start.origin)
    metadata |= start.origin
    save_adapter = None
    if model.adapters.layers:
        save_adapter = lora.AdapterFile(workdir / "adapter", model, config, metadata)
    _refuse_small_images(model, records_of(evaluation.data).sizes, Protocol.of(config.eval), normalised, kind)

    balanced = config.augment.class_balance > 0
    labels: dict[str, Any] = {
        "ignore_label": spec.ignore_label,
        "class_pixels": training.pixel_counts() if balanced else None,
    }
    mix = None
    if mixing.is_mixed(config.augment):
        classes = dict(num_classes=spec.num_classes, ignore_label=spec.ignore_label)
        mix = partial(mixing.mix, settings=config.augment, **classes)
    train_step = TrainStep(
        model=model,
        optimizer=optimizer,
        augment=partial(augment, settings=config.augment, normalise=normalised, **labels),
        criterion=criterion,
        aux_weight=config.loss.aux_weight,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema,
        may_skip=config.train.may_skip,
        mix=mix,
        teacher=teacher,
    )
    key = jax.random.key(config.seed)
    batches = make_batches(
        training.data,
        config.augment,
        **labels,
        batch_size=config.train.batch,
        seed=config.seed,
        parallel=parallel,
        key=key,
        start=start.step,
        cache_gb=config.data.cache_gb,
    )
    log = Log(
        workdir,
        start.step,
        evaluated=start.scores.evaluated == start.step,
        active=is_lead(),
        trackers=config.train.trackers,
        settings=plain(config),
    )
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
        normalise=normalised,
        image_dtype=kind.dtype,
        save_adapter=save_adapter,
    )
    steps = summary_of_steps(config.train, config.augment, config.optim, padding=padding)
    run = Run(
        workdir=workdir,
        began=began,
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
        save_adapter=save_adapter,
        meter=Meter(config.train.batch),
        rates=optim.learning_rates(config.optim, model.arrays()[0], steps=config.train.steps, frozen=model.frozen),
        metadata=metadata,
        summary=summary(
            workdir,
            training,
            evaluation,
            model,
            parallel,
            config,
            begins=begins,
            steps=steps,
            protocol=evaluator.protocol,
        ),
        warnings=warnings_of(config, training, padding=padding),
    )
    return run, _on_devices(start.state, model, parallel)


def summary(
    workdir: Path,
    training: OpenSplit,
    evaluation: OpenSplit,
    model: FunctionalModel,
    parallel: Parallel,
    config: ConfigDict,
    *,
    begins: str,
    steps: str,
    protocol: Protocol,
) -> dict[str, str]:
    """A line of text for each part of a run, by label.

    Args:
      workdir: Folder of the run.
      training: Training split.
      evaluation: Evaluated split.
      model: Model of the run.
      parallel: Parallelism of the run.
      config: Config of the run.
      begins: Description of the start.
      steps: Result of `summary_of_steps`.
      protocol: Protocol of evaluations.
    """
    params, devices = model.arrays()[0], parallel.devices
    count = sum(array.size for name, array in params.items() if name not in model.adapters.initial)
    of = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    images = "" if training.image_kind.is_rgb else f", images of {training.image_kind}"
    return {
        "model": f"{model.spec.name}, {count:,} parameters, computes in {config.model.dtype}",
        "start": begins,
        **({"trained": _trained(model)} if model.frozen else {}),
        **({"teacher": config.loss.distill} if config.loss.distill else {}),
        "data": f"{training.spec.name}, {training.spec.num_classes} classes{images}",
        "images": f"{len(records_of(training.data))} to train on ({config.data.train_split}), "
        f"{len(records_of(evaluation.data))} to evaluate ({config.data.eval_split})",
        "steps": steps,
        "evaluation": str(protocol),
        "device": f"{len(devices)} x {devices[0].device_kind}{of}, {parallel.kind}",
        "workdir": f"{workdir}",
    }


def _trained(model: FunctionalModel) -> str:
    """A description of the trained parameters of a model with frozen ones."""
    params = model.arrays()[0]
    count, whole = (sum(array.size for array in part.values()) for part in (model.trained(params), params))
    text = f"{count:,} of {whole:,} parameters ({count / whole:.1%})"
    if layers := model.adapters.layers:
        text += f": adapters of rank {model.adapters.rank} of {len(layers)} layers"
        in_full = lora.modules_of(name for name in model.trained(params) if name not in model.adapters.initial)
        text += f"; in full {shorten(in_full, most=6)}" if in_full else ""
    return text


def warnings_of(config: ConfigDict, training: OpenSplit, *, padding: float) -> list[str]:
    """Warnings about settings and data that are valid but probably unintended. Those about data fit on one line.

    Args:
      config: Config of the run.
      training: Training split.
      padding: Share of padding in crops.
    """
    found = []
    expected = config.init.expected
    if expected and not config.init.checkpoint:
        found.append(
            "this recipe is written for pretrained weights, but the run starts from random ones. A SegNeXt-T whose "
            f"pretrained weights were not loaded reached 14.6 mIoU on ADE20K instead of the published 41.1. Give "
            f"--config.init.checkpoint=FILE, for this recipe {expected}"
        )
    if both := shared_splits(config.data.train_split, config.data.eval_split):
        found.append(f"the run evaluates on images that it trains on: both splits contain {both}")
    if padding >= 0.5:
        found.append(f"{padding:.0%} of the area of crops is padding; lower --config.augment.crop")
    counts = training.pixel_counts()
    if absent := [name for name, count in zip(training.spec.label_names, counts, strict=True) if not count]:
        begins = f"{len(absent)} of {len(counts)} classes without a pixel in {config.data.train_split}: "
        found.append(begins + _fitting(absent, WARNING_COLUMNS - len(begins)))
    return found


def _fitting(names: Sequence[str], columns: int) -> str:
    """The names that fit into a line of this many columns, and the number of the others."""
    shown = [console.one_line(name, most=24) for name in names]
    for number in range(len(shown), 0, -1):
        more = f", and {len(shown) - number} more" * (number < len(shown))
        if console.columns(text := ", ".join(shown[:number]) + more) <= columns:
            return text
    return f"{shown[0]}, and {len(shown) - 1} more" if len(shown) > 1 else shown[0]


def summary_of_steps(training: ConfigDict, augmentation: ConfigDict, optimizer: ConfigDict, *, padding: float) -> str:
    """A description of the steps of a run.

    Args:
      training: `config.train`.
      augmentation: `config.augment`.
      optimizer: `config.optim`.
      padding: Share of padding in crops.
    """
    height, width = augmentation.crop
    padded = f" ({padding:.0%} padding)" if padding >= 0.005 else ""
    return f"{training.steps} of {training.batch} crops of {height}x{width}{padded}, {optimizer.name}"


# ---------------------------------------------------------------------------------------------------------------- data


def load_data(settings: ConfigDict, *, seed: int) -> tuple[OpenSplit, OpenSplit]:
    """The training and the evaluation split; a split that fits into `resident_gb` is read into memory.

    Args:
      settings: `config.data`.
      seed: Seed of generated data.

    Raises:
      ValueError: The data cannot be used, or a split has no published labels.
    """
    generated: dict[str, Any] = {}
    if specs.is_generated(settings.name):
        numbers = (settings.train_images, settings.eval_images)
        generated = dict(num_images=numbers, size=tuple(settings.size), seed=seed)
    resident_gb = settings.resident_gb
    if resident_gb is None:
        resident_gb = memory.for_resident_data(jax.local_devices()[0]) / 1e9
    training, evaluation = open_splits(
        settings.name,
        (settings.train_split, settings.eval_split),
        source=settings.source,
        data_dir=settings.dir,
        resident_gb=resident_gb,
        say=console.say,
        **generated,
    )
    return training, evaluation


def _refuse_channels(config: ConfigDict, training: specs.ImageKind, evaluation: specs.ImageKind) -> None:
    """Raises RunError if the images of the two splits, the model or a function differ in channels or dtype."""
    if training != evaluation:
        raise RunError(
            f"the images of {config.data.train_split} have {training}, those of {config.data.eval_split} have "
            f"{evaluation}"
        )
    given = config.model.get("in_channels", training.channels)
    if given != training.channels:
        raise RunError(
            f"config.model.in_channels={given}, but the images have {training}; omit it, and the model takes the "
            "number from the images"
        )
    address = config.augment.on_device
    if address and (problem := hooks.problem_on_device(address, config.augment.crop, training.channels)):
        raise RunError(f"config.augment.on_device: {problem}")


def normalisation(settings: ConfigDict, training: OpenSplit) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, by `config.data.normalisation`.

    Args:
      settings: `config.data`.
      training: Training split.

    Raises:
      DataError: They must be measured, but were not when the data were prepared.
      RunError: "imagenet" for images that are not RGB, or "measured" for generated data.
    """
    kind, choice = training.image_kind, settings.normalisation
    if choice == "imagenet" and kind.channels != 3:
        raise RunError(f"config.data.normalisation=imagenet is for RGB, but the images have {kind}; omit it")
    if choice == "imagenet" or (choice == "auto" and kind.is_rgb):
        return specs.IMAGENET_MEAN, specs.IMAGENET_STD
    if training.prepared is None:
        raise RunError(f"config.data.normalisation={choice} is for prepared data; {settings.name} is generated")
    moments = training.prepared.moments(settings.train_split)
    if constant := [str(number) for number, (_, squares) in enumerate(moments.of) if not squares]:
        console.say(f"constant channels, normalised with a standard deviation of 1: {', '.join(constant)}")
    return moments.mean, moments.std


def make_batches(
    split: specs.Split | Records,
    augmentation: AugmentSettings,
    *,
    ignore_label: int,
    class_pixels: np.ndarray | None,
    batch_size: int,
    seed: int,
    parallel: Parallel,
    key: jax.Array,
    start: int,
    cache_gb: float | None,
) -> pipeline.TrainBatches | pipeline.StreamBatches:
    """Training batches: from device memory if the split is in memory, and streamed otherwise.

    They are also streamed with `augment.on_host`, which changes images in host memory.

    Args:
      split: Training split.
      augmentation: `config.augment`.
      ignore_label: As in `augment`.
      class_pixels: As in `augment`.
      batch_size: Number of images per batch, over all devices.
      seed: Seed of the order of images.
      parallel: Parallelism of the run.
      key: Key of the run.
      start: First step.
      cache_gb: Gigabytes of decoded images that a stream keeps in memory; None for `memory.for_decoded_images`.
    """
    if isinstance(split, specs.Split) and not augmentation.on_host:
        return pipeline.TrainBatches(split, batch_size=batch_size, seed=seed, parallel=parallel)
    return pipeline.StreamBatches(
        records_of(split),
        batch_size=batch_size,
        seed=seed,
        parallel=parallel,
        settings=augmentation,
        ignore_label=ignore_label,
        class_pixels=class_pixels,
        key=key,
        start=start,
        cache_bytes=memory.for_decoded_images() if cache_gb is None else 1e9 * cache_gb,
    )


def _image_names(batches: pipeline.TrainBatches | pipeline.StreamBatches, images: Records, step: int) -> list[str]:
    """The names of the images in the batch of a step."""
    numbers: list[int] = batches.indices(step).tolist()
    return [images.names[number] for number in numbers]


# ------------------------------------------------------------------------------------------------- model, loss and step


def create_model(settings: ConfigDict, *, num_classes: int, seed: int, channels: int = 3) -> SegmentationModel:
    """The model of `config.model` for images with this number of channels, with random weights."""
    overrides, dtype = model_overrides(settings), jnp.dtype(settings.dtype)
    if channels != 3:
        overrides["in_channels"] = channels
    return models.create(settings.name, num_classes=num_classes, seed=seed, dtype=dtype, **overrides)


def make_functional(
    module: SegmentationModel,
    optimizer: ConfigDict,
    training: ConfigDict,
    *,
    axis_name: str | None,
    adapters: Adapters = NO_ADAPTERS,
    full: Sequence[str] = (),
) -> FunctionalModel:
    """The functional model for the training step.

    Args:
      module: Model of the run.
      optimizer: `config.optim`, which names the frozen parameters.
      training: `config.train`, which sets the execution of equal blocks.
      axis_name: `Parallel.axis_name`.
      adapters: Adapters, which are trained in place of the parameters of the model.
      full: `lora.full`, the modules that are trained in full next to adapters.
    """
    module.set_attributes(axis_name=axis_name, raise_if_not_found=False)
    params, batch_stats = FunctionalModel(module, adapters=adapters).arrays()
    if adapters.layers:
        frozen = lora.frozen_names(params, adapters, full)
    else:
        frozen = optim.frozen_names(optimizer.frozen, params)
    execution = layers.BlockExecution.of(scan_blocks=training.scan_blocks, remat=training.remat)
    stacks = NO_STACKS
    if optim.can_stack(optimizer):
        stacks = stacks_for(execution, params, batch_stats, alike=optim.rules(optimizer, params, frozen=frozen))
    return FunctionalModel(module, frozen=frozen, execution=execution, stacks=stacks, adapters=adapters)


def make_criterion(settings: ConfigDict, training: OpenSplit) -> losses.Criterion:
    """The loss of `config.loss`, with class weights that may depend on the training split."""
    choice, spec = settings.class_weights, training.spec
    counts = training.pixel_counts() if isinstance(choice, str) and choice in class_weights.BALANCED else None
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
    # Compiled as one program: otherwise every shape would compile its own.
    opt_state = jax.jit(optimizer.init)(model.trained(params))
    return optimizer, TrainState.start(params, batch_stats, opt_state, ema=training.ema > 0)


def compile_step(run: Run, state: TrainState) -> Program:
    """The training step as a program for `run.parallel`, compiled now if possible.

    Raises:
      RunError: A step needs more memory than a device has.
    """
    program = run.parallel.compile_train(run.train_step)
    if run.first < run.steps and run.parallel.compiles_ahead:
        arguments = state, run.batches.at(run.first), run.key
        return _compiled(program, arguments, run.parallel, resident=run.batches.resident_bytes)
    return program


def _compiled(program: Program, arguments: tuple, parallel: Parallel, *, resident: int) -> Program:
    """Compiles a step, and prints the compilation time and the memory that a step needs.

    Args:
      resident: Bytes of images and labels that each device also keeps.
    """
    since = time.perf_counter()
    compiled: jax.stages.Compiled = program.lower(*arguments).compile()
    seconds = time.perf_counter() - since
    if (needed := memory.needed(compiled)) is None:
        console.say(f"compiled in {seconds:.1f} s")
        return compiled
    available = memory.limit(parallel.own_devices[0], shared_by=len(parallel.own_devices))
    of = f" of {console.amount(available)}" if available else ""
    images = f", and the images {console.amount(resident)}" if resident else ""
    comma = "," if resident else ""
    console.say(f"compiled in {seconds:.1f} s; a step needs {console.amount(needed)}{images}{comma}{of} on each device")
    if available and needed + resident > available:
        less = f"{LESS_MEMORY}\n  --config.data.resident_gb=0 (images are streamed)" if resident else LESS_MEMORY
        raise RunError(
            f"a step needs {console.amount(needed)}{images}; the device has {console.amount(available)}. {less}"
        )
    return compiled


def _on_devices(state: TrainState, model: FunctionalModel, parallel: Parallel) -> TrainState:
    # Copied, because a step donates its buffers, and a new optimizer state may use one buffer of zeros several times.
    copied = jax.jit(lambda state: model.stacks.stacked(jax.tree.map(jnp.copy, state)))
    return parallel.replicate(copied(state))


def _refuse_small_images(
    model: FunctionalModel,
    sizes: np.ndarray,
    protocol: Protocol,
    normalised: Callable[[jax.Array], jax.Array],
    kind: specs.ImageKind,
) -> None:
    """Raises ValueError before the training if an image is too small for the model."""
    inputs = [size for height, width in np.unique(sizes, axis=0) for size in protocol.input_sizes((height, width))]
    height, width = min(inputs, key=min)
    if protocol.window:
        height, width = map(min, (height, width), protocol.window.crop)
    image = jax.ShapeDtypeStruct((1, height, width, kind.channels), np.dtype(kind.dtype))
    jax.eval_shape(partial(predict_labels, model, normalise=normalised), *model.arrays(), image)


# ------------------------------------------------------------------------------------------------------------ metadata


def _evaluated_size(sizes: np.ndarray, protocol: Protocol) -> list[int] | None:
    """The (height, width) at which all images are evaluated, at scale 1; None if they have several sizes."""
    protocol = dataclasses.replace(protocol, scales=(1.0,))
    found = {protocol.input_sizes((height, width))[0] for height, width in np.unique(sizes, axis=0).tolist()}
    return list(found.pop()) if len(found) == 1 else None


def run_metadata(
    config: Mapping[str, Any], model: Mapping[str, Any], spec: specs.DatasetSpec, size: list[int] | None
) -> dict[str, Any]:
    """Metadata of every checkpoint of a run, for 8-bit RGB images.

    Args:
      config: All settings, from `config.plain`.
      model: Result of `state_dict.model_metadata`.
      spec: Dataset of the run.
      size: (height, width) at which images are evaluated; None if they have several sizes.
    """
    return {
        "model": model,
        "config": config,
        "dataset": dataset_metadata(spec),
        "normalisation": IMAGENET,
        "input_size": size,
    }
