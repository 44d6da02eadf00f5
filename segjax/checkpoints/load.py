"""`segjax.load`: loads a model with its classes, normalisation and metadata from any checkpoint."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from typing_extensions import TypeVar

from segjax import models
from segjax.checkpoints import metadata, orbax_folder, published, temperature
from segjax.checkpoints.architectures import family_of
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.state_dict import from_torch, logger, model_metadata
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.models.segmentation_model import ModelInterface, SegmentationModel
from segjax.runtime.reading import type_name

# A model, or its stand-in `segjax.inference.exported_model.ExportedModel`.
Model = TypeVar("Model", bound=ModelInterface, default=SegmentationModel, covariant=True)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedCheckpoint(Generic[Model]):
    """A model and everything that its checkpoint contains in addition to the weights.

    Attributes:
      model: Model in evaluation mode: normalised images (B, H, W, C) -> (logits, taps).
      classes: Names and colours of the classes, and the ignore label.
      metadata: See `segjax.checkpoints.metadata`. If `metadata["dataset"]["guessed"]` is set, the checkpoint names no
        classes, and `classes` is a guess from their number.
      mean, std: Statistics of the training images, C numbers each, in the unit of their values (0..255 for RGB).
      provenance: Name and hash of the checkpoint; "made_from" has the provenance that it stores.

    Example:
      >>> import segjax
      >>> model = segjax.create("segformer_b0", num_classes=2, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> segjax.save(model, "model.safetensors", class_names=["road", "sky"])
      >>> segjax.load("model.safetensors").classes.class_names
      ('road', 'sky')
    """

    model: Model
    classes: specs.DatasetSpec
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mean: tuple[float, ...] = specs.IMAGENET_MEAN
    std: tuple[float, ...] = specs.IMAGENET_STD
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dataset(self) -> Mapping | None:
        """The metadata of the dataset if the checkpoint names its classes, else None."""
        dataset = self.metadata.get("dataset")
        return None if not dataset or dataset.get("guessed") else dataset

    def normalise(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Normalises images (..., C) of any dtype, RGB in 0..255, to the float32 input of the model."""
        return normalise(images, self.mean, self.std)

    @property
    def image_kind(self) -> specs.ImageKind:
        """Channels and dtype of the training images; the dtype is None if it is not known."""
        channels = self.model.in_channels
        return specs.ImageKind(channels, self.metadata.get("image_dtype") or ("uint8" if channels == 3 else None))


def load(source: str | Path, *, dtype: jnp.dtype | None = None, weights: str | None = None) -> LoadedCheckpoint:
    """Loads the model of any checkpoint, with its classes, normalisation and metadata.

    Args:
      source: A converted folder, the folder of a run, a PyTorch checkpoint (`.pth`, `.safetensors`), a folder of
        transformers, hf:owner/name[@revision] on the Hugging Face Hub, or the name of published weights, such as
        "segformer_b2.cityscapes", which are downloaded once (`segjax.list_weights` lists all names; an existing path of
        that name takes precedence).
      dtype: Dtype of the computation; by default float32, or float64 for an orbax folder in float64.
      weights: Set of weights to load from a checkpoint with several: "ema" or "raw", "student" or "teacher".

    Returns:
      The model in evaluation mode, with its classes, normalisation, metadata and provenance.

    Raises:
      CheckpointError: There is no checkpoint, it fits no model, its weights are not finite, or it is an encoder only.

    Example:
      >>> import segjax
      >>> segjax.save(
      ...     segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8), "model.safetensors"
      ... )
      >>> checkpoint = segjax.load("model.safetensors")
      >>> checkpoint.model.spec.name, checkpoint.model.spec.num_classes
      ('segformer_b0', 5)
    """
    published.refuse_encoder(source)
    checkpoint = read_checkpoint(source, weights=weights)
    try:
        model, known = model_of(checkpoint, dtype=dtype)
        classes = metadata.classes_of(known, model.spec.num_classes)
    except CheckpointError as error:
        message = str(error) if str(error).startswith(str(source)) else f"{source}: {error}"
        raise CheckpointError(message) from None
    known |= temperature.kept_with(source, model)
    mean, std = (tuple(known["normalisation"][key]) for key in ("mean", "std"))
    provenance = checkpoint.provenance if checkpoint.is_orbax else known["provenance"]
    return LoadedCheckpoint(model, classes, known, mean, std, provenance)


def as_loaded(
    source: str | Path | LoadedCheckpoint | SegmentationModel, *, weights: str | None = None
) -> LoadedCheckpoint:
    """Loads a checkpoint, with its set `weights`, unless it is loaded already; wraps a model with numbered classes."""
    if isinstance(source, LoadedCheckpoint):
        return source
    if isinstance(source, str | os.PathLike):
        return load(source, weights=weights)
    if not isinstance(source, nnx.Module):
        raise TypeError(
            "a checkpoint is a path, 'hf:owner/name', a name of segjax.list_weights, the result of segjax.load, or a "
            f"model; got an object of type {type_name(source)}. segjax.from_torch makes a model from a state dict"
        )
    mean, std = (tuple(values) for values in metadata.default_normalisation(source.in_channels).values())
    return LoadedCheckpoint(source, metadata.classes_of({}, source.spec.num_classes), {}, mean, std)


def model_of(
    checkpoint: Checkpoint,
    *,
    name: str = "auto",
    num_classes: int | None = None,
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    dtype: jnp.dtype | None = None,
    param_dtype: jnp.dtype = jnp.float32,
    **overrides,
) -> tuple[SegmentationModel, dict[str, Any]]:
    """The model of a checkpoint, in evaluation mode, and its complete metadata.

    Args:
      checkpoint: The checkpoint.
      name, num_classes, drop, keep, param_dtype, **overrides: As for `from_torch`; only for a state dict.
      dtype: Dtype of the computation; by default float32, or float64 for an orbax folder in float64.

    Raises:
      CheckpointError: The checkpoint fits no model, or contradicts itself.
      KeyError: The name or dialect is unknown.
    """
    if checkpoint.is_orbax:
        model = orbax_folder.build_model(checkpoint.weights, checkpoint.metadata, *checkpoint.paths, dtype=dtype)
        known = metadata.completed(checkpoint.metadata, channels=model.in_channels)
        return model, known | _dataset(known.pop("dataset", None), model.spec.num_classes)
    name, settings = settings_in(checkpoint.metadata, name)
    checkpoint = checkpoint.read_as(family=None if name == "auto" else family_of(name))
    model = from_torch(
        checkpoint,
        name=name,
        num_classes=num_classes,
        drop=drop,
        keep=keep,
        dtype=dtype or jnp.float32,
        param_dtype=param_dtype,
        **settings | overrides,
    )
    return model, _metadata_for(model, checkpoint)


def settings_in(known: Mapping, name: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of the model in the metadata of a state dict, unless `name` contradicts them."""
    kept = known.get("model", {})
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in kept.get("overrides", {}).items()}
    if "name" not in kept:
        return name, settings
    if name not in ("auto", kept["name"]):
        return name, {}
    # In segjax's metadata, missing settings are the model's defaults, not those of the dialect.
    return kept["name"], models.settings(kept["name"]) | settings


def _metadata_for(model: SegmentationModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata of a model that was built for a state dict."""
    found = checkpoint.recognised
    provenance = {**checkpoint.provenance, "dialect": found.key_format.dialect, "package": found.key_format.package}
    known = {"licence": metadata.licence_of(model.spec.name), **checkpoint.metadata}
    known |= {"model": model_metadata(model), "provenance": provenance}
    dataset, classes = known.pop("dataset", None), model.spec.num_classes
    numbered, ignored = known.pop(metadata.NUMBERED_NAMES, ({}, None))
    # The class names of an encoder are ImageNet's.
    if found.has_head:
        if numbered and (names := metadata.matched(numbered, classes)):
            dataset = metadata.of_names(names, ignore_label=ignored).get("dataset")
        known |= _dataset(dataset, classes)
        if "dataset" not in known:
            logger.info("the checkpoint does not name its classes")
        elif known["dataset"].get("guessed"):
            logger.info("it names no classes; %d are assumed to be those of %s", classes, known["dataset"]["name"])
    if "normalisation" not in known and model.in_channels != 3:
        logger.info(
            "it does not state how images of %s are normalised: values are not changed (mean 0, deviation 1)",
            specs.ImageKind(model.in_channels, None),
        )
    return metadata.completed(known, channels=model.in_channels)


def _dataset(dataset: Mapping | None, num_classes: int) -> dict[str, Any]:
    """{"dataset": ...} of the metadata if it has a name for each class of the model; else a guess, or {}."""
    if dataset and len(dataset["class_names"]) == num_classes:
        return {"dataset": dataset}
    if dataset:
        logger.info("its %d class names are not used: it has %d classes", len(dataset["class_names"]), num_classes)
    return metadata.guessed(num_classes)
