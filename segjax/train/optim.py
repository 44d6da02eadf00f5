"""Optimizers and schedules of the published recipes, as optax transforms over parameters by dotted name."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from ml_collections import ConfigDict

from segjax.models.stacked import NO_STACKS, Stacks
from segjax.train.depth import depths

# Optimizers computed as in torch; any other name is that of a function of optax.
OWN = ("adamw", "sgd")
# Arguments of optax's optimizers that other settings determine.
_GIVEN = ("learning_rate", "weight_decay", "mask", "weight_decay_mask")


def _with_warmup(decayed: optax.Schedule, *, warmup_steps: int, warmup_ratio: float) -> optax.Schedule:
    """The decay times a linear warm-up, as in mmsegmentation."""

    def rate(step: ArrayLike) -> ArrayLike:
        # Converted first: the quotient of an int32 would be float32 where jax computes in float64.
        step = jnp.asarray(step, float)
        if not warmup_steps:
            return decayed(step)
        missing = jnp.clip(1 - step / warmup_steps, 0, 1)
        return decayed(step) * (1 - missing * (1 - warmup_ratio))

    return rate


def poly_schedule(
    base: float, *, steps: int, power: float, warmup_steps: int, warmup_ratio: float, end: float = 0.0
) -> optax.Schedule:
    """Polynomial decay times a linear warm-up, as in mmsegmentation's `poly` policy.

    Args:
      base: Peak learning rate.
      steps: Length of the decay in steps; the rate is `end` afterwards.
      power: Exponent of the decay; 1 is linear.
      warmup_steps: Number of steps in which the factor of the warm-up grows from `warmup_ratio` to 1.
      warmup_ratio: First factor of the warm-up.
      end: Final learning rate.
    """

    def decayed(step: ArrayLike) -> jax.Array:
        return (base - end) * (1 - jnp.clip(step / steps, 0, 1)) ** power + end

    return _with_warmup(decayed, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)


def cosine_schedule(
    base: float, *, steps: int, warmup_steps: int, warmup_ratio: float, end: float = 0.0
) -> optax.Schedule:
    """Half a cosine from `base` to `end` (Loshchilov, Hutter, 2017, without restarts), times a linear warm-up.

    The arguments are those of `poly_schedule`.
    """

    def decayed(step: ArrayLike) -> jax.Array:
        return end + (base - end) * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(step / steps, 0, 1)))

    return _with_warmup(decayed, warmup_steps=warmup_steps, warmup_ratio=warmup_ratio)


SCHEDULES = ("poly", "cosine")


def schedule(settings: ConfigDict, *, steps: int) -> optax.Schedule:
    """Learning rate by step.

    Args:
      settings: `config.optim`.
      steps: Length of the schedule in steps.

    Raises:
      ValueError: A schedule that is not in `SCHEDULES`.
    """
    shape = dict(
        steps=steps, warmup_steps=settings.warmup_steps, warmup_ratio=settings.warmup_ratio, end=settings.end_lr
    )
    if settings.schedule == "poly":
        return poly_schedule(settings.lr, power=settings.power, **shape)
    if settings.schedule == "cosine":
        return cosine_schedule(settings.lr, **shape)
    raise ValueError(f"optim.schedule is one of {', '.join(SCHEDULES)}; got {settings.schedule!r}")


def found_in(pattern: str, names: Iterable[str], *, setting: str) -> frozenset[str]:
    """The dotted names in which a regular expression is found.

    Raises:
      ValueError: No name has it, so it is mistyped or meant for another model; the message names `setting`.
    """
    names = list(names)
    found = frozenset(name for name in names if re.search(pattern, name))
    if not found:
        raise ValueError(
            f"{setting}: {pattern!r} is found in no parameter of this model, whose names are like {names[0]!r} and "
            f"{names[-1]!r}"
        )
    return found


def frozen_names(patterns: Sequence[str], names: Iterable[str]) -> frozenset[str]:
    """The parameters that the patterns of `optim.frozen` exclude from training.

    Raises:
      ValueError: A pattern is found in no name, or the patterns leave nothing to train.
    """
    names = list(names)
    frozen = frozenset().union(*(found_in(pattern, names, setting="optim.frozen") for pattern in patterns))
    if len(frozen) == len(names):
        raise ValueError(f"optim.frozen: {tuple(patterns)} leave no parameter to train")
    return frozen


def lr_factors(multipliers: Sequence[tuple[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Factor of each parameter's learning rate: the product over all patterns that are found in its name.

    Raises:
      ValueError: A pattern is found in no name.
    """
    names = list(names)
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in multipliers:
        for name in found_in(pattern, names, setting="optim.lr_multipliers"):
            factors[name] *= factor
    return factors


class Rule(NamedTuple):
    """The optimizer's rule for a parameter: whether to train it, whether to decay it, and its learning rate factor."""

    is_trained: bool
    decays: bool
    factor: float


