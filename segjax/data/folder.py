"""A folder of images and masks: what it holds, whether it can be used, and how its files decode.

    images/<split>/<stem>.jpg   or .jpeg, .png; 8 bits a channel; grey is repeated over RGB, alpha is dropped
    labels/<split>/<stem>.png   8-bit grey: one train id (0..K-1; 0 and 1 for a single class) or the ignore value
    classes.json                {"names": [K strings], "colors": [K of [r, g, b]], "ignore": 255, "name": "optional"}

Nothing here writes. Problems are collected by kind, each kind worded with its remedy, so that one report can list all.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from segjax.data import specs

THREADS = min(8, os.cpu_count() or 1)  # OpenCV decodes outside the interpreter's lock
_SHOWN = 10  # entries of one kind that a report lists
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"  # what such a file begins with
LAYOUT = (
    "images/<split>/x.jpg (or .jpeg, .png), labels/<split>/x.png (8-bit grey, one class id per pixel) and classes.json "
    '("names", "colors", "ignore")'
)

_CLASSES = (  # Kinds of problems are worded with their remedy.
    'classes.json, which needs "names" (K different strings), "colors" (K of [r, g, b], 0..255) and "ignore" (the mask '
    'value that is not counted, K..255), and may have "name" (a string)'
)
_UNREADABLE = "files that are no whole JPEG or PNG; copy or export them again"

Pairs = dict[str, list[tuple[Path, Path]]]  # split -> images, each with its mask
Problems = collections.defaultdict[str, list[str]]  # kind -> where it was found, with the values found there


def read_classes(root: Path, problems: Problems) -> specs.DatasetSpec | None:
    """What classes.json describes; None, and the reasons in `problems`, where it describes no dataset."""
    try:
        content = {"name": root.name} | json.loads((root / "classes.json").read_text(encoding="utf-8-sig"))
        faults = list(_faults_of_classes(**{key: content.get(key) for key in ("name", "names", "colors", "ignore")}))
    except OSError as error:
        faults = [f"cannot be read: {error.strerror}"]
    except ValueError as error:
        faults = [f"is no JSON: {error}"]
    except TypeError:
        faults = ["is no object"]
    if faults:
        problems[_CLASSES] += faults
        return None
    colors = tuple(map(tuple, content["colors"]))
    return specs.DatasetSpec(content["name"], tuple(content["names"]), colors, content["ignore"])


def _faults_of_classes(name, names, colors, ignore) -> Iterator[str]:
    def is_byte(value):
        return type(value) is int and 0 <= value <= 255  # isinstance would let true and false pass

    if not (isinstance(name, str) and name.strip()):
        yield f'"name" is no string: {name!r:.80}'
    if not (isinstance(names, list) and names and all(isinstance(n, str) and n.strip() for n in names)):
        yield f'"names" is missing or no list of strings: {names!r:.80}'
        names = []
    if repeated := [n for n, times in collections.Counter(names).items() if times > 1]:
        yield f'"names" repeats {_listed(repeated)}'
    if not isinstance(colors, list):
        yield f'"colors" is missing or no list: {colors!r:.80}'
    elif wrong := [c for c in colors if not (isinstance(c, list) and len(c) == 3 and all(map(is_byte, c)))]:
        yield f'"colors" has entries that are no [r, g, b] in 0..255: {_listed(wrong)}'
    elif names and len(names) != len(colors):
        yield f'{len(names)} "names" but {len(colors)} "colors"'
    if not is_byte(ignore):
        yield f'"ignore" is missing or no integer in 0..255: {ignore!r:.80}'
    elif ignore < max(len(names), 2):
        # A single class has the labels 0, background, and 1.
        meaning = repr(names[ignore]) if len(names) > 1 else "'background' or the one class"
        yield f'"ignore" is {ignore}, which is also the id of class {meaning}'


def find_pairs(root: Path, problems: Problems) -> Pairs:
    """Images with their masks, in the order of their stems. Hidden files are passed over."""
    found: dict[str, dict[str, dict[str, Path]]] = {"images": {}, "labels": {}}
    for part, suffixes in (("images", (".jpg", ".jpeg", ".png")), ("labels", (".png",))):
        for directory in _visible(root / part):
            where = f"{part}/{directory.name}"
            if not directory.is_dir():
                problems["files beside the splits' directories; move them into one"].append(where)
                continue
            if not re.fullmatch(r"[A-Za-z0-9_]+", directory.name) or directory.name.lower() == "all":
                problems["splits TFDS cannot name; use letters, digits and _, and not 'all'"].append(where)
            stems = found[part][directory.name] = {}
            for path in _visible(directory):
                if path.suffix.lower() not in suffixes or not path.is_file():
                    problems[f"no {', '.join(suffixes)} files; convert or remove them"].append(f"{where}/{path.name}")
                elif path.stem in stems:
                    names = f"{where}/{stems[path.stem].name} and {path.name}"
                    problems["files of one split that differ in nothing but the suffix; rename them"].append(names)
                else:
                    stems[path.stem] = path
            if not stems:
                problems["directories without a usable file"].append(where)
        if not found[part]:
            problems[f"directories missing, or without a split in them; needed are {LAYOUT}"].append(part)
    pairs: Pairs = {}
    for split in sorted({*found["images"], *found["labels"]}):
        images, masks = (found[part].get(split) for part in ("images", "labels"))
        if images is None or masks is None:
            has, lacks = ("labels", "images") if images is None else ("images", "labels")
            problems["splits on one side only"].append(f"{has}/{split} without {lacks}/{split}")
            continue
        pairs[split] = [(images[stem], masks[stem]) for stem in sorted(images.keys() & masks.keys())]
        for stem in sorted(images.keys() - masks.keys()):
            problems["images without a mask"].append(f"images/{split}/{images[stem].name}")
        for stem in sorted(masks.keys() - images.keys()):
            problems["masks without an image"].append(f"labels/{split}/{masks[stem].name}")
    return pairs


def _visible(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name[0] != ".") if directory.is_dir() else []


def fingerprint_of(root: Path, pairs: Pairs, *, this_folder: bool) -> str:
    """16 hex digits for what a folder holds.

    They hash classes.json, and every file's path and size; with `this_folder`, also the folder's own path and every
    file's time of modification. So an edited file counts even where its size stayed, and two folders are two even where
    an archive has set all times equal. A folder that was moved is prepared again, which costs time but is never wrong.
    Contents would tell most, but to read them all at each start takes minutes for a large folder. CamVid does without
    `this_folder`, so that any copy of the published files is the same dataset.
    """
    digest = hashlib.sha256((root / "classes.json").read_bytes())
    if this_folder:
        digest.update(os.fsencode(root))
    for path in itertools.chain(*itertools.chain(*pairs.values())):
        stat = path.stat()
        digest.update(os.fsencode(path.relative_to(root).as_posix()) + b"\0")
        digest.update(struct.pack("<qq", stat.st_size, stat.st_mtime_ns if this_folder else 0))
    return digest.hexdigest()[:16]


def check_contents(
    root: Path, spec: specs.DatasetSpec | None, pairs: Pairs, problems: Problems
) -> dict[str, tuple[int, int]]:
    """Decodes every file, adds what is wrong to `problems`, and returns each split's largest height and width."""
    largest = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for split, found in pairs.items():
            checked = pool.map(lambda pair: _check_pair(root, spec, *pair), found)
            sizes = [(0, 0)]
            for size, faults in progress(checked, f"checking {split}", len(found)):
                sizes.append(size)
                for kind, entry in faults:
                    problems[kind].append(entry)
            largest[split] = tuple(map(max, zip(*sizes, strict=True)))
    return largest


