"""Prepares datasets with TensorFlow Datasets and without TensorFlow.

Every dataset takes one way: its source (`published.py`, `folder.py`) -> examples -> checked, and published masks
converted to train ids (`conversion.py`) -> array_record in TFDS's data directory. One error lists everything found
wrong, and then nothing is left behind. Images keep their own bytes, and so do masks of train ids.

    segjax_cityscapes/1.1.0                    one place for each published dataset
    segjax_folder/<name>-<state>/1.1.0         one place per state of a folder, see `folder.state_of`
    segjax_<dataset>/.converting-<state>       while a preparation is under way; an interrupted one goes on there

TFDS writes to `incomplete.*` beside the first two and renames at the end: what stands there is complete, and
`tfds.builder_from_directory` reads it too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segjax.data import conversion, folder, published, specs
from segjax.data.prepared import Prepared, open_prepared, quiet
from segjax.data.sources import (
    DataError,
    Example,
    Examples,
    Problems,
    counted,
    digest_of,
    fingerprint_of,
    progress,
    shorten,
)

DATASETS = ("camvid", *published.PUBLISHED, "folder")
_SHARD_BYTES = 1 << 29  # so that no file is too large to copy at ease
_VERSION = "1.1.0"


def prepare(name: str, *, source: str | Sequence[str] | None, data_dir: str | None) -> Prepared:
    """Finds a dataset prepared, or checks and prepares it and says so in one line on stdout.

    Args:
      name: one of `DATASETS`.
      source: where its files are, see `folder.LAYOUT` and `published.PUBLISHED`; several paths where it comes in
        several archives. A published dataset, once prepared, needs none.
      data_dir: TFDS's data directory; None is TFDS's own default (TFDS_DATA_DIR, else ~/tensorflow_datasets).

    Returns:
      The prepared dataset; of a folder, always in its present state.

    Raises:
      DataError: no source where one is needed, one with problems (all are listed), or a published dataset that was
        prepared from other files.
    """
    if name not in DATASETS:
        raise DataError(f"no dataset '{name}' to prepare; there are {', '.join(DATASETS)}")
    needs = published.PUBLISHED[name].needs if name in published.PUBLISHED else folder.LAYOUT
    given = [] if source is None else [source] if isinstance(source, str) else list(source)
    if not given:
        return _prepared_before(name, needs, data_dir)
    paths = [Path(os.path.abspath(os.path.expanduser(path))) for path in given]
    with contextlib.ExitStack() as opened:
        if name in published.PUBLISHED:
            return _prepare_published(name, paths, data_dir, opened)
        return _prepare_folder(name, paths, given, data_dir, opened)


def _prepared_before(name: str, needs: str, data_dir: str | None) -> Prepared:
    need = f"pass --config.data.source=DIR (train.py) or --source (segjax.data), where DIR holds {needs}"
    if name == "folder":
        raise DataError(f"folder needs a source: {need}")
    path = Path(_builder(name, None, data_dir).data_path)
    if not path.exists():
        spec = published.PUBLISHED[name].spec if name in published.PUBLISHED else specs.CAMVID
        splits = counted(dict(spec.splits))
        raise DataError(f"{name} is not prepared yet (nothing at {path}): {need}, with the splits {splits}")
    return open_prepared(path)


def _prepare_folder(
    name: str, paths: list[Path], given: Sequence[str], data_dir: str | None, opened: contextlib.ExitStack
) -> Prepared:
    if len(paths) > 1 or not paths[0].is_dir():
        raise DataError(f"{name}: {' '.join(given)} is no directory; it must be one, which holds {folder.LAYOUT}")
    (root,) = paths
    problems: Problems = collections.defaultdict(list)
    spec = folder.read_classes(root, problems)
    examples = folder.find_examples(root, problems)
    if name == "camvid":
        spec = _check_camvid(spec, examples, problems)
    if problems:
        # All that is wrong goes into one report, the contents of the files too.
        scratch = conversion.Scratch(Path(opened.enter_context(tempfile.TemporaryDirectory())))
        conversion.convert(examples, spec, None, scratch, problems)
        raise _refusal(name, paths, problems)
    state = folder.state_of(root, examples)
    config = f"{re.sub(r'[^A-Za-z0-9_]+', '_', spec.name)[:40]}-{state}" if name == "folder" else None
    # Of CamVid any copy will do.
    fingerprint = fingerprint_of(examples, (root / "classes.json").read_bytes())
    identity = {"source": str(root), "state": state, "fingerprint": fingerprint}
    builder = _builder(name, config, data_dir)
    path = Path(builder.data_path)
    if path.exists():
        return _refuse_other_files(open_prepared(path), identity)
    return _write(builder, spec, examples, None, _scratch(builder, state), identity)


def _prepare_published(name: str, paths: list[Path], data_dir: str | None, opened: contextlib.ExitStack) -> Prepared:
    dataset = published.PUBLISHED[name]
    problems: Problems = collections.defaultdict(list)
    loose, archives = published.locate(dataset, paths, problems)
    if problems:
        raise _refusal(name, paths, problems)
    state = digest_of((str(path), path) for path in (*(path for _, path in loose), *archives))
    builder = _builder(name, None, data_dir)
    path = Path(builder.data_path)
    before = open_prepared(path) if path.exists() else None
    if before and before.metadata["state"] == state:
        return before
    scratch = _scratch(builder, state)
    examples = published.read(dataset, loose, archives, scratch.make, opened, problems)
    if problems:
        scratch.remove()
        raise _refusal(name, paths, problems)
    identity = {"source": " ".join(map(str, paths)), "state": state, "fingerprint": fingerprint_of(examples)}
    if before:
        scratch.remove()
        return _refuse_other_files(before, identity)
    return _write(builder, dataset.spec, examples, dataset.train_ids, scratch, identity)


def _write(
    builder,
    spec: specs.DatasetSpec,
    examples: Examples,
    train_ids: np.ndarray | None,
    scratch: conversion.Scratch,
    identity: dict[str, str],
) -> Prepared:
    """Checks, converts and writes, and says what it does."""
    path = Path(builder.data_path)
    counts = counted({split: len(found) for split, found in examples.items()})
    print(f"Preparing {spec.name}, images per split: {counts}; from {identity['source']} to {path}", flush=True)
    problems: Problems = collections.defaultdict(list)
    needed = sum(example.image.size for found in examples.values() for example in found)
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if needed > free:
        scratch.remove()
        raise DataError(
            f"{path} needs at least {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, or "
            "choose another data directory"
        )
    try:
        builder.examples, measured = conversion.convert(examples, spec, train_ids, scratch, problems)
        if problems:
            scratch.remove()
            raise _refusal(spec.name, [identity["source"]], problems)
        builder.info.metadata.update(identity, spec=dataclasses.asdict(spec), **_metadata(examples, measured))
        # TFDS makes directories for downloads, of which there are none.
        with quiet(), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(file_format="array_record", download_dir=downloads)
    except Exception:
        # Another process, started at the same time, may have finished the same, renamed it and cleared up.
        if not path.exists():
            raise
    scratch.remove()
    for pattern in (f"incomplete.*_{path.name}", ".converting-*"):
        for left in path.parent.glob(pattern):  # by processes that were killed
            shutil.rmtree(left, ignore_errors=True)
    return _refuse_other_files(open_prepared(path), identity)


def _metadata(examples: Examples, measured: dict[str, list[conversion.Measured]]) -> dict[str, dict[str, list]]:
    """What is known of each split without decoding it, as JSON has it."""
    return {
        "names": {split: [example.name for example in found] for split, found in examples.items()},
        "sizes": {split: [list(each.size) for each in found] for split, found in measured.items()},
        "pixels": {
            split: np.sum([each.pixels for each in found], axis=0).tolist()
            for split, found in measured.items()
            if all(each.pixels for each in found)
        },
    }


def _refuse_other_files(before: Prepared, identity: dict[str, str]) -> Prepared:
    if before.metadata["fingerprint"] != identity["fingerprint"]:
        raise DataError(
            f"{before.path} was prepared from {before.metadata['source']}, which held other files than the present "
            "source. Leave --config.data.source empty to use what is prepared; delete that directory to prepare it anew"
        )
    return before


def _refusal(name: str, paths: Sequence[Path | str], problems: Problems) -> DataError:
    lines = [f"{name}: {' '.join(map(str, paths))} cannot be prepared, and nothing was written:"]
    for kind, entries in problems.items():
        lines += [f"- {kind}:", *(f"    {entry}" for entry in shorten(entries))]
    return DataError("\n".join(lines))


def _builder(dataset: str, config: str | None, data_dir: str | None):
    import tensorflow_datasets as tfds

    with quiet():
        return _builder_class(dataset)(
            config=config and tfds.core.BuilderConfig(name=config),
            data_dir=data_dir and os.path.abspath(os.path.expanduser(data_dir)),
        )


def _scratch(builder, state: str) -> conversion.Scratch:
    return conversion.Scratch(Path(builder.data_dir_root) / builder.name / f".converting-{state}")


@functools.cache
def _builder_class(dataset: str):
    import tensorflow_datasets as tfds

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            """Asks no server for published statistics, and leaves no temporary directory for them."""

    # Not GeneratorBasedBuilder, whose shuffling needs TensorFlow for a split of more than 1 GB.
    class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Writes examples in their order. `_write` sets `examples` and the metadata."""

        name = f"segjax_{dataset}"
        VERSION = tfds.core.Version(_VERSION)
        url_infos = None  # nothing is downloaded; finding it out would import importlib_resources, which TFDS lacks
        examples: Examples

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                "name": tfds.features.Text(),
            }
            metadata = tfds.core.MetadataDict()
            return Info(builder=self, features=tfds.features.FeaturesDict(features), metadata=metadata)

        def _shard_iterators_per_split(self, dl_manager):
            iterators = {}
            for split, found in self.examples.items():
                size = sum(example.image.size + example.label.size for example in found)
                count = min(math.ceil(size / _SHARD_BYTES), len(found))
                shards = [[found[i] for i in part] for part in np.array_split(np.arange(len(found)), count)]
                iterators[split] = [
                    functools.partial(_records, shard, f"writing {split}{f' {i}/{count}' if count > 1 else ''}")
                    for i, shard in enumerate(shards, start=1)
                ]
            return iterators

    return Builder


def _records(examples: list[Example], what: str):
    for example in progress(examples, what, len(examples)):
        # Files to be read, not bytes: TFDS holds on to every example of a shard until it has counted them.
        yield example.name, {"image": example.image, "label": example.label, "name": os.fsencode(example.name)}


def _check_camvid(spec: specs.DatasetSpec | None, examples: Examples, problems: Problems) -> specs.DatasetSpec:
    """Compares a folder with the published dataset, whose spec it returns."""
    for field in ("class_names", "colors", "ignore_label") if spec else ():
        ours, published_one = getattr(spec, field), getattr(specs.CAMVID, field)
        if ours != published_one:
            kind = "classes.json is not that of CamVid's 11 classes; correct it, or prepare the data as 'folder'"
            problems[kind].append(f"{field} {ours} instead of {published_one}")
    counts, expected = {split: len(found) for split, found in examples.items()}, dict(specs.CAMVID.splits)
    if counts != expected:
        kind = "images with a mask are not as many as in CamVid; complete them, or prepare the data as 'folder'"
        problems[kind].append(f"{counted(counts) or 'none'} instead of {counted(expected)}")
    return specs.CAMVID
