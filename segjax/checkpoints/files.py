"""Checkpoints in, out and told apart: `.pth`, `.safetensors`, folders of transformers, repositories of the Hub; orbax
folders through `checkpoint.py`. With the weights comes what was kept beside them, as `record.py` has it."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints import huggingface, metadata
from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.renaming import recognise
from segjax.checkpoints.state_dict import (
    CheckpointError,
    as_arrays,
    form_of,
    from_torch,
    has_classifier,
    logger,
    model_record,
    shorten,
    to_torch,
    torch_module,
)
from segjax.runtime import atomic

# The record of a model inside a `.safetensors`.
METADATA = "segjax"


class Contents(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      weights: a state dict, or the model of an orbax folder.
      about: what came beside them, as a record has it; of a foreign checkpoint some parts or none.
      origin: name of the file or folder; of a repository its address with the commit.
      paths: the files that the weights were read from; none for an orbax folder.
    """

    weights: dict[str, np.ndarray] | nnx.Module
    about: dict[str, object]
    origin: str
    paths: tuple[Path, ...]


def read_checkpoint(source: str | Path, *, dtype: jnp.dtype | None = None) -> Contents:
    """Everything that is read anywhere as a checkpoint, told apart by content.

    Args:
      source: a `.pth` or `.safetensors`, an orbax folder or that of a training, a folder of transformers, or the
        address hf:owner/name[@revision] of one.
      dtype: of the computation, for an orbax folder.

    Raises:
      CheckpointError: what is there instead, and what to do.
    """
    place, origin = huggingface.fetched(source)
    if not place.is_dir():
        return Contents(*_read_single(place), origin, (place,))
    if huggingface.is_folder(place):
        return _read_folder(place, origin)
    from segjax.checkpoints import orbax_folder

    model, about = orbax_folder.load_model_and_record(place, dtype=dtype)
    return Contents(model, about, origin, ())


def model_of(
    contents: Contents,
    *,
    name: str = "auto",
    dialect: str = "auto",
    num_classes: int | None = None,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
    **overrides,
) -> tuple[nnx.Module, dict[str, object]]:
    """The model that a checkpoint holds or makes, and its whole record. The arguments are those of `from_torch`."""
    found = contents.weights
    if isinstance(found, nnx.Module):
        about = metadata.completed(contents.about)
        return found, about if "dataset" in about else about | metadata.guessed(found.spec.num_classes)
    kept = contents.about.get("model", {})
    told = {key: _tupled(value) for key, value in kept.get("overrides", {}).items()}
    if "name" in kept:
        # A record of ours: what it does not name has the model's own default, not that of the file's dialect.
        told = models.settings(kept["name"]) | told if name in ("auto", kept["name"]) else {}
        name = kept["name"] if name == "auto" else name
    model = from_torch(
        found,
        name=name,
        dialect=dialect,
        num_classes=num_classes,
        dtype=dtype,
        param_dtype=param_dtype,
        **told | overrides,
    )
    form = recognise(found, dialect=dialect, family=family_of(model.spec.name)).form
    provenance = {**provenance_of(contents), "dialect": form.dialect, "package": form.package}
    about = {"licence": metadata.licence_of(model.spec.name), **contents.about}
    about |= {"model": model_record(model), "provenance": provenance}
    named, classes = about.pop("dataset", None), model.spec.num_classes
    # What an encoder names are ImageNet's classes.
    if has_classifier(found, dialect=dialect):
        if named and len(named["class_names"]) != classes:
            logger.info("its %d class names are not used: it has %d classes", len(named["class_names"]), classes)
            named = None
        about |= {"dataset": named} if named else metadata.guessed(classes)
        if "dataset" not in about:
            logger.info("the checkpoint does not name its classes")
        elif not named:
            logger.info("it names no classes; %d are taken for those of %s", classes, about["dataset"]["name"])
    return model, metadata.completed(about)


