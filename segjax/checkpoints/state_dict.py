"""A model's weights as PyTorch state dicts, both ways, all or nothing.

The attribute names of our modules are the keys of the published checkpoints, so one rule converts every model: kernel
and scale are `weight`, mean and var are the running statistics, HWIO is OIHW transposed, (in, out) is (out, in). Other
packages' names are tables in `dialects.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints.architectures import (
    ENCODER_SIZES,
    FAMILIES,
    MissingKeyError,
    UnreadableShapeError,
    family_of,
    matches,
    nearest_variant,
)
from segjax.checkpoints.key_maps import BATCH_COUNTER, DIALECTS, FORMS, OF_VARIANT, Form
from segjax.checkpoints.renaming import RENAMINGS, Recognised, dialects_of, recognise

logger = logging.getLogger("segjax")

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# How training scripts wrap a state dict, and what torch's DataParallel, or a wrapper of a network and its loss, puts
# before every key.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.")


class CheckpointError(ValueError):
    """A checkpoint that does not fit; the message lists everything that is wrong with it."""


class MisfitError(CheckpointError):
    """Keys that are missing, unexpected or misshapen.

    Attributes:
      problems: the message without advice on what to do.
      parameters: those of the model, by torch name, that are missing from the checkpoint or of another shape there.
      unexpected: keys of the checkpoint that the model has no place for.
    """

    def __init__(self, problems: str, advice: str, *, parameters: list[str], unexpected: list[str]):
        super().__init__(problems + advice)
        self.problems, self.parameters, self.unexpected = problems, parameters, unexpected


# ------------------------------------------------------------------------------------- a model's weights by torch name


def named_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by dotted attribute path, for example "backbone.norm1.scale"."""
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def torch_name(path: str) -> str:
    """ "backbone.norm1.scale" -> "backbone.norm1.weight"; a name that is torch's own stays."""
    module, _, tensor = path.rpartition(".")
    return f"{module}.{_TORCH_NAMES.get(tensor, tensor)}"


