"""Reads files from elsewhere, and refuses before reading those that are not regular or too large.

A FIFO or a device never ends, and JSON from elsewhere may be nested too deeply or contain unexpected types.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import reprlib
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

# Default size limit, in bytes, of files that are read completely; the JSON of any dataset is far smaller.
MOST = 1 << 30

Content = TypeVar("Content")

# Errors that Python raises when a library computes with an unchecked value of a damaged file.
_PYTHONS_OWN = (TypeError, AttributeError, LookupError, UnicodeError, ArithmeticError, AssertionError, struct.error)
_OF_VALUES = re.compile(r"invalid literal|could not convert|values? to unpack|embedded null|negative count|math domain")

# For values in messages: bounded in depth and width, because YAML aliases can double a value at every level.
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxdict = _REPR.maxtuple = _REPR.maxset = 20
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = sys.maxsize


class UnreadableError(ValueError):
    """Raised when a file does not have the expected kind or content; the message names the file, and the JSON key."""


def stated(error: BaseException) -> str:
    """The reason that a library's error states for a damaged file, on one line, without messages of Python itself.

    Example:
      >>> from segjax.runtime import reading
      >>> reading.stated(ValueError("block 3 is cut short"))
      'block 3 is cut short'
      >>> reading.stated(TypeError("'>' not supported between instances of 'bytes' and 'int'"))
      'a value in it does not fit'
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = next(filter(None, map(str.strip, str(error).splitlines())), "")
    if not first or isinstance(error, _PYTHONS_OWN) or _OF_VALUES.search(first):
        return "a value in it does not fit"
    return first


def type_name(value: object) -> str:
    """The name of a value's type in messages; "None" for None, because the name NoneType is little known."""
    return "None" if value is None else type(value).__name__


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path with ~ or ~NAME at its beginning replaced by the home folder.

    Raises:
      UnreadableError: The system knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UnreadableError(f"{path}: there is no user {user[1:]!r}; for a file of this name give ./{path}") from None


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading, without waiting for a writer.

    Raises:
      UnreadableError: The path is a folder, FIFO, socket or device.
      OSError: The path does not exist or may not be read.
    """
    # O_NONBLOCK, because opening a FIFO would wait for its writer. The kind is checked on the opened file, because the
    # name may refer to another one a moment later.
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError:
        # The system refuses sockets, and on Windows folders, without a clear reason.
        if path.exists():
            refuse_irregular(path)
        raise
    try:
        kind = os.fstat(handle).st_mode
        if not stat.S_ISREG(kind):
            raise UnreadableError(f"{path}: {_kind(kind)}, not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "a device")


def sha256_of(paths: Iterable[Path]) -> str:
    """sha256 of the contents of regular files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def refuse_irregular(path: Path) -> None:
    """Raises UnreadableError if the path is not a regular file; for libraries that open files by name."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UnreadableError(f"{path}: {_kind(mode)}, not a file")


def read_bytes(path: Path, *, most: int = MOST) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
      UnreadableError: The path is not a regular file, or the file is larger.
      OSError: The path does not exist or may not be read.
    """
    with open_regular(path) as file:
        # Reads one byte more instead of asking for the size: files grow, and those of /proc have no size.
        data = file.read(most + 1)
    if len(data) > most:
        raise UnreadableError(f"{path}: larger than {most:,} bytes, the limit for such files")
    return data


def read_json(path: Path, type_: Any = dict[str, Any], *, most: int = MOST) -> Any:
    """The JSON in a file, with checked types.

    Args:
      path: File.
      type_: Type of the content for pydantic: a generic type, or a TypedDict (from typing_extensions, for Python 3.11).
      most: Maximum size of the file in bytes.

    Raises:
      UnreadableError: The file is not regular, not JSON, or has other types; the message names the key.
      OSError: The path does not exist or may not be read.
    """
    return parse_json(read_bytes(path, most=most), type_, name=path)


def parse_json(data: bytes | str, type_: Any = dict[str, Any], *, name: object) -> Any:
    """`read_json` for JSON in memory; `name` is its origin in messages."""
    data = data.removeprefix(b"\xef\xbb\xbf") if isinstance(data, bytes) else data
    try:
        content = from_json(data)
    except ValueError as error:
        content = _with_surrogates(data) if "surrogate" in str(error) else None
        if content is None:
            why = "nested too deeply" if "recursion" in str(error) else error
            raise UnreadableError(f"{name}: not JSON ({why})") from None
    return checked(content, type_, name=name)


def _with_surrogates(data: bytes | str) -> Any:
    """Parses JSON with escapes of lone surrogates, as Python writes file names that are not UTF-8; None if invalid."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def checked(content: object, type_: Any, *, name: object) -> Any:
    """Returns the content after a check of its types, unconverted and with keys that a TypedDict lacks.

    A whole number is accepted as a float; `pydantic.FiniteFloat` refuses NaN and infinity.

    Raises:
      UnreadableError: The content has other types; the message names the first such key.
    """
    try:
        _adapter(type_).validate_python(content, strict=True)
    except ValidationError as error:
        raise UnreadableError(f"{name}: {_first_fault(error)}") from None
    return content


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] in ("too_short", "too_long"):
        bound = "at least {min_length}" if first["type"] == "too_short" else "at most {max_length}"
        counts = first.get("ctx", {})
        return f"{key} should have {bound.format(**counts)} entries, not {counts.get('actual_length')}"
    found = _REPR.repr(first["input"])
    message = first["msg"].replace("Input should be", "should be", 1).removeprefix("Value error, ")
    return f"{key + ' ' if key else ''}{message}, not {found[:60]}{'...' * (len(found) > 60)}"


@functools.cache
def _adapter(type_: Any) -> TypeAdapter:
    return TypeAdapter(type_)
