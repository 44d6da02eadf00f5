"""Readers of published datasets, from their official archives or the extracted files.

    cityscapes  leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip; raw label ids, of which 19 are evaluated
    ade20k      ADEChallengeData2016.zip; 0 is unlabelled, 1..150 are the classes
    voc         VOCtrainval_11-May-2012.tar; palette masks: 0 background, 1..20 objects, 255 unlabelled outlines
    pet         images.tar.gz, annotations.tar.gz; trimaps: 1 pet, 2 background, 3 not classified

Sources: cityscapes-dataset.com and cityscapesScripts (labels.py); sceneparsing.csail.mit.edu; the development kit of
host.robots.ox.ac.uk/pascal/VOC/voc2012; robots.ox.ac.uk/~vgg/data/pets.

`READERS`, at the end, has one entry for each dataset of kind "archives" in `specs.DATASETS`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from segjax.data import specs
from segjax.data.sources import (
    ArchiveError,
    Example,
    Examples,
    File,
    Problems,
    counted,
    file_of,
    in_archive,
    in_folder,
    kind_of,
    listed,
)

Files = dict[str, File]  # by the path inside the dataset


@dataclasses.dataclass(frozen=True)
class Reader:
    """Rules by which the examples of a dataset are found among the files of its archives.

    Attributes:
      parts: Folder that is read -> official archive that contains it.
      above: Folders of the archives that enclose those of `parts`; removed from paths.
      layout: The files that are read, for messages.
      find: (files, problems) -> examples by split; adds missing files to the problems.
      train_ids: Train id of each mask value, int16 (256,); the ignore label for an ignored value, -1 for an invalid
        one.
    """

    parts: Mapping[str, str]
    above: tuple[str, ...]
    layout: str
    find: Callable[[Files, Problems], Examples]
    train_ids: np.ndarray = dataclasses.field(repr=False)

    @property
    def needs(self) -> str:
        """The files that a source must hold, for messages."""
        return f"{' and '.join(dict.fromkeys(self.parts.values()))}, or their content: {self.layout}"


def locate(
    name: str, reader: Reader, given: list[Path], problems: Problems, skipped: list[str]
) -> tuple[list[tuple[str, Path]], list[Path]]:
    """Finds the files and archives to read among the given paths.

    Args:
      name: Name of the dataset, for messages.
      reader: Reader of the dataset.
      given: Paths of folders and archives.
      problems: Receives the paths that cannot be used.
      skipped: Receives the links to folders that are read already.

    Returns:
      (path inside the dataset, path on disk) of each file in the folders, and paths of the archives.
    """
    loose, archives = [], []
    known = {*reader.parts, *reader.above}
    for path in given:
        if not path.is_dir():
            archives.append(path)
            continue
        inside = [part for part in sorted(known) if (path / part).is_dir()]
        if not inside and path.name in known:
            loose += in_folder(path.parent, [path.name], problems, skipped)
            continue
        # A folder may contain the archives, or some of them next to the extracted files of the others.
        wanted = [] if set(inside) & set(reader.above) else [part for part in reader.parts if part not in inside]
        packed = {path / reader.parts[part]: None for part in wanted if (path / reader.parts[part]).is_file()}
        loose += in_folder(path, inside, problems, skipped)
        archives += packed
        if not inside and not packed:
            names = listed(sorted(entry.name for entry in path.iterdir()))
            lower = [place for depth in ("*", "*/*") for place in sorted(path.glob(depth)) if _holds(place, reader)]
            problems[f"folders without files of {name}; needed are {reader.needs}"].append(
                f"{path} holds {names or 'nothing'}" + (f"; give {lower[0]}, which holds some" if lower else "")
            )
    for path in archives:
        if not path.is_file():
            problems["paths that are neither a file nor a folder"].append(
                f"{path}: {kind_of(path)}" if os.path.lexists(path) else str(path)
            )
    return loose, archives


def _holds(folder: Path, reader: Reader) -> bool:
    """Whether a folder contains folders or archives of a dataset."""
    return folder.is_dir() and any(
        (folder / name).exists() for name in (*reader.parts, *reader.parts.values(), *reader.above)
    )


def read(
    spec: specs.DatasetSpec,
    reader: Reader,
    loose: list[tuple[str, Path]],
    archives: list[Path],
    scratch: Callable[[], Path],
    opened: contextlib.ExitStack,
    problems: Problems,
    *,
    notes: list[str],
    subset: bool,
) -> Examples:
    """The examples in the files and archives that `locate` found.

    Args:
      spec: Spec of the dataset, with the published numbers of images; any other number is a problem.
      reader: Reader of the dataset.
      loose, archives: Result of `locate`.
      scratch, opened: See `sources.in_archive`.
      problems: Receives everything that is wrong.
      notes: Receives lines about the missing files of a subset.
      subset: Whether to accept any number of images and skip images without a mask, and masks without an image.
    """
    found: list[tuple[str, File]] = [(inside, file_of(path, inside)) for inside, path in loose]
    for path in archives:
        try:
            found += in_archive(path, scratch, opened, problems).items()
        except ArchiveError as error:
            problems["archives that are no complete .zip, .tar or .tar.gz; fetch them again"].append(f"{path}: {error}")
    files: Files = {}
    others = set()
    for name, file in found:
        if any(part[0] == "." or part == "__MACOSX" for part in name.split("/")):
            continue
        for folder in reader.above:
            name = name.removeprefix(f"{folder}/")
        if name.partition("/")[0] not in reader.parts:
            others.add(name.partition("/")[0])
        elif name in files:
            problems["files that were given twice; give each folder or archive once"].append(
                f"{files[name].name} and {file.name}"
            )
        else:
            files[name] = file
    if problems:
        return {}
    there = {name.partition("/")[0] for name in files}
    for part, archive in reader.parts.items():
        if part not in there:
            entry = f"{part}/, which comes in {archive}; found: {listed(sorted(there | others)) or 'nothing'}"
            problems[f"folders missing; needed are {reader.needs}"].append(entry)
    if problems:
        return {}
    if subset:
        return _part(spec, reader, files, problems, notes)
    examples = reader.find(files, problems)
    counts = {split: len(examples.get(split, ())) for split, _ in spec.splits}
    if counts != dict(spec.splits):
        kind = (
            f"numbers of images differ from those of {spec.name}; fetch the archives again, or prepare the available "
            f"part with `segjax data prepare {spec.name} --subset`"
        )
        problems[kind].append(f"{counted(counts)} instead of {counted(dict(spec.splits))}")
    return examples


def _part(spec: specs.DatasetSpec, reader: Reader, files: Files, problems: Problems, notes: list[str]) -> Examples:
    """The complete examples, in the splits that have any."""
    gaps: Problems = collections.defaultdict(list)
    examples = {split: found for split, found in reader.find(files, gaps).items() if found}
    counts = {split: len(examples.get(split, ())) for split, _ in spec.splits}
    numbers = ", ".join(f"{split} {counts[split]:,} of {number:,}" for split, number in spec.splits)
    if not any(example.label for found in examples.values() for example in found):
        problems[f"no image with its mask; needed are {reader.needs}"].append(numbers)
        return {}
    notes.append(f"a subset of {spec.name}: {numbers}")
    for kind, entries in gaps.items():
        notes.append(f"{kind.partition(';')[0]}, which are skipped: {len(entries):,}, such as {entries[0]}")
    return examples


# ------------------------------------------------------------------------- where images and masks lie in each dataset


def _cityscapes(files: Files, problems: Problems) -> Examples:
    images = _matched(files, r"leftImg8bit/(train|val|test)/[^/]+/([^/]+)_leftImg8bit\.png")
    # The masks of test are dummies, because its labels are not published.
    masks = _matched(files, r"gtFine/(train|val)/[^/]+/([^/]+)_gtFine_labelIds\.png")
    examples = {split: _paired(images.get(split, {}), masks.get(split, {}), problems) for split in ("train", "val")}
    return examples | {"test": [Example(name, file, None) for name, file in sorted(images.get("test", {}).items())]}


def _ade20k(files: Files, problems: Problems) -> Examples:
    images = _matched(files, r"images/(training|validation)/([^/]+)\.jpg")
    masks = _matched(files, r"annotations/(training|validation)/([^/]+)\.png")
    return {
        split: _paired(images.get(folder, {}), masks.get(folder, {}), problems)
        for split, folder in (("train", "training"), ("val", "validation"))
    }


def _voc(files: Files, problems: Problems) -> Examples:
    lists = {split: f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val")}
    return _listed(files, lists, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", problems)


def _pet(files: Files, problems: Problems) -> Examples:
    lists = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
    return _listed(files, lists, "images/{}.jpg", "annotations/trimaps/{}.png", problems)


def _matched(files: Files, pattern: str) -> dict[str, dict[str, File]]:
    """split -> name -> file, for the paths that match; the two groups of the pattern are split and name."""
    found: dict[str, dict[str, File]] = {}
    for path, file in files.items():
        if match := re.fullmatch(pattern, path):
            split, name = match.groups()
            found.setdefault(split, {})[name] = file
    return found


def _paired(images: Files, masks: Files, problems: Problems) -> list[Example]:
    problems_of = {
        "images without a mask": images.keys() - masks.keys(),
        "masks without an image": masks.keys() - images.keys(),
    }
    for kind, names in problems_of.items():
        if names:
            problems[f"{kind}; fetch the archives again"] += [(images | masks)[name].name for name in sorted(names)]
    return [Example(name, images[name], masks[name]) for name in sorted(images.keys() & masks.keys())]


def _listed(files: Files, lists: Mapping[str, str], image: str, mask: str, problems: Problems) -> Examples:
    """The examples that text files list, one name per line, in the first column."""
    examples: Examples = {}
    for split, path in lists.items():
        examples[split] = []
        if path not in files:
            problems["lists of images missing; fetch the archives again"].append(path)
            continue
        lines = files[path].read().decode("ascii", "replace").splitlines()
        for name in sorted({line.split()[0] for line in lines if line.strip() and line[0] != "#"}):
            missing = [each.format(name) for each in (image, mask) if each.format(name) not in files]
            if missing:
                problems[f"missing files that {path} lists; fetch the archives again"] += missing
            else:
                examples[split].append(Example(name, files[image.format(name)], files[mask.format(name)]))
    return examples


def _train_ids(classes: Mapping[int, int], ignored: Iterable[int]) -> np.ndarray:
    """Train id of each mask value, int16 (256,); -1 for a value that is neither a class nor ignored."""
    table = np.full(256, -1, np.int16)
    table[list(ignored)] = 255
    table[list(classes)] = list(classes.values())
    return table


_ADE = "ADEChallengeData2016.zip"
_VOC = "VOCtrainval_11-May-2012.tar"
# Label ids of Cityscapes' 19 evaluated classes, in the order of the train ids; masks have ids 0..33 (labels.py).
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

READERS = {
    "cityscapes": Reader(
        parts={"leftImg8bit": "leftImg8bit_trainvaltest.zip", "gtFine": "gtFine_trainvaltest.zip"},
        above=(),
        layout="leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/<split>/<city>/*_gtFine_labelIds.png",
        find=_cityscapes,
        train_ids=_train_ids({value: train_id for train_id, value in enumerate(_EVALUATED)}, ignored=range(34)),
    ),
    "ade20k": Reader(
        parts={"images": _ADE, "annotations": _ADE},
        above=("ADEChallengeData2016",),
        layout="images/training/*.jpg, annotations/training/*.png, and the same for validation",
        find=_ade20k,
        train_ids=_train_ids({value: value - 1 for value in range(1, 151)}, ignored=[0]),
    ),
    "voc": Reader(
        parts={"JPEGImages": _VOC, "SegmentationClass": _VOC, "ImageSets": _VOC},
        above=("VOCdevkit", "VOC2012"),
        layout="JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/train.txt and val.txt",
        find=_voc,
        train_ids=_train_ids({value: value for value in range(21)}, ignored=[255]),
    ),
    "pet": Reader(
        parts={"images": "images.tar.gz", "annotations": "annotations.tar.gz"},
        above=(),
        layout="images/*.jpg, annotations/trimaps/*.png, annotations/trainval.txt and test.txt",
        find=_pet,
        train_ids=_train_ids({1: 1, 2: 0}, ignored=[3]),
    ),
}
