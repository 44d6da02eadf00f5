"""A prepared dataset, as `builders.py` wrote it: decoded whole, or record by record."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging

from segjax.data import codec, specs
from segjax.data.sources import DataError, counted

THREADS = min(8, os.cpu_count() or 1)  # OpenCV decodes outside the interpreter's lock


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset on disk, ready to be read.

    Attributes:
      spec: classes, colours and ignore label, as stored with the data.
      splits: number of images per split.
      labelled: the splits whose labels are published.
      path: the directory that TFDS wrote.
      metadata: what `builders.py` stored about source, names, sizes and pixels.
    """

    spec: specs.DatasetSpec
    splits: dict[str, int]
    labelled: tuple[str, ...]
    path: Path
    metadata: dict = dataclasses.field(repr=False, compare=False)

    def pixel_counts(self, split: str) -> list[int]:
        """Pixels of each label value, in the order of `spec.label_names`: K numbers, or 2 for a single class.

        Raises:
          DataError: there is no such split, or its labels are not published.
        """
        self._refuse_unlabelled(split)
        return list(self.metadata["pixels"][split])

    def records(self, split: str) -> Records:
        """A split to be read at random; DataError where there is no such split."""
        self._refuse_unknown(split)
        return Records(self, split)

    def load(self, split: str) -> specs.Split:
        """Decodes a split into host memory: 4 * H * W bytes per image, H and W being the largest of the split.

        Args:
          split: a key of `splits`.

        Returns:
          The split, in the order of its names (file stems).

        Raises:
          DataError: there is no such split, its labels are not published, or a record does not decode.
        """
        from segjax.data import records as data_records

        self._refuse_unlabelled(split)
        return data_records.load(
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


class Records:
    """A split on disk, decoded record by record, in any order and from any thread; pickled by where it lies.

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
            builder = tfds.builder_from_directory(prepared.path)
            self._source = builder.as_data_source(split, decoders={"image": skip, "label": skip})

    def __reduce__(self):
        return Records, (self._prepared, self._split)

    def __repr__(self) -> str:
        # Grain compares it, to tell whether a saved position is one in the same data.
        return f"Records({self._prepared.spec.name} {self._split}, {len(self)} images)"

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
        """The image alone, uint8 (H, W, 3), also of a split without labels; DataError where it does not decode."""
        return self._decoded(index, self._read(index), "image")

    def _read(self, index: int) -> dict[str, bytes]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self._prepared.spec.name} {self._split} has {len(self)} images, and no number {index}")
        try:
            return self._source[index]
        except Exception as error:
            # A damaged file raises what the library at fault happens to raise.
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
    """What TFDS wrote at `path`.

    Raises:
      DataError: it is not complete.
    """
    import tensorflow_datasets as tfds

    if not (path / "dataset_info.json").is_file():
        raise DataError(f"{path} is there but holds no complete dataset; delete it")
    with quiet():
        info = tfds.builder_from_directory(path).info
    metadata = dict(info.metadata)
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


def in_threads(function, items) -> Iterator:
    """Results in the order of the items. What has not begun when the iterator is closed is never done."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def quiet():
    """Holds back TFDS's log, among it a warning that each folder's config is not built in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
