"""Converts weights of segjax's models to PyTorch state dicts and back; loads all weights or none.

`segjax.checkpoints.layout` has the rule that converts every model; `segjax.checkpoints.key_maps` renames the keys of
other packages.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints import layout
from segjax.checkpoints.architectures import (
    ENCODER_SIZES,
    FAMILIES,
    MissingKeyError,
    UnreadableShapeError,
    family_of,
    matches,
    nearest_variant,
)
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError, shorten
from segjax.checkpoints.key_maps import (
    BATCH_COUNTER,
    DIALECTS,
    KEY_FORMATS,
    NEXT_TO_NETWORK,
    OF_VARIANT,
    KeyFormat,
)
from segjax.checkpoints.layout import torch_name
from segjax.checkpoints.recognition import Recognised, dialects_of
from segjax.checkpoints.renaming import Renaming, renamings
from segjax.checkpoints.selection import log_unused
from segjax.checkpoints.soundness import refuse_unsound
from segjax.models.segmentation_model import SegmentationModel

logger = logging.getLogger("segjax")


class MisfitError(CheckpointError):
    """A checkpoint with keys that are missing, unexpected or of another shape.

    Attributes:
      problems: The message without advice.
      parameters: Parameters of the model, by native key, that are missing from the checkpoint or have another shape.
      unexpected: Keys of the checkpoint that the model does not have.
    """

    def __init__(self, problems: str, advice: str, *, parameters: list[str], unexpected: list[str]):
        super().__init__(problems + advice)
        self.problems, self.parameters, self.unexpected = problems, parameters, unexpected


# -------------------------------------------------------------------------------------------------- weights of a model


def named_variables(model: SegmentationModel) -> dict[str, nnx.Variable]:
    """Parameters and running statistics by dotted attribute path, for example "backbone.norm1.scale"."""
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def parameters_of(model: SegmentationModel, *, encoder_only: bool = False) -> int:
    """Number of learned parameters; running statistics do not count."""
    in_head = FAMILIES[family_of(model.spec.name)].in_head
    return sum(
        variable.get_value().size
        for path, variable in named_variables(model).items()
        if isinstance(variable, nnx.Param) and not (encoder_only and in_head(torch_name(path)))
    )


def settings_of(model: SegmentationModel) -> dict[str, Any]:
    """Every setting of a model: the defaults of its name, and its overrides."""
    return models.settings(model.spec.name) | dict(model.spec.overrides)


def model_metadata(model: SegmentationModel) -> dict[str, Any]:
    """The arguments to build the model again, as JSON."""
    variables = named_variables(model).values()
    (param_dtype,) = {variable.get_value().dtype for variable in variables if isinstance(variable, nnx.Param)}
    return {
        "name": model.spec.name,
        "num_classes": model.spec.num_classes,
        "overrides": {key: list(value) if isinstance(value, tuple) else value for key, value in model.spec.overrides},
        "param_dtype": str(param_dtype),
    }


def to_torch(model: SegmentationModel, *, dialect: str = "native") -> dict[str, np.ndarray]:
    """The weights of a model as a state dict, which the original package loads with `strict=True`.

    Args:
      model: The model.
      dialect: Key format, one of `segjax.checkpoints.key_maps.DIALECTS`. "backbone" and "timm" have no decoder: an INFO
        line of the logger `segjax` lists the omitted layers.

    Returns:
      Arrays in the model's param_dtype under the dialect's keys; `num_batches_tracked` is int64 0.

    Raises:
      CheckpointError: The dialect has no keys for this family of models.
      KeyError: The dialect is unknown.

    Example:
      >>> import segjax
      >>> model = segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> segjax.to_torch(model, dialect="hf")["decode_head.classifier.weight"].shape
      (5, 8, 1, 1)
    """
    key_format = key_format_of(model, dialect)
    native = {}
    for path, variable in named_variables(model).items():
        native[torch_name(path)] = layout.to_torch_layout(path, np.array(variable[...]))
        if path.endswith(".var"):
            native[path.removesuffix("var") + BATCH_COUNTER] = np.zeros((), np.int64)
    if key_format.encoder_only:
        head = [key for key in native if FAMILIES[key_format.family].in_head(key)]
        native = {key: value for key, value in native.items() if key not in head}
        modules = dict.fromkeys(key.rpartition(".")[0] for key in head)
        logger.info("omitted, no place for them in %s (%d): %s", key_format.package, len(head), shorten(modules))
    _log_note(key_format)
    for convolution, norm in key_format.without_bias:
        logger.info("%s has no %s.bias: it goes into the running mean of %s", key_format.package, convolution, norm)
    return renamings(key_format)[0].to_foreign(native)


def key_format_of(model: SegmentationModel, dialect: str) -> KeyFormat:
    """The key format of a dialect for the family of `model`.

    Raises:
      CheckpointError: The dialect has none for this family.
      KeyError: The dialect is unknown.
    """
    if dialect not in DIALECTS:
        raise KeyError(f"no dialect {dialect!r}; the dialects are {', '.join(DIALECTS)}")
    family = family_of(model.spec.name)
    for key_format in KEY_FORMATS:
        if (key_format.dialect, key_format.family) == (dialect, family):
            return key_format
    raise CheckpointError(
        f"{model.spec.name} cannot be written as {dialect}, which has no equivalent network; "
        f"{FAMILIES[family].title} can be written as {dialects_of(family)}"
    )


def log_recognised(found: Recognised) -> None:
    logger.info("read as %s (%s)", found.key_format.dialect, found.key_format.package)
    _log_note(found.key_format)


def _log_note(key_format: KeyFormat) -> None:
    if key_format.note:
        logger.info("note on %s: %s", key_format.package, key_format.note)


# ----------------------------------------------------------------------------------------------------- PyTorch -> model


def load_torch(
    model: SegmentationModel,
    state_dict: Mapping | Checkpoint,
    *,
    dialect: str = "auto",
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
) -> list[str]:
    """Loads a PyTorch state dict into `model`: all weights, or none and one error that lists every mismatch.

    Args:
      model: Model from `segjax.create`.
      state_dict: numpy arrays or torch tensors with the keys of any dialect, possibly wrapped by a training script.
      dialect: One of `segjax.checkpoints.key_maps.DIALECTS` to allow only this one; "auto" for any.
      drop: Patterns ("head.*") of checkpoint keys that are not used.
      keep: Patterns ("decode_head.*") of model parameters that stay unchanged if the checkpoint lacks them.

    Returns:
      Dotted paths of the parameters and running statistics that stayed unchanged.

    Raises:
      CheckpointError: Keys are missing, unexpected or misshapen (all are listed), or weights are not finite; the
        model is unchanged.
      KeyError: The dialect is unknown.

    Example:
      >>> import segjax
      >>> first, second = (
      ...     segjax.create("segformer_b0", num_classes=k, dims=(4, 8, 10, 16), decoder_dim=8) for k in (5, 7)
      ... )
      >>> kept = segjax.load_torch(
      ...     second, segjax.to_torch(first, dialect="hf"), drop=["decode_head.classifier.*"], keep=["*classifier*"]
      ... )
      >>> len(kept)
      2
    """
    checkpoint = Checkpoint.of(state_dict).read_as(dialect=dialect, family=family_of(model.spec.name))
    plan = _plan(model, checkpoint, drop=_patterns(drop), keep=_patterns(keep))
    if not plan.values:
        raise CheckpointError("drop and keep leave nothing of the checkpoint to load")
    _log_plan(plan)
    nnx.update(model, _filled(model, plan.values))
    return plan.kept


def _patterns(given: Iterable[str]) -> tuple[str, ...]:
    # A single string is one pattern, not its letters.
    return (given,) if isinstance(given, str) else tuple(given)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Weights that were checked and can be loaded.

    Attributes:
      values: Arrays in segjax's layout, by dotted path.
      dropped: Keys of the checkpoint that are not used.
      kept: Dotted paths that the checkpoint lacks.
    """

    values: dict[str, np.ndarray]
    dropped: list[str]
    kept: list[str]


