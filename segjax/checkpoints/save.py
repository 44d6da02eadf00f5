"""Writes checkpoints: `.pth`, `.safetensors`, orbax folders and folders of transformers. Every write is atomic."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from segjax.checkpoints import huggingface, orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError, torch_module
from segjax.checkpoints.files import METADATA, TENSORS_HASH
from segjax.checkpoints.format_version import stamped
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.checkpoints.metadata import carried, completed, of_names
from segjax.checkpoints.soundness import tensors_hash
from segjax.checkpoints.state_dict import key_format_of, model_metadata, to_torch
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic
from segjax.runtime.reading import user_path

FILES = (".pth", ".safetensors")
# Suffixes of files that are not supported; a folder with such a name would be a mistake.
_OTHER_FILES = {
    *(".pt", ".bin", ".ckpt", ".tar", ".npz", ".npy", ".pkl", ".onnx", ".pt2", ".stablehlo", ".keras", ".h5", ".hdf5"),
    *(".msgpack", ".pb", ".tflite", ".engine", ".trt", ".gguf", ".json", ".zip", ".gz"),
}


def save(
    model: SegmentationModel | LoadedCheckpoint,
    path: str | Path,
    *,
    dialect: str | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Saves a model for `load` and `segjax convert`, and replaces an older checkpoint at this path.

    Args:
      model: Model from `segjax.create` or `from_torch`, or the result of `load`, whose classes, normalisation, licence
        and provenance are saved too, except in a `.pth`.
      path: `*.pth` or `*.safetensors`; any other name becomes an orbax folder, or with dialect "hf" a folder for
        transformers.
      dialect: Key format of a file, one of `segjax.checkpoints.key_maps.DIALECTS`; by default "native".
      class_names: A name for each class, to be saved in place of those of a loaded checkpoint; not in a `.pth`. By
        default the classes of a model are numbered.

    Raises:
      ValueError: The names are not one text for each class, or `path` is a `.pth`.
      CheckpointError: The dialect has no keys for this model, or something else exists at this path; nothing is
        written.
      KeyError: The dialect is unknown.
    """
    path = user_path(path)
    require_destination(path, dialect)
    known = {}
    if isinstance(model, LoadedCheckpoint):
        model, known = model.model, carried(model.metadata, model.provenance)
    if class_names is not None:
        known = {**known, **_named(class_names, model.spec.num_classes, path)}
    write_checkpoint(path, model, dialect=dialect or "native", metadata=known)


def _named(class_names: Sequence[str], num_classes: int, path: Path) -> dict[str, Any]:
    names = list(class_names)
    if len(names) != num_classes or isinstance(class_names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be {num_classes} texts, one for each class; got {class_names!r}")
    if path.suffix == ".pth":
        raise ValueError(f"{path}: a .pth has no place for class names; write *.safetensors or a folder, or omit them")
    return of_names(names)


def is_folder(path: Path) -> bool:
    """Whether a checkpoint with this name is a folder."""
    return path.suffix not in FILES


def require_destination(path: Path, dialect: str | None) -> None:
    """Raises CheckpointError if no checkpoint in this dialect can be written to a path."""
    if path.suffix not in FILES and path.suffix.lower() in (*FILES, *_OTHER_FILES):
        raise CheckpointError(f"{path}: write *.pth or *.safetensors; a name without suffix is a folder")
    if not is_folder(path):
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; choose another name")
    elif dialect not in (None, "hf"):
        raise CheckpointError(
            f"the dialect {dialect} selects the keys of a .pth or .safetensors, and {path} becomes a folder: an orbax "
            "folder, or with the dialect hf (--to hf) one for transformers; omit the dialect, or choose another name"
        )


def write_checkpoint(path: Path, model: SegmentationModel, *, dialect: str, metadata: Mapping[str, Any]) -> None:
    """Writes a model with its metadata; see `save`."""
    metadata = {"model": model_metadata(model), **metadata}
    if is_folder(path):
        if dialect == "hf":
            _write_folder(path, model, metadata)
        else:
            orbax_folder.save_model(path, model, metadata=metadata)
        return
    weights = to_torch(model, dialect=dialect)
    if key_format_of(model, dialect).encoder_only:
        # The file contains neither the model nor its classes.
        metadata = {key: value for key, value in metadata.items() if key not in ("model", "dataset", "temperature")}
    with atomic.replacing_file(path) as temporary:
        if path.suffix == ".pth":
            torch = torch_module()
            torch.save({key: _as_tensor(torch, value) for key, value in weights.items()}, temporary)
        else:
            _save_safetensors(weights, temporary, metadata)


def _save_safetensors(weights: Mapping[str, np.ndarray], path: str | Path, metadata: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    kept = {**stamped(metadata), TENSORS_HASH: tensors_hash(weights)}
    # transformers requires "format".
    about = {"format": "pt", METADATA: json.dumps(kept, sort_keys=True)}
    save_file(dict(weights), path, metadata=about)


def _write_folder(folder: Path, model: SegmentationModel, metadata: Mapping[str, Any]) -> None:
    """Writes a folder for transformers: config.json, preprocessor_config.json, model.safetensors."""
    weights, metadata = to_torch(model, dialect="hf"), completed(metadata, channels=model.in_channels)
    config = huggingface.config_of(model, metadata) | {"dtype": str(next(iter(weights.values())).dtype)}
    texts = {huggingface.CONFIG: config, huggingface.PREPROCESSOR: huggingface.preprocessor_of(metadata)}
    if folder.exists() and not (folder.is_dir() and huggingface.is_folder(folder)):
        raise CheckpointError(f"{folder} exists and is not a folder of transformers; choose another name or remove it")
    with atomic.replacing_folder(folder) as new:
        new.mkdir()
        for name, content in texts.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _save_safetensors(weights, new / huggingface.WEIGHTS[0], metadata)


def _as_tensor(torch, value: np.ndarray):
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())
