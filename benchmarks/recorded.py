"""Functions for scripts that write records: separate processes, peak memory, the head of a record."""

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
    """Calls `function(*arguments)` in a new process, with its own memory, compiler and threads.

    Raises:
      Any exception of the function; BrokenProcessPool if the process dies, for example for lack of memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def peak_of(function: Callable[[], object]) -> int:
    """Returns the bytes by which the resident memory of this process grows at most during `function`. Only on Linux.

    Freed memory that the C library keeps is first returned to the kernel, so that it counts when it is used again.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("the peak of memory is read from /proc, which only Linux has")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = machine.resident_bytes()
    function()
    return max(0, machine.peak_bytes() - before)


def has_gpu() -> bool:
    """Returns whether jax finds a GPU; a separate process checks this, so that its memory is released."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8").stdout.strip() == "gpu"


def about(module: str, words: Sequence[str]) -> dict[str, object]:
    """Returns the head of a record: date, command and machine, without names of folders. Starts no backend of jax.

    Args:
      module: Module that was run.
      words: Its arguments.
    """
    shown = [re.sub(r"(^|=)[/~].*", r"\1PATH", word) for word in words]
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python -m {module}", *shown]),
        **machine.described(),
    }


def write(path: Path | None, record: Mapping) -> None:
    """Writes a record as JSON, atomically, or nothing if there is no path."""
    if path is not None:
        atomic.write_text(path, json.dumps(record, indent=1) + "\n")
