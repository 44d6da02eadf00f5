"""Images and labels of a split: in memory, or read one by one and cached."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from segjax.data import specs
from segjax.data.sources import DataError
from segjax.runtime import console

if TYPE_CHECKING:
    import grain

# OpenCV decodes and NumPy copies outside the interpreter's lock.
THREADS = min(16, os.cpu_count() or 1)


class RecordError(ValueError):
    """An image or a label that cannot be used; the message names it.

    Example:
      >>> import numpy as np
      >>> from segjax import data
      >>> from segjax.data import records
      >>> split = data.Split(np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8), np.full((1, 2), 4), ("a",))
      >>> try:
      ...     records.read(data.records_of(split), 0)
      ... except data.RecordError as error:
      ...     print(error)
      a should be of size (4, 4), but its image and label have the shapes ((4, 4), (4, 4))
    """


class Records(Protocol):
    """A split on disk, which several threads may read at the same time.

    Attributes:
      sizes: Height and width of each image, int32 (N, 2).
      names: N names, for messages and file names.

    Example:
      >>> from segjax import data
      >>> (opened,) = data.open_splits("streets", ["val"], num_images=[2], size=(40, 64))
      >>> records = data.records_of(opened.data)
      >>> image, labels = records[0]
      >>> len(records), image.shape, labels.shape
      (2, (40, 64, 3), (40, 64))
    """

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, C), uint8, uint16 or float32, with C and dtype equal for all images; and its train ids, uint8 or
        uint16 (H, W)."""
        ...


@dataclasses.dataclass(frozen=True)
class SplitRecords:
    """The images of a split in memory, without their padding."""

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


def parts_of(split: str, *, known: str = "") -> list[str]:
    """Names of the splits in a sum, "train+val" -> ["train", "val"]; a single split is a sum of one.

    Args:
      split: A split, or a sum of splits.
      known: Text that lists the existing splits, for messages.

    Raises:
      DataError: A name is missing, or occurs twice.
    """
    parts = [part.strip() for part in split.split("+")]
    hint = f"; there are {known}" if known else ""
    if not all(parts):
        raise DataError(f"split {split!r} lacks a name next to a +; a sum of splits is written as in train+val{hint}")
    if twice := [part for part in dict.fromkeys(parts) if parts.count(part) > 1]:
        raise DataError(f"split {split!r} contains {' and '.join(twice)} twice; name each split once{hint}")
    return parts


class JoinedRecords:
    """The records of several splits, one after the other; names begin with the name of the split.

    Attributes:
      sizes, names: As in `Records`.
    """

    def __init__(self, parts: Mapping[str, Records]):
        """Joins the records, by name of their split."""
        self._parts = dict(parts)
        self.sizes = np.concatenate([records.sizes for records in parts.values()])
        self.names = tuple(f"{split}_{name}" for split, records in parts.items() for name in records.names)
        # Split of each image, and its number there.
        self._places = [(split, number) for split, records in parts.items() for number in range(len(records))]

    def __repr__(self) -> str:
        # Without the address of the object, because Grain compares the text to detect other data.
        return " + ".join(map(repr, self._parts.values()))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        split, place = self._places[number]
        return self._parts[split][place]


class PickedRecords:
    """Some of the images of a split.

    Attributes:
      sizes, names: As in `Records`.
    """

    def __init__(self, records: Records, numbers: Sequence[int]):
        """`numbers` are those of the images, in their order."""
        self._records, self._numbers = records, list(numbers)
        self.sizes = records.sizes[self._numbers]
        self.names = tuple(records.names[number] for number in self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._records[self._numbers[number]]


def records_of(data: specs.Split | Records) -> Records:
    """The interface of `Records` for a split that is in memory or on disk.

    Args:
      data: A `Split`, or `Records`, which are returned as they are.

    Returns:
      Records with the images and labels of the split, without padding.

    Example:
      >>> from segjax import data
      >>> (opened,) = data.open_splits("streets", ["val"], num_images=[2], size=(40, 64))
      >>> len(data.records_of(opened.data))
      2
    """
    return SplitRecords(data) if isinstance(data, specs.Split) else data


def read(records: Records, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads an image and its label, and checks their sizes against the stored size.

    Raises:
      RecordError or DataError: Reading fails for any reason; the message names the image.
    """
    name, size = records.names[number], tuple(records.sizes[number].tolist())
    try:
        image, label = records[number]
    except (RecordError, DataError):
        # The message names the record already.
        raise
    except BaseException as error:
        # BaseException, because the training would wait forever for a thread that ends without a result.
        raise RecordError(f"{name} cannot be read: {str(error) or type(error).__name__}") from error
    # np.shape, because an image that does not decode may be None.
    shapes = np.shape(image), np.shape(label)
    if len(shapes[0]) != 3 or (shapes[0][:2], shapes[1]) != (size, size):
        raise RecordError(f"{name} should be of size {size}, but its image and label have the shapes {shapes}")
    return image, label


def padded_gigabytes(records: Records, *, ignore_label: int, kind: specs.ImageKind = specs.RGB) -> float:
    """Gigabytes (1e9 bytes) of host memory that `load` takes for images of this kind."""
    height, width = records.sizes.max(axis=0).tolist()
    pixel = kind.channels * np.dtype(kind.dtype).itemsize + np.dtype(specs.dtype_of_labels(ignore_label)).itemsize
    return pixel * len(records) * height * width / 1e9


def load(records: Records, *, ignore_label: int, what: str = "loading") -> specs.Split:
    """Reads a split into host memory, padded to the largest height H and width W of its N images.

    RGB takes 4 * N * H * W bytes, or 5 * N * H * W with 16-bit labels.

    Args:
      records: Records of the split.
      ignore_label: Label of the padding; it decides the dtype of the labels.
      what: Text of the progress bar.

    Raises:
      RecordError: An image or a label cannot be used.
    """
    canvas = (len(records), *records.sizes.max(axis=0))
    first, _ = read(records, 0)
    images = np.zeros((*canvas, first.shape[2]), first.dtype)
    labels = np.full(canvas, ignore_label, specs.dtype_of_labels(ignore_label))

    def fill(number: int) -> None:
        height, width = records.sizes[number]
        image, label = read(records, number)
        if (image.dtype, image.shape[2]) != (first.dtype, first.shape[2]):
            raise RecordError(
                f"{records.names[number]} has {image.shape[2]} channels of {image.dtype}, and {records.names[0]} "
                f"{first.shape[2]} of {first.dtype}; all images of a split must be alike"
            )
        images[number, :height, :width], labels[number, :height, :width] = image, label

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in console.ProgressBar(what, len(records), "images").over(pool.map(fill, range(len(records)))):
            pass
    return specs.Split(images, labels, records.sizes, tuple(records.names))


class CachedRecords:
    """Records that keep decoded images in memory, up to `limit` bytes.

    Kept images are never dropped. Every image is read once per epoch, so that a cache of the most recent ones would
    drop each image just before it is read again.
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


def ahead(items: Sequence, work: Callable, *, threads: int) -> grain.IterDataset:
    """A Grain dataset of `work(item)`, in the order of the items; threads compute ahead."""
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return grain.MapDataset.source(items).map(work).to_iter_dataset(options)
