"""Checks every image and mask of a dataset, counts pixels by class, and converts masks to train ids.

A table converts the values of masks from archives; masks of a folder may have colours, see `palettes.py`. RGB images
become 8-bit PNG if their format is unusual, their PNG has 16 bits, or EXIF rotates them. Images that are not 8-bit RGB,
see `bands.py`, become arrays.

Decoding takes most of the time and runs in threads. Results are kept in a scratch folder, from which an interrupted
preparation continues.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from segjax.data import bands, codec, palettes, scaling, specs
from segjax.data.contents import Contents, hash_of, json_name
from segjax.data.palettes import MaskColors, Palette
from segjax.data.sources import DataError, Example, Examples, File, Problems, file_of, listed
from segjax.runtime import atomic, console, reading

THREADS = min(8, os.cpu_count() or 1)  # OpenCV decodes outside the interpreter's lock
_UNREADABLE = "files that are not complete images; copy or export them again"
_OTHER_SIZE = "masks of another size (height x width) than their image"
_UNKNOWN_SCALE = (
    "16-bit images whose values of black and white are unknown; write them with 8 bits, or so that 65535 is white"
)
_OTHER_LAYOUT = "images with an unsupported shape or dtype"
_OTHER_MASKS = (
    "TIFF or .npy masks that are not one integer from 0 to 65535 for each pixel; write the class ids as uint8 or "
    "uint16, (H, W), and the ignore value where there is none"
)
_STRANGE = (
    "images with values that are NaN or infinite; give these pixels a number, such as 0, and the ignore value in their "
    "masks where there is no data"
)
# Share of all pixels from which on the ignore value is suspected to mean a class.
_MANY_IGNORED = 0.001


# Effect of EXIF data on an image: none; used as stored, or upright, by the size of its mask; or the mask fits either
# way.
Rotation = Literal["none", "stored", "upright", "either"]


class _Colors(TypedDict):
    """See `MaskColors`."""

    listed: list[Annotated[list[int], Field(min_length=4, max_length=4)]]
    others: Annotated[list[int], Field(min_length=2, max_length=2)]
    indices: list[int]


class _Line(TypedDict):
    """A line of checked.jsonl; see `Measured`."""

    split: str
    name: str
    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    values: list[Annotated[list[int], Field(min_length=2, max_length=2)]]
    hashes: Annotated[list[str | None], Field(min_length=2, max_length=2)]
    colors: _Colors | None
    is_stored: bool
    rotation: Rotation
    channels: int
    dtype: str
    moments: list[Annotated[list[float], Field(min_length=2, max_length=2)]]
    is_grey: bool


class Scratch:
    """A folder next to the dataset during its preparation; created when the first file is written.

    It contains the train ids of each mask, as <split>/<name>.png, and checked.jsonl, with a line per valid example.
    """

    def __init__(self, path: Path):
        self.path = path
        self._made: list[Path] = []

    def make(self) -> Path:
        if not self.path.is_dir():
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        return self.path

    def remove(self) -> None:
        """Removes the folder, and the empty folders above it that were created for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        for path in self._made[1:]:
            with contextlib.suppress(OSError):
                path.rmdir()

    def mask(self, split: str, name: str) -> Path:
        return self.path / split / f"{name}.png"

    def checked(self) -> dict[tuple[str, str], Measured]:
        """(split, name) -> measurement, for the examples that earlier attempts found valid."""
        path, found = self.path / "checked.jsonl", {}
        if not path.exists():
            return found
        for line in reading.read_bytes(path).splitlines():
            # A killed process may leave a truncated last line; the example of an invalid line is checked again.
            with contextlib.suppress(reading.UnreadableError):
                entry = reading.parse_json(line, _Line, name=path)
                colors = entry["colors"] and MaskColors(**{key: _tuples(of) for key, of in entry["colors"].items()})
                found[entry["split"], entry["name"]] = Measured(
                    _tuples(entry["size"]),
                    _tuples(entry["values"]),
                    _tuples(entry["hashes"]),
                    colors,
                    entry["is_stored"],
                    entry["rotation"],
                    entry["channels"],
                    entry["dtype"],
                    _tuples(entry["moments"]),
                    entry["is_grey"],
                )
        return found

    @contextlib.contextmanager
    def journal(self) -> Iterator:
        """Yields a function (split, name, measured) that records a valid example."""
        path = self.make() / "checked.jsonl"
        cut = path.exists() and not reading.read_bytes(path).endswith(b"\n")
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" * cut)

                def write(split: str, name: str, measured: Measured) -> None:
                    file.write(json.dumps({"split": split, "name": name, **dataclasses.asdict(measured)}) + "\n")
                    file.flush()  # a killed process loses its buffer

                yield write
        except OSError as error:
            # An error of a full disk has no file name; errors of other files have one.
            raise OSError(error.errno, error.strerror, error.filename or os.fspath(path)) from error


