"""The published recipes as optax transforms over parameters by dotted name."""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax.numpy as jnp
import optax


def poly_schedule(
    base: float, *, steps: int, power: float, warmup_steps: int, warmup_ratio: float, end: float = 0.0
) -> optax.Schedule:
    """Polynomial decay with a linear warm-up that multiplies it, as in mmsegmentation's `poly` policy.

    Args:
      base: learning rate at the height of the schedule.
      steps: length of the decay; the rate is `end` from there on.
      power: 1 decays along a line.
      warmup_steps: over which the factor grows from `warmup_ratio` to 1.
    """

    def rate(step):
        # As a float first: an int32 divided stays float32 where jax computes in float64.
        step = jnp.asarray(step, float)
        progress = jnp.clip(step / steps, 0, 1)
        decayed = (base - end) * (1 - progress) ** power + end
        if not warmup_steps:
            return decayed
        missing = jnp.clip(1 - step / warmup_steps, 0, 1)
        return decayed * (1 - missing * (1 - warmup_ratio))

    return rate


def schedule(settings, *, steps: int) -> optax.Schedule:
    """Learning rate by step for the `optim` part of a config."""
    return poly_schedule(
        settings.lr,
        steps=steps,
        power=settings.power,
        warmup_steps=settings.warmup_steps,
        warmup_ratio=settings.warmup_ratio,
        end=settings.end_lr,
    )


def by_name(names: Iterable[str], pattern: str) -> dict[str, bool]:
    """Which parameters a regular expression is found in, by dotted name."""
    return {name: re.search(pattern, name) is not None for name in names}


def optimizer(settings, names: Iterable[str], *, steps: int) -> optax.GradientTransformation:
    """AdamW or SGD as torch computes them, with the published exceptions by parameter name.

    Args:
      settings: the `optim` part of a config.
      names: dotted parameter names.
      steps: length of the schedule.

    Raises:
      ValueError: a name other than adamw and sgd.
    """
    names = list(names)
    no_decay = by_name(names, settings.no_decay)
    decay = optax.add_decayed_weights(settings.weight_decay, mask={name: not no_decay[name] for name in names})
    if settings.name == "adamw":
        # torch's AdamW: decay beside the moments, eps outside the root, both scaled by the learning rate.
        rule = [optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=settings.eps), decay]
    elif settings.name == "sgd":
        # torch's SGD: decay is part of the gradient that the momentum accumulates.
        rule = [decay, optax.trace(decay=settings.momentum)]
    else:
        raise ValueError(f"optim.name is 'adamw' or 'sgd'; got {settings.name!r}")
    head = by_name(names, settings.head)
    return optax.chain(
        *rule,
        optax.masked(optax.scale(settings.head_multiplier), head),
        optax.scale_by_learning_rate(schedule(settings, steps=steps)),
    )
