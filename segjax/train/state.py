"""The state that a training step changes, and its arrays by their names in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from segjax.models.lora import NO_ADAPTERS, Adapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: Number of batches taken, int32 scalar.
      skipped: Number of those batches that were skipped because loss or gradient was not finite, in total and
        consecutively up to now, int32 (2,).
      params: Parameters by dotted name, with those of adapters. Those of blocks that run as a loop are stacked
        (`Stacks`), and so are their moments and their average.
      batch_stats: Running statistics by dotted name.
      opt_state: State of the optax transform.
      ema: Exponential moving average of parameters and statistics by dotted name, or None.
      teacher: Arrays of `Teacher.arrays`, which are in no checkpoint; empty without a teacher.
    """

    step: jax.Array
    skipped: jax.Array
    params: dict[str, jax.Array]
    batch_stats: dict[str, jax.Array]
    opt_state: optax.OptState
    ema: dict[str, jax.Array] | None
    teacher: tuple[jax.Array | np.ndarray, ...] = ()

    @classmethod
    def start(cls, params: dict, batch_stats: dict, opt_state: optax.OptState, *, ema: bool = False) -> TrainState:
        """The state before the first step."""
        moving = params | batch_stats if ema else None
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.int32), params, batch_stats, opt_state, moving)

    @property
    def evaluated(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The parameters and statistics to evaluate and publish: their moving average, if there is one."""
        if self.ema is None:
            return self.params, self.batch_stats
        params, batch_stats = ({name: self.ema[name] for name in part} for part in (self.params, self.batch_stats))
        return params, batch_stats


def weights_of(state: TrainState, adapters: Adapters = NO_ADAPTERS) -> dict[str, jax.Array]:
    """The part of a checkpoint from which a model is built: `state.evaluated`, merged, in one dict by dotted name."""
    params, batch_stats = state.evaluated
    return adapters.merged(params) | batch_stats


def training_of(state: TrainState, adapters: Adapters = NO_ADAPTERS) -> dict[str, jax.Array]:
    """The part of a checkpoint that only training needs, by dotted name."""
    leaves = jax.tree_util.tree_leaves_with_path(_rest(state, adapters))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def restored(
    weights: Mapping, training: Mapping, state: TrainState, *, may_skip: int, adapters: Adapters = NO_ADAPTERS
) -> TrainState:
    """The state in a checkpoint.

    Args:
      weights: Part of the checkpoint with the names of `weights_of`.
      training: Part of the checkpoint with the names of `training_of`.
      state: Any state of the run, for its structure.
      may_skip: `TrainStep.may_skip`.
      adapters: Adapters of the run.
    """
    arrays = {name: training[name] for name in training_of(state, adapters)}
    skipped, in_a_row = arrays["skipped"]
    if in_a_row > may_skip:
        # The checkpoint was saved because a loss was not finite: the run tries the batch again.
        arrays["skipped"] = np.array([skipped, 0], np.int32)
    rest = jax.tree.unflatten(jax.tree.structure(_rest(state, adapters)), list(arrays.values()))
    evaluated = {**weights, **rest["unmerged"]}
    own = rest.get("own", evaluated)
    return TrainState(
        step=rest["step"],
        skipped=rest["skipped"],
        params={name: own[name] for name in state.params},
        batch_stats={name: own[name] for name in state.batch_stats},
        opt_state=rest["optimizer"],
        ema=None if state.ema is None else {name: evaluated[name] for name in state.ema},
        teacher=state.teacher,
    )


def _rest(state: TrainState, adapters: Adapters) -> dict[str, Any]:
    rest = {"step": state.step, "skipped": state.skipped, "optimizer": state.opt_state}
    # The weights of the checkpoint are merged: those that differ are saved as they are, too.
    rest["unmerged"] = adapters.unmerged(state.evaluated[0])
    # With a moving average, the average is saved as the weights of the checkpoint, and the trained weights as "own".
    return rest if state.ema is None else rest | {"own": state.params | state.batch_stats}
