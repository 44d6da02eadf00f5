"""Compiled programs kept on disk, so that the second start is quick."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable() -> None:
    """Keeps compiled programs under JAX_COMPILATION_CACHE_DIR, or ~/.cache/segjax/jax where that is unset."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "segjax" / "jax"))
    # Below half a second reading from disk gains nothing worth the files.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
