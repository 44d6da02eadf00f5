"""Where a number that is not finite comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.state import TrainState
from segjax.step import TrainStep


def first_not_finite(train_step: TrainStep, state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> str:
    """One sentence: the first layer whose output is not finite in a training step, or else whose gradient is not.

    The step is computed again, layer by layer and without compilation.

    Args:
      state: before the step. batch, key: what the step was given; under pmap with the axis of devices.
    """
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch) if batch["label"].ndim == 4 else batch
    images, labels, dropout_key = train_step.inputs(state, batch, key)
    if found := _not_finite(state.params):
        return f"Parameters are not finite already: {', '.join(found)}. "
    if not np.isfinite(images).all():
        return "The augmented images are not finite. "
    model = train_step.skeleton.bind(state.params, state.batch_stats, key=dropout_key)
    with _outputs_recorded(model) as outputs:
        model(images)
    for name, is_finite in outputs:
        if not is_finite:
            return f"The first output that is not finite is that of {name}. "
    _, gradients, _ = train_step.gradients(state, images, labels, train_step.criterion.counts(labels), dropout_key)
    # The last layer's gradient is the first that the backward pass computes.
    if found := _not_finite(gradients):
        return f"All outputs are finite, but the gradients are not of {', '.join(found[-3:])}. "
    return "Computed again layer by layer, everything was finite. "


def _not_finite(arrays: dict[str, jax.Array]) -> list[str]:
    return [name for name, array in arrays.items() if not np.isfinite(array).all()]


@contextlib.contextmanager
def _outputs_recorded(model: nnx.Module) -> Iterator[list[tuple[str, bool]]]:
    """(name, whether everything in it is finite) for the output of each module that is called inside, in that order."""
    names = {id(module): ".".join(map(str, path)) or "the model" for path, module in nnx.iter_modules(model)}
    kinds = {type(module) for _, module in nnx.iter_modules(model) if callable(module)}
    outputs: list[tuple[str, bool]] = []

    def recorded(call):
        def wrapper(self, *args, **kwargs):
            output = call(self, *args, **kwargs)
            finite = all(
                bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)
            )
            outputs.append((names.get(id(self), type(self).__name__), finite))
            return output

        return wrapper

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if "__call__" in vars(kind):
                stack.enter_context(mock.patch.object(kind, "__call__", recorded(kind.__call__)))
        yield outputs
