"""Versions of Python and of packages, for metadata."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

CORE = ("segjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def installed(packages: Iterable[str] = CORE) -> dict[str, str]:
    """The versions of Python and of the installed packages among `packages`, by name."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
