"""Keeps log messages of native libraries (XLA, CUDA) on file descriptor 2 off the terminal, by a separate process.

`divert` starts this file as a program, the reader, which reads the output of this process and its children to
descriptor 2. The reader sends records of such logs to the log of the run, and passes on everything else at once. A
thread could not do this: a crash of the process would lose the output that the thread had not read. If the process ends
without `end`, it has crashed, and the reader prints its last records. This costs each command a few milliseconds. The
file imports nothing from segjax.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import select
import signal
import sys
import time
from collections import deque
from pathlib import Path

# Descriptor of the terminal, also while descriptor 2 is diverted, for messages of this process itself.
terminal = 2
_orders: int | None = None  # the writing end of the pipe; None while nothing is diverted

# Signals that do not end the reader.
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Orders to the reader begin with a byte that no message has.
_END, _SHOW, _LOG = b"\0end", b"\0show", b"\0log "


def divert() -> None:
    """Diverts descriptor 2 of a command's process; `sys.stderr` remains the terminal."""
    global terminal, _orders
    # A process without stderr cannot print, and is left unchanged.
    if _orders is not None or os.name != "posix" or sys.stderr is None or not sys.executable:
        return
    with contextlib.suppress(OSError):
        own, (reading, writing) = os.dup(2), os.pipe()
        # Not subprocess, which warns of a process without a waiter; this one ends with the last writer.
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", __file__],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
            setsigmask=_ENDING,
        )
        os.close(reading)
        sys.stderr.flush()
        os.dup2(writing, 2)
        terminal, _orders = own, writing
        settings = {"encoding": sys.stderr.encoding, "errors": sys.stderr.errors}
        sys.stderr = open(own, "w", buffering=1, closefd=False, **settings)  # noqa: SIM115
        atexit.register(end)


def end() -> None:
    """Tells the reader that this process ends regularly, so that it prints no records."""
    _order(_END)


def show() -> None:
    """Prints the last records, for an error whose cause they may name."""
    _order(_SHOW)


def write_to(log: Path | None) -> None:
    """Appends subsequent records to a file; None discards them."""
    _order(_LOG + (b"" if log is None else os.fsencode(log.absolute()).hex().encode()))


def _order(order: bytes) -> None:
    if _orders is not None:
        with contextlib.suppress(OSError):
            os.write(_orders, order + b"\n")


# ---------------------------------------------------------------------------------- the program that is started

_ORDER = re.compile(rb"\0(?:end|show|log [0-9a-f]*)(?=\n)")
# Beginning of a record below FATAL, by absl and by older libraries: severity, time, thread, source location.
_RECORD = re.compile(
    rb"[IWE]\d{4} \d\d:\d\d:\d+\.\d+ +\d+ \S+:\d+\]|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IWE] \S+:\d+\]"
    rb"|WARNING: All log messages before absl::InitializeLog"
)
# Lines that continue such a record: XLA's message about a slow compilation.
_SLOW = b"slow_operation_alarm.cc"
_FOLLOWING = re.compile(
    rb"\s*$|\*+\s*$|\s*%|\[?Compiling |\[.*Very slow compile\?|Very slow compile\?|The operation took "
    rb"|This isn't necessarily a bug|If you'd like to file a bug|.*run with envvar XLA_FLAGS"
)
# XLA's last message if another process of the run has died, and the text that is printed in its place.
_LOST = b"Terminating process because the JAX distributed service detected fatal errors"
_DIED = (
    b"segjax: another process has died or cannot be reached, so that this one ends\n"
    b"too; look at its messages, and start all of them again: what was written is\ncomplete\n"
)
_KEPT = 50  # number of records printed after a crash
_PAUSE = 0.05  # seconds after which an unfinished line is passed on


class _Reader:
    """Handles the output to descriptor 2, line by line."""

    def __init__(self) -> None:
        self.has_ended = self._is_lost = False
        self._last: deque[bytes] = deque(maxlen=_KEPT)
        self._log: bytes = b""
        self._is_slow = False

    def take(self, line: bytes) -> None:
        """Handles a line, including its line break if there is one."""
        if match := _ORDER.search(line):
            # An unfinished line may precede the order.
            if line[: match.start()]:
                self.take(line[: match.start()])
            self._obey(match[0])
        elif self._is_lost or _LOST in line:
            if not self._is_lost:
                _print(_DIED)
            # Its stack trace follows.
            self._is_lost = self.has_ended = True
            self._write(line)
        elif _RECORD.match(line) or (self._is_slow and _FOLLOWING.match(line)):
            self._is_slow = _SLOW in line or not _RECORD.match(line)
            self._last.append(line)
            self._write(line)
        else:
            self._is_slow = False
            _print(line)

    def _obey(self, order: bytes) -> None:
        if order == _END:
            self.has_ended = True
        elif order == _SHOW:
            self.show()
        elif order.startswith(_LOG):
            self._log = bytes.fromhex(order.removeprefix(_LOG).decode())

    def show(self) -> None:
        _print(b"".join(self._last))
        self._last.clear()

    def _write(self, line: bytes) -> None:
        if self._log and line.strip():
            with contextlib.suppress(OSError), open(self._log, "ab") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} native: ".encode() + line)


def _print(text: bytes) -> None:
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(2, text) :]


def _main() -> None:
    # In its own session it receives no Ctrl-C.
    with contextlib.suppress(OSError):
        os.setsid()
    reader, rest = _Reader(), b""
    while True:
        is_idle = bool(rest) and not select.select([0], [], [], _PAUSE)[0]
        data = b"" if is_idle else os.read(0, 1 << 16)
        *lines, rest = (rest + data).splitlines(keepends=True) or [b""]
        if rest.endswith(b"\n") or not data:
            lines, rest = [*lines, rest], b""
        for line in filter(None, lines):
            reader.take(line)
        if not data and not is_idle:
            break
    if not reader.has_ended:
        reader.show()


if __name__ == "__main__":
    _main()
