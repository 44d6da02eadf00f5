"""Reads COCO's instances and panoptic segments: JSON files with images, annotations and categories.

    annotations/instances_train2017.json, train2017/          COCO, CVAT, LVIS
    train/_annotations.coco.json, train/a.jpg                 Roboflow
    data/, labels.json; images/, result.json; ...             FiftyOne, Label Studio and others: any such JSON file
    annotations/panoptic_val2017.json, panoptic_val2017/      panoptic: a PNG per image, see `panoptic`

Crowds, and objects with a box but no outline, get the ignore value. A category named "background" is the background.
Classes are sorted by the ids of their categories, which need not be consecutive. Files may give one name different ids.
"""

from __future__ import annotations

import collections
import functools
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated as With
from typing import Any, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.data.annotations import panoptic
from segjax.data.annotations.found import (
    IGNORED,
    MISSING_MASK,
    Annotated,
    Drawn,
    Files,
    Found,
    Side,
    classes_of,
    split_in,
)
from segjax.data.annotations.rasterise import NO_AREA, Outline, Region, Runs, draw
from segjax.data.annotations.write import refuse
from segjax.data.sources import DataError, Problems, listed
from segjax.runtime import reading

_Id = int | str | float


class _Image(TypedDict):
    id: _Id
    file_name: NotRequired[str]
    coco_url: NotRequired[str]
    height: NotRequired[Side | None]
    width: NotRequired[Side | None]


class _Runs(TypedDict):
    counts: list[int] | str
    size: With[list[int], Field(min_length=2, max_length=2)]


class _Annotation(TypedDict):
    image_id: _Id
    category_id: _Id
    # Some tools write an object's only polygon without the enclosing list.
    segmentation: NotRequired[list[list[FiniteFloat]] | list[FiniteFloat] | _Runs | None]
    bbox: NotRequired[list[FiniteFloat] | None]
    iscrowd: NotRequired[float | bool | None]


class _Segment(TypedDict):
    id: int
    category_id: _Id
    iscrowd: NotRequired[float | bool | None]


class _Panoptic(TypedDict):
    """All segments of an image, an annotation of a panoptic file. The colours of a PNG encode the segment ids."""

    image_id: _Id
    file_name: str
    segments_info: list[_Segment]


class _Category(TypedDict):
    id: _Id
    name: str


class _Instances(TypedDict):
    images: list[Any]
    annotations: list[Any]
    categories: list[_Category]


_NOT_INSTANCES = "JSON files that are neither instances nor panoptic segments of COCO"
_BOXES = "objects with a box but no outline; their boxes get the ignore value"
_NO_SHAPE = "objects with neither an outline nor a box"
_UNLISTED = "images that no JSON file lists"
_NO_IMAGE = "annotations of images that the same file does not list"


def read(source: Path) -> Found:
    """Reads the images and regions of a folder with JSON files, or of one JSON file with its images around it.

    Raises:
      DataError: The JSON files cannot be used; the message lists all reasons.
    """
    found = Found([], {})
    problems: Problems = collections.defaultdict(list)
    files, names = _json_files(source, found.skipped)
    contents: dict[str, _Instances] = {}
    for name in names:
        try:
            content = reading.read_json(files.paths[name], Any)
            if why := _no_instances(content):
                found.skipped[_NOT_INSTANCES].append(f"{name}: {why}")
            else:
                contents[name] = reading.checked(content, _Instances, name=name)
        except reading.UnreadableError as error:
            # The message begins with the path, or with the name inside the source.
            why = str(error).removeprefix(f"{files.paths[name]}: ").removeprefix(f"{name}: ")
            problems["JSON files that are damaged"].append(f"{name}: {why}")
    if not contents and not problems:
        entries = found.skipped.pop(_NOT_INSTANCES, [f"{source}: no .json"])
        problems["no JSON with images, annotations and categories, as in COCO's instances"] = entries
    names, categories = _categories(contents, found.notes, problems)
    found.names, ids = classes_of(names, problems)
    reader = _Read(files, found, problems)
    for split, name in _splits(list(contents), problems).items():
        labels = {number: ids[category] for number, category in categories[name].items()}
        found.splits[split] = reader.images(split, name, contents[name], labels)
        found.notes.append(f"{split}: {name}")
    used = {image.place for images in found.splits.values() for image in images} | reader.masks
    # Images around a single JSON file may belong to other files.
    if source.is_dir() and (unlisted := sorted(set(files.images()) - used)):
        found.skipped[_UNLISTED] += unlisted
    if reader.crowds:
        found.notes.append(f"crowds, which get the ignore value: {reader.crowds:,}")
        if 2 * reader.crowds > reader.annotations:
            found.notes.append("(CVAT exports every mask as a crowd; for objects, set iscrowd to 0)")
    if reader.annotations and not reader.outlines and any(found.splits.values()) and not problems:
        if reader.boxes:
            problems["only boxes: no annotation has a segmentation; boxes have no outline, export masks"] += contents
        else:
            problems |= found.skipped
    refuse(problems, str(source))
    return found


