"""Reads a folder of images and masks in segjax's own layout, and finds everything that is wrong with it.

    images/<split>/<stem>.jpg   or .png, .webp, .bmp, .gif: RGB; grey is repeated, alpha is dropped. Or .tif with all
                                bands, or .npy with an array (H, W, C) or (H, W): uint8, uint16 or float32
    labels/<split>/<stem>.png   or .bmp, .tif with one band, .npy (H, W): integers, for each pixel a train id (0..K-1; 0
                                and 1 for a single class) or the ignore value. Or a palette, or RGB in PNG and BMP, in
                                the colours of the classes
    classes.json                {"names": [K strings]}, and optionally "colors": [K times [r, g, b]], "ignore": 255,
                                "ignore_colors": [any number of [r, g, b]], "name": "...", "absent": [names of classes
                                that no image shows], "channels": number of channels; 1 keeps grey PNG and JPEG grey

Without folders of splits, all images belong to the split train. The content of a file counts, not its suffix. This
module does not write. Problems are collected by kind, and each kind states its remedy, so that one report lists all.
"""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from segjax.data import codec, masks, palettes, specs
from segjax.data.sources import NOT_REGULAR, Example, Examples, Problems, digest_of, file_of, kind_of, listed
from segjax.runtime import reading

LAYOUT = (
    "images/<split>/x.jpg (or .png), labels/<split>/x.png (grey, one class id per pixel, or the colours of the "
    'classes) and classes.json ("names", "colors", "ignore")'
)

_CLASSES = (  # a kind of problem, with its remedy
    'classes.json, which needs "names" (K different strings), and may have "colors" (K of [r, g, b], 0..255), "ignore" '
    "(the mask value of ignored pixels, at least K; 255 by default, 65535 for more than 255 classes), "
    '"ignore_colors" (the colours [r, g, b] of ignored pixels), "name" (a string), "absent" (names '
    'of classes that no image shows) and "channels" (of the images; 1 for grey ones)'
)
LARGEST_CHANNELS = 65_536
# Suffixes of files that are opened only when they are decoded; the format of other files is checked before.
_USUAL = {"images": (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".npy"), "labels": (".png", ".tif", ".tiff", ".npy")}
_KEYS = ("name", "names", "colors", "ignore", "ignore_colors", "absent", "channels")


def read_classes(root: Path, problems: Problems) -> tuple[specs.DatasetSpec | None, masks.Classes]:
    """Reads classes.json. Without "colors", the colours are those of a known palette with these classes, or chosen.

    Returns:
      The spec, and the other entries. If the file cannot be used, the spec is None, and `problems` has the reasons.
    """
    content, path = {}, root / "classes.json"
    try:
        optional = {"name": root.name, "absent": [], "ignore_colors": []}
        content = dict.fromkeys(_KEYS) | optional | reading.read_json(path, most=1 << 20)
        if content["ignore"] is None and isinstance(content["names"], list):
            content["ignore"] = specs.default_ignore_label(len(content["names"]))
        faults = list(_faults_of_classes(**{key: content[key] for key in _KEYS}))
    except OSError as error:
        faults = [f"cannot be read: {error.strerror}"]
    except reading.UnreadableError as error:
        faults = [str(error).removeprefix(f"{path}: ")]
    if faults:
        problems[_CLASSES] += faults
        return None, masks.Classes()
    names, given = content["names"], content["colors"]
    colors = given or palettes.known_colors(names) or specs.distinct_colors(len(names))
    colors = tuple((red, green, blue) for red, green, blue in colors)
    spec = specs.DatasetSpec(content["name"], tuple(names), colors, content["ignore"])
    has_colors, ignored = given is not None, map(tuple, content["ignore_colors"])
    of_masks = palettes.palettes_for(spec, has_colors=has_colors, ignored=ignored)
    return spec, masks.Classes(tuple(content["absent"]), tuple(of_masks), has_colors, content["channels"])


