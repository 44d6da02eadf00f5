"""A model's weights as PyTorch state dicts, both ways, all or nothing.

The attribute names of our modules are the keys of the published checkpoints, so one rule converts every model: kernel
and scale are `weight`, mean and var are the running statistics, HWIO is OIHW transposed, (in, out) is (out, in). Other
packages' names are tables in `dialects.py`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.dialects import BATCH_COUNTER, DIALECTS, Dialect, Renaming, recognise

logger = logging.getLogger("segjax")

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# How training scripts wrap a state dict, and what torch's DataParallel puts before every key.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PARALLEL_PREFIX = "module."


class CheckpointError(ValueError):
    """A checkpoint that does not fit; the message lists everything that is wrong with it."""


# ------------------------------------------------------------------------------------- a model's weights by torch name


def named_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by dotted attribute path, for example "backbone.norm1.scale"."""
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def torch_name(path: str) -> str:
    """ "backbone.norm1.scale" -> "backbone.norm1.weight"."""
    module, _, tensor = path.rpartition(".")
    return f"{module}.{_TORCH_NAMES[tensor]}"


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


def to_torch(model: nnx.Module, *, dialect: str = "native") -> dict[str, np.ndarray]:
    """The model's weights as a state dict that strict-loads in the original.

    Args:
      dialect: whose names to write: "native", "hf" or "smp".

    Returns:
      Arrays under the dialect's keys in the model's param_dtype; `num_batches_tracked` is int64 0.

    Raises:
      CheckpointError: the dialect has no place for a weight of this model.
    """
    native = {}
    for path, variable in named_variables(model).items():
        native[torch_name(path)] = to_torch_layout(path, np.array(variable[...]))
        if path.endswith(".var"):
            native[path.removesuffix("var") + BATCH_COUNTER] = np.zeros((), np.int64)
    if dialect not in DIALECTS:
        raise KeyError(f"no dialect {dialect!r}; the dialects are {', '.join(DIALECTS)}")
    try:
        return recognise((), dialect=dialect)[1].to_foreign(native)
    except KeyError as error:
        raise CheckpointError(f"{DIALECTS[dialect].package} has no place for {error.args[0]}") from None


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
        except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
            kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}"
            raise CheckpointError(f"{key}: a {kind} that cannot be read as numbers ({error})") from None
        if array is None or not isinstance(key, str):
            strangers.append(f"{key}: {type(value).__name__}")
        else:
            arrays[key] = array
    if strangers or not arrays:
        found = f"it holds {shorten(strangers)}" if strangers else "it is empty"
        raise CheckpointError(f"this is not a state dict (names to arrays): {found}")
    if all(key.startswith(_PARALLEL_PREFIX) for key in arrays):
        arrays = {key.removeprefix(_PARALLEL_PREFIX): value for key, value in arrays.items()}
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
    found, renaming, _ = recognise(foreign, dialect=dialect)
    # A lone pattern is meant as one, not as its letters.
    drop, keep = ((patterns,) if isinstance(patterns, str) else tuple(patterns) for patterns in (drop, keep))
    plan = _plan(model, foreign, found, renaming, drop=drop, keep=keep)
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


def _plan(
    model: nnx.Module, foreign: dict[str, np.ndarray], dialect: Dialect, renaming: Renaming, *, drop: tuple, keep: tuple
) -> _Plan:
    variables = named_variables(model)
    shapes = {path: _torch_shape(path, variable.get_value().shape) for path, variable in variables.items()}
    # Comparing in the checkpoint's own names lets every message name a key that its owner can find.
    expected: dict[str, tuple[int, ...]] = {}
    owner: dict[str, str] = {}
    counters = set()
    for path, shape in shapes.items():
        blank = np.broadcast_to(np.zeros((), np.int8), shape)
        for key, part in renaming.to_foreign({torch_name(path): blank}).items():
            expected[key], owner[key] = part.shape, path
        if path.endswith(".var"):
            counters |= set(renaming.foreign_names(path.removesuffix("var") + BATCH_COUNTER))
    dropped = sorted(key for key in foreign if _matches(key, drop) or _matches(key, dialect.unused))
    given = {key: value for key, value in foreign.items() if key not in set(dropped) | counters}
    missing = [key for key in expected if key not in given]
    kept = sorted({owner[key] for key in missing if any(_matches(n, keep) for n in _names_of(key, owner[key]))})
    missing = [key for key in missing if owner[key] not in kept]
    unexpected = [key for key in given if key not in expected]
    misshapen = [
        f"{key}: checkpoint {given[key].shape}, model {shape}"
        for key, shape in expected.items()
        if key in given and given[key].shape != shape
    ]
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
            ("of another shape", misshapen),
            ("not floating point", not_floats),
        )
        if found
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint (read as {dialect.name}: {dialect.package}) does not fit {model.spec.name} with "
            f"{model.spec.num_classes} classes; nothing was loaded.\n  "
            + "\n  ".join(problems)
            + _advice(missing, unexpected)
        )
    native = renaming.to_native({key: given[key] for key in expected if owner[key] not in kept})
    values = {path: from_torch_layout(path, native[torch_name(path)]) for path in variables if path not in set(kept)}
    return _Plan(values=values, dropped=dropped, kept=kept)


