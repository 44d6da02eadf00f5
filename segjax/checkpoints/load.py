"""A model together with what its outputs mean and what it takes for an image, from whatever it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.checkpoints.files import model_of, read_checkpoint
from segjax.checkpoints.metadata import spec_of
from segjax.checkpoints.state_dict import CheckpointError
from segjax.data import specs
from segjax.data.augment import normalise


class Trained(NamedTuple):
    """A model in evaluation mode and what came with it.

    Attributes:
      spec: names and colours of its classes, and the label to ignore.
      about: the record beside the weights, as `segjax.record` has it. Where `about["dataset"]["guessed"]` is set, the
        checkpoint names no classes and those of `spec` are guessed from their number.
      mean, std: of the images that it was trained on, RGB in 0..255.
    """

    model: nnx.Module
    spec: specs.DatasetSpec
    about: Mapping[str, object]
    mean: tuple[float, float, float] = specs.IMAGENET_MEAN
    std: tuple[float, float, float] = specs.IMAGENET_STD

    @property
    def named(self) -> Mapping | None:
        """The record of the data set, where the checkpoint names its classes itself."""
        record = self.about.get("dataset")
        return None if not record or record.get("guessed") else record

    def normalise(self, images: jax.Array) -> jax.Array:
        """RGB 0..255 (..., 3) of any type -> float32 as the model takes it."""
        return normalise(images, self.mean, self.std)


def load_trained(source: str | Path, *, dtype: jnp.dtype | None = None) -> Trained:
    """The model of whatever is read as a checkpoint, and the record that predicting needs.

    Args:
      source: a converted folder, that of a training, any PyTorch checkpoint, a folder of transformers, or
        hf:owner/name[@revision] on the Hub.
      dtype: of the computation; float32 unless given.

    Raises:
      CheckpointError: nothing there, nothing that can be read as a model, or an encoder alone.
    """
    contents = read_checkpoint(source, dtype=dtype)
    try:
        model, about = model_of(contents, dtype=dtype or jnp.float32)
        spec = spec_of(about, model.spec.num_classes)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    model.eval()
    mean, std = (tuple(about["normalisation"][key]) for key in ("mean", "std"))
    return Trained(model, spec, about, mean, std)