def to_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW and (in, out) -> (out, in) for a kernel; anything else as it is."""
    if not path.endswith(".kernel"):
        return value
    return np.ascontiguousarray(value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0)))


def from_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if not path.endswith(".kernel"):
        return value
    return np.ascontiguousarray(value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0)))


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return to_torch_layout(path, np.broadcast_to(np.zeros((), np.int8), shape)).shape


def parameters_of(model: nnx.Module, *, encoder_alone: bool = False) -> int:
    """How many numbers are learned; running statistics are not."""
    in_head = FAMILIES[family_of(model.spec.name)].in_head
    return sum(
        variable.get_value().size
        for path, variable in named_variables(model).items()
        if isinstance(variable, nnx.Param) and not (encoder_alone and in_head(torch_name(path)))
    )


def model_record(model: nnx.Module) -> dict[str, object]:
    """How to build the model again, as JSON."""
    variables = named_variables(model).values()
    (param_dtype,) = {variable.get_value().dtype for variable in variables if isinstance(variable, nnx.Param)}
    return {
        "name": model.spec.name,
        "num_classes": model.spec.num_classes,
        "overrides": {key: list(value) if isinstance(value, tuple) else value for key, value in model.spec.overrides},
        "param_dtype": str(param_dtype),
    }


def to_torch(model: nnx.Module, *, dialect: str = "native") -> dict[str, np.ndarray]:
    """The model's weights as a state dict that strict-loads in the original.

    Args:
      dialect: whose names to write, one of `segjax.dialects.DIALECTS`. "backbone" and "timm" have no place for a
        decoder; what they leave out is an INFO line of the logger `segjax`.

    Returns:
      Arrays under the dialect's keys in the model's param_dtype; `num_batches_tracked` is int64 0.

    Raises:
      CheckpointError: the dialect has no form for this family of models.
      KeyError: unknown dialect.
    """
    form = form_of(model, dialect)
    native = {}
    for path, variable in named_variables(model).items():
        native[torch_name(path)] = to_torch_layout(path, np.array(variable[...]))
        if path.endswith(".var"):
            native[path.removesuffix("var") + BATCH_COUNTER] = np.zeros((), np.int64)
    if form.encoder_only:
        head = [key for key in native if FAMILIES[form.family].in_head(key)]
        native = {key: value for key, value in native.items() if key not in head}
        parts = dict.fromkeys(key.rpartition(".")[0] for key in head)
        logger.info("left out, because %s has no place for it (%d): %s", form.package, len(head), shorten(parts))
    if form.note:
        logger.info("note on %s: %s", form.package, form.note)
    for layer, norm in form.without_bias:
        logger.info("%s.bias is taken from the running mean of %s: %s has no bias there", layer, norm, form.package)
    return RENAMINGS[form.dialect, form.family][0].to_foreign(native)


def form_of(model: nnx.Module, dialect: str) -> Form:
    """How `dialect` writes the family of `model`.

    Raises:
      CheckpointError: it does not. KeyError: unknown dialect.
    """
    if dialect not in DIALECTS:
        raise KeyError(f"no dialect {dialect!r}; the dialects are {', '.join(DIALECTS)}")
    family = family_of(model.spec.name)
    for form in FORMS:
        if (form.dialect, form.family) == (dialect, family):
            return form
    raise CheckpointError(
        f"{model.spec.name} cannot be written as {dialect}, which has no network that computes the same; "
        f"{FAMILIES[family].title} can be written as {dialects_of(family)}"
    )


# ------------------------------------------------------------------------------------------------ state dicts as given


def as_arrays(state_dict: Mapping) -> dict[str, np.ndarray]:
    """Unwraps what training scripts save and turns torch tensors into numpy arrays, without importing torch.

    Raises:
      CheckpointError: no mapping of names to arrays is found inside.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"expected a state dict (names to arrays) but got {type(state_dict).__name__}; "
            "save model.state_dict(), not the model"
        )
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            return as_arrays(state_dict[wrapper])
    arrays, strangers = {}, []
    for key, value in state_dict.items():
        try:
            array = _as_array(value)
        except (TypeError, RuntimeError, AttributeError) as error:
            # torch's own for a tensor that numpy cannot hold: sparse, quantized, without storage, float8.
            kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}"
            raise CheckpointError(f"{key}: a {kind} that cannot be read as numbers ({error})") from None
        if array is None or not isinstance(key, str):
            strangers.append(f"{key}: {type(value).__name__}")
        else:
            arrays[key] = array
    if strangers or not arrays:
        found = f"it holds {shorten(strangers)}" if strangers else "it is empty"
        raise CheckpointError(f"this is not a state dict (names to arrays): {found}")
    for prefix in _PREFIXES:
        # Not all: beside the network there may be a loss with weights of its own.
        if 2 * sum(key.startswith(prefix) for key in arrays) > len(arrays):
            arrays = {key.removeprefix(prefix): value for key, value in arrays.items()}
    return arrays


