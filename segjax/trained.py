"""A model together with what its outputs mean, from whatever it is kept in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.data import specs
from segjax.files import read_file
from segjax.weights import from_torch


class Trained(NamedTuple):
    """A model in evaluation mode and what came with it.

    Attributes:
      spec: names and colours of its classes, and the label to ignore.
      about: the record beside the weights; empty for a PyTorch checkpoint.
    """

    model: nnx.Module
    spec: specs.DatasetSpec
    about: Mapping[str, object]


# What a checkpoint that names no classes was most likely trained on.
BY_NUMBER = {spec.num_classes: spec for spec in (specs.CITYSCAPES, specs.ADE20K, specs.VOC, specs.CAMVID)}


def load_trained(source: str | Path, *, dtype: jnp.dtype | None = None) -> Trained:
    """The model of a converted folder, of a training or of any PyTorch checkpoint, with the meaning of its classes.

    Args:
      dtype: of the computation; float32 unless given.

    Raises:
      CheckpointError: nothing there, or nothing that can be read as a model.
    """
    from segjax import checkpoint

    source = Path(source).expanduser()
    if source.is_dir():
        model = checkpoint.load_model(source, dtype=dtype)
        _, about = checkpoint.load_weights(source)
    else:
        model, about = from_torch(read_file(source), dtype=dtype or jnp.float32), {}
    model.eval()
    return Trained(model, _spec_of(about.get("dataset"), model.spec.num_classes), about)


def _spec_of(record: Mapping | None, num_classes: int) -> specs.DatasetSpec:
    if record:
        colors = tuple(tuple(color) for color in record["colors"])
        return specs.DatasetSpec(record["name"], tuple(record["class_names"]), colors, record["ignore_label"])
    if num_classes in BY_NUMBER:
        return BY_NUMBER[num_classes]
    hues = np.arange(num_classes) * 0.618033988749895 % 1
    colors = tuple(
        tuple(int(127.5 + 127.5 * np.cos(2 * np.pi * (hue + shift))) for shift in (0, 1 / 3, 2 / 3)) for hue in hues
    )
    return specs.DatasetSpec("unknown", tuple(f"class {k}" for k in range(num_classes)), colors, 255)
