"""Label maps of images from any checkpoint, NumPy on both sides.

predictor = segjax.Predictor("runs/mine")
labels = predictor(image)  # uint8 (H, W) of uint8 (H, W, 3)
predictor.classes.label_names[labels[0, 0]]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segjax.checkpoints.load import LoadedCheckpoint, as_loaded
from segjax.inference.engine import Inference, Protocol
from segjax.inference.images import as_rgb
from segjax.models.segmentation_model import SegmentationModel

# What `as_rgb` takes: an array, a path, or a PIL image. PIL is not imported, hence Any.
Image = np.ndarray | str | os.PathLike[str] | Any
# Pixels that a model is given at once. The attention of a SegFormer needs memory by the square of this: at 2**24,
# 4096 x 4096, it is 64 GiB.
LARGEST_WHOLE = 2**24


class Predictor:
    """A model that takes images and gives label maps. Safe to call from several threads.

    Attributes:
      classes: names and colours of the classes; `classes.label_names[label]` is the name of a label. If the model has
        one class, 0 is the background and 1 the class.
      protocol: how the scores of an image come about.
      pad_multiple, batch: as given.
    """

    def __init__(
        self,
        checkpoint_or_model: str | Path | LoadedCheckpoint | SegmentationModel,
        *,
        mode: str = "whole",
        crop: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        pad_multiple: int = 1,
        batch: int = 1,
    ):
        """Loads the model; programs are compiled at first use, one for each size of image or, in windows, of crop.

        Args:
          checkpoint_or_model: the folder of a training or of a conversion; a PyTorch checkpoint, `.pth` or
            `.safetensors`; the result of `segjax.load`; or a model, whose classes are called by their numbers.
          mode: "whole", or "slide": in windows, where images of any size need the memory of one row of them.
          crop, stride: of "slide", (height, width) in pixels; 512 a side, and three quarters of the crop.
          scales: of the image, probabilities averaged. flip: beside each scale its mirror image. Both hold the
            probabilities of all classes for the whole image, also in windows.
          pad_multiple: sizes are padded up to multiples of this, at the bottom and right, by reflection, so that images
            of many sizes share few programs. Labels then differ (with 64, a SegFormer's of 8 in 100 pixels of scenes
            of 96 to 160 rows); with 1 they are exact.
          batch: images of one padded size, or windows, that go through the model at a time.

        Raises:
          CheckpointError: nothing that can be read as a model. ValueError: settings that contradict each other.
        """
        self.protocol = Protocol(mode, crop, stride, scales, flip)
        if wrong := [name for name, value in (("pad_multiple", pad_multiple), ("batch", batch)) if value < 1]:
            raise ValueError(f"{' and '.join(wrong)} must be at least 1")
        loaded = as_loaded(checkpoint_or_model)
        self.classes = loaded.classes
        self.pad_multiple = pad_multiple
        self.batch = batch
        self._inference = Inference(loaded.model, self.protocol, batch=batch, normalise=loaded.normalise)

    def __call__(self, image: Image) -> np.ndarray:
        """Labels, uint8 (H, W).

        Args:
          image: uint8 (H, W, 3), RGB; or a path, a PIL image or another array that `segjax.inference.images.as_rgb`
            converts.

        Raises:
          ValueError: an image that cannot be used, or that is too large for mode "whole" or too small for the model.
        """
        return self.labels([image])[0]

    def probabilities(self, image: Image) -> np.ndarray:
        """Probability of each class, float32 (H, W, K), of the same; K = 1 is that of the class."""
        return self.probabilities_of([image])[0]

    def labels(self, images: Sequence[Image]) -> list[np.ndarray]:
        """What a call gives, of several images of one `padded_size`."""
        return self._of(self._inference.labels, images)

    def probabilities_of(self, images: Sequence[Image]) -> list[np.ndarray]:
        """What `probabilities` gives, of several images of one `padded_size`."""
        return [scores.astype(np.float32, copy=False) for scores in self._of(self._inference.probabilities, images)]

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Height and width that an image of this shape has when the model is given it."""
        height, width = (-(-side // self.pad_multiple) * self.pad_multiple for side in size[:2])
        return height, width

    def _of(self, function: Callable[[np.ndarray], np.ndarray], images: Sequence[Image]) -> list[np.ndarray]:
        images = [as_rgb(image) for image in images]
        for image in images:
            self._refuse_too_large(image.shape[:2])
        padded = [self._padded(image) for image in images]
        # A group that is short is filled up, because another number of images would be another program.
        filled = padded + padded[-1:] * (-len(padded) % self.batch if self.protocol.mode == "whole" else 0)
        groups = [filled[at : at + self.batch] for at in range(0, len(filled), self.batch)]
        # A single image is not copied: it may be most of the memory.
        stacks = (group[0][None] if len(group) == 1 else np.stack(group) for group in groups)
        outputs = [out for stack in stacks for out in function(stack)]
        # Copies: what jax gives cannot be written to, and would keep the whole group.
        return [np.array(out[: image.shape[0], : image.shape[1]]) for image, out in zip(images, outputs, strict=False)]

    def _padded(self, image: np.ndarray) -> np.ndarray:
        height, width = self.padded_size(image.shape)
        if (height, width) == image.shape[:2]:
            return image
        return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), mode="reflect")

    def _refuse_too_large(self, size: tuple[int, int]) -> None:
        height, width = size
        scale = max(self.protocol.scales)
        if self.protocol.mode == "whole" and height * width * scale**2 > LARGEST_WHOLE:
            scaled = f" at scale {scale:g}" * (scale != 1)
            raise ValueError(
                f"an image of {height}x{width}{scaled} is too large to go through a model as a whole "
                f"(at most {LARGEST_WHOLE:,} pixels); take mode 'slide'"
            )