def rules(settings: ConfigDict, names: Iterable[str], *, frozen: frozenset[str] | None = None) -> dict[str, Rule]:
    """The rule of each parameter by name.

    Args:
      settings: `config.optim`.
      names: Dotted names of all parameters of the model.
      frozen: Names of those that are not trained; by default `frozen_names` of `optim.frozen`.

    Raises:
      ValueError: A pattern is found in no name, or no parameter is left to train.
    """
    names = list(names)
    frozen = frozen_names(settings.frozen, names) if frozen is None else frozen
    no_decay = found_in(settings.no_decay, names, setting="optim.no_decay") if settings.no_decay else ()
    factors = lr_factors(settings.lr_multipliers, names)
    if settings.layer_decay != 1:
        depth_of = depths(names)
        deepest = max(depth_of.values())
        factors = {name: factors[name] * settings.layer_decay ** (deepest - depth_of[name]) for name in names}
    return {name: Rule(name not in frozen, name not in no_decay, factors[name]) for name in names}


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """All gradients times min(1, largest / (their joint norm + 1e-6)), as torch.nn.utils.clip_grad_norm_."""

    def update(gradients: optax.Updates, _params: optax.Params | None = None) -> optax.Updates:
        factor = jnp.minimum(1.0, largest / (norm(gradients) + 1e-6))
        return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients)

    return optax.stateless(update)


def norm(tree: Any) -> jax.Array:
    """Joint Euclidean norm of all leaves."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def _scale_by_rule(by_name: Mapping[str, Rule]) -> optax.GradientTransformation:
    def scaled(path: jax.tree_util.KeyPath, update: jax.Array) -> jax.Array:
        factor = by_name[path[0].key].factor
        return update if factor == 1 else factor * update

    return optax.stateless(lambda updates, _params=None: jax.tree.map_with_path(scaled, updates))


def _if_accepted(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`rule` with a further argument of `update`, the bool scalar `accepted`: if False, its state does not change."""

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        accepted: jax.Array | bool = True,
        **_,
    ) -> tuple[optax.Updates, optax.OptState]:
        changed, new = rule.update(updates, state, params)
        return changed, jax.tree.map(lambda new, old: jnp.where(accepted, new, old), new, state)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam inside `_if_accepted`, with the update computed from the moments after selection.

    Moments before selection would give equal accepted updates, but XLA would hold old and new moments at once:
    646 MiB more for SegFormer-B5, and the optimizer would take half as long again to compile.
    """
    plain = _if_accepted(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        accepted: jax.Array | bool = True,
        **_,
    ) -> tuple[optax.Updates, optax.OptState]:
        _, kept = plain.update(updates, state, params, accepted=accepted)
        assert isinstance(kept, optax.ScaleByAdamState)
        mean = optax.tree.bias_correction(kept.mu, b1, kept.count)
        square = optax.tree.bias_correction(kept.nu, b2, kept.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), kept

    return optax.GradientTransformationExtraArgs(plain.init, update)


class SettingError(ValueError):
    """Raised for a setting that the optimizer of optax cannot follow.

    Attributes:
      key: Dotted name of the setting.
      problem: Its value, and what it must be.
    """

    def __init__(self, key: str, problem: str):
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


def can_stack(settings: ConfigDict) -> bool:
    """Whether the optimizer treats each number by itself, so that parameters may be joined in one array.

    AdamW and SGD do. Optimizers of optax may read shapes and norms of whole parameters, as Muon and LARS do.
    """
    return settings.name in OWN


def check(settings: ConfigDict) -> None:
    """Checks the settings of an optimizer of optax without the parameters of a model; `settings` is `config.optim`.

    Raises:
      SettingError: The optimizer does not exist, or cannot follow a setting.
    """
    if settings.name in OWN:
        if settings.options:
            options = settings.options.to_dict()
            raise SettingError("optim.options", f"{options}; {settings.name} has settings of its own; omit it")
        return
    rule = _from_optax(settings, lambda step: 1e-3 * step, lambda tree: jax.tree.map(lambda _: True, tree))
    params = {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32), "bias": jax.ShapeDtypeStruct((4,), jnp.float32)}
    try:
        updates, state = jax.eval_shape(lambda params: rule.update(params, rule.init(params), params), params)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError("optim.name", f"{settings.name!r}; cannot be used for training: {reason}") from error
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise SettingError("optim.name", f"{settings.name!r}; returns no update of each parameter")
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise SettingError("optim.name", f"{settings.name!r}; keeps a random key, which no checkpoint can hold")


def _from_optax(
    settings: ConfigDict, rate: optax.Schedule, decays: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The optimizer of optax that `optim.name` names.

    Args:
      settings: `config.optim`.
      rate: Learning rate by step.
      decays: Function from a tree of parameters to bools of the same structure, False for those without decay.

    Raises:
      SettingError: As in `check`.
    """
    function, options = _function_of_optax(settings.name), settings.options.to_dict()
    parameters = inspect.signature(function).parameters
    arguments: dict[str, Any] = {"learning_rate": rate}
    if given := [name for name in options if name in _GIVEN]:
        raise SettingError("optim.options", f"{options}; {', '.join(given)} of {settings.name} are other settings")
    if unknown := [name for name in options if name not in parameters]:
        known = ", ".join(name for name in parameters if name not in _GIVEN)
        raise SettingError("optim.options", f"{options}; {settings.name} has no {', '.join(unknown)}; it has {known}")
    if "weight_decay" in parameters:
        arguments["weight_decay"] = settings.weight_decay
    elif settings.weight_decay:
        raise SettingError("optim.weight_decay", f"{settings.weight_decay}; {settings.name} has no weight decay; set 0")
    mask = next((name for name in ("mask", "weight_decay_mask") if name in parameters), None)
    if mask:
        arguments[mask] = decays
    elif settings.no_decay and settings.weight_decay:
        raise SettingError("optim.no_decay", f"{settings.no_decay!r}; {settings.name} decays all parameters; set ''")
    try:
        return function(**arguments, **options)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingError("optim.options", f"{options}; {settings.name} refuses them: {reason}") from error


