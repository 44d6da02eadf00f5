"""Reads masks in the layout of Pascal VOC, which labelme, CVAT and others also write, and in Roboflow's.

    JPEGImages/a.jpg, SegmentationClass/a.png     images and masks, with the same names
    ImageSets/Segmentation/train.txt              names of a split, one per line; without lists all masks are train
    labelmap.txt                                  of CVAT: "name:r,g,b::" for each class; masks have these colours
    class_names.txt                               of labelme: class names in the order of the mask values

    train/a.jpg, train/a_mask.png                 of Roboflow
    train/_classes.csv                            its names: "Pixel Value, Class", "0, background", ...

Without any of these files, masks have the classes of VOC 2012, and 255 is ignored. With labelmap.txt, all masks are
read by colour. Otherwise, palette and grey masks hold class ids, and RGB masks the colours of VOC.
"""

from __future__ import annotations

import collections
import functools
import posixpath
import re
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segjax.data import codec, specs
from segjax.data.annotations.found import IGNORED, IMAGES, MISSING, Annotated, Drawn, Files, Found, classes_of, split_in
from segjax.data.annotations.write import refuse
from segjax.data.sources import DataError, Problems, listed
from segjax.runtime import reading

_MASKS = "SegmentationClass"
_OLD_MASKS = "SegmentationClassPNG"  # labelme's; its SegmentationClass holds NumPy arrays
_TABLE = "_classes.csv"
_LISTS = "ImageSets/Segmentation"
_NO_MASK = "listed images that have no mask"
_UNLISTED = "masks that are in no list"
_MOST_TEXT = 1 << 26


# split -> stem -> paths of the image and of the mask; None for one that is missing
_Pairs = dict[str, dict[str, tuple[str | None, str | None]]]


class _Classes(NamedTuple):
    """Names and colours of classes, in the order of mask values; and whether masks are read by colour."""

    names: list[str]
    colors: list[tuple[int, int, int]]
    by_color: bool


def read(source: Path) -> Found:
    """Reads the images and masks of a folder, or of the only folder in it that has this layout.

    Raises:
      DataError: The files cannot be used; the message lists all reasons.
    """
    found = Found([], {})
    problems: Problems = collections.defaultdict(list)
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give an unpacked one with JPEGImages and {_MASKS}")
    files = Files(source, found.skipped)
    tables = [name for name in files.paths if posixpath.basename(name) == _TABLE]
    if tables and not any(posixpath.basename(folder) == _MASKS for folder in files.folders):
        classes, splits = _roboflow(files, tables, found)
    else:
        classes, splits = _voc(files, found)
    found.names, ids = classes_of(classes.names, problems)
    refuse(problems, str(source))
    # Label of each mask value of 8 or 16 bits; -1 for a value of no class.
    table = np.full(1 << 16, -1, np.int32)
    table[: len(classes.names)] = [ids[name] for name in classes.names]
    table[specs.default_ignore_label(len(classes.names))] = IGNORED
    for split, pairs in splits.items():
        for stem, (image, mask) in pairs.items():
            if mask is None:
                found.skipped[_NO_MASK].append(f"{split}: {stem}")
            elif image is None:
                found.skipped[MISSING].append(f"{split}: {stem}")
            else:
                drawn = functools.partial(_draw, files, mask, classes, table)
                size = _size(files, mask)
                found.splits.setdefault(split, []).append(
                    Annotated(f"{stem}.png", image, files.reader(image), size, None, drawn)
                )
    if not found.splits:
        for kind, entries in (found.skipped or {"no mask": [_MASKS]}).items():
            problems[kind] += entries
    refuse(problems, str(source))
    return found


def _voc(files: Files, found: Found) -> tuple[_Classes, _Pairs]:
    root = _root(files)
    masks = _by_stem(files, posixpath.join(root, _MASKS), (".png",), found)
    masks = masks or _by_stem(files, posixpath.join(root, _OLD_MASKS), (".png",), found)
    images = _by_stem(files, posixpath.join(root, "JPEGImages"), IMAGES, found)
    splits = _splits(files, root, masks, found)
    if unlisted := sorted(masks.keys() - {stem for stems in splits.values() for stem in stems}):
        found.skipped[_UNLISTED] += unlisted
    if without := len(images.keys() - masks.keys()):
        found.notes.append(f"images that have no mask, which are not imported: {without:,}")
    pairs = {split: {stem: (images.get(stem), masks.get(stem)) for stem in stems} for split, stems in splits.items()}
    return _classes(files, root), pairs


