"""Set-up of the process of a command. Library calls never do any of this."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from segjax.runtime import memory


def prepare(*, cpu_only: bool = False) -> None:
    """Sets up the process of a command: compiled programs are kept on disk, and freed memory in the process.

    Args:
      cpu_only: whether only the CPU is used, so that jax does not allocate most of the memory of a GPU; else the CPU is
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

    Programs are kept if their compilation took JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, by default 0.1 seconds.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "segjax" / "jax"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # The many small programs that draw initial weights take 0.1 to 0.2 s each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_the_cpu() -> None:
    """Adds the CPU to JAX_PLATFORMS=cuda: crops of streamed images are drawn there. Call it before jax is used."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]: jax defines it at run time
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")


def keep_freed_memory() -> None:
    """Has glibc reuse large freed blocks instead of handing them back to the kernel.

    XLA's CPU backend allocates the temporaries of a program at every call. By default glibc maps such blocks and unmaps
    them when they are freed, so that the kernel zeroes every page of every step: on two cores that is half of a
    SegFormer-B0 forward pass and a third to a half of a training step. Call it before the first computation, whose
    threads would otherwise get arenas of their own, which are too small for such blocks. With another C library than
    glibc it does nothing.
    """
    if mallopt := memory.glibc("mallopt"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
