"""The models by name."""

from __future__ import annotations

import difflib
import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import layers
from segjax.models import (
    hrnet,
    hrnet_ocr,
    segformer,
    segformer_mmseg,
    segformer_plain,
    segformer_simple,
    segformer_zuppichini,
    segnext,
)
from segjax.models.segmentation_model import MOST_BLOCKS, ModelSpec, SegmentationModel

__all__ = ["MODELS", "SegmentationModel", "create", "problem_of", "settings"]


def _variants(pattern: str, model: type, variants: dict[str, dict[str, Any]]) -> dict[str, partial]:
    return {pattern.format(variant): partial(model, **sizes) for variant, sizes in variants.items()}


# Largest number that a setting of a model may have: the weights of one layer of this width take 16 GiB.
LARGEST = 65_536

MODELS = (
    _variants("segformer_{}", segformer.SegFormer, segformer.VARIANTS)
    | _variants("segformer_plain_{}", segformer_plain.SegFormerPlain, segformer_plain.VARIANTS)
    | _variants("segformer_mmseg_{}", segformer_mmseg.SegFormerMMSeg, segformer_mmseg.VARIANTS)
    | _variants("segformer_simple{}", segformer_simple.SegFormerSimple, segformer_simple.VARIANTS)
    | _variants("segformer_zuppichini{}", segformer_zuppichini.SegFormerZuppichini, segformer_zuppichini.VARIANTS)
    | _variants("hrnet_{}", hrnet.HRNet, hrnet.VARIANTS)
    | _variants("hrnet_{}_ocr", hrnet_ocr.HRNetOCR, hrnet_ocr.VARIANTS)
    | _variants("segnext_{}", segnext.SegNeXt, segnext.VARIANTS)
)


def settings(name: str) -> dict[str, object]:
    """The settings that `create(name, ...)` can override.

    Args:
      name: A key of `MODELS`.

    Returns:
      The defaults of that model, by setting.

    Raises:
      KeyError: Unknown name; the message lists the names.

    Example:
      >>> from segjax import models
      >>> models.settings("segformer_b0")["dims"]
      (32, 64, 160, 256)
    """
    defaults = {key: parameter.default for key, parameter in _parameters(name).items()} | MODELS[name].keywords
    return {key: defaults[key] for key in _parameters(name)}


def problem_of(name: str, key: str, value: object) -> str | None:
    """Check type and range of one setting of a model; `create` checks whether settings fit each other.

    Args:
      name: A key of `MODELS`.
      key: A key of `settings(name)`.
      value: Value of the setting.

    Returns:
      The requirement that the value does not meet, or None for a valid value.

    Raises:
      KeyError: Unknown model or setting.

    Example:
      >>> from segjax import models
      >>> models.problem_of("segformer_b0", "drop_path_rate", 1.5)
      'in [0, 1)'
    """
    default, kind = settings(name)[key], _parameters(name)[key].annotation
    entries = kind.removeprefix("tuple[").removesuffix(", ...]")
    is_tuple = entries != kind
    if is_tuple and isinstance(default, tuple):
        must_be = f"{len(default)} numbers, as in the default, {default}"
        if not isinstance(value, tuple | list) or len(value) != len(default):
            return must_be
    else:
        must_be = f"like the default, {default!r}"
    kinds = {"int": int, "float": int | float, "bool": bool, "str": str}[entries]
    for entry in value if isinstance(value, tuple | list) and is_tuple else [value]:
        if not isinstance(entry, kinds) or (isinstance(entry, bool) and kinds is not bool):
            return must_be
    return _out_of_range(key, value)


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """The settings of a model, as declared by its constructor and those of its base classes."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"no model {name!r}.{hint} The models are {', '.join(MODELS)}")
    reserved = ("num_classes", "dtype", "param_dtype", "rngs")
    declared = {}
    for base in reversed(MODELS[name].func.__mro__):
        # A constructor declares its own settings and passes the others on to its base class.
        parameters = inspect.signature(base.__init__).parameters.values()
        declared |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in reserved}
    return declared


def _frozen(value: object) -> object:
    """The value with tuples for lists and Python numbers for numpy ones, as a checkpoint's metadata can store it."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _out_of_range(key: str, value: object) -> str | None:
    """The requirement that a number of the setting does not meet, or None: [0, 1) for a rate, else (0, `LARGEST`]."""
    entries = value if isinstance(value, tuple | list) else [value]
    numbers = [entry for entry in entries if isinstance(entry, int | float) and not isinstance(entry, bool)]
    if key.endswith("_rate"):
        return None if all(0 <= number < 1 for number in numbers) else "in [0, 1)"
    if not all(0 < number <= LARGEST for number in numbers):
        return f"positive and at most {LARGEST}"
    if key in ("depths", "stage_modules", "stage_blocks") and sum(numbers) > MOST_BLOCKS:
        return f"at most {MOST_BLOCKS} together"
    return None


def _require_in_range(overrides: dict[str, object]) -> None:
    for key, value in overrides.items():
        if must_be := _out_of_range(key, value):
            raise ValueError(f"{key} must be {must_be}; got {value}")


def create(
    name: str,
    *,
    num_classes: int,
    seed: int = 0,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    **overrides: Any,
) -> SegmentationModel:
    """Create a model in evaluation mode, with random initial weights from the distributions of its publication.

    It can be traced, for example by `nnx.eval_shape`.

    Args:
      name: A key of `MODELS`, for example "segformer_b0".
      num_classes: Number of classes K; 1 for a binary model (sigmoid).
      seed: Seed of the initial weights and of the model's dropout streams.
      dtype: Dtype of the computation; with bfloat16, norms, softmax and logits stay in float32.
      param_dtype: Dtype of the stored parameters.
      **overrides: Settings of the model, for example dims=..., decoder_dim=...; `settings(name)` lists them.

    Returns:
      A `SegmentationModel`, called as `logits, taps = model(images)`. `images` are normalised, (B, H, W, C), with
      C = `in_channels` (by default 3) and H and W multiples of `model.size_multiple`. `logits` are (B, h, w, K) at the
      model's own stride; upsample them bilinearly with `model.align_corners`. `model.spec` stores the arguments.

    Raises:
      KeyError: Unknown name; the message lists the names.
      TypeError: Unknown override; the message lists the settings.
      ValueError: num_classes below 1, a setting out of range, settings that do not fit each other, or float64 while
        jax_enable_x64 is off.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> model = models.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> logits, taps = model(jnp.zeros((2, 64, 96, 3)))
      >>> logits.shape, sorted(taps)
      ((2, 16, 24, 5), ['feature0', 'feature1', 'feature2', 'feature3'])
    """
    known = settings(name)
    if unknown := sorted(set(overrides) - set(known)):
        raise TypeError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1; got {num_classes}")
    for label, kind in (("dtype", dtype), ("param_dtype", param_dtype)):
        if jnp.dtype(kind) == jnp.float64 and jax.dtypes.canonicalize_dtype(kind) != jnp.float64:
            raise ValueError(f"{label}=float64 needs jax.config.update('jax_enable_x64', True) first")
    frozen = {key: _frozen(value) for key, value in overrides.items()}
    _require_in_range(frozen)
    rngs = nnx.Rngs()
    for tag, key in zip(("params", "dropout"), jax.random.split(jax.random.key(seed)), strict=True):
        setattr(rngs, tag, layers.RandomStream(key, tag=tag))
    model = MODELS[name](
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        rngs=rngs,
        **frozen,
    )
    model.eval()
    model.spec = ModelSpec(name, num_classes, tuple(sorted(frozen.items())))
    return model