def _names_of(key: str, path: str) -> tuple[str, str, str]:
    """A parameter as the checkpoint, our modules and the native state dict name it."""
    return key, path, torch_name(path)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _advice(missing: list[str], unexpected: list[str]) -> str:
    lines = []
    if missing:
        lines.append("to leave parameters as they are initialised: keep=(pattern, ...), for example 'decode_head.*'")
    if unexpected:
        lines.append("to leave keys of the checkpoint unused: drop=(pattern, ...), for example 'head.*'")
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


def _own(value: np.ndarray, variable: nnx.Variable) -> jax.Array:
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
    alone `num_classes` must be given; its decoder stays as initialised.

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
    found, renaming, _ = recognise(foreign, dialect=dialect)
    native = renaming.to_native(foreign)
    read = _read_segformer(foreign, native)
    logger.info("read as %s (%s)", found.name, found.package)
    has_head = any(key.startswith("decode_head.") for key in native)
    in_file = read.pop("num_classes", None)
    if num_classes is None and in_file is None:
        raise CheckpointError("the checkpoint is a backbone alone and has no classifier; give the number of classes")
    if num_classes is not None and in_file is not None and num_classes != in_file:
        raise CheckpointError(
            f"the checkpoint has {in_file} classes, not {num_classes}; to put a new classifier on its weights, create "
            "the model and call load_torch with drop and keep"
        )
    for setting, value in found.settings:
        if setting not in overrides:
            read[setting] = value
            logger.info("assumed %s=%s: a checkpoint does not tell; published for %s", setting, value, found.package)
    name = _nearest_variant(read) if name == "auto" else name
    defaults = models.settings(name)
    wrong = [
        f"{key} is {read[key]}, in {name} {defaults[key]}"
        for key in ("dims", "depths")
        if key not in overrides and defaults[key] != read[key]
    ]
    if wrong and name != (nearest := _nearest_variant(read)):
        raise CheckpointError(
            f"the checkpoint is not {name}: {'; '.join(wrong)}. The nearest model is {nearest}; "
            "or pass the sizes as overrides"
        )
    if not has_head and "decoder_dim" not in overrides:
        logger.info("the decoder is as wide as in %s: %s", name, defaults["decoder_dim"])
    changed = {key: value for key, value in read.items() if defaults[key] != value} | overrides
    arguments = dict(num_classes=num_classes or in_file, dtype=dtype, param_dtype=param_dtype)
    if changed:
        logger.info("unlike %s: %s", name, ", ".join(f"{key}={value}" for key, value in sorted(changed.items())))
    if not has_head:
        # The decoder keeps its random weights, so the model must really be initialised.
        model = models.create(name, **arguments, **changed)
        logger.info("a backbone alone: the decoder stays as initialised")
        load_torch(model, foreign, dialect=found.name, drop=found.backbone_extras, keep=("decode_head.*",))
        return model
    model = nnx.eval_shape(lambda: models.create(name, **arguments, **changed))
    plan = _plan(model, foreign, found, renaming, drop=(), keep=())
    _announce(plan)
    return from_values(model, plan.values)


def from_values(abstract: nnx.Module, values: Mapping[str, np.ndarray]) -> nnx.Module:
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


def _read_segformer(foreign: Mapping[str, np.ndarray], native: Mapping[str, np.ndarray]) -> dict[str, object]:
    """Sizes of a SegFormer from its keys and shapes; `num_classes` and `decoder_dim` only where there is a decoder."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in native:
            raise CheckpointError(
                f"the checkpoint fits no model of segjax. The nearest family is SegFormer, for which it lacks {key} "
                f"(or its name in another dialect); its own keys are {shorten(foreign, most=6)}. "
                f"{len(native)} of its {len(foreign)} keys have a place in a SegFormer"
            )
        return native[key].shape

    dims = tuple(shape(f"backbone.patch_embed{s}.proj.weight")[0] for s in range(1, 5))
    depths = tuple(
        next(b for b in range(len(native) + 1) if f"backbone.block{s}.{b}.norm1.weight" not in native)
        for s in range(1, 5)
    )
    if 0 in depths:
        shape(f"backbone.block{depths.index(0) + 1}.0.norm1.weight")
    first_blocks = [f"backbone.block{s}.0" for s in range(1, 5)]
    hidden = [shape(f"{block}.mlp.fc1.weight")[0] for block in first_blocks]
    read: dict[str, object] = {
        "dims": dims,
        "depths": depths,
        "mlp_ratios": tuple(
            width // dim if width % dim == 0 else width / dim for width, dim in zip(hidden, dims, strict=True)
        ),
        "sr_ratios": tuple(
            native[key].shape[-1] if (key := f"{block}.attn.sr.weight") in native else 1 for block in first_blocks
        ),
    }
    if any(key.startswith("decode_head.") for key in native):
        read["decoder_dim"] = shape("decode_head.linear_c1.proj.weight")[0]
        read["num_classes"] = shape("decode_head.linear_pred.weight")[0]
    return read


def _nearest_variant(read: Mapping[str, object]) -> str:
    """The name in MODELS with most of the sizes that were read, the backbone first; the smallest of several."""

    def fit(name: str) -> tuple[int, int]:
        settings = models.settings(name)
        agreeing = [key for key, value in read.items() if settings[key] == value]
        return sum(key in ("dims", "depths") for key in agreeing), len(agreeing)

    return max(models.MODELS, key=fit)