def _plan(model: SegmentationModel, checkpoint: Checkpoint, *, drop: tuple[str, ...], keep: tuple[str, ...]) -> _Plan:
    """Raises MisfitError if the checkpoint does not fit the model, CheckpointError for unsound weights."""
    found, arrays = checkpoint.recognised, checkpoint.state_dict
    expected = _expected(model, found.renaming)
    dropped = sorted(
        key
        for key in arrays
        if matches(key, (*drop, *found.key_format.unused))
        or (NEXT_TO_NETWORK.match(key) and not found.renaming.fits(key))
    )
    skipped = expected.counters.union(dropped)
    given = {key: value for key, value in arrays.items() if key not in skipped}
    kept = expected.kept(given, keep)
    _refuse_misfit(model, found, expected, given, kept)
    kept |= {bias for bias, mean in expected.folded.items() if mean in kept}
    used = {key: given[key] for key in expected.shapes if not kept.intersection(expected.native[key])}
    dtypes = {key: expected.dtypes[expected.native[key][0]] for key in used}
    variances = {key for key in used if any(name.endswith(".running_var") for name in expected.native[key])}
    refuse_unsound(used, dtypes, variances)
    native = found.renaming.to_native(used)
    values = {path: layout.from_torch_layout(path, native[k]) for k, path in expected.paths.items() if k not in kept}
    return _Plan(values, dropped, sorted(expected.paths[key] for key in kept))


