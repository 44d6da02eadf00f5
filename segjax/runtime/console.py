"""What a command prints: lines of at most 80 columns, from the first of several processes only."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TextIO

from segjax.runtime import distributed


def wrapped(text: str) -> str:
    """Prose in lines of 80 columns; what is indented, lists and commands, stays as it is."""
    return "\n".join(line if line[:1].isspace() else filled(line) for line in text.splitlines())


def filled(line: str, *, indent: str = "") -> str:
    """One paragraph in lines of 80 columns."""
    settings = {"width": 80, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, initial_indent=indent, subsequent_indent=indent, **settings)


def say(text: str, *, to: TextIO | None = None) -> None:
    """Prints prose in lines of 80 columns; of several processes the first one only.

    Args:
      to: stdout unless given.
    """
    if distributed.is_lead():
        print(printable(wrapped(text)), file=sys.stdout if to is None else to, flush=True)


def printable(text: str) -> str:
    """Text with escapes for control characters, except line breaks, and for bytes of file names that are not UTF-8.

    Names in a checkpoint or a folder could otherwise steer the terminal.
    """
    return re.sub(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", _escaped, text)


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


@contextlib.contextmanager
def log_to(show: Callable[[str], None]) -> Iterator[None]:
    """Hands what the library logs to the logger "segjax", from INFO on, to `show` and to nothing else."""
    logger = logging.getLogger("segjax")
    handler = logging.Handler()
    handler.emit = lambda record: show(record.getMessage())
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} min"
