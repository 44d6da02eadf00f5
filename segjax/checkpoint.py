"""Orbax folders: named weights, whatever else a run needs to go on, and a JSON record of what they are.

A folder holds the items `weights` (parameters and running statistics by dotted name) and `about` (JSON); a training
checkpoint adds `training`. Orbax writes a folder beside its place and renames it, so one that is there is whole. This
module knows names, arrays and records, and nothing of models but how to ask for one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.weights import CheckpointError, from_values, named_variables

WEIGHTS, ABOUT, TRAINING = "weights", "about", "training"


def model_record(model: nnx.Module) -> dict[str, object]:
    """What `load_model` needs to build the model again, as JSON."""
    variables = named_variables(model).values()
    (param_dtype,) = {variable.get_value().dtype for variable in variables if isinstance(variable, nnx.Param)}
    return {
        "name": model.spec.name,
        "num_classes": model.spec.num_classes,
        "overrides": {key: list(value) if isinstance(value, tuple) else value for key, value in model.spec.overrides},
        "param_dtype": str(param_dtype),
    }


def save_model(folder: Path, model: nnx.Module, *, about: Mapping[str, object]) -> None:
    """Writes the model's weights and how to build it to an orbax folder; an older one at that place is replaced.

    Raises:
      CheckpointError: something that is not such a folder lies there.
    """
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    if folder.exists() and not (folder.is_dir() and (folder / ABOUT).is_dir()):
        raise CheckpointError(f"{folder} exists and is no checkpoint of segjax; choose another name or remove it")
    weights = {path: np.asarray(variable[...]) for path, variable in named_variables(model).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = {
            WEIGHTS: ocp.args.StandardSave(weights),
            ABOUT: ocp.args.JsonSave({"model": model_record(model), **about}),
        }
        checkpointer.save(beside, ocp.args.Composite(**items))
    if folder.exists():
        retired = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        beside.rename(folder)
        shutil.rmtree(retired)
    else:
        beside.rename(folder)


def load_model(folder: Path, *, dtype: jnp.dtype | None = None) -> nnx.Module:
    """The model of a converted folder, of one training checkpoint, or of the newest one under a training workdir.

    Args:
      dtype: of the computation; float32 (float64 for float64 weights) unless given.

    Raises:
      CheckpointError: no checkpoint of segjax is there, or it is damaged.
    """
    found = _find(folder)
    weights, about = _read(found)
    record = about["model"]
    param_dtype = jnp.dtype(record["param_dtype"])
    if param_dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    model = nnx.eval_shape(
        lambda: models.create(
            record["name"],
            num_classes=record["num_classes"],
            dtype=dtype or jnp.promote_types(param_dtype, jnp.float32),
            param_dtype=param_dtype,
            **record["overrides"],
        )
    )
    expected = {path: variable.get_value().shape for path, variable in named_variables(model).items()}
    # Orbax restores a tree that differs from the expected one without a word.
    if differing := _differences(expected, {path: value.shape for path, value in weights.items()}):
        raise CheckpointError(
            f"{found}: its weights do not fit its own record of {record['name']}:\n" + "\n".join(differing)
        )
    return from_values(model, weights)


def _differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    lines = [f"  missing: {path}" for path in expected if path not in found]
    lines += [f"  unexpected: {path}" for path in found if path not in expected]
    return lines + [
        f"  {path}: {found[path]} instead of {shape}"
        for path, shape in expected.items()
        if path in found and found[path] != shape
    ]


def _find(folder: Path) -> Path:
    """The folder itself, or the newest step below it or below its `checkpoints`."""
    for place in (folder, folder / "checkpoints"):
        if (place / ABOUT).is_dir():
            return place
        steps = [child for child in place.glob("*") if child.name.isdigit() and (child / ABOUT).is_dir()]
        if steps:
            return max(steps, key=lambda child: int(child.name))
    raise CheckpointError(f"{folder}: no checkpoint of segjax in this folder (neither `{ABOUT}` nor numbered steps)")


def _read(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            about = checkpointer.restore(folder, ocp.args.Composite(**{ABOUT: ocp.args.JsonRestore()}))[ABOUT]
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder / WEIGHTS).item_metadata.tree
            restore_args = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in tree}
            weights = checkpointer.restore(folder / WEIGHTS, ocp.args.PyTreeRestore(restore_args=restore_args))
    except Exception as error:
        # Orbax and tensorstore raise many types for a damaged folder; all mean the same to the caller.
        raise CheckpointError(
            f"{folder}: a damaged checkpoint ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return weights, about