def _faults_of_classes(name, names, colors, ignore, ignore_colors, absent, channels) -> Iterator[str]:
    def is_color(value):
        # isinstance would accept true and false.
        return isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)

    if not (isinstance(name, str) and name.strip()):
        yield f'"name" is not a string: {name!r:.80}'
    if not (isinstance(names, list) and names and all(isinstance(n, str) and n.strip() for n in names)):
        yield f'"names" is missing or not a list of strings: {names!r:.80}'
        names = []
    if repeated := [n for n, times in collections.Counter(names).items() if times > 1]:
        yield f'"names" repeats {listed(repeated)}'
    for key, value in (("colors", colors), ("ignore_colors", ignore_colors)):
        if value is None:
            continue
        if not isinstance(value, list):
            yield f'"{key}" is not a list: {value!r:.80}'
        elif wrong := [color for color in value if not is_color(color)]:
            yield f'"{key}" has entries that are not [r, g, b] in 0..255: {listed(wrong)}'
    if isinstance(colors, list) and names and len(names) != len(colors):
        yield f'{len(names)} "names" but {len(colors)} "colors"'
    both = isinstance(colors, list) and isinstance(ignore_colors, list)
    if both and (shared := [color for color in ignore_colors if color in colors]):
        yield f'"ignore_colors" has colours of classes: {listed(shared)}'
    if not (type(ignore) is int and 0 <= ignore <= specs.LARGEST_LABEL):
        yield f'"ignore" is not an integer in 0..{specs.LARGEST_LABEL}: {ignore!r:.80}'
    elif ignore < max(len(names), 2):
        # With a single class, the labels are 0 (background) and 1.
        meaning = repr(names[ignore]) if len(names) > 1 else "'background' or the one class"
        yield (
            f'"ignore" is {ignore}, which is also the id of class {meaning}; give ignored pixels another value in the '
            f"masks, such as {specs.default_ignore_label(len(names))}; if they have 0 because ids begin at 1, subtract "
            f"1 from all, and 0 becomes {specs.default_ignore_label(len(names))}"
        )
    if not isinstance(absent, list) or any(name not in names for name in absent):
        yield f'"absent" is not a list of some of "names": {absent!r:.80}'
    if channels is not None and not (type(channels) is int and 1 <= channels <= LARGEST_CHANNELS):
        yield f'"channels" is not a number from 1 to {LARGEST_CHANNELS}: {channels!r:.80}'


def find_examples(root: Path, problems: Problems, notes: list[str]) -> Examples:
    """Pairs images with their masks, in the order of their stems in composed Unicode (NFC).

    Args:
      root: Path of the folder.
      problems: Receives everything that is wrong.
      notes: Receives lines about hidden files, which are skipped, and names in different Unicode forms.
    """
    found: dict[str, dict[str, dict[str, Path]]] = {"images": {}, "labels": {}}
    hidden: list[str] = []
    is_flat = all(_has_only_files(root / part) for part in found)
    if is_flat:
        notes.append("images/ and labels/ have no folders of splits, so all images belong to the split train")
    for part in found:
        if is_flat:
            found[part]["train"] = _by_stem(root, part, part, problems, hidden)
            continue
        for directory in _visible(root, part, hidden):
            where = f"{part}/{directory.name}"
            if not directory.is_dir():
                if directory.is_file():
                    problems["files next to the directories of the splits; move them into one"].append(where)
                else:
                    problems[NOT_REGULAR].append(f"{where}: {kind_of(directory)}")
                continue
            if not re.fullmatch(r"[A-Za-z0-9_]+", directory.name) or directory.name.lower() == "all":
                problems["splits TFDS cannot name; use letters, digits and _, and not 'all'"].append(where)
            found[part][directory.name] = _by_stem(root, where, part, problems, hidden)
            if not found[part][directory.name]:
                problems["directories without a usable file"].append(where)
        if not found[part]:
            problems[f"directories missing, or without a split in them; needed are {LAYOUT}"].append(part)
    if not (found["images"] and found["labels"]) and (hint := _other_place(root)):
        problems["the data lie elsewhere"].append(hint)
    if hidden:
        notes.append(f"hidden files, which are skipped: {len(hidden)}, such as {hidden[0]}")
    examples: Examples = {}
    renamed = []
    for split in sorted({*found["images"], *found["labels"]}):
        images, masks = (found[part].get(split) for part in ("images", "labels"))
        if images is None or masks is None:
            has, lacks = ("labels", "images") if images is None else ("images", "labels")
            problems["splits with only images or only labels"].append(f"{has}/{split} without {lacks}/{split}")
            continue
        examples[split] = [
            Example(stem, *(file_of(path, path.relative_to(root).as_posix()) for path in (images[stem], masks[stem])))
            for stem in sorted(images.keys() & masks.keys())
        ]
        common = sorted(images.keys() & masks.keys())
        renamed += [f"{split}/{stem}" for stem in common if images[stem].stem != masks[stem].stem]
        for kind, own, others, part in (
            ("images without a mask", images, masks, "images"),
            ("masks without an image", masks, images, "labels"),
        ):
            folded = {stem.casefold(): path.name for stem, path in others.items()}
            for stem in sorted(own.keys() - others.keys()):
                close = folded.get(stem.casefold())
                problems[kind].append(f"{part}/{split}/{own[stem].name}" + f"; in other case: {close}" * bool(close))
    if renamed:
        notes.append(
            f"images and masks whose names differ only in the Unicode form of accents: {len(renamed)}, such as "
            f"{renamed[0]}; they belong together"
        )
    return examples