def _json_files(source: Path, skipped: Problems) -> tuple[Files, list[str]]:
    """The files of a source, and the names of the JSON files that may hold instances."""
    if not source.is_dir():
        # annotations/x.json has its images next to the folder.
        root = source.parent.parent if source.parent.name == "annotations" else source.parent
        files = Files(root, skipped)
        name = unicodedata.normalize("NFC", source.relative_to(root).as_posix())
        if not name.lower().endswith(".json") or name not in files.paths:
            raise DataError(f"{source} is neither a folder nor a .json file that can be read; unpack an archive first")
        return files, [name]
    files = Files(source, skipped)
    names = sorted(name for name in files.paths if name.lower().endswith(".json"))
    for pattern in (r"(.*/)?instances_[^/]*", r"(.*/)?_annotations\.coco\.json"):
        if chosen := [name for name in names if re.fullmatch(pattern, name)]:
            if others := [name for name in names if name not in chosen]:
                skipped["JSON files next to those of the instances"] += others
            return files, chosen
    return files, names


def _no_instances(content: Any) -> str | None:
    """Reason why JSON content is neither instances nor panoptic segments; None if it may be."""
    if not isinstance(content, dict):
        return "not a JSON object"
    if "shapes" in content:
        return "a file of labelme; segjax data import labelme"
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        return f"without {listed(missing)}"
    annotations = content["annotations"]
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return "captions" if isinstance(first, dict) and "caption" in first else None


def _key(number: _Id) -> str:
    """An id as text. VIA writes the same id as a number and as text; pandas writes it as a float."""
    return f"{number:.0f}" if isinstance(number, float) and number.is_integer() else str(number)


