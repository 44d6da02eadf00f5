"""Which implementations run: fast ones for the platform that XLA compiles for, or those of the publications.

`segjax/layers/functional.py` lists the operations, their implementations and the condition for each.

The settings are user contexts of jax, part of the key of its caches: a compiled function that is called again inside
another context is traced again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax
from jax.sharding import AxisType

_PUBLISHED = jax.make_user_context(False)
_PLATFORM = jax.make_user_context(None)
_PREPARED = jax.make_user_context(False)


def published_implementations() -> AbstractContextManager:
    """Models called inside run every operation as its publication writes it, in no equal but cheaper implementation.

    `segjax summary` counts these, and fast implementations are compared with them.
    """
    return _PUBLISHED(True)


def meant_for(platform: str) -> AbstractContextManager:
    """Models called inside take the implementations that are fast on `platform`, wherever they run.

    Args:
      platform: "cpu", "cuda", or "plain" for those that run anywhere.
    """
    return _PLATFORM(platform)


def weights_are_prepared() -> AbstractContextManager:
    """What a model called inside computes of its weights only is computed once: see `segjax.models.prepared`."""
    return _PREPARED(True)


def are_weights_prepared() -> bool:
    """Whether what is computed of the weights only costs nothing."""
    return _PREPARED.value


def is_published() -> bool:
    """Whether every operation runs as its publication writes it."""
    return _PUBLISHED.value


def is_fast_on_cpu() -> bool:
    """Whether XLA's CPU backend will run the computation, for which several operations have a faster implementation.

    Measured on two cores (wall time of the plain implementation / of the fast one): depthwise 3x3 forward and backward
    4 to 184, bilinear resizing by whole factors about 1.2 of a whole forward pass of SegFormer-B0.
    """
    return _is_for("cpu")


def is_fast_on_gpu() -> bool:
    """The same of XLA's GPU backend."""
    return _is_for("cuda", "gpu")


def _is_for(*platforms: str) -> bool:
    # Not under a mesh with explicit axes: the gradients that these implementations define state no shardings.
    if _PUBLISHED.value or (_PLATFORM.value or jax.default_backend()) not in platforms:
        return False
    return AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types