def _function_of_optax(name: str) -> Callable[..., optax.GradientTransformation]:
    """The function of a dotted name, which has an argument `learning_rate`."""
    found: Any = optax
    *modules, last = name.split(".")[1:]
    for part in modules:
        found = getattr(found, part, None)
    function = getattr(found, last, None)
    # Some are partial functions; classes and types are callable, too.
    is_function = callable(function) and not isinstance(function, type)
    if not is_function or any(part.startswith("_") for part in (*modules, last)):
        close = difflib.get_close_matches(last, [word for word in dir(found) if not word.startswith("_")], n=1)
        hint = f"; did you mean {'.'.join(('optax', *modules, *close))}?" if close else ""
        raise SettingError("optim.name", f"{name!r}; optax {optax.__version__} has no such function{hint}")
    try:
        parameters = inspect.signature(cast("Callable[..., Any]", function)).parameters
    except (TypeError, ValueError):
        parameters = {}
    if "learning_rate" not in parameters:
        raise SettingError("optim.name", f"{name!r}; has no learning_rate, so it cannot follow the schedule")
    if last.startswith("schedule_free"):
        raise SettingError("optim.name", f"{name!r}; needs other weights for evaluation, and no schedule")
    return cast("Callable[..., optax.GradientTransformation]", function)


def optimizer(
    settings: ConfigDict, names: Iterable[str], *, steps: int, stacks: Stacks = NO_STACKS
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD as in torch, or an optimizer of optax, with the published exceptions by parameter name.

    Args:
      settings: `config.optim`.
      names: Dotted names of all parameters of the model. They include frozen ones: a pattern may match only those.
      steps: Length of the schedule in steps.
      stacks: Stacked parameters, which the optimizer also accepts in place of their members; see `can_stack`.

    Returns:
      Transform of the parameters that are not frozen. Its `update` takes the bool scalar `accepted`: if it is False,
      the state does not change, and the updates must not be used.

    Raises:
      ValueError: A pattern that is found in no parameter, or a model without known depths.
      SettingError: The optimizer does not exist, or cannot follow a setting.
    """
    by_name: dict[str, Any] = stacks.with_stacks(rules(settings, names))
    decays = partial(jax.tree.map_with_path, lambda path, _: by_name[path[0].key].decays)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decays)
    rate, by_rule = schedule(settings, steps=steps), _scale_by_rule(by_name)
    by_rate = _if_accepted(optax.scale_by_learning_rate(rate))
    if settings.name == "adamw":
        # torch's AdamW: decay is added to the moments' update, eps is outside the root, the learning rate scales both.
        rule = [_scale_by_adam(b1=settings.beta1, b2=settings.beta2, eps=settings.eps), decay, by_rule, by_rate]
    elif settings.name == "sgd":
        # torch's SGD: decay is part of the gradient that the momentum accumulates.
        rule = [decay, _if_accepted(optax.trace(decay=settings.momentum)), by_rule, by_rate]
    else:
        rule = [_if_accepted(_from_optax(settings, rate, decays)), by_rule]
    return optax.chain(*([clip_by_norm(settings.clip_norm)] if settings.clip_norm else []), *rule)


def learning_rates(
    settings: ConfigDict, names: Iterable[str], *, steps: int, frozen: frozenset[str] | None = None
) -> Callable[[int], dict[str, float]]:
    """Returns a function from a step to its learning rates for the log: "lr", and "lr x10" for a factor of 10.

    They are those of `optim.lr_multipliers`, before the decay by depth, which is the same at every step.

    Args:
      settings: `config.optim`.
      names: Dotted names of all parameters of the model; frozen ones have no rate.
      steps: Length of the schedule in steps.
      frozen: As for `rules`.
    """
    names = list(names)
    multipliers = lr_factors(settings.lr_multipliers, names)
    factors = sorted(
        {multipliers[name] for name, rule in rules(settings, names, frozen=frozen).items() if rule.is_trained} - {1.0}
    )
    base = schedule(settings, steps=steps)

    def rates(step: int) -> dict[str, float]:
        rate = float(np.asarray(base(step)))
        return {"lr": rate} | {f"lr x{factor:g}": rate * factor for factor in factors}

    return rates
