"""Opens the splits of a dataset by its name, whether it is generated or prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from segjax.data import builders, specs, streets
from segjax.data.prepared import Prepared
from segjax.data.records import Records, padded_gigabytes
from segjax.data.sources import DataError

# (split, *, num_images, size, seed) -> specs.Split; one for each dataset of kind "generated" in `specs.DATASETS`.
GENERATORS = {"streets": streets.load}


class OpenSplit(NamedTuple):
    """One split of a dataset.

    Attributes:
      data: a `Split`, which is in memory, or `Records`, which are read from disk one by one.
      spec: classes, colours and ignore label.
      pixel_counts: () -> int64 (K,), the number of pixels of each label value; (2,) for a single class.
    """

    data: specs.Split | Records
    spec: specs.DatasetSpec
    pixel_counts: Callable[[], np.ndarray]


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
    """Opens labelled splits of a dataset; one that is not prepared yet is prepared from its source.

    Args:
      name: of the dataset, a key of `specs.DATASETS`.
      splits: names of splits; one may occur several times.
      source, data_dir: of a dataset that is prepared, see `builders.prepare`.
      resident_gb: gigabytes (1e9 bytes) of decoded, padded images that a prepared split may take to be read into
        memory.
      num_images, size: of a generated dataset: the number of images of each split, and their (height, width) in
        pixels; None selects the defaults in `specs.DATASETS`.
      seed: of a generated dataset.
      say: called with a line of text before images are generated, which takes seconds.

    Returns:
      One `OpenSplit` for each name in `splits`.

    Raises:
      DataError: an unknown dataset; a source or a dataset that cannot be used; no such split, or one whose labels are
        not published. ValueError: no such split of a generated dataset, or a number or size it cannot generate.
    """
    if name not in specs.DATASETS:
        raise DataError(f"no dataset '{name}'; there are {', '.join(specs.DATASETS)}")
    dataset = specs.DATASETS[name]
    if dataset.scenes is None or dataset.spec is None:
        return _prepared(builders.prepare(name, source=source, data_dir=data_dir), splits, resident_gb)
    scenes, spec = dataset.scenes, dataset.spec
    if num_images is None:
        num_images = [scenes.train_images if split == "train" else scenes.eval_images for split in splits]
    say(f"drawing {sum(num_images)} images of {name} ...")
    return [
        _generated(GENERATORS[name](split, num_images=number, size=size or scenes.size, seed=seed), spec)
        for split, number in zip(splits, num_images, strict=True)
    ]


def _generated(data: specs.Split, spec: specs.DatasetSpec) -> OpenSplit:
    def pixel_counts() -> np.ndarray:
        counts = [np.bincount(labels.ravel(), minlength=256) for labels in data.labels]
        return np.sum(counts, axis=0)[: len(spec.label_names)]

    return OpenSplit(data, spec, pixel_counts)


def _prepared(prepared: Prepared, splits: Sequence[str], resident_gb: float) -> list[OpenSplit]:
    # All of them first, because a split without labels is refused here, before any image is decoded.
    counts = [partial(np.array, prepared.pixel_counts(split)) for split in splits]

    def read(split: str) -> specs.Split | Records:
        records = prepared.records(split)
        return records if padded_gigabytes(records) > resident_gb else prepared.load(split)

    return [OpenSplit(read(split), prepared.spec, of) for split, of in zip(splits, counts, strict=True)]