def _as_array(value) -> np.ndarray | None:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value)
    if not hasattr(value, "detach"):
        return None
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        # numpy has no bfloat16; jax's is bit for bit torch's.
        return tensor.contiguous().view(torch_module().int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def torch_module():
    try:
        import torch
    except ModuleNotFoundError:
        raise CheckpointError(
            "reading and writing .pth files needs PyTorch, which is not installed: "
            'pip install "segjax[parity]" (or convert a .safetensors file, which needs nothing)'
        ) from None
    return torch


def shorten(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# ------------------------------------------------------------------------------------------------------ PyTorch -> ours


def load_torch(
    model: nnx.Module,
    state_dict: Mapping,
    *,
    dialect: str = "auto",
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> None:
    """Writes a PyTorch state dict into `model`: everything, or nothing and one error that lists every mismatch.

    Args:
      model: from `segjax.create`.
      state_dict: numpy arrays or torch tensors under the names of any dialect, wrapped or not.
      dialect: "auto", or one of `segjax.dialects.DIALECTS` to insist.
      drop: patterns ("head.*") of checkpoint keys that are not used.
      keep: patterns ("decode_head.*") of the model's parameters that stay as they are where the checkpoint lacks them.

    Raises:
      CheckpointError: missing, unexpected and misshapen keys, all of them; the model is unchanged.
      KeyError: unknown dialect.
    """
    foreign = as_arrays(state_dict)
    found = recognise(foreign, dialect=dialect, family=family_of(model.spec.name))
    # A lone pattern is meant as one, not as its letters.
    drop, keep = ((patterns,) if isinstance(patterns, str) else tuple(patterns) for patterns in (drop, keep))
    plan = _plan(model, foreign, found, drop=drop, keep=keep)
    if not plan.values:
        raise CheckpointError("drop and keep leave nothing of the checkpoint to load")
    _announce(plan)
    nnx.update(model, _filled(model, plan.values))


@dataclasses.dataclass
class _Plan:
    """A validated load: values in our layout by attribute path, and what is said about the rest."""

    values: dict[str, np.ndarray]
    dropped: list[str]
    kept: list[str]


def _plan(model: nnx.Module, foreign: dict[str, np.ndarray], found: Recognised, *, drop: tuple, keep: tuple) -> _Plan:
    renaming = found.renaming
    variables = named_variables(model)
    paths = {torch_name(path): path for path in variables}
    # Comparing in the checkpoint's own names lets every message name a key that its owner can find. What the dialect
    # has no name for (a decoder, where it knows encoders alone) goes by ours.
    blank = np.zeros((), np.int8)
    blanks = {
        key: np.broadcast_to(blank, _torch_shape(path, variables[path].get_value().shape))
        for key, path in paths.items()
    }
    groups = renaming.groups(blanks)
    without_bias = {bias: mean for bias, mean in renaming.folded if bias in blanks}
    placed = {key for group in groups for key in group.native}
    owners = {key: group.native for group in groups for key in group.foreign if group.native[0] not in without_bias}
    owners |= {key: (key,) for key in blanks if key not in placed}
    expected = renaming.to_foreign({key: value for key, value in blanks.items() if key in placed})
    expected = {key: value.shape for key, value in expected.items()}
    expected |= {key: blanks[key].shape for key in blanks if key not in placed}
    counters = {
        name
        for key in blanks
        if key.endswith(".running_var")
        for name in renaming.foreign_names(key.removesuffix("running_var") + BATCH_COUNTER)
    }
    dropped = sorted(key for key in foreign if matches(key, drop) or matches(key, found.form.unused))
    given = {key: value for key, value in foreign.items() if key not in set(dropped) | counters}
    missing = [key for key in expected if key not in given]
    kept = {
        native
        for key in missing
        if any(matches(name, keep) for name in (key, *owners[key], *(paths[native] for native in owners[key])))
        for native in owners[key]
    }
    missing = [key for key in missing if not kept.issuperset(owners[key])]
    kept |= {bias for bias, mean in without_bias.items() if mean in kept}
    unexpected = [key for key in given if key not in expected]
    misshapen = [key for key, shape in expected.items() if key in given and given[key].shape != shape]
    not_floats = [
        f"{key}: {value.dtype}"
        for key, value in given.items()
        if key in expected and not jnp.issubdtype(value.dtype, jnp.floating)
    ]
    problems = [
        f"{len(found)} {kind}:\n" + "\n".join(f"    {line}" for line in found)
        for kind, found in (
            ("missing from the checkpoint", missing),
            ("unexpected in the checkpoint", unexpected),
            ("of another shape", [f"{k}: checkpoint {given[k].shape}, model {expected[k]}" for k in misshapen]),
            ("not floating point", not_floats),
        )
        if found
    ]
    if problems:
        raise MisfitError(
            f"the checkpoint (read as {found.form.dialect}: {found.form.package}) does not fit {model.spec.name} with "
            f"{model.spec.num_classes} classes; nothing was loaded.\n  " + "\n  ".join(problems),
            _advice(missing, unexpected, FAMILIES[found.form.family].head[0]),
            parameters=[native for key in (*missing, *misshapen) for native in owners[key]],
            unexpected=unexpected,
        )
    native = renaming.to_native({key: given[key] for key in expected if not kept.intersection(owners[key])})
    values = {path: from_torch_layout(path, native[key]) for key, path in paths.items() if key not in kept}
    return _Plan(values=values, dropped=dropped, kept=sorted(paths[key] for key in kept))


def _advice(missing: list[str], unexpected: list[str], head: str) -> str:
    lines = []
    if missing:
        lines.append(
            f"to leave parameters as they are initialised, load_torch takes keep=(pattern, ...), as in {head!r}"
        )
    if unexpected:
        lines.append("to leave keys of the checkpoint unused, load_torch takes drop=(pattern, ...), as in 'head.*'")
    return "".join(f"\n  {line}" for line in lines)


def _announce(plan: _Plan) -> None:
    if plan.dropped:
        logger.info("not used from the checkpoint (%d): %s", len(plan.dropped), shorten(plan.dropped))
    if plan.kept:
        # By layer: a list of every kernel and bias hides what it says.
        kept = dict.fromkeys(path.rpartition(".")[0] for path in plan.kept)
        logger.info("left as initialised (%d): %s", len(plan.kept), shorten(kept))


def _filled(model: nnx.Module, values: Mapping[str, np.ndarray]) -> nnx.State:
    """The model's state with `values` put in, in the model's own storage dtypes."""
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))):
        value = values.get(".".join(map(str, path)))
        if value is not None:
            variable = variable.replace(_own(value, variable))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def _own(value: np.ndarray | jax.Array, variable: nnx.Variable) -> jax.Array:
    """A copy in the variable's dtype: jnp.asarray may share memory with a tensor that its owner goes on changing."""
    return jnp.array(value, variable.get_value().dtype, copy=True)


