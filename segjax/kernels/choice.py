"""The choice of implementations: fast ones for the platform that XLA compiles for, or the published ones.

`segjax/layers/functional.py` lists the operations, their implementations and the condition of each.

The settings are user contexts of jax and belong to the keys of its caches: a compiled function is traced again when it
is called inside another context.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax
from jax.sharding import AxisType

_PUBLISHED = jax.make_user_context(False)
_PLATFORM = jax.make_user_context(None)
_PREPARED = jax.make_user_context(False)


def published_implementations() -> AbstractContextManager:
    """Make models run every operation as published, without equivalent but cheaper implementations.

    `segjax summary` counts these operations, and tests compare fast implementations with them.

    Returns:
      A context manager.

    Example:
      >>> from segjax import layers
      >>> with layers.published_implementations():
      ...     layers.is_fast_on_cpu(), layers.is_fast_on_gpu()
      (False, False)
    """
    return _PUBLISHED(True)


def meant_for(platform: str) -> AbstractContextManager:
    """Make models use the implementations that are fast on a platform, wherever they run.

    Args:
      platform: "cpu", "cuda", or "plain" for the implementations that run anywhere.

    Returns:
      A context manager.

    Example:
      >>> from segjax import layers
      >>> with layers.meant_for("cuda"):
      ...     layers.is_fast_on_gpu()
      True
    """
    return _PLATFORM(platform)


def weights_are_prepared() -> AbstractContextManager:
    """Tell models that `segjax.models.prepared` runs operations on weights only once, ahead of time.

    Returns:
      A context manager.

    Example:
      >>> from segjax import layers
      >>> from segjax.kernels import choice
      >>> with layers.weights_are_prepared():
      ...     choice.are_weights_prepared()
      True
    """
    return _PREPARED(True)


def are_weights_prepared() -> bool:
    """Whether operations on weights run once, ahead of time, and therefore cost nothing per image."""
    return _PREPARED.value


def is_published() -> bool:
    """Whether every operation runs as published."""
    return _PUBLISHED.value


def is_fast_on_cpu() -> bool:
    """Tell whether models use the implementations that are fast on XLA's CPU backend.

    Wall time of the plain implementation / of the fast one, on two cores: depthwise 3x3 forward and backward 4 to 184,
    bilinear resizing by whole factors about 1.2 of a whole forward pass of SegFormer-B0.

    Returns:
      True inside `meant_for("cpu")`, or on a CPU outside `meant_for`. Always False inside `published_implementations()`
      and under a mesh with explicit axes.

    Example:
      >>> from segjax import layers
      >>> with layers.meant_for("cpu"):
      ...     layers.is_fast_on_cpu()
      True
    """
    return _is_for("cpu")


def is_fast_on_gpu() -> bool:
    """Tell whether models use the implementations that are fast on XLA's GPU backend.

    Returns:
      True inside `meant_for("cuda")`, or on a GPU outside `meant_for`. Always False inside
      `published_implementations()` and under a mesh with explicit axes.

    Example:
      >>> from segjax import layers
      >>> with layers.meant_for("cpu"):
      ...     layers.is_fast_on_gpu()
      False
    """
    return _is_for("cuda", "gpu")


def _is_for(*platforms: str) -> bool:
    # Never under a mesh with explicit axes: the custom gradients of these implementations state no shardings.
    if _PUBLISHED.value or (_PLATFORM.value or jax.default_backend()) not in platforms:
        return False
    return AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types
