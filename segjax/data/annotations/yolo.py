"""Reads the segmentation format of Ultralytics' YOLO: data.yaml, images, and a text file next to each.

    data.yaml                 names, and the images of train, val and test: folders, or text files that list them
    classes.txt               of Label Studio, instead of data.yaml: names, one per line; the images are in images/
    train/images/a.jpg        or images/train/a.jpg
    train/labels/a.txt        or labels/train/a.txt: a line per object, "class x1 y1 x2 y2 ...", in fractions of the
                              width and height after the EXIF rotation

Images without a text file are background, as in YOLO. Lines with only a box get the ignore value if other lines have
outlines; a source with only boxes is refused.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import posixpath
from pathlib import Path, PurePosixPath
from typing import NotRequired

from typing_extensions import TypedDict

from segjax.data.annotations.found import IGNORED, MISSING, Annotated, Files, Found, classes_of
from segjax.data.annotations.rasterise import Outline, Region, draw
from segjax.data.annotations.write import refuse
from segjax.data.sources import DataError, Problems, listed
from segjax.runtime import reading

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_BOXES = "objects with a box but no outline; their boxes get the ignore value"
_NO_IMAGE = "text files without an image"
# Maximum bytes of a YAML file, and of the text file of an image.
_MOST_YAML, _MOST_TEXT = 1 << 20, 1 << 26
# Largest fraction of width or height that an outline may reach; larger numbers are probably pixels.
_FARTHEST = 1.5


class _Yaml(TypedDict):
    """data.yaml, whose scalars are read as text."""

    names: list[str] | dict[str, str]
    path: NotRequired[str]
    train: NotRequired[str | list[str]]
    val: NotRequired[str | list[str]]
    valid: NotRequired[str | list[str]]
    validation: NotRequired[str | list[str]]
    test: NotRequired[str | list[str]]


@dataclasses.dataclass
class _Lines:
    """Objects in all text files, by kind.

    Attributes:
      names: Path of the file with the class names.
      outlines: Number of outlines.
      boxes: Places of the lines with only a box.
    """

    names: str
    outlines: int = 0
    boxes: list[str] = dataclasses.field(default_factory=list)


def read(source: Path) -> Found:
    """Reads the images and regions of a folder, or of a YAML file and the folder around it.

    Raises:
      DataError: The files cannot be used; the message lists all reasons.
    """
    found = Found([], {})
    problems: Problems = collections.defaultdict(list)
    files = Files(source if source.is_dir() else source.parent, found.skipped)
    name, content = _yaml(files, None if source.is_dir() else source.name)
    if "kpt_shape" in content:
        problems["keypoints, which are not segmentation"].append(f"{name}: kpt_shape")
    names = _names(content, name, problems)
    found.names, ids = classes_of(names, problems)
    labels = [ids[each] for each in names]
    lines, used = _Lines(name), set()
    for key, split in _SPLITS.items():
        given = content.get(key) or []
        for value in [given] if isinstance(given, str) else given:
            images = _listed(files, content.get("path", ""), value, f"{name}: {key}", found, problems)
            for place, shown in images:
                text = _text_of(files, place)
                used.add(text)
                regions = _regions(files, text, labels, lines, problems) if text else []
                found.splits.setdefault(split, []).append(
                    Annotated(shown, place, files.reader(place), None, True, functools.partial(draw, regions))
                )
    if lines.boxes and not lines.outlines:
        problems["only boxes: no line has an outline; export polygons"] += lines.boxes
    if not found.splits and not problems:
        problems["no images"].append(f"{name} names no existing images")
        for kind, entries in found.skipped.items():
            problems[kind] += entries
    refuse(problems, str(source))
    if lines.boxes:
        found.skipped[_BOXES] += lines.boxes
    pictures = {image.place for images in found.splits.values() for image in images}
    if unlisted := sorted(set(files.images()) - pictures):
        found.skipped[f"images of no split of {name}"] += unlisted
    # Text files outside of labels/ are lists of images, or notes.
    unused = [path for path in files.paths if path.endswith(".txt") and "labels/" in path and path not in used]
    if unused:
        found.skipped[_NO_IMAGE] += unused
    return found


def _yaml(files: Files, given: str | None) -> tuple[str, _Yaml]:
    """Path and content of the file with the class names."""
    import yaml

    names = [given] if given else sorted(name for name in files.paths if name.endswith((".yaml", ".yml")))
    found, faults = {}, []
    for name in names:
        try:
            # BaseLoader reads everything as text, because a class may be named "no". It has no merge keys, whose
            # expansion can grow without bound.
            data = reading.read_bytes(files.paths[name] if name in files.paths else files.root / name, most=_MOST_YAML)
            content = yaml.load(data, Loader=yaml.BaseLoader)
            if isinstance(content, dict) and "names" in content:
                found[name] = reading.checked(content, _Yaml, name=name)
            else:
                faults.append(f"{name}: without names")
        except yaml.YAMLError as error:
            faults.append(f"{name}: not YAML ({' '.join(str(error).split())})")
        except (RecursionError, UnicodeError) as error:
            faults.append(f"{name}: not YAML ({error})")
        except reading.UnreadableError as error:
            faults.append(str(error))
    if not found and given is None and "classes.txt" in files.paths:
        return "classes.txt", _of_classes(files)
    if len(found) != 1:
        what = "no data.yaml and no classes.txt"
        if found:
            what = f"several YAML files with names, {listed(list(found))}; give one of them"
        raise DataError("\n".join([f"{files.root} cannot be imported: {what}", *(f"  {fault}" for fault in faults)]))
    return found.popitem()


def _of_classes(files: Files) -> _Yaml:
    """The content of data.yaml that corresponds to classes.txt."""
    text = reading.read_bytes(files.paths["classes.txt"], most=_MOST_YAML).decode("utf-8-sig", "surrogateescape")
    splits = {key: f"images/{key}" for key in _SPLITS if f"images/{key}" in files.folders}
    names = {"names": list(filter(None, map(str.strip, text.splitlines())))}
    return reading.checked(names | (splits or {"train": "images"}), _Yaml, name="classes.txt")


def _names(content: _Yaml, name: str, problems: Problems) -> list[str]:
    names = content["names"]
    if isinstance(names, list):
        return names
    expected = [str(number) for number in range(len(names))]
    if sorted(names) != sorted(expected):
        problems["names whose numbers are not 0, 1, 2, ..."].append(f"{name}: {listed(sorted(names))}")
        return []
    return [names[number] for number in expected]


def _listed(files: Files, path: str, value: str, place: str, found: Found, problems: Problems) -> list[tuple[str, str]]:
    """Path and name of each image of a split; `value` is a folder, or a text file of paths."""
    where = _inside(files, path, value)
    if where is None:
        problems["folders of images that are not in the source; put them inside it"].append(f"{place}: {value}")
        return []
    if where in files.folders:
        images = sorted(files.images(where))
        found.notes.append(f"{place}: {where}, {len(images):,} images")
        return [(image, posixpath.relpath(image, where)) for image in images]
    text = reading.read_bytes(files.paths[where], most=_MOST_TEXT).decode("utf-8", "surrogateescape")
    result = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if image := _inside(files, path, line):
            result.append((image, PurePosixPath(line).name))
        else:
            found.skipped[MISSING].append(f"{where}: {line}")
    found.notes.append(f"{place}: {where}, {len(result):,} images")
    return result


def _inside(files: Files, path: str, value: str) -> str | None:
    """The file or folder in the source that a path means, even if the path was written on another machine.

    It is the longest end of the path that exists in the source: train/images for /home/me/pets/train/images, perhaps.
    """
    value = value.replace("\\", "/")
    parts = [part for part in posixpath.normpath(posixpath.join(path, value)).split("/") if part not in ("", "..")]
    for start in range(len(parts)):
        candidate = posixpath.normpath("/".join(parts[start:]))
        if candidate in files.folders or candidate in files.paths:
            return candidate
    return None


def _text_of(files: Files, image: str) -> str | None:
    """The text file of an image: in the folder "labels" that corresponds to "images", else next to the image."""
    stem = posixpath.splitext(image)[0]
    before, separator, after = f"/{stem}".rpartition("/images/")
    paths = [f"{before}/labels/{after}.txt".removeprefix("/")] if separator else []
    return next((path for path in (*paths, f"{stem}.txt") if path in files.paths), None)


def _regions(files: Files, name: str, labels: list[int], lines: _Lines, problems: Problems) -> list[Region]:
    regions = []
    try:
        text = reading.read_bytes(files.paths[name], most=_MOST_TEXT).decode("utf-8-sig", "replace")
    except (OSError, reading.UnreadableError) as error:
        problems["text files that cannot be read"].append(f"{name}: {error}")
        return []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"{name}: line {number}"
        try:
            kind, *numbers = map(float, line.split())
        except ValueError:
            kind, numbers = math.nan, []
        if not all(map(math.isfinite, (kind, *numbers))) or kind != int(kind):
            problems["lines that are not a class and numbers"].append(f"{place}: {line!r:.80}")
        elif not 0 <= kind < len(labels):
            problems[f"classes that {lines.names} does not name"].append(f"{place}: {int(kind)}")
        elif any(abs(share - 0.5) > _FARTHEST - 0.5 for share in numbers):
            problems["numbers far from 0..1; divide x by the width of the image and y by its height"].append(place)
        elif len(numbers) == 4:
            x, y, width, height = numbers
            left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
            lines.boxes.append(place)
            corners = [left, top, right, top, right, bottom, left, bottom]
            regions.append(Region(IGNORED, Outline([corners], is_relative=True), place))
        else:
            lines.outlines += 1
            regions.append(Region(labels[int(kind)], Outline([numbers], is_relative=True), place))
    return regions
