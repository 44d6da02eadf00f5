"""Reads masks in the layout of Pascal VOC, which labelme, CVAT and others write too.

    JPEGImages/a.jpg, SegmentationClass/a.png     images and masks, with the same names
    ImageSets/Segmentation/train.txt              names of a split, one per line; without lists all masks are train
    labelmap.txt                                  of CVAT: "name:r,g,b::" for each class; masks have these colours
    class_names.txt                               of labelme: names in the order of the values in the masks

Without either file the masks have the classes of VOC 2012, and 255 is ignored. Masks of palettes or grey have class ids
as values, those of RGB the colours of labelmap.txt or VOC.
"""

from __future__ import annotations

import collections
import functools
import posixpath
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segjax.data import codec, specs
from segjax.data.annotations.found import IGNORED, IMAGES, MISSING, Annotated, Drawn, Files, Found, classes_of
from segjax.data.annotations.write import refuse
from segjax.data.sources import MOST, DataError, Problems, listed
from segjax.runtime import reading

_MASKS = "SegmentationClass"
_LISTS = "ImageSets/Segmentation"
_NO_MASK = "images of a list that have no mask"
_UNLISTED = "masks that no list names"
_MOST_TEXT = 1 << 26


class _Classes(NamedTuple):
    """The names of classes, in the order of mask values, and the colour of each; and whether colours decide."""

    names: list[str]
    colors: list[tuple[int, int, int]]
    by_color: bool


def read(source: Path) -> Found:
    """The images and masks of a folder, or of the only folder in it that has this layout.

    Raises:
      DataError: files that cannot be used; the message lists all reasons.
    """
    found = Found([], {})
    problems: Problems = collections.defaultdict(list)
    if not source.is_dir():
        raise DataError(f"{source} is no folder; it must be one, unpacked, with JPEGImages and {_MASKS}")
    files = Files(source, found.skipped)
    root = _root(files)
    classes = _classes(files, root)
    found.names, ids = classes_of(classes.names, problems)
    refuse(problems, str(source))
    # By value of 8 or 16 bits.
    table = np.full(1 << 16, -1, np.int32)
    table[: len(classes.names)] = [ids[name] for name in classes.names]
    table[specs.default_ignore_label(len(classes.names))] = IGNORED
    masks = _by_stem(files, posixpath.join(root, _MASKS), (".png",), found)
    images = _by_stem(files, posixpath.join(root, "JPEGImages"), IMAGES, found)
    named = set()
    for split, stems in _splits(files, root, masks, found).items():
        for stem in stems:
            named.add(stem)
            if stem not in masks:
                found.skipped[_NO_MASK].append(f"{split}: {stem}")
            elif stem not in images:
                found.skipped[MISSING].append(f"{split}: {stem}")
            else:
                drawn = functools.partial(_draw, files, masks[stem], classes, table)
                image = images[stem]
                found.splits.setdefault(split, []).append(
                    Annotated(stem + ".png", image, files.reader(image), _size(files, masks[stem]), None, drawn)
                )
    if unlisted := sorted(masks.keys() - named):
        found.skipped[_UNLISTED] += unlisted
    if without := len(images.keys() - masks.keys()):
        found.notes.append(f"images that have no mask, which are not imported: {without:,}")
    if not found.splits:
        for kind, entries in (found.skipped or {"no mask": [_MASKS]}).items():
            problems[kind] += entries
    refuse(problems, str(source))
    return found


def _root(files: Files) -> str:
    """The folder with SegmentationClass."""
    roots = sorted(posixpath.dirname(folder) for folder in files.folders if posixpath.basename(folder) == _MASKS)
    if len(roots) == 1:
        return roots[0]
    if roots:
        raise DataError(f"{files.root} has several folders with {_MASKS}, {listed(roots)}; give one of them")
    if any(re.search(r"(^|/)Annotations/[^/]+\.xml$", name) for name in files.paths):
        raise DataError(
            f"{files.root} cannot be imported: it has boxes only (Annotations/*.xml) and no {_MASKS}; boxes show no "
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
            raise DataError(f"labelmap.txt: {line!r:.80} is no name:r,g,b::")
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
        found.notes.append("there is no list of a split: all masks are train")
        return {"train": sorted(masks)}
    splits = {}
    for split, name in lists.items():
        stems = [line.split()[0] for line in _text(files, name).splitlines() if line.strip()]
        splits[re.sub(r"[^A-Za-z0-9_]", "_", split)] = list(dict.fromkeys(stems))
    return splits


def _text(files: Files, name: str) -> str:
    return reading.read_bytes(files.paths[name], most=_MOST_TEXT).decode("utf-8-sig", "surrogateescape")


def _by_stem(files: Files, folder: str, suffixes: tuple[str, ...], found: Found) -> dict[str, str]:
    start, by_stem = f"{folder}/", {}
    for name in sorted(name for name in files.paths if name.startswith(start) and name.lower().endswith(suffixes)):
        stem = posixpath.splitext(name.removeprefix(start))[0]
        if stem in by_stem:
            found.skipped["images that differ from another one in nothing but the suffix"].append(name)
        by_stem.setdefault(stem, name)
    return by_stem


def _size(files: Files, mask: str) -> tuple[int, int] | None:
    """The (height, width) that the header of a mask states; None for no PNG, which is reported when it is drawn."""
    with reading.open_regular(files.paths[mask]) as file:
        return codec.size_of(file.read(32))


def _draw(files: Files, mask: str, classes: _Classes, table: np.ndarray, size: tuple[int, int]) -> Drawn:
    data = reading.read_bytes(files.paths[mask], most=MOST)
    damage = codec.damage(data) if data.startswith(codec.PNG) else "is no PNG"
    if fault := damage or codec.fault_of_image(data):
        raise codec.ImageError(f"its mask {mask}: {fault}")
    is_index = data[25] in (0, 3) and not classes.by_color
    if data[24] == 16 and not is_index:
        raise codec.ImageError(f"its mask {mask} has colours of 16 bits a channel; save it with 8")
    values = codec.decode_mask(data) if is_index else codec.decode_image(data)
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
    """int32 (H, W), labels of RGB pixels, -1 for a colour of no class."""

    def packed(colors: np.ndarray) -> np.ndarray:
        return colors.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)

    # VOC's colours of the background and of 255, unless a class has them.
    known = {specs.voc_color(0): 0, specs.voc_color(255): IGNORED}
    known |= dict(zip(classes.colors, table.tolist(), strict=False))
    found, places = np.unique(packed(pixels.reshape(-1, 3)), return_inverse=True)
    by_number = {int(packed(np.array(color))): label for color, label in known.items()}
    labels = np.array([by_number.get(number, -1) for number in found.tolist()], np.int32)
    return labels[places].reshape(pixels.shape[:2])