@dataclasses.dataclass(frozen=True)
class _Expected:
    """The arrays of a model by the keys of a checkpoint, so that messages name the keys in the user's file.

    Attributes:
      shapes: Key -> shape. Arrays without a key in the dialect, such as those of the decoder in an encoder-only
        dialect, have their native key.
      native: Key -> its native keys.
      paths: Native key -> dotted path in the model.
      dtypes: Native key -> dtype in the model.
      folded: Native key of a bias that is not stored -> native key of the running mean that absorbs it.
      counters: Keys of batch counters, which are optional and not used.
    """

    shapes: dict[str, tuple[int, ...]]
    native: dict[str, tuple[str, ...]]
    paths: dict[str, str]
    dtypes: dict[str, np.dtype]
    folded: dict[str, str]
    counters: frozenset[str]

    def kept(self, given: Mapping[str, np.ndarray], keep: tuple[str, ...]) -> set[str]:
        """Native keys that the checkpoint lacks, and that `keep` matches by key, native key or dotted path."""
        kept = set()
        for key in self.shapes.keys() - given.keys():
            native = self.native[key]
            if any(matches(name, keep) for name in (key, *native, *(self.paths[name] for name in native))):
                kept.update(native)
        return kept


def _expected(model: SegmentationModel, renaming: Renaming) -> _Expected:
    variables = named_variables(model)
    paths = {torch_name(path): path for path in variables}
    blanks = {key: layout.blank_of(path, variables[path].get_value().shape) for key, path in paths.items()}
    groups = renaming.groups(blanks)
    folded = {bias: mean for bias, mean in renaming.folded if bias in blanks}
    native = {key: group.native for group in groups for key in group.foreign if group.native[0] not in folded}
    placed = {key for group in groups for key in group.native}
    elsewhere = {key: value for key, value in blanks.items() if key not in placed}
    arrays = renaming.to_foreign({key: value for key, value in blanks.items() if key in placed}) | elsewhere
    statistics = [key.removesuffix("running_var") for key in blanks if key.endswith(".running_var")]
    return _Expected(
        shapes={key: value.shape for key, value in arrays.items()},
        native=native | {key: (key,) for key in elsewhere},
        paths=paths,
        dtypes={key: variables[path].get_value().dtype for key, path in paths.items()},
        folded=folded,
        counters=frozenset(name for norm in statistics for name in renaming.foreign_names(norm + BATCH_COUNTER)),
    )


