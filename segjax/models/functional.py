"""A model as a function of flat dicts of arrays by dotted name, for training steps and inference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import layers
from segjax.models.lora import NO_ADAPTERS, Adapters
from segjax.models.segmentation_model import SegmentationModel
from segjax.models.stacked import NO_STACKS, Stacks


class FunctionalModel:
    """A model without its arrays: its graph definitions for training and evaluation, and the names of its arrays.

    `jax.jit` over arrays is faster than `nnx.jit`, and masks, checkpoints and conversion work on flat dicts by name.

    Example:
      >>> from segjax import models
      >>> from segjax.models.functional import FunctionalModel
      >>> model = models.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> functional = FunctionalModel(model)
      >>> params, batch_stats = functional.arrays()
      >>> params["decode_head.linear_pred.bias"].shape
      (5,)
      >>> functional.bind(params, batch_stats).spec == model.spec
      True
    """

    def __init__(
        self,
        model: SegmentationModel,
        *,
        frozen: frozenset[str] = frozenset(),
        execution: layers.BlockExecution = layers.PLAIN,
        stacks: Stacks = NO_STACKS,
        adapters: Adapters = NO_ADAPTERS,
    ):
        """Splits a model into graph definitions and arrays.

        Args:
          model: Model to split; it is in evaluation mode afterwards.
          frozen: Dotted names of parameters that training does not change. A BatchNorm whose parameters are all frozen
            normalises with its running statistics and keeps them, as after `eval()` in torch.
          execution: Execution of groups of equal blocks in training.
          stacks: Stacks that `bind` accepts in place of their members.
          adapters: Adapters whose arrays are parameters, too. `bind` accepts parameters with them or merged ones.
        """
        self.execution = execution
        self.stacks = stacks
        self.adapters = adapters
        model.eval()
        self._evaluation, *_ = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        model.train()
        model.set_attributes(execution=execution, raise_if_not_found=False)
        for path, module in nnx.iter_modules(model):
            names = {".".join(map(str, (*path, part))) for part in ("scale", "bias")}
            if isinstance(module, layers.BatchNorm) and names <= frozen:
                module.use_running_average = True
        self._training, params, batch_stats, streams = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        model.set_attributes(execution=layers.PLAIN, raise_if_not_found=False)
        model.eval()
        self._params, self._batch_stats = _by_name(params), _by_name(batch_stats)
        self._is_trained = stacks.with_stacks({name: name not in frozen for name in (*self._params, *adapters.initial)})
        self._streams = nnx.to_flat_state(streams)
        self.frozen = frozen
        self.spec = model.spec
        self.in_channels = model.in_channels
        self.size_multiple = model.size_multiple
        self.align_corners = model.align_corners

    def arrays(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The parameters, with those of adapters, and the running statistics that the model was created with."""
        return _arrays(self._params) | dict(self.adapters.initial), _arrays(self._batch_stats)

    def trained(self, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The parameters that training changes."""
        return {name: value for name, value in params.items() if self._is_trained[name]}

    def bind(
        self, params: dict[str, jax.Array], batch_stats: dict[str, jax.Array], *, key: jax.Array | None = None
    ) -> SegmentationModel:
        """A model with these arrays: in training mode with random streams from `key`, or in evaluation mode without."""
        streams = []
        for index, (path, variable) in enumerate(self._streams):
            if isinstance(variable, nnx.RngKey):
                value = variable.get_value() if key is None else jax.random.fold_in(key, index)
            else:
                value = jnp.zeros((), jnp.uint32)
            streams.append((path, variable.replace(value)))
        return nnx.merge(
            self._evaluation if key is None else self._training,
            _filled(self._params, self.adapters.merged(self.stacks.apart(params))),
            _filled(self._batch_stats, self.stacks.apart(batch_stats)),
            nnx.from_flat_state(streams),
            # New variables: a BatchNorm that updates its statistics inside a gradient must not change a variable from
            # outside the trace.
            copy=True,
        )

    def batch_stats_of(self, model: SegmentationModel) -> dict[str, jax.Array]:
        """The running statistics of a bound model, which its calls have updated."""
        return self.stacks.stacked(_arrays(_by_name(nnx.state(model, nnx.BatchStat))))


def _by_name(state: nnx.State) -> dict[str, tuple[tuple, nnx.Variable]]:
    return {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}


def _arrays(variables: dict[str, tuple[tuple, nnx.Variable]]) -> dict[str, jax.Array]:
    return {name: variable.get_value() for name, (_, variable) in variables.items()}


def _filled(template: dict[str, tuple[tuple, nnx.Variable]], arrays: dict[str, jax.Array]) -> nnx.State:
    return nnx.from_flat_state([(path, variable.replace(arrays[name])) for name, (path, variable) in template.items()])


def params_sha256(params: Mapping[str, jax.Array | np.ndarray]) -> str:
    """SHA-256, in hexadecimal, of the names and bytes of all parameters, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode())
        # A view as bytes, without a copy: hashlib does not accept bfloat16.
        digest.update(np.ascontiguousarray(params[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