def _categories(
    contents: dict[str, _Instances], notes: list[str], problems: Problems
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Names of all categories, sorted by the id in the first file that has the name; and id -> name of each file."""
    places: dict[str, tuple[bool, Any]] = {}
    of_files: dict[str, dict[str, str]] = {}
    repeated: dict[str, None] = {}
    for file, content in contents.items():
        known: dict[str, str] = {}
        ids: dict[str, str] = {}
        for category in content["categories"]:
            number, name = category["id"], category["name"]
            if (other := known.get(_key(number), name)) != name:
                kind = "categories with one id and two names; give each name its own id"
                problems[kind].append(f"{file}: {number!r} is {other!r} and {name!r}")
            # Roboflow names one category after the project, and often a second one as well.
            if ids.setdefault(name, _key(number)) != _key(number):
                repeated[name] = None
            known[_key(number)] = name
            places.setdefault(name, (isinstance(number, str), number))
        of_files[file] = known
    if repeated:
        notes.append(f"categories with the same name, which are one class: {listed(list(repeated))}")
    return sorted(places, key=places.__getitem__), of_files


def _splits(names: list[str], problems: Problems) -> dict[str, str]:
    """split -> JSON file; the name of the file or of its folder mentions the split."""
    splits: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        split = split_in(path.stem) or split_in(path.parent.name)
        if split is None:
            stem = re.sub(r"[^A-Za-z0-9]+", "_", _stem(name)).strip("_")
            split = "train" if len(names) == 1 or stem.lower() in ("", "all") else stem
        if split in splits:
            problems["several JSON files of one split; import them one by one, or merge them"].append(
                f"{split}: {splits[split]} and {name}"
            )
        splits[split] = name
    return splits


def _stem(name: str) -> str:
    """Name of a JSON file without its kind and suffix: val2017 for instances_val2017.json."""
    return re.sub("^(instances|panoptic)_", "", PurePosixPath(name).stem)


class _Read:
    """Reads the images of JSON files, one split after the other.

    Attributes:
      annotations, crowds: Number of objects or segments, and of the crowds among them.
      outlines: Number of objects with an outline, and of panoptic annotations with a PNG.
      boxes: Number of objects with only a box.
      masks: Paths of panoptic PNGs.
    """

    def __init__(self, files: Files, found: Found, problems: Problems):
        self.annotations = self.crowds = self.outlines = self.boxes = 0
        self.masks: set[str] = set()
        self._files, self._found, self._problems = files, found, problems

    def images(self, split: str, name: str, content: _Instances, labels: dict[str, int]) -> list[Annotated]:
        """The images that the JSON file of this name lists for a split; `labels` is category id -> class id."""
        here, stem = posixpath.dirname(name), _stem(name)
        listed_images = self._listed(name, content["images"])
        if is_panoptic := _is_panoptic(content):
            draw_of = self._segments(name, content["annotations"], labels, listed_images)
        else:
            draw_of = self._regions(name, content["annotations"], labels, listed_images)
        # The most specific folder comes first, because two splits may have images with the same names.
        folders = [f"images/{stem}", stem, here, f"{here}/images"]
        folders += sorted(folder for folder in self._files.folders if split_in(posixpath.basename(folder)) == split)
        folders += ["images", "data", "JPEGImages", "."]
        seen: dict[str, str] = {}
        images = []
        for number, entry in listed_images.items():
            file_name = _file_name(entry)
            if number not in draw_of:
                self._found.skipped[MISSING_MASK].append(f"{name}: {file_name}")
                continue
            place, spelled = self._files.located(file_name, folders)
            if place is None or (is_panoptic and place in self.masks):
                self._found.skipped[self._files.reason_missing(file_name)].append(f"{name}: {file_name}")
                continue
            if place in seen:
                kind = "images that one JSON file lists twice; merge their annotations"
                self._problems[kind].append(f"{name}: {file_name}")
            seen[place] = file_name
            height, width = entry.get("height"), entry.get("width")
            size = (int(height), int(width)) if height and width else None
            # The folders of a relative name distinguish images; those of an absolute name belong to one machine.
            shown = spelled if "file_name" in entry and spelled[0] != "/" else posixpath.basename(place)
            images.append(Annotated(shown, place, self._files.reader(place), size, None, draw_of[number]))
        return images

    def _listed(self, name: str, entries: list[Any]) -> dict[str, _Image]:
        """Images by id."""
        images: dict[str, _Image] = {}
        for index, entry in enumerate(entries):
            try:
                image = reading.checked(entry, _Image, name=f"{name}: images.{index}")
            except reading.UnreadableError as error:
                self._problems["images that are described wrongly"].append(str(error))
                continue
            if not _file_name(image):
                self._problems["images that are described wrongly"].append(f"{name}: images.{index}: no file_name")
                continue
            if _key(image["id"]) in images:
                self._problems["images with the same id"].append(f"{name}: {image['id']!r}")
            images[_key(image["id"])] = image
        return images

    def _checked(
        self, name: str, entries: list[Any], type_: Any, images: Collection[str]
    ) -> Iterator[tuple[str, Any, str]]:
        """Yields the key of the image, the annotation and its place, for each annotation of a listed image."""
        for index, entry in enumerate(entries):
            place = f"{name}: annotations.{index}"
            self.annotations += 1
            try:
                annotation = reading.checked(entry, type_, name=place)
            except reading.UnreadableError as error:
                self._problems["annotations that are described wrongly"].append(str(error))
                continue
            if (image := _key(annotation["image_id"])) in images:
                yield image, annotation, place
            else:
                self._found.skipped[_NO_IMAGE].append(f"{place}: {annotation['image_id']!r}")

    def _label(self, part: _Annotation | _Segment, labels: dict[str, int], place: str) -> int:
        if (label := labels.get(_key(part["category_id"]))) is None:
            self._problems["annotations of a category that is not listed"].append(f"{place}: {part['category_id']!r}")
        if part.get("iscrowd"):
            self.crowds += 1
            return IGNORED
        return label or 0

    def _regions(
        self, name: str, entries: list[Any], labels: dict[str, int], images: Collection[str]
    ) -> dict[str, Callable[[tuple[int, int]], Drawn]]:
        """For each image, the function that draws its objects."""
        regions: dict[str, list[Region]] = {number: [] for number in images}
        for image, annotation, place in self._checked(name, entries, _Annotation, images):
            if region := self._region(annotation, self._label(annotation, labels, place), place):
                regions[image].append(region)
        return {number: functools.partial(draw, of_image) for number, of_image in regions.items()}

    def _region(self, annotation: _Annotation, label: int, place: str) -> Region | None:
        """The region that an annotation marks; None, and counted as skipped, if there is none."""
        given, skipped = annotation.get("segmentation"), self._found.skipped
        if isinstance(given, dict):
            self.outlines += 1
            return Region(label, Runs(given["counts"], (given["size"][0], given["size"][1])), place)
        polygons = _polygons(given or [])
        if usable := [part for part in polygons if len(part) >= 6 and len(part) % 2 == 0]:
            self.outlines += 1
            if len(usable) < len(polygons):
                skipped[f"{NO_AREA}, of objects that have others"].append(place)
            return Region(label, Outline(usable), place)
        box = annotation.get("bbox") or []
        if len(box) != 4:
            skipped[NO_AREA if polygons else _NO_SHAPE].append(place)
            return None
        self.boxes += 1
        skipped[_BOXES].append(place)
        left, top, width, height = box
        corners = [left, top, left + width, top, left + width, top + height, left, top + height]
        return Region(IGNORED, Outline([corners]), place)

    def _segments(
        self, name: str, entries: list[Any], labels: dict[str, int], images: Collection[str]
    ) -> dict[str, Callable[[tuple[int, int]], Drawn]]:
        """For each image that has a PNG, the function that draws its segments."""
        here, stem = posixpath.dirname(name), PurePosixPath(name).stem
        draw_of = {}
        for image, annotation, place in self._checked(name, entries, _Panoptic, images):
            # `_checked` counted one annotation; each of its segments counts.
            self.annotations += len(annotation["segments_info"]) - 1
            mask, _ = self._files.located(annotation["file_name"], [posixpath.join(here, stem), stem, here])
            if mask is None:
                continue
            if image in draw_of:
                self._problems["images with two panoptic annotations; merge them"].append(place)
            self.outlines += 1
            self.masks.add(mask)
            segments = {part["id"]: self._label(part, labels, place) for part in annotation["segments_info"]}
            if len(segments) < len(annotation["segments_info"]):
                self._problems["segments of one image with the same id; give each its own"].append(place)
            draw_of[image] = functools.partial(panoptic.draw, self._files, mask, segments, place)
        return draw_of


def _is_panoptic(content: _Instances) -> bool:
    annotations = content["annotations"]
    return bool(annotations) and isinstance(annotations[0], dict) and "segments_info" in annotations[0]


def _file_name(image: _Image) -> str:
    """Name of the image file: `file_name`, or the path in `coco_url` (LVIS); "" without either."""
    return image.get("file_name") or re.sub(r"^\w+://[^/]*/", "", image.get("coco_url") or "")


def _polygons(given: list[Any]) -> list[list[float]]:
    """Polygons x0, y0, x1, ..., also from one without the enclosing list, and from one in pairs of coordinates."""
    if not given or not isinstance(given[0], list):
        return [given] if given else []
    if len(given) >= 3 and all(len(part) == 2 for part in given):
        return [[number for pair in given for number in pair]]
    return [part for part in given if part]