def _tuples(value: Any) -> Any:
    """Nested lists of JSON as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of one example.

    Attributes:
      size: Height and width in pixels; zeros if the image does not decode.
      values: (mask value, number of pixels) pairs; empty for an RGB mask, and if no mask decodes.
      hashes: Hashes of image and mask; None for a mask that is not published.
      colors: Colours of a mask that is RGB or has a palette.
      is_stored: Whether the mask is stored unchanged if its values are labels.
      rotation: Effect of EXIF data on the image.
      channels, dtype: Channels and dtype of the image as stored; 0 and "" if it does not decode.
      moments: Moments of each channel, see `bands.moments`.
      is_grey: Whether the image is a grey PNG or JPEG.
    """

    size: tuple[int, int]
    values: tuple[tuple[int, int], ...]
    hashes: tuple[str, str | None]
    colors: MaskColors | None = None
    is_stored: bool = False
    rotation: Rotation = "none"
    channels: int = 0
    dtype: str = ""
    moments: tuple[tuple[float, float], ...] = ()
    is_grey: bool = False

    @property
    def kind(self) -> specs.ImageKind:
        return specs.ImageKind(self.channels, self.dtype)


class Classes(NamedTuple):
    """Entries of a folder's classes.json in addition to the spec.

    Attributes:
      absent: Names of classes that no image shows.
      palettes: Palettes that masks may have, see `palettes.palettes_for`.
      has_colors: Whether the file has the colours of the classes, which then are the first palette.
      channels: Number of channels of the images; None for three in PNG, JPEG, WebP, BMP and GIF, and for all of TIFF
        and .npy.
    """

    absent: tuple[str, ...] = ()
    palettes: tuple[Palette, ...] = ()
    has_colors: bool = False
    channels: int | None = None


class Converted(NamedTuple):
    """Result of `convert`.

    Attributes:
      examples: Examples with the files to store, by split.
      measured: Measurements, in the order of the examples, by split.
      pixels: Number of pixels of each label value, in the order of `spec.label_names`, by labelled split.
      kind: Channels and dtype of all images.
    """

    examples: Examples
    measured: dict[str, list[Measured]]
    pixels: dict[str, list[int]]
    kind: specs.ImageKind


