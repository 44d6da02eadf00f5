"""Atomic writes: a reader finds the complete old or the complete new file or folder, even if the writer is killed.

segjax writes all its files this way: `.pth` and `.safetensors` (`checkpoints/save.py`), orbax folders
(`checkpoints/orbax_folder.py`), results and reports. The only exceptions are the checkpoints of a run, which orbax's
own manager writes (`train/run_checkpoints.py`).

A new file is written under a temporary name next to its target and renamed at the end. Several writers of one target
use different temporary names; the last one to finish wins. A writer keeps its temporary file locked. An unlocked
temporary file was left by a killed writer, and the next writer of the same target removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:
    # On Windows the temporary files of killed writers stay.
    fcntl = None

# Errors of a write if the disk is full, or a quota or the limit on file sizes is reached.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Name of the old folder, inside the temporary one, between two renames.
_RETIRED = "old"
# Number of temporary names of a target that are checked for files of killed writers.
_NAMES = 4


def why_not_writable(folder: Path) -> str | None:
    """The reason why a folder, which need not exist, is not writable; None if it is."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        return f"{existing} is a file"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"no permission to write in {existing}"


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by text in UTF-8; creates its folder if missing."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields the name of an empty file to write, which replaces `path`, or is removed if the body raises.

    Args:
      path: Target; its folder is created if missing.
      durable: Whether to wait some milliseconds until the disk has the file. If False, a power cut shortly afterwards
        may leave an empty file; this is for large numbers of files that can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, is_folder=False) as temporary:
        try:
            with naming(path, temporary):
                yield temporary
            if durable:
                _flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
    if durable:
        _flush(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields the name of a folder to create, which replaces the folder `path`, or is removed if the body raises.

    Linux and macOS exchange two names in one step, so a folder exists at `path` at every moment. On file systems
    without this step, it is missing between two renames; if the writer was killed there, `recover` undoes the first.

    Args:
      path: Target; its parent folder is created if missing.
      durable: As for `replacing_file`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, is_folder=True) as around:
        try:
            new = around / path.name
            with naming(path, around):
                yield new
            for place in (*new.rglob("*"), new) if durable else ():
                _flush(place)
            _put(new, path, retired=around / _RETIRED)
        finally:
            _remove(around)
    if durable:
        _flush(path.parent)


