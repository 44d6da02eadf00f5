"""Which implementations models run: fast ones on a CPU, or those that the publications write."""

from __future__ import annotations

import contextlib
import contextvars

import jax


@contextlib.contextmanager
def holding(variable: contextvars.ContextVar, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


_AS_PUBLISHED = contextvars.ContextVar("as_published", default=False)


@contextlib.contextmanager
def published_forms():
    """Models called inside run every layer as its publication writes it, in no equal but cheaper form.

    What is counted (`segjax.summary`) and what a fast form is compared with.
    """
    with holding(_AS_PUBLISHED, True):
        yield


def as_published() -> bool:
    return _AS_PUBLISHED.get()


_PLATFORM = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def meant_for(platform: str):
    """Models called inside take the forms that are fast on `platform` ("cpu", "cuda"), wherever they are traced."""
    with holding(_PLATFORM, platform):
        yield


def fast_cpu_forms() -> bool:
    """True where XLA's CPU backend will run the computation, for which several layers have a faster form.

    Measured on two cores (wall time of the plain form / of the fast one): depthwise 3x3 forward and backward 4 to 184,
    bilinear resizing by whole factors about 1.2 of a whole forward pass of SegFormer-B0.
    """
    return (_PLATFORM.get() or jax.default_backend()) == "cpu" and not as_published()
