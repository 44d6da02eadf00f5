"""Reads checkpoints: `.pth`, `.safetensors`, orbax folders, folders of transformers, repositories of the Hugging Face
Hub. The kind is recognised by content. `segjax.checkpoints.save` writes them."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

from segjax.checkpoints import huggingface, metadata, orbax_folder
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError, as_arrays, shorten, torch_module
from segjax.checkpoints.format_version import refuse_newer
from segjax.checkpoints.state_dict import logger

# The key of segjax's metadata in the header of a `.safetensors`.
METADATA = "segjax"


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Reads weights and metadata.

    Args:
      source: a `.pth` or `.safetensors`, an orbax folder or the folder of a run, a folder of transformers, or the
        address hf:owner/name[@revision] of a repository.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged or of a newer format; the message says what to do.
    """
    place, name = huggingface.fetched(source)
    if not place.is_dir():
        return Checkpoint(*_read_file(place), name, (place,))
    if huggingface.is_folder(place):
        return _read_folder(place, name)
    folder = orbax_folder.find(place)
    return Checkpoint(*orbax_folder.load_weights(folder), name, (folder,), is_orbax=True)


def provenance_at(source: str | Path) -> dict[str, Any]:
    """`Checkpoint.provenance` of a checkpoint, without reading its weights."""
    place, name = huggingface.fetched(source)
    if not place.is_dir():
        return Checkpoint({}, {}, name, (place,)).provenance
    if huggingface.is_folder(place):
        return Checkpoint({}, {}, name, tuple(huggingface.weight_files(place))).provenance
    folder = orbax_folder.find(place)
    return Checkpoint({}, orbax_folder.read_metadata(folder), name, (folder,), is_orbax=True).provenance


def _read_folder(folder: Path, name: str) -> Checkpoint:
    """A folder of transformers, with weights in one file or several."""
    known, notes = huggingface.metadata_of(folder)
    arrays, paths = {}, huggingface.weight_files(folder)
    for path in paths:
        part, in_file = _read_file(path)
        arrays |= part
        # segjax's own metadata has more than config.json can hold.
        known |= in_file
    for note in notes if "name" not in known.get("model", {}) else ():
        logger.info("%s", note)
    indexed = huggingface.keys_of_shards(folder)
    if indexed is not None and (missing := sorted(indexed - arrays.keys())):
        raise CheckpointError(f"{folder}: its index names keys that no part has: {shorten(missing, most=6)}")
    return Checkpoint(arrays, known, name, tuple(paths))


def _read_file(source: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file")
    size = source.stat().st_size
    with source.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{source}: the file is empty; fetch it again")
    if size > 8 and 2 <= struct.unpack("<Q", head[:8])[0] <= max(size, 100_000_000) and head[8:9] == b"{":
        return _read_safetensors(source)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_pth(source)
    kind = "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "binary"
    hint = " (a page that says why the download failed, or a git-lfs pointer?)" if kind == "text" else ""
    raise CheckpointError(
        f"{source}: neither a PyTorch checkpoint, nor safetensors, nor an orbax folder; it begins with "
        f"{head[:24]!r}, which is {kind}{hint}"
    )


def _read_safetensors(source: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(source)
    except (SafetensorError, AttributeError) as error:
        if isinstance(error, AttributeError):
            # A dtype that numpy does not have, such as float8.
            raise CheckpointError(f"{source}: holds a number type that cannot be read ({error})") from None
        raise CheckpointError(
            f"{source}: a safetensors file that is damaged or cut short ({error}); fetch it again"
        ) from None
    with source.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    kept = header.get("__metadata__", {}).get(METADATA)
    if kept is None:
        return arrays, metadata.of_mmseg(None, arrays)
    try:
        known = dict(json.loads(kept))
    except (TypeError, ValueError):
        raise CheckpointError(f"{source}: its metadata {METADATA!r} is not a JSON object") from None
    refuse_newer(known, source)
    return arrays, known


def _read_pth(source: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    torch = torch_module()
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
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
    try:
        arrays = as_arrays(loaded)
        return arrays, metadata.of_mmseg(loaded, arrays)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
