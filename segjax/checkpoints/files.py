"""Reads checkpoints: `.pth`, `.safetensors`, orbax folders, folders of transformers, repositories of the Hugging Face
Hub. The kind is recognised by content. `segjax.checkpoints.save` writes them."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from segjax.checkpoints import huggingface, metadata, orbax_folder, pickled
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError, as_arrays, shorten, torch_module
from segjax.checkpoints.format_version import refuse_newer
from segjax.checkpoints.soundness import tensors_hash
from segjax.checkpoints.state_dict import logger
from segjax.runtime.reading import UnreadableError, checked, open_regular, parse_json

# The key of segjax's metadata in the header of a `.safetensors`, and in them the key of a hash of its tensors.
METADATA, TENSORS_HASH = "segjax", "xxh3_128_tensors"


def read_checkpoint(source: str | Path, *, weights: str | None = None) -> Checkpoint:
    """Reads weights and metadata.

    Args:
      source: a `.pth` or `.safetensors`, an orbax folder or the folder of a run, a folder of transformers, or the
        address hf:owner/name[@revision] of a repository.
      weights: the set to read where the checkpoint holds several, one of `key_maps.WEIGHT_SETS`: averaged ones next to
        raw ones, or a student and a teacher. None: the raw ones.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged or of a newer format, or holds a student and a teacher; the
        message says what to do.
    """
    try:
        return _read(source, weights)
    except UnreadableError as error:
        raise CheckpointError(str(error)) from None


def _read(source: str | Path, weights: str | None) -> Checkpoint:
    place, name = huggingface.fetched(source)
    if place.is_dir() and not huggingface.is_folder(place):
        folder = orbax_folder.find(place)
        if weights is not None:
            raise CheckpointError(f"{folder}: an orbax folder holds one set of weights; omit --weights {weights}")
        return Checkpoint(*orbax_folder.load_weights(folder), name, (folder,), is_orbax=True)
    if place.is_dir():
        stored, known, paths = _read_folder(place)
    else:
        stored, known = _read_file(place)
        paths = (place,)
    try:
        arrays = as_arrays(stored, weights=weights)
        known = metadata.of_mmseg(stored, arrays) | known
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from None
    return Checkpoint(arrays, known, name, paths, chosen=weights)


def provenance_at(source: str | Path, *, weights: str | None = None) -> dict[str, Any]:
    """`Checkpoint.provenance` of a checkpoint, without reading its weights."""
    place, name = huggingface.fetched(source)
    if not place.is_dir():
        return Checkpoint({}, {}, name, (place,), chosen=weights).provenance
    if huggingface.is_folder(place):
        return Checkpoint({}, {}, name, tuple(huggingface.weight_files(place)), chosen=weights).provenance
    folder = orbax_folder.find(place)
    return Checkpoint({}, orbax_folder.read_metadata(folder), name, (folder,), is_orbax=True).provenance


def _read_folder(folder: Path) -> tuple[Mapping, dict[str, Any], tuple[Path, ...]]:
    """A folder of transformers, with weights in one file or several."""
    known, notes = huggingface.metadata_of(folder)
    arrays: dict = {}
    paths = huggingface.weight_files(folder)
    for path in paths:
        part, in_file = _read_file(path)
        if twice := [key for key in part if key in arrays]:
            raise CheckpointError(f"{path}: an earlier part has {shorten(twice, most=6)}, too; fetch the folder again")
        arrays |= part
        # segjax's own metadata has more than config.json can hold.
        known |= in_file
    if "dataset" in known:
        known.pop(metadata.NUMBERED_NAMES, None)
    for note in notes if "name" not in known.get("model", {}) else ():
        logger.info("%s", note)
    indexed = huggingface.keys_of_shards(folder)
    if indexed is not None and (missing := sorted(indexed - arrays.keys())):
        raise CheckpointError(f"{folder}: its index names keys that no part has: {shorten(missing, most=6)}")
    return arrays, known, tuple(paths)


def _read_file(source: Path) -> tuple[Mapping, dict[str, Any]]:
    """The content of a file as it is stored, and segjax's metadata."""
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file")
    with open_regular(source) as file:
        head = file.read(512)
    size = source.stat().st_size
    if not head:
        raise CheckpointError(f"{source}: the file is empty; fetch it again")
    if size > 8 and 2 <= struct.unpack("<Q", head[:8])[0] <= max(size, 100_000_000) and head[8:9] == b"{":
        return _read_safetensors(source)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_pth(source), {}
    kind = "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "binary"
    hint = " (a page that says why the download failed, or a git-lfs pointer?)" if kind == "text" else ""
    raise CheckpointError(
        f"{source}: neither a PyTorch checkpoint, nor safetensors, nor an orbax folder; it begins with "
        f"{head[:24]!r}, which is {kind}{hint}"
    )


# --------------------------------------------------------------------------------------------------------- safetensors


class _Entry(TypedDict):
    """A tensor in the header; offsets from its end."""

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
            # A dtype that numpy does not have, such as float8.
            raise CheckpointError(f"{source}: holds a number type that cannot be read ({error})") from None
        raise CheckpointError(
            f"{source}: a safetensors file that is damaged or cut short ({error}); fetch it again"
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
    """`__metadata__` of a safetensors file whose header is consistent."""
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
            raise CheckpointError(f"{cut} ({name} ends behind the end of the file); fetch it again")
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
    """The names that a JSON object, of which parsers keep the last, has more than once."""
    names: list[str] = []

    def of_object(pairs: list[tuple[str, Any]]) -> None:
        # The outermost object comes last.
        names[:] = [name for name, _ in pairs]

    json.loads(header, object_pairs_hook=of_object)
    return sorted(name for name, times in Counter(names).items() if times > 1)


# ----------------------------------------------------------------------------------------------------------------- pth


def _read_pth(source: Path) -> Mapping:
    torch = torch_module()
    with open_regular(source) as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        pickled.refuse_odd_zip(source)
    # Checksums are computed while torch reads.
    with ThreadPoolExecutor(1) as pool:
        checksums = pool.submit(pickled.refuse_damaged_zip, source) if is_zip else None
        try:
            loaded = _load_pth(torch, source)
            pickled.refuse_odd_tensors(source, loaded)
        except CheckpointError:
            # These explain the error better.
            if checksums is not None:
                checksums.result()
            pickled.refuse_unreadable_tensors(source)
            raise
        if checksums is not None:
            checksums.result()
    return loaded


def _load_pth(torch, source: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Weights only load failed" in reason and (
            "GLOBAL" in reason or "global" in reason or "Unsupported" in reason
        ):
            detail = next((line.strip() for line in reason.splitlines() if "WeightsUnpickler error" in line), "")
            raise CheckpointError(
                f"{source}: refused, because loading it would run code: it holds objects other than tensors and plain "
                f"containers. {detail}\n  If you trust its origin, load it where it was made and save "
                "only model.state_dict()"
            ) from None
        raise CheckpointError(
            f"{source}: not a PyTorch checkpoint, or a damaged one ({reason.splitlines()[0]})"
        ) from None
    except Exception as error:
        # A damaged file makes torch raise almost anything, from struct.error to AssertionError.
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{source}: a PyTorch checkpoint that is damaged or cut short ({first}); fetch it again"
        ) from None
