"""Shared by the scripts that make records: a process of its own, its peak memory, the head of a record."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from segjax.benchmark import machine
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
    """Largest resident memory of this process while `function` runs, beyond that of before: bytes. Only on Linux.

    Freed memory that the C library keeps is handed back to the kernel first, so that it counts when it is used again.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("the peak of memory is read from /proc, which only Linux has")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = machine.resident_bytes()
    function()
    return max(0, machine.peak_bytes() - before)


def has_gpu() -> bool:
    """Whether jax finds one; asked in a process of its own, which gives its memory back."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8").stdout.strip() == "gpu"


def about(module: str, words: Sequence[str]) -> dict[str, object]:
    """The head of a record: when, with what command, on what. Folders of this machine are not named.

    Args:
      module: that was run. words: that it was given. Nothing here starts a backend of jax.
    """
    shown = [re.sub(r"(^|=)[/~].*", r"\1PATH", word) for word in words]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python -m {module}", *shown]),
        **machine.described(),
    }


def write(path: Path | None, record: Mapping) -> None:
    """A record as JSON, whole or not at all; nothing where there is no path."""
    if path is not None:
        atomic.write_text(path, json.dumps(record, indent=1) + "\n")
