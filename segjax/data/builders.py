"""Prepares a dataset once, with TensorFlow Datasets (TFDS) but without TensorFlow; `prepared.py` reads it.

Every dataset is prepared in the same steps. Its reader (`archives.py` or `folder.py`) finds the examples in the source.
`masks.py` checks them and converts masks from archives to train ids. TFDS writes the examples as array_record to its
data directory. One error lists everything that is wrong, and nothing is left on disk then. JPEG and PNG images and
masks of train ids are stored byte for byte; other files become PNG if readers cannot use them as they are, see
`masks.py`. Images that are not 8-bit RGB are stored as compressed arrays.

    segjax_cityscapes/1.1.0                    one directory for each dataset of the table, see `specs.DATASETS`
    segjax_folder/<name>-<state>/1.1.0         one directory for each state of a folder, see `folder.state_of`
    segjax_folder/<name>-<state>-<division>/.. the same, divided into train and val, see `division.py`
    .../1.1.0/sources.json                     states of other sources that contain the same files
    segjax_<dataset>/.converting-<state>       during a preparation; an interrupted preparation continues there
    .../.1.1.0.lock                            during a preparation; other processes wait for its holder

Dataset directories are written atomically: TFDS writes to `incomplete.*` next to them and renames it at the end.
`tfds.builder_from_directory` also reads them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segjax.data import archives, bands, contents, folder, masks, specs
from segjax.data.division import Division, divided
from segjax.data.prepared import Prepared, open_prepared, quiet
from segjax.data.sources import (
    DataError,
    Example,
    Examples,
    NoSourceError,
    Problems,
    counted,
    digest_of,
    fingerprint_of,
    listed,
    shorten,
)
from segjax.runtime import atomic, console, lock, reading
from segjax.runtime.reading import user_path

StrPath = str | os.PathLike[str]
_SHARD_BYTES = 1 << 29  # keeps files small enough to copy easily
_VERSION = "1.1.0"


def prepare(
    name: str,
    *,
    source: StrPath | Sequence[StrPath] | None = None,
    data_dir: StrPath | None = None,
    subset: bool = False,
    division: Division | None = None,
) -> Prepared:
    """Opens a prepared dataset. Before its first use, checks and prepares it, and prints the paths on stdout.

    Args:
      name: Name of the dataset, one of `specs.prepared_names()`.
      source: Path of its files, see `folder.LAYOUT` and `archives.READERS`; several paths for several archives. Once a
        dataset is prepared, only "folder" needs it.
      data_dir: TFDS's data directory; by default TFDS's own (TFDS_DATA_DIR, else ~/tensorflow_datasets).
      subset: Whether to prepare a part of a published dataset instead of refusing it.
      division: Division of the only split with labels into train and val. With None, the splits are those of the source
        or of the earlier preparation, for a folder the latest one.

    Returns:
      The prepared dataset; for a folder, always in its present state.

    Raises:
      DataError: The name is unknown; a source is missing, or has problems, which are all listed; or the dataset was
        prepared from other files, or divided differently.

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
      >>> prepared.splits
      {'train': 1}
    """
    names = specs.prepared_names()
    if name not in names:
        raise DataError(f"no dataset '{name}' to prepare; choose from {', '.join(names)}")
    dataset = specs.DATASETS[name]
    sources = [source] if isinstance(source, str | os.PathLike) else source or ()
    given = [os.fspath(path) for path in sources if path]
    if subset and dataset.spec is None:
        raise DataError(f"{name} has no published number of images, so it has no subset")
    if not given:
        return _refuse_other_division(_prepared_before(name, dataset, data_dir), division)
    paths = [Path(os.path.abspath(user_path(path))) for path in given]
    with contextlib.ExitStack() as opened:
        if dataset.spec and dataset.kind == "archives":
            prepared = _prepare_archives(name, dataset.spec, paths, data_dir, opened, subset, division)
        else:
            prepared = _prepare_folder(name, dataset.spec, paths, given, data_dir, opened, subset, division)
    if _lock_of(prepared.path).exists():
        # The lock belongs to a process that was killed just after it wrote the dataset, or that is still running.
        with contextlib.suppress(lock.HeldError), _locked(prepared.spec.name, prepared.path):
            _clear(prepared.path, prepared.metadata["state"])
    return prepared


def _prepared_before(name: str, dataset: specs.Dataset, data_dir: StrPath | None) -> Prepared:
    needs = archives.READERS[name].needs if dataset.kind == "archives" else folder.LAYOUT
    if dataset.spec is None:
        raise NoSourceError(f"{name} needs a source with {needs}")
    path = Path(_builder(name, None, data_dir).data_path)
    if not path.exists():
        splits = counted(dict(dataset.spec.splits))
        with_splits = f", with the splits {splits}" if splits else ""
        raise NoSourceError(
            f"{name} is not prepared yet (nothing at {path}); it needs a source with {needs}{with_splits}"
        )
    return open_prepared(path)


def _prepare_folder(
    name: str,
    published: specs.DatasetSpec | None,
    paths: list[Path],
    given: Sequence[str],
    data_dir: StrPath | None,
    opened: contextlib.ExitStack,
    subset: bool,
    division: Division | None,
) -> Prepared:
    if len(paths) > 1 or not paths[0].is_dir():
        raise DataError(
            f"{name}: {' '.join(given)} is not a directory; give one with {folder.LAYOUT}. If it was moved, "
            "give its new path"
        )
    (root,) = paths
    problems: Problems = collections.defaultdict(list)
    notes: list[str] = []
    spec, classes = folder.read_classes(root, problems)
    found = folder.find_examples(root, problems, notes)
    examples = divided(found, division, problems, notes) if division else found
    if published:
        _check_classes(published, spec, problems)
        path = Path(_builder(name, None, data_dir).data_path)
        # Once a subset is prepared, the name means the subset.
        subset = subset or (path.exists() and not open_prepared(path).spec.splits)
        if not subset:
            _check_numbers(published, found, problems)
        spec = _unpublished(published) if subset else published
    if problems or spec is None:
        # The files are checked too, so that one report lists everything.
        scratch = masks.Scratch(Path(opened.enter_context(tempfile.TemporaryDirectory())))
        masks.convert(examples, spec, None, scratch, problems, classes)
        raise _refusal(name, paths, problems)
    state = folder.state_of(root, found)
    # Any copy of a published dataset is the same dataset.
    fingerprint = fingerprint_of(examples, reading.read_bytes(root / "classes.json"))
    identity = {"source": str(root), "state": state, "fingerprint": fingerprint}
    if not published and (known := _of_state(name, state, division, data_dir)):
        # The folder may have been moved since; unless classes.json names it, its present path does.
        return dataclasses.replace(known, spec=dataclasses.replace(known.spec, name=spec.name))
    end = f"-{division.digest}" if division else ""
    config = None if published else f"{re.sub(r'[^A-Za-z0-9_]+', '_', spec.name)[:40]}-{state}{end}"
    builder = _builder(name, config, data_dir, label_dtype=spec.label_dtype)

    def write() -> Prepared:
        metadata = identity | _about(division)
        return _write(builder, spec, examples, None, _scratch(builder, state), metadata, notes, classes)

    if prepared := _once(builder, spec.name, write):
        return prepared
    before = _refuse_other_division(open_prepared(Path(builder.data_path)), division)
    if division is None and (kept := Division.of(before.metadata)):
        # The files are compared in the splits into which they were divided.
        examples = divided(found, kept, problems, notes)
        if problems:
            raise _refusal(name, paths, problems)
        identity["fingerprint"] = fingerprint_of(examples, reading.read_bytes(root / "classes.json"))
    return _refuse_other_files(before, identity, examples)


def _of_state(name: str, state: str, division: Division | None, data_dir: StrPath | None) -> Prepared | None:
    """The dataset that was prepared from a folder in this state with this division; None if there is none.

    Without a division, the dataset that was prepared last.
    """
    builder = _builder(name, None, data_dir)
    root = Path(builder.data_dir_root) / builder.name
    ends = [f"-{division.digest}"] if division else ["", "-*"]
    found = [path for end in ends for path in root.glob(f"*-{state}{end}/{_VERSION}") if path.parent.name[0] != "."]

    def age(path: Path) -> tuple[int, str]:
        written = path / "dataset_info.json"
        return written.stat().st_mtime_ns if written.exists() else 0, str(path)

    if not found:
        return None
    newest = max(found, key=age)
    if division:
        # Makes it the latest preparation again.
        with contextlib.suppress(OSError):
            os.utime(newest / "dataset_info.json")
    return open_prepared(newest)


def _about(division: Division | None) -> dict[str, Any]:
    """The metadata's entry about the division."""
    return {"division": dataclasses.asdict(division)} if division else {}


