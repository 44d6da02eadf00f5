"""Ends every command: with one message for errors that the user can correct, with a traceback for all others."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import PurePath

from segjax.runtime import atomic, console, distributed, memory, native_log, signals

FAILED_CHECK, WRONG_INPUT = 1, 2
# The status that a shell reports for a program ended by a signal: 128 plus the number of SIGINT or SIGPIPE.
INTERRUPTED, BROKEN_PIPE = 130, 141


class CheckError(Exception):
    """A comparison failed before the output was written; the message states the consequence."""


def run_command(
    name: str,
    run: Callable[[], int | None],
    *,
    interrupted: str = "nothing was written",
    full_disk: str = "make room, and run the same command again",
    less_memory: str = "",
) -> int:
    """Runs a command, and prints messages of the logger "segjax".

    Args:
      name: Name of the command as it is typed, "segjax convert"; every message begins with it.
      run: Function of the command; returns its exit status, or None for 0.
      interrupted: State of the output after a signal, as the end of a sentence.
      full_disk: Remedy after a full disk, as the end of a sentence.
      less_memory: Remedy for too little memory, as the end of a sentence; "" if there is none.

    Returns:
      The exit status: that of `run`; 1 after a `CheckError` or a bug; 2 after a ValueError, OSError, KeyError or too
      little memory, with a message in lines of 80 columns on stderr; 130 after Ctrl-C, 143 after SIGTERM; 141 if the
      reader of stdout closed it. With several processes, the process exits here after an error or a signal instead of
      returning, so that the others do not wait for it. It prints its own errors, but not those that all have.
    """
    try:
        with signals.raising(), console.log_to(console.say), console.libraries_to():
            status = run()
        # Flushed here, because at exit, Python could only print that the pipe is closed or the disk is full.
        if sys.stdout is not None:
            sys.stdout.flush()
        if not signals.received():
            return status or 0
        error = KeyboardInterrupt()
    except (KeyboardInterrupt, Exception) as raised:
        error = raised
    _drop_what_stdout_refuses()
    # Interrupted code may raise another exception, or none.
    if number := signals.received():
        error = signals.Stopped(signals.status_of(number))
    if isinstance(error, KeyboardInterrupt):
        _complain(f"{name}: stopped; {interrupted}")
        return distributed.leave(error.args[0] if error.args else INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        return distributed.leave(BROKEN_PIPE)
    if isinstance(error, CheckError):
        _complain(f"{name}: {error}")
        return FAILED_CHECK
    if not distributed.is_lead():
        if distributed.is_everywhere(error):
            return distributed.leave(WRONG_INPUT)
        # Its own errors are printed nowhere else.
        name = f"{name}, {distributed.name()}"
    if isinstance(error, distributed.LostProcessError):
        _complain(f"{name}: {error}; {interrupted}")
        return distributed.leave(WRONG_INPUT)
    # Errors of segjax already have the remedy.
    is_own = type(error).__module__.startswith("segjax.")
    if not is_own and (number := atomic.full_disk(error)):
        is_named = isinstance(error, OSError) and error.filename
        message = message_of(error) if is_named else f"cannot write: {os.strerror(number)}"
        _complain(f"{name}: {message}.\n  {full_disk[:1].upper()}{full_disk[1:]}")
        return distributed.leave(WRONG_INPUT)
    if memory.is_exhausted(error):
        is_known = isinstance(error, memory.TooLittleMemoryError)
        what = str(error) if is_known else "there is not enough memory"
        _complain(f"{name}: {what}{'; ' * bool(less_memory)}{less_memory}")
        return distributed.leave(WRONG_INPUT)
    if isinstance(error, ValueError | OSError | KeyError):
        _complain(f"{name}: {message_of(error)}")
        return distributed.leave(WRONG_INPUT)
    native_log.show()
    traceback.print_exception(error)
    return distributed.leave(FAILED_CHECK)


def _drop_what_stdout_refuses() -> None:
    """Redirects stdout to nowhere if it cannot be flushed, because Python would flush it again at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    console.say(text, to=sys.stderr, everywhere=True)


def message_of(error: Exception) -> str:
    """The text of an error, with line breaks in paths escaped; the text's own line breaks remain."""
    text = _text(error)
    if "\n" in text:
        for name in sorted(_broken_names(error), key=len, reverse=True):
            text = text.replace(name, console.one_line(name))
    return text


def _broken_names(error: BaseException) -> set[str]:
    """Paths with a line break among the variables of all functions that an error passed through."""
    found, pending, seen = set(), [error], set()
    while pending:
        error = pending.pop()
        seen.add(id(error))
        pending += [other for other in (error.__cause__, error.__context__) if other and id(other) not in seen]
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in list(frame.f_locals.values()):
                is_parsed = isinstance(value, argparse.Namespace)
                values = list(vars(value).values()) if is_parsed else [value]
                for entry in values:
                    parts = [*entry] if isinstance(entry, list | tuple | set | dict) else [entry]
                    # Other text may be a message. A typed argument is not, but may be a path or begin with one.
                    kinds = (PurePath, str) if is_parsed else PurePath
                    names = [str(part) for part in parts if isinstance(part, kinds)]
                    found |= {part for name in names for part in (name, PurePath(name).name) if "\n" in part.strip()}
    return found


def _text(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        # str() would quote the text.
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror and not error.filename2:
        # Without Python's error number.
        where = f"{console.one_line(os.fsdecode(error.filename))}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__
