"""Reading files from elsewhere: what is no regular file, or too large, is refused before it is read.

A FIFO or a device never ends, and JSON from elsewhere may be nested too deeply or hold other types than expected.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

# Bytes of the largest file that is read as a whole where the caller names no limit; JSON of any dataset is far smaller.
MOST = 1 << 30

Content = TypeVar("Content")


class UnreadableError(ValueError):
    """A file that cannot be read as what it should be; the message names the file, and in JSON the key."""


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path in which ~ and ~NAME at the beginning stand for a home folder.

    Raises:
      UnreadableError: the system knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UnreadableError(f"{path}: there is no user {user[1:]!r}; a file of this name is ./{path}") from None


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading; never waits for a writer.

    Raises:
      UnreadableError: something else is there: a folder, FIFO, socket or device.
      OSError: there is nothing, or it may not be read.
    """
    # O_NONBLOCK: to open a FIFO would wait for its writer. The kind is that of what was opened, not of a name that may
    # stand for something else a moment later.
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError:
        # The system itself opens no sockets, and on Windows no folders; it does not say why.
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
    """Raises UnreadableError where something other than a regular file is there: for libraries that open by name."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UnreadableError(f"{path}: {_kind(mode)}, not a file")


def read_bytes(path: Path, *, most: int = MOST) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
      UnreadableError: it is something else, or larger.
      OSError: there is nothing, or it may not be read.
    """
    with open_regular(path) as file:
        # One byte more, since files grow, and those of /proc have no size.
        data = file.read(most + 1)
    if len(data) > most:
        raise UnreadableError(f"{path}: larger than {most:,} bytes, which no such file is")
    return data


def read_json(path: Path, type_: Any = dict[str, Any], *, most: int = MOST) -> Any:
    """The JSON of a file, of the expected types.

    Args:
      type_: type of the content, as pydantic checks it: a generic type, or a TypedDict (of
        typing_extensions, for Python 3.11).

    Raises:
      UnreadableError: it is no regular file, no JSON, or of other types; the message names the key.
      OSError: there is nothing, or it may not be read.
    """
    return parse_json(read_bytes(path, most=most), type_, name=path)


def parse_json(data: bytes | str, type_: Any = dict[str, Any], *, name: object) -> Any:
    """The same for JSON in memory; `name` stands in messages for where it came from."""
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
    """JSON with escapes of lone surrogates, as Python writes file names that are not UTF-8; None for no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def checked(content: object, type_: Any, *, name: object) -> Any:
    """The content itself, whose types were checked: nothing is converted, and keys that a TypedDict lacks stay.

    A whole number may stand for a float; `pydantic.FiniteFloat` refuses NaN and infinity.

    Raises:
      UnreadableError: it has other types; the message names the first key that does.
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
    found = repr(first["input"])
    message = first["msg"].replace("Input should be", "should be", 1).removeprefix("Value error, ")
    return f"{key + ' ' if key else ''}{message}, not {found[:60]}{'...' * (len(found) > 60)}"


@functools.cache
def _adapter(type_: Any) -> TypeAdapter:
    return TypeAdapter(type_)