def _refuse_other_division(prepared: Prepared, division: Division | None) -> Prepared:
    """The prepared dataset; DataError if it was divided differently."""
    before = Division.of(prepared.metadata)
    if division and division != before:
        how = f"divided differently: {before}" if before else "not divided"
        raise DataError(
            f"{prepared.path} was {how}; omit the share for val to use it as it is, or delete that directory to divide "
            f"it again: {division}"
        )
    return prepared


def _unpublished(spec: specs.DatasetSpec) -> specs.DatasetSpec:
    """The spec of a subset, which has any number of images."""
    return dataclasses.replace(spec, splits=())


def _once(builder, name: str, write: Callable[[], Prepared]) -> Prepared | None:
    """Result of `write`, in one process at a time; None if the dataset exists, perhaps from another process."""
    path = Path(builder.data_path)
    if path.exists():
        return None
    with _waiting(name, path):
        return None if path.exists() else write()


@contextlib.contextmanager
def _waiting(name: str, path: Path) -> Iterator[None]:
    """Holds the lock of a dataset, and waits while another process holds it: a run on several hosts starts several."""
    for attempt in itertools.count():
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_locked(name, path))
            except lock.HeldError as error:
                if not attempt:
                    console.say(str(error))
                time.sleep(0.5)
                continue
            yield
            return


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _locked(name: str, path: Path) -> contextlib.AbstractContextManager[None]:
    return lock.held(_lock_of(path), what=f"{name}, {path},", remedy="this process waits until it ends")


