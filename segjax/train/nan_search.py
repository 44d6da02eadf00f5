"""Finds the layer that produced the first non-finite value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.checkpoints.checkpoint import shorten
from segjax.kernels import choice
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime.parallel import AXIS
from segjax.train import optim
from segjax.train.state import TrainState
from segjax.train.step import TrainStep

WHOLE = "the model"


def first_not_finite(train_step: TrainStep, state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> str:
    """Names, in a sentence, the first layer of a training step whose output, or otherwise gradient, is not finite.

    The step is computed again: first its forward pass, with a check of every layer's output, then its gradients.

    Args:
      train_step: The training step.
      state: State before the step.
      batch: Batch of the step; under pmap it has a leading axis of devices.
      key: Key of the run.
    """
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch) if batch["label"].ndim == 4 else batch
    images, labels, dropout_key = train_step.inputs(state, batch, key)
    if found := _not_finite(train_step.model.stacks.apart(state.params | state.batch_stats)):
        return f"Already not finite before the step: {shorten(found, most=3)}. "
    if not np.isfinite(images).all():
        return "The augmented images are not finite. "
    calls: list[str] = []

    def forward(
        params: dict[str, jax.Array], batch_stats: dict[str, jax.Array], images: jax.Array, key: jax.Array
    ) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        model = train_step.model.bind(params, batch_stats, key=key)
        # Uses plain implementations, because fast ones do not call every layer.
        with choice.published_implementations(), _outputs_recorded(model) as outputs:
            model(images)
        calls[:] = outputs
        return list(outputs.values()), train_step.model.batch_stats_of(model)

    on_one_device, batch_stats = _on_one_device(forward), state.batch_stats
    for part, _, part_key in zip(*train_step.micro_batches(images, labels, dropout_key), strict=True):
        finite, batch_stats = on_one_device(state.params, batch_stats, part, part_key)
        for name, is_finite in zip(calls, finite, strict=True):
            if not is_finite:
                return f"The first output that is not finite is that of {name}. "

    counts = train_step.counts(labels)
    loss, gradients, _ = _on_one_device(train_step.gradients)(state, images, labels, counts, dropout_key)
    if not np.isfinite(loss):
        return f"All outputs of layers are finite, but the loss is {loss}. "
    gradients = train_step.model.stacks.apart(gradients)
    if found := _not_finite(gradients):
        # The backward pass begins with the layer that was called last. A layer that was not called itself has the
        # position of the layer that contains it. Among layers of one position, the last in the order of `found` wins,
        # such as a classifier.
        first = max(reversed(found), key=lambda name: calls.index(_called(name, calls)))
        return f"All outputs are finite, but not all gradients: the first in the backward pass is that of {first}. "
    if not np.isfinite(optim.norm(gradients)):
        largest = max(gradients, key=lambda name: np.abs(gradients[name]).max())
        return f"All gradients are finite, but the square of the largest is not: that of {largest}. "
    return "When recomputed, everything was finite. "


def _on_one_device(function: Callable) -> Callable:
    """Compiles `function` for one device, inside an axis of length 1 for layers that sum over devices."""
    mapped = jax.vmap(function, in_axes=None, axis_size=1, axis_name=AXIS)
    return jax.jit(lambda *arguments: jax.tree.map(lambda x: x[0], mapped(*arguments)))


def _not_finite(arrays: dict[str, jax.Array]) -> list[str]:
    return [name for name, array in arrays.items() if not np.isfinite(array).all()]


def _called(parameter: str, calls: list[str]) -> str:
    """The layer of a parameter, or the innermost layer that contains it and was called."""
    layer = parameter.rpartition(".")[0]
    while layer and layer not in calls:
        layer = layer.rpartition(".")[0]
    return layer or WHOLE


@contextlib.contextmanager
def _outputs_recorded(model: SegmentationModel) -> Iterator[dict[str, jax.Array]]:
    """Yields a dict that is filled, in order of return, with whether each called module's output is finite, by name."""
    modules = [(".".join(map(str, path)) or WHOLE, module) for path, module in nnx.iter_modules(model)]
    names = {id(module): name for name, module in modules}
    owners = {owner for _, module in modules for owner in type(module).__mro__ if "__call__" in vars(owner)}
    outputs: dict[str, jax.Array] = {}

    def recorded(call):
        def wrapper(self, *args, **kwargs):
            output = call(self, *args, **kwargs)
            finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(output)]
            outputs[names[id(self)]] = jnp.all(jnp.stack(finite))
            return output

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.callback(setattr, owner, "__call__", owner.__call__)
            owner.__call__ = recorded(owner.__call__)
        yield outputs
