"""Checks of a `.pth` before torch reads it: checksums, and shapes next to the numbers that are there.

torch.load compares no checksum of the zip, names no tensor in its errors, takes the last of two entries of one name,
and makes a tensor of terabytes from one number with stride 0.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from segjax.checkpoints.errors import CheckpointError, shorten
from segjax.runtime.reading import open_regular

# Bytes of a number in each of torch's storages that can be read.
_ITEM_SIZES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage", "UntypedStorage"), 1),
}
# A zip of torch is not compressed; one that somebody has packed again shrinks weights by little.
_LARGEST_RATIO = 20


# ------------------------------------------------------------------------------------------------------------- the zip


def refuse_odd_zip(source: Path) -> None:
    """Raises CheckpointError for a zip with two members of one name, or of which one would not fit into memory."""
    with _members(source) as (_, members, data):
        if twice := sorted(name for name, n in Counter(member.filename for member in members).items() if n > 1):
            raise CheckpointError(f"{source}: two members are called {shorten(twice)}; fetch it again")
        unpacked = sum(member.file_size for member in members)
        if unpacked > _LARGEST_RATIO * len(data):
            raise CheckpointError(f"{source}: would unpack to {unpacked:,} bytes, which are no weights; fetch it again")


def refuse_damaged_zip(source: Path) -> None:
    """Raises CheckpointError where a member does not have its checksum."""
    with _members(source) as (archive, members, data):
        for member in members:
            if _checksum(archive, member, data) != member.CRC:
                raise CheckpointError(
                    f"{source}: damaged, since {member.filename} does not have its checksum; fetch it again"
                )


@contextlib.contextmanager
def _members(source: Path) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo], mmap.mmap]]:
    with open_regular(source) as file:
        try:
            with zipfile.ZipFile(file) as archive, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield archive, archive.infolist(), data
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(
                f"{source}: a PyTorch checkpoint that is damaged or cut short ({error}); fetch it again"
            ) from None


def _checksum(archive: zipfile.ZipFile, member: zipfile.ZipInfo, data: mmap.mmap) -> int:
    if member.compress_type != zipfile.ZIP_STORED:
        checksum = 0
        with archive.open(member) as file:
            while block := file.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
        return checksum
    # Without copies, and without the interpreter's lock.
    name, extra = struct.unpack_from("<HH", data, member.header_offset + 26)
    start = member.header_offset + 30 + name + extra
    with memoryview(data) as view, view[start : start + member.file_size] as content:
        return zlib.crc32(content) if len(content) == member.file_size else -1


# ---------------------------------------------------------------------------------------------------------- the pickle


class _Inert:
    """Stands for everything that a pickle would import, call or make; keeps what it was given."""

    origin = ""
    content: list

    def __new__(cls, *content, **named):
        made = super().__new__(cls)
        made.content = [*content, *named.values()]
        return made

    def __setstate__(self, state):
        self.content.append(state)

    def append(self, value):
        self.content.append(value)

    def extend(self, values):
        self.content.extend(values)

    def add(self, value):
        self.content.append(value)

    def __setitem__(self, key, value):
        self.content.append({key: value})


class _Reader(pickle._Unpickler):
    """Reads the structure of a pickle, in which every class and function is inert: nothing is imported or called.

    Python's own reader rather than C's, which takes any memory that a damaged pickle asks for.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list
    pop_mark: Callable[[], list]

    def __init__(self, file: BinaryIO | io.BytesIO):
        super().__init__(file)
        self.twice: list[str] = []
        self.content: Any = None

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        return type(name, (_Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid):
        return pid

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def load_setitems(self):
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key, value):
        target = self.stack[-1]
        if isinstance(target, dict) and isinstance(key, str) and key in target:
            self.twice.append(key)
        target[key] = value

    def load_build(self):
        state = self.stack.pop()
        # A dict stands for an OrderedDict, whose attributes have no tensors.
        if isinstance(target := self.stack[-1], _Inert):
            target.content.append(state)

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build


def refuse_odd_tensors(source: Path, loaded: object) -> None:
    """The errors of `refuse_unreadable_tensors` for what torch has loaded without one.

    The pickle, which takes torch a third of its time, is read a second time only where a tensor has more numbers than
    are stored, or the file has numbers of which no tensor is made, as of the first of two of one name.
    """
    storages, seen = set[int](), set[int]()
    waiting: list[Any] = [loaded]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif hasattr(value, "untyped_storage"):
            try:
                storage: Any = value.untyped_storage()
            except (RuntimeError, NotImplementedError):
                # Sparse tensors have several.
                return refuse_unreadable_tensors(source)
            if value.numel() * value.element_size() > storage.nbytes():
                return refuse_unreadable_tensors(source)
            if storage.nbytes():
                storages.add(storage.data_ptr())
    with open_regular(source) as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                stored = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
            if len(stored) == len(storages):
                return None
    return refuse_unreadable_tensors(source)


def refuse_unreadable_tensors(source: Path) -> None:
    """Raises CheckpointError for tensors with more numbers than are stored, and for names that are given twice.

    A pickle that is damaged, or none of torch's, passes: torch.load has the message for it.
    """
    try:
        reader, stored = _read(source)
        problems = [f"{path} {why}" for path, tensor in _tensors(reader.content) if (why := _problem(tensor, stored))]
    except OSError:
        raise
    except Exception:
        # Whatever a damaged pickle can raise.
        return
    if reader.twice:
        raise CheckpointError(f"{source}: two entries are called {shorten(reader.twice, most=6)}; save it again")
    if problems:
        raise CheckpointError(
            f"{source}: {shorten(problems, most=6)}. The file is damaged, or the tensor was expanded: save its clone()"
        )


def _read(source: Path) -> tuple[_Reader, dict[str, int]]:
    """The reader with the content of a `.pth`, and the bytes of each storage by its key."""
    with open_regular(source) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            # Before torch 1.6: a magic number, the version and sizes of types come before the content.
            for _ in range(4):
                reader = _Reader(file)
                reader.content = reader.load()
            return reader, {}
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            reader = _Reader(io.BytesIO(archive.read(members["data.pkl"])))
            reader.content = reader.load()
            prefix = "data/"
            return reader, {
                name.removeprefix(prefix): info.file_size for name, info in members.items() if name.startswith(prefix)
            }


def _tensors(content: object) -> Iterator[tuple[str, list]]:
    """Names of tensors by the entries around them, and the arguments that torch makes each from."""
    waiting, seen = [("", content)], set[int]()
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _Inert) and value.origin.startswith("torch._utils._rebuild_tensor"):
            yield path, value.content
        elif isinstance(value, _Inert):
            waiting += [(path, part) for part in value.content]
        elif isinstance(value, dict):
            waiting += [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(path, part) for part in value]


def _problem(tensor: list, stored: dict[str, int]) -> str | None:
    """Why a tensor cannot be read; None where it can. stored: bytes of each storage in the file, where known."""
    (_, kind, key, _, count, *_), offset, shape, strides, *_ = tensor
    size: int = _ITEM_SIZES.get(str(kind.__name__), 1)
    if str(key) in stored:
        count = min(count, stored[str(key)] // size)
    numbers = math.prod(shape)
    reach = offset + 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if numbers and max(numbers, reach) > count:
        return f"has the shape {tuple(shape)}, and {count:,} numbers are stored"
    return None
