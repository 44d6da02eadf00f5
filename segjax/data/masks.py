"""Checks every image and mask of a dataset, counts pixels by class, and converts masks from archives to train ids.

Decoding takes most of the time. It runs in threads, and results are kept in a scratch folder, where a preparation that
was interrupted continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from segjax.data import codec, specs
from segjax.data.contents import Contents, hash_of, json_name
from segjax.data.sources import DataError, Example, Examples, File, Problems, file_of, listed
from segjax.runtime import atomic, console, reading

THREADS = min(8, os.cpu_count() or 1)  # OpenCV decodes outside the interpreter's lock
_UNREADABLE = "files that are no whole JPEG or PNG; copy or export them again"
_OTHER_SIZE = "masks of another size (height x width) than their image"
# Pixels of the largest image, of 0.5 GB when decoded; Pillow has the same limit.
# Share of all pixels above which the ignore value is suspected to stand for a class.
_MANY_IGNORED = 0.001


class _Line(TypedDict):
    """A line of checked.jsonl; see `Measured`."""

    split: str
    name: str
    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    values: list[Annotated[list[int], Field(min_length=2, max_length=2)]]
    hashes: Annotated[list[str | None], Field(min_length=2, max_length=2)]


class Scratch:
    """A folder next to the dataset for the time of its preparation; created when the first file is written to it.

    It contains the train ids of each mask as <split>/<name>.png, and checked.jsonl: a line for each valid example.
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
        """(split, name) -> measurement of the examples that earlier attempts found valid."""
        path, found = self.path / "checked.jsonl", {}
        if not path.exists():
            return found
        for line in reading.read_bytes(path).splitlines():
            # The last line may be cut where the process was killed; an odd one is an example that is checked again.
            with contextlib.suppress(reading.UnreadableError):
                entry = reading.parse_json(line, _Line, name=path)
                values = tuple(map(tuple, entry["values"]))
                measured = Measured(tuple(entry["size"]), values, tuple(entry["hashes"]))
                found[entry["split"], entry["name"]] = measured
        return found

    @contextlib.contextmanager
    def journal(self) -> Iterator:
        """Gives a function (split, name, measured) that records that an example is valid."""
        path = self.make() / "checked.jsonl"
        cut = path.exists() and not reading.read_bytes(path).endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut)

            def write(split: str, name: str, measured: Measured) -> None:
                file.write(json.dumps({"split": split, "name": name, **dataclasses.asdict(measured)}) + "\n")
                file.flush()  # a process that is killed loses its buffer

            yield write


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is found in the files of one example.

    Attributes:
      size: height and width in pixels; zeros where the image does not decode.
      values: mask values, each with the number of its pixels; empty without a mask that decodes.
      hashes: of image and mask; None for a mask that is not published.
    """

    size: tuple[int, int]
    values: tuple[tuple[int, int], ...]
    hashes: tuple[str, str | None]


class Converted(NamedTuple):
    """The examples with the files to be stored; their measurements, in the same order; and of each labelled split the
    number of pixels of each label value, in the order of `spec.label_names`."""

    examples: Examples
    measured: dict[str, list[Measured]]
    pixels: dict[str, list[int]]


def convert(
    examples: Examples,
    spec: specs.DatasetSpec | None,
    train_ids: np.ndarray | None,
    scratch: Scratch,
    problems: Problems,
    absent: Collection[str] = (),
) -> Converted:
    """Decodes every file and adds all errors to `problems`.

    Args:
      spec: None if it could not be read, which is among the problems already; label values are not checked then.
      train_ids: int16 (256,), see `archives.Reader`. None for masks of train ids, which are stored unchanged, except
        that 0 and 255 of a binary problem become 0 and 1.
      absent: classes that are known to have no pixel.
    """
    earlier = scratch.checked()
    total = sum(map(len, examples.values()))
    if taken := sum((split, example.name) in earlier for split, found in examples.items() for example in found):
        console.say(f"Taking over {taken} of {total} images that an interrupted preparation has checked")

    def check(split: str, example: Example) -> tuple[Measured, list[tuple[str, str]]]:
        target = scratch.mask(split, example.name)
        known = earlier.get((split, example.name))
        if known and (train_ids is None or _is_whole(target)):
            return known, []
        measured, labels, faults = _check(example, spec, train_ids)
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

    def converted(split: str, example: Example) -> File:
        if is_binary and example.label:
            return _as_binary(example.label)
        return file_of(scratch.mask(split, example.name), example.name)

    examples = {
        split: [
            _with_stored_image(_unchanged(example, each)) for example, each in zip(found, measured[split], strict=True)
        ]
        for split, found in examples.items()
    }
    if spec is None:
        return Converted(examples, measured, {})
    labelled = {
        split: np.sum([_of_256(()), *(_of_256(each.values) for each in measured[split])], axis=0)
        for split, found in examples.items()
        if all(example.label for example in found)
    }
    totals = np.sum([_of_256(()), *labelled.values()], axis=0)
    table = _own_ids(spec) if train_ids is None else train_ids
    is_binary = train_ids is None and len(spec.label_names) == 2 and np.flatnonzero(totals).tolist() == [0, 255]
    if is_binary:
        table = np.full(256, -1, np.int16)
        table[[0, 255]] = 0, 1
    kind = _kind_of_stray(spec, train_ids, totals)
    for split, found in examples.items():
        for example, each in zip(found, measured[split], strict=True):
            if example.label and (stray := [(value, count) for value, count in each.values if table[value] < 0]):
                entries = [f"{value} ({count} pixels)" for value, count in stray]
                problems[kind].append(f"{example.label.name}: {listed(entries)}")
    pixels = {split: _by_label(of, table, spec).tolist() for split, of in labelled.items()}
    if train_ids is None and not problems:
        _add_mixed(spec, examples, measured, problems)
        _add_absent(spec, totals, _by_label(totals, table, spec), absent, problems)
    if problems:
        return Converted(examples, measured, pixels)
    if is_binary:
        zero, one = spec.label_names
        console.say(f"masks of 0 and 255 are read as 0, {zero}, and 1, {one}; none of their pixels is ignored")
    if train_ids is not None or is_binary:
        examples = {
            split: [dataclasses.replace(example, label=converted(split, example)) for example in found]
            for split, found in examples.items()
        }
    return Converted(examples, measured, pixels)


def _unchanged(example: Example, measured: Measured) -> Example:
    """An example whose files, when they are read again, must be what was checked."""

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


def _of_256(values: Iterable[tuple[int, int]]) -> np.ndarray:
    """int64 (256,), the number of pixels of each mask value."""
    counts = np.zeros(256, np.int64)
    for value, count in values:
        counts[value] += count
    return counts


def _by_label(counts: np.ndarray, table: np.ndarray, spec: specs.DatasetSpec) -> np.ndarray:
    """The number of pixels of each label value, of those of each mask value."""
    found = np.zeros(256, np.int64)
    known = table >= 0
    np.add.at(found, table[known], counts[known])
    return found[: len(spec.label_names)]


def _add_mixed(
    spec: specs.DatasetSpec, examples: Examples, measured: dict[str, list[Measured]], problems: Problems
) -> None:
    """Adds masks of a binary problem that have 0 and 255 next to others of 0 and 1: 255 may be the class in some."""
    ignore, found = spec.ignore_label, []
    if len(spec.label_names) != 2 or ignore != 255:
        return
    values = {
        example.label.name: {value for value, _ in each.values}
        for split, of in examples.items()
        for example, each in zip(of, measured[split], strict=True)
        if example.label
    }
    if any({1, 255} <= of for of in values.values()) or not any(1 in of for of in values.values()):
        return
    if found := [name for name, of in values.items() if of == {0, 255}]:
        problems[
            "masks of 0 and 255, while others have 0 and 1, and none has 1 and 255; if 255 is the class in them, write "
            '1 instead; if it is ignored, write another value instead, such as 254, also as "ignore" in classes.json'
        ] += found


def _add_absent(
    spec: specs.DatasetSpec, totals: np.ndarray, pixels: np.ndarray, known: Collection[str], problems: Problems
) -> None:
    """Adds classes without a pixel, where many pixels have the ignore value: it probably stands for one of them."""
    absent = [f"{number}, {name}" for number, name in enumerate(spec.label_names) if not pixels[number]]
    absent = [entry for entry in absent if entry.partition(", ")[2] not in known]
    share = (totals.sum() - pixels.sum()) / max(totals.sum(), 1)
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
    """Ascending numbers in words: "0..2, 255"."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs if len(run))