def _clear(path: Path, state: str) -> None:
    """Removes the temporary files of this preparation, and of earlier ones that were killed."""
    # For a folder, the scratch folder is next to the directories of all states.
    left = [path.parent.with_name(f".converting-{state}"), *path.parent.glob(".converting-*")]
    for place in (*left, *path.parent.glob(f"incomplete.*_{path.name}")):
        shutil.rmtree(place, ignore_errors=True)


def _prepare_archives(
    name: str,
    spec: specs.DatasetSpec,
    paths: list[Path],
    data_dir: StrPath | None,
    opened: contextlib.ExitStack,
    subset: bool,
    division: Division | None,
) -> Prepared:
    reader = archives.READERS[name]
    problems: Problems = collections.defaultdict(list)
    skipped: list[str] = []
    loose, packed = archives.locate(name, reader, paths, problems, skipped)
    if problems:
        raise _refusal(name, paths, problems)
    state = digest_of((str(path), path) for path in (*(path for _, path in loose), *packed))
    builder = _builder(name, None, data_dir)
    path = Path(builder.data_path)
    if path.exists() and state in _known_states(before := open_prepared(path)):
        return _refuse_other_division(before, division)
    scratch = _scratch(builder, state)

    def find(division: Division | None, *, subset: bool, notes: list[str]) -> tuple[Examples, dict[str, str]]:
        examples = archives.read(
            spec, reader, loose, packed, scratch.make, opened, problems, notes=notes, subset=subset
        )
        if division and not problems:
            examples = divided(examples, division, problems, notes)
        if problems:
            scratch.remove()
            raise _refusal(name, paths, problems)
        fingerprint = fingerprint_of(examples)
        return examples, {"source": " ".join(map(str, paths)), "state": state, "fingerprint": fingerprint}

    def write() -> Prepared:
        notes = [f"links to folders that are already read, which are skipped: {listed(skipped)}"] if skipped else []
        examples, identity = find(division, subset=subset, notes=notes)
        kind, metadata = _unpublished(spec) if subset else spec, identity | _about(division)
        return _write(builder, kind, examples, reader.train_ids, scratch, metadata, notes, masks.Classes())

    if prepared := _once(builder, spec.name, write):
        return prepared
    before = _refuse_other_division(open_prepared(path), division)
    # The files are compared in the splits into which they were divided.
    with _waiting(spec.name, path):
        examples, identity = find(Division.of(before.metadata), subset=subset or not before.spec.splits, notes=[])
        try:
            return _refuse_other_files(before, identity, examples)
        finally:
            scratch.remove()


