"""What a training step changes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, number of batches taken.
      skipped: int32 (2,), how many of them changed nothing, because loss or gradient were not finite: in all, and in a
        row up to now.
      params: parameters by dotted name; those of a loop of blocks stacked (`Stacks`), as are their moments and average.
      batch_stats: running statistics by dotted name.
      opt_state: optax's.
      ema: exponential moving average of parameters and statistics by dotted name; None where none is kept.
    """

    step: jax.Array
    skipped: jax.Array
    params: dict[str, jax.Array]
    batch_stats: dict[str, jax.Array]
    opt_state: optax.OptState
    ema: dict[str, jax.Array] | None

    @classmethod
    def start(cls, params: dict, batch_stats: dict, opt_state: optax.OptState, *, ema: bool = False) -> TrainState:
        """The state before the first step."""
        moving = params | batch_stats if ema else None
        return cls(jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.int32), params, batch_stats, opt_state, moving)

    @property
    def evaluated(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Parameters and statistics that the model is evaluated and used with: their average, where one is kept."""
        if self.ema is None:
            return self.params, self.batch_stats
        return tuple({name: self.ema[name] for name in part} for part in (self.params, self.batch_stats))
