"""Versions of Python and of packages, and devices, for metadata."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # jax.Device, which a type checker takes for a variable.
    from jaxlib._jax import Device

CORE = ("segjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def installed(packages: Iterable[str] = CORE) -> dict[str, str]:
    """The versions of Python and of the installed packages among `packages`, by name."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def devices_in_words() -> str:
    """Number and kind of the devices of all processes: "4 x cpu", or "4 x cpu of 2 processes"."""
    import jax

    of = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{of}"


def of_devices(devices: Sequence[Device]) -> dict[str, Any]:
    """Metadata about the devices of a computation, which are all of one kind."""
    return {"kind": devices[0].device_kind, "platform": devices[0].platform, "number": len(devices)}