def convert(
    examples: Examples,
    spec: specs.DatasetSpec | None,
    train_ids: np.ndarray | None,
    scratch: Scratch,
    problems: Problems,
    classes: Classes,
) -> Converted:
    """Decodes every file and adds all errors to `problems`.

    Args:
      examples: Examples by split.
      spec: Spec of the dataset. None if it could not be read, which `problems` lists already; label values are not
        checked then.
      train_ids: Train id of each mask value, int16 (256,), see `archives.Reader`. None for masks of a folder, which
        have colours or train ids; train ids are stored unchanged, except that 0 and 255 of a binary problem become 0
        and 1.
      scratch: Folder for results.
      problems: Receives all errors.
      classes: Further entries of a folder's classes.json.
    """
    earlier = scratch.checked()
    total = sum(map(len, examples.values()))
    if taken := sum((split, example.name) in earlier for split, found in examples.items() for example in found):
        console.say(f"Taking over {taken} of {total} images that an interrupted preparation checked")

    def check(split: str, example: Example) -> tuple[Measured, list[tuple[str, str]]]:
        target = scratch.mask(split, example.name)
        known = earlier.get((split, example.name))
        if known and (train_ids is None or _is_whole(target)):
            return known, []
        measured, labels, faults = _check(example, spec, train_ids, classes)
        if train_ids is not None and labels is not None and not faults:
            with atomic.replacing_file(target, durable=False) as temporary:
                temporary.write_bytes(codec.encode_mask(labels))
        return measured, faults

    measured: dict[str, list[Measured]] = {}
    with scratch.journal() as note:
        for split, found in examples.items():
            measured[split] = []
            with contextlib.closing(in_threads(functools.partial(check, split), found)) as results:
                progress = console.ProgressBar(f"checking {split}", len(found), "images")
                for example, (result, faults) in zip(found, progress.over(results), strict=True):
                    measured[split].append(result)
                    for kind, entry in faults:
                        problems[kind].append(entry)
                    if not faults and (split, example.name) not in earlier:
                        note(split, example.name, result)

    pairs = [pair for split, found in examples.items() for pair in zip(found, measured[split], strict=True)]
    _add_rotated(pairs, problems)
    kind = _common_kind(pairs, classes.channels, problems)
    examples = {
        split: [
            _with_stored_image(_unchanged(example, each), each, kind)
            for example, each in zip(found, measured[split], strict=True)
        ]
        for split, found in examples.items()
    }
    if spec is None:
        return Converted(examples, measured, {}, kind)
    if train_ids is not None:
        of_split = {split: _histogram(found, 256) for split, found in measured.items() if _has_labels(examples[split])}
        _add_stray(pairs, train_ids, _kind_of_stray(spec, train_ids, np.zeros(256, np.int64)), problems)
        pixels = {split: _by_label(counts, train_ids, spec).tolist() for split, counts in of_split.items()}
        if not problems:
            examples = {
                split: [
                    dataclasses.replace(example, label=file_of(scratch.mask(split, example.name), example.name))
                    for example in found
                ]
                for split, found in examples.items()
            }
        return Converted(examples, measured, pixels, kind)
    examples, pixels = _convert_folder(examples, measured, spec, classes, problems)
    return Converted(examples, measured, pixels, kind)


def _convert_folder(
    examples: Examples,
    measured: dict[str, list[Measured]],
    spec: specs.DatasetSpec,
    classes: Classes,
    problems: Problems,
) -> tuple[Examples, dict[str, list[int]]]:
    """Converts the labels of a folder, for `convert`; returns the examples, and the number of pixels per label."""
    table = _own_ids(spec)
    pairs = [pair for split, found in examples.items() for pair in zip(found, measured[split], strict=True)]
    colored = [(example.label.name, each.colors) for example, each in pairs if example.label and each.colors]
    has_colors = classes.has_colors
    read = palettes.choose(colored, classes.palettes, spec, problems, has_colors=has_colors)

    def palette_of(each: Measured) -> Palette | None:
        """The palette by which a mask is read; None if its values are labels."""
        return each.colors and (read.indexed if each.colors.indices else read.rgb)

    def of_values(found: Iterable[Measured]) -> list[Measured]:
        return [each for each in found if not palette_of(each)]

    totals = _histogram(of_values(each for _, each in pairs), len(table))
    has_indices = any(colors.indices for _, colors in colored) and read.indexed is None
    is_binary = len(spec.label_names) == 2 and np.flatnonzero(totals).tolist() == [0, 255] and not has_indices
    if is_binary:
        table = np.full(len(table), -1, np.int32)
        table[[0, 255]] = 0, 1
    of_pairs = [(example, each) for example, each in pairs if not palette_of(each)]
    _add_stray(of_pairs, table, _kind_of_stray(spec, None, totals), problems)
    pixels = {}
    for split, found in measured.items():
        counts = _by_label(_histogram(of_values(found), len(table)), table, spec)
        for each in found:
            if each.colors and (palette := palette_of(each)):
                for label, number in each.colors.counts(palette):
                    counts[label : label + 1] += number
        pixels[split] = counts.tolist()
    if not problems:
        _add_mixed(spec, of_pairs, problems)
        _add_absent(spec, totals, _by_label(totals, table, spec), pixels, classes.absent, problems)
    if problems:
        return examples, pixels
    _say_how(spec, [each for _, each in pairs], read, is_binary=is_binary)

    def labels_of(mask: codec.StoredMask, palette: Palette | None) -> np.ndarray:
        if palette and mask.palette is not None:
            used = np.unique(mask.values)
            of_index = np.zeros(256, np.uint16)
            of_index[used] = palette.of(palettes.packed(mask.palette[used]))
            return of_index[mask.values]
        if palette:
            return palette.of(palettes.packed(mask.values))
        return (mask.values == 255) if is_binary else mask.values

    def converted(example: Example, each: Measured) -> Example:
        if not example.label or (each.is_stored and not is_binary):
            return example
        to_labels = functools.partial(labels_of, palette=palette_of(each))
        return dataclasses.replace(example, label=_as_labels(example.label, to_labels, spec.label_dtype))

    examples = {
        split: [converted(example, each) for example, each in zip(found, measured[split], strict=True)]
        for split, found in examples.items()
    }
    return examples, pixels


