"""Checks every image and mask of a dataset, counts pixels by class, and converts masks from archives to train ids.

Decoding takes most of the time. It runs in threads, and results are kept in a scratch folder, where a preparation that
was interrupted continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from segjax.data import codec, specs
from segjax.data.sources import Example, Examples, File, Problems, file_of, listed
from segjax.runtime import atomic, console

THREADS = min(8, os.cpu_count() or 1)  # OpenCV decodes outside the interpreter's lock
_UNREADABLE = "files that are no whole JPEG or PNG; copy or export them again"
_OTHER_SIZE = "masks of another size (height x width) than their image"


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
        found = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.path / "checked.jsonl").read_text(encoding="utf-8").splitlines():
                # The last line may be cut where the process was killed.
                with contextlib.suppress(ValueError):
                    split, name, size, pixels = json.loads(line)
                    found[split, name] = Measured(tuple(size), tuple(pixels))
        return found

    @contextlib.contextmanager
    def journal(self) -> Iterator:
        """Gives a function (split, name, measured) that records that an example is valid."""
        path = self.make() / "checked.jsonl"
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut)

            def write(split: str, name: str, measured: Measured) -> None:
                file.write(json.dumps([split, name, *dataclasses.astuple(measured)]) + "\n")
                file.flush()  # a process that is killed loses its buffer

            yield write


@dataclasses.dataclass(frozen=True)
class Measured:
    """Size and pixel counts of one example.

    Attributes:
      size: height and width in pixels; zeros where the image does not decode.
      pixels: number of pixels of each label value, in the order of `spec.label_names`; empty without a valid mask.
    """

    size: tuple[int, int]
    pixels: tuple[int, ...]


def convert(
    examples: Examples,
    spec: specs.DatasetSpec | None,
    train_ids: np.ndarray | None,
    scratch: Scratch,
    problems: Problems,
) -> tuple[Examples, dict[str, list[Measured]]]:
    """Decodes every file and adds all errors to `problems`.

    Args:
      spec: None if it could not be read, which is among the problems already; label values are not checked then.
      train_ids: int16 (256,), see `archives.Reader`. None for masks of train ids, which are stored unchanged.

    Returns:
      The examples, each with the mask to be stored, and their measurements, in the same order.
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
            with contextlib.closing(_in_threads(functools.partial(check, split), found)) as results:
                progress = console.ProgressBar(f"checking {split}", len(found), "images")
                for example, (result, faults) in zip(found, progress.over(results), strict=True):
                    measured[split].append(result)
                    for kind, entry in faults:
                        problems[kind].append(entry)
                    if not faults and (split, example.name) not in earlier:
                        note(split, example.name, result)
    if train_ids is None or problems:
        return examples, measured
    converted = {
        split: [
            dataclasses.replace(example, label=file_of(scratch.mask(split, example.name), example.name))
            for example in found
        ]
        for split, found in examples.items()
    }
    return converted, measured


def _in_threads(function: Callable, items: Iterable) -> Generator:
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

    def read(file: File, faults_of_kind: tuple, decode) -> np.ndarray | None:
        decoded, data = None, b""
        try:
            data = file.read()
            damage = codec.damage(data)
        except OSError as error:
            damage = error.strerror or str(error)
        if not damage and (kind := next(filter(None, (fault(data) for fault in faults_of_kind)), None)):
            faults.append((kind, file.name))
        elif damage or (decoded := decode(data)) is None:
            faults.append((_UNREADABLE, f"{file.name}: {damage or 'does not decode'}"))
        return decoded

    # Masks from archives are aligned with the images as stored, not as EXIF rotates them.
    of_image = (codec.fault_of_image,) if train_ids is not None else (codec.fault_of_image, codec.fault_of_turning)
    image = read(example.image, of_image, codec.decode_image)
    size = (0, 0) if image is None else image.shape[:2]
    if example.label is None:
        # A mask of ignored pixels, because readers expect one.
        return Measured(size, ()), np.full(size, spec.ignore_label if spec else 255, np.uint8), faults
    of_mask = codec.fault_of_mask if train_ids is None else codec.fault_of_published_mask
    mask = read(example.label, (of_mask,), codec.decode_mask)
    if image is not None and mask is not None and size != mask.shape:
        entry = f"{example.label.name} is {mask.shape[0]} x {mask.shape[1]}, its image {size[0]} x {size[1]}"
        faults.append((_OTHER_SIZE, entry))
    if mask is None or spec is None:
        return Measured(size, ()), None, faults
    pixels = np.bincount(mask.ravel(), minlength=256)
    allowed = _own_ids(spec) if train_ids is None else train_ids
    if stray := [value for value in np.flatnonzero(pixels) if allowed[value] < 0]:
        entry = f"{example.label.name}: {listed([f'{value} ({pixels[value]} pixels)' for value in stray])}"
        faults.append((_kind_of_stray(spec, train_ids), entry))
        return Measured(size, ()), None, faults
    counts, values = np.zeros(256, np.int64), np.flatnonzero(pixels)
    np.add.at(counts, allowed[values], pixels[values])
    labels = None if train_ids is None else train_ids.astype(np.uint8)[mask]
    return Measured(size, tuple(counts[: len(spec.label_names)].tolist())), labels, faults


def _own_ids(spec: specs.DatasetSpec) -> np.ndarray:
    """The same table as `train_ids`, for masks of train ids."""
    table = np.full(256, -1, np.int16)
    values = [*range(len(spec.label_names)), spec.ignore_label]
    table[values] = values
    return table


def _kind_of_stray(spec: specs.DatasetSpec, train_ids: np.ndarray | None) -> str:
    if train_ids is None:
        return (
            f"mask values that are neither a class (0..{len(spec.label_names) - 1}) nor the ignore value "
            f'({spec.ignore_label}); correct the masks, or "names" and "ignore" in classes.json'
        )
    values = np.flatnonzero(train_ids[:255] >= 0)
    also = " and 255" if train_ids[255] >= 0 else ""
    return (
        f"mask values that {spec.name} does not have (it has {values.min()}..{values.max()}{also}); fetch the archive "
        "with the published masks"
    )