def _roboflow(files: Files, tables: list[str], found: Found) -> tuple[_Classes, _Pairs]:
    names: dict[str, list[str]] = {}
    splits: _Pairs = {}
    for table in sorted(tables):
        names[table] = _names_of_table(table, _text(files, table))
        folder = posixpath.dirname(table)
        split = split_in(posixpath.basename(folder)) or posixpath.basename(folder) or "train"
        of_folder = _by_stem(files, folder or ".", IMAGES, found)
        masks = {stem.removesuffix("_mask"): path for stem, path in of_folder.items() if stem.endswith("_mask")}
        images = {stem: path for stem, path in of_folder.items() if not stem.endswith("_mask")}
        if split in splits:
            raise DataError(f"{files.root} has several folders of {split} with {_TABLE}; give one of them")
        splits[split] = {stem: (images.get(stem), masks.get(stem)) for stem in sorted({*images, *masks})}
    if len(set(map(tuple, names.values()))) > 1:
        raise DataError(f"{files.root} cannot be imported: {listed(list(names))} have different classes")
    given = names[tables[0]]
    return _Classes(given, [specs.voc_color(number) for number in range(len(given))], by_color=False), splits


def _names_of_table(name: str, text: str) -> list[str]:
    rows = [line.partition(",")[::2] for line in text.splitlines()[1:] if line.strip()]
    if not rows or [number.strip() for number, _ in rows] != [str(number) for number in range(len(rows))]:
        raise DataError(f"{name}: its lines are not 0, NAME; 1, NAME; ... after a header line")
    return [label.strip() for _, label in rows]


def _root(files: Files) -> str:
    """The folder with SegmentationClass."""
    roots = sorted(posixpath.dirname(folder) for folder in files.folders if posixpath.basename(folder) == _MASKS)
    if len(roots) == 1:
        return roots[0]
    if roots:
        raise DataError(f"{files.root} has several folders with {_MASKS}, {listed(roots)}; give one of them")
    if any(re.search(r"(^|/)Annotations/[^/]+\.xml$", name) for name in files.paths):
        raise DataError(
            f"{files.root} cannot be imported: it has only boxes (Annotations/*.xml) and no {_MASKS}; boxes have no "
            "outline, export masks"
        )
    raise DataError(f"{files.root} cannot be imported: it has no folder {_MASKS}")


def _classes(files: Files, root: str) -> _Classes:
    found = [name for name in ("labelmap.txt", "class_names.txt") if posixpath.join(root, name) in files.paths]
    if not found:
        return _Classes(list(specs.VOC.class_names), list(specs.VOC.colors), by_color=False)
    lines = [line.strip() for line in _text(files, posixpath.join(root, found[0])).splitlines()]
    lines = [line for line in lines if line and line[0] != "#"]
    if found[0] == "class_names.txt":
        return _Classes(lines, [specs.voc_color(number) for number in range(len(lines))], by_color=False)
    names, colors = [], []
    for line in lines:
        match = re.fullmatch(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})(:.*)?", line)
        if not match or max(map(int, match.groups()[1:4])) > 255:
            raise DataError(f"labelmap.txt: {line!r:.80} is not name:r,g,b::")
        names.append(match[1])
        colors.append((int(match[2]), int(match[3]), int(match[4])))
    if len(set(colors)) < len(colors):
        repeated = [f"{color}" for color, times in collections.Counter(colors).items() if times > 1]
        raise DataError(f"labelmap.txt: several classes have the colours {listed(repeated)}")
    return _Classes(names, colors, by_color=True)


