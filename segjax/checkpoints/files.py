"""Reads checkpoints: `.pth`, `.safetensors`, `.npz`, orbax folders, folders of transformers and peft, Hub repositories.

The content decides the kind. `segjax.checkpoints.save` writes checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from segjax.checkpoints import adapters, downloads, foreign, huggingface, metadata, orbax_folder, pickled, published
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError, shorten
from segjax.checkpoints.format_version import refuse_newer
from segjax.checkpoints.selection import as_array, as_arrays
from segjax.checkpoints.soundness import tensors_hash
from segjax.checkpoints.state_dict import logger
from segjax.runtime.reading import UnreadableError, checked, open_regular, parse_json, stated

# Metadata that describe the weights of a base, not those that an adapter changes.
_OF_WEIGHTS = ("sha256", "step", "mean_iou", "temperature")
# Key of segjax's metadata in the header of a `.safetensors`; and key of the tensors' hash in this metadata.
METADATA, TENSORS_HASH = "segjax", "xxh3_128_tensors"


def read_checkpoint(source: str | Path, *, weights: str | None = None) -> Checkpoint:
    """Reads weights and metadata.

    Args:
      source: A `.pth`, `.safetensors` or `.npz`; an orbax folder or the folder of a run; a folder of transformers, of
        its Trainer, of a peft adapter, or with a single checkpoint file; the address hf:owner/name[@revision] of a
        repository; or the name of published weights.
      weights: Set of weights to read from a checkpoint with several, one of `key_maps.WEIGHT_SETS`; by default the raw
        weights.

    Raises:
      CheckpointError: There is no checkpoint, it is damaged or of a newer format, or it holds a student and a teacher
        and `weights` names neither; the message has the remedy.
    """
    try:
        return _read(source, weights)
    except UnreadableError as error:
        raise CheckpointError(str(error)) from None


def _read(source: str | Path, weights: str | None, adapters_of_it: tuple[str, ...] = ()) -> Checkpoint:
    found = _located(source)
    # Not Path.resolve, which raises an error for a link to itself.
    if os.path.realpath(found.place) in adapters_of_it:
        raise CheckpointError(f"{source}: it is its own base; set base_model_name_or_path to the model it started from")
    if found.kind == "orbax":
        (folder,) = found.paths
        if weights is not None:
            raise CheckpointError(f"{folder}: an orbax folder holds one set of weights; omit --weights {weights}")
        return Checkpoint(*orbax_folder.load_weights(folder), found.name, (folder,), is_orbax=True)
    if found.kind == "adapter":
        return _read_adapter(found, weights, adapters_of_it)
    row = published.find(source)
    with contextlib.ExitStack() as opened_files:
        if found.kind == "transformers":
            stored, known = _read_folder(found, opened_files)
        else:
            stored, known = _read_file(found.place, opened_files)
        try:
            arrays = as_arrays(stored, weights=weights)
            known = metadata.of_mmseg(stored, arrays) | known
            adapters.refuse_unmerged(arrays)
        except CheckpointError as error:
            raise CheckpointError(f"{found.place}: {error}") from None
    if row is not None:
        known = metadata.with_published(known, row)
    return Checkpoint(arrays, known, found.name, found.paths, chosen=weights)


def provenance_at(source: str | Path, *, weights: str | None = None) -> dict[str, Any]:
    """`Checkpoint.provenance` of a checkpoint, without loading its weights."""
    found = _located(source)
    if found.kind != "orbax":
        return Checkpoint({}, {}, found.name, found.paths, chosen=weights).provenance
    known = orbax_folder.read_metadata(found.paths[0])
    return Checkpoint({}, known, found.name, found.paths, is_orbax=True).provenance


# ------------------------------------------------------------------------------------------------------ the location

# Suffixes of checkpoint files in a folder.
_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".tar", ".npz", ".pkl")
_OF_TRAINER = re.compile(r"checkpoint-(\d+)")
# First bytes of pickles: of protocol 2 and later; and of protocols 0 and 1 for a dict, list, tuple or object.
_PICKLE = re.compile(rb"\x80|\(+[dl]p\d|\(*[]}]q|\(*c(__builtin__|copy_reg|collections|\w+\.[\w.]+)\n\w+\n")


@dataclasses.dataclass(frozen=True)
class _Located:
    """The checkpoint at a path or address.

    Attributes:
      kind: "file", "orbax", "transformers" or "adapter".
      place: Path of the file or folder.
      name: Name of the file or folder, or address with the commit.
      paths: Files of the weights, or the orbax folder.
    """

    kind: str
    place: Path
    name: str
    paths: tuple[Path, ...]


def _located(source: str | Path) -> _Located:
    """Finds the checkpoint at a path or address. Raises CheckpointError if there is none, or more than one."""
    row = published.find(source)
    place, name = huggingface.fetched(source) if row is None else downloads.fetched(row)
    if not place.is_dir():
        if place.name.endswith(huggingface.INDEX):
            # An index of several weight files means its folder.
            return _Located("transformers", place.parent, place.parent.name, tuple(huggingface.parts_of(place)))
        return _Located("file", place, name, (place,))
    return _in_folder(place, name)


def _in_folder(folder: Path, name: str) -> _Located:
    if adapters.is_folder(folder):
        return _Located("adapter", folder, name, (adapters.weight_file(folder),))
    if huggingface.has_weights(folder):
        return _Located("transformers", folder, name, tuple(huggingface.weight_files(folder)))
    if (orbax := orbax_folder.found_in(folder)) is not None:
        return _Located("orbax", folder, name, (orbax,))
    saved = {int(match[1]): child for child in folder.iterdir() if (match := _OF_TRAINER.fullmatch(child.name))}
    if saved := {step: child for step, child in saved.items() if child.is_dir()}:
        # The output folder of transformers' Trainer.
        newest = saved[max(saved)]
        logger.info("reads %s, the newest of %d in %s", newest.name, len(saved), folder)
        return _in_folder(newest, f"{name}/{newest.name}")
    if kind := foreign.folder_kind(folder):
        raise CheckpointError(f"{folder}: {kind}")
    files = sorted(child for child in folder.iterdir() if child.suffix in _SUFFIXES and child.is_file())
    if len(files) == 1:
        logger.info("reads %s, the only checkpoint in %s", files[0].name, folder)
        return _Located("file", files[0], f"{name}/{files[0].name}", (files[0],))
    if files:
        names = shorten((file.name for file in files), most=6)
        raise CheckpointError(f"{folder}: it holds several checkpoints; give one of {names}")
    if huggingface.is_folder(folder):
        huggingface.weight_files(folder)
    below = sorted(path.relative_to(folder) for path in folder.glob("*/*") if path.suffix in _SUFFIXES)
    if below:
        raise CheckpointError(
            f"{folder}: no checkpoint in this folder, but below it; give one of {shorten(map(str, below), most=6)}"
        )
    raise CheckpointError(
        f"{folder}: no checkpoint of segjax in this folder (neither `{orbax_folder.METADATA}` nor numbered steps), and "
        f"no other: {shorten(f'*{suffix}' for suffix in _SUFFIXES)}, checkpoint-N, config.json"
    )


# ------------------------------------------------------------------------------------------------- folders and files


def _read_folder(found: _Located, opened_files: contextlib.ExitStack) -> tuple[Mapping, dict[str, Any]]:
    """Reads a folder of transformers, with weights in one or several files."""
    known, notes = huggingface.metadata_of(found.place)
    arrays: dict = {}
    for path in found.paths:
        part, in_file = _read_file(path, opened_files)
        if twice := [key for key in part if key in arrays]:
            raise CheckpointError(f"{path}: an earlier part has {shorten(twice, most=6)}, too; fetch the folder again")
        arrays |= part
        # segjax's own metadata is more complete than config.json.
        known |= in_file
    if "dataset" in known:
        known.pop(metadata.NUMBERED_NAMES, None)
    for note in notes if "name" not in known.get("model", {}) else ():
        logger.info("%s", note)
    indexed = huggingface.keys_of_shards(found.place)
    if indexed is not None and (missing := sorted(indexed - arrays.keys())):
        raise CheckpointError(f"{found.place}: its index names keys that no part has: {shorten(missing, most=6)}")
    return arrays, known


def _read_adapter(found: _Located, weights: str | None, adapters_of_it: tuple[str, ...]) -> Checkpoint:
    """Reads a LoRA adapter and merges it into its base.

    Args:
      found: Place of the adapter.
      weights: As for `read_checkpoint`.
      adapters_of_it: Folders of the adapters whose base it is itself.
    """
    folder = found.place
    config = adapters.read_config(folder)
    base = adapters.base_of(folder, config)
    with contextlib.ExitStack() as opened_files:
        stored, own = _read_file(found.paths[0], opened_files)
        adapter = {key: as_array(key, value) for key, value in stored.items()}
    logger.info("merges the LoRA adapter %s into its base, %s", found.name, base)
    # The set of weights that segjax's own adapter was trained on.
    initial = own.get("provenance", {}).get("initial_weights") or {}
    of_base = weights or initial.get("weights")
    try:
        before = _read(base, of_base, (*adapters_of_it, os.path.realpath(folder)))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: an adapter, whose base cannot be read: {error}") from None
    if "sha256" in initial and initial["sha256"] != provenance_at(base, weights=of_base).get("sha256"):
        logger.warning("the base %s is not the file that the adapter %s was trained on", base, found.name)
    unchanged = before.recognised.renamed_like(adapters.changed_names(adapter), before.state_dict)
    try:
        arrays = adapters.merged(adapter, unchanged, config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    # Of the merged model, not of its base.
    known = {key: value for key, value in before.metadata.items() if key not in _OF_WEIGHTS}
    known |= huggingface.metadata_of(folder)[0] | own
    # The metadata of an orbax folder has the hash of its arrays.
    files = map(orbax_folder.metadata_file, before.paths) if before.is_orbax else before.paths
    return Checkpoint(arrays, known, found.name, (*found.paths, *files), chosen=weights)


def _read_file(source: Path, opened_files: contextlib.ExitStack) -> tuple[Mapping, dict[str, Any]]:
    """The stored content of a file, and segjax's metadata.

    Tensors of a `.pth` are read later; its file stays open until `opened_files` is closed.
    """
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file{published.hint_for(source)}")
    with open_regular(source) as file:
        head = file.read(512)
        names = _members(file) if head[:2] == b"PK" else None
    size = source.stat().st_size
    if not head:
        raise CheckpointError(f"{source}: the file is empty; fetch it again")
    if size > 8 and 2 <= struct.unpack("<Q", head[:8])[0] <= max(size, 100_000_000) and head[8:9] == b"{":
        return _read_safetensors(source)
    if names and all(name.endswith(".npy") for name in names):
        return _read_npz(source), {}
    if kind := foreign.zip_kind(names) if names else foreign.file_kind(source, head):
        raise CheckpointError(f"{source}: {kind}")
    if head[:2] == b"PK" or _PICKLE.match(head):
        stored = opened_files.enter_context(pickled.opened(source))
        if isinstance(stored, list | tuple):
            # For example, weights and an epoch.
            stored = {str(number): value for number, value in enumerate(stored)}
        return stored if isinstance(stored, Mapping) else {"content": stored}, {}
    kind = "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "binary"
    hint = " (a web page about a failed download?)" if kind == "text" else ""
    raise CheckpointError(
        f"{source}: neither a PyTorch checkpoint, nor safetensors, nor an orbax folder; it begins with "
        f"{head[:24]!r}, which is {kind}{hint}"
    )


def _members(file: BinaryIO) -> list[str] | None:
    """Names of the members of a zip; None if it is damaged."""
    try:
        return zipfile.ZipFile(file).namelist()
    except Exception:
        # A damaged directory can raise any error; the reader of `.pth` has the message for it.
        return None


def _read_npz(source: Path) -> dict[str, np.ndarray]:
    with open_regular(source) as file, zipfile.ZipFile(file) as archive:
        pickled.refuse_odd_zip(source, archive)
        found: dict[str, np.ndarray] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            try:
                with archive.open(member) as stream:
                    found[name] = np.lib.format.read_array(cast(BinaryIO, stream), allow_pickle=False)
            # A damaged member raises many kinds of errors, such as MemoryError for a damaged shape.
            except Exception as error:
                raise CheckpointError(
                    f"{source}: an .npz that cannot be read: its array {name} is damaged or encrypted, or has objects "
                    "of Python; save it again"
                ) from error
    return found


# --------------------------------------------------------------------------------------------------------- safetensors


class _Entry(TypedDict):
    """A tensor in the header; offsets count from the end of the header."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"I8": 8, "U8": 8, "BOOL": 8}


