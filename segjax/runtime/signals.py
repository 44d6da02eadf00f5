"""Ctrl-C and SIGTERM in commands: answered at once, also while native code runs, and never lost.

Python runs a handler of a signal only between two bytecodes of the main thread, which a compilation by XLA or an import
keeps busy for seconds to minutes. Here a thread reads the numbers of signals as they arrive
(`signal.set_wakeup_fd`), so that a person sees at once that the first was heard, and the second ends the process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from types import FrameType

from segjax.runtime import native_log

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that a program has to end by itself: after the first signal before anything is printed, and after the second
# before the process is ended.
PATIENCE = 0.5
# What the thread reads instead of the number of a signal.
_END, _LOST = 0, 255

Handler = Callable[[int, FrameType | None], None]


def status_of(number: int) -> int:
    """The status that a shell reports for a program ended by a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextlib.contextmanager
def answered(handler: Handler, *, first: str, second: str, patience: float = 0.01) -> Iterator[Callable[[], None]]:
    """Answers signals while the body runs, if this is the main thread. One that the process ignores stays ignored.

    Args:
      handler: called in the main thread for every signal, as by `signal.signal`.
      first: line that is printed after the first signal. second: the same after the second, which ends the process with
        the status of the signal where the body has not ended after `PATIENCE` seconds.
      patience: seconds after which `first` is printed, unless the body has ended.

    Yields:
      A function that sends the last signal again; for those whose exception was lost.
    """
    # Python delivers signals to the main thread only, and a caller may be in another one.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(reader, ended, first, second, patience), name="signals", daemon=True)
    before = {number: signal.getsignal(number) for number in _heard()}
    thread.start()
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, handler)
    try:
        yield lambda: _send(writer, _LOST)
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        signal.set_wakeup_fd(descriptor)
        ended.set()
        _send(writer, _END)
        thread.join()
        for end in (reader, writer):
            end.close()


def _heard() -> list[int]:
    """The signals that this process does not ignore; what a shell runs in the background ignores Ctrl-C."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def _send(writer: socket.socket, byte: int) -> None:
    with contextlib.suppress(OSError):
        writer.send(bytes([byte]))


def _watch(reader: socket.socket, ended: threading.Event, first: str, second: str, patience: float) -> None:
    """Reads numbers of signals until the body has ended."""
    last, resent, to_print = 0, 0, False
    while True:
        reader.settimeout(patience if to_print else None)
        try:
            number = (reader.recv(1) or bytes([_END]))[0]
        except TimeoutError:
            _print(first)
            to_print = False
            continue
        if number == _END:
            return
        if number == _LOST and last:
            # Not from within the callback that has lost it.
            time.sleep(0.02)
            if not ended.is_set():
                resent += 1
                signal.pthread_kill(threading.main_thread().ident or 0, last)
        elif number in SIGNALS and resent:
            resent -= 1
        elif number in SIGNALS and not last:
            last, to_print = number, True
        elif number in SIGNALS and not ended.wait(PATIENCE):
            _print(second)
            native_log.end()
            os._exit(status_of(number))


def _print(line: str) -> None:
    # Not print: the main thread may hold the lock of the stream.
    with contextlib.suppress(OSError):
        os.write(native_log.terminal, f"{line}\n".encode(errors="replace"))


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ends a command; its argument is the status to end with."""


# Number of the first signal that this process received in `run_process`; 0 before.
_received = 0
_is_raising = False  # whether the body of `raising` runs


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Has a signal raise `Stopped` in the body, which removes what is half-written.

    Elsewhere a signal ends the process at once: there is nothing to remove, and jaxlib crashes where an exception is
    raised while it is imported.
    """
    global _is_raising
    before, _is_raising = _is_raising, True
    try:
        yield
    finally:
        _is_raising = before


def _imports_native(frame: FrameType | None) -> bool:
    """Whether a native module is being initialised, in which an exception may end the process with a crash."""
    while frame is not None:
        is_loader = frame.f_code.co_name in ("create_module", "exec_module")
        if is_loader and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def received() -> int:
    """The number of the signal that ends this process; 0 where none has come, or `run_process` does not run."""
    return _received


def run_process(name: str, run: Callable[[], int]) -> int:
    """Runs a command as the only thing that this process does, from its first line on.

    In the body of `raising`, `Stopped` is raised at the first signal: after the import of a native module where one
    runs, and again where a callback of a garbage collector has lost it. Elsewhere a signal ends the process at once;
    after `run` has ended, because callbacks at exit would lose it. Once these have ended too, signals are ignored: the
    result is complete.

    Args:
      name: name of the command as it is typed, "segjax convert".

    Returns:
      The exit status: that of `run`, or 130 or 143 where a signal ended it outside of `run_command`.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        global _received
        nonlocal is_raised
        _received = _received or number
        if is_ended or not (_is_raising or is_raised):
            _print(f"{name}: stopped")
            native_log.end()
            os._exit(status_of(_received))
        if is_raised:
            return
        if _imports_native(frame):
            again()
        else:
            is_raised = True
            raise Stopped(status_of(_received))

    def unraisable(lost) -> None:
        nonlocal is_raised
        if issubclass(lost.exc_type, Stopped):
            is_raised = False
            again()
        else:
            previous(lost)

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    is_raised, is_ended, previous = False, False, sys.unraisablehook
    numbers = _heard()
    # The first callback that is registered is the last that is called.
    atexit.register(ignore)
    first, second = f"{name}: stopping; once more ends it at once", f"{name}: stopped at once"
    for number in numbers:
        # It stays when `answered` has ended.
        signal.signal(number, stop)
    with answered(stop, first=first, second=second, patience=PATIENCE) as again:
        sys.unraisablehook = unraisable
        try:
            return run()
        except BaseException:
            # A module whose import is interrupted may raise another exception.
            if not _received:
                raise
            _print(f"{name}: stopped")
            return status_of(_received)
        finally:
            is_ended = True