def _refuse_misfit(
    model: SegmentationModel, found: Recognised, expected: _Expected, given: Mapping[str, np.ndarray], kept: set[str]
) -> None:
    """Raises MisfitError if keys are missing, unexpected, of another shape or not floating point; lists all of them."""
    shapes = expected.shapes
    missing = [key for key in shapes if key not in given and not kept.issuperset(expected.native[key])]
    unexpected = [key for key in given if key not in shapes]
    misshapen = [key for key in shapes if key in given and given[key].shape != shapes[key]]
    integers = [key for key in shapes if key in given and not jnp.issubdtype(given[key].dtype, jnp.floating)]
    problems = {
        "missing from the checkpoint": missing,
        "unexpected in the checkpoint": unexpected,
        "of another shape": [f"{key}: checkpoint {given[key].shape}, model {shapes[key]}" for key in misshapen],
        "not floating point": [f"{key}: {given[key].dtype}" for key in integers],
    }
    listed = [
        f"{len(lines)} {kind}:\n" + "\n".join(f"    {line}" for line in lines)
        for kind, lines in problems.items()
        if lines
    ]
    if listed:
        raise MisfitError(
            f"the checkpoint (read as {found.key_format.dialect}: {found.key_format.package}) does not fit "
            f"{model.spec.name} with {model.spec.num_classes} classes; nothing was loaded.\n  " + "\n  ".join(listed),
            _advice(missing, unexpected, found.family.head[0]),
            parameters=[name for key in (*missing, *misshapen) for name in expected.native[key]],
            unexpected=unexpected,
        )


def _advice(missing: list[str], unexpected: list[str], head: str) -> str:
    lines = []
    if missing:
        lines.append(f"`segjax convert --keep '{head}'` leaves missing parameters of this pattern as initialised")
    if unexpected:
        patterns = list(dict.fromkeys(key.partition(".")[0] + ".*" * ("." in key) for key in unexpected))
        names = " ".join(f"'{pattern}'" for pattern in patterns[:3])
        lines.append(f"`segjax convert --drop {names}` skips unexpected tensors of such a pattern")
    if lines:
        lines.append("(in Python: segjax.from_torch or load_torch with keep=... and drop=...)")
    return "".join(f"\n  {line}" for line in lines)


def _log_plan(plan: _Plan) -> None:
    if plan.dropped:
        log_unused(plan.dropped)
    if plan.kept:
        # By module, because a list of every kernel and bias would be too long.
        modules = dict.fromkeys(path.rpartition(".")[0] for path in plan.kept)
        logger.info("left as initialised (%d): %s", len(plan.kept), shorten(modules))


def _filled(model: SegmentationModel, values: Mapping[str, np.ndarray]) -> nnx.State:
    """The model's state with `values` in the model's dtypes."""
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))):
        value = values.get(".".join(map(str, path)))
        if value is not None:
            variable = variable.replace(_copied(value, variable))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def _copied(value: np.ndarray | jax.Array, variable: nnx.Variable) -> jax.Array:
    """A copy in the variable's dtype; jnp.asarray could share memory with a tensor that the caller changes later."""
    return jnp.array(value, variable.get_value().dtype, copy=True)


# ---------------------------------------------------------------------------------------- a model made for a checkpoint


