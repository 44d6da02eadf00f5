"""Reads files of `torch.save` and `pickle` without PyTorch; nothing in a file is imported or called.

Stand-ins replace everything that a pickle would import, so that weights can be read next to any other objects.
`torch.save` writes a zip (since PyTorch 1.6), or pickles followed by the bytes of storages. Unlike torch.load, this
module compares the checksums of the zip, notices duplicate names, and refuses a tensor of terabytes made from one
number with stride 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import jax.numpy as jnp
import numpy as np

from segjax.checkpoints.errors import CheckpointError, shorten
from segjax.runtime.reading import open_regular, type_name

# Dtypes by the name of torch's storage class or of the dtype.
_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for names, dtype in (
        (("DoubleStorage", "float64", "double"), np.float64),
        (("FloatStorage", "float32", "float"), np.float32),
        (("HalfStorage", "float16", "half"), np.float16),
        (("BFloat16Storage", "bfloat16"), jnp.bfloat16),
        (("LongStorage", "int64", "long"), np.int64),
        (("IntStorage", "int32", "int"), np.int32),
        (("ShortStorage", "int16", "short"), np.int16),
        (("CharStorage", "int8"), np.int8),
        (("ByteStorage", "UntypedStorage", "uint8"), np.uint8),
        (("BoolStorage", "bool"), np.bool_),
        (("ComplexFloatStorage", "complex64"), np.complex64),
        (("ComplexDoubleStorage", "complex128"), np.complex128),
        (("uint16",), np.uint16),
        (("uint32",), np.uint32),
        (("uint64",), np.uint64),
        (("float8_e4m3fn",), jnp.float8_e4m3fn),
        (("float8_e5m2",), jnp.float8_e5m2),
    )
    for name in names
}
# torch's zip is not compressed; in a zip that was packed again, weights shrink only a little.
_LARGEST_RATIO = 20
# More entries than any checkpoint has; a few hundred bytes of pickle can make billions.
MOST_ENTRIES = 1_000_000
# Content of the first pickle in a file without a zip (torch.serialization.MAGIC_NUMBER).
_MAGIC = 0x1950A86A20F9469CFC6C

# Key of a storage -> its bytes; and key -> number of bytes in the file.
Read = Callable[[str], bytes]
Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose bytes are not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    _strides: tuple[int, ...]
    _offset: int
    _key: str
    _count: int
    _file: _File

    def read(self) -> np.ndarray:
        """Reads the tensor into a read-only array.

        Raises:
          CheckpointError: The file holds fewer numbers than the shape needs, or their checksum is wrong.
        """
        stored = min(self._count, self._file.sizes.get(self._key, 0) // self.dtype.itemsize)
        reach = self._offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self._strides, strict=True))
        numbers = math.prod(self.shape)
        if numbers and max(numbers, reach) > stored:
            raise CheckpointError(
                f"has the shape {self.shape}, but {stored:,} numbers are stored. The file is damaged, or the tensor "
                "was expanded: save its clone()"
            )
        if not numbers:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        strides, offset = [step * size for step in self._strides], self._offset * size
        array = np.ndarray(self.shape, self.dtype, self._file.bytes_of(self._key), offset, strides)
        return array.byteswap() if self._file.is_swapped else array


@dataclasses.dataclass(frozen=True)
class Standin:
    """Stand-in for an object that cannot be read: no container, number, text, array or plain tensor.

    Attributes:
      origin: Name of its class, or of the function that would have made it.
      is_tensor: Whether torch would make a tensor of it, for example a sparse or quantized one.
    """

    origin: str
    is_tensor: bool = False


@contextlib.contextmanager
def opened(source: Path) -> Iterator[object]:
    """Opens a `.pth` or a pickle, and yields its content.

    In the content, tensors are `StoredTensor`, whole modules are mappings of their parameters, buffers and modules,
    arrays and numbers of numpy are read, and all other objects are `Standin`. Tensors can be read inside the context.

    Raises:
      CheckpointError: The file is damaged, has two entries of one name, or would unpack to too many bytes.
    """
    with open_regular(source) as stream, contextlib.ExitStack() as opened_files:
        with _damage(source):
            is_zip = stream.read(2) == b"PK"
            stream.seek(0)
            if is_zip:
                reader, file = _read_zip(source, opened_files.enter_context(zipfile.ZipFile(stream)))
            else:
                reader, file = _read_pickles(stream)
            if reader.twice:
                raise CheckpointError(
                    f"{source}: two entries are called {shorten(reader.twice, most=6)}; save it again"
                )
            content = _Resolver(file).resolved(reader.content)
        yield content


class _BrokenError(ValueError):
    """Raised for content that no writer produces; the message is the reason."""


@contextlib.contextmanager
def _damage(source: Path) -> Iterator[None]:
    """Raises the errors of a damaged file as CheckpointError; a damaged pickle may raise almost any error."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except RecursionError:
        raise CheckpointError(
            f"{source}: this is not a state dict (names to arrays): it is nested too deeply"
        ) from None
    except Exception as error:
        # EINVAL: a damaged zip may point before the beginning of the file. Other errors of the system pass.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        in_words = isinstance(error, _BrokenError | zipfile.BadZipFile | zlib.error | OSError)
        reason = str(error).partition("\n")[0].removeprefix(f"[Errno {errno.EINVAL}] ") if in_words else ""
        raise CheckpointError(
            f"{source}: a PyTorch checkpoint that is damaged or cut short "
            f"({reason or 'its description of tensors is broken'}); fetch it again"
        ) from None


