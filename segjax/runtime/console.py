"""Output of commands: lines of at most 80 columns, printed only by the first of several processes."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Self, TextIO, TypeVar

from segjax.runtime import distributed

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")


def wrapped(text: str) -> str:
    """Text with prose wrapped at 80 columns. Indented lines, and lines of at most two words, stay unchanged."""

    def is_prose(line: str) -> bool:
        return not line[:1].isspace() and len(line.split()) > 2

    return "\n".join(filled(line) if is_prose(line) else line for line in text.splitlines())


def filled(line: str, *, indent: str = "") -> str:
    """One paragraph in lines of 80 columns."""
    settings = {"width": 80, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, initial_indent=indent, subsequent_indent=indent, **settings)


def say(text: str, *, to: TextIO | None = None) -> None:
    """Prints text, see `wrapped`, above a `ProgressBar` if one is shown; only the first of several processes prints.

    Args:
      to: stream to print to; stdout by default.
    """
    if not distributed.is_lead():
        return
    text, stream = printable(wrapped(text)), sys.stdout if to is None else to
    if _bars:
        _bars[-1].write(text, file=stream)
        stream.flush()
    else:
        print(text, file=stream, flush=True)


def printable(text: str) -> str:
    """Text with escapes for control characters, except line breaks, and for bytes of file names that are not UTF-8.

    Names in a checkpoint or a folder could otherwise steer the terminal.
    """
    return re.sub(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", _escaped, text)


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


@contextlib.contextmanager
def log_to(show: Callable[[str], None]) -> Iterator[None]:
    """Passes messages of the logger "segjax", from INFO on, to `show` instead of the handlers of the logger."""
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


# Bars that are on the terminal, the last one on top.
_bars: list[tqdm] = []


class ProgressBar:
    """A progress bar on a terminal; elsewhere a line every ten seconds. Of several processes the first shows it.

    Attributes:
      count: number of items that are done.
    """

    SECONDS = 10  # between two lines

    def __init__(self, what: str, total: int | None, unit: str = "", *, start: int = 0):
        """Shows the bar; the end of the context removes it.

        Args:
          what: label in front of the count, or "".
          total: number of items; None if unknown.
          unit: name of the items; "B" for bytes.
          start: number of items that were done before.
        """
        self.count = start
        self._what, self._total, self._unit = what, total, unit
        self._first: tuple[int, float] | None = None
        self._said = time.perf_counter()
        self._bar: tqdm | None = None
        if distributed.is_lead() and sys.stderr.isatty():
            self._bar = self._made(start)
            _bars.append(self._bar)

    def _made(self, start: int) -> tqdm:
        from tqdm import tqdm

        what, is_bytes = self._what.replace("{", "{{").replace("}", "}}"), self._unit == "B"
        layout = f"{what} " if what else ""
        layout += "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}" if self._total is not None else "{n_fmt}"
        layout += "B" if is_bytes else f" {self._unit}".rstrip()
        layout += " [{elapsed}<{remaining}{postfix}]" if self._total is not None else " [{elapsed}{postfix}]"
        return tqdm(
            total=self._total,
            initial=start,
            bar_format=layout,
            file=sys.stderr,
            smoothing=0.1,
            leave=False,
            unit_scale=is_bytes,
            ncols=80,
            # Some terminals report no rows, and tqdm would show nothing.
            nrows=20,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            _bars.remove(self._bar)
            self._bar.close()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items; each is counted when the next one is requested."""
        with self:
            for item in items:
                yield item
                self.advance()

    @property
    def rate(self) -> float | None:
        """Items per second, without the first items, during which programs are compiled; None at the beginning."""
        if self._first is None:
            return None
        counted, seconds = self.count - self._first[0], time.perf_counter() - self._first[1]
        return counted / seconds if counted and seconds else None

    def advance(
        self, number: int = 1, *, notes: Sequence[str] | None = None, left: float | None = None, now: bool = False
    ) -> None:
        """Adds `number` to the count.

        Args:
          notes: texts next to the count; by default the rate.
          left: seconds until the end, for lines; by default estimated from the rate.
          now: whether a line is printed now, even if the last one is less than ten seconds old.
        """
        self.count += number
        rate, moment = self.rate, time.perf_counter()
        self._first = self._first or (self.count, moment)
        if notes is None:
            notes = [f"{amount(rate) if self._unit == 'B' else f'{rate:.2f}'} per second"] if rate else []
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(notes), refresh=False)
            self._bar.update(number)
        elif now or moment - self._said >= self.SECONDS:
            self._said = moment
            if left is None and rate and self._total is not None:
                left = (self._total - self.count) / rate
            say("  ".join([self._line(), *notes, *([f"{duration(left)} left"] if left else [])]))

    def _line(self) -> str:
        numbers = [self.count] if self._total is None else [self.count, self._total]
        counted = "/".join(amount(number) if self._unit == "B" else str(number) for number in numbers)
        return f"{self._what} {counted} {'' if self._unit == 'B' else self._unit}".strip()


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def amount(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} min"
