"""What the recorded runs of this folder share: a process of their own, its memory, and what a record says of itself."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from segjax.runtime import atomic

REPO = Path(__file__).parents[1]


def in_a_process(function: Callable, *arguments):
    """`function(*arguments)` in a new process: its memory, its compiler and its threads are its own.

    Raises:
      What the function raises; BrokenProcessPool where its process died, as one does for which memory is too small.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def peak_of(function: Callable[[], object]) -> int:
    """Bytes that this process held at most while `function` ran, beyond what it held before. Linux alone.

    What was freed before but kept for later is handed back to the kernel first, so that it counts where it is used.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    # The kernel counts the peak anew from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def has_gpu() -> bool:
    """Whether jax finds one; asked in a process of its own, which gives its memory back."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "gpu"


def quartiles(values: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return [float(values[0])] * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


def about(module: str, words: Sequence[str]) -> dict[str, object]:
    """The head of a record: when, with what command, on what. Folders of this machine are not named.

    Args:
      module: that was run. words: that it was given. Nothing here starts a backend of jax.
    """
    shown = [re.sub(r"(^|=)[/~].*", r"\1PATH", word) for word in words]
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python -m {module}", *shown]),
        "versions": versions,
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
    }


def write(path: Path | None, record: Mapping) -> None:
    """A record as JSON, whole or not at all; nothing where there is no path."""
    if path is not None:
        atomic.write_text(path, json.dumps(record, indent=1) + "\n")
