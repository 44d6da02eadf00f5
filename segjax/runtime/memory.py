"""The memory that programs need and that devices have. Does not import jax."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from segjax.runtime import console

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


class TooLittleMemoryError(MemoryError):
    """Raised when a program needs more memory than a device has; the message has both numbers but no remedy."""


def host() -> int | None:
    """Bytes of main memory that this process may hold: those it holds plus those available now; None if unknown."""
    found = [left for left in (_available(), _left_of_cgroup()) if left is not None]
    return min(found) + _held() if found else _physical()


def limit(device: Any, *, shared_by: int = 1) -> int | None:
    """Bytes that a program may need on a jax device, including arguments and outputs; None if unknown.

    For a CPU it is the memory of the `host`, which also holds the arguments of a program.

    Args:
      device: Device of jax.
      shared_by: Number of devices of this process, which share the memory of a CPU.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = host()
    return None if found is None else found // shared_by


def needed(compiled: Any) -> int | None:
    """Bytes that a compiled jax program needs on each device, including arguments and outputs; None if unknown."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    # Donated arguments are also counted among the outputs, as aliases.
    size = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return size + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def for_resident_data(device: Any) -> float:
    """Bytes of training data that a device of jax keeps by default.

    2e9 on a CPU. On a GPU, a third of the memory that jax may use, by default three quarters of the card, and at
    most a third of the host's, through which the data pass. The training split of Cityscapes takes 25e9.
    """
    found = limit(device) if device.platform != "cpu" else None
    if found is None:
        return 2e9
    return min(size for size in (found, host()) if size is not None) / 3


def for_decoded_images() -> float:
    """Bytes of decoded images that a process keeps by default: a third of the memory of the host; 8e9 if unknown."""
    found = host()
    return 8e9 if found is None else found / 3


def refuse_too_large(size: int | None, devices: Sequence[Any], *, what: str) -> None:
    """Raises TooLittleMemoryError if a program does not fit into the memory of a device.

    Args:
      size: Bytes that it needs on each device, from `needed`.
      devices: Devices of this process.
      what: Subject of the message, in the singular.
    """
    available = limit(devices[0], shared_by=len(devices))
    if size is not None and available is not None and size > available:
        raise TooLittleMemoryError(
            f"{what} needs {console.amount(size)}, and the device has {console.amount(available)}"
        )


def refuse_more_than_host(size: int, *, what: str) -> None:
    """Raises TooLittleMemoryError if arrays do not fit into the memory of the `host`.

    Args:
      size: Bytes that they need.
      what: Subject of the message, in the singular.
    """
    available = host()
    if available is not None and size > available:
        raise TooLittleMemoryError(
            f"{what} needs {console.amount(size)}, and the machine has {console.amount(available)}"
        )


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means that a device or the host ran out of memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _available() -> int | None:
    for line in (_text(_PROC / "meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _physical() -> int | None:
    """Bytes of main memory of the machine; None if the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _held() -> int:
    """Resident bytes of this process."""
    fields = (_text(_PROC / "self" / "statm") or "").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def _left_of_cgroup() -> int | None:
    """Bytes left below the limits of this process's control groups, as of a container or a job; None without a limit.

    The limits of all enclosing groups apply too: SLURM limits the job or the step, not the task.
    """
    found = []
    for line in (_text(_PROC / "self" / "cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, names, cache = _CGROUP, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        # In a container, the path may be that on the host; then only its root exists here.
        inner = PurePosixPath(path.strip("/"))
        for folder in (inner, *inner.parents):
            most, used = (_text(root / folder / name) or "" for name in names)
            if most.strip().isdigit() and used.strip().isdigit():
                stat = dict(entry.split() for entry in (_text(root / folder / "memory.stat") or "").splitlines())
                # The kernel frees cached files when memory is needed.
                found.append(max(0, int(most) - int(used) + int(stat.get(cache, 0))))
    return min(found, default=None)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def release_freed_memory() -> None:
    """Returns the freed memory that glibc keeps to the kernel.

    Blocks of different sizes that several threads free leave gaps, which do not fit later blocks. So a process that
    keeps freed memory grows with the number of its steps. Without glibc it does nothing.
    """
    if trim := glibc("malloc_trim"):
        trim(0)


@functools.cache
def glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None without glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