def from_torch(
    state_dict: Mapping | Checkpoint,
    *,
    name: str = "auto",
    dialect: str = "auto",
    num_classes: int | None = None,
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    **overrides,
) -> SegmentationModel:
    """Builds the model of a PyTorch checkpoint and loads it.

    Sizes and the number of classes are read from shapes. Settings that no checkpoint contains (heads, eps) have the
    values published for the dialect unless overridden; an INFO line of the logger `segjax` reports each assumption. For
    an encoder-only checkpoint, `num_classes` is required, and the decoder stays as initialised. Random streams of
    dropout and random bases start from key 0.

    Args:
      state_dict: As for `load_torch`.
      name: Name in `segjax.MODELS` to allow only this model; "auto" for any.
      dialect: Name of a dialect to allow only this one; "auto" for any.
      num_classes: Number of classes; compared with the checkpoint if it has a classifier.
      drop, keep: As for `load_torch`; kept parameters have initial values.
      dtype: Dtype of the computation, as for `segjax.create`.
      param_dtype: Dtype of the stored parameters.
      **overrides: Settings of the model, as for `segjax.create`.

    Returns:
      The model in evaluation mode, as `segjax.create` returns it.

    Raises:
      CheckpointError: The checkpoint fits no model; the message names the nearest one and the differences.
      KeyError: The name or dialect is unknown.

    Example:
      >>> import segjax
      >>> model = segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> again = segjax.from_torch(segjax.to_torch(model, dialect="smp"))
      >>> again.spec.name, again.spec.num_classes
      ('segformer_b0', 5)
    """
    if name != "auto":
        models.settings(name)
    family = None if name == "auto" else family_of(name)
    checkpoint = Checkpoint.of(state_dict).read_as(dialect=dialect, family=family)
    sizes, classes_in_file = read_sizes(checkpoint)
    found = checkpoint.recognised
    log_recognised(found)
    classes = _number_of_classes(num_classes, classes_in_file)
    name, settings = _settings(found, sizes, name, overrides)

    def create() -> SegmentationModel:
        try:
            return models.create(name, num_classes=classes, dtype=dtype, param_dtype=param_dtype, **settings)
        except ValueError as error:
            raise CheckpointError(f"no {name} has the sizes of the checkpoint: {error}") from None

    model = nnx.eval_shape(create)
    drop, keep = _patterns(drop), _patterns(keep)
    if not found.has_head:
        logger.info("encoder only: the decoder stays as initialised")
        drop, keep = (*drop, *found.key_format.backbone_extras), (*keep, *found.family.head)
    plan = _plan(model, checkpoint, drop=drop, keep=keep)
    _log_plan(plan)
    return from_values(model, plan.values | (_initial(create, plan.kept) if plan.kept else {}))


def read_sizes(checkpoint: Checkpoint) -> tuple[dict[str, Any], int | None]:
    """`Recognised.sizes`: settings of the model that are read from shapes, and the number of classes.

    Raises:
      CheckpointError: The sizes cannot be read; the message has the reason.
    """
    found = checkpoint.recognised
    try:
        return found.sizes
    except MissingKeyError as error:
        raise CheckpointError(_why_no_model(checkpoint, error.args[0])) from None
    except UnreadableShapeError as error:
        (key,) = error.args
        raise CheckpointError(
            f"{' and '.join(found.renaming.foreign_names(key))}: {found.family.title} cannot have the shape "
            f"{found.native_shapes[key]} there (read as {found.key_format.dialect}: {found.key_format.package})"
        ) from None


def _number_of_classes(given: int | None, in_file: int | None) -> int:
    if in_file is None:
        if given is None:
            raise CheckpointError(
                "the checkpoint is only an encoder, without a classifier: train a model from it (`segjax train "
                "--config.init.checkpoint=...`), or give the number of classes of an untrained classifier (`segjax "
                "convert --num-classes N`; in Python num_classes=N)"
            )
        return given
    if given not in (None, in_file):
        raise CheckpointError(
            f"the checkpoint has {in_file} classes, not {given}; training from it makes a new classifier (`segjax "
            "train --config.init.checkpoint=...`)"
        )
    return in_file


