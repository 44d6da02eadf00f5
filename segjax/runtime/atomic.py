"""Atomic writes: a reader never sees half a file."""

from __future__ import annotations

import errno
from pathlib import Path

# Errors of a write that found no room.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: Path, text: str) -> None:
    """Writes beside `path` and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)
