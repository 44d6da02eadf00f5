"""The end of every command: one message for errors that its user can correct, a traceback for all others."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

from segjax.runtime import atomic, console, distributed

FAILED_CHECK, WRONG_INPUT = 1, 2
# The status that a shell reports for a program ended by a signal: 128 plus the number of SIGINT or SIGPIPE.
INTERRUPTED, BROKEN_PIPE = 130, 141


class CheckError(Exception):
    """A comparison before the output is written has failed; the message states the consequence."""


def run_command(
    name: str,
    run: Callable[[], int | None],
    *,
    interrupted: str = "nothing was written",
    full_disk: str = "make room, and run the same command again",
) -> int:
    """Runs a command; messages of the logger "segjax" are printed.

    Args:
      name: name of the command as it is typed, "segjax convert"; every message begins with it.
      run: function of the command; returns its exit status, or None for 0.
      interrupted: state of the output after Ctrl-C, as the end of a sentence.
      full_disk: remedy after a full disk, as the end of a sentence.

    Returns:
      The exit status: that of `run`; 1 after a `CheckError` or a bug; 2 after a ValueError, OSError or KeyError, whose
      message is printed in lines of 80 columns on stderr; 130 after Ctrl-C; 141 where the reader of stdout has closed
      it. One of several processes exits here instead of returning 1 or 2, so that the others do not wait for it.
    """
    try:
        with console.log_to(console.say):
            status = run()
        # Flushed here, because at exit Python could only print that the pipe is closed.
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt:
        _complain(f"{name}: stopped; {interrupted}")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except CheckError as error:
        _complain(f"{name}: {error}")
        return FAILED_CHECK
    except (ValueError, OSError, KeyError) as error:
        room = f".\n  {full_disk[:1].upper()}{full_disk[1:]}" if is_full(error) else ""
        _complain(f"{name}: {_message(error)}{room}")
        return distributed.leave(WRONG_INPUT)
    except Exception:
        traceback.print_exc()
        return distributed.leave(FAILED_CHECK)


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, a quota or a limit on the size of files is exhausted."""
    return isinstance(error, OSError) and error.errno in (*atomic.NO_ROOM, errno.EFBIG)


def _complain(text: str) -> None:
    console.say(text, to=sys.stderr)


def _message(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        # str() would quote it.
        return str(error.args[0])
    if isinstance(error, OSError) and error.strerror and error.filename and not error.filename2:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__
