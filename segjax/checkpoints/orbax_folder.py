"""Orbax folders: weights by name, their metadata, and the training state that a run needs to resume.

A folder contains the items `weights` (parameters and running statistics by dotted path) and `about` (metadata, JSON); a
checkpoint of a run also contains `training`. Writes are atomic (`runtime/atomic.py`).
`train/run_checkpoints.py` writes the checkpoints of a run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.format_version import refuse_newer, stamped
from segjax.checkpoints.metadata import checked_metadata
from segjax.checkpoints.soundness import refuse_unsound
from segjax.checkpoints.state_dict import from_values, model_metadata, named_variables
from segjax.models.functional import params_sha256
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic
from segjax.runtime.reading import UnreadableError, read_json, refuse_irregular

if TYPE_CHECKING:
    from orbax.checkpoint.options import MultiprocessingOptions


class DamagedError(CheckpointError):
    """A checkpoint that is incomplete or truncated, or was changed after it was written."""


WEIGHTS, METADATA, TRAINING = "weights", "about", "training"
# Keys of the metadata: hashes of the items, and of the metadata itself.
HASH, TRAINING_HASH, METADATA_HASH = "sha256", "sha256_training", "sha256_record"


# Name of the metadata's file in its item, and names of all JSON files.
_METADATA_FILE = "metadata"
_JSON_FILES = (_METADATA_FILE, "_METADATA", "_CHECKPOINT_METADATA", "_sharding")


def this_process_alone() -> MultiprocessingOptions:
    """Options with which orbax does not wait for all other processes at each file."""
    from orbax.checkpoint.options import MultiprocessingOptions

    if jax.process_count() == 1:
        return MultiprocessingOptions()
    return MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


def report_errors_once() -> None:
    """Hides orbax's log of errors: each of its threads logs a traceback, a hundred lines, before raising the error."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    previous = sys.unraisablehook
    if previous.__module__ == __name__:
        return

    def hook(unraisable):
        # At the first error, orbax closes its event loop. Every read or write in flight, about a hundred, reports this
        # after the error was raised.
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    """The reason in an error's first line, without tensorstore's path before it and array specification after it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = (str(error).splitlines() or [""])[0]
    return re.split(r" \[\w[\w ]*=", first)[0].rpartition(": ")[2] or type(error).__name__


def _checkpointer(**handlers):
    import orbax.checkpoint as ocp

    report_errors_once()
    options = this_process_alone()
    # The handler has its own barrier, and so its own options.
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options), **handlers
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def save_model(folder: Path, model: SegmentationModel, *, metadata: Mapping[str, Any]) -> None:
    """Writes a model's weights and the metadata to build it to an orbax folder, and replaces an older one.

    Raises:
      CheckpointError: Something else exists at this path, or the folder cannot be written.
    """
    weights = {path: np.asarray(variable[...]) for path, variable in named_variables(model).items()}
    save_weights(folder, weights, metadata={"model": model_metadata(model), **metadata})


def save_weights(folder: Path, weights: Mapping[str, np.ndarray], *, metadata: Mapping[str, Any]) -> None:
    """`save_model` for arrays by dotted path; `metadata["model"]` has the arguments to build their model."""
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    refuse_foreign(folder)
    items = {
        WEIGHTS: ocp.args.StandardSave(dict(weights)),
        METADATA: ocp.args.JsonSave(signed({**metadata, HASH: params_sha256(dict(weights))})),
    }
    with failure(folder), atomic.replacing_folder(folder) as new, _checkpointer() as checkpointer:
        checkpointer.save(new, ocp.args.Composite(**items))


def refuse_foreign(folder: Path) -> None:
    """Raises CheckpointError if something other than an orbax folder of segjax exists at this path."""
    if folder.exists() and not (folder / METADATA).is_dir():
        raise CheckpointError(f"{folder} exists and is not a checkpoint of segjax; choose another name or remove it")


def build_model(
    weights: Mapping[str, np.ndarray], metadata: Mapping, folder: Path, *, dtype: jnp.dtype | None = None
) -> SegmentationModel:
    """Builds the model of the weights and metadata that `load_weights` read from `folder`.

    Raises:
      CheckpointError: Weights and metadata contradict each other, weights are not finite, or they are in float64 while
        jax_enable_x64 is off.
    """
    described = metadata.get("model", {})
    if missing := [key for key in ("name", "num_classes", "overrides", "param_dtype") if key not in described]:
        raise CheckpointError(f"{folder}: its metadata is damaged: model.{missing[0]} is missing")
    try:
        param_dtype = jnp.dtype(described["param_dtype"])
        model = nnx.eval_shape(
            lambda: models.create(
                described["name"],
                num_classes=described["num_classes"],
                dtype=dtype or jnp.promote_types(param_dtype, jnp.float32),
                param_dtype=param_dtype,
                **described["overrides"],
            )
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: the model in its metadata cannot be built: {error}") from error
    variables = named_variables(model)
    expected = {path: variable.get_value().shape for path, variable in variables.items()}
    # Orbax does not compare the restored tree with the expected one.
    if differing := differences(expected, {path: value.shape for path, value in weights.items()}):
        listed = "\n".join(differing)
        raise CheckpointError(
            f"{folder}: its weights do not fit {described['name']}, which its metadata names:\n{listed}"
        )
    dtypes = {path: variable.get_value().dtype for path, variable in variables.items()}
    try:
        refuse_unsound(weights, dtypes, {path for path in weights if path.endswith(".var")})
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return from_values(model, weights)


def load_weights(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads arrays by dotted path, and their metadata, from an orbax folder of segjax, see `found_in`.

    Raises:
      CheckpointError: There is no checkpoint of segjax, or it is damaged, or of a newer format.
    """
    found = _find(folder)
    metadata = read_metadata(found)
    (weights,) = read_items(found, WEIGHTS)
    refuse_changed(found, metadata, weights)
    return weights, metadata


