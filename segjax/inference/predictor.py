"""Label maps of images from any checkpoint, as NumPy arrays.

For example:

    predictor = segjax.Predictor("runs/mine")
    labels = predictor(image)  # uint8 (H, W, 3) -> uint8 (H, W), or uint16 (H, W) for more than 256 classes
    predictor.classes.label_names[labels[0, 0]]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segjax.checkpoints import temperature as _temperature
from segjax.data.codec import MAX_PIXELS
from segjax.inference.engine import Inference, Protocol
from segjax.inference.images import Image, Scale, as_image, check_scale
from segjax.inference.open_exported import Loaded, opened, protocol_for
from segjax.inference.sliding_window import Pixels
from segjax.models.segmentation_model import SegmentationModel

# Maximum number of pixels of a whole image. The memory of SegFormer's attention grows with its square: it is 64 GiB for
# 2**24 pixels, 4096 x 4096.
LARGEST_WHOLE = 2**24


class Predictor:
    """Predicts label maps of images. It is safe to call from several threads.

    Attributes:
      classes: Names and colours of the classes; `classes.label_names[label]` is the name of a label. If the model has
        one class, 0 is the background and 1 the class.
      protocol: Protocol of the scores: window, scales, flips and sizes.
      image_kind: Channels and dtype of the images that the model takes.
      mean: Mean of the training images, C numbers.
      pad_multiple: Argument of the constructor.
      batch: Argument of the constructor.
      scale: Argument of the constructor.
      max_pixels: Argument of the constructor.

    Example:
      >>> import numpy as np
      >>> import segjax
      >>> model = segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
      >>> predictor = segjax.Predictor(model)
      >>> labels = predictor(np.zeros((40, 56, 3), np.uint8))
      >>> labels.shape, labels.dtype
      ((40, 56), dtype('uint8'))
    """

    def __init__(
        self,
        checkpoint_or_model: str | Path | Loaded | SegmentationModel,
        *,
        mode: str | None = None,
        crop: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        size_divisor: int = 1,
        base_size: tuple[int, int] | None = None,
        threshold: float | None = None,
        temperature: float | str | None = None,
        pad_multiple: int = 1,
        batch: int = 1,
        scale: Scale | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        """Loads the model. The first image of each size, or crop size with mode "slide", compiles a program.

        Args:
          checkpoint_or_model: Folder of a run or of a conversion; a PyTorch checkpoint, `.pth` or `.safetensors`; the
            result of `segjax.load`; or a model, whose classes are named by their numbers. Or an exported file
            (`segjax.open_exported`), or what that returns.
          mode: "whole", or "slide" for a sliding window, whose memory does not grow with the height of the image. By
            default "whole", or "slide" for an exported file that gives scores of images of one size.
          crop: (height, width) of the sliding window in pixels; by default 512 per side, or the size that an exported
            file takes.
          stride: (height, width) of its steps in pixels; by default three quarters of the crop.
          scales: Factors of the image size; probabilities are averaged over them.
          flip: Whether to score each scale mirrored too. With several scales or flips, the probabilities of all classes
            for the whole image are in memory, even with mode "slide".
          size_divisor: Divisor of the input's sides: each scaled image is resized up to multiples of it
            (mmsegmentation's AlignedResize); 32 for SegFormer on ADE20K.
          base_size: (long, short) in pixels within which each image is first resized, with its aspect ratio; `scales`
            are factors of it. (2048, 512) for models of ADE20K.
          threshold: Probability above which a pixel belongs to the class, for a model of one class; by default 0.5.
          temperature: Divisor of the logits before softmax or sigmoid; "fitted" for the one that `segjax evaluate
            --fit-temperature` keeps with the checkpoint. By default 1.
          pad_multiple: Divisor of the padded sides: images are padded by reflection, at the bottom and right, up to
            multiples of it, so that images of many sizes share programs. With 1, labels are exact; larger values change
            some of them (64, for a SegFormer: in 8% of the pixels of scenes that are 96 to 160 pixels high).
          batch: Number of images of one padded size, or of crops, per call of the model.
          scale: (low, high), the values of black and white in images with more than 8 bits; see
            `segjax.inference.images`.
          max_pixels: Maximum number of pixels of a file.

        Raises:
          CheckpointError: No model can be read from the checkpoint.
          ValueError: Settings contradict each other.
        """
        settings: dict[str, Any] = dict(
            mode=mode, crop=crop, stride=stride, scales=scales, flip=flip, size_divisor=size_divisor
        )
        settings |= dict(base_size=base_size, threshold=threshold)
        # Checked before the model is loaded.
        Protocol(**{key: value for key, value in settings.items() if value is not None})
        if pad_multiple > 1 and (size_divisor > 1 or base_size is not None):
            raise ValueError("pad_multiple is for images at their own size; omit it, or base_size and size_divisor")
        counts = {"pad_multiple": pad_multiple, "batch": batch, "max_pixels": max_pixels}
        if wrong := [name for name, value in counts.items() if value < 1]:
            raise ValueError(f"{' and '.join(wrong)} must be at least 1")
        check_scale(scale)
        loaded = opened(checkpoint_or_model)
        chosen = _temperature.chosen(temperature, loaded.metadata, checkpoint_or_model)
        self.protocol = dataclasses.replace(protocol_for(loaded.model, settings), temperature=chosen)
        self.classes, self.image_kind = loaded.classes, loaded.image_kind
        if scale is not None and not self.image_kind.is_rgb:
            raise ValueError(f"scale is for 8-bit RGB, but the model takes {self.image_kind}, as they are; omit it")
        self.pad_multiple = pad_multiple
        self.batch = batch
        self.scale = scale
        self.max_pixels = max_pixels
        self._inference = Inference(
            loaded.model,
            self.protocol,
            batch=batch,
            normalise=loaded.normalise,
            image_dtype=self.image_kind.dtype,
        )
        self.mean = loaded.mean

    def __call__(self, image: Image) -> np.ndarray:
        """Predicts the labels of an image.

        Args:
          image: RGB image, uint8 (H, W, 3); or a path, a PIL image or another array that
            `segjax.inference.images.as_rgb` converts. For a model of other images, an array (H, W, C) of their dtype,
            or a path; see `image_kind`.

        Returns:
          Labels (H, W), uint8, or uint16 for more than 256 classes.

        Raises:
          ValueError: The image cannot be used, or is too large for mode "whole" or too small for the model.
          TooLittleMemoryError: The model needs more memory for the image than there is.
        """
        return self.labels([image])[0]

    def probabilities(self, image: Image) -> np.ndarray:
        """Probability of each class in an image, float32 (H, W, K); for K = 1 that of the class, not the background."""
        return self.probabilities_of([image])[0]

    def labels(self, images: Sequence[Image]) -> list[np.ndarray]:
        """Labels (H, W) of several images with the same `padded_size`."""
        return [labels for (labels,) in self._of(lambda images: zip(self._inference.labels(images)), images)]

    def mapped(self, images: Sequence[Image]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Labels and maps of certainty of several images with the same `padded_size`.

        Returns:
          For each image, its labels (H, W), and uint8 (H, W, 2): 255 times the probability of the predicted class, and
          255 times the entropy of the probabilities over its largest value, log K (log 2 for a model of one class).

        Example:
          >>> import numpy as np
          >>> import segjax
          >>> model = segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 10, 16), decoder_dim=8)
          >>> ((labels, maps),) = segjax.Predictor(model).mapped([np.zeros((40, 56, 3), np.uint8)])
          >>> maps.shape, maps.dtype
          ((40, 56, 2), dtype('uint8'))
        """
        return [(labels, maps) for labels, maps in self._of(self._inference.mapped, images)]

    def probabilities_of(self, images: Sequence[Image]) -> list[np.ndarray]:
        """Probabilities, float32 (H, W, K), of several images with the same `padded_size`."""
        found = self._of(lambda images: zip(self._inference.probabilities(images)), images)
        return [scores.astype(np.float32, copy=False) for (scores,) in found]

    def label_tiles(self, image: Pixels) -> Iterator[tuple[int, int, np.ndarray]]:
        """Labels of an image of any size, in tiles that cover it: top, left, labels (h, w).

        The image, (H, W, C), is read in parts, so memory does not grow with it. The labels equal those of a call. It
        requires mode "slide" at one scale, without flips and padding.
        """
        return self._inference.label_tiles(image)

    def mapped_tiles(self, image: Pixels) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """`label_tiles`, each with the maps (h, w, 2) of `mapped`."""
        return self._inference.mapped_tiles(image)

    def refuse_too_large(self, size: tuple[int, int]) -> None:
        """Compiles the program for images of this size, (height, width).

        Raises:
          ValueError: The images are too large for mode "whole".
          TooLittleMemoryError: The program needs more memory than there is.
        """
        self._refuse_too_large(size)
        self._inference.refuse_too_large([self.padded_size(size)], batch=self.protocol.images_at_a_time(self.batch))

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of an image of this shape after padding."""
        height, width = (-(-side // self.pad_multiple) * self.pad_multiple for side in size[:2])
        return height, width

    def _of(
        self, function: Callable[[list[np.ndarray]], Iterable[tuple[np.ndarray, ...]]], images: Sequence[Image]
    ) -> list[tuple[np.ndarray, ...]]:
        """The arrays (H, W, ...) of each image that `function` gives for groups of padded images."""
        kind, scale, most = self.image_kind, self.scale, self.max_pixels
        images = [as_image(image, kind, scale=scale, max_pixels=most) for image in images]
        for image in images:
            self._refuse_too_large(image.shape[:2])
        padded = [self._padded(image) for image in images]
        # The last group is filled up, because each number of images would compile another program.
        filled = padded + padded[-1:] * (-len(padded) % self.batch if self.protocol.mode == "whole" else 0)
        groups = [filled[at : at + self.batch] for at in range(0, len(filled), self.batch)]
        outputs = [out for group in groups for out in function(group)]
        # Copied, because jax arrays are read-only, and a view would keep the whole group in memory.
        return [
            tuple(np.array(array[: image.shape[0], : image.shape[1]]) for array in arrays)
            for image, arrays in zip(images, outputs, strict=False)
        ]

    def _padded(self, image: np.ndarray) -> np.ndarray:
        height, width = self.padded_size(image.shape)
        if (height, width) == image.shape[:2]:
            return image
        return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), mode="reflect")

    def _refuse_too_large(self, size: tuple[int, int]) -> None:
        height, width = max(self.protocol.input_sizes(size), key=math.prod)
        if self.protocol.mode == "whole" and height * width > LARGEST_WHOLE:
            resized = f" that is resized to {height}x{width}" * ((height, width) != size)
            raise ValueError(
                f"an image of {size[0]}x{size[1]}{resized} is too large to go through a model as a whole "
                f"(at most {LARGEST_WHOLE:,} pixels); use mode 'slide'"
            )
