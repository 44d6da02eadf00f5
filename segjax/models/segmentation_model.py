"""The base class of all models."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

# Of a model; published ones have at most 108. They are built one by one: so many take 10 s.
MOST_BLOCKS = 512


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The arguments of `create`, which a checkpoint stores so that its model can be created again."""

    name: str
    num_classes: int
    overrides: tuple[tuple[str, object], ...]


class SegmentationModel(nnx.Module):
    """Images (B, H, W, C), normalised -> logits (B, h, w, K) at the model's own stride, and taps by name.

    Attributes:
      spec: arguments that the model was created with; set by `create`.
      dtype: type of the computation.
      in_channels: C, number of channels of its images; 3 for RGB.
      size_multiple: number that height and width of images must be multiples of.
      align_corners: of the bilinear upsampling of its logits, the auxiliary ones too, to the size of labels or images.
    """

    spec: ModelSpec
    dtype: jnp.dtype
    in_channels: int = 3
    size_multiple: int = 1
    align_corners: bool = False

    @abc.abstractmethod
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits, and taps by name."""
