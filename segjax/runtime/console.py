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


# Stands for a space at which `filled` does not break a line.
NO_BREAK = "\0"


def wrapped(text: str) -> str:
    """Text with prose wrapped at 80 columns. Indented lines, and lines of at most two words, stay unchanged."""

    def is_prose(line: str) -> bool:
        return not line[:1].isspace() and len(line.split()) > 2

    return "\n".join(filled(line) if is_prose(line) else line for line in text.splitlines())


def filled(line: str, *, indent: str = "", width: int = 80) -> str:
    """One paragraph in lines of `width` columns; each `NO_BREAK` becomes a space."""
    settings = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    # textwrap counts characters. A wide one counts twice with a filler behind it, which `printable` lets no text have.
    filler = "\ue000"
    line = "".join(character + filler * (columns(character) - 1) for character in line)
    lines = textwrap.fill(line, initial_indent=indent, subsequent_indent=indent, **settings)
    return lines.replace(filler, "").replace(NO_BREAK, " ")


def say(text: str, *, to: TextIO | None = None) -> None:
    """Prints text, see `wrapped` and `show`."""
    show(wrapped(printable(text)), to=to)


def show(text: str, *, to: TextIO | None = None) -> None:
    """Prints lines as they are, but `printable`; only the first of several processes prints.

    They come above a `ProgressBar` if one is shown. Characters that the stream cannot encode are printed as escapes.

    Args:
      to: stream to print to; stdout by default.
    """
    if not distributed.is_lead():
        return
    stream = sys.stdout if to is None else to
    if stream is None:
        # A process without stdout or stderr.
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
    if _bars:
        _bars[-1].write(text, file=stream)
        stream.flush()
    else:
        print(text, file=stream, flush=True)


# --------------------------------------------------------------------------------------------------- text from outside

# Letters and marks that are drawn as nothing, in addition to what Unicode calls format characters.
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


def printable(text: str) -> str:
    """Text in which every character can be seen, except that line breaks stay.

    Others that steer the terminal, change the order of what follows, or are drawn as nothing are replaced by escapes:
    control and format characters, bytes of file names that are not UTF-8 (which Python reads as surrogates), and
    characters for private use.
    """
    return "".join(c if c == "\n" or _is_seen(c) else _escaped(c) for c in text)


def one_line(name: object, *, most: int | None = None) -> str:
    """A name from outside (of a class, an image, a file) for people, on one line: `printable`, line breaks too.

    Args:
      most: columns; the middle of a longer name is omitted.
    """
    # Before the escapes, which make a text longer, and so that a name of megabytes takes no time.
    text = str(name)
    if most is not None and len(text) > 4 * most:
        text = text[: 2 * most] + text[-2 * most :]
    text = printable(text).replace("\n", "\\n")
    return text if most is None else _shortened(text, most)


def cell(name: object, width: int) -> str:
    """A name as `one_line` has it, in exactly `width` columns of a table, flush left."""
    text = one_line(name, most=width)
    return text + " " * (width - columns(text))


def columns(text: str) -> int:
    """Number of columns that text takes on a terminal: East Asian wide characters take two, combining ones none."""
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
    # Without marks whose letter was omitted.
    return f"{head}…{''.join(itertools.dropwhile(lambda character: not _columns_of(character), tail))}"


def _beginning(text: str, most: int) -> str:
    """As many characters as fit into so many columns."""
    widths = itertools.accumulate(map(_columns_of, text))
    return text[: sum(1 for _ in itertools.takewhile(lambda width: width <= most, widths))]


def _is_seen(character: str) -> bool:
    # `isprintable` is False for all spaces except the common one.
    return (character.isprintable() and character not in _UNSEEN) or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


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


@contextlib.contextmanager
def libraries_to(log: Path | None = None) -> Iterator[None]:
    """Keeps warnings of libraries off the terminal while the body runs; errors that they log are printed.

    Native libraries write to the log what `native_log` keeps from the terminal.

    Args:
      log: file that warnings and errors are appended to; its folder is not made. None: warnings go nowhere.
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
    # absl's own handler is one of the root's.
    before = root.handlers
    root.handlers, warnings.showwarning = [records], show
    native_log.write_to(log)
    try:
        yield
    finally:
        native_log.write_to(None)
        root.handlers, warnings.showwarning = before, shown


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
