"""Lines that fit 80 columns, on one of several processes."""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Iterator

from segjax.runtime import distributed


def wrapped(text: str) -> str:
    """Prose in lines of 80 columns; what is indented, lists and commands, stays as it is."""
    return "\n".join(line if line[:1].isspace() else filled(line) for line in text.splitlines())


def filled(line: str, *, indent: str = "") -> str:
    """One paragraph in lines of 80 columns."""
    settings = {"width": 80, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, initial_indent=indent, subsequent_indent=indent, **settings)


def say(text: str) -> None:
    """Of several processes, one speaks for all."""
    if distributed.is_lead():
        print(wrapped(text), flush=True)


@contextlib.contextmanager
def log_said() -> Iterator[None]:
    """What the library logs inside about weights that it reads is said, whatever else is set up for logging."""
    logger = logging.getLogger("segjax")
    handler = logging.Handler()
    handler.emit = lambda record: say(filled(record.getMessage(), indent="  "))
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} min"