def _write(
    builder: Any,
    spec: specs.DatasetSpec,
    examples: Examples,
    train_ids: np.ndarray | None,
    scratch: masks.Scratch,
    identity: dict[str, Any],
    notes: Sequence[str],
    classes: masks.Classes,
) -> Prepared:
    """Prints the numbers and paths, then checks, converts and writes.

    Args:
      identity: Metadata about the files from which the dataset is prepared (source, state, fingerprint) and about the
        division.
      notes: Lines that are printed too.
      classes: See `masks.convert`.
    """
    path = Path(builder.data_path)
    counts = counted({split: len(found) for split, found in examples.items()})
    # Indented lines are not wrapped, so that paths stay whole.
    console.say(f"Preparing {spec.name}, images per split: {counts}\n  from {identity['source']}\n  to {path}")
    for note in notes:
        console.say(note)
    problems: Problems = collections.defaultdict(list)
    needed = sum(example.image.size for found in examples.values() for example in found)
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    if needed > free:
        scratch.remove()
        raise DataError(
            f"{path} needs at least {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, or "
            "choose another data directory"
        )
    converted = masks.convert(examples, spec, train_ids, scratch, problems, classes)
    if problems:
        scratch.remove()
        raise _refusal(spec.name, [identity["source"]], problems)
    if not converted.kind.is_rgb:
        as_rgb = '; "channels": 3 in classes.json makes them RGB' if converted.kind.channels == 1 else ""
        console.say(f"images of {converted.kind}, which are stored unchanged{as_rgb}")
        builder = _of_kind(builder, spec.label_dtype, converted.kind)
    builder.examples = converted.examples
    builder.info.metadata.update(identity, spec=dataclasses.asdict(spec), **_metadata(converted))
    with quiet(), contextlib.redirect_stdout(io.StringIO()), atomic.naming(path):
        # TFDS creates a download directory even without downloads.
        try:
            builder.download_and_prepare(file_format="array_record", download_dir=scratch.make() / "downloads")
        except DataError as error:
            # TFDS prepends a line with the name of the feature.
            raise DataError(str(error).rpartition("\n")[2]) from None
    _clear(path, identity["state"])
    return open_prepared(path)


def _metadata(converted: masks.Converted) -> dict[str, Any]:
    """Kind, statistics, names, sizes, hashes and pixel counts per split, as JSON; reading them decodes no image."""
    moments = {split: _moments(found) for split, found in converted.measured.items() if found}
    return {
        "images": {
            "channels": converted.kind.channels,
            "dtype": converted.kind.dtype,
            "moments": {split: {"pixels": number, "of": of} for split, (number, of) in moments.items()},
        },
        "names": {split: [example.name for example in found] for split, found in converted.examples.items()},
        "sizes": {split: [list(each.size) for each in found] for split, found in converted.measured.items()},
        "hashes": {split: [list(each.hashes) for each in found] for split, found in converted.measured.items()},
        "pixels": converted.pixels,
    }


def _moments(found: Sequence[masks.Measured]) -> bands.Moments:
    """Moments of all pixels of a split."""
    return functools.reduce(bands.merged, (bands.Moments(math.prod(each.size), each.moments) for each in found))


def _known_states(prepared: Prepared) -> list[str]:
    """States of all sources that are known to contain the files of a prepared dataset."""
    path, states = prepared.path / "sources.json", [prepared.metadata["state"]]
    # If sources.json is damaged, the files are read once more.
    with contextlib.suppress(FileNotFoundError, reading.UnreadableError):
        states += reading.read_json(path, list[str])
    return states


