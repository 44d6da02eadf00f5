"""Label maps of images from any checkpoint, NumPy on both sides.

predictor = segjax.Predictor("runs/mine")
labels = predictor(image)  # uint8 (H, W) of uint8 (H, W, 3)
predictor.classes.label_names[labels[0, 0]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from segjax.checkpoints.load import LoadedCheckpoint, load
from segjax.checkpoints.metadata import classes_of
from segjax.inference.engine import Inference, Protocol

# Pixels that a model is given at once. The attention of a SegFormer needs memory by the square of this: at 2**24,
# 4096 x 4096, it is 64 GiB.
LARGEST_WHOLE = 2**24
# A 16-bit image that is nowhere as bright as this is black to the eye: it holds 12 bits or fewer.
DARKEST_16_BIT = 2**12


def as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of an image in one of the usual forms; one that is that already is returned itself.

    Grey, (H, W) or (H, W, 1), is repeated. Alpha, the last channel of (H, W, 4), is left out, and what it hides is
    seen. uint16 is rounded to 8 bits, 65535 to 255.

    Raises:
      ValueError: any other form; 16 bits of which only 12 are used.
    """
    image = np.asarray(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    problems = []
    if image.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in image.shape:
        problems.append(f"its shape is {image.shape}; an image is (H, W, 3), or grey (H, W), or RGBA (H, W, 4)")
    if image.dtype not in (np.uint8, np.uint16):
        problems.append(f"its numbers are {image.dtype}; convert them to uint8, 0 to 255")
    elif image.dtype == np.uint16 and image.size and 0 < (brightest := int(image.max())) < DARKEST_16_BIT:
        problems.append(
            f"its brightest value is {brightest} of 65535, black to the model; if fewer bits are used, scale them up"
        )
    if problems:
        raise ValueError(f"an image that cannot be used: {'; '.join(problems)}")
    if image.dtype == np.uint16:
        # A table: to compute with wider numbers would take four times the memory of the image.
        image = ((np.arange(2**16) + 128) // 257).astype(np.uint8)[image]
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., :3]


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
        checkpoint_or_model: str | Path | LoadedCheckpoint | nnx.Module,
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
        given = Protocol(mode=mode, scales=tuple(scales), flip=flip)
        if mode == "whole" and (crop is not None or stride is not None):
            raise ValueError("crop and stride are those of windows: give mode='slide' too, or leave them out")
        if wrong := [name for name, value in (("pad_multiple", pad_multiple), ("batch", batch)) if value < 1]:
            raise ValueError(f"{' and '.join(wrong)} must be at least 1")
        if mode == "slide":
            crop = given.crop if crop is None else tuple(crop)
            stride = tuple(max(side * 3 // 4, 1) for side in crop) if stride is None else tuple(stride)
            given = Protocol(mode=mode, crop=crop, stride=stride, scales=given.scales, flip=flip)
        match checkpoint_or_model:
            case LoadedCheckpoint():
                loaded = checkpoint_or_model
            case nnx.Module():
                loaded = LoadedCheckpoint(checkpoint_or_model, classes_of({}, checkpoint_or_model.spec.num_classes))
            case _:
                loaded = load(checkpoint_or_model)
        self.classes = loaded.classes
        self.protocol = given
        self.pad_multiple = pad_multiple
        self.batch = batch
        self._inference = Inference(loaded.model, given, batch=batch, normalise=loaded.normalise)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Train ids, uint8 (H, W), of an RGB image, uint8 (H, W, 3), or one that `as_rgb` makes such.

        Raises:
          ValueError: an image that cannot be used, or that is too large for mode "whole" or too small for the model.
        """
        return self.labels([image])[0]

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Probability of each class, float32 (H, W, K), of the same; K = 1 is that of the class."""
        return self.probabilities_of([image])[0]

    def labels(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What a call gives, of several images of one `padded_size`."""
        return self._of(self._inference.labels, images)

    def probabilities_of(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What `probabilities` gives, of several images of one `padded_size`."""
        return [scores.astype(np.float32, copy=False) for scores in self._of(self._inference.probabilities, images)]

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Height and width that an image of this shape has when the model is given it."""
        height, width = (-(-side // self.pad_multiple) * self.pad_multiple for side in size[:2])
        return height, width

    def _of(self, function: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray]) -> list[np.ndarray]:
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