def _check_pair(root: Path, spec: specs.DatasetSpec | None, image_path: Path, mask_path: Path):
    """(height, width) of the image, zeros if there is none to see, and (kind, entry) for each problem of the two."""
    faults: list[tuple[str, str]] = []

    def read(path: Path, kind_of_fault, decode) -> np.ndarray | None:
        name, decoded = path.relative_to(root).as_posix(), None
        try:
            data = path.read_bytes()
            damage = _damage(data)
        except OSError as error:
            damage = error.strerror
        if not damage and (kind := kind_of_fault(data)):
            faults.append((kind, name))
        elif damage or (decoded := decode(data)) is None:
            faults.append((_UNREADABLE, f"{name}: {damage or 'does not decode'}"))
        return decoded

    image = read(image_path, _kind_of_image_fault, decode_image)
    mask = read(mask_path, _kind_of_mask_fault, decode_mask)
    name = mask_path.relative_to(root).as_posix()
    if image is not None and mask is not None and image.shape[:2] != mask.shape:
        sizes = f"{name} is {mask.shape[0]} x {mask.shape[1]}, its image {image.shape[0]} x {image.shape[1]}"
        faults.append(("masks of another size (height x width) than their image", sizes))
    if spec is not None and mask is not None:
        pixels = np.bincount(mask.ravel(), minlength=256)
        stray = [
            value for value in np.flatnonzero(pixels) if value >= len(spec.label_names) and value != spec.ignore_label
        ]
        if stray:
            kind = (
                f"mask values that are neither a class (0..{len(spec.label_names) - 1}) nor the ignore value "
                f'({spec.ignore_label}); correct the masks, or "names" and "ignore" in classes.json'
            )
            faults.append((kind, f"{name}: {_listed([f'{value} ({pixels[value]} pixels)' for value in stray])}"))
    return (0, 0) if image is None else image.shape[:2], faults


