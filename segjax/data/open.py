"""Opens the splits of a dataset by its name, whether it is generated or prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from segjax.data import builders, specs, streets
from segjax.data.prepared import Prepared
from segjax.data.records import Records, padded_gigabytes, parts_of
from segjax.data.sources import DataError

# (split, *, num_images, size, seed) -> specs.Split, for each dataset of kind "generated" in `specs.DATASETS`.
GENERATORS = {"streets": streets.load}


class OpenSplit(NamedTuple):
    """One split of a dataset.

    Attributes:
      data: A `Split` in memory, or `Records` that are read from disk one by one.
      spec: Classes, colours and ignore label.
      pixel_counts: () -> number of pixels of each label value, int64 (K,); (2,) for a single class.
      prepared: The prepared dataset of the split; None for a generated one.
      kind: Channels and dtype of the images, if they are read from disk.

    Example:
      >>> from segjax import data
      >>> (opened,) = data.open_splits("streets", ["val"], num_images=[2], size=(40, 64))
      >>> opened.pixel_counts().shape == (opened.spec.num_classes,)
      True
    """

    data: specs.Split | Records
    spec: specs.DatasetSpec
    pixel_counts: Callable[[], np.ndarray]
    prepared: Prepared | None = None
    kind: specs.ImageKind = specs.RGB

    @property
    def image_kind(self) -> specs.ImageKind:
        """Channels and dtype of the images."""
        if isinstance(self.data, specs.Split):
            return specs.ImageKind(self.data.images.shape[-1], self.data.images.dtype.name)
        return self.kind


def open_splits(
    name: str,
    splits: Sequence[str],
    *,
    source: builders.StrPath | Sequence[builders.StrPath] | None = None,
    data_dir: builders.StrPath | None = None,
    resident_gb: float = 0.0,
    num_images: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[OpenSplit]:
    """Opens labelled splits of a dataset. A dataset that is not prepared yet is prepared from its source.

    Args:
      name: Name of the dataset, a key of `specs.DATASETS`.
      splits: Names of splits, or sums of them such as "train+val"; a name may occur several times. The images of a sum
        are named SPLIT_NAME.
      source, data_dir: Arguments of `builders.prepare`, for a prepared dataset.
      resident_gb: Limit in gigabytes (1e9 bytes) of decoded, padded images, up to which a prepared split is read into
        memory.
      num_images: Number of images of each split of a generated dataset, for a sum of each of its parts; by default as
        in `specs.DATASETS`.
      size: (height, width) of generated images in pixels; by default as in `specs.DATASETS`.
      seed: Seed of a generated dataset.
      say: Function that receives a line of text before images are generated, which takes seconds.

    Returns:
      One `OpenSplit` for each name in `splits`.

    Raises:
      DataError: The dataset is unknown; the source or the dataset cannot be used; or a split does not exist, or has no
        published labels.
      ValueError: A generated dataset has no such split, or cannot generate the number or size of images.

    Example:
      >>> from segjax import data
      >>> train, val = data.open_splits("streets", ["train", "val"], num_images=[3, 2], size=(40, 64))
      >>> train.data.images.shape, val.data.images.shape
      ((3, 40, 64, 3), (2, 40, 64, 3))
    """
    if name not in specs.DATASETS:
        raise DataError(f"no dataset '{name}'; the datasets are {', '.join(specs.DATASETS)}")
    dataset = specs.DATASETS[name]
    if dataset.scenes is None or dataset.spec is None:
        prepared = builders.prepare(name, source=source, data_dir=data_dir)
        return open_prepared_splits(prepared, splits, resident_gb)
    scenes, spec = dataset.scenes, dataset.spec
    sums = [parts_of(split) for split in splits]
    if num_images is None:
        num_images = [scenes.train_images if parts[0] == "train" else scenes.eval_images for parts in sums]
    total = sum(number * len(parts) for number, parts in zip(num_images, sums, strict=True))
    say(f"drawing {total} images of {name} ...")
    return [
        _generated(_drawn(name, parts, num_images=number, size=size or scenes.size, seed=seed), spec)
        for parts, number in zip(sums, num_images, strict=True)
    ]


def shared_splits(one: str, other: str) -> str:
    """The splits that two sums of splits share, as text; "" for none."""
    return " and ".join(part for part in parts_of(one) if part in parts_of(other))


def _drawn(name: str, parts: Sequence[str], **how: Any) -> specs.Split:
    """A generated split, or the sum of several."""
    drawn = {part: GENERATORS[name](part, **how) for part in parts}
    if len(drawn) == 1:
        return drawn[parts[0]]
    images, labels, sizes = (np.concatenate([data[field] for data in drawn.values()]) for field in range(3))
    names = tuple(f"{part}_{name}" for part, data in drawn.items() for name in data.names)
    return specs.Split(images, labels, sizes, names)


def _generated(data: specs.Split, spec: specs.DatasetSpec) -> OpenSplit:
    def pixel_counts() -> np.ndarray:
        counts = [np.bincount(labels.ravel(), minlength=spec.ignore_label + 1) for labels in data.labels]
        return np.sum(counts, axis=0)[: len(spec.label_names)]

    return OpenSplit(data, spec, pixel_counts)


def open_prepared_splits(prepared: Prepared, splits: Sequence[str], resident_gb: float = 0.0) -> list[OpenSplit]:
    """`open_splits` for a dataset that is prepared already."""
    # All counts come first, because they refuse a split without labels, before any image is decoded.
    counts = [partial(np.array, prepared.pixel_counts(split)) for split in splits]

    def read(split: str) -> specs.Split | Records:
        records = prepared.records(split)
        return (
            records
            if padded_gigabytes(records, ignore_label=prepared.spec.ignore_label, kind=prepared.kind) > resident_gb
            else prepared.load(split)
        )

    return [
        OpenSplit(read(split), prepared.spec, of, prepared, prepared.kind)
        for split, of in zip(splits, counts, strict=True)
    ]
