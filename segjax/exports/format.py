"""What an exported file takes, gives and is stored as."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from segjax.data import specs

if TYPE_CHECKING:
    import jax
    import numpy as np

SUFFIXES = {"stablehlo": ".stablehlo", "onnx": ".onnx", "torch": ".pt2"}
PLATFORMS = ("cpu", "cuda")
# Smallest side of an image where sizes are left open: two pixels in the smallest map of every family. `torch.export`
# would take a map of one pixel for another program.
LEAST = 64
# How far a file may be from our model, by the type it computes in: max |file - ours| / max |ours|. Both sides have the
# same weights, rounded if they are. 2e-6 was the worst measured in float32; programs of 16 bits differ in how XLA
# merges their roundings.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """What a file is to be.

    Attributes:
      format: a key of `SUFFIXES`. size: (H, W).
      dynamic: whether batch, height and width are left open; else the batch is 1.
      preprocessing: whether it normalises. argmax: whether it gives labels.
      dtype: of the weights.
      mean, std: of the images that the model was trained on, RGB in 0..255.
    """

    format: str
    size: tuple[int, int]
    dynamic: bool = False
    preprocessing: bool = False
    argmax: bool = False
    dtype: str = "float32"
    mean: tuple[float, float, float] = specs.IMAGENET_MEAN
    std: tuple[float, float, float] = specs.IMAGENET_STD

    def normalise(self, images: jax.Array | np.ndarray) -> jax.Array:
        """RGB 0..255 (..., 3) of any type -> float32 as the model takes it."""
        from segjax.data.augment import normalise

        return normalise(images, self.mean, self.std)

    @property
    def channels_last(self) -> bool:
        """Whether `images` are (B, H, W, 3), else (B, 3, H, W)."""
        return self.preprocessing or self.format == "stablehlo"

    @property
    def computes_in(self) -> str:
        return self.dtype if self.format == "stablehlo" else "float32"

    @property
    def output(self) -> str:
        return "labels" if self.argmax else "logits"
