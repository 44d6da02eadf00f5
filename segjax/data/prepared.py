"""Reads a dataset that `builders.py` has prepared: a whole split at once, or image by image."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from absl import logging

from segjax.data import codec, records, specs
from segjax.data.sources import DataError, counted


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset on disk, ready to be read.

    Attributes:
      spec: classes, colours and ignore label, as stored with the data.
      splits: number of images per split.
      labelled: the splits whose labels are published.
      path: the directory that TFDS wrote.
      metadata: stored by `builders.py`: source, and for each split the names, sizes and pixel counts of its images.
    """

    spec: specs.DatasetSpec
    splits: dict[str, int]
    labelled: tuple[str, ...]
    path: Path
    metadata: dict = dataclasses.field(repr=False, compare=False)

    def pixel_counts(self, split: str) -> list[int]:
        """Number of pixels of each label value, in the order of `spec.label_names`: K numbers, or 2 for a single class.

        Raises:
          DataError: there is no such split, or its labels are not published.
        """
        self._refuse_unlabelled(split)
        return list(self.metadata["pixels"][split])

    def records(self, split: str) -> PreparedRecords:
        """A split, of which images are read in any order; DataError where there is no such split."""
        self._refuse_unknown(split)
        return PreparedRecords(self, split)

    def load(self, split: str) -> specs.Split:
        """Decodes a split into host memory: 4 * H * W bytes per image, where H and W are the largest of the split.

        Args:
          split: a key of `splits`.

        Returns:
          The split, in the order of its names (file stems).

        Raises:
          DataError: there is no such split, its labels are not published, or a record does not decode.
        """
        self._refuse_unlabelled(split)
        return records.load(
            self.records(split), ignore_label=self.spec.ignore_label, what=f"loading {self.spec.name} {split}"
        )

    def _refuse_unknown(self, split: str) -> None:
        if split not in self.splits:
            raise DataError(f"{self.spec.name} has no split '{split}'; there are {counted(self.splits)}")

    def _refuse_unlabelled(self, split: str) -> None:
        self._refuse_unknown(split)
        if split not in self.labelled:
            raise DataError(
                f"{self.spec.name} {split} has no published labels; use {' or '.join(self.labelled) or 'another split'}"
            )


class PreparedRecords:
    """The `records.Records` of a prepared split: decoded one by one, in any order and from any thread.

    A pickle contains the path of the dataset, not the images.

    Attributes:
      names: N names, as in `specs.Split`.
      sizes: int32 (N, 2), height and width of each image, known without decoding.
    """

    def __init__(self, prepared: Prepared, split: str):
        import tensorflow_datasets as tfds

        self.names = tuple(prepared.metadata["names"][split])
        self.sizes = np.array(prepared.metadata["sizes"][split], np.int32).reshape(-1, 2)
        self._prepared, self._split = prepared, split
        skip = tfds.decode.SkipDecoding()
        with quiet():
            # Any: the decorators of as_data_source hide its parameters from type checkers.
            builder: Any = tfds.builder_from_directory(prepared.path)
            self._source = builder.as_data_source(split, decoders={"image": skip, "label": skip})

    def __reduce__(self):
        return PreparedRecords, (self._prepared, self._split)

    def __repr__(self) -> str:
        # Without the address of the object, because Grain compares it to detect other data.
        return f"PreparedRecords({self._prepared.spec.name} {self._split}, {len(self)} images)"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3), RGB, and label uint8 (H, W), train ids.

        Raises:
          DataError: the labels of this split are not published, or the record does not decode.
        """
        self._prepared._refuse_unlabelled(self._split)
        record = self._read(index)
        return self._decoded(index, record, "image"), self._decoded(index, record, "label")

    def image(self, index: int) -> np.ndarray:
        """Only the image, uint8 (H, W, 3), also of a split without labels; DataError where it does not decode."""
        return self._decoded(index, self._read(index), "image")

    def _read(self, index: int) -> dict[str, bytes]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self._prepared.spec.name} {self._split} has {len(self)} images, and no number {index}")
        try:
            return self._source[index]
        except Exception as error:
            # The type of exception depends on the library that reads the damaged file.
            raise self._damaged(index, f"cannot be read ({error})") from error

    def _decoded(self, index: int, record: dict[str, bytes], part: str) -> np.ndarray:
        array = codec.decode_image(record[part]) if part == "image" else codec.decode_mask(record[part])
        if array is None or array.shape[:2] != tuple(self.sizes[index]):
            raise self._damaged(index, f"its {part} does not decode")
        return array

    def _damaged(self, index: int, fault: str) -> DataError:
        where = f"{self._prepared.path}: {self._split} record {index} ('{self.names[index]}')"
        return DataError(f"{where}: {fault}; delete that directory and prepare the dataset again")


def open_prepared(path: Path) -> Prepared:
    """The dataset that TFDS wrote at `path`.

    Raises:
      DataError: it is not complete.
    """
    import tensorflow_datasets as tfds

    if not (path / "dataset_info.json").is_file():
        raise DataError(f"{path} is there but holds no complete dataset; delete it")
    with quiet():
        info = tfds.builder_from_directory(path).info
    metadata = cast(dict[str, Any], dict(info.metadata or {}))
    fields = metadata["spec"]
    spec = specs.DatasetSpec(
        name=fields["name"],
        class_names=tuple(fields["class_names"]),
        colors=tuple(map(tuple, fields["colors"])),
        ignore_label=fields["ignore_label"],
        splits=tuple(map(tuple, fields["splits"])),
    )
    splits = {split: entry.num_examples for split, entry in info.splits.items()}
    return Prepared(spec, splits, tuple(metadata["pixels"]), path, metadata)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses TFDS's log, which warns that the config of a folder is not built in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