def _tupled(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def provenance_at(source: str | Path) -> dict[str, object]:
    """Name and hash of a checkpoint, for the record of what is made from it; of an orbax folder its arrays' hash."""
    place, origin = huggingface.fetched(source)
    if place.is_dir() and not huggingface.is_folder(place):
        from segjax.checkpoints import orbax_folder

        return provenance_of(Contents({}, orbax_folder.load_record(place), origin, ()))
    paths = huggingface.weight_files(place) if place.is_dir() else [place]
    return provenance_of(Contents({}, {}, origin, tuple(paths)))


def provenance_of(contents: Contents) -> dict[str, object]:
    """Name and hash of a checkpoint, and what it says that it was made from itself."""
    before = contents.about.get("provenance")
    made_from = {"made_from": before} if before else {}
    if not contents.paths:
        kept = {key: contents.about[key] for key in ("sha256", "step") if key in contents.about}
        return {"source": contents.origin, **kept, **made_from}
    digest = hashlib.sha256()
    for path in contents.paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return {"source": contents.origin, "sha256": digest.hexdigest(), **made_from}


def read_file(source: str | Path) -> dict[str, np.ndarray] | nnx.Module:
    """The weights alone of what `read_checkpoint` takes."""
    return read_checkpoint(source).weights


def _read_folder(folder: Path, origin: str) -> Contents:
    """A folder of transformers, in one file or several."""
    about, notes = huggingface.about_folder(folder)
    arrays, paths = {}, huggingface.weight_files(folder)
    for path in paths:
        part, kept = _read_single(path)
        arrays |= part
        # A record of ours knows better than what transformers has a place for.
        about |= kept
    for note in notes if "name" not in about.get("model", {}) else ():
        logger.info("%s", note)
    promised = huggingface.keys_of_shards(folder)
    if promised is not None and (missing := sorted(promised - arrays.keys())):
        raise CheckpointError(f"{folder}: its index promises keys that no part has: {shorten(missing, most=6)}")
    return Contents(arrays, about, origin, tuple(paths))


def _read_single(source: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
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
    what = "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "something else"
    hint = " (a page that says why the download failed, or a git-lfs pointer?)" if what == "text" else ""
    raise CheckpointError(
        f"{source}: neither a PyTorch checkpoint, nor safetensors, nor an orbax folder; it begins with "
        f"{head[:24]!r}, which is {what}{hint}"
    )


def _read_safetensors(source: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(source)
    except (SafetensorError, AttributeError) as error:
        if isinstance(error, AttributeError):
            # The reader looks numpy up for a type that numpy does not have, such as float8.
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
        return arrays, dict(json.loads(kept))
    except (TypeError, ValueError):
        raise CheckpointError(f"{source}: what it says of itself under {METADATA!r} is not a record") from None


def _read_pth(source: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
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
                "model.state_dict() alone"
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


def write_file(destination: Path, model: nnx.Module, *, dialect: str, about: Mapping[str, object]) -> None:
    """Writes a checkpoint atomically: a reader finds the old one or the new one, whole.

    `.pth` and `.safetensors` hold a state dict in the names of `dialect`, `.safetensors` with the record beside it. Any
    other suffix is an orbax folder, or in the names of transformers ("hf") a folder that transformers loads.
    """
    about = {"model": model_record(model), **about}
    if destination.suffix not in (".pth", ".safetensors"):
        if dialect == "hf":
            _write_folder(destination, model, about)
            return
        from segjax.checkpoints import orbax_folder

        orbax_folder.save_model(destination, model, about=about)
        return
    weights = to_torch(model, dialect=dialect)
    if form_of(model, dialect).encoder_only:
        # Neither the model nor its classes are in the file.
        about = {key: value for key, value in about.items() if key not in ("model", "dataset")}
    with atomic.replacing_file(destination) as temporary:
        if destination.suffix == ".pth":
            torch = torch_module()
            torch.save({key: _as_tensor(torch, value) for key, value in weights.items()}, temporary)
        else:
            _save_safetensors(weights, temporary, about)


def _save_safetensors(weights: Mapping[str, np.ndarray], path: str | Path, about: Mapping[str, object]) -> None:
    from safetensors.numpy import save_file

    # "format" is what transformers looks for before it reads a file.
    save_file(dict(weights), path, metadata={"format": "pt", METADATA: json.dumps(about, sort_keys=True)})


def _write_folder(folder: Path, model: nnx.Module, about: Mapping[str, object]) -> None:
    """A folder of transformers: config.json, preprocessor_config.json, model.safetensors."""
    weights = to_torch(model, dialect="hf")
    config = huggingface.config_of(model, about) | {"dtype": str(next(iter(weights.values())).dtype)}
    texts = {huggingface.CONFIG: config, huggingface.PREPROCESSOR: huggingface.preprocessor_of(about)}
    if folder.exists() and not (folder.is_dir() and huggingface.is_folder(folder)):
        raise CheckpointError(f"{folder} exists and is no folder of transformers; choose another name or remove it")
    with atomic.replacing_folder(folder) as new:
        new.mkdir()
        for name, content in texts.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n")
        _save_safetensors(weights, new / huggingface.WEIGHTS[0], about)


def _as_tensor(torch, value: np.ndarray):
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.copy())