# ---------------------------------------------------------------------------------------- a model made for a checkpoint


def from_torch(
    state_dict: Mapping,
    *,
    name: str = "auto",
    dialect: str = "auto",
    num_classes: int | None = None,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    **overrides,
) -> nnx.Module:
    """Builds the model that a checkpoint belongs to and loads it.

    Sizes and the number of classes are read off the shapes. What no checkpoint tells (heads, eps) is the published
    setting of the dialect, or an override; each such assumption is an INFO line of the logger `segjax`. For a backbone
    alone `num_classes` must be given; its decoder stays as initialised. Streams of dropout and of random bases start
    from key 0.

    Args:
      state_dict: as for `load_torch`.
      name: a name of `segjax.MODELS`, to insist on one.
      dialect: "auto", or a dialect's name to insist on one.
      num_classes: checked against the checkpoint where it has a classifier.
      dtype, param_dtype, **overrides: as for `segjax.create`.

    Raises:
      CheckpointError: the file fits no model; says which is nearest and what differs.
      KeyError: unknown name or dialect.
    """
    foreign = as_arrays(state_dict)
    if name != "auto":
        models.settings(name)
    found = recognise(foreign, dialect=dialect, family=None if name == "auto" else family_of(name))
    family = FAMILIES[found.form.family]
    native = found.renaming.to_native(foreign)
    try:
        read, in_file = family.read(native)
    except MissingKeyError as error:
        raise CheckpointError(_no_fit(foreign, found, error.args[0])) from None
    except UnreadableShapeError as error:
        (key,) = error.args
        raise CheckpointError(
            f"{' and '.join(found.renaming.foreign_names(key))}: {family.title} has no shape {native[key].shape} there "
            f"(the checkpoint was read as {found.form.dialect}: {found.form.package})"
        ) from None
    logger.info("read as %s (%s)", found.form.dialect, found.form.package)
    if found.form.note:
        logger.info("note on %s: %s", found.form.package, found.form.note)
    if num_classes is None and in_file is None:
        raise CheckpointError("the checkpoint is a backbone alone and has no classifier; give the number of classes")
    if num_classes is not None and in_file is not None and num_classes != in_file:
        raise CheckpointError(
            f"the checkpoint has {in_file} classes, not {num_classes}; to put a new classifier on its weights, create "
            "the model and call load_torch with drop and keep"
        )
    nearest = nearest_variant(family, read)
    name = nearest if name == "auto" else name
    defaults = models.settings(name)
    read |= _assumed(found.form, name, overrides)
    wrong = [
        f"{key} is {read[key]}, in {name} {defaults[key]}"
        for key in ENCODER_SIZES
        if key in read and key not in overrides and defaults[key] != read[key]
    ]
    if wrong and name != nearest:
        raise CheckpointError(
            f"the checkpoint is not {name}: {'; '.join(wrong)}. The nearest model is {nearest}; "
            "or pass the sizes as overrides"
        )
    for setting in ("decoder_dim", "ham_channels"):
        if in_file is None and setting in defaults and setting not in overrides:
            logger.info("the decoder is as wide as in %s: %s", name, defaults[setting])
    changed = {key: value for key, value in (read | overrides).items() if key not in defaults or defaults[key] != value}
    classes = in_file if num_classes is None else num_classes

    def create():
        try:
            return models.create(name, num_classes=classes, dtype=dtype, param_dtype=param_dtype, **changed)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's sizes make no {name}: {error}") from None

    if changed:
        logger.info("unlike %s: %s", name, ", ".join(f"{key}={value}" for key, value in sorted(changed.items())))
    model = nnx.eval_shape(create)
    alone = in_file is None
    if alone:
        logger.info("a backbone alone: the decoder stays as initialised")
    plan = _plan(
        model,
        foreign,
        found,
        drop=found.form.backbone_extras if alone else (),
        keep=family.head if alone else (),
    )
    _announce(plan)
    return from_values(model, plan.values | (_initial(create, plan.kept) if alone else {}))


