"""Locks, so that one process at a time writes a run or prepares a dataset. A lock is released when its holder dies."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:
    # Windows has no locks.
    fcntl = None


class HeldError(ValueError):
    """Raised when another process holds a lock; the message names the process."""


@contextlib.contextmanager
def held(path: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Holds a lock while the body runs.

    The body runs without a lock on network file systems that have none, and if the file cannot be created. In the
    latter case the body cannot write anything either, and reports why.

    Args:
      path: File to lock. It is created with its parent folders; the end removes it, and those folders if they are
        empty. The file of a killed process is taken over.
      what: Name of the thing that the process writes, as the beginning of a sentence: "runs/a".
      remedy: Remedy if another process holds the lock, or the caller's reaction, as the end of a sentence.

    Raises:
      HeldError: Another process, or another thread of this one, holds the lock.
    """
    if fcntl is None:
        yield
        return
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        handle = _locked(path, what, remedy)
    except OSError:
        handle = None
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                # Removed while locked: another process that has opened it sees that the name is gone, and tries again.
                path.unlink()
            os.close(handle)
        with contextlib.suppress(OSError):
            # Innermost first, until one is not empty.
            for folder in made:
                folder.rmdir()


def _locked(path: Path, what: str, remedy: str) -> int | None:
    """A descriptor that keeps the file locked; None if the file cannot be created or locked."""
    assert fcntl is not None
    # Tries again if another process has just removed the file, or the folder that it had created.
    for _ in range(1000):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Links are not followed: their targets would be written.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 500, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise HeldError(f"{what} is being written by {holder}: {remedy}") from None
        except OSError:
            # The file system has no locks.
            os.close(handle)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                # The name of the holder is only information, and the disk may be full.
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, _own_name().encode(), 0)
                return handle
        os.close(handle)
    return None


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
