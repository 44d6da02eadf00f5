"""Files in folders and in zip and tar archives, among which readers find examples; and `DataError`.

Files are read one by one from an archive, without extracting it. Only a .tar.gz, which has no random access, is first
unpacked to a .tar in a scratch folder.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import lzma
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from segjax.runtime import atomic, console, reading


class DataError(ValueError):
    """A source or a prepared dataset that cannot be used; the message lists every reason and its remedy.

    Example:
      >>> from segjax import data
      >>> try:
      ...     data.prepare("yards")
      ... except data.DataError as error:
      ...     print(error)
      no dataset 'yards' to prepare; choose from ...
    """


class NoSourceError(DataError):
    """A dataset is not prepared, and has no source; commands add the name of the flag to the message."""


_SHOWN = 10  # maximum entries of one kind in a report
# Maximum bytes of an image or mask file; several threads hold one each.
MOST = 1 << 28
# Compression ratio that images never reach in an archive; and bytes up to which a file may have any ratio.
_MOST_RATIO, _HARMLESS = 200, 1 << 26
# Errors of the standard library for damaged archives. RuntimeError: a password, or an unknown compression method.
_DAMAGED = (
    *(zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, ValueError, OverflowError, RuntimeError),
)

Problems = collections.defaultdict[str, list[str]]  # kind, with its remedy -> files, with the values found there


@dataclasses.dataclass(frozen=True)
class File:
    """One file in a folder or an archive.

    Attributes:
      name: Path, for messages.
      size: Number of bytes.
      read: () -> content, from any thread; OSError or UnreadableError if it cannot be read.
    """

    name: str
    size: int
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Example:
    """One image of a split.

    Attributes:
      name: Name of the image, unique in the split.
      image: File of the image.
      label: File of its mask; None if it is not published.
    """

    name: str
    image: File
    label: File | None


class ArchiveError(ValueError):
    """A file that is not an archive, or is damaged; the message states the reason."""


Examples = dict[str, list[Example]]  # split -> examples in the order of their names


def in_folder(root: Path, parts: Iterable[str], problems: Problems, skipped: list[str]) -> Iterator[tuple[str, Path]]:
    """Yields (path relative to `root`, path) of all files below the folders of `parts` that `root` contains.

    Links are followed, and each folder is read once: further links to it, or to a folder around it, are added to
    `skipped`. FIFOs, devices, sockets and broken links are added to `problems`.
    """
    seen: set[tuple[int, int]] = set()

    def is_new(folder: Path) -> bool:
        found = folder.stat()
        if (found.st_dev, found.st_ino) in seen:
            skipped.append(folder.relative_to(root).as_posix())
            return False
        seen.add((found.st_dev, found.st_ino))
        return True

    def stop(error: OSError):
        raise error

    for part in sorted(parts):
        if not (root / part).is_dir() or not is_new(root / part):
            continue
        for directory, folders, names in os.walk(root / part, followlinks=True, onerror=stop):
            folders[:] = [name for name in sorted(folders) if is_new(Path(directory, name))]
            inside = Path(directory).relative_to(root)
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file():
                    yield (inside / name).as_posix(), path
                elif name[0] != ".":
                    problems[NOT_REGULAR].append(f"{(inside / name).as_posix()}: {kind_of(path)}")


NOT_REGULAR = "entries that are neither files nor folders; remove them"


def kind_of(path: Path) -> str:
    """Describes an entry that is not a regular file."""
    if path.is_symlink() and not path.exists():
        return f"a broken link to {os.readlink(path)}"
    try:
        reading.refuse_irregular(path)
    except reading.UnreadableError as error:
        return str(error).removeprefix(f"{path}: ")
    return "a file"


def file_of(path: Path, name: str) -> File:
    return File(name, path.stat().st_size, functools.partial(reading.read_bytes, path, most=MOST))


def in_archive(
    path: Path, scratch: Callable[[], Path], opened: contextlib.ExitStack, problems: Problems
) -> dict[str, File]:
    """The files of a .zip, .tar or .tar.gz, by path inside; the type is detected from the content.

    Args:
      path: Path of the archive.
      scratch: Function that creates and returns the folder for the unpacked .tar of a .tar.gz; an existing .tar there
        is used.
      opened: Stack that closes the archive; files can be read until then.
      problems: Receives the members that are refused.

    Raises:
      ArchiveError: The file is not such an archive, is damaged, or unpacks to far more bytes than images do.
    """
    with reading.open_regular(path) as file:
        head = file.read(4)
    try:
        if zipfile.is_zipfile(path):
            return _in_zip(path, opened, problems)
        if head[:2] == b"\x1f\x8b":
            return _in_tar(_unpacked(path, scratch()), path.name, problems)
        if head == b"PK\x03\x04":
            raise ArchiveError("a .zip that is cut short")
        return _in_tar(path, path.name, problems)
    except ArchiveError:
        raise
    except tarfile.ReadError as error:
        raise ArchiveError(f"begins with {head!r} ({reading.stated(error)})") from None
    except _DAMAGED as error:
        raise ArchiveError(f"damaged or cut short ({reading.stated(error)})") from None


def _in_zip(path: Path, opened: contextlib.ExitStack, problems: Problems) -> dict[str, File]:
    archive = opened.enter_context(zipfile.ZipFile(path))

    def read(info: zipfile.ZipInfo) -> bytes:
        _refuse_bomb(f"{path.name}: {info.filename}", info.file_size, info.compress_size)
        try:
            return archive.read(info)
        except _DAMAGED as error:
            raise OSError(f"cannot be read from {path.name}: {error}") from None

    files: dict[str, File] = {}
    for info in archive.infolist():
        # Unix file type; 0 if another system wrote the archive.
        kind = stat.S_IFMT(info.external_attr >> 16)
        fault = _fault_of_name(info.filename, info.filename.endswith("/"))
        if not fault and kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = "is a link" if kind == stat.S_IFLNK else "is a device"
        if fault:
            problems[_UNSAFE].append(f"{path.name}: {info.filename!r} {fault}")
        elif info.is_dir():
            continue
        elif (name := posixpath.normpath(info.filename)) in files:
            problems["files that occur twice in an archive; fetch it again"].append(f"{path.name}: {info.filename}")
        else:
            name_shown = f"{path.name}: {info.filename}"
            files[name] = File(name_shown, info.file_size, functools.partial(read, info))
    return files


_UNSAFE = (
    "archive members that are links or devices, or whose names lead out of the archive or to nothing; the published "
    "archives have none, fetch them again"
)


def _fault_of_name(name: str, is_folder: bool) -> str | None:
    """Reason why the name of an archive member is not safe; None if it is."""
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", name):
        return "has an absolute name"
    if ".." in re.split(r"[/\\]", name):
        return "has a name with .."
    if not is_folder and posixpath.normpath(name) == ".":
        return "has an empty name"
    return None


def _refuse_bomb(name: str, size: int, packed: int) -> None:
    """Raises UnreadableError if a file is larger than any image, or compressed more than images can be."""
    if size > MOST:
        raise reading.UnreadableError(f"{name}: {size:,} bytes, more than any image or mask")
    if size > _HARMLESS // 8 and size > _MOST_RATIO * max(packed, 1):
        raise reading.UnreadableError(f"{name}: unpacks from {packed:,} to {size:,} bytes, which no image or mask does")


def _in_tar(path: Path, shown: str, problems: Problems) -> dict[str, File]:
    def read(start: int, size: int) -> bytes:
        _refuse_bomb(shown, size, size)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"cut short in {shown}")
        return data

    files: dict[str, File] = {}
    replaced = 0
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            fault = _fault_of_name(member.name, member.isdir())
            if not fault and (not member.isreg() or member.issparse()) and not member.isdir():
                is_link = member.issym() or member.islnk()
                fault = "is a link" if is_link else "has holes" if member.issparse() else "is a device or a FIFO"
            if fault:
                problems[_UNSAFE].append(f"{shown}: {member.name!r} {fault}")
            elif not member.isdir():
                name = posixpath.normpath(member.name)
                replaced += name in files
                reader = functools.partial(read, member.offset_data, member.size)
                files[name] = File(f"{shown}: {member.name}", member.size, reader)
    if replaced:
        console.say(f"{shown}: {replaced} files occur twice; as in every .tar, the last of each counts")
    return files


def _unpacked(path: Path, scratch: Path) -> Path:
    """Unpacks a .tar.gz to a .tar, atomically; ArchiveError for a decompression bomb, before it fills the disk."""
    result = scratch / f"{path.name}.tar"
    if not result.exists():
        with (
            atomic.replacing_file(result, durable=False) as temporary,
            reading.open_regular(path) as packed,
            gzip.open(packed) as source,
            temporary.open("wb") as destination,
            console.ProgressBar(f"unpacking {path.name}", path.stat().st_size, "B") as progress,
        ):
            written = 0
            while block := source.read(1 << 20):
                written += destination.write(block)
                if written > _HARMLESS and written > _MOST_RATIO * packed.tell():
                    raise ArchiveError(
                        f"unpacks from {packed.tell():,} bytes to more than {written:,}, which no images do"
                    )
                progress.advance(packed.tell() - progress.count)
    return result


def digest_of(paths: Iterable[tuple[str, Path]], *start: bytes, numbers: bool = False) -> str:
    """Hash of the present state of files, 16 hex digits: of their names, sizes and modification times.

    Args:
      paths: (name, path) of each file.
      start: Bytes that are hashed first.
      numbers: Whether the inode of each file counts too, which a file keeps when it is moved.
    """
    digest = hashlib.sha256(b"\0".join(start))
    for name, path in paths:
        found = path.stat()
        number = f"{found.st_ino}\0" if numbers else ""
        digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0{number}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def fingerprint_of(examples: Examples, *start: bytes) -> str:
    """Hash of the examples of a dataset, 16 hex digits: of splits, names and sizes, but not of paths.

    Hashes of the contents are exact, but take minutes to compute; see `contents.py`.
    """
    digest = hashlib.sha256(b"\0".join(start))
    for split, found in examples.items():
        for example in found:
            sizes = f"{example.image.size}\0{example.label.size if example.label else ''}"
            digest.update(f"{split}\0{example.name}\0{sizes}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def shorten(entries: list) -> list[str]:
    """The first entries, each as one line of text, and the number of the others."""
    rest = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [console.one_line(entry, most=300) for entry in entries[:_SHOWN]] + rest


def listed(entries: list) -> str:
    return ", ".join(shorten(entries))


def counted(splits: dict[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in splits.items())
