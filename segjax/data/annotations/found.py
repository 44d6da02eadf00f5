"""The result of the annotation readers, and the files that they search."""

from __future__ import annotations

import collections
import dataclasses
import functools
import posixpath
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated as With
from typing import NamedTuple

import numpy as np
from pydantic import Field, FiniteFloat

from segjax.data import codec, specs
from segjax.data.sources import MOST, Problems, in_folder
from segjax.runtime import reading

BACKGROUND = "background"  # name of class 0
IGNORED = specs.LARGEST_LABEL  # label of ignored pixels while labels are drawn
MOST_CLASSES = specs.LARGEST_LABEL  # with the background; 16 bits also hold IGNORED
# Suffixes of images; images whose format cannot be used are counted.
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".dng", ".heic")
IMAGES += (".heif", ".avif", ".jp2", ".pfm")
# Height or width of an image in JSON; a float, because pandas writes every number as one.
Side = With[FiniteFloat, Field(ge=0, multiple_of=1)]
# Common names of splits, and segjax's name for each.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "trainval": "trainval"}
_SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")
OUTSIDE = "images whose names lead out of the source; put them inside it, and correct the names"
MISSING = "images that are missing"
MISSING_MASK = "images whose masks are missing"


class Drawn(NamedTuple):
    """The labels of an image.

    Attributes:
      labels: Uint16 (H, W), class ids and IGNORED.
      objects: Class id -> number of objects.
      skipped: (reason, place) of each annotation that was not drawn, or only in part.
    """

    labels: np.ndarray
    objects: collections.Counter[int]
    skipped: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Annotated:
    """An image and its annotations.

    Attributes:
      name: Path from which the name of the output is made; it need not be unique.
      place: Path inside the source, for messages.
      read: () -> content of the image file; OSError or ValueError if it cannot be read.
      size: (height, width) in the annotations; None if they have no size.
      is_upright: Whether the annotations belong to the image after its EXIF rotation; None if only `size` can decide.
      draw: (height, width) -> labels; ValueError if nothing can be drawn.
    """

    name: str
    place: str
    read: Callable[[], bytes]
    size: tuple[int, int] | None
    is_upright: bool | None
    draw: Callable[[tuple[int, int]], Drawn]


@dataclasses.dataclass
class Found:
    """The content of a source.

    Attributes:
      names: Names of the classes; the first is BACKGROUND.
      splits: Split -> its images.
      notes: Lines of the report about the files.
      skipped: Reason -> places of the files and annotations that are not imported.
    """

    names: list[str]
    splits: dict[str, list[Annotated]]
    notes: list[str] = dataclasses.field(default_factory=list)
    skipped: Problems = dataclasses.field(default_factory=lambda: collections.defaultdict(list))


