"""Response of commands to Ctrl-C and SIGTERM: immediate, also while native code runs, and never lost.

Python runs a signal handler only between two bytecodes of the main thread. A compilation by XLA or an import keeps that
thread busy for seconds to minutes. So a separate thread reads the numbers of signals as they arrive
(`signal.set_wakeup_fd`): the user sees at once that the first signal was received, and the second ends the process.
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
# Seconds in which a program may end by itself: after the first signal, before anything is printed; after the second,
# before the process is ended.
PATIENCE = 0.5
# Bytes that the thread may read instead of the number of a signal.
_END, _LOST = 0, 255

Handler = Callable[[int, FrameType | None], None]


def status_of(number: int) -> int:
    """The exit status for a program that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


@contextlib.contextmanager
def answered(handler: Handler, *, first: str, second: str, patience: float = 0.01) -> Iterator[Callable[[], None]]:
    """Answers signals while the body runs, if this is the main thread. Ignored signals stay ignored.

    Args:
      handler: Handler of every signal in the main thread, as for `signal.signal`.
      first: Line to print after the first signal.
      second: Line to print after the second signal, if the body has not ended after `PATIENCE` seconds; the process
        then ends with the status of the signal.
      patience: Seconds after which `first` is printed, unless the body has ended.

    Yields:
      Function that sends the last signal again, for a signal whose exception was lost.
    """
    # Python delivers signals only to the main thread; the caller may be in another thread.
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
    """The signals that this process does not ignore. A shell's background processes ignore Ctrl-C."""
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
            # Sends the signal again, after the callback that lost it has ended.
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
    # Not print(): the main thread may hold the lock of the stream.
    with contextlib.suppress(OSError):
        os.write(native_log.terminal, f"{line}\n".encode(errors="replace"))


class Stopped(KeyboardInterrupt):
    """Raised when Ctrl-C or SIGTERM ends a command; its argument is the exit status."""


# Number of the first signal that this process received in `run_process`; 0 before.
_received = 0
_is_raising = False  # whether the body of `raising` runs


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Makes a signal raise `Stopped` in the body, which then removes incomplete files.

    Outside such a body a signal ends the process at once: there is nothing to remove, and an exception during the
    import of jaxlib crashes it.
    """
    global _is_raising
    before, _is_raising = _is_raising, True
    try:
        yield
    finally:
        _is_raising = before


def _imports_native(frame: FrameType | None) -> bool:
    """Whether a native module is being initialised, during which an exception may crash the process."""
    while frame is not None:
        is_loader = frame.f_code.co_name in ("create_module", "exec_module")
        if is_loader and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def received() -> int:
    """The number of the signal that ends this process; 0 without a signal, or without `run_process`."""
    return _received


def run_process(name: str, run: Callable[[], int]) -> int:
    """Runs a command as the only task of this process, from its first line on.

    In the body of `raising`, the first signal raises `Stopped`: after the import if a native module is being imported,
    and again if a callback of the garbage collector has lost the exception. Elsewhere a signal ends the process at
    once. This also holds after `run` has ended, because callbacks at exit would lose an exception. When these have
    ended too, signals are ignored: the result is complete.

    Args:
      name: Name of the command as the user types it, "segjax convert".
      run: The command.

    Returns:
      The exit status: that of `run`, or 130 or 143 if a signal ended it outside of `run_command`.
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
    # The first registered callback is called last.
    atexit.register(ignore)
    first, second = f"{name}: stopping; press again to end it at once", f"{name}: stopped at once"
    for number in numbers:
        # Stays in place after `answered`, which restores it.
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
