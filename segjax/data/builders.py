"""Prepares CamVid, and any folder of images and masks, with TensorFlow Datasets and without TensorFlow.

A source folder (`folder.py` says what it holds) is checked whole before anything is written, and one error lists
everything found. Written are the files' own bytes,
as array_record in TFDS's data directory, where `tfds.builder_from_directory` reads them too:

    segjax_camvid/1.0.0                        one place, since CamVid is one dataset
    segjax_folder/<name>-<fingerprint>/1.0.0   one place per state of a folder, see `folder.fingerprint_of`

TFDS writes to `incomplete.*` beside that place and renames at the end: what stands there is complete.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging

from segjax.data import folder, specs


class DataError(ValueError):
    """A source or a prepared dataset that cannot be used; the message lists every reason and says what to do."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset on disk, ready to be read.

    Attributes:
      spec: classes, colours and ignore label, as stored with the data.
      splits: number of images per split.
      path: the directory that TFDS wrote.
    """

    spec: specs.DatasetSpec
    splits: dict[str, int]
    path: Path

    def load(self, split: str) -> specs.Split:
        """Decodes a split into host memory: 4 * H * W bytes per image, H and W being the largest of the split.

        Args:
          split: a key of `splits`.

        Returns:
          The split, in the order of its names (file stems).

        Raises:
          DataError: there is no such split.
        """
        import tensorflow_datasets as tfds

        if split not in self.splits:
            raise DataError(f"{self.spec.name} has no split '{split}'; there are {folder.counted(self.splits)}")
        with _quiet():
            builder = tfds.builder_from_directory(self.path)
            skip = tfds.decode.SkipDecoding()
            records = builder.as_data_source(split, decoders={"image": skip, "label": skip})
        count = self.splits[split]
        height, width = builder.info.metadata["largest"][split]
        images = np.zeros((count, height, width, 3), np.uint8)
        labels = np.full((count, height, width), self.spec.ignore_label, np.uint8)
        sizes = np.zeros((count, 2), np.int32)

        def decode(i: int) -> str:
            record = records[i]
            label = folder.decode_mask(record["label"])
            h, w = sizes[i] = label.shape
            images[i, :h, :w] = folder.decode_image(record["image"])
            labels[i, :h, :w] = label
            return os.fsdecode(record["name"])

        with ThreadPoolExecutor(folder.THREADS) as pool:
            names = tuple(folder.progress(pool.map(decode, range(count)), f"loading {self.spec.name} {split}", count))
        return specs.Split(images, labels, sizes, names)


def prepare(name: str, *, source: str | None, data_dir: str | None) -> Prepared:
    """Finds a dataset prepared, or checks and prepares it and says so in one line on stdout.

    Args:
      name: "camvid" or "folder".
      source: the source folder, see the module's docstring. CamVid, once prepared, needs none.
      data_dir: TFDS's data directory; None is TFDS's own default (TFDS_DATA_DIR, else ~/tensorflow_datasets).

    Returns:
      The prepared dataset; of a folder, always in its present state.

    Raises:
      DataError: no source where one is needed, one with problems (all are listed), or CamVid prepared from other files.
    """
    if name not in ("camvid", "folder"):
        raise DataError(f"no dataset '{name}' to prepare; there are 'camvid' and 'folder'")
    if source is None:
        need = f"pass --config.data.source=DIR, where DIR holds {folder.LAYOUT}"
        if name == "folder":
            raise DataError(f"folder needs a source: {need}")
        path = Path(_builder(name, None, data_dir).data_path)
        if not path.exists():
            splits = folder.counted(dict(specs.CAMVID.splits))
            raise DataError(f"camvid is not prepared yet (nothing at {path}): {need}, with the splits {splits}")
        return _open(path)

    root = Path(source).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"{name}: --config.data.source={source} is no directory; it must hold {folder.LAYOUT}")
    problems: folder.Problems = collections.defaultdict(list)
    spec = folder.read_classes(root, problems)
    pairs = folder.find_pairs(root, problems)
    if name == "camvid":
        spec = _check_camvid(spec, pairs, problems)
    if not problems:
        fingerprint = folder.fingerprint_of(root, pairs, this_folder=name == "folder")
        label = re.sub(r"[^A-Za-z0-9_]+", "_", spec.name)[:40]
        builder = _builder(name, f"{label}-{fingerprint}" if name == "folder" else None, data_dir)
        path = Path(builder.data_path)
        if path.exists():
            return _open(path, fingerprint)
        counts = folder.counted({split: len(found) for split, found in pairs.items()})
        print(f"Preparing {spec.name}, images per split: {counts}; from {root} to {path}", flush=True)
    largest = folder.check_contents(root, spec, pairs, problems)
    if problems:
        lines = [f"{name}: {root} cannot be prepared, and nothing was written:"]
        for kind, entries in problems.items():
            lines += [f"- {kind}:", *(f"    {entry}" for entry in folder.shorten(entries))]
        raise DataError("\n".join(lines))

    builder.pairs = pairs
    builder.info.metadata.update(
        spec=dataclasses.asdict(spec), largest=largest, source=os.fspath(root), fingerprint=fingerprint
    )
    # TFDS makes directories for downloads, of which there are none.
    with _quiet(), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
        try:
            builder.download_and_prepare(file_format="array_record", download_dir=downloads)
        except OSError:
            # The rename fails where another process, started at the same time, has just finished the same.
            if not path.exists():
                raise
    return _open(path, fingerprint)


def _open(path: Path, fingerprint: str | None = None) -> Prepared:
    """Reads back what was stored with the data; with `fingerprint`, only if they were prepared from those files."""
    import tensorflow_datasets as tfds

    if not (path / "dataset_info.json").is_file():
        raise DataError(f"{path} is there but holds no complete dataset; delete it")
    with _quiet():
        info = tfds.builder_from_directory(path).info
    stored = info.metadata
    if fingerprint not in (None, stored["fingerprint"]):
        raise DataError(
            f"{path} was prepared from {stored['source']}, which held other files than the present source. Leave "
            "--config.data.source empty to use what is prepared; delete that directory to prepare it anew"
        )
    fields = stored["spec"]
    spec = specs.DatasetSpec(
        name=fields["name"],
        class_names=tuple(fields["class_names"]),
        colors=tuple(map(tuple, fields["colors"])),
        ignore_label=fields["ignore_label"],
        splits=tuple(map(tuple, fields["splits"])),
    )
    return Prepared(spec, {split: entry.num_examples for split, entry in info.splits.items()}, path)


def _builder(dataset: str, config: str | None, data_dir: str | None):
    import tensorflow_datasets as tfds

    with _quiet():
        return _builder_class(dataset)(
            config=config and tfds.core.BuilderConfig(name=config),
            data_dir=data_dir and os.path.abspath(os.path.expanduser(data_dir)),
        )


@functools.cache
def _builder_class(dataset: str):
    import tensorflow_datasets as tfds

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            """Asks no server for published statistics, and leaves no temporary directory for them."""

    # Not GeneratorBasedBuilder, whose shuffling needs TensorFlow for a split of more than 1 GB.
    class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Writes pairs in their order, one file per split. `prepare` sets `pairs` and the metadata."""

        name = f"segjax_{dataset}"
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing is downloaded; finding it out would import importlib_resources, which TFDS lacks
        pairs: folder.Pairs

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                "name": tfds.features.Text(),
            }
            metadata = tfds.core.MetadataDict()
            return Info(builder=self, features=tfds.features.FeaturesDict(features), metadata=metadata)

        def _shard_iterators_per_split(self, dl_manager):
            return {split: [functools.partial(self._examples, split)] for split in self.pairs}

        def _examples(self, split: str):
            for image, mask in folder.progress(self.pairs[split], f"writing {split}", len(self.pairs[split])):
                # Paths, not bytes: TFDS holds on to every example of a file until it has counted them.
                example = {"image": os.fspath(image), "label": os.fspath(mask), "name": os.fsencode(image.stem)}
                yield image.stem, example

    return Builder


def _check_camvid(spec: specs.DatasetSpec | None, pairs: folder.Pairs, problems: folder.Problems) -> specs.DatasetSpec:
    """Compares a folder with the published dataset, whose spec it returns."""
    for field in ("class_names", "colors", "ignore_label") if spec else ():
        ours, published = getattr(spec, field), getattr(specs.CAMVID, field)
        if ours != published:
            kind = "classes.json is not that of CamVid's 11 classes; correct it, or prepare the data as 'folder'"
            problems[kind].append(f"{field} {ours} instead of {published}")
    counts, published = {split: len(found) for split, found in pairs.items()}, dict(specs.CAMVID.splits)
    if counts != published:
        kind = "images with a mask are not as many as in CamVid; complete them, or prepare the data as 'folder'"
        problems[kind].append(f"{folder.counted(counts) or 'none'} instead of {folder.counted(published)}")
    return specs.CAMVID


@contextlib.contextmanager
def _quiet():
    """Holds back TFDS's log, among it a warning that each folder's config is not built in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
