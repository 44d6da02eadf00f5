"""Published datasets in the form of their official archives, extracted or not.

    cityscapes  leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip; raw label ids, of which 19 are evaluated
    ade20k      ADEChallengeData2016.zip; 0 is unlabelled, 1..150 are the classes
    voc         VOCtrainval_11-May-2012.tar; palette masks: 0 background, 1..20 objects, 255 unlabelled outlines
    pet         images.tar.gz, annotations.tar.gz; trimaps: 1 pet, 2 background, 3 not classified

Sources: cityscapes-dataset.com and cityscapesScripts (labels.py); sceneparsing.csail.mit.edu; the development kit of
host.robots.ox.ac.uk/pascal/VOC/voc2012; robots.ox.ac.uk/~vgg/data/pets.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    listed,
)

Files = dict[str, File]  # by the path inside the dataset


@dataclasses.dataclass(frozen=True)
class Published:
    """A published dataset.

    Attributes:
      spec: what it is, with the published numbers of images.
      parts: the folders that are read, and the official archive that each comes in.
      above: folders that the archives have above those.
      layout: the files that are read, for messages.
      find: examples among the files; says what is missing in the problems.
      train_ids: int16 (256,), the train id of each value of the masks, -1 for values that they cannot have.
    """

    spec: specs.DatasetSpec
    parts: Mapping[str, str]
    above: tuple[str, ...]
    layout: str
    find: Callable[[Files, Problems], Examples]
    train_ids: np.ndarray = dataclasses.field(repr=False)

    @property
    def needs(self) -> str:
        """What a source must hold, for messages."""
        return f"{' and '.join(dict.fromkeys(self.parts.values()))}, or what they hold: {self.layout}"


def locate(dataset: Published, given: list[Path], problems: Problems) -> tuple[list[tuple[str, Path]], list[Path]]:
    """What of the given paths is to be read: (path inside, file) in folders, and archives."""
    loose, archives = [], []
    known = {*dataset.parts, *dataset.above}
    for path in given:
        if not path.is_dir():
            archives.append(path)
            continue
        inside = [part for part in sorted(known) if (path / part).is_dir()]
        if not inside and path.name in known:
            loose += in_folder(path.parent, [path.name])
            continue
        # A folder may hold the archives, or some of them beside what was extracted from others.
        wanted = [] if set(inside) & set(dataset.above) else [part for part in dataset.parts if part not in inside]
        packed = {path / dataset.parts[part]: None for part in wanted if (path / dataset.parts[part]).is_file()}
        loose += in_folder(path, inside)
        archives += packed
        if not inside and not packed:
            names = listed(sorted(entry.name for entry in path.iterdir()))
            problems[f"folders with nothing of {dataset.spec.name}; needed are {dataset.needs}"].append(
                f"{path} holds {names or 'nothing'}"
            )
    for path in archives:
        if not path.is_file():
            problems["paths that are neither a file nor a folder"].append(str(path))
    return loose, archives


def read(
    dataset: Published,
    loose: list[tuple[str, Path]],
    archives: list[Path],
    scratch: Callable[[], Path],
    opened: contextlib.ExitStack,
    problems: Problems,
) -> Examples:
    """The examples of what `locate` found; see `sources.in_archive` for `scratch` and `opened`."""
    found: list[tuple[str, File]] = [(inside, file_of(path, inside)) for inside, path in loose]
    for path in archives:
        try:
            found += in_archive(path, scratch, opened).items()
        except ArchiveError as error:
            problems["archives that are no whole .zip, .tar or .tar.gz; fetch them again"].append(f"{path}: {error}")
    files: Files = {}
    others = set()
    for name, file in found:
        if any(part[0] == "." or part == "__MACOSX" for part in name.split("/")):
            continue
        for folder in dataset.above:
            name = name.removeprefix(f"{folder}/")
        if name.partition("/")[0] not in dataset.parts:
            others.add(name.partition("/")[0])
        elif name in files:
            problems["files that come twice; give each folder or archive once"].append(
                f"{files[name].name} and {file.name}"
            )
        else:
            files[name] = file
    if problems:
        return {}
    there = {name.partition("/")[0] for name in files}
    for part, archive in dataset.parts.items():
        if part not in there:
            entry = f"{part}/, which comes in {archive}; found: {listed(sorted(there | others)) or 'nothing'}"
            problems[f"folders missing; needed are {dataset.needs}"].append(entry)
    if problems:
        return {}
    examples = dataset.find(files, problems)
    counts = {split: len(examples[split]) for split, _ in dataset.spec.splits}
    if counts != dict(dataset.spec.splits):
        kind = f"images are not as many as in {dataset.spec.name}; fetch the archives again"
        problems[kind].append(f"{counted(counts)} instead of {counted(dict(dataset.spec.splits))}")
    return examples


# What lies where


def _cityscapes(files: Files, problems: Problems) -> Examples:
    images = _matched(files, r"leftImg8bit/(train|val|test)/[^/]+/([^/]+)_leftImg8bit\.png")
    # The masks of test are dummies: its labels are not published.
    masks = _matched(files, r"gtFine/(train|val)/[^/]+/([^/]+)_gtFine_labelIds\.png")
    examples = {split: _paired(images.get(split, {}), masks.get(split, {}), problems) for split in ("train", "val")}
    return examples | {"test": [Example(name, file, None) for name, file in sorted(images.get("test", {}).items())]}


def _ade20k(files: Files, problems: Problems) -> Examples:
    images = _matched(files, r"images/(training|validation)/([^/]+)\.jpg")
    masks = _matched(files, r"annotations/(training|validation)/([^/]+)\.png")
    return {
        ours: _paired(images.get(theirs, {}), masks.get(theirs, {}), problems)
        for ours, theirs in (("train", "training"), ("val", "validation"))
    }


def _voc(files: Files, problems: Problems) -> Examples:
    lists = {split: f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val")}
    return _listed(files, lists, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", problems)


def _pet(files: Files, problems: Problems) -> Examples:
    lists = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
    return _listed(files, lists, "images/{}.jpg", "annotations/trimaps/{}.png", problems)


def _matched(files: Files, pattern: str) -> dict[str, dict[str, File]]:
    """split -> name -> file, of the paths that match; the pattern's groups are split and name."""
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
    """Examples by text files that hold a name per line, in its first column."""
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
                problems[f"files missing that {path} lists; fetch the archives again"] += missing
            else:
                examples[split].append(Example(name, files[image.format(name)], files[mask.format(name)]))
    return examples