def _say_how(spec: specs.DatasetSpec, found: list[Measured], read: palettes.Reading, *, is_binary: bool) -> None:
    """Prints the decisions about the masks and images of a folder."""
    if is_binary:
        zero, one = spec.label_names
        console.say(f"masks of 0 and 255 are read as 0, {zero}, and 1, {one}; none of their pixels is ignored")
    for kind, palette, has_indices in (("RGB", read.rgb, False), ("palette", read.indexed, True)):
        number = sum(each.colors is not None and bool(each.colors.indices) == has_indices for each in found)
        if number:
            how = f"colours, by {palette.name}" if palette else "indices, which are class ids"
            console.say(f"{number} {kind} masks are read by their {how}")
    if all(each.is_grey and each.channels == 3 for each in found):
        console.say('images are grey and become RGB; "channels": 1 in classes.json keeps their one channel')
    kinds = collections.Counter(each.rotation for each in found)
    if rotated := sum(kinds.values()) - kinds["none"]:
        console.say(
            f"EXIF rotates {rotated} images: {kinds['upright'] + kinds['either']} are used upright, of which "
            f"{kinds['either']} have masks that would fit either way, and {kinds['stored']} as they are stored, by the "
            "size of their masks"
        )


def _has_labels(found: list[Example]) -> bool:
    return all(example.label for example in found)


def _unchanged(example: Example, measured: Measured) -> Example:
    """An example whose files, when read again, raise DataError if they differ from the checked ones."""

    def read(file: File, expected: str) -> bytes:
        data = file.read()
        if hash_of(data) != expected:
            name = console.one_line(file.name)
            raise DataError(f"{name} was changed while the dataset was prepared; run the same command again")
        return data

    def checked(file: File, expected: str | None) -> File:
        return file if expected is None else dataclasses.replace(file, read=functools.partial(read, file, expected))

    of_image, of_label = measured.hashes
    label = example.label and checked(example.label, of_label)
    return dataclasses.replace(example, image=checked(example.image, of_image), label=label)


def _histogram(found: Iterable[Measured], size: int) -> np.ndarray:
    """Number of pixels of each mask value, int64 (size,)."""
    counts = np.zeros(size, np.int64)
    for each in found:
        for value, count in each.values:
            counts[value] += count
    return counts


def _by_label(counts: np.ndarray, table: np.ndarray, spec: specs.DatasetSpec) -> np.ndarray:
    """Number of pixels of each label value, from that of each mask value."""
    found = np.zeros(len(table), np.int64)
    known = table >= 0
    np.add.at(found, table[known], counts[known])
    return found[: len(spec.label_names)]