def _damage(data: bytes) -> str | None:
    """Why a file is no whole PNG or JPEG. Decoders differ: some fill what a truncated file lacks and say nothing."""
    if not data:
        return "is empty"
    if data.startswith(_PNG):
        if data[12:16] != b"IHDR":  # so that bytes 24 and 25 are bit depth and colour type
            return "has no PNG header"
        at = len(_PNG)  # chunks: 4 bytes length, 4 bytes type, content, 4 bytes CRC of type and content
        while at + 12 <= len(data):
            end = at + 12 + struct.unpack_from(">I", data, at)[0]
            if end > len(data):
                break
            if zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
                return f"is damaged at byte {at}"
            if data[at + 4 : at + 8] == b"IEND":
                return None
            at = end
        return "is truncated"
    if data.startswith(_JPEG):
        at = len(_JPEG)  # segments: 2 bytes marker, 2 bytes length that counts itself, content
        while at + 4 <= len(data) and data[at : at + 2] != b"\xff\xda":
            at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]  # 0xFF may be repeated
        # The end marker counts from the scan on: a thumbnail before it has one of its own.
        return None if data.find(b"\xff\xd9", at) >= 0 else "is truncated"
    return f"begins with {data[:8]!r}"


def _kind_of_image_fault(data: bytes) -> str | None:
    import cv2

    if data.startswith(_PNG) and data[24] == 16:
        return "images of 16 bits a channel, whose scale to 8 bits is not known; save them with 8 bits"
    if b"Exif\0\0" in data or b"eXIf" in data:
        turned, as_stored = (
            _decode(data, cv2.IMREAD_COLOR),
            _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION),
        )
        if turned is not None and not np.array_equal(turned, as_stored):
            return "images that EXIF turns, so that they may not lie as their masks do; save them upright"
    return None


def _kind_of_mask_fault(data: bytes) -> str | None:
    if not data.startswith(_PNG):
        return "masks that are JPEG inside, which blurs class ids; export them as PNG from the original"
    depth, color_type = data[24], data[25]  # colour type 0 is grey, 3 palette
    if color_type == 3:
        return (
            "palette masks, which decode to colours instead of class ids; with Pillow and NumPy, "
            "Image.fromarray(np.array(Image.open(path))).save(path) keeps the ids"
        )
    if color_type != 0:
        return 'RGB or alpha masks; save one 8-bit grey channel that holds each colour\'s position in "colors"'
    if depth != 8:
        return "masks of other than 8 bits, whose values decoders stretch or cut; save class ids as 8-bit grey"
    return None


def decode_image(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3), RGB; None if it cannot be decoded."""
    import cv2

    bgr = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if bgr is None else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def decode_mask(data: bytes) -> np.ndarray | None:
    """uint8 (H, W), the stored values; None if it cannot be decoded."""
    import cv2

    return _decode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    import cv2

    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # raised for sizes beyond OpenCV's limits, where other faults give None
        return None


def shorten(entries: list) -> list[str]:
    rest = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return [f"{entry!s:.300}" for entry in entries[:_SHOWN]] + rest


def _listed(entries: list) -> str:
    return ", ".join(shorten(entries))


def counted(splits: dict[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in splits.items())


def progress(items: Iterable, what: str, total: int):
    return tqdm(items, desc=what, total=total, unit=" images", leave=False, disable=None)  # None: only on a terminal
