"""Set-up of a command's process. Library functions never call it."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from segjax.runtime import memory


def prepare(*, cpu_only: bool = False) -> None:
    """Sets up the process of a command: keeps compiled programs on disk, and freed memory in the process.

    Args:
      cpu_only: Whether to use only the CPU, so that jax does not allocate most of a GPU's memory. Otherwise the CPU is
        available next to the GPU.
    """
    keep_freed_memory()
    keep_compiled_programs()
    if cpu_only:
        jax.config.update("jax_platforms", "cpu")
    else:
        keep_the_cpu()


def keep_compiled_programs() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/segjax/jax, for later processes.

    A program is kept if its compilation takes at least JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, by default 0.1 s.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "segjax" / "jax"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # The many small programs that draw initial weights take 0.1 to 0.2 s each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_the_cpu() -> None:
    """Adds the CPU to JAX_PLATFORMS=cuda, because crops of streamed images are drawn there. Call it before jax runs."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]: jax defines it at run time
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def keep_freed_memory() -> None:
    """Makes glibc reuse large freed blocks instead of returning them to the kernel.

    XLA's CPU backend allocates the temporaries of a program at every call. By default glibc maps such blocks and unmaps
    them when they are freed, so the kernel zeroes every page in every step: on two cores that takes half of a
    SegFormer-B0 forward pass and a third to a half of a training step. Call it before the first computation, whose
    threads would otherwise get their own arenas, which are too small for such blocks. Without glibc it does nothing.
    """
    if mallopt := memory.glibc("mallopt"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