def _read_safetensors(source: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    kept = _checked_header(source).get(METADATA)
    try:
        arrays = load_file(source)
    except (SafetensorError, AttributeError) as error:
        if isinstance(error, AttributeError):
            # A dtype that numpy lacks, such as float8.
            raise CheckpointError(f"{source}: holds a number type that cannot be read ({error})") from None
        raise CheckpointError(
            f"{source}: a safetensors file that is damaged or cut short ({stated(error)}); fetch it again"
        ) from None
    if kept is None:
        return arrays, {}
    place = f"{source}: its metadata {METADATA!r}"
    known = parse_json(kept, name=place)
    refuse_newer(known, source)
    # Files of segjax 0.1.0 have no hash.
    written = known.pop(TENSORS_HASH, None)
    if written is not None and written != tensors_hash(arrays):
        raise CheckpointError(f"{source}: damaged, its tensors are not those that were saved; fetch or write it again")
    return arrays, metadata.checked_metadata(known, name=place)


def _checked_header(source: Path) -> dict[str, str]:
    """Checks the header of a safetensors file, and returns its `__metadata__`."""
    size = source.stat().st_size
    with open_regular(source) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(min(length, size))
    cut = f"{source}: a safetensors file that is damaged or cut short"
    if len(header) < length:
        raise CheckpointError(f"{cut} (its header has {length:,} bytes, the file {size:,}); fetch it again")
    entries = parse_json(header, name=f"{source}: the header of a damaged safetensors file")
    if twice := _given_twice(header):
        raise CheckpointError(f"{source}: two tensors are called {shorten(twice, most=6)}; fetch it again")
    described = entries.pop("__metadata__", None)
    checked(entries, dict[str, _Entry], name=source)
    for name, entry in entries.items():
        bits, (begin, end) = _BITS.get(entry["dtype"]), entry["data_offsets"]
        if end > size - 8 - length:
            raise CheckpointError(f"{cut} ({name} ends after the end of the file); fetch it again")
        if bits is not None and math.prod(entry["shape"]) * bits != 8 * (end - begin):
            raise CheckpointError(
                f"{source}: {name} has the shape {tuple(entry['shape'])} of {entry['dtype']}, and {end - begin:,} "
                "bytes are stored; fetch it again"
            )
    if described is None:
        return {}
    try:
        return checked(described, dict[str, str], name=f"{source}: __metadata__")
    except UnreadableError as error:
        raise CheckpointError(str(error)) from None


def _given_twice(header: bytes) -> list[str]:
    """Names that occur more than once in a JSON object, of which parsers keep only the last."""
    names: list[str] = []

    def of_object(pairs: list[tuple[str, Any]]) -> None:
        # The hook gets the outermost object last.
        names[:] = [name for name, _ in pairs]

    json.loads(header, object_pairs_hook=of_object)
    return sorted(name for name, times in Counter(names).items() if times > 1)
