"""Reads COCO's instances: JSON files with images, annotations and categories.

    annotations/instances_train2017.json, train2017/          COCO, CVAT
    train/_annotations.coco.json, train/a.jpg                 Roboflow
    data/, labels.json; images/, result.json; ...             FiftyOne, Label Studio and others: any JSON of the kind

Crowds, and objects that have a box but no outline, become the ignore value. A category named "background" is the
background. The ids of categories need not follow one another; classes have their order.
"""

from __future__ import annotations

import collections
import functools
import posixpath
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Annotated as With
from typing import Any, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.data.annotations.found import IGNORED, Annotated, Files, Found, classes_of, split_in
from segjax.data.annotations.rasterise import NO_AREA, Outline, Region, Runs, draw
from segjax.data.annotations.write import refuse
from segjax.data.sources import DataError, Problems, listed
from segjax.runtime import reading

_Id = int | str


class _Image(TypedDict):
    id: _Id
    file_name: str
    height: NotRequired[With[int, Field(ge=0)] | None]
    width: NotRequired[With[int, Field(ge=0)] | None]


class _Runs(TypedDict):
    counts: list[int] | str
    size: With[list[int], Field(min_length=2, max_length=2)]


class _Annotation(TypedDict):
    image_id: _Id
    category_id: _Id
    # Some write the only polygon of an object without the list around it.
    segmentation: NotRequired[list[list[FiniteFloat]] | list[FiniteFloat] | _Runs | None]
    bbox: NotRequired[list[FiniteFloat] | None]
    iscrowd: NotRequired[int | bool | None]


class _Category(TypedDict):
    id: _Id
    name: str


class _Instances(TypedDict):
    images: list[Any]
    annotations: list[Any]
    categories: list[_Category]


_NOT_INSTANCES = "JSON files that are no instances of COCO"
_BOXES = "objects that have a box but no outline; their boxes become the ignore value"
_NO_SHAPE = "objects that have neither an outline nor a box"
_UNLISTED = "images that no JSON file lists"
_NO_IMAGE = "annotations of images that the same file does not list"


