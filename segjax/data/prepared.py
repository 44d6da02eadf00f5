"""Reads a dataset that `builders.py` prepared: a whole split at once, or image by image."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from absl import logging
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.data import bands, codec, records, specs
from segjax.data.records import JoinedRecords
from segjax.data.sources import DataError, counted
from segjax.runtime import console, reading


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared dataset on disk. Methods take a split, or a sum of splits such as "train+val".

    Attributes:
      spec: Classes, colours and ignore label, as stored with the data.
      splits: Number of images per split.
      labelled: The splits whose labels are published.
      path: The directory that TFDS wrote.
      metadata: Metadata that `builders.py` stored: source, and names, sizes and pixel counts of each split.

    Example:
      >>> import pathlib
      >>> import numpy as np
      >>> from segjax import data
      >>> for kind, shape in (("images", (40, 64, 3)), ("labels", (40, 64))):
      ...     pathlib.Path("yard", kind, "train").mkdir(parents=True)
      ...     np.save(f"yard/{kind}/train/a.npy", np.zeros(shape, np.uint8))
      >>> size = pathlib.Path("yard/classes.json").write_text('{"names": ["grass", "path"]}')
      >>> prepared = data.prepare("folder", source="yard", data_dir="prepared")
      Preparing yard, images per split: train 1
        from ...
        to ...
      >>> prepared.spec.class_names, prepared.pixel_counts("train")
      (('grass', 'path'), [2560, 0])
    """

    spec: specs.DatasetSpec
    splits: dict[str, int]
    labelled: tuple[str, ...]
    path: Path
    metadata: dict = dataclasses.field(repr=False, compare=False)

    @property
    def kind(self) -> specs.ImageKind:
        """Channels and dtype of the images; 8-bit RGB if an older version prepared the dataset."""
        images = self.metadata.get("images")
        return specs.ImageKind(images["channels"], images["dtype"]) if images else specs.RGB

    def moments(self, split: str) -> bands.Moments:
        """Moments of each channel, in the unit of the images.

        Raises:
          DataError: There is no such split, or the dataset was prepared by a version that computed no moments.
        """
        parts = self._parts(split)
        if "images" not in self.metadata:
            raise DataError(
                f"{self.path} was prepared by a version that computed no mean and deviation; delete that "
                "directory and prepare the dataset again"
            )
        found = [self.metadata["images"]["moments"][part] for part in parts]
        return functools.reduce(
            bands.merged, (bands.Moments(each["pixels"], tuple(map(tuple, each["of"]))) for each in found)
        )

    def pixel_counts(self, split: str) -> list[int]:
        """Number of pixels of each label value, in the order of `spec.label_names`: K numbers, or 2 for a single class.

        Raises:
          DataError: There is no such split, or its labels are not published.
        """
        return np.sum([self.metadata["pixels"][part] for part in self._labelled(split)], axis=0).tolist()

    def records(self, split: str) -> PreparedRecords | JoinedRecords:
        """Records of a split, readable in any order; DataError if there is no such split."""
        parts = {part: PreparedRecords(self, part) for part in self._parts(split)}
        return JoinedRecords(parts) if len(parts) > 1 else next(iter(parts.values()))

    def load(self, split: str) -> specs.Split:
        """Decodes a split into host memory.

        An RGB image takes 4 * H * W bytes, or 5 * H * W with 16-bit labels; H and W are the maxima of the split.

        Returns:
          The split, in the order of its names (file stems); a sum, in the order of its splits.

        Raises:
          DataError: There is no such split, its labels are not published, or a record does not decode.
        """
        self._labelled(split)
        return records.load(
            self.records(split), ignore_label=self.spec.ignore_label, what=f"loading {self.spec.name} {split}"
        )

    def _parts(self, split: str) -> list[str]:
        parts = records.parts_of(split, known=counted(self.splits))
        for part in parts:
            if part not in self.splits:
                raise DataError(f"{self.spec.name} has no split '{part}'; there are {counted(self.splits)}")
        return parts

    def _labelled(self, split: str) -> list[str]:
        """`_parts`; DataError if one of them has no published labels."""
        parts = self._parts(split)
        for part in parts:
            if part not in self.labelled:
                raise DataError(
                    f"{self.spec.name} {part} has no published labels; use "
                    f"{' or '.join(self.labelled) or 'another split'}"
                )
        return parts