def has_classifier(state_dict: Mapping, *, dialect: str = "auto") -> bool:
    """Whether a checkpoint has more than an encoder."""
    keys = as_arrays(state_dict).keys()
    found = recognise(keys, dialect=dialect)
    in_head = FAMILIES[found.form.family].in_head
    return any(in_head(key) for group in found.renaming.groups(keys, foreign=True) for key in group.native)


def _initial(create: Callable[[], nnx.Module], paths: list[str]) -> dict[str, jax.Array]:
    """Initial values at these paths of the model that `create` makes."""

    def draw():
        variables = named_variables(create())
        return {path: variables[path].get_value() for path in paths}

    # As one program, from which the compiler strikes the rest of the model: `create` itself compiles one a shape, 20 s.
    return jax.jit(draw)()


def _assumed(form: Form, name: str, overrides: Mapping[str, object]) -> dict[str, object]:
    """The settings that a checkpoint of this form cannot tell, each said out loud; those in `overrides` are known."""
    assumed = {}
    for setting, value in form.settings:
        if setting in overrides:
            continue
        source = name if value is OF_VARIANT else form.package
        assumed[setting] = models.settings(name)[setting] if value is OF_VARIANT else value
        logger.info("assumed %s=%s: a checkpoint does not tell; published for %s", setting, assumed[setting], source)
    return assumed


def _no_fit(foreign: Mapping[str, np.ndarray], found: Recognised, missing: str) -> str:
    """Why a state dict without the native key `missing` fits no model: the nearest family, and what differs."""
    strangers = [key for key in foreign if not found.renaming.fits(key)]
    lacking = found.renaming.foreign_names(missing) or (missing,)
    differences = f"it lacks {' and '.join(lacking)}"
    if strangers:
        differences += f", and there is no place for {shorten(strangers, most=6)}"
    free = recognise(foreign)
    if free.fitting > found.fitting:
        # A name or a dialect was insisted on.
        return (
            f"the checkpoint is not {FAMILIES[found.form.family].title} as {found.form.dialect} "
            f"({found.form.package}) writes it: {differences}. It looks like {FAMILIES[free.form.family].title} as "
            f"{free.form.dialect} ({free.form.package}) writes it: {free.fitting} of {len(foreign)} keys fit"
        )
    return (
        f"the checkpoint fits no model of segjax. The nearest family is {FAMILIES[found.form.family].title} as "
        f"{found.form.dialect} ({found.form.package}) writes it: {found.fitting} of {len(foreign)} keys have a place "
        f"there, but {differences}"
    )


def from_values(abstract: nnx.Module, values: Mapping[str, np.ndarray | jax.Array]) -> nnx.Module:
    """A concrete model from an abstract one whose every parameter is in `values`; random streams start from key 0."""
    graphdef, weights, streams = nnx.split(abstract, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    flat = []
    for path, variable in nnx.to_flat_state(weights):
        flat.append((path, variable.replace(_own(values[".".join(map(str, path))], variable))))
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(nnx.to_flat_state(streams)) + 1))
    drawn = []
    for path, variable in nnx.to_flat_state(streams):
        is_key = isinstance(variable, nnx.RngKey)
        drawn.append((path, variable.replace(next(keys) if is_key else jnp.zeros((), jnp.uint32))))
    model = nnx.merge(graphdef, nnx.from_flat_state(flat), nnx.from_flat_state(drawn))
    return model
