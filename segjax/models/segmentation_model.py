"""The base class of all models."""

from __future__ import annotations

import abc
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

# Maximum number of blocks of a model, which take 10 s to build. Published models have at most 108.
MOST_BLOCKS = 512


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The arguments of `create`. A checkpoint stores them so that its model can be created again.

    Attributes:
      name: A key of `models.MODELS`.
      num_classes: Number of classes K.
      overrides: Settings that differ from the defaults, as pairs of name and value, sorted by name.
    """

    name: str
    num_classes: int
    overrides: tuple[tuple[str, object], ...]


class ModelInterface(Protocol):
    """What a `SegmentationModel` and a model in an exported file have in common."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def in_channels(self) -> int: ...

    @property
    def size_multiple(self) -> int: ...

    @property
    def align_corners(self) -> bool: ...


class SegmentationModel(nnx.Module):
    """Base class: normalised images (B, H, W, C) -> logits (B, h, w, K) at the model's own stride, and taps by name.

    Attributes:
      spec: Arguments of the `create` call that made the model.
      dtype: Dtype of the computation.
      in_channels: Number of channels C of the images; 3 for RGB.
      size_multiple: Number that must divide height and width of the images.
      align_corners: Alignment of the bilinear upsampling of logits, including auxiliary ones, to the size of labels or
        images.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import models
      >>> model = models.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> isinstance(model, models.SegmentationModel), model(jnp.zeros((1, 32, 64, 3)))[0].shape
      (True, (1, 8, 16, 5))
    """

    spec: ModelSpec
    dtype: jnp.dtype
    in_channels: int = 3
    size_multiple: int = 1
    align_corners: bool = False

    @abc.abstractmethod
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns logits (B, h, w, K), and taps by name."""