def load_metadata(folder: Path) -> dict[str, Any]:
    """Reads only the metadata of such a folder; arrays are neither read nor checked."""
    return read_metadata(_find(folder))


def metadata_file(folder: Path) -> Path:
    """The file of the metadata of one checkpoint."""
    return folder / METADATA / _METADATA_FILE


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads the metadata of one checkpoint.

    Raises:
      CheckpointError: The metadata is damaged, or of a newer format.
    """
    (metadata,) = read_items(folder, METADATA)
    refuse_newer(metadata, folder)
    if METADATA_HASH in metadata and _hashed(metadata) != metadata:
        raise DamagedError(f"{folder}: a damaged checkpoint (its metadata was changed)")
    try:
        return checked_metadata(metadata, name=f"{folder}: its metadata")
    except UnreadableError as error:
        raise DamagedError(str(error)) from None


def differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    """A line per name that is missing, unexpected, or of another shape (and dtype, if the tuples contain it)."""
    lines = [f"  missing: {path}" for path in expected if path not in found]
    lines += [f"  unexpected: {path}" for path in found if path not in expected]
    return lines + [
        f"  {path}: {found[path]} instead of {shape}"
        for path, shape in expected.items()
        if path in found and found[path] != shape
    ]


def signed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata to be written: with the format version, and a hash of itself."""
    return _hashed(stamped(metadata))


def _hashed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps({key: value for key, value in metadata.items() if key != METADATA_HASH}, sort_keys=True)
    return json.loads(text) | {METADATA_HASH: hashlib.sha256(text.encode()).hexdigest()}


def refuse_changed(folder: Path, metadata: Mapping, weights: Mapping, training: Mapping | None = None) -> None:
    """Raises DamagedError if arrays do not have the hashes in the metadata."""
    # Orbax has no checksums of arrays: a flipped bit would load as another number.
    for arrays, key in ((weights, HASH), (training, TRAINING_HASH)):
        if arrays is not None and key in metadata and params_sha256(arrays) != metadata[key]:
            raise DamagedError(f"{folder}: a damaged checkpoint (its arrays are not those that were saved)")


def is_step(folder: Path) -> bool:
    """Whether the name of a folder is a number, as for the checkpoints of a run."""
    # str.isdecimal also accepts digits of other scripts.
    return folder.name.isascii() and folder.name.isdecimal()


def found_in(folder: Path) -> Path | None:
    """The folder itself, or the newest step in it or in its `checkpoints`; None if there is none."""
    for place in (folder, folder / "checkpoints"):
        if (place / METADATA).is_dir():
            return place
        steps = [child for child in place.glob("*") if is_step(child) and (child / METADATA).is_dir()]
        if steps:
            return max(steps, key=lambda child: int(child.name))
    return None


def _find(folder: Path) -> Path:
    if (found := found_in(folder)) is None:
        raise CheckpointError(
            f"{folder}: no checkpoint of segjax in this folder (neither `{METADATA}` nor numbered steps)"
        )
    return found


