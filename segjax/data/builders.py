"""Prepares a dataset once, with TensorFlow Datasets (TFDS) but without TensorFlow; `prepared.py` reads it.

Every dataset is prepared in the same steps: its reader (`archives.py` or `folder.py`) finds the examples in the source;
they are checked, and masks from archives are converted to train ids (`masks.py`); TFDS writes them as array_record to
its data directory. One error lists everything that is wrong, and then nothing is left on disk. Images are stored byte
for byte, and so are masks of train ids.

    segjax_cityscapes/1.1.0                    one directory for each dataset of the table, see `specs.DATASETS`
    segjax_folder/<name>-<state>/1.1.0         one directory for each state of a folder, see `folder.state_of`
    segjax_<dataset>/.converting-<state>       during a preparation; one that was interrupted continues there

The first two are atomic: TFDS writes to `incomplete.*` next to them and renames it at the end.
`tfds.builder_from_directory` reads them too.
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
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segjax.data import archives, folder, masks, specs
from segjax.data.prepared import Prepared, open_prepared, quiet
from segjax.data.sources import (
    DataError,
    Example,
    Examples,
    Problems,
    counted,
    digest_of,
    fingerprint_of,
    shorten,
)
from segjax.runtime import console

StrPath = str | os.PathLike[str]
_SHARD_BYTES = 1 << 29  # so that no file is too large to copy easily
_VERSION = "1.1.0"


def prepare(
    name: str, *, source: StrPath | Sequence[StrPath] | None = None, data_dir: StrPath | None = None
) -> Prepared:
    """Opens a prepared dataset; before its first use, checks and prepares it and prints the paths on stdout.

    Args:
      name: one of `specs.prepared_names()`.
      source: path of its files, see `folder.LAYOUT` and `archives.READERS`; several paths for several archives. Only
        "folder" needs it once the dataset is prepared.
      data_dir: TFDS's data directory; None is TFDS's own default (TFDS_DATA_DIR, else ~/tensorflow_datasets).

    Returns:
      The prepared dataset; of a folder, always in its present state.

    Raises:
      DataError: another name; no source where one is needed; one with problems, which are all listed; or a dataset that
        was prepared from other files.
    """
    names = specs.prepared_names()
    if name not in names:
        raise DataError(f"no dataset '{name}' to prepare; there are {', '.join(names)}")
    dataset = specs.DATASETS[name]
    sources = [source] if isinstance(source, str | os.PathLike) else source or ()
    given = [os.fspath(path) for path in sources if path]
    if not given:
        return _prepared_before(name, dataset, data_dir)
    paths = [Path(os.path.abspath(os.path.expanduser(path))) for path in given]
    with contextlib.ExitStack() as opened:
        if dataset.spec and dataset.kind == "archives":
            return _prepare_archives(name, dataset.spec, paths, data_dir, opened)
        return _prepare_folder(name, dataset.spec, paths, given, data_dir, opened)


def _prepared_before(name: str, dataset: specs.Dataset, data_dir: StrPath | None) -> Prepared:
    needs = archives.READERS[name].needs if dataset.kind == "archives" else folder.LAYOUT
    need = f"pass --config.data.source=DIR (segjax train) or --source (segjax data prepare), where DIR holds {needs}"
    if dataset.spec is None:
        raise DataError(f"{name} needs a source: {need}")
    path = Path(_builder(name, None, data_dir).data_path)
    if not path.exists():
        splits = counted(dict(dataset.spec.splits))
        with_splits = f", with the splits {splits}" if splits else ""
        raise DataError(f"{name} is not prepared yet (nothing at {path}): {need}{with_splits}")
    return open_prepared(path)


def _prepare_folder(
    name: str,
    published: specs.DatasetSpec | None,
    paths: list[Path],
    given: Sequence[str],
    data_dir: StrPath | None,
    opened: contextlib.ExitStack,
) -> Prepared:
    if len(paths) > 1 or not paths[0].is_dir():
        raise DataError(f"{name}: {' '.join(given)} is no directory; it must be one, which holds {folder.LAYOUT}")
    (root,) = paths
    problems: Problems = collections.defaultdict(list)
    spec = folder.read_classes(root, problems)
    examples = folder.find_examples(root, problems)
    if published:
        _check_published(published, spec, examples, problems)
        spec = published
    if problems or spec is None:
        # The contents of the files are checked too, so that one report lists everything.
        scratch = masks.Scratch(Path(opened.enter_context(tempfile.TemporaryDirectory())))
        masks.convert(examples, spec, None, scratch, problems)
        raise _refusal(name, paths, problems)
    state = folder.state_of(root, examples)
    config = None if published else f"{re.sub(r'[^A-Za-z0-9_]+', '_', spec.name)[:40]}-{state}"
    # Any copy of a published dataset is the same dataset.
    fingerprint = fingerprint_of(examples, (root / "classes.json").read_bytes())
    identity = {"source": str(root), "state": state, "fingerprint": fingerprint}
    builder = _builder(name, config, data_dir)
    path = Path(builder.data_path)
    if path.exists():
        return _refuse_other_files(open_prepared(path), identity)
    return _write(builder, spec, examples, None, _scratch(builder, state), identity)


def _prepare_archives(
    name: str,
    spec: specs.DatasetSpec,
    paths: list[Path],
    data_dir: StrPath | None,
    opened: contextlib.ExitStack,
) -> Prepared:
    reader = archives.READERS[name]
    problems: Problems = collections.defaultdict(list)
    loose, packed = archives.locate(name, reader, paths, problems)
    if problems:
        raise _refusal(name, paths, problems)
    state = digest_of((str(path), path) for path in (*(path for _, path in loose), *packed))
    builder = _builder(name, None, data_dir)
    path = Path(builder.data_path)
    before = open_prepared(path) if path.exists() else None
    if before and before.metadata["state"] == state:
        return before
    scratch = _scratch(builder, state)
    examples = archives.read(spec, reader, loose, packed, scratch.make, opened, problems)
    if problems:
        scratch.remove()
        raise _refusal(name, paths, problems)
    identity = {"source": " ".join(map(str, paths)), "state": state, "fingerprint": fingerprint_of(examples)}
    if before:
        scratch.remove()
        return _refuse_other_files(before, identity)
    return _write(builder, spec, examples, reader.train_ids, scratch, identity)


def _write(
    builder,
    spec: specs.DatasetSpec,
    examples: Examples,
    train_ids: np.ndarray | None,
    scratch: masks.Scratch,
    identity: dict[str, str],
) -> Prepared:
    """Prints what is prepared, then checks, converts and writes.

    Args:
      identity: metadata about the files from which the dataset was prepared: source, state, fingerprint.
    """
    path = Path(builder.data_path)
    counts = counted({split: len(found) for split, found in examples.items()})
    # Indented lines are not wrapped, so that the paths stay whole.
    console.say(f"Preparing {spec.name}, images per split: {counts}\n  from {identity['source']}\n  to {path}")
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
        builder.examples, measured = masks.convert(examples, spec, train_ids, scratch, problems)
        if problems:
            scratch.remove()
            raise _refusal(spec.name, [identity["source"]], problems)
        builder.info.metadata.update(identity, spec=dataclasses.asdict(spec), **_metadata(examples, measured))
        # TFDS creates a directory for downloads, although there are none.
        with quiet(), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(file_format="array_record", download_dir=downloads)
    except Exception:
        # Another process that prepares the same dataset may have finished, renamed it and removed the scratch folder.
        if not path.exists():
            raise
    scratch.remove()
    for pattern in (f"incomplete.*_{path.name}", ".converting-*"):
        for left in path.parent.glob(pattern):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
    return _refuse_other_files(open_prepared(path), identity)


def _metadata(examples: Examples, measured: dict[str, list[masks.Measured]]) -> dict[str, dict[str, list]]:
    """Names, sizes and pixel counts by split, as JSON, so that no image need be decoded for them."""
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
            "source. Leave the source empty to use the prepared dataset; delete that directory to prepare it again"
        )
    return before


def _refusal(name: str, paths: Sequence[Path | str], problems: Problems) -> DataError:
    lines = [f"{name}: {' '.join(map(str, paths))} cannot be prepared, and nothing was written:"]
    for kind, entries in problems.items():
        lines += [f"- {kind}:", *(f"    {entry}" for entry in shorten(entries))]
    return DataError("\n".join(lines))


def _builder(dataset: str, config: str | None, data_dir: StrPath | None):
    if sys.platform == "win32":
        raise DataError("prepared datasets need array_record, which has no version for Windows; streets need none")
    import tensorflow_datasets as tfds

    with quiet():
        return _builder_class(dataset)(
            config=config and tfds.core.BuilderConfig(name=config),
            data_dir=data_dir and os.path.abspath(os.path.expanduser(data_dir)),
        )


def _scratch(builder, state: str) -> masks.Scratch:
    return masks.Scratch(Path(builder.data_dir_root) / builder.name / f".converting-{state}")


@functools.cache
def _builder_class(dataset: str):
    import tensorflow_datasets as tfds

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            """Does nothing: TFDS would ask a server for published statistics and leave a temporary directory."""

    # Not GeneratorBasedBuilder, whose shuffling needs TensorFlow for a split of more than 1 GB.
    class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Writes examples in their order. `_write` sets `examples` and the metadata."""

        name = f"segjax_{dataset}"
        VERSION = tfds.core.Version(_VERSION)
        url_infos = None  # nothing is downloaded; to look for it, TFDS would import importlib_resources, which it lacks
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
                size = sum(file.size for example in found for file in (example.image, example.label) if file)
                count = min(math.ceil(size / _SHARD_BYTES), len(found))
                shards = [[found[i] for i in part] for part in np.array_split(np.arange(len(found)), count)]
                iterators[split] = [
                    functools.partial(_records, shard, f"writing {split}{f' {i}/{count}' if count > 1 else ''}")
                    for i, shard in enumerate(shards, start=1)
                ]
            return iterators

    return Builder


def _records(examples: list[Example], what: str):
    for example in console.ProgressBar(what, len(examples), "images").over(examples):
        # Files that are read later, not bytes: TFDS keeps all examples of a shard in memory until it has counted them.
        yield example.name, {"image": example.image, "label": example.label, "name": os.fsencode(example.name)}


def _check_published(
    published: specs.DatasetSpec, spec: specs.DatasetSpec | None, examples: Examples, problems: Problems
) -> None:
    """Compares the classes and examples of a folder with those of the published dataset that it should contain."""
    for field in ("class_names", "colors", "ignore_label") if spec else ():
        found, expected = getattr(spec, field), getattr(published, field)
        if found != expected:
            kind = (
                f"classes.json does not have the {published.num_classes} classes of {published.name}; correct it, or "
                "prepare the data as 'folder'"
            )
            problems[kind].append(f"{field} {found} instead of {expected}")
    counts, expected = {split: len(found) for split, found in examples.items()}, dict(published.splits)
    if expected and counts != expected:
        kind = (
            f"images with a mask are not as many as in {published.name}; complete them, or prepare the data as 'folder'"
        )
        problems[kind].append(f"{counted(counts) or 'none'} instead of {counted(expected)}")
