"""The parts of a run, each made from its config; training and evaluation use the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from segjax import layers, losses, models
from segjax.checkpoints.files import provenance_at
from segjax.checkpoints.initialize import initialize
from segjax.checkpoints.metadata import IMAGENET, dataset_metadata, licence_of
from segjax.data import class_weights, pipeline, specs
from segjax.data.open import open_splits
from segjax.data.records import Records
from segjax.models.functional import FunctionalModel
from segjax.models.stacked import Stacks
from segjax.runtime import console
from segjax.runtime.parallel import Parallel
from segjax.train import optim, run_checkpoints
from segjax.train.config import model_overrides, plain
from segjax.train.state import TrainState


class Data(NamedTuple):
    """What a run trains on and is evaluated on.

    Attributes:
      training, evaluation: splits in memory, or records to be read.
      pixel_counts: () -> pixels of each label value in the training split, (K,), or (2,) for a single class.
    """

    training: specs.Split | Records
    evaluation: specs.Split | Records
    spec: specs.DatasetSpec
    pixel_counts: Callable[[], np.ndarray]


def load_data(config: ConfigDict) -> Data:
    """The splits of a config; those that fit into `data.resident_gb` are read into memory.

    Raises:
      ValueError: data that cannot be used, or a split without published labels.
    """
    data, generated = config.data, {}
    if data.name in specs.DATASETS and specs.DATASETS[data.name].kind == "generated":
        generated = dict(num_images=(data.train_images, data.eval_images), size=tuple(data.size), seed=config.seed)
    training, evaluation = open_splits(
        data.name,
        (data.train_split, data.eval_split),
        source=data.source,
        data_dir=data.dir,
        resident_gb=data.resident_gb,
        say=console.say,
        **generated,
    )
    return Data(training.data, evaluation.data, training.spec, training.pixel_counts)


def make_skeleton(config: ConfigDict, num_classes: int, parallel: Parallel, *, pretrained: bool) -> FunctionalModel:
    """The model of a config; with `pretrained`, on the weights of init.checkpoint where that is set."""
    model = models.create(
        config.model.name,
        num_classes=num_classes,
        seed=config.seed,
        dtype=jnp.dtype(config.model.dtype),
        **model_overrides(config),
    )
    if pretrained and config.init.checkpoint:
        console.say(f"initial weights from {config.init.checkpoint}")
        with console.log_to(console.say):
            initialize(model, config.init.checkpoint, keep=config.init.keep)
    model.set_attributes(axis_name=parallel.axis_name, raise_if_not_found=False)
    params = FunctionalModel(model).arrays()[0]
    rules = optim.rules(config.optim, params)
    execution = layers.BlockExecution.of(scan_blocks=config.train.scan_blocks, remat=config.train.remat)
    return FunctionalModel(
        model,
        frozen=optim.frozen_names(config.optim.frozen, params),
        execution=execution,
        stacks=Stacks.of(params, shortest=execution.scan_from, alike=rules),
    )


def make_criterion(config: ConfigDict, data: Data) -> losses.Criterion:
    """The loss of a config, with class weights that may follow from the training split."""
    choice, spec = config.loss.class_weights, data.spec
    counts = data.pixel_counts() if choice == "median_frequency" else None
    return losses.criterion(
        config.loss,
        num_classes=spec.num_classes,
        ignore_label=spec.ignore_label,
        class_weights=class_weights.class_weights(choice, spec, counts),
    )


def make_batches(
    config: ConfigDict, data: Data, parallel: Parallel, key: jax.Array, start: int
) -> pipeline.TrainBatches | pipeline.StreamBatches:
    """Training batches from the devices' memory where the split was read into memory, else streamed."""
    common = dict(batch_size=config.train.batch, seed=config.seed, parallel=parallel)
    if isinstance(data.training, specs.Split):
        return pipeline.TrainBatches(data.training, **common)
    return pipeline.StreamBatches(
        data.training,
        settings=config.augment,
        key=key,
        start=start,
        cache_bytes=1e9 * config.data.cache_gb,
        **common,
    )


def model_record(config: ConfigDict, spec: specs.DatasetSpec) -> dict[str, object]:
    """How to build the model again, as `checkpoint.load_model` reads it."""
    return {
        "name": config.model.name,
        "num_classes": spec.num_classes,
        "overrides": model_overrides(config),
        "param_dtype": "float32",
    }


def run_record(config: ConfigDict, spec: specs.DatasetSpec) -> dict[str, object]:
    """What every checkpoint of a run says of it."""
    return {
        "model": model_record(config, spec),
        "config": plain(config),
        "dataset": dataset_metadata(spec),
        "normalisation": IMAGENET,
        "input_size": list(config.augment.crop),
    }


def origin_record(config: ConfigDict) -> dict[str, object]:
    """Where the weights of a run come from."""
    if not config.init.checkpoint:
        return {
            "licence": "trained from random weights; the terms of its data hold",
            "provenance": {"initial_weights": None},
        }
    return {
        "licence": licence_of(config.model.name),
        "provenance": {"initial_weights": provenance_at(config.init.checkpoint)},
    }


# --------------------------------------------------------------------------------------- a state as a checkpoint has it


def weights_of(state: TrainState) -> dict[str, jax.Array]:
    """What the model is used with, by dotted name."""
    params, batch_stats = state.evaluated
    return params | batch_stats


def training_of(state: TrainState) -> dict[str, jax.Array]:
    """Everything else that a step changes, by dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(_rest(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def restored(found: run_checkpoints.Restored, state: TrainState, *, may_skip: int) -> TrainState:
    """The state of a checkpoint, in the structure of `state`."""
    structure = jax.tree.structure(_rest(state))
    rest = jax.tree.unflatten(structure, [found.training[name] for name in training_of(state)])
    own = rest.get("own", found.weights)
    skipped = np.array(rest["skipped"])
    if skipped[1] > may_skip:
        # It was saved because a loss was not finite: the batch gets another chance.
        skipped[1] = 0
    return TrainState(
        step=rest["step"],
        skipped=skipped,
        params={name: own[name] for name in state.params},
        batch_stats={name: own[name] for name in state.batch_stats},
        opt_state=rest["optimizer"],
        ema=None if state.ema is None else {name: found.weights[name] for name in state.ema},
    )


def _rest(state: TrainState) -> dict[str, object]:
    rest = {"step": state.step, "skipped": state.skipped, "optimizer": state.opt_state}
    # Beside their average, which takes the place of the weights.
    return rest if state.ema is None else rest | {"own": state.params | state.batch_stats}
