"""Writes checkpoints: `.pth`, `.safetensors`, orbax folders, folders of transformers and of peft, each atomically."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from segjax.checkpoints import adapters, huggingface, layout, orbax_folder
from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.checkpoint import CheckpointError, torch_module
from segjax.checkpoints.files import METADATA, TENSORS_HASH
from segjax.checkpoints.format_version import stamped
from segjax.checkpoints.key_maps import BATCH_COUNTER, KEY_FORMATS
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.checkpoints.metadata import carried, completed, of_names
from segjax.checkpoints.renaming import renamings
from segjax.checkpoints.soundness import tensors_hash
from segjax.checkpoints.state_dict import key_format_of, model_metadata, to_torch
from segjax.models.lora import Adapters, names_of
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

    Example:
      >>> import segjax
      >>> model = segjax.create("segformer_b0", num_classes=2, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> segjax.save(model, "model.safetensors", class_names=["road", "sky"])
      >>> segjax.load("model.safetensors").classes.class_names
      ('road', 'sky')
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


def save_adapter(
    folder: Path,
    name: str,
    arrays: Mapping[str, np.ndarray],
    of_layers: Adapters,
    full: Collection[str],
    *,
    base: str,
    revision: str | None,
    metadata: Mapping[str, Any],
) -> None:
    """Writes adapters, and modules that are trained in full, to a folder of peft, and replaces an older one.

    The names are those of transformers' model in memory for the official SegFormer, and native ones for all others. The
    joint projection of keys and values becomes two, with the same A and a part of B each.

    Args:
      folder: Folder for adapter_model.safetensors and adapter_config.json.
      name: Name of the model in `segjax.MODELS`.
      arrays: Parameters, with those of the adapters, and running statistics by dotted path.
      of_layers: The adapters.
      full: Dotted paths of the modules that are trained in full.
      base: Path or name of the weights that the adapters belong to.
      revision: Revision of the base on the Hub.
      metadata: Metadata of the merged model.

    Raises:
      CheckpointError: Something else exists at this path; nothing is written.
    """
    if folder.exists() and not adapters.is_folder(folder):
        raise CheckpointError(f"{folder} exists and is not an adapter; choose another name or remove it")
    family = family_of(name)
    formats = {one.dialect: one for one in KEY_FORMATS if one.family == family}
    # The second key map of transformers is that of models in memory.
    renaming = renamings(formats["hf"])[1] if "hf" in formats else renamings(formats["native"])[0]
    native = {}
    for path, value in arrays.items():
        if path.rpartition(".")[0] in full:
            native[layout.torch_name(path)] = layout.to_torch_layout(path, value)
            if path.endswith(".var"):
                native[path.removesuffix("var") + BATCH_COUNTER] = np.zeros((), np.int64)
    tensors = renaming.to_foreign(native)
    modules_to_save = _modules_of(tensors)
    for layer in of_layers.layers:
        kernel = f"{layer}.kernel"
        a, b = (layout.to_torch_layout(kernel, arrays[part]) for part in names_of(layer))
        if a.ndim == 4:
            b = b[:, :, None, None]
        keys = renaming.foreign_names(layout.torch_name(kernel))
        for key, part in zip(keys, np.split(b, len(keys)), strict=True):
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": np.ascontiguousarray(part)}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": of_layers.rank,
        "lora_alpha": int(of_layers.alpha) if float(of_layers.alpha).is_integer() else of_layers.alpha,
        "lora_dropout": 0.0,
        "target_modules": _modules_of(key for key in tensors if ".lora_A." in key),
        "modules_to_save": modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic.replacing_folder(folder) as new:
        new.mkdir()
        (new / adapters.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {f"{adapters.NETWORK}{key}": value for key, value in tensors.items()}
        _save_safetensors(weights, new / adapters.WEIGHTS[0], metadata)


def _modules_of(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"(\.lora_A)?\.\w+$", "", key) for key in keys))


def _as_tensor(torch, value: np.ndarray):
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())
