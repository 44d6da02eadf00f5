"""Reads labelme's JSON files, one per image, in a folder and the folders below it.

Polygons, rectangles, circles and masks are drawn; lines and points have no area. "__ignore__" becomes the ignore value
and "_background_" the background, as in labelme's own converters; other labels become classes in alphabetical order.
Folders named after splits (train, val, test) are splits; all other images are train. The image of a JSON file is the
first of these that exists: the file that it names; a file of the same name next to it; the only file elsewhere with the
name that it gives; the image inside it. Images without a JSON file are background.
"""

from __future__ import annotations

import base64
import binascii
import collections
import functools
import math
import posixpath
from pathlib import Path
from typing import Annotated as With
from typing import Any, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.data.annotations.found import IGNORED, IMAGES, Annotated, Files, Found, Side, classes_of, split_around
from segjax.data.annotations.rasterise import NO_AREA, Bitmap, Outline, Region, draw
from segjax.data.annotations.write import refuse
from segjax.data.codec import ImageError
from segjax.data.sources import Problems
from segjax.runtime import reading

_IGNORE = "__ignore__"
# Corners of a circle. At a radius of 1,000 pixels, the sides lie at most 0.04 pixels inside the circle.
_CORNERS = 360
_NO_JSON = "images without a JSON file, which are background; remove them if they are not annotated yet"
_NO_LABEL = 'shapes without a label; in labelme, give each the name of a class, or "__ignore__" for ignored pixels'
_LINES = "lines and points, which have no area"


class _Shape(TypedDict):
    label: str | None
    points: list[With[list[FiniteFloat], Field(min_length=2, max_length=2)]]
    shape_type: NotRequired[str | None]
    mask: NotRequired[str | None]


class _File(TypedDict):
    shapes: list[_Shape]
    imagePath: NotRequired[str | None]
    imageData: NotRequired[str | None]
    imageHeight: NotRequired[Side | None]
    imageWidth: NotRequired[Side | None]


def read(source: Path) -> Found:
    """Reads the images and regions of a folder.

    Raises:
      DataError: The JSON files cannot be used; the message lists all reasons.
    """
    found = Found([], {})
    problems: Problems = collections.defaultdict(list)
    if not source.is_dir():
        problems["no folder of labelme's JSON files"].append(str(source))
        refuse(problems, str(source))
    files = Files(source, found.skipped)
    shapes: dict[str, list[_Shape]] = {}
    images: dict[str, Annotated] = {}
    for name in sorted(name for name in files.paths if name.lower().endswith(".json")):
        try:
            content = reading.read_json(files.paths[name], Any)
            if not isinstance(content, dict) or "shapes" not in content:
                found.skipped["JSON files without shapes, which are not labelme's"].append(name)
                continue
            content = reading.checked(content, _File, name=name)
        except reading.UnreadableError as error:
            why = str(error).removeprefix(f"{files.paths[name]}: ").removeprefix(f"{name}: ")
            problems["JSON files that are damaged"].append(f"{name}: {why}")
            continue
        if unnamed := [number for number, shape in enumerate(content["shapes"]) if not _label(shape)]:
            problems[_NO_LABEL] += [f"{name}: shape {number}" for number in unnamed]
        image = _image(files, name, content, found)
        if image is None:
            continue
        if image.place in images:
            problems["several JSON files of one image; keep one"].append(f"{name}: {image.place}")
        images[image.place] = image
        shapes[image.place] = content["shapes"]
    if not shapes and not problems:
        problems["no JSON file of labelme with its image"].append(str(source))
        for kind, entries in found.skipped.items():
            problems[kind] += entries
    labels = {_label(shape) for of in shapes.values() for shape in of} - {_IGNORE, ""}
    found.names, ids = classes_of(sorted(labels), problems)
    refuse(problems, str(source))
    ids[_IGNORE] = IGNORED
    for place in sorted({*images, *files.images()}):
        split, name = split_around(place)
        if place in images:
            drawn = functools.partial(draw, _regions(shapes[place], ids, place, found))
            image = images[place]
        else:
            found.skipped[_NO_JSON].append(place)
            drawn = functools.partial(draw, ())
            image = Annotated(place, place, files.reader(place), None, True, drawn)
        found.splits.setdefault(split or "train", []).append(
            Annotated(name, place, image.read, image.size, image.is_upright, drawn)
        )
    return found


def _label(shape: _Shape) -> str:
    """The label of a shape; "" for none."""
    label = shape["label"] or ""
    return label if label.strip() else ""


def _image(files: Files, name: str, content: _File, found: Found) -> Annotated | None:
    """The image of a JSON file, whose `draw` is set later; None, and counted as skipped, if it has none."""
    height, width = content.get("imageHeight"), content.get("imageWidth")
    size = (int(height), int(width)) if height and width else None
    given = content.get("imagePath") or ""
    place = files.find(given, [posixpath.dirname(name)]) if given else None
    stem = posixpath.splitext(name)[0]
    place = place or next((path for path in (stem + suffix for suffix in IMAGES) if path in files.paths), None)
    if place is None and given:
        place = files.only(posixpath.basename(given.replace("\\", "/")), split=split_around(name)[0])

    def nothing(_size: tuple[int, int]) -> Any:
        raise AssertionError("replaced when all classes are known")

    if place is not None:
        return Annotated(place, place, files.reader(place), size, True, nothing)
    if content.get("imageData"):
        return Annotated(stem, name, functools.partial(_embedded, files, name), size, True, nothing)
    found.skipped[files.reason_missing(given)].append(f"{name}: {given}")
    return None


def _embedded(files: Files, name: str) -> bytes:
    """The image inside a JSON file. The file is read again, because all images together may not fit in memory."""
    content = reading.read_json(files.paths[name], _File)
    try:
        return base64.b64decode(content["imageData"] or "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"imageData is not base64 ({error})") from None


def _regions(shapes: list[_Shape], ids: dict[str, int], place: str, found: Found) -> list[Region]:
    regions = []
    for number, shape in enumerate(shapes):
        where = f"{place}: shape {number}, {shape['label']}"
        kind, points = shape.get("shape_type") or "polygon", shape["points"]
        if kind in ("line", "linestrip", "point", "points"):
            found.skipped[_LINES].append(f"{where}: {kind}")
            continue
        if kind not in ("polygon", "rectangle", "oriented_rectangle", "rotation", "circle", "mask"):
            found.skipped["shapes of an unknown type"].append(f"{where}: {kind}")
        elif drawn := _shape(kind, points, shape.get("mask") or ""):
            regions.append(Region(ids[_label(shape)], drawn, where))
        else:
            found.skipped[NO_AREA].append(f"{where}: {kind}")
    return regions


def _shape(kind: str, points: list[list[float]], mask: str) -> Outline | Bitmap | None:
    """The outline or mask of a shape; None if it has too few points."""
    if kind == "mask":
        return Bitmap(mask, round(points[0][0]), round(points[0][1])) if points and mask else None
    if kind == "circle":
        if len(points) != 2:
            return None
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        angles = [2 * math.pi * number / _CORNERS for number in range(_CORNERS)]
        points = [[x + radius * math.cos(angle), y + radius * math.sin(angle)] for angle in angles]
    elif kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        points = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return Outline([[number for point in points for number in point]]) if len(points) >= 3 else None