def _has_only_files(place: Path) -> bool:
    """Whether a folder contains files and no folders; hidden entries do not count."""
    inside = [path for path in place.iterdir() if path.name[0] != "."] if place.is_dir() else []
    return bool(inside) and all(path.is_file() for path in inside)


def _by_stem(root: Path, where: str, part: str, problems: Problems, hidden: list[str]) -> dict[str, Path]:
    """Images or masks in a directory, by stem in composed Unicode, because systems encode accents differently."""
    stems: dict[str, Path] = {}
    for path in _visible(root, where, hidden):
        name = f"{where}/{path.name}"
        stem = unicodedata.normalize("NFC", path.stem)
        if path.is_dir():
            problems["folders in the folder of a split; move their files into it"].append(name)
        elif not path.is_file():
            problems[NOT_REGULAR].append(f"{name}: {kind_of(path)}")
        elif path.suffix.lower() not in _USUAL[part] and not _is_image(path):
            formats = "PNG, JPEG, WebP, BMP, GIF, TIFF or .npy" if part == "images" else "PNG, BMP, TIFF or .npy"
            problems[f"files that are not {formats}, by suffix or by content; convert or remove them"].append(name)
        elif stem in stems:
            names = f"{where}/{stems[stem].name} and {path.name}"
            problems["files of one split that differ only in the suffix; rename them"].append(names)
        else:
            stems[stem] = path
    return stems


def _is_image(path: Path) -> bool:
    """Whether a file begins like an image or mask that can be read, whatever its suffix is."""
    with reading.open_regular(path) as file:
        return codec.format_of(file.read(32)) is not None


def _other_place(root: Path) -> str:
    """Hint at a dataset in a nearby folder; "" if there is none, or if `root` is one."""

    def is_dataset(place: Path) -> bool:
        return (place / "images").is_dir() and (place / "labels").is_dir()

    if is_dataset(root):
        return ""
    for above in list(root.parents)[:2]:
        if is_dataset(above):
            return f"{above} has images/ and labels/; give that folder"
    inside = [place for depth in ("*", "*/*") for place in sorted(root.glob(depth)) if is_dataset(place)]
    if len(inside) > 1:
        names = listed([place.relative_to(root).as_posix() for place in inside])
        return (
            f"{names} have images/ and labels/ each; if these are splits, move them to images/<split>, labels/<split>"
        )
    return f"{inside[0]} has images/ and labels/; give that folder" if inside else ""


def _visible(root: Path, where: str, hidden: list[str]) -> list[Path]:
    """Entries of a directory, sorted; hidden ones are added to `hidden` instead."""
    inside = sorted((root / where).iterdir()) if (root / where).is_dir() else []
    hidden += [f"{where}/{path.name}" for path in inside if path.name[0] == "."]
    return [path for path in inside if path.name[0] != "."]


def state_of(root: Path, examples: Examples) -> str:
    """Hash that identifies the present state of a folder, 16 hex digits, independent of the folder's path.

    It covers classes.json, and the relative path, size, modification time and inode of every file. A moved folder
    keeps its state; a copied one is prepared again. An edited file changes the state even if its size is the same, and
    two folders have different states even if an archive set equal times.
    """
    names = (file.name for found in examples.values() for each in found for file in (each.image, each.label) if file)
    classes = reading.read_bytes(root / "classes.json")
    return digest_of(((name, root / name) for name in names), classes, numbers=True)
