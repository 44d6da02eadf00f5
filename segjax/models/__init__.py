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


def _variants(pattern: str, model: type, variants: dict[str, dict[str, Any]]) -> dict[str, partial]:
    return {pattern.format(variant): partial(model, **sizes) for variant, sizes in variants.items()}


# Of a number among the settings of a model: the weights of one layer as wide as this take 16 GiB.
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
    """Settings that `create(name, ...)` can override, with the defaults of that name.

    Raises:
      KeyError: unknown name; lists the names.
    """
    defaults = {key: parameter.default for key, parameter in _parameters(name).items()} | MODELS[name].keywords
    return {key: defaults[key] for key in _parameters(name)}


def problem_of(name: str, key: str, value: object) -> str | None:
    """What the value of a setting of the model `name` must be instead; None for one of the right type and in range.

    Whether it fits other settings is known when the model is created.
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
    """The settings of a model as its constructor, and those of its bases, declare them."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"no model {name!r}.{hint} The models are {', '.join(MODELS)}")
    reserved = ("num_classes", "dtype", "param_dtype", "rngs")
    declared = {}
    for base in reversed(MODELS[name].func.__mro__):
        # A constructor names its own settings and hands the rest on to its base.
        parameters = inspect.signature(base.__init__).parameters.values()
        declared |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in reserved}
    return declared


def _frozen(value: object) -> object:
    """Lists as tuples and numpy's numbers as Python's own, which the metadata of a checkpoint can hold."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _out_of_range(key: str, value: object) -> str | None:
    """What the numbers of a setting must be: in [0, 1) for a rate, else positive and at most as large as bearable."""
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
    """Builds a model in evaluation mode, with published initial weights drawn from `seed`. Traceable (nnx.eval_shape).

    Args:
      name: a key of `MODELS`, for example "segformer_b0".
      num_classes: K; 1 for a binary model (sigmoid).
      seed: seed of the initial weights and of the model's dropout streams.
      dtype: type of the computation; bfloat16 keeps norms, softmax and logits in float32.
      param_dtype: type of the stored parameters.
      **overrides: settings of the model's class, for example dims=..., decoder_dim=...; `settings(name)` lists them.

    Returns:
      A `SegmentationModel`: `logits, taps = model(images)`, images (B, H, W, C) normalised, C
      being `in_channels`, 3 unless given, logits (B, h, w, K) at the
      model's own stride, which are upsampled bilinearly with `model.align_corners`. `model.spec` holds the arguments
      given here; height and width of images must be multiples of `model.size_multiple`.

    Raises:
      KeyError: unknown name; lists the names.
      TypeError: unknown override; names it and those that exist.
      ValueError: num_classes below one, settings out of range or that do not fit one another, or float64 while
        jax_enable_x64 is off.
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