def _add_stray(pairs: Sequence[tuple[Example, Measured]], table: np.ndarray, kind: str, problems: Problems) -> None:
    """Adds masks with values that are not labels as problems of this kind."""
    for example, each in pairs:
        if example.label and (stray := [(value, count) for value, count in each.values if table[value] < 0]):
            entries = [f"{value} ({count} pixels)" for value, count in stray]
            problems[kind].append(f"{example.label.name}: {listed(entries)}")


def _add_rotated(pairs: Sequence[tuple[Example, Measured]], problems: Problems) -> None:
    """Adds images that EXIF rotates, if their masks fit either way and other masks fit images only as stored."""
    if any(each.rotation == "stored" for _, each in pairs):
        kind = (
            "images that EXIF rotates, with masks that would fit either way, while other masks fit only images as they "
            "are stored; save these images without EXIF, rotated as their masks are"
        )
        if found := [example.image.name for example, each in pairs if each.rotation == "either"]:
            problems[kind] += found


def _add_mixed(spec: specs.DatasetSpec, pairs: Sequence[tuple[Example, Measured]], problems: Problems) -> None:
    """Adds masks of 0 and 255 in a binary problem, if others have 0 and 1: 255 may mean the class in some."""
    ignore, found = spec.ignore_label, []
    if len(spec.label_names) != 2 or ignore != 255:
        return
    values = {example.label.name: {value for value, _ in each.values} for example, each in pairs if example.label}
    if any({1, 255} <= of for of in values.values()) or not any(1 in of for of in values.values()):
        return
    if found := [name for name, of in values.items() if of == {0, 255}]:
        problems[
            "masks of 0 and 255, while others have 0 and 1, and none has 1 and 255; if 255 is the class in them, write "
            '1 instead; if it is ignored, write another value instead, such as 254, also as "ignore" in classes.json'
        ] += found


def _add_absent(
    spec: specs.DatasetSpec,
    totals: np.ndarray,
    of_values: np.ndarray,
    pixels: dict[str, list[int]],
    known: Collection[str],
    problems: Problems,
) -> None:
    """Adds classes without a pixel if many pixels have the ignore value, which then probably means one of them.

    Args:
      spec: Spec of the dataset.
      totals: Number of pixels of each value, in the masks that are not read by colour.
      of_values: Number of labelled pixels of each label, in the same masks.
      pixels: Number of labelled pixels of each label in all masks, by split.
      known: Names of classes that no image shows, from classes.json.
      problems: Receives the classes.
    """
    if spec.label_dtype is np.uint16:
        # Hardly any data set with so many classes shows all of them, and 65535 is not used as an id.
        return
    by_label = np.sum(list(pixels.values()), axis=0)
    absent = [f"{number}, {name}" for number, name in enumerate(spec.label_names) if not by_label[number]]
    absent = [entry for entry in absent if entry.partition(", ")[2] not in known]
    share = (totals.sum() - of_values.sum()) / max(totals.sum(), 1)
    if not absent or share < _MANY_IGNORED:
        return
    names = json.dumps([*known, *(entry.partition(", ")[2] for entry in absent)], ensure_ascii=False)
    problems[
        f"classes without a single pixel, while {share:.1%} of all pixels have the ignore value {spec.ignore_label} "
        f"(the masks have the values {_ranges(np.flatnonzero(totals))}). If it stands for one of these classes, give "
        f"those pixels the id of the class{_hint(spec, totals)}. If no image shows these classes, add "
        f'"absent": {names} to classes.json'
    ] += absent


