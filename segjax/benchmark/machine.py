"""Metadata of the machine for a benchmark, and the memory of its process."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segjax.runtime import versions

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorboardX"),
    *("torch", "transformers", "segformer-pytorch"),
)


def described() -> dict[str, object]:
    """Versions of Python and installed packages, the processor, and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return {"versions": versions.installed(PACKAGES), "cpu": cpu[1] if cpu else platform.machine(), "cores": cores()}


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int:
    """Resident memory of this process in bytes, only on Linux. `peak_bytes` counts from this call on.

    It includes freed memory that the C library keeps.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Largest resident memory of this process in bytes since the last call of `resident_bytes`, only on Linux."""
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def quartiles(values: Sequence[float] | np.ndarray) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(np.percentile(values, share)) for share in (50, 25, 75)]
