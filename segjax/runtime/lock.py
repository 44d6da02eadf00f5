"""One process at a time writes a run or prepares a dataset; the lock is freed when its holder dies, however it dies."""

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
    # On Windows nothing is locked.
    fcntl = None


class HeldError(ValueError):
    """Another process holds a lock; the message names it."""


@contextlib.contextmanager
def held(path: Path, *, what: str, remedy: str) -> Iterator[None]:
    """Holds a lock while the body runs.

    Where there can be no lock, the body runs without one: on network file systems that have none, and where the file
    cannot be made, so that the body can write nothing either and reports why.

    Args:
      path: file to lock. It is made, with the folders around it; the end removes it, and these folders if they are
        empty. That of a killed process is taken over.
      what: what the process writes, as the beginning of a sentence: "runs/a".
      remedy: what to do where another process holds it, or what the caller does then, as the end of a sentence.

    Raises:
      HeldError: another process holds it, or another thread of this one.
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
                # Still locked: another process that opened it before sees that its name is gone, and opens anew.
                path.unlink()
            os.close(handle)
        with contextlib.suppress(OSError):
            # From the inside to the outside, until one is not empty.
            for folder in made:
                folder.rmdir()


def _locked(path: Path, what: str, remedy: str) -> int | None:
    """A descriptor of the file, which it keeps locked; None where it cannot be made, or nothing can be locked."""
    assert fcntl is not None
    # Again where another process has just removed the file, or the folder that it had made.
    for _ in range(1000):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not a link: its target, which is elsewhere, would be written.
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
            # Nothing can be locked here.
            os.close(handle)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                # It only informs, and a disk may be full.
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, _own_name().encode(), 0)
                return handle
        os.close(handle)
    return None


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