def read(source: Path) -> Found:
    """The images and regions of a folder with JSON files, or of one JSON file with images around it.

    Raises:
      DataError: what the JSON files hold cannot be used; the message lists all reasons.
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
            # It has the path in front, or the name inside the source.
            why = str(error).removeprefix(f"{files.paths[name]}: ").removeprefix(f"{name}: ")
            problems["JSON files that are damaged"].append(f"{name}: {why}")
    if not contents and not problems:
        entries = found.skipped.pop(_NOT_INSTANCES, [f"{source}: no .json"])
        problems["no JSON with images, annotations and categories, as COCO's instances have them"] = entries
    known = _categories(contents, problems)
    found.names, ids = classes_of(list(known.values()), problems)
    labels = {category: ids[name] for category, name in known.items()}
    for split, name in _splits(list(contents), problems).items():
        found.splits[split] = _images(files, split, name, contents[name], labels, found, problems)
        found.notes.append(f"{split}: {name}")
    used = {image.place for images in found.splits.values() for image in images}
    # What lies around a single file may belong to others.
    if source.is_dir() and (unlisted := sorted(set(files.images()) - used)):
        found.skipped[_UNLISTED] += unlisted
    every = [content["annotations"] for content in contents.values()]
    if any(every) and not any(_has_outline(annotation) for of in every for annotation in of) and not problems:
        problems["boxes only: no annotation has a segmentation; boxes show no outline, export masks"] += contents
    refuse(problems, str(source))
    return found


def _json_files(source: Path, skipped: Problems) -> tuple[Files, list[str]]:
    """The files of a source, and the JSON files among them that may be instances."""
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
    """Why JSON is something else than instances; None if it is to be read as such."""
    if not isinstance(content, dict):
        return "no object of JSON"
    if "shapes" in content:
        return "a file of labelme; segjax data import labelme"
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        return f"without {listed(missing)}"
    annotations = content["annotations"]
    if isinstance(annotations, list) and annotations and isinstance(annotations[0], dict):
        if "segments_info" in annotations[0]:
            return "a panoptic one"
        if "caption" in annotations[0]:
            return "captions"
    return None


def _categories(contents: dict[str, _Instances], problems: Problems) -> dict[_Id, str]:
    """The name of each category, in the order of ids, over all files."""
    known: dict[_Id, str] = {}
    for name, content in contents.items():
        for category in content["categories"]:
            number, text = category["id"], category["name"]
            if known.setdefault(number, text) != text:
                kind = "categories of one id and two names; give each name an id of its own"
                problems[kind].append(f"{name}: {number!r} is {known[number]!r} and {text!r}")
    return dict(sorted(known.items(), key=lambda entry: (isinstance(entry[0], str), entry[0])))


def _splits(names: list[str], problems: Problems) -> dict[str, str]:
    """split -> JSON file, by what their names or those of their folders mention."""
    splits: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        split = split_in(path.stem) or split_in(path.parent.name)
        if split is None:
            stem = re.sub(r"[^A-Za-z0-9]+", "_", path.stem.removeprefix("instances_")).strip("_")
            split = "train" if len(names) == 1 or stem.lower() in ("", "all") else stem
        if split in splits:
            problems["JSON files of one split; import them one by one, or merge them"].append(
                f"{split}: {splits[split]} and {name}"
            )
        splits[split] = name
    return splits


def _images(
    files: Files, split: str, name: str, content: _Instances, labels: dict[_Id, int], found: Found, problems: Problems
) -> list[Annotated]:
    regions, listed_images = _regions(name, content, labels, found, problems)
    here, stem = posixpath.dirname(name), PurePosixPath(name).stem.removeprefix("instances_")
    # From the most specific: two splits may have images of the same names.
    folders = [f"images/{stem}", stem, here, f"{here}/images"]
    folders += sorted(folder for folder in files.folders if split_in(posixpath.basename(folder)) == split)
    folders += ["images", "data", "JPEGImages", "."]
    seen: dict[str, str] = {}
    images = []
    for number, entry in listed_images.items():
        file_name = entry["file_name"]
        place = files.find(file_name, folders) or files.only(file_name)
        if place is None:
            found.skipped[files.reason_missing(file_name)].append(f"{name}: {file_name}")
            continue
        if place in seen:
            problems["images that one JSON file lists twice; merge their annotations"].append(f"{name}: {file_name}")
        seen[place] = file_name
        height, width = entry.get("height"), entry.get("width")
        size = (height, width) if height and width else None
        drawn = functools.partial(draw, regions[number])
        # The folders in a relative name tell images apart; those of an absolute one are of this machine.
        shown = posixpath.basename(place) if file_name.startswith("/") else file_name
        images.append(Annotated(shown, place, files.reader(place), size, None, drawn))
    return images


def _regions(
    name: str, content: _Instances, labels: dict[_Id, int], found: Found, problems: Problems
) -> tuple[dict[_Id, list[Region]], dict[_Id, _Image]]:
    """The regions of each image, and the images, by their ids."""
    images: dict[_Id, _Image] = {}
    for index, entry in enumerate(content["images"]):
        try:
            image = reading.checked(entry, _Image, name=f"{name}: images.{index}")
        except reading.UnreadableError as error:
            problems["images that are described wrongly"].append(str(error))
            continue
        if image["id"] in images:
            problems["images of one id"].append(f"{name}: {image['id']!r}")
        images[image["id"]] = image
    regions: dict[_Id, list[Region]] = {number: [] for number in images}
    for index, entry in enumerate(content["annotations"]):
        place = f"{name}: annotations.{index}"
        try:
            annotation = reading.checked(entry, _Annotation, name=place)
        except reading.UnreadableError as error:
            problems["annotations that are described wrongly"].append(str(error))
            continue
        if annotation["category_id"] not in labels:
            problems["annotations of a category that is not listed"].append(f"{place}: {annotation['category_id']!r}")
        elif annotation["image_id"] not in images:
            found.skipped[_NO_IMAGE].append(f"{place}: {annotation['image_id']!r}")
        elif region := _region(annotation, labels[annotation["category_id"]], place, found):
            regions[annotation["image_id"]].append(region)
    return regions, images


def _has_outline(annotation: _Annotation) -> bool:
    return isinstance(annotation, dict) and bool(annotation.get("segmentation"))


def _region(annotation: _Annotation, label: int, place: str, found: Found) -> Region | None:
    """What an annotation marks; None where it marks nothing, which is counted."""
    given = annotation.get("segmentation")
    if annotation.get("iscrowd"):
        label = IGNORED
    if isinstance(given, dict):
        return Region(label, Runs(given["counts"], (given["size"][0], given["size"][1])), place)
    if given:
        polygons: Any = given if isinstance(given[0], list) else [given]
        usable = [part for part in polygons if len(part) >= 6 and len(part) % 2 == 0]
        if 0 < len(usable) < len(polygons):
            found.skipped[f"{NO_AREA}, of objects that have others"].append(place)
        return Region(label, Outline(usable or polygons), place)
    box = annotation.get("bbox") or []
    if len(box) != 4:
        found.skipped[_NO_SHAPE].append(place)
        return None
    found.skipped[_BOXES].append(place)
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return Region(IGNORED, Outline([corners]), place)