def _hint(spec: specs.DatasetSpec, totals: np.ndarray) -> str:
    """What masks with these values probably hold, as the end of a sentence; "" where nothing is likely."""
    values, number = np.flatnonzero(totals), len(spec.label_names)
    if values.tolist() == list(range(1, number + 1)):
        return "; the values seem to begin at 1: subtract 1"
    if values.tolist() == list(range(number + 1)) and number != spec.ignore_label:
        return (
            f"; if 0 is no class, as where ids begin at 1, subtract 1 and give it the ignore value {spec.ignore_label}"
        )
    if 1 < len(values) <= number and values[0] == 0 and values[-1] == 255 and np.ptp(np.diff(values)) <= 1:
        ids = ", ".join(f"{value} to {number}" for number, value in enumerate(values))
        return f"; ids seem to be spread over grey levels: change {ids}"
    return ""


def _as_binary(file: File) -> File:
    """A mask of 0 and 255 as one of 0 and 1."""

    def read() -> bytes:
        mask = codec.decode_mask(file.read())
        if mask is None:
            raise OSError(f"{file.name} was changed while it was read")
        return codec.encode_mask((mask == 255).astype(np.uint8))

    return dataclasses.replace(file, read=read)


def _with_stored_image(example: Example) -> Example:
    """The example with an image that is stored as PNG where it is a GIF."""
    image = example.image
    return dataclasses.replace(example, image=dataclasses.replace(image, read=lambda: _stored(image.read())))


