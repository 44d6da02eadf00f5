"""The parts of a run, each made from its config; training and evaluation use the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from segjax import checkpoint, console, losses, models, optim
from segjax.data import specs
from segjax.models import layers
from segjax.pretrained import load_pretrained
from segjax.settings import model_overrides
from segjax.state import Skeleton, TrainState
from segjax.step import Parallel


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


def make_skeleton(config: ConfigDict, num_classes: int, parallel: Parallel, *, pretrained: bool) -> Skeleton:
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
        with console.log_said():
            load_pretrained(model, config.init.checkpoint, keep=config.init.keep)
    model.set_attributes(axis_name=parallel.axis_name, raise_if_not_found=False)
    names = list(Skeleton(model).arrays()[0])
    return Skeleton(
        model,
        frozen=optim.frozen_names(config.optim.frozen, names),
        execution=layers.BlockExecution(scan=config.train.scan_blocks, remat=config.train.remat),
    )


def make_criterion(config: ConfigDict, spec: specs.DatasetSpec, training: specs.Split) -> losses.Criterion:
    """The loss of a config; class weights that follow from frequencies are counted in the training split."""
    choice = config.loss.class_weights
    counts = pixel_counts(training, spec) if choice == "median_frequency" else None
    weights = losses.class_weights(choice, spec, counts)
    return losses.criterion(
        config.loss, num_classes=spec.num_classes, ignore_label=spec.ignore_label, class_weights=weights
    )


def pixel_counts(split: specs.Split, spec: specs.DatasetSpec) -> np.ndarray:
    """Pixels of each label value, int64 (K,), or (2,) for a single class."""
    counts = sum(np.bincount(labels.ravel(), minlength=256) for labels in split.labels)
    return counts[: len(spec.label_names)]


def model_record(config: ConfigDict, spec: specs.DatasetSpec) -> dict[str, object]:
    """How to build the model again, as `checkpoint.load_model` reads it."""
    return {
        "name": config.model.name,
        "num_classes": spec.num_classes,
        "overrides": model_overrides(config),
        "param_dtype": "float32",
    }


def dataset_record(spec: specs.DatasetSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "class_names": list(spec.class_names),
        "colors": [list(color) for color in spec.colors],
        "ignore_label": spec.ignore_label,
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


def restored(found: checkpoint.Restored, state: TrainState, *, may_skip: int) -> TrainState:
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
