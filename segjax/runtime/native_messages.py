"""Captures messages that native libraries (libjpeg, libpng, OpenCV) print to file descriptor 2.

libjpeg fills damaged parts of an image and reports this only on stderr: its messages are the evidence of damage.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO, TypeVar

Result = TypeVar("Result")

# Messages of these libraries. All others, from Python or other libraries, are passed on.
_NATIVE = re.compile(
    rb"(?:Corrupt JPEG data|Premature end of JPEG|Inconsistent progression|Invalid SOS parameters|Unknown Adobe color"
    rb"|Warning: unknown JFIF|_tiff\w+Proc|libpng (?:warning|error)|\[ ?(?:INFO|WARN|ERROR|FATAL):\d+@|OpenCV)[^\n]*\n?"
)

# Guards everything below. Several threads share one capture, because descriptor 2 belongs to the whole process.
_changed = threading.Condition()
_running = 0  # number of calls that are being captured
_begun = 0  # number of calls so far
_is_alone = False  # whether the running call admits no other
_file: IO[bytes] | None = None  # target of descriptor 2 meanwhile; reused, because creating one takes 0.1 ms
_terminal: int | None = None  # target of descriptor 2 before; None while nothing is captured
_passed_on = 0  # number of bytes of the file that were examined


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps messages of these libraries off the terminal while the body runs, and logs them at DEBUG."""
    _begin(alone=False)
    try:
        yield
    finally:
        _end(0)


def captured(function: Callable[[], Result]) -> tuple[Result, list[str]]:
    """The result of a function, and the lines that these libraries printed during its call.

    If calls of several threads overlapped and one of them printed, each call is repeated by itself.
    """
    result, lines, is_own = _once(function, alone=False)
    if lines and not is_own:
        result, lines, _ = _once(function, alone=True)
    return result, lines


def _once(function: Callable[[], Result], *, alone: bool) -> tuple[Result, list[str], bool]:
    """The result, the printed lines, and whether no other call ran at the same time."""
    start, number, is_first = _begin(alone=alone)
    lines, is_last = [], False
    try:
        result = function()
    finally:
        lines, is_last = _end(start, number)
    return result, lines, is_first and is_last


def _begin(*, alone: bool) -> tuple[int, int, bool]:
    """The length of the file, the number of the call, and whether no other call is running.

    Raises:
      OSError: Messages cannot be captured, so damage would go unnoticed.
    """
    global _running, _begun, _is_alone, _file, _terminal
    with _changed:
        _changed.wait_for(lambda: not (_is_alone or (alone and _running)))
        if not _running:
            if _file is None:
                _file = _made()
                atexit.register(_file.close)
            _terminal = _diverted(_file)
        _running += 1
        _begun += 1
        _is_alone = alone
        return 0 if _file is None else os.fstat(_file.fileno()).st_size, _begun, _running == 1


def _made() -> IO[bytes]:
    """A file in memory, or in a temporary folder if the system has no files in memory."""
    with contextlib.suppress(OSError, AttributeError):
        return os.fdopen(os.memfd_create("messages"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _diverted(file: IO[bytes]) -> int | None:
    """Redirects descriptor 2 to a file, and returns a descriptor of its previous target.

    A process without stderr cannot print; it is left unchanged, and the result is None.
    """
    try:
        terminal = os.dup(2)
    except OSError as error:
        if error.errno == errno.EBADF:
            return None
        raise
    try:
        os.dup2(file.fileno(), 2)
    except BaseException:
        os.close(terminal)
        raise
    return terminal


def _end(start: int, number: int = 0) -> tuple[list[str], bool]:
    """Native lines from `start` on, and whether no call began after this one, the call `number`.

    Other printed text is passed on to the terminal. The last running call restores descriptor 2.
    """
    global _running, _is_alone, _terminal, _passed_on
    lines: list[bytes] = []
    with _changed:
        _running -= 1
        _is_alone = False
        if _file is not None and _terminal is not None:
            if not _running:
                # Restored first, so that nothing is printed to the file after it is read.
                os.dup2(_terminal, 2)
            size = os.fstat(_file.fileno()).st_size
            content = os.pread(_file.fileno(), size - _passed_on, _passed_on)
            if other := _NATIVE.sub(b"", content):
                with contextlib.suppress(OSError):
                    os.write(_terminal, other)
            _passed_on = size
            lines = _NATIVE.findall(os.pread(_file.fileno(), size - start, start))
            if not _running:
                os.close(_terminal)
                _terminal = None
                if size:
                    _file.seek(0)
                    _file.truncate()
                    _passed_on = 0
        is_last = number == _begun
        _changed.notify_all()
    messages = [line.decode(errors="replace").strip() for line in lines]
    for message in messages:
        logging.getLogger("segjax").debug(message)
    return messages, is_last


def _forget() -> None:
    """Restores descriptor 2 in a forked child, where the threads of running calls do not exist."""
    global _changed, _running, _is_alone, _file, _terminal, _passed_on
    if _terminal is not None:
        os.dup2(_terminal, 2)
        os.close(_terminal)
    if _file is not None:
        _file.close()
    _changed, _running, _is_alone, _file, _terminal, _passed_on = threading.Condition(), 0, False, None, None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