def _settings(
    found: Recognised, sizes: Mapping[str, Any], name: str, overrides: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name of the model, and its settings that differ from the defaults of this name.

    Raises:
      CheckpointError: The checkpoint has another encoder than the given `name`.
    """
    nearest = nearest_variant(found.family, sizes)
    name = nearest if name == "auto" else name
    defaults = models.settings(name)
    settings = {**sizes, **_assumed(found, name, overrides)}
    differing = [
        f"{key} is {settings[key]}, {name} has {defaults[key]}"
        for key in ENCODER_SIZES
        if key in settings and key not in overrides and defaults[key] != settings[key]
    ]
    if differing and name != nearest:
        raise CheckpointError(
            f"the checkpoint is not {name}: {'; '.join(differing)}. The nearest model is {nearest}; "
            "or give the sizes as overrides (`segjax convert --overrides`; in Python, keyword arguments)"
        )
    for key in ("decoder_dim", "ham_channels"):
        if not found.has_head and key in defaults and key not in overrides:
            logger.info("the decoder is as wide as in %s: %s", name, defaults[key])
    settings |= overrides
    changed = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    if changed:
        logger.info("unlike %s: %s", name, ", ".join(f"{key}={value}" for key, value in sorted(changed.items())))
    return name, changed


def _assumed(found: Recognised, name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that checkpoints of this format do not contain, except those in `overrides`; each is logged."""
    assumed, key_format, (_, classes) = {}, found.key_format, found.sizes
    for setting, value in key_format.settings_for(classes).items():
        if setting in overrides:
            continue
        published_for = name if value is OF_VARIANT else key_format.package
        if setting in key_format.of_classes.get(classes or 0, {}):
            published_for += f" with {classes} classes"
        assumed[setting] = models.settings(name)[setting] if value is OF_VARIANT else value
        logger.info(
            "assumed %s=%s: a checkpoint does not contain it; published for %s",
            setting,
            assumed[setting],
            published_for,
        )
    return assumed


def _initial(create: Callable[[], SegmentationModel], paths: list[str]) -> dict[str, jax.Array]:
    """Initial values at these dotted paths, from the model that `create` makes."""

    def draw():
        variables = named_variables(create())
        return {path: variables[path].get_value() for path in paths}

    # One program, from which the compiler removes the rest of the model. Calling `create` would compile a program per
    # shape, which takes 20 s.
    return jax.jit(draw)()


def _why_no_model(checkpoint: Checkpoint, missing: str) -> str:
    """Explains that a state dict fits no model, because it lacks the native key `missing`; names the nearest family."""
    found, keys = checkpoint.recognised, checkpoint.state_dict
    unknown = [key for key in keys if not found.renaming.fits(key)]
    differences = f"it lacks {' and '.join(found.renaming.foreign_names(missing) or (missing,))}"
    if unknown:
        differences += f", and there is no place for {shorten(unknown, most=6)}"
    free = dataclasses.replace(checkpoint, dialect="auto", family=None).recognised

    def described(found: Recognised) -> str:
        return f"{found.family.title} as {found.key_format.dialect} ({found.key_format.package}) writes it"

    if free.fitting > found.fitting:
        # Only if a name or dialect was given.
        return (
            f"the checkpoint is not {described(found)}: {differences}. It looks like {described(free)}: "
            f"{free.fitting} of {len(keys)} keys fit"
        )
    return (
        f"the checkpoint fits no model of segjax. The nearest family is {described(found)}: {found.fitting} of "
        f"{len(keys)} keys have a place there, but {differences}"
    )


def from_values(abstract: SegmentationModel, values: Mapping[str, np.ndarray | jax.Array]) -> SegmentationModel:
    """Fills an abstract model with all parameters and running statistics by dotted path.

    Random streams start from key 0.
    """
    graphdef, weights, streams = nnx.split(abstract, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    flat = []
    for path, variable in nnx.to_flat_state(weights):
        flat.append((path, variable.replace(_copied(values[".".join(map(str, path))], variable))))
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(nnx.to_flat_state(streams)) + 1))
    drawn = []
    for path, variable in nnx.to_flat_state(streams):
        is_key = isinstance(variable, nnx.RngKey)
        drawn.append((path, variable.replace(next(keys) if is_key else jnp.zeros((), jnp.uint32))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat), nnx.from_flat_state(drawn))
