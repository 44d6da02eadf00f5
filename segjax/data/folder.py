"""Reader of a folder of images and masks in segjax's own layout, and of everything that is wrong with it.

    images/<split>/<stem>.jpg   or .jpeg, .png; 8 bits a channel; grey is repeated over RGB, alpha is dropped
    labels/<split>/<stem>.png   8-bit grey: one train id (0..K-1; 0 and 1 for a single class) or the ignore value
    classes.json                {"names": [K strings], "colors": [K of [r, g, b]], "ignore": 255, "name": "optional"}

Nothing here writes. Problems are collected by kind, and each kind states its remedy, so that one report lists them all.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path

from segjax.data import specs
from segjax.data.sources import Example, Examples, Problems, digest_of, file_of, listed

LAYOUT = (
    "images/<split>/x.jpg (or .jpeg, .png), labels/<split>/x.png (8-bit grey, one class id per pixel) and classes.json "
    '("names", "colors", "ignore")'
)

_CLASSES = (  # A kind of problem, with its remedy.
    'classes.json, which needs "names" (K different strings), "colors" (K of [r, g, b], 0..255) and "ignore" (the mask '
    'value that is not counted, K..255), and may have "name" (a string)'
)


def read_classes(root: Path, problems: Problems) -> specs.DatasetSpec | None:
    """The classes in classes.json; None, and the reasons in `problems`, if it cannot be used."""
    content = {}
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
        yield f'"names" repeats {listed(repeated)}'
    if not isinstance(colors, list):
        yield f'"colors" is missing or no list: {colors!r:.80}'
    elif wrong := [c for c in colors if not (isinstance(c, list) and len(c) == 3 and all(map(is_byte, c)))]:
        yield f'"colors" has entries that are no [r, g, b] in 0..255: {listed(wrong)}'
    elif names and len(names) != len(colors):
        yield f'{len(names)} "names" but {len(colors)} "colors"'
    if not is_byte(ignore):
        yield f'"ignore" is missing or no integer in 0..255: {ignore!r:.80}'
    elif ignore < max(len(names), 2):
        # A single class has the labels 0, background, and 1.
        meaning = repr(names[ignore]) if len(names) > 1 else "'background' or the one class"
        yield f'"ignore" is {ignore}, which is also the id of class {meaning}'


def find_examples(root: Path, problems: Problems) -> Examples:
    """Images with their masks, in the order of their stems. Hidden files are skipped."""
    found: dict[str, dict[str, dict[str, Path]]] = {"images": {}, "labels": {}}
    for part, suffixes in (("images", (".jpg", ".jpeg", ".png")), ("labels", (".png",))):
        for directory in _visible(root / part):
            where = f"{part}/{directory.name}"
            if not directory.is_dir():
                problems["files next to the directories of the splits; move them into one"].append(where)
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
    examples: Examples = {}
    for split in sorted({*found["images"], *found["labels"]}):
        images, masks = (found[part].get(split) for part in ("images", "labels"))
        if images is None or masks is None:
            has, lacks = ("labels", "images") if images is None else ("images", "labels")
            problems["splits on one side only"].append(f"{has}/{split} without {lacks}/{split}")
            continue
        examples[split] = [
            Example(stem, *(file_of(path, path.relative_to(root).as_posix()) for path in (images[stem], masks[stem])))
            for stem in sorted(images.keys() & masks.keys())
        ]
        for stem in sorted(images.keys() - masks.keys()):
            problems["images without a mask"].append(f"images/{split}/{images[stem].name}")
        for stem in sorted(masks.keys() - images.keys()):
            problems["masks without an image"].append(f"labels/{split}/{masks[stem].name}")
    return examples


def _visible(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name[0] != ".") if directory.is_dir() else []


def state_of(root: Path, examples: Examples) -> str:
    """16 hex digits that identify the present state of a folder.

    They are a hash of the path of the folder, of classes.json, and of the path, size and modification time of every
    file. An edited file changes it even if its size is the same, and two folders differ even if an archive has set
    equal times. A folder that was moved is prepared again, which costs time but is never wrong.
    """
    names = (file.name for found in examples.values() for each in found for file in (each.image, each.label) if file)
    return digest_of(((name, root / name) for name in names), bytes(root), (root / "classes.json").read_bytes())