def _refuse_other_files(before: Prepared, identity: dict[str, str], examples: Examples) -> Prepared:
    """The prepared dataset; DataError if it was prepared from other examples.

    Contents are hashed once per state of a source; sources.json then keeps the state.
    """
    changed = []
    if before.metadata["fingerprint"] == identity["fingerprint"]:
        known, state = _known_states(before), identity["state"]
        stored = contents.contents_of(before, examples)
        if stored is None or state in known:
            return before
        changed = contents.differences(stored, masks.contents_of(examples))
        if not changed:
            # If the folder cannot be written, the files are read again next time.
            with contextlib.suppress(OSError):
                atomic.write_text(before.path / "sources.json", json.dumps([*known[1:], state]) + "\n")
            return before
    raise DataError(
        f"{before.path} was prepared from {before.metadata['source']}, which held other files than the source now"
        + (":\n" + contents.listed_differences(changed) + "\n" if changed else ". ")
        + "Leave the source empty to use the prepared dataset; delete that directory to prepare it again"
    )


def _refusal(name: str, paths: Sequence[Path | str], problems: Problems) -> DataError:
    lines = [f"{name}: {' '.join(map(str, paths))} cannot be prepared, and nothing was written:"]
    for kind, entries in problems.items():
        lines += [f"- {kind}:", *(f"    {entry}" for entry in shorten(entries))]
    return DataError("\n".join(lines))


def _builder(dataset: str, config: str | None, data_dir: StrPath | None, *, label_dtype: type[np.generic] = np.uint8):
    if sys.platform == "win32":
        raise DataError("prepared datasets need array_record, which has no version for Windows; streets need none")
    import tensorflow_datasets as tfds

    with quiet():
        return _builder_class(dataset, label_dtype)(
            config=config and tfds.core.BuilderConfig(name=config),
            data_dir=data_dir and os.path.abspath(user_path(data_dir)),
        )


def _of_kind(builder: Any, label_dtype: type[np.generic], kind: specs.ImageKind):
    """A builder of the same dataset that stores arrays instead of image files."""
    name = builder.name.removeprefix("segjax_")
    with quiet():
        return _builder_class(name, label_dtype, kind)(config=builder.builder_config, data_dir=builder.data_dir_root)


def _scratch(builder, state: str) -> masks.Scratch:
    return masks.Scratch(Path(builder.data_dir_root) / builder.name / f".converting-{state}")


@functools.cache
def _builder_class(dataset: str, label_dtype: type[np.generic], kind: specs.ImageKind = specs.RGB):
    import tensorflow_datasets as tfds

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self):
            """Does nothing: TFDS would ask a server for published statistics and leave a temporary directory."""

    # Not GeneratorBasedBuilder, which needs TensorFlow to shuffle a split of more than 1 GB.
    class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Writes examples in their order. `_write` sets `examples` and the metadata."""

        name = f"segjax_{dataset}"
        VERSION = tfds.core.Version(_VERSION)
        url_infos = None  # no downloads; to look for them, TFDS would import importlib_resources, which it lacks
        examples: Examples

        def _info(self):
            shape = (None, None, kind.channels)
            array = tfds.features.Tensor(shape=shape, dtype=np.dtype(kind.dtype).type, encoding="zlib")
            features = {
                "image": tfds.features.Image(shape=shape) if kind.is_rgb else array,
                "label": tfds.features.Image(shape=(None, None, 1), dtype=label_dtype, encoding_format="png"),
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
        # Lazy files instead of bytes, because TFDS holds all examples of a shard in memory to count them.
        yield example.name, {"image": example.image, "label": example.label, "name": os.fsencode(example.name)}


def _check_classes(published: specs.DatasetSpec, spec: specs.DatasetSpec | None, problems: Problems) -> None:
    """Compares the classes of a folder with those of the published dataset."""
    for field in ("class_names", "colors", "ignore_label") if spec else ():
        found, expected = getattr(spec, field), getattr(published, field)
        if found != expected:
            kind = (
                f"classes.json does not have the {published.num_classes} classes of {published.name}; correct it, or "
                "prepare the data as 'folder'"
            )
            problems[kind].append(f"{field} {found} instead of {expected}")


def _check_numbers(published: specs.DatasetSpec, examples: Examples, problems: Problems) -> None:
    """Compares the numbers of images of a folder with those of the published dataset."""
    counts, expected = {split: len(found) for split, found in examples.items()}, dict(published.splits)
    if expected and counts != expected:
        kind = (
            f"numbers of images with a mask differ from those of {published.name}; complete them, prepare the "
            f"available part with `segjax data prepare {published.name} --subset`, or prepare the data as 'folder'"
        )
        problems[kind].append(f"{counted(counts) or 'none'} instead of {counted(expected)}")
