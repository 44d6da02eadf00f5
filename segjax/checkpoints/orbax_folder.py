"""Orbax folders: named weights, whatever else a run needs to go on, and a JSON record of what they are.

A folder holds the items `weights` (parameters and running statistics by dotted name) and `about` (JSON); a training
checkpoint adds `training`. Orbax writes a folder beside its place and renames it, so one that is there is whole. This
module knows names, arrays and records, and nothing of models but how to ask for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints.state_dict import CheckpointError, from_values, model_record, named_variables
from segjax.models.functional import params_sha256
from segjax.runtime import atomic


class DamagedError(CheckpointError):
    """A checkpoint that is torn, cut short or changed since it was written."""


WEIGHTS, ABOUT, TRAINING = "weights", "about", "training"
HASH, TRAINING_HASH, RECORD_HASH = "sha256", "sha256_training", "sha256_record"


def this_process_alone():
    """Without it every process would wait for all others at each file."""
    from orbax.checkpoint.options import MultiprocessingOptions

    if jax.process_count() == 1:
        return MultiprocessingOptions()
    return MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


def report_errors_once() -> None:
    """Orbax logs an error from each of its threads, with a traceback each, before it raises it: a hundred lines."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    previous = sys.unraisablehook
    if previous.__module__ == __name__:
        return

    def hook(unraisable):
        # At the first error orbax closes its event loop; each read or write still in flight reports that, by the
        # hundred, and after the error has left here.
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    """The end of an error's first line: before it tensorstore puts where, behind it a specification of the array."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = (str(error).splitlines() or [""])[0]
    return re.split(r" \[\w[\w ]*=", first)[0].rpartition(": ")[2] or type(error).__name__


def _checkpointer(**handlers):
    import orbax.checkpoint as ocp

    report_errors_once()
    options = this_process_alone()
    # The handler has a barrier of its own.
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options), **handlers
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def save_model(folder: Path, model: nnx.Module, *, about: Mapping[str, object]) -> None:
    """Writes the model's weights and how to build it to an orbax folder; an older one at that place is replaced.

    Raises:
      CheckpointError: something that is not such a folder lies there.
    """
    weights = {path: np.asarray(variable[...]) for path, variable in named_variables(model).items()}
    save_weights(folder, weights, about={"model": model_record(model), **about})


def save_weights(folder: Path, weights: Mapping[str, np.ndarray], *, about: Mapping[str, object]) -> None:
    """The same for arrays by dotted name; `about["model"]` says how to build their model."""
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and (folder / ABOUT).is_dir()):
        raise CheckpointError(f"{folder} exists and is no checkpoint of segjax; choose another name or remove it")
    items = {
        WEIGHTS: ocp.args.StandardSave(dict(weights)),
        ABOUT: ocp.args.JsonSave(signed({**about, HASH: params_sha256(dict(weights))})),
    }
    with failure(folder), atomic.replacing_folder(folder) as new, _checkpointer() as checkpointer:
        checkpointer.save(new, ocp.args.Composite(**items))


def load_model(folder: Path, *, dtype: jnp.dtype | None = None) -> nnx.Module:
    """The model in a converted folder, in one training checkpoint, or in the newest one of a training workdir.

    Args:
      dtype: of the computation; float32 (float64 for float64 weights) unless given.

    Raises:
      CheckpointError: no checkpoint of segjax is there, it is damaged, or it holds float64 while jax_enable_x64 is off.
    """
    return load_model_and_record(folder, dtype=dtype)[0]


def load_model_and_record(folder: Path, *, dtype: jnp.dtype | None = None) -> tuple[nnx.Module, dict[str, object]]:
    """The same, and the record beside it."""
    found = _find(folder)
    weights, about = load_weights(found)
    try:
        record = about["model"]
        param_dtype = jnp.dtype(record["param_dtype"])
        model = nnx.eval_shape(
            lambda: models.create(
                record["name"],
                num_classes=record["num_classes"],
                dtype=dtype or jnp.promote_types(param_dtype, jnp.float32),
                param_dtype=param_dtype,
                **record["overrides"],
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found}: the model it describes cannot be built: {error}") from error
    expected = {path: variable.get_value().shape for path, variable in named_variables(model).items()}
    # Orbax restores a tree that differs from the expected one without a word.
    if differing := differences(expected, {path: value.shape for path, value in weights.items()}):
        listed = "\n".join(differing)
        raise CheckpointError(f"{found}: its weights do not fit its own record of {record['name']}:\n{listed}")
    return from_values(model, weights), about


def load_weights(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Arrays by dotted name, and the record beside them, of any folder that `load_model` takes.

    Raises:
      CheckpointError: no checkpoint of segjax is there, or it is damaged.
    """
    found = _find(folder)
    weights, about = read_items(found, WEIGHTS, ABOUT)
    refuse_changed(found, about, weights)
    return weights, about


