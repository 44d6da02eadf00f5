"""How a program of segjax sets up the process it owns. A library call never does any of this by itself."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import jax


def prepare(*, cpu_only: bool = False) -> None:
    """To be called when a command starts: keeps compiled programs on disk and freed memory with the process.

    Args:
      cpu_only: whether a GPU, most of whose memory jax would take, is left to others; else the CPU is kept next to it.
    """
    keep_freed_memory()
    keep_compiled_programs()
    if cpu_only:
        jax.config.update("jax_platforms", "cpu")
    else:
        keep_the_cpu()


def keep_compiled_programs() -> None:
    """Under JAX_COMPILATION_CACHE_DIR, or ~/.cache/segjax/jax where that is unset: the second start is quick.

    Those that took a tenth of a second, unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "segjax" / "jax"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # The many small programs that draw initial weights take 0.1 to 0.2 s each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_the_cpu() -> None:
    """Crops of streamed images are drawn on the CPU, which JAX_PLATFORMS=cuda would leave out. Before the first use."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]: jax defines it at run time
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def keep_freed_memory() -> None:
    """Has glibc reuse large freed blocks instead of handing them back to the kernel.

    XLA's CPU backend allocates the temporaries of a program anew at every call. glibc maps such blocks and unmaps them
    when they are freed, so that the kernel zeroes every page of every step: on two cores that is half of a SegFormer-B0
    forward pass and a third to a half of a training step. Must come before the first computation, whose threads would
    take arenas of their own, too small for such blocks. Without effect where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
