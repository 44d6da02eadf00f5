"""Changes of files, as they occur in practice: bytes, JSON values, tensors, archive members and headers.

Each function draws one change from a generator. It returns a description, and whether the result is known to be bad; a
reader that silently accepts a bad file is at fault.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Json = object


@dataclasses.dataclass(frozen=True)
class Mutation:
    """What was changed, and whether the result is known to be bad."""

    text: str
    is_bad: bool = False


def of_bytes(path: Path, rng: np.random.Generator, *, sealed: bool = False) -> Mutation:
    """Changes bytes of a file.

    Args:
      sealed: whether a checksum covers every byte, so that every change is known to be bad.
    """
    data = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "byte", "word", "truncated", "empty", "zeros", "removed", "repeated", "noise"])
    at = int(rng.integers(len(data))) if data else 0
    length = min(int(rng.geometric(0.02)), len(data) - at)
    before = bytes(data)
    if kind == "bit" and data:
        data[at] ^= 1 << rng.integers(8)
    elif kind == "byte" and data:
        data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
    elif kind == "word":
        word = struct.pack(rng.choice(["<I", ">I", "<Q"]), rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF]))
        data[at : at + len(word)] = word
    elif kind == "truncated":
        del data[at:]
    elif kind == "empty":
        data.clear()
    elif kind == "zeros":
        data[at : at + length] = bytes(length)
    elif kind == "removed":
        del data[at : at + length]
    elif kind == "repeated":
        data[at:at] = data[at : at + length]
    else:
        data[at : at + length] = rng.bytes(length)
    path.write_bytes(data)
    # What follows a whole file may be anything.
    is_bad = not data.startswith(before) and (sealed or kind == "empty")
    return Mutation(f"{path.name}: {kind}, {length} bytes at {at} of {len(before)}", is_bad)


_ODD: tuple[Callable[[np.random.Generator], Json], ...] = (
    lambda rng: None,
    lambda rng: bool(rng.integers(2)),
    lambda rng: (
        int(rng.choice([-1, 0, 1, 255, 256, 2**31, 2**63, 10**30])) if rng.integers(2) else int(rng.integers(-5, 300))
    ),
    lambda rng: float(rng.choice([-1.5, 0.0, 1e308, math.nan, math.inf, -math.inf])),
    lambda rng: str(rng.choice(["", "x", "$", "a\nb", "\x1b[31m", "../../evil", "/etc", "é", "\u202e", "x" * 5000])),
    lambda rng: [],
    lambda rng: {},
    lambda rng: [[]],
    lambda rng: {"x": None},
)


def of_json(content: Json, rng: np.random.Generator) -> tuple[Json, str]:
    """Content of which one value, at a random place, was replaced, removed or repeated; and what was done."""
    places = list(_places(content))
    path = places[rng.integers(len(places))]
    if not path:
        return _ODD[rng.integers(len(_ODD))](rng), "the whole"
    content = json.loads(json.dumps(content))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    where, key = ".".join(map(str, path)), path[-1]
    kind = rng.choice(["replaced", "replaced", "replaced", "removed", "deep", "repeated"])
    if kind == "removed":
        del parent[key]
    elif kind == "deep":
        deep: Json = []
        for _ in range(500):
            deep = [deep]
        parent[key] = deep
    elif kind == "repeated" and isinstance(parent, list):
        parent.insert(key, parent[key])
    else:
        parent[key] = _ODD[rng.integers(len(_ODD))](rng)
        where += f"={str(parent[key])[:40]!r}"
    return content, f"{where} {kind}"


def _places(content: Json, path: tuple = ()):
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _places(value, (*path, key))
    elif isinstance(content, list):
        # Long lists are all alike.
        for number, value in list(enumerate(content))[:4]:
            yield from _places(value, (*path, number))


def of_json_file(path: Path, rng: np.random.Generator) -> Mutation:
    """Changes one value of a JSON file, or nests it too deeply."""
    if rng.integers(20) == 0:
        path.write_text("[" * 100_000)
        return Mutation(f"{path.name}: 100,000 brackets", is_bad=True)
    content, text = of_json(json.loads(path.read_text(encoding="utf-8")), rng)
    path.write_text(json.dumps(content), encoding="utf-8")
    return Mutation(f"{path.name}: {text}")


def of_tensors(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> Mutation:
    """Changes one tensor of a state dict of float arrays in place; all but one of these changes are known to be bad."""
    names = sorted(name for name, value in tensors.items() if value.dtype.kind == "f")
    name = names[rng.integers(len(names))]
    value = tensors[name].copy()
    flat = value.reshape(-1)
    at = rng.integers(flat.size)
    kinds = ["nan", "infinity", "shape", "removed", "renamed", "integers", "text", "scalar", "empty", "extra"]
    variances = [name for name in names if name.endswith("running_var")]
    kind = rng.choice(kinds + ["variance"] * bool(variances))
    if kind in ("nan", "infinity"):
        flat[at] = math.nan if kind == "nan" else math.inf
        tensors[name] = value
    elif kind == "variance":
        name = variances[rng.integers(len(variances))]
        tensors[name] = tensors[name].copy()
        tensors[name][0] = -1.0
    elif kind == "shape":
        tensors[name] = np.concatenate([value, value])
    elif kind == "removed":
        del tensors[name]
    elif kind == "renamed":
        tensors[name + "x"] = tensors.pop(name)
    elif kind == "integers":
        tensors[name] = value.astype(np.int32)
    elif kind == "text":
        tensors[name] = np.zeros(value.shape, bool)
    elif kind == "scalar":
        tensors[name] = np.array(1.0, value.dtype)
    elif kind == "empty":
        tensors[name] = value[:0]
    else:
        name = "a_number_of_the_training_script"
        tensors[name] = np.array(3, np.int64)
    return Mutation(f"{name}: {kind}", is_bad=kind != "extra")


def of_zip(path: Path, rng: np.random.Generator, *, is_read: bool) -> Mutation:
    """Writes an archive anew, with one member removed, renamed, emptied, repeated or made huge.

    Args:
      is_read: whether every member is read, so that one of two contents is known to be bad.
    """
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist() if not info.is_dir()]
    number = int(rng.integers(len(members)))
    name, content = members[number]
    names = ["", "/", "..", "../../evil", "/etc/evil", "a/../b", name.upper(), "x" * 300, "a\\b"]
    kind = rng.choice(["removed", "renamed", "emptied", "twice", "bomb", "encrypted", "as it is"])
    if kind == "removed":
        del members[number]
    elif kind == "renamed":
        members[number] = (str(rng.choice(names)), content)
    elif kind == "emptied":
        members[number] = (name, b"")
    elif kind == "twice":
        members.append((name, content[::-1]))
    elif kind == "bomb":
        members[number] = (name, bytes(1 << 28))
    packing = zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", packing) as archive:
        for each, data in members:
            info = zipfile.ZipInfo(each)
            info.compress_type = archive.compression
            archive.writestr(info, data)
    if kind == "encrypted":
        data = path.read_bytes()
        at = data.index(b"PK\x01\x02")
        path.write_bytes(data[: at + 8] + b"\x01" + data[at + 9 :])
    return Mutation(f"{path.name}: member {name} {kind}", is_bad=is_read and kind in ("twice", "bomb"))


def of_npy(path: Path, rng: np.random.Generator) -> Mutation:
    """Writes a .npy anew with another value in its header, which is a dict in Python's spelling."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        header = ast.literal_eval(file.read(int.from_bytes(file.read(2), "little")).decode())
        pixels = file.read()
    kind = rng.choice(["value", "dtype", "shape", "version", "length"])
    version, text, spelled = b"\1\0", str(kind), None
    if kind == "value":
        content, text = of_json({**header, "shape": list(header["shape"])}, rng)
        spelled = repr(content)
    elif kind == "dtype":
        odd = ["|O", "|V8", "<U1", "<f8", "<c8", "<M8[ns]", "<i8", "<f2", "|b1", "<f16", "|u1", [["a", "<u2"]], "x", ""]
        header["descr"] = odd[rng.integers(len(odd))]
        text = f"dtype {header['descr']}"
    elif kind == "shape":
        sides = [int(rng.choice([0, 1, -1, 2**31, 2**62, side])) for side in header["shape"]]
        header["shape"] = tuple(sides[: rng.integers(len(sides) + 1)] if rng.integers(2) else sides)
        text = f"shape {header['shape']}"
    elif kind == "version":
        version = bytes(map(int, rng.choice([0, 2, 3, 255], 2)))
    packed = (spelled or repr(header)).encode() + b"\n"
    length = int(rng.choice([0, 1, 65_535])) if kind == "length" else len(packed)
    # The length of a header has 16 bits.
    path.write_bytes(b"\x93NUMPY" + version + struct.pack("<H", min(length, 65_535)) + packed + pixels)
    return Mutation(f"{path.name}: {text} in the header")