# ------------------------------------------------------------------------------------------------------------ the file


class _File:
    """The storages in a file; each is read once."""

    def __init__(self, read: Read, sizes: Sizes, *, is_swapped: bool = False):
        self.sizes, self.is_swapped = sizes, is_swapped
        self._read = read
        self._bytes: dict[str, bytes] = {}

    def bytes_of(self, key: str) -> bytes:
        if key not in self._bytes:
            self._bytes[key] = self._read(key)
        return self._bytes[key]


def _read_zip(source: Path, archive: zipfile.ZipFile) -> tuple[_Reader, _File]:
    refuse_odd_zip(source, archive)
    root = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
    if root is None:
        raise _BrokenError("it has no data.pkl")
    root = root.removesuffix("data.pkl")
    prefix = f"{root}data/"
    sizes = {m.filename.removeprefix(prefix): m.file_size for m in archive.infolist() if m.filename.startswith(prefix)}

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            # Python's message about a damaged name does not help the user.
            reason = "its name is damaged" if isinstance(error, UnicodeError) else str(error)
            why = "does not have its checksum" if "CRC" in reason else f"cannot be unpacked ({reason})"
            raise CheckpointError(f"{source}: damaged, since {name} {why}; fetch it again") from None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise CheckpointError(f"{source}: damaged, since {name} lies outside of it; fetch it again") from None

    reader = _Reader(io.BytesIO(read(f"{root}data.pkl")))
    reader.content = reader.load()
    order = read(f"{root}byteorder").decode() if f"{root}byteorder" in archive.namelist() else "little"
    return reader, _File(lambda key: read(prefix + key), sizes, is_swapped=order != sys.byteorder)


def refuse_odd_zip(source: Path, archive: zipfile.ZipFile) -> None:
    """Raises CheckpointError for a zip with two members of one name, or that unpacks to too many bytes."""
    members = archive.infolist()
    if twice := sorted(name for name, n in Counter(member.filename for member in members).items() if n > 1):
        raise CheckpointError(f"{source}: two members are called {shorten(twice)}; fetch it again")
    unpacked = sum(member.file_size for member in members)
    if unpacked > _LARGEST_RATIO * source.stat().st_size:
        raise CheckpointError(f"{source}: would unpack to {unpacked:,} bytes, too many for weights; fetch it again")


def _read_pickles(stream: BinaryIO | io.BytesIO) -> tuple[_Reader, _File]:
    """Reads a file that is not a zip: one of PyTorch before 1.6, or a plain pickle."""
    reader = _Reader(stream)
    reader.content = reader.load()
    if reader.content != _MAGIC:
        return reader, _File(lambda key: b"", {})
    _Reader(stream).load()  # The version of the format.
    facts = _Reader(stream).load()
    is_little = not isinstance(facts, dict) or facts.get("little_endian", True)
    reader = _Reader(stream)
    reader.content = reader.load()
    keys = _Reader(stream).load()
    begin, end, places = stream.tell(), stream.seek(0, os.SEEK_END), dict[str, tuple[int, int]]()
    stream.seek(begin)
    for key in keys:
        (count,) = struct.unpack("<q", stream.read(8))
        begin, size = stream.tell(), count * reader.item_size(str(key))
        if not 0 <= size <= end - begin:
            raise _BrokenError(f"storage {key} ends after the end of the file")
        places[str(key)] = begin, size
        stream.seek(begin + size)

    def read(key: str) -> bytes:
        begin, size = places[key]
        stream.seek(begin)
        return stream.read(size)

    sizes = {key: size for key, (_, size) in places.items()}
    return reader, _File(read, sizes, is_swapped=is_little != (sys.byteorder == "little"))


