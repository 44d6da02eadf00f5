"""Output of commands: lines of at most 80 columns, printed only by the first of several processes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import textwrap
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO, TypeVar

from segjax.runtime import distributed, native_log

if TYPE_CHECKING:
    from tqdm import tqdm

Item = TypeVar("Item")


# A space at which `filled` does not break a line.
NO_BREAK = "\0"


def wrapped(text: str) -> str:
    """Text with prose wrapped at 80 columns. Indented lines, and lines of at most two words, stay unchanged."""

    def is_prose(line: str) -> bool:
        return not line[:1].isspace() and len(line.split()) > 2

    return "\n".join(filled(line) if is_prose(line) else line for line in text.splitlines())


def filled(line: str, *, indent: str = "", width: int = 80) -> str:
    """One paragraph in lines of `width` columns; each `NO_BREAK` becomes a space."""
    settings = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    # textwrap counts characters, so a filler follows each wide one. `printable` escapes fillers in the text itself.
    filler = "\ue000"
    line = "".join(character + filler * (columns(character) - 1) for character in line)
    lines = textwrap.fill(line, initial_indent=indent, subsequent_indent=indent, **settings)
    return lines.replace(filler, "").replace(NO_BREAK, " ")


def say(text: str, *, to: TextIO | None = None, everywhere: bool = False) -> None:
    """Prints text as `show` does, with prose `wrapped`."""
    show(wrapped(printable(text)), to=to, everywhere=everywhere)


def show(text: str, *, to: TextIO | None = None, everywhere: bool = False) -> None:
    """Prints lines unchanged except for `printable`; only the first of several processes prints.

    The lines appear above a visible `ProgressBar`. Characters that the stream cannot encode are printed as escapes.

    Args:
      text: Lines to print.
      to: Stream to print to; by default stdout.
      everywhere: Whether each of several processes prints.
    """
    if not everywhere and not distributed.is_lead():
        return
    stream = sys.stdout if to is None else to
    if stream is None:
        # The process has no stdout or stderr.
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    if _bars:
        _bars[-1].write(text, file=stream)
        stream.flush()
    else:
        print(text, file=stream, flush=True)


# --------------------------------------------------------------------------------------------------- text from outside

# Invisible letters and marks, in addition to Unicode's format characters.
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


def printable(text: str) -> str:
    """Text with visible characters and line breaks only.

    Escapes replace characters that control the terminal, change the order of the following text, or are invisible:
    control and format characters, bytes of file names that are not UTF-8 (which Python reads as surrogates), and
    characters for private use.
    """
    return "".join(c if c == "\n" or _is_seen(c) else _escaped(c) for c in text)


def one_line(name: object, *, most: int | None = None) -> str:
    """A name from outside (of a class, an image, a file) on one line, `printable`, with escaped line breaks.

    Args:
      name: Name.
      most: Maximum number of columns; the middle of a longer name is omitted.
    """
    # Shortened before escapes make it longer, and so that a name of megabytes takes no time.
    text = str(name)
    if most is not None and len(text) > 4 * most:
        text = text[: 2 * most] + text[-2 * most :]
    text = printable(text).replace("\n", "\\n")
    return text if most is None else _shortened(text, most)


def cell(name: object, width: int) -> str:
    """The result of `one_line` in exactly `width` columns of a table, flush left."""
    text = one_line(name, most=width)
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    """Number of columns of a text on a terminal: two for East Asian wide characters, none for combining ones."""
    return sum(map(_columns_of, text))


def _columns_of(character: str) -> int:
    if character < "\u0300":
        return 1
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _shortened(text: str, most: int) -> str:
    if columns(text) <= most:
        return text
    head, tail = _beginning(text, most // 2), _beginning(text[::-1], most - 1 - most // 2)[::-1]
    # Combining marks whose letter is omitted are dropped.
    return f"{head}…{''.join(itertools.dropwhile(lambda character: not _columns_of(character), tail))}"


def _beginning(text: str, most: int) -> str:
    """The longest beginning of a text that fits into `most` columns."""
    widths = itertools.accumulate(map(_columns_of, text))
    return text[: sum(1 for _ in itertools.takewhile(lambda width: width <= most, widths))]


def _is_seen(character: str) -> bool:
    # `isprintable` is False for all spaces except the ASCII one.
    return (character.isprintable() and character not in _UNSEEN) or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


@contextlib.contextmanager
def log_to(show: Callable[[str], None]) -> Iterator[None]:
    """Passes messages of the logger "segjax", from INFO on, to `show` instead of the logger's handlers."""
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


@contextlib.contextmanager
def libraries_to(log: Path | None = None) -> Iterator[None]:
    """Keeps warnings of libraries off the terminal while the body runs; errors that they log are printed.

    The messages of native libraries that `native_log` keeps off the terminal go to the log.

    Args:
      log: File to which warnings and errors are appended, in an existing folder; None discards warnings.
    """

    def write(kind: str, text: str) -> None:
        if log is not None:
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {kind}: {text}\n")

    class Records(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = self.format(record)
            write(record.name, text)
            if record.levelno >= logging.ERROR:
                say(f"{record.name}: {text}", to=sys.stderr)

    def show(message, category, *_, **__) -> None:
        write(category.__name__, str(message))

    root, records, shown = logging.getLogger(), Records(logging.WARNING), warnings.showwarning
    # The root logger's handlers include absl's.
    before = root.handlers
    root.handlers, warnings.showwarning = [records], show
    native_log.write_to(log)
    try:
        yield
    finally:
        native_log.write_to(None)
        root.handlers, warnings.showwarning = before, shown


# Visible bars; the last one is on top.
_bars: list[tqdm] = []


class ProgressBar:
    """A progress bar on a terminal, a line every ten seconds elsewhere. Only the first of several processes shows it.

    Attributes:
      count: Number of completed items.
    """

    SECONDS = 10  # between two lines

    def __init__(self, what: str, total: int | None, unit: str = "", *, start: int = 0):
        """Shows the bar; the end of the context removes it.

        Args:
          what: Label before the count, or "".
          total: Number of items; None if unknown.
          unit: Name of the items; "B" for bytes.
          start: Number of items completed before.
        """
        self.count = start
        self._what, self._total, self._unit = one_line(what, most=40), total, unit
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
            # Set, because some terminals report no rows, and tqdm would show nothing.
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
        """Items per second, without the first items, which include compilation; None at the beginning."""
        if self._first is None:
            return None
        counted, seconds = self.count - self._first[0], time.perf_counter() - self._first[1]
        return counted / seconds if counted and seconds else None

    def advance(
        self, number: int = 1, *, notes: Sequence[str] | None = None, left: float | None = None, now: bool = False
    ) -> None:
        """Adds `number` to the count.

        Args:
          number: Number of completed items.
          notes: Texts next to the count; by default the rate.
          left: Seconds until the end, for lines; by default estimated from the rate.
          now: Whether to print a line now, even if the last one is less than ten seconds old.
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