def _stored(data: bytes) -> bytes:
    """The content of an image file; that of a GIF of one image, of which Oxford's pets have a few, as PNG.

    Readers of records expect PNG or JPEG, and PNG loses nothing.
    """
    if codec.format_of(data[:32]) != "GIF":
        return data
    try:
        image = codec.decode_by_pillow(data)
    except codec.ImageError:
        # The reason is reported with the damage of other files.
        return data
    if getattr(image, "n_frames", 1) > 1:
        return data
    file = io.BytesIO()
    image.convert("RGB").save(file, format="png")
    return file.getvalue()


def contents_of(examples: Examples) -> Contents:
    """The hashes of all files, as `contents.contents_of` gives those of a prepared dataset."""

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
    """Results in the order of the items. Closing the generator cancels the calls that have not begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _is_whole(path: Path) -> bool:
    return path.is_file() and codec.damage(path.read_bytes()) is None


def _check(
    example: Example, spec: specs.DatasetSpec | None, train_ids: np.ndarray | None
) -> tuple[Measured, np.ndarray | None, list[tuple[str, str]]]:
    """The measurement of one example, its train ids if its mask is converted, and (kind, entry) for each problem."""
    faults: list[tuple[str, str]] = []

    def read(file: File, faults_of_kind: tuple, decode) -> tuple[np.ndarray | None, str]:
        decoded, data, found = None, b"", ""
        try:
            data = file.read()
            found = hash_of(data)
            data = _stored(data) if file is example.image else data
            damage = codec.damage(data)
        except (OSError, reading.UnreadableError) as error:
            damage = getattr(error, "strerror", None) or str(error).removeprefix(f"{file.name}: ")
        if not damage and (kind := next(filter(None, (fault(data) for fault in faults_of_kind)), None)):
            faults.append((kind, file.name))
            return None, found
        try:
            decoded = None if damage else decode(data)
        except codec.ImageError as error:
            damage = str(error)
        if decoded is None:
            faults.append((_UNREADABLE, f"{file.name}: {damage or 'does not decode'}"))
        return decoded, found

    # Masks from archives are aligned with the images as stored, not as EXIF rotates them.
    of_image = (codec.fault_of_image,) if train_ids is not None else (codec.fault_of_image, codec.fault_of_turning)
    # Published archives have damaged images, Oxford-IIIT Pet two.
    decode_image = codec.decode_undamaged if train_ids is None else codec.decode_image
    image, hash_of_image = read(example.image, of_image, decode_image)
    size = (0, 0) if image is None else image.shape[:2]
    if example.label is None:
        # A mask of ignored pixels, because readers expect one.
        ignored = np.full(size, spec.ignore_label if spec else 255, np.uint8)
        return Measured(size, (), (hash_of_image, None)), ignored, faults
    of_mask = codec.fault_of_mask if train_ids is None else codec.fault_of_published_mask
    mask, hash_of_mask = read(example.label, (of_mask,), codec.decode_mask)
    if image is not None and mask is not None and size != mask.shape:
        entry = f"{example.label.name} is {mask.shape[0]} x {mask.shape[1]}, its image {size[0]} x {size[1]}"
        faults.append((_OTHER_SIZE, entry))
    if mask is None:
        return Measured(size, (), (hash_of_image, hash_of_mask)), None, faults
    pixels = np.bincount(mask.ravel(), minlength=256)
    values = tuple((value, int(pixels[value])) for value in np.flatnonzero(pixels).tolist())
    labels = None if train_ids is None else train_ids.astype(np.uint8)[mask]
    return Measured(size, values, (hash_of_image, hash_of_mask)), labels, faults


def _own_ids(spec: specs.DatasetSpec) -> np.ndarray:
    """The same table as `train_ids`, for masks of train ids."""
    table = np.full(256, -1, np.int16)
    values = [*range(len(spec.label_names)), spec.ignore_label]
    table[values] = values
    return table


def _kind_of_stray(spec: specs.DatasetSpec, train_ids: np.ndarray | None, totals: np.ndarray) -> str:
    """The kind of problem that strange mask values are; totals: int64 (256,), pixels of each value in all masks."""
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