def holds_float64(folder: Path) -> bool:
    """Whether `load_model` needs jax_enable_x64."""
    return load_record(folder).get("model", {}).get("param_dtype") == "float64"


def load_record(folder: Path) -> dict[str, object]:
    """The record alone of any folder that `load_model` takes; its arrays are neither read nor checked."""
    found = _find(folder)
    (about,) = read_items(found, ABOUT)
    refuse_changed(found, about)
    return about


def differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    """Every name that is missing, unexpected, or of another shape (and dtype, where it is part of the tuples)."""
    lines = [f"  missing: {path}" for path in expected if path not in found]
    lines += [f"  unexpected: {path}" for path in found if path not in expected]
    return lines + [
        f"  {path}: {found[path]} instead of {shape}"
        for path, shape in expected.items()
        if path in found and found[path] != shape
    ]


def signed(record: Mapping[str, object]) -> dict[str, object]:
    """A copy of the record with a hash of itself."""
    text = json.dumps({key: value for key, value in record.items() if key != RECORD_HASH}, sort_keys=True)
    return json.loads(text) | {RECORD_HASH: hashlib.sha256(text.encode()).hexdigest()}


def refuse_changed(folder: Path, about: Mapping, weights: Mapping | None = None, training: Mapping | None = None):
    # The storage format keeps no checksum of its own: a flipped bit would load as another number.
    if RECORD_HASH in about and signed(about) != about:
        raise DamagedError(f"{folder}: a damaged checkpoint (its record is not the one that was saved)")
    for arrays, key in ((weights, HASH), (training, TRAINING_HASH)):
        if arrays is not None and key in about and params_sha256(arrays) != about[key]:
            raise DamagedError(f"{folder}: a damaged checkpoint (its arrays are not those that were saved)")


def _find(folder: Path) -> Path:
    """The folder itself, or the newest step below it or below its `checkpoints`."""
    for place in (folder, folder / "checkpoints"):
        if (place / ABOUT).is_dir():
            return place
        steps = [child for child in place.glob("*") if child.name.isdigit() and (child / ABOUT).is_dir()]
        if steps:
            return max(steps, key=lambda child: int(child.name))
    raise CheckpointError(f"{folder}: no checkpoint of segjax in this folder (neither `{ABOUT}` nor numbered steps)")


def read_items(folder: Path, *items: str) -> list:
    """Items of a checkpoint: dicts of numpy arrays, whatever devices they were saved from; `about` as a dict.

    Raises:
      CheckpointError: the folder is damaged.
    """
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    if missing := [item for item in items if not (folder / item).is_dir()]:
        raise DamagedError(f"{folder}: a damaged checkpoint (without {' and '.join(missing)})")
    # Also for items that are not asked for: orbax warns of every item that it has no handler for.
    handlers = {WEIGHTS: ocp.PyTreeCheckpointHandler(), ABOUT: ocp.JsonCheckpointHandler()}
    if (folder / TRAINING).exists():
        handlers[TRAINING] = ocp.PyTreeCheckpointHandler()
    with _damage(folder), _checkpointer(**handlers) as checkpointer:
        found = checkpointer.metadata(folder).item_metadata

        def argument(item):
            if item == ABOUT:
                return ocp.args.JsonRestore()
            restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found[item].tree}
            return ocp.args.PyTreeRestore(restore_args=restore_args)

        restored = checkpointer.restore(folder, ocp.args.Composite(**{item: argument(item) for item in items}))
        return [restored[item] for item in items]


@contextlib.contextmanager
def _damage(folder: Path):
    """Turns whatever orbax and tensorstore raise for a damaged folder into one DamagedError."""
    try:
        yield
    except Exception as error:
        # Of what was in flight.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise DamagedError(f"{folder}: a damaged checkpoint ({_reason(error)})") from error


@contextlib.contextmanager
def failure(folder: Path):
    """Turns whatever orbax and tensorstore raise for a full or broken disk into one CheckpointError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise CheckpointError(
            f"{folder}: cannot be written ({_reason(error)}).\n"
            "  What was saved before is whole: make room, and give the same command again"
        ) from error