def _ranges(values: np.ndarray) -> str:
    """Ascending numbers as text: "0..2, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs if len(run))


def _hint(spec: specs.DatasetSpec, totals: np.ndarray) -> str:
    """The probable meaning of the mask values, as the end of a sentence; "" if there is none."""
    values, number = np.flatnonzero(totals), len(spec.label_names)
    if values.tolist() == list(range(1, number + 1)):
        return "; the values seem to begin at 1: subtract 1"
    if values.tolist() == list(range(number + 1)) and number != spec.ignore_label:
        return f"; if 0 is not a class, but ids begin at 1, subtract 1 and give 0 the ignore value {spec.ignore_label}"
    if 1 < len(values) <= number and values[0] == 0 and values[-1] == 255 and np.ptp(np.diff(values)) <= 1:
        ids = ", ".join(f"{value} to {number}" for number, value in enumerate(values))
        return f"; ids seem to be spread over grey levels: change {ids}"
    return ""


def _as_labels(file: File, labels_of: Callable[[codec.StoredMask], np.ndarray], dtype: type[np.generic]) -> File:
    """A mask as a PNG of its labels."""

    def read() -> bytes:
        mask = _decoded_mask(file.read())
        if mask is None:
            raise OSError(f"{file.name} was changed while it was read")
        return codec.encode_mask(labels_of(mask).astype(dtype))

    return dataclasses.replace(file, read=read)


def _common_kind(
    pairs: Sequence[tuple[Example, Measured]], channels: int | None, problems: Problems
) -> specs.ImageKind:
    """Channels and dtype of all images. If they differ, which is a problem, 8-bit RGB.

    Args:
      pairs: Examples and their measurements.
      channels: Number of channels in classes.json.
      problems: Receives the kinds if they differ.
    """
    by_kind: dict[specs.ImageKind, list[str]] = {}
    for example, each in pairs:
        if each.channels:
            by_kind.setdefault(each.kind, []).append(example.image.name)
    counted = {kind: f"{kind}: {len(names):,}, such as {names[0]}" for kind, names in by_kind.items()}
    if len(by_kind) > 1:
        problems[
            "images with different numbers of channels, or of different dtypes; a data set has one kind, so convert or "
            'remove the others. PNG and JPEG become RGB unless classes.json has "channels": 1, which grey ones need '
            "next to TIFF and .npy of one channel"
        ] += [counted[kind] for kind in sorted(by_kind, key=lambda kind: -len(by_kind[kind]))]
        return specs.RGB
    kind = next(iter(by_kind), specs.RGB)
    if channels not in (None, kind.channels) and by_kind:
        problems[f'images with other channels than classes.json states, "channels": {channels}; correct it'].append(
            counted[kind]
        )
    return kind


def _with_stored_image(example: Example, measured: Measured, kind: specs.ImageKind) -> Example:
    """The example with its image as stored: a JPEG or 8-bit PNG that is aligned with the mask, or an array."""
    image, upright = example.image, measured.rotation in ("upright", "either")
    if not kind.is_rgb:
        array = _ArrayFile(image.name, image.size, lambda: bands.to_npy(_bands(image.read(), kind.channels)))
        return dataclasses.replace(example, image=array)
    return dataclasses.replace(
        example, image=dataclasses.replace(image, read=lambda: _stored(image.read(), upright=upright))
    )


class _ArrayFile(File):
    """A file whose content is a .npy, and which NumPy reads as an array."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return bands.of_npy(self.read())


def _bands(data: bytes, channels: int | None) -> np.ndarray:
    """An image by `bands.decode`; grey is repeated if three channels are requested."""
    image = bands.decode(data)
    return np.repeat(image, 3, axis=2) if channels == 3 and image.shape[2] == 1 else image


def _stored(data: bytes, *, upright: bool) -> bytes:
    """The content of an image file: unchanged, or as PNG if readers of records cannot use it as it is.

    The latter are formats other than PNG and JPEG, such as the GIFs among Oxford's pets; 16 bits; and images to rotate.
    """
    is_usual = codec.format_of(data[:32]) == "JPEG" or (data.startswith(codec.PNG) and data[24] <= 8)
    if is_usual and not upright:
        return data
    image = _decoded(data, upright=upright)
    if image is None:
        raise OSError("an image was changed while it was read")
    return codec.encode_image(image)


def _has_bands(data: bytes) -> bool:
    """Whether the format of a file allows any number of channels."""
    return codec.format_of(data[:32]) in ("TIFF", "NPY")


def _decoded(data: bytes, *, upright: bool = False) -> np.ndarray | None:
    """Decodes an image to RGB, uint8 (H, W, 3), see `codec.decode_undamaged`; TIFF and .npy in their own dtype."""
    if _has_bands(data):
        return _bands(data, 3)
    image = codec.decode_undamaged(data, upright=upright)
    return image if image is None else scaling.as_uint8(image, None, 255 if image.dtype == np.uint8 else None)