# ---------------------------------------------------------------------------------------------------------- the pickle


class _Inert:
    """Replaces everything that a pickle would import, call or make; keeps the arguments."""

    origin = ""
    content: list
    items: dict

    def __new__(cls, *content, **named):
        made = super().__new__(cls)
        made.content = [*content, *named.values()]
        made.items = {}
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
        self.items[key] = value


_CONTAINERS = {
    ("collections", "OrderedDict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage that a pickle refers to: name of its class, key in the file, number of elements, and first element."""

    kind: str
    key: str
    count: int
    begin: int = 0


class _Bounded:
    """A file whose `read` is limited to its size, because a larger request would first allocate the memory."""

    def __init__(self, file: BinaryIO | io.BytesIO):
        self._file, self.readline, self.tell = file, file.readline, file.tell
        begin = file.tell()
        self.size = file.seek(0, os.SEEK_END)
        file.seek(begin)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, self.size))


class _Reader(pickle._Unpickler):
    """Reads the structure of a pickle with every class and function inert: nothing is imported or called.

    It extends the reader in Python, because the reader in C allocates any memory that a damaged pickle requests.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list
    pop_mark: Callable[[], list]
    read: Callable[[int], bytes]
    append: Callable[[object], None]

    def __init__(self, file: BinaryIO | io.BytesIO):
        bounded = _Bounded(file)
        # Latin-1, because pickles of Python 2 may store the bytes of arrays as text.
        super().__init__(bounded, encoding="latin1")
        self._bounded = bounded
        self.twice: list[str] = []
        self.content: Any = None
        self._storages: dict[str, _Storage] = {}

    def load(self):
        try:
            return super().load()
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            raise _BrokenError(f"its pickle is broken before byte {self._bounded.tell():,}") from error

    def find_class(self, module, name):
        # Also by their names in Python 2.
        if (found := _CONTAINERS.get((module.replace("__builtin__", "builtins"), name))) is not None:
            return found
        return type(name, (_Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or not pid:
            return _Inert(pid)
        if pid[0] == "module":
            # Before torch 1.6: a class with its source.
            return pid[1]
        _, kind, key, _, count, *view = pid
        storage = _Storage(kind.__name__, str(key), count)
        if view and view[0] is not None:
            # A part of another storage.
            _, begin, count = view[0]
            storage = dataclasses.replace(storage, begin=begin, count=count)
        self._storages[storage.key] = storage
        return storage

    def item_size(self, key: str) -> int:
        """Number of bytes per element of a storage that the pickle refers to."""
        return _DTYPES[self._storages[key].kind].itemsize

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

    def load_bytearray8(self):
        (size,) = struct.unpack("<Q", self.read(8))
        if size > self._bounded.size:
            raise pickle.UnpicklingError(f"an array of {size:,} bytes")
        self.append(bytearray(self.read(size)))

    def load_build(self):
        state = self.stack.pop()
        # OrderedDicts are read as dicts, because their attributes contain no tensors.
        if isinstance(target := self.stack[-1], _Inert):
            target.content.append(state)

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.BUILD[0]] = load_build


# ------------------------------------------------------------------------------------------------- what it stands for

_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASSES = ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type")
_NUMPY = ("numpy.core.", "numpy._core.")


class _Resolver:
    """Replaces inert objects by the objects that they mean, in place."""

    def __init__(self, file: _File):
        self._file = file
        # Objects are kept, so that no other object gets their id.
        self._done: dict[int, tuple[object, object]] = {}

    def resolved(self, value: Any) -> Any:
        if not isinstance(value, dict | list | tuple | _Inert | _Storage | type):
            return value
        if id(value) in self._done:
            return self._done[id(value)][1]
        if isinstance(value, dict | list):
            self._done[id(value)] = value, value
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                value[key] = self.resolved(value[key])
            return value
        result = self._made(value)
        self._done[id(value)] = value, result
        return result

    def _made(self, value: tuple | _Inert | _Storage | type) -> object:
        if isinstance(value, tuple):
            return tuple(map(self.resolved, value))
        if isinstance(value, _Storage):
            return Standin(f"torch.{value.kind}")
        if isinstance(value, type):
            return Standin(getattr(value, "origin", value.__name__))
        if value.items:
            return {key: self.resolved(item) for key, item in value.items.items()}
        origin = value.origin
        if origin in _TENSORS:
            return self._tensor(value.content)
        if origin in _PARAMETERS:
            return self.resolved(value.content[0])
        if origin in _SUBCLASSES:
            function, _, arguments, *_ = value.content
            return self.resolved(function(*arguments)) if isinstance(function, type) else Standin(origin, True)
        if origin == "torch._utils._rebuild_device_tensor_from_numpy":
            return self.resolved(value.content[0])
        if origin.startswith(_NUMPY):
            return self._numpy(value)
        for state in value.content:
            if isinstance(state, dict) and all(isinstance(state.get(k), dict) for k in ("_parameters", "_modules")):
                return self._module(state)
        return Standin(origin, origin.startswith("torch._utils._rebuild_"))

    def _module(self, state: dict) -> dict[str, Any]:
        """The state dict of a module that was saved as a whole."""
        passing = state.get("_non_persistent_buffers_set", ())
        passing = passing if isinstance(passing, set) else ()
        buffers = {key: part for key, part in state.get("_buffers", {}).items() if key not in passing}
        entries = {
            key: self.resolved(part) for key, part in (state["_parameters"] | buffers).items() if part is not None
        }
        for name, module in state["_modules"].items():
            inner = self.resolved(module)
            entries |= {f"{name}.{key}": part for key, part in inner.items()} if isinstance(inner, dict) else {}
            if len(entries) > MOST_ENTRIES:
                raise _BrokenError(f"it holds more than {MOST_ENTRIES:,} entries")
        return entries

    def _tensor(self, arguments: list) -> StoredTensor | Standin:
        storage, offset, shape, strides, *rest = arguments
        file = self._file
        if isinstance(storage, _Inert) and storage.origin == "torch.storage._load_from_bytes":
            # pickle without torch.save: each storage is a separate file.
            reader, file = _read_pickles(io.BytesIO(_data(storage.content[0])))
            storage = reader.content
        if not isinstance(storage, _Storage):
            return Standin(getattr(storage, "origin", "torch.Tensor"), is_tensor=True)
        # _rebuild_tensor_v3 names the dtype.
        dtype = next((part.__name__ for part in rest if isinstance(part, type)), storage.kind)
        if dtype not in _DTYPES:
            return Standin(f"tensor of {dtype}", is_tensor=True)
        sizes = (offset, storage.begin, *shape, *strides)
        if len(shape) != len(strides) or not all(isinstance(size, int) and 0 <= size < 1 << 62 for size in sizes):
            raise _BrokenError(f"a tensor has the shape {shape} and the strides {strides}")
        count = storage.count * _DTYPES[storage.kind].itemsize // _DTYPES[dtype].itemsize
        offset += storage.begin
        return StoredTensor(
            tuple(shape), _DTYPES[dtype], tuple(strides), offset, storage.key, storage.begin + count, file
        )

    def _numpy(self, value: _Inert) -> object:
        """A number or array of numbers of numpy; other arrays stay inert."""
        name, content = value.origin.rpartition(".")[2], value.content
        if name == "scalar":
            dtype, data, shape, order = content[0], content[1:], (), "C"
            data = data[0] if data else b""
        elif name == "_frombuffer":
            data, dtype, shape, order = content
        elif name == "_reconstruct" and isinstance(content[-1], tuple) and len(content[-1]) in (4, 5):
            shape, dtype, is_fortran, data = content[-1][-4:]
            order = "F" if is_fortran else "C"
        else:
            return Standin(value.origin)
        found = _numpy_dtype(dtype)
        if found is None or isinstance(data, list):
            return Standin(value.origin)
        return np.frombuffer(_data(data), found).reshape(shape, order=order)


def _numpy_dtype(dtype: Any) -> np.dtype | None:
    """A numeric dtype as numpy pickles it, numpy.dtype("f4", False, True) with state (3, "<", ...); None for others."""
    if not isinstance(dtype, _Inert) or not dtype.content or not isinstance(dtype.content[0], str):
        return None
    state = next((part for part in dtype.content if isinstance(part, tuple)), ())
    found = np.dtype(dtype.content[0]).newbyteorder(state[1] if len(state) > 1 and state[1] in ("<", ">") else "=")
    return found if found.kind in "biufc" else None


def _data(data: Any) -> bytes:
    """Bytes from a pickle of any protocol; old protocols store them as text, in Latin-1."""
    if isinstance(data, _Inert) and data.origin == "_codecs.encode":
        data = data.content[0]
    if not isinstance(data, str | bytes | bytearray):
        raise _BrokenError(f"an array whose bytes are {type_name(data)}")
    return data.encode("latin1") if isinstance(data, str) else bytes(data)
