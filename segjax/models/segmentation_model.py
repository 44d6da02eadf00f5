"""What all models have in common."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What `create` was called with, so that a checkpoint can say how to build its model again."""

    name: str
    num_classes: int
    overrides: tuple[tuple[str, object], ...]


class SegmentationModel(nnx.Module):
    """Images (B, H, W, 3), normalised -> logits (B, h, w, K) at the model's own stride, and taps by name.

    Attributes:
      spec: how it was made; set by `create`.
      dtype: of the computation.
      size_multiple: what the sides of images must divide by.
    """

    spec: ModelSpec
    dtype: jnp.dtype
    size_multiple: int = 1

    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]: ...
