"""Images and labels of a split, in memory or read one by one."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from segjax.data import specs
from segjax.data.sources import DataError
from segjax.runtime import console

# OpenCV decodes, and NumPy copies, outside the interpreter's lock.
THREADS = min(16, os.cpu_count() or 1)


class RecordError(ValueError):
    """An image or a label that cannot be used; the message names it."""


class Records(Protocol):
    """A split on disk. Several threads read at once.

    Attributes:
      sizes: int32 (N, 2), height and width of each image.
      names: N names, for messages and file names.
    """

    sizes: np.ndarray
    names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 image (H, W, 3), RGB, and uint8 label (H, W), train ids."""


@dataclasses.dataclass(frozen=True)
class SplitRecords:
    """The images of a split without the padding that they are stored with."""

    split: specs.Split

    @property
    def sizes(self) -> np.ndarray:
        return self.split.sizes

    @property
    def names(self) -> Sequence[str]:
        return self.split.names

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.split.sizes[number]
        return self.split.images[number, :height, :width], self.split.labels[number, :height, :width]


def records_of(data: specs.Split | Records) -> Records:
    return SplitRecords(data) if isinstance(data, specs.Split) else data


def read(records: Records, number: int) -> tuple[np.ndarray, np.ndarray]:
    """One image and its label; RecordError, which names it, whatever goes wrong."""
    name, size = records.names[number], tuple(records.sizes[number].tolist())
    try:
        image, label = records[number]
    except (RecordError, DataError):
        # It names the record itself.
        raise
    except BaseException as error:
        # BaseException, because what ends a thread in silence would leave the training waiting for it.
        raise RecordError(f"{name} cannot be read: {str(error) or type(error).__name__}") from error
    # np.shape, because what could not be decoded may be None.
    shapes = np.shape(image), np.shape(label)
    if shapes != ((*size, 3), size):
        raise RecordError(f"{name} should be of size {size}, but its image and label have the shapes {shapes}")
    return image, label


def padded_gigabytes(records: Records) -> float:
    """What `load` would take."""
    height, width = records.sizes.max(axis=0).tolist()
    return 4 * len(records) * height * width / 1e9


def load(records: Records, *, ignore_label: int, what: str = "loading") -> specs.Split:
    """Reads all of it into memory, padded to the largest image: 4 * N * H * W bytes.

    Args:
      what: is being done, for the progress on a terminal.

    Raises:
      RecordError: an image or a label cannot be used.
    """
    canvas = (len(records), *records.sizes.max(axis=0))
    images, labels = np.zeros((*canvas, 3), np.uint8), np.full(canvas, ignore_label, np.uint8)

    def fill(number: int) -> None:
        height, width = records.sizes[number]
        images[number, :height, :width], labels[number, :height, :width] = read(records, number)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in console.Progress(what, len(records), "images").over(pool.map(fill, range(len(records)))):
            pass
    return specs.Split(images, labels, records.sizes, tuple(records.names))


class CachedRecords:
    """Records, read by `read`, of which as many as fit into `limit` bytes stay in memory, decoded.

    What is kept stays: where every image comes up once an epoch, making room for the newest would drop each one just
    before it is asked for again.
    """

    def __init__(self, records: Records, limit: float):
        self._records, self._free = records, limit
        self.sizes, self.names = records.sizes, records.names
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number in self._kept:
            return self._kept[number]
        image, label = read(self._records, number)
        size = image.nbytes + label.nbytes
        with self._lock:
            if number not in self._kept and size <= self._free:
                self._kept[number] = image, label
                self._free -= size
        return image, label


def ahead(items, work: Callable, *, threads: int):
    """Grain's dataset of `work(item)` in the order of the items, computed ahead by threads."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return grain.MapDataset.source(items).map(work).to_iter_dataset(options)
