"""Versions of Python and of packages, for records."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

CORE = ("segjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def installed(packages: Iterable[str] = CORE) -> dict[str, str]:
    """The version of Python, and of those of `packages` that are installed, by name."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