def of_tiff(path: Path, rng: np.random.Generator) -> Mutation:
    """Changes a tag in the first directory of a little-endian TIFF: its number, type, count or value."""
    data = bytearray(path.read_bytes())
    order, start = struct.unpack_from("<2s2xI", data)
    assert order == b"II"
    (count,) = struct.unpack_from("<H", data, start)
    entry = start + 2 + 12 * int(rng.integers(count))
    (tag,) = struct.unpack_from("<H", data, entry)
    kind, place, size = [("number", 0, 2), ("type", 2, 2), ("count", 4, 4), ("value", 8, 4)][rng.integers(4)]
    most = (1 << 8 * size) - 1
    value = int(rng.choice([0, 1, 2, 3, 5, 8, 255, 256, 30_000, most // 2, most]))
    data[entry + place : entry + place + size] = value.to_bytes(size, "little")
    path.write_bytes(data)
    return Mutation(f"{path.name}: {kind} of tag {tag} is {value}")


# Opcodes of pickles with arguments that fit few places.
_ODD_OPCODES = (
    b"N",
    b"I-1\n",
    b"L99999999999999999999999999L\n",
    b"F1e999\n",
    b"S'x'\n",
    b"Vx\n",
    b"(",
    b"t",
    b"l",
    b"d",
)
_ODD_OPCODES += (
    b"]",
    b"}",
    b")",
    b"0",
    b"2",
    b"s",
    b"a",
    b"b",
    b"R",
    b".",
    b"g0\n",
    b"p0\n",
    b"h\0",
    b"q\0",
    b"P1\n",
    b"Q",
)
_ODD_OPCODES += (
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ccollections\nOrderedDict\n",
    b"\x82\1",
    b"\x95" + b"\xff" * 8,
)


def of_pickle(path: Path, rng: np.random.Generator) -> Mutation:
    """Changes one opcode of the pickles that a file begins with: removes, repeats, moves or replaces it."""
    data, places = path.read_bytes(), list[tuple[int, int]]()
    file = io.BytesIO(data)
    while file.tell() < len(data):
        try:
            begins = [place for _, _, place in pickletools.genops(file)]
        # Behind the pickles of old files lie the numbers.
        except ValueError:
            break
        places += zip(begins, [*begins[1:], file.tell()], strict=True)
    number = int(rng.integers(len(places)))
    begin, end = places[number]
    kind = rng.choice(["removed", "repeated", "moved", "replaced", "replaced", "inserted"])
    opcode, odd = data[begin:end], _ODD_OPCODES[rng.integers(len(_ODD_OPCODES))]
    new = {"removed": b"", "repeated": 2 * opcode, "moved": b"", "replaced": odd, "inserted": opcode + odd}[kind]
    changed = data[:begin] + new + data[end:]
    if kind == "moved":
        at = places[rng.integers(number + 1)][0]
        changed = changed[:at] + opcode + changed[at:]
    path.write_bytes(changed)
    shown = f", {odd}" if kind in ("replaced", "inserted") else ""
    return Mutation(f"{path.name}: opcode {number} of {len(places)}, {opcode[:20]}, {kind}{shown}")


def of_folder(folder: Path, rng: np.random.Generator) -> Mutation:
    """Replaces a file of a folder by something that is no file, or removes it."""
    import os

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[rng.integers(len(files))]
    kind = rng.choice(["removed", "FIFO", "device", "dangling", "folder", "unreadable link"])
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable link":
        path.symlink_to(path.name)
    # Messages may name the file or the folder.
    return Mutation(f"{path.relative_to(folder.parent)}: {kind}")
