"""Files in folders and in zip and tar archives, which readers look for examples in; and their error, `DataError`.

Files are read one by one from an archive, which is never extracted. Only a .tar.gz, which has no random access, is
unpacked to a .tar in a scratch folder first.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import os
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from segjax.runtime import atomic, console


class DataError(ValueError):
    """A source or a prepared dataset that cannot be used; the message lists every reason and its remedy."""


_SHOWN = 10  # entries of one kind that a report lists

Problems = collections.defaultdict[str, list[str]]  # kind, with its remedy -> the files, with the values found there


@dataclasses.dataclass(frozen=True)
class File:
    """One file in a folder or an archive.

    Attributes:
      name: the path, for messages.
      size: bytes.
      read: () -> content, from any thread; OSError if it cannot be read.
    """

    name: str
    size: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of a split.

    Attributes:
      name: unique in the split.
      image: a JPEG or PNG.
      label: its mask; None if it is not published.
    """

    name: str
    image: File
    label: File | None


class ArchiveError(ValueError):
    """A file that is not an archive, or a damaged one; the message states what was found."""


Examples = dict[str, list[Example]]  # split -> examples in the order of their names


def in_folder(root: Path, parts: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(path relative to `root`, path) of all files below those folders of `parts` that `root` contains."""
    for part in sorted(parts):
        for directory, folders, names in os.walk(root / part, followlinks=True):
            folders.sort()
            inside = Path(directory).relative_to(root)
            yield from (((inside / name).as_posix(), Path(directory, name)) for name in sorted(names))


def file_of(path: Path, name: str) -> File:
    return File(name, path.stat().st_size, path.read_bytes)


def in_archive(path: Path, scratch: Callable[[], Path], opened: contextlib.ExitStack) -> dict[str, File]:
    """The files of a .zip, .tar or .tar.gz by their path inside; the type is detected from the content.

    Args:
      scratch: creates and returns the folder that a .tar.gz is unpacked to; a .tar that is there already is used.
      opened: closes the archive; files can be read until then.

    Raises:
      ArchiveError: the file is not such an archive, or it is damaged.
    """
    with path.open("rb") as file:
        head = file.read(4)
    try:
        if zipfile.is_zipfile(path):
            return _in_zip(path, opened)
        if head[:2] == b"\x1f\x8b":
            return _in_tar(_unpacked(path, scratch()), path.name)
        if head == b"PK\x03\x04":
            raise ArchiveError("a .zip that is cut short")
        return _in_tar(path, path.name)
    except tarfile.ReadError as error:
        raise ArchiveError(f"begins with {head!r} ({error})") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ArchiveError(f"damaged or cut short ({error})") from None


def _in_zip(path: Path, opened: contextlib.ExitStack) -> dict[str, File]:
    archive = opened.enter_context(zipfile.ZipFile(path))

    def read(info: zipfile.ZipInfo) -> bytes:
        try:
            return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it has a password
            raise OSError(f"cannot be read from {path.name}: {error}") from None

    return {
        posixpath.normpath(info.filename): File(
            f"{path.name}: {info.filename}", info.file_size, functools.partial(read, info)
        )
        for info in archive.infolist()
        if not info.is_dir()
    }


def _in_tar(path: Path, shown: str) -> dict[str, File]:
    def read(start: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    with tarfile.open(path, "r:") as archive:
        return {
            posixpath.normpath(member.name): File(
                f"{shown}: {member.name}", member.size, functools.partial(read, member.offset_data, member.size)
            )
            for member in archive
            if member.isreg()
        }


def _unpacked(path: Path, scratch: Path) -> Path:
    """The .tar of a .tar.gz, written atomically."""
    result = scratch / f"{path.name}.tar"
    if not result.exists():
        with (
            atomic.replacing_file(result, durable=False) as temporary,
            path.open("rb") as packed,
            gzip.open(packed) as source,
            temporary.open("wb") as destination,
            console.ProgressBar(f"unpacking {path.name}", path.stat().st_size, "B") as progress,
        ):
            while block := source.read(1 << 20):
                destination.write(block)
                progress.advance(packed.tell() - progress.count)
    return result


def digest_of(paths: Iterable[tuple[str, Path]], *start: bytes) -> str:
    """16 hex digits that identify the present state of files: a hash of their names, sizes and modification times."""
    digest = hashlib.sha256(b"\0".join(start))
    for name, path in paths:
        stat = path.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def fingerprint_of(examples: Examples, *start: bytes) -> str:
    """16 hex digits that identify the examples of a dataset, wherever its files are: a hash of splits, names and sizes.

    A hash of the contents would be exact, but reading them at every start takes minutes.
    """
    digest = hashlib.sha256(b"\0".join(start))
    for split, found in examples.items():
        for example in found:
            sizes = f"{example.image.size}\0{example.label.size if example.label else ''}"
            digest.update(f"{split}\0{example.name}\0{sizes}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def shorten(entries: list) -> list[str]:
    """The first entries as text, and the number of the others."""
    rest = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [f"{entry!s:.300}" for entry in entries[:_SHOWN]] + rest


def listed(entries: list) -> str:
    return ", ".join(shorten(entries))


def counted(splits: dict[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in splits.items())