class PreparedRecords:
    """The `records.Records` of a prepared split: decoded one by one, in any order and by any thread.

    A pickle contains the path of the dataset, not the images.

    Attributes:
      names: N names, as in `specs.Split`.
      sizes: Height and width of each image, int32 (N, 2), known without decoding.
    """

    def __init__(self, prepared: Prepared, split: str):
        import tensorflow_datasets as tfds

        self.names = tuple(prepared.metadata["names"][split])
        self.sizes = np.array(prepared.metadata["sizes"][split], np.int32).reshape(-1, 2)
        self._prepared, self._split = prepared, split
        # TFDS decodes arrays; image files are decoded here.
        encoded = ("image", "label") if prepared.kind.is_rgb else ("label",)
        decoders = dict.fromkeys(encoded, tfds.decode.SkipDecoding())
        with quiet():
            # Any, because the decorators of as_data_source hide its parameters from type checkers.
            builder: Any = tfds.builder_from_directory(prepared.path)
            try:
                self._source = builder.as_data_source(split, decoders=decoders)
                stored = len(self._source)
            except Exception as error:
                # The type of exception depends on the library that opens the damaged file.
                raise self._damaged_split(" ".join(str(error).split())[:200]) from error
        if stored != len(self.names):
            raise self._damaged_split(f"{stored} records instead of {len(self.names)}")

    def __reduce__(self):
        return PreparedRecords, (self._prepared, self._split)

    def __repr__(self) -> str:
        # Without the address of the object, because Grain compares the text to detect other data.
        return f"PreparedRecords({self._prepared.spec.name} {self._split}, {len(self)} images)"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, C) of `Prepared.kind`, and train ids (H, W) of dtype `spec.label_dtype`.

        Raises:
          DataError: The labels of this split are not published, or the record does not decode.
        """
        self._prepared._labelled(self._split)
        record = self._read(index)
        return self._decoded(index, record, "image"), self._decoded(index, record, "label")

    def image(self, index: int) -> np.ndarray:
        """Only the image, (H, W, C), even in a split without labels; DataError if it does not decode."""
        return self._decoded(index, self._read(index), "image")

    def _read(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self._prepared.spec.name} {self._split} has {len(self)} images, and no number {index}")
        try:
            return self._source[index]
        except Exception as error:
            # The type of exception depends on the library that reads the damaged file.
            raise self._damaged(index, f"cannot be read ({reading.stated(error)})") from error

    def _decoded(self, index: int, record: dict[str, Any], part: str) -> np.ndarray:
        if part == "label":
            array = codec.decode_mask(record[part])
        else:
            array = codec.decode_image(record[part]) if self._prepared.kind.is_rgb else record[part]
        if array is None or array.shape[:2] != tuple(self.sizes[index]):
            raise self._damaged(index, f"its {part} does not decode")
        if part == "image":
            return array
        # An 8-bit mask may belong to a data set with 16-bit labels.
        return array.astype(self._prepared.spec.label_dtype, copy=False)

    def _damaged_split(self, fault: str) -> DataError:
        where = f"{self._prepared.path}: the files of {self._split}, or dataset_info.json, cannot be read"
        return DataError(f"{where} ({fault}); delete that directory and prepare the dataset again")

    def _damaged(self, index: int, fault: str) -> DataError:
        where = f"{self._prepared.path}: {self._split} record {index} ('{self.names[index]}')"
        return DataError(f"{where}: {fault}; delete that directory and prepare the dataset again")


class _Spec(TypedDict):
    name: str
    class_names: Annotated[list[str], Field(min_length=1)]
    colors: list[Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]]
    ignore_label: int
    # Pairs of name and number of images, as TFDS stores them.
    splits: list[tuple[str, int] | list[str | int]]


class _Division(TypedDict):
    """See `division.Division`."""

    val_share: Annotated[float, Field(gt=0, lt=1)]
    seed: int
    group_by: str | None


class _Moments(TypedDict):
    """See `bands.Moments`."""

    pixels: Annotated[int, Field(ge=1)]
    of: list[Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]]


class _Images(TypedDict):
    channels: Annotated[int, Field(ge=1, le=65_536)]
    dtype: Literal["uint8", "uint16", "float32"]
    moments: dict[str, _Moments]


class _Metadata(TypedDict):
    """metadata.json of a prepared dataset, as `builders.py` writes it; names may have bytes that are not UTF-8."""

    spec: _Spec
    source: Any
    state: str
    fingerprint: str
    names: dict[str, list[Any]]
    sizes: dict[str, list[Annotated[list[Annotated[int, Field(ge=1, lt=1 << 31)]], Field(min_length=2, max_length=2)]]]
    pixels: dict[str, list[Annotated[int, Field(ge=0)]]]
    images: NotRequired[_Images]
    division: NotRequired[_Division]
    hashes: NotRequired[dict[str, list[Annotated[list[str | None], Field(min_length=2, max_length=2)]]]]


def open_prepared(path: Path) -> Prepared:
    """Opens the dataset that TFDS wrote at `path`.

    Raises:
      DataError: The dataset is incomplete or damaged; the message names the file, and in JSON the key.
    """
    import tensorflow_datasets as tfds

    if not (path / "dataset_info.json").is_file():
        raise DataError(f"{path} exists, but holds no complete dataset; delete it")
    remedy = "delete that directory and prepare the dataset again"
    try:
        # Also the files of records, because array_record would wait for the writer of a FIFO.
        for file in sorted(path.iterdir()):
            reading.refuse_irregular(file)
        with quiet():
            info = tfds.builder_from_directory(path).info
        splits = {split: entry.num_examples for split, entry in info.splits.items()}
        for entry in info.splits.values():
            if lost := [file for file in entry.filepaths if not os.path.exists(file)]:
                name = console.one_line(os.path.basename(lost[0]))
                raise reading.UnreadableError(
                    f"{path / 'dataset_info.json'}: it names the file {name}, which is missing"
                )
        metadata = reading.checked(dict(info.metadata or {}), _Metadata, name=path / "metadata.json")
        _check_lengths(metadata, splits, path / "metadata.json")
        spec = _spec_of(metadata["spec"], path / "metadata.json")
    except reading.UnreadableError as error:
        raise DataError(f"{error}; {remedy}") from None
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}; {remedy}") from None
    except Exception as error:
        # TFDS raises various exceptions for damaged files, with messages that do not help the user.
        reason = _damaged_file(path) or "its dataset_info.json or features.json is not as TFDS writes it"
        raise DataError(f"{path} is damaged ({reason}); {remedy}") from error
    return Prepared(spec, splits, tuple(metadata["pixels"]), path, metadata)


def _spec_of(fields: Mapping[str, Any], path: Path) -> specs.DatasetSpec:
    pairs = [tuple(pair) for pair in fields["splits"]]
    if odd := [pair for pair in pairs if [type(part) for part in pair] != [str, int]]:
        raise reading.UnreadableError(
            f"{path}: spec.splits should have pairs of a name and a number, not {odd[0]!r:.60}"
        )
    try:
        return specs.DatasetSpec(
            name=fields["name"],
            class_names=tuple(fields["class_names"]),
            colors=tuple(map(tuple, fields["colors"])),
            ignore_label=fields["ignore_label"],
            splits=tuple(pairs),
        )
    except ValueError as error:
        raise reading.UnreadableError(f"{path}: spec: {error}") from None


def _check_lengths(metadata: dict[str, Any], splits: Mapping[str, int], path: Path) -> None:
    """Raises UnreadableError if the numbers of images, splits, channels or labels disagree with the metadata."""
    number = len(metadata["spec"]["class_names"])
    for key in ("names", "sizes", "hashes"):
        for split, count in splits.items() if key in metadata else ():
            found = metadata[key].get(split)
            if found is None or len(found) != count:
                entries = "nothing" if found is None else f"{len(found)} entries"
                raise reading.UnreadableError(f"{path}: {key}.{split} should have {count} entries, it has {entries}")
    if images := metadata.get("images"):
        for split, count in splits.items():
            found = images["moments"].get(split)
            if count and (found is None or len(found["of"]) != images["channels"]):
                raise reading.UnreadableError(
                    f"{path}: images.moments.{split} is not of {images['channels']} channels of a split"
                )
    for split, counts in metadata["pixels"].items():
        if split not in splits or len(counts) != max(number, 2):
            raise reading.UnreadableError(f"{path}: pixels.{split} is not of {max(number, 2)} classes of a split")


def _damaged_file(path: Path) -> str:
    """Fault of the first of TFDS's files that is not JSON; "" if all are."""
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        try:
            reading.read_json(path / name)
        except OSError as error:
            return f"{path / name}: {error.strerror}"
        except reading.UnreadableError as error:
            return str(error)
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses TFDS's warnings that the config of a folder is not built in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