def _decoded_mask(data: bytes) -> codec.StoredMask | None:
    """Decodes a mask of a folder; None if it cannot be decoded."""
    return bands.decode_mask(data) if _has_bands(data) else codec.decode_stored_mask(data)


def contents_of(examples: Examples) -> Contents:
    """Hashes of all files, in the format of `contents.contents_of`."""

    def hashes(example: Example) -> list[str | None]:
        return [file and hash_of(file.read()) for file in (example.image, example.label)]

    found: Contents = {}
    for split, each in examples.items():
        with contextlib.closing(in_threads(hashes, each)) as results:
            progress = console.ProgressBar(f"comparing {split}", len(each), "images")
            names = [json_name(example.name) for example in each]
            found[split] = dict(zip(names, progress.over(results), strict=True))
    return found


def in_threads(function: Callable, items: Iterable) -> Generator:
    """Yields `function(item)` in the order of the items. Closing the generator cancels calls that have not begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _is_whole(path: Path) -> bool:
    return path.is_file() and codec.damage(path.read_bytes()) is None


def _check(
    example: Example,
    spec: specs.DatasetSpec | None,
    train_ids: np.ndarray | None,
    classes: Classes,
) -> tuple[Measured, np.ndarray | None, list[tuple[str, str]]]:
    """Measurement of one example, its train ids if its mask is converted, and (kind, entry) of each problem."""
    faults: list[tuple[str, str]] = []
    contents: dict[str, bytes] = {}

    def read(
        file: File, fault: Callable[[bytes], str | None], decode: Callable[[bytes], Any], layout: str
    ) -> tuple[Any, str]:
        decoded, found = None, ""
        try:
            data = contents[file.name] = file.read()
            found = hash_of(data)
            # The decoders of TIFF and .npy find damage.
            damage = None if train_ids is None and _has_bands(data) else codec.damage(data)
        except (OSError, reading.UnreadableError) as error:
            data, damage = b"", getattr(error, "strerror", None) or str(error).removeprefix(f"{file.name}: ")
        if not damage and (kind := fault(data)):
            faults.append((kind, file.name))
            return None, found
        try:
            decoded = None if damage else decode(data)
        except scaling.UnknownScaleError as error:
            faults.append((_UNKNOWN_SCALE, f"{file.name}: {error}"))
            return None, found
        except codec.LayoutError as error:
            faults.append((layout, f"{file.name}: {error}"))
            return None, found
        except codec.ImageError as error:
            damage = str(error).replace(codec.HIGHER_LIMIT, "; cut it up")
        if decoded is None:
            faults.append((_UNREADABLE, f"{file.name}: {damage or 'does not decode'}"))
        return decoded, found

    def decode_published(data: bytes) -> np.ndarray | None:
        # Published archives have damaged images, which are accepted: Oxford-IIIT Pet has two.
        return codec.decode_image(data) if codec.format_of(data[:32]) == "JPEG" else _decoded(data)

    def decode_own(data: bytes) -> np.ndarray | None:
        return _bands(data, classes.channels) if classes.channels == 1 or _has_bands(data) else _decoded(data)

    decode_image = decode_own if train_ids is None else decode_published
    image, hash_of_image = read(example.image, codec.fault_of_image, decode_image, _OTHER_LAYOUT)
    size = (0, 0) if image is None else image.shape[:2]
    of_image: dict[str, Any] = {}
    if image is not None:
        if strange := bands.strange_values(image):
            faults.append((_STRANGE, f"{example.image.name}: {strange}"))
        else:
            of_image = {"channels": image.shape[2], "dtype": image.dtype.name, "moments": bands.moments(image)}
            of_image["is_grey"] = codec.is_grey(contents[example.image.name])
    if example.label is None:
        # A mask of ignored pixels, because readers expect a mask.
        ignored = np.full(size, spec.ignore_label if spec else 255, np.uint8)
        return Measured(size, (), (hash_of_image, None), **of_image), ignored, faults
    if train_ids is None:
        wide, binary = (spec.label_dtype is np.uint16, len(spec.label_names) == 2) if spec else (True, True)
        fault_of_mask = functools.partial(codec.fault_of_mask, wide=wide, binary=binary)
        mask, hash_of_mask = read(example.label, fault_of_mask, _decoded_mask, _OTHER_MASKS)
    else:
        values, hash_of_mask = read(example.label, codec.fault_of_published_mask, codec.decode_mask, _OTHER_MASKS)
        mask = None if values is None else codec.StoredMask(values, None)
    rotation: Rotation = "none"
    if image is not None and mask is not None:
        # Masks from archives are aligned with the stored images, without EXIF rotation.
        if train_ids is None:
            data = contents[example.image.name]
            if not _has_bands(data) and classes.channels != 1:
                rotation, size = _rotation(data, image, mask.values.shape[:2])
        if size != mask.values.shape[:2]:
            height, width = mask.values.shape[:2]
            hint = "; the array seems to be (C, H, W)" * (image.shape[1:] == (height, width))
            other = f"{example.label.name} is {height} x {width}, its image {size[0]} x {size[1]}{hint}"
            faults.append((_OTHER_SIZE, other))
    measured = Measured(size, (), (hash_of_image, hash_of_mask), rotation=rotation, **of_image)
    if mask is None:
        return measured, None, faults
    if mask.values.ndim == 3 or mask.palette is not None:
        measured = dataclasses.replace(measured, colors=palettes.colors_of(mask, classes.palettes))
    if mask.values.ndim == 2:
        pixels = np.bincount(mask.values.ravel())
        values = tuple((value, int(pixels[value])) for value in np.flatnonzero(pixels).tolist())
        measured = dataclasses.replace(measured, values=values)
    if train_ids is not None:
        return measured, train_ids.astype(np.uint8)[mask.values], faults
    data = contents[example.label.name]
    depth = np.dtype(spec.label_dtype).itemsize * 8 if spec else 8
    is_stored = data.startswith(codec.PNG) and (data[24], data[25]) == (depth, 0)
    return dataclasses.replace(measured, is_stored=is_stored), None, faults


def _rotation(data: bytes, stored: np.ndarray, size: tuple[int, ...]) -> tuple[Rotation, tuple[int, int]]:
    """Effect of EXIF data on an image, and the size of the image as it is used.

    Args:
      data: Content of the image file.
      stored: The image as stored, (H, W, 3).
      size: (height, width) of its mask.
    """
    as_stored: tuple[int, int] = stored.shape[:2]
    turned = _decoded(data, upright=True) if codec.has_exif(data) else None
    if turned is None or np.array_equal(turned, stored):
        return "none", as_stored
    upright: tuple[int, int] = turned.shape[:2]
    if as_stored == upright:
        return "either", upright
    return ("stored", as_stored) if as_stored == size else ("upright", upright)


def _own_ids(spec: specs.DatasetSpec) -> np.ndarray:
    """Table like `train_ids`, int32 (65536,), for masks of train ids, which may have 16 bits."""
    table = np.full(specs.LARGEST_LABEL + 1, -1, np.int32)
    values = [*range(len(spec.label_names)), spec.ignore_label]
    table[values] = values
    return table


def _kind_of_stray(spec: specs.DatasetSpec, train_ids: np.ndarray | None, totals: np.ndarray) -> str:
    """Kind of problem for invalid mask values; totals: number of pixels of each value in all masks."""
    if train_ids is None:
        return (
            f"mask values that are neither a class (0..{len(spec.label_names) - 1}) nor the ignore value "
            f'({spec.ignore_label}); correct the masks, or "names" and "ignore" in classes.json{_hint(spec, totals)}'
        )
    values = np.flatnonzero(train_ids[:255] >= 0)
    also = " and 255" if train_ids[255] >= 0 else ""
    return (
        f"mask values that {spec.name} does not have (it has {values.min()}..{values.max()}{also}); fetch the archive "
        "with the published masks"
    )