def _train_ids(classes: Mapping[int, int], ignored: Iterable[int]) -> np.ndarray:
    """int16 (256,): value of the mask -> train id; -1 for a value that is neither a class nor ignored."""
    table = np.full(256, -1, np.int16)
    table[list(ignored)] = 255
    table[list(classes)] = list(classes.values())
    return table


_ADE = "ADEChallengeData2016.zip"
_VOC = "VOCtrainval_11-May-2012.tar"
# The raw ids of Cityscapes' 19 evaluated classes, in the order of the train ids; 0..33 are in use (labels.py).
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

PUBLISHED = {
    "cityscapes": Published(
        spec=specs.CITYSCAPES,
        parts={"leftImg8bit": "leftImg8bit_trainvaltest.zip", "gtFine": "gtFine_trainvaltest.zip"},
        above=(),
        layout="leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/<split>/<city>/*_gtFine_labelIds.png",
        find=_cityscapes,
        train_ids=_train_ids({raw: train_id for train_id, raw in enumerate(_EVALUATED)}, ignored=range(34)),
    ),
    "ade20k": Published(
        spec=specs.ADE20K,
        parts={"images": _ADE, "annotations": _ADE},
        above=("ADEChallengeData2016",),
        layout="images/training/*.jpg, annotations/training/*.png, and the same of validation",
        find=_ade20k,
        train_ids=_train_ids({value: value - 1 for value in range(1, 151)}, ignored=[0]),
    ),
    "voc": Published(
        spec=specs.VOC,
        parts={"JPEGImages": _VOC, "SegmentationClass": _VOC, "ImageSets": _VOC},
        above=("VOCdevkit", "VOC2012"),
        layout="JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/train.txt and val.txt",
        find=_voc,
        train_ids=_train_ids({value: value for value in range(21)}, ignored=[255]),
    ),
    "pet": Published(
        spec=specs.PET,
        parts={"images": "images.tar.gz", "annotations": "annotations.tar.gz"},
        above=(),
        layout="images/*.jpg, annotations/trimaps/*.png, annotations/trainval.txt and test.txt",
        find=_pet,
        train_ids=_train_ids({1: 1, 2: 0}, ignored=[3]),
    ),
}