@contextlib.contextmanager
def replacing_files(path: Path, *, stale: Sequence[Path] = ()) -> Iterator[Path]:
    """Yields the name of `path` in an empty folder, for this file and its companions next to it or below.

    They replace the files of the same names around `path`; if the body raises, none is replaced. Old companions are
    removed first, and new ones arrive last, so a killed writer leaves no companions of another version.

    Args:
      path: Target; its folder is created if missing.
      stale: Old companions to remove where the body writes no new ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, is_folder=True) as folder:
        try:
            with naming(path, folder):
                yield folder / path.name
            new = {file: path.parent / file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
            for file in new:
                _flush(file)
            for target in (*new.values(), *stale):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target != path:
                    target.unlink(missing_ok=True)
            for file in sorted(new, key=lambda file: new[file] != path):
                os.replace(file, new[file])
        finally:
            _remove(folder)
    for place in {target.parent for target in new.values()} | {path.parent}:
        _flush(place)


def recover(path: Path) -> None:
    """Restores the old folder if a writer was killed after moving it away, on file systems that cannot exchange names.

    Readers call it for a missing folder, and all writers before they start.
    """
    if os.path.lexists(path):
        return
    for number in range(_NAMES):
        temporary = _name(path, number)
        if (temporary / _RETIRED).is_dir():
            # The folder stays there if it belongs to another user or the disk is read-only.
            with contextlib.suppress(OSError), _locked(temporary, wait=False) as is_abandoned:
                if is_abandoned and not os.path.lexists(path):
                    os.rename(temporary / _RETIRED, path)


def clear(path: Path) -> None:
    """Removes files that killed writers of a target left next to it; every new writer does this too."""
    recover(path)
    for number in range(_NAMES):
        _remove_if_abandoned(_name(path, number))


def full_disk(error: BaseException) -> int | None:
    """The number, one of `NO_ROOM`, of the system error behind a failed write; None for other errors.

    Writers in other languages (safetensors, tensorstore, array_record) mention it only in the text of their errors.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in NO_ROOM else None
    return next((number for number in NO_ROOM if os.strerror(number) in str(error)), None)


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes errors of a full disk, of any type and text, name the target.

    Args:
      path: Target.
      temporary: File or folder that is being written, to also recognise errors whose text has no reason.
    """
    try:
        yield
    except Exception as error:
        if number := full_disk(error) or (temporary and _is_full_now(error, temporary)):
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise


def _is_full_now(error: Exception, temporary: Path) -> int | None:
    """`full_disk` for errors without a reason (torch), by writing one more megabyte to the largest file."""
    if isinstance(error, OSError | ValueError | KeyError):
        return None
    try:
        files = [temporary] if temporary.is_file() else [file for file in temporary.rglob("*") if file.is_file()]
        with max(files, key=lambda file: file.stat().st_size, default=temporary / "probe").open("ab") as file:
            file.write(bytes(1 << 20))
    except OSError as reason:
        return full_disk(reason)
    return None


@contextlib.contextmanager
def _temporary(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """A new file or folder next to `path`, locked while the body runs, which moves or removes it."""
    clear(path)
    for number in itertools.count():
        temporary = _name(path, number)
        try:
            if is_folder:
                temporary.mkdir()
            else:
                temporary.touch(exist_ok=False)
        except FileExistsError:
            continue
        with _locked(temporary, wait=True) as is_own:
            # False if another writer removed it as abandoned before it was locked.
            if is_own:
                yield temporary
                return


def _name(path: Path, number: int) -> Path:
    name = path.name
    # File systems allow names of 255 bytes. The digest is always the same, so later writers find files of killed ones.
    if len(os.fsencode(name)) > 240:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.part{number}")


@contextlib.contextmanager
def _locked(temporary: Path, *, wait: bool) -> Iterator[bool]:
    """Locks a temporary file for the body; yields whether it exists and, unless `wait`, was not locked before."""
    if fcntl is None:
        yield wait
        return
    try:
        handle = _open(temporary)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        except OSError:
            # Another writer holds the lock, or the file system has no locks.
            is_locked = wait
        yield is_locked and _is_at(handle, temporary)
    finally:
        os.close(handle)


def _open(temporary: Path) -> int:
    """Opens a file for writing, because network file systems lock no others; a folder is opened for reading.

    The kind is not checked first, because another writer may remove a file or create a folder in between.
    """
    try:
        return os.open(temporary, os.O_RDWR)
    except IsADirectoryError:
        return os.open(temporary, os.O_RDONLY)


def _is_at(handle: int, temporary: Path) -> bool:
    """Whether a name still refers to the opened file or folder."""
    try:
        return os.path.samestat(os.fstat(handle), temporary.stat())
    except FileNotFoundError:
        return False


def _remove_if_abandoned(temporary: Path) -> None:
    # A temporary file of another user that can be neither opened nor removed stays.
    with contextlib.suppress(PermissionError):
        if temporary.exists():
            with _locked(temporary, wait=False) as is_abandoned:
                if is_abandoned:
                    _remove(temporary)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _put(new: Path, path: Path, *, retired: Path) -> None:
    """Moves the folder `new` to `path`. The old folder ends up at `new` (exchanged) or `retired` (two renames)."""
    if not path.exists():
        try:
            os.rename(new, path)
            return
        except OSError as error:
            # Another writer was faster.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    if not _exchange(new, path):
        os.rename(path, retired)
        os.rename(new, path)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False if the system or the file system cannot."""
    library = None if sys.platform == "win32" else ctypes.CDLL(None)
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())
    exchange, ignored = 2, -1
    if hasattr(library, "renameat2"):  # Linux
        return library.renameat2(ignored, names[0], ignored, names[1], exchange) == 0
    if hasattr(library, "renamex_np"):  # macOS
        return library.renamex_np(*names, exchange) == 0
    return False


def _flush(place: Path) -> None:
    """Waits until the disk has the content of a file, or the names in a folder."""
    on_windows = sys.platform == "win32"
    if on_windows and place.is_dir():
        return
    handle = os.open(place, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do not flush folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