def _splits(files: Files, root: str, masks: dict[str, str], found: Found) -> dict[str, list[str]]:
    """split -> names of its images."""
    folder = posixpath.join(root, _LISTS)
    lists = {
        posixpath.splitext(posixpath.basename(name))[0]: name
        for name in sorted(files.paths)
        if posixpath.dirname(name) == folder and name.endswith(".txt")
    }
    if {"train", "val"} <= lists.keys() and lists.pop("trainval", None):
        found.notes.append("ImageSets/Segmentation/trainval.txt is train and val together, and is not imported")
    if not lists:
        found.notes.append("there are no lists of splits: all masks are train")
        return {"train": sorted(masks)}
    # CVAT has Train, Validation and, for tasks without a subset, default.
    known = {name: split_in(name) or ("train" if len(lists) == 1 else None) for name in lists}
    names = {
        name: split if split and list(known.values()).count(split) == 1 else re.sub(r"[^A-Za-z0-9_]", "_", name)
        for name, split in known.items()
    }
    splits, of_split = {}, {}
    for name, path in lists.items():
        if (other := of_split.setdefault(names[name], name)) != name:
            raise DataError(
                f"{folder}: {other}.txt and {name}.txt would be one split, {names[name]}; rename one of them"
            )
        stems = [_listed_stem(line, masks) for line in _text(files, path).splitlines() if line.strip()]
        splits[names[name]] = list(dict.fromkeys(stems))
    return splits


def _listed_stem(line: str, masks: Container[str]) -> str:
    """Name in a line of a list: the whole line or its quoted part, if a mask has this name; else the first word."""
    quoted = re.match(r'\s*"([^"]+)"', line)
    return next((name for name in (line.strip(), quoted[1] if quoted else "") if name in masks), line.split()[0])


def _text(files: Files, name: str) -> str:
    return reading.read_bytes(files.paths[name], most=_MOST_TEXT).decode("utf-8-sig", "surrogateescape")


def _by_stem(files: Files, folder: str, suffixes: tuple[str, ...], found: Found) -> dict[str, str]:
    start, by_stem = "" if folder == "." else f"{folder}/", {}
    for name in sorted(name for name in files.paths if name.startswith(start) and name.lower().endswith(suffixes)):
        stem = posixpath.splitext(name.removeprefix(start))[0]
        if stem in by_stem:
            found.skipped["images that differ from another one only in the suffix"].append(name)
        by_stem.setdefault(stem, name)
    return by_stem


def _size(files: Files, mask: str) -> tuple[int, int] | None:
    """(height, width) in the header of a mask; None if it has none, which `_draw` reports."""
    with reading.open_regular(files.paths[mask]) as file:
        return codec.size_of(file.read(32))


def _draw(files: Files, mask: str, classes: _Classes, table: np.ndarray, size: tuple[int, int]) -> Drawn:
    data = files.png(mask)
    is_index = data[25] in (0, 3) and not classes.by_color
    if data[24] == 16 and not is_index:
        raise codec.ImageError(f"its mask {mask} has colours of 16 bits per channel; save it with 8")
    if is_index and (fault := codec.fault_of_mask(data, wide=True, binary=len(classes.names) == 2)):
        raise codec.ImageError(f"its mask {mask}: {fault}")
    stored = codec.decode_stored_mask(data) if is_index else None
    values = stored and stored.values if is_index else codec.decode_image(data)
    if values is None or values.shape[:2] != size:
        raise codec.ImageError(f"its mask {mask} does not decode, or has another size than its image")
    labels = table[values] if is_index else _by_color(values, classes, table)
    if (labels < 0).any():
        y, x = np.argwhere(labels < 0)[0]
        raise DataError(
            f"{mask} has {np.count_nonzero(labels < 0):,} pixels of no class, the first at row {y}, column {x}: "
            f"{values[y, x].tolist()}. There are {len(classes.names)} classes, {listed(classes.names)}; name all in "
            "class_names.txt, one per line in the order of values, or in labelmap.txt with their colours"
        )
    return Drawn(labels.astype(np.uint16), collections.Counter(), [])


def _by_color(pixels: np.ndarray, classes: _Classes, table: np.ndarray) -> np.ndarray:
    """Labels of RGB pixels, int32 (H, W); -1 for a colour of no class."""

    def packed(colors: np.ndarray) -> np.ndarray:
        return colors.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)

    # VOC's colours of the background and of value 255, unless a class has them.
    known = {specs.voc_color(0): 0, specs.voc_color(255): IGNORED}
    known |= dict(zip(classes.colors, table.tolist(), strict=False))
    found, places = np.unique(packed(pixels.reshape(-1, 3)), return_inverse=True)
    by_number = {int(packed(np.array(color))): label for color, label in known.items()}
    labels = np.array([by_number.get(number, -1) for number in found.tolist()], np.int32)
    return labels[places].reshape(pixels.shape[:2])