class Files:
    """The files below a folder, by their relative paths in composed Unicode (NFC). No other file can be read.

    Links are followed, as everywhere; hidden files are skipped.
    """

    def __init__(self, root: Path, skipped: Problems):
        links: list[str] = []
        found = in_folder(root, ["."], skipped, links)
        self.root = root
        self.paths: dict[str, Path] = {}
        for name, path in found:
            composed = unicodedata.normalize("NFC", name)
            if any(part[0] == "." or part == "__MACOSX" for part in name.split("/")):
                continue
            if self.paths.setdefault(composed, path) != path:
                skipped["files whose names differ from another one only in the Unicode form of accents"].append(name)
        self.folders = {str(folder) for name in self.paths for folder in PurePosixPath(name).parents}
        if links:
            skipped["links to folders that are already read"] += links

    def images(self, folder: str = ".") -> Iterator[str]:
        """Paths of all images below a folder, by their suffixes."""
        start = "" if folder == "." else f"{folder}/"
        return (name for name in self.paths if name.startswith(start) and name.lower().endswith(IMAGES))

    def find(self, name: str, folders: Iterable[str]) -> str | None:
        """Path of the file with this name in the first folder that has one; the name may have Windows separators."""
        name = unicodedata.normalize("NFC", name).removeprefix(f"{self.root.absolute()}/")
        for folder in folders:
            for spelling in (name, name.replace("\\", "/")):
                path = posixpath.normpath(posixpath.join(folder, spelling))
                if path in self.paths:
                    return path
        return None

    def only(self, name: str, *, split: str | None = None) -> str | None:
        """Path of the only file whose path ends with this name, in any case; of several, the only one in `split`."""
        name = posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/")).casefold()
        same = self._by_name.get(posixpath.basename(name), ())
        found = [path for path in same if f"/{path}".casefold().endswith(f"/{name}")]
        if len(found) > 1:
            found = [path for path in found if split and split_around(path)[0] == split]
        return found[0] if len(found) == 1 else None

    def located(self, name: str, folders: Sequence[str]) -> tuple[str | None, str]:
        """Path that `find` or else `only` finds, or None; and the spelling of the name that was found.

        Names are tried as written, then without percent-encoding (my%20image.jpg).
        """
        for spelling in dict.fromkeys((name, urllib.parse.unquote(name))):
            if (path := self.find(spelling, folders) or self.only(spelling)) is not None:
                return path, spelling
        return None, name

    @functools.cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in self.paths:
            found.setdefault(posixpath.basename(path).casefold(), []).append(path)
        return found

    def reason_missing(self, name: str) -> str:
        """Reason for `Found.skipped` why `find` returned None."""
        name = name.replace("\\", "/")
        leads_out = re.match(r"/|[A-Za-z]:|\w+://", name) or posixpath.normpath(name).startswith("../")
        return OUTSIDE if leads_out else MISSING

    def png(self, name: str) -> bytes:
        """Content of a PNG. Raises ImageError for another format, and for a damaged or too large file."""
        data = reading.read_bytes(self.paths[name], most=MOST)
        damage = codec.damage(data) if data.startswith(codec.PNG) else "is not a PNG"
        if fault := damage or codec.fault_of_image(data):
            raise codec.ImageError(f"its mask {name}: {fault}")
        return data

    def reader(self, name: str) -> Callable[[], bytes]:
        return functools.partial(reading.read_bytes, self.paths[name], most=MOST)


def split_in(text: str) -> str | None:
    """Split that the name of a file or folder mentions, "val" in instances_val2017; None for none or several."""
    found = {_SPLITS[word] for word in re.split(r"[^a-z]+", text.lower()) if word in _SPLITS}
    return found.pop() if len(found) == 1 else None


def split_around(path: str) -> tuple[str | None, str]:
    """Split that a folder of the path mentions, outermost first, and the path without this folder."""
    *folders, name = path.split("/")
    for place, folder in enumerate(folders):
        if split := split_in(folder):
            return split, "/".join([*folders[:place], *folders[place + 1 :], name])
    return None, path


def classes_of(names: Sequence[str], problems: Problems) -> tuple[list[str], dict[str, int]]:
    """All classes, with the background as class 0, and the class id of each of `names`; faults go to `problems`."""
    known = {name: 0 for name in names if is_background(name)}
    others = [name for name in names if name not in known]
    if repeated := [name for name, times in collections.Counter(names).items() if times > 1]:
        problems["classes with the same name; rename them"] += repeated
    if len(others) >= MOST_CLASSES:
        problems[f"more classes than the {MOST_CLASSES - 1} that fit a 16-bit mask next to the background"].append(
            f"{len(others)} classes"
        )
    if empty := [name for name in others if not name.strip()]:
        problems["classes without a name; name them"] += map(repr, empty)
    return [BACKGROUND, *others], known | {name: number for number, name in enumerate(others, 1)}


def is_background(name: str) -> bool:
    """Whether a class name means the background; labelme writes _background_."""
    return name.strip("_").casefold() == BACKGROUND