def read_items(folder: Path, *items: str) -> list:
    """Reads items of a checkpoint: dicts of numpy arrays, saved from any devices; or the metadata as a dict.

    Raises:
      CheckpointError: The folder is damaged, or cannot be read at the moment.
    """
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    if missing := [item for item in items if not (folder / item).is_dir()]:
        raise DamagedError(f"{folder}: a damaged checkpoint (without {' and '.join(missing)})")
    _refuse_odd_files(folder)
    read = {METADATA: _read_json(metadata_file(folder))} if METADATA in items else {}
    if items == (METADATA,):
        return [read[METADATA]]
    # Also for items that are not read, because orbax warns about items without a handler.
    handlers = {WEIGHTS: ocp.PyTreeCheckpointHandler(), METADATA: ocp.JsonCheckpointHandler()}
    if (folder / TRAINING).exists():
        handlers[TRAINING] = ocp.PyTreeCheckpointHandler()
    with _damage(folder), _checkpointer(**handlers) as checkpointer:
        found = checkpointer.metadata(folder).item_metadata

        def argument(item):
            if found[item] is None:
                raise DamagedError(f"{folder}: a damaged checkpoint ({item} has no metadata of its arrays)")
            _refuse_too_large(folder, item, found[item].tree)
            restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found[item].tree}
            return ocp.args.PyTreeRestore(restore_args=restore_args)

        arguments = {item: argument(item) for item in items if item not in read}
        restored = checkpointer.restore(folder, ocp.args.Composite(**arguments))
        return [read[item] if item in read else restored[item] for item in items]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except OSError as error:
        _refuse_trouble(path, error)
        why = "is missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise DamagedError(f"{path}: a damaged checkpoint ({why})") from None
    except UnreadableError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise DamagedError(f"{path}: a damaged checkpoint ({why})") from None


def _refuse_odd_files(folder: Path) -> None:
    """Raises DamagedError for FIFOs, devices and sockets, on which orbax would wait, and for damaged JSON."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if name in _JSON_FILES:
                _read_json(path)
                continue
            try:
                refuse_irregular(path)
            except (UnreadableError, OSError) as error:
                _refuse_trouble(path, error)
                why = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
                raise DamagedError(f"{path}: a damaged checkpoint ({why})") from None


# Orbax compresses arrays of equal numbers by factors of some thousands.
_LARGEST_RATIO, _SMALL = 10_000, 1 << 30


def _refuse_too_large(folder: Path, item: str, arrays: Mapping[str, Any]) -> None:
    """Raises DamagedError if the shapes of an item need more bytes than its files can hold."""
    stored = sum(path.stat().st_size for path in (folder / item).rglob("*") if path.is_file())
    claimed = {name: math.prod(array.shape) * np.dtype(array.dtype).itemsize for name, array in arrays.items()}
    if sum(claimed.values()) > max(_SMALL, _LARGEST_RATIO * stored):
        name = max(claimed, key=lambda name: claimed[name])
        raise DamagedError(
            f"{folder}: a damaged checkpoint ({name} has the shape {tuple(arrays[name].shape)}, and {stored:,} bytes "
            "are stored)"
        )


# Errors of the system, not of the file: the checkpoint can be read later, or by another user.
_TROUBLE = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
)


def _refuse_trouble(folder: Path, error: BaseException) -> None:
    """Raises CheckpointError for an error of the system, so that a run does not skip its newest checkpoint."""
    # tensorstore's text has the number: "[OS error 24: EMFILE Too many open files]".
    found = re.search(r"OS error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in _TROUBLE:
        raise CheckpointError(f"{folder}: cannot be read at the moment ({os.strerror(number)})") from error


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Raises every error of orbax and tensorstore as DamagedError, except errors of the system."""
    try:
        yield
    except (DamagedError, MemoryError):
        raise
    except Exception as error:
        _refuse_trouble(folder, error)
        # Hides errors of operations in flight.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise DamagedError(f"{folder}: a damaged checkpoint ({_reason(error)})") from error


@contextlib.contextmanager
def failure(folder: Path) -> Iterator[None]:
    """Raises errors of orbax and tensorstore for a full or broken disk as CheckpointError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise CheckpointError(
            f"{folder}: cannot be written ({_reason(error)}).\n"
            "  Earlier saves are complete: make room, and run the same command again"
        ) from error
