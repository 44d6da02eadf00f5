"""Labels and probabilities of images: by one pass of the model or by a sliding window, at one scale or several.

The protocols are mmsegmentation's. An image is resized (OpenCV's bilinear filter, rounded to 8 bits), the model scores
it as a whole or crop by crop, scores are upsampled to the size that the model was given and from there to the image's
own. With several scales or flips, probabilities are averaged.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from segjax import layers
from segjax.data.augment import normalise
from segjax.inference.sliding_window import row_tiles
from segjax.models.functional import FunctionalModel
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime.parallel import JitParallel, compiler_options

# Parameters or running statistics by dotted path.
Arrays = dict[str, jax.Array]


class SlidingWindow(NamedTuple):
    """Crops and the steps between them, (height, width) in pixels."""

    crop: tuple[int, int]
    stride: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the scores of an image are computed.

    Attributes:
      mode: "whole", or "slide" for a sliding window.
      crop, stride: of the sliding window, (height, width) in pixels: 512 a side and three quarters of the crop unless
        given; None for whole images. The last crop of a row or column is shifted inside; where crops overlap, their
        scores are averaged.
      scales: of the image; probabilities are averaged.
      flip: whether each scale is also scored mirrored.
      size_divisor: each scaled image is resized once more, up to multiples of this (mmsegmentation's AlignedResize).
    """

    mode: str = "whole"
    crop: Sequence[int] | None = None
    stride: Sequence[int] | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    size_divisor: int = 1

    def __post_init__(self):
        if self.mode == "slide":
            crop = (512, 512) if self.crop is None else tuple(self.crop)
            stride = [max(side * 3 // 4, 1) for side in crop] if self.stride is None else self.stride
            object.__setattr__(self, "crop", crop)
            object.__setattr__(self, "stride", tuple(stride))
        object.__setattr__(self, "scales", tuple(self.scales))
        wrong = {
            f"mode is 'whole' or 'slide', not {self.mode!r}": self.mode not in ("whole", "slide"),
            "crop and stride are those of a sliding window: give mode 'slide' too, or omit them": (
                self.mode == "whole" and (self.crop, self.stride) != (None, None)
            ),
            f"crop is (height, width), not {self.crop}": self.crop is not None and not _are_sides(self.crop),
            f"stride is (height, width), not {self.stride}": self.stride is not None and not _are_sides(self.stride),
            f"a stride of {self.stride} leaves gaps between crops of {self.crop}": self.mode == "slide"
            and any(step > side for step, side in zip(self.stride or (), self.crop or (), strict=False)),
            f"scales are positive numbers, not {self.scales}": (
                not self.scales or not all(0 < scale < np.inf for scale in self.scales)
            ),
            f"size_divisor must be at least 1: {self.size_divisor}": self.size_divisor < 1,
        }
        if problems := [message for message, is_wrong in wrong.items() if is_wrong]:
            raise ValueError("; ".join(problems))

    def __str__(self) -> str:
        parts = ["whole images"]
        if self.window:
            (height, width), (down, across) = self.window
            parts = [f"sliding window of {height}x{width} every {down}x{across}"]
        if self.scales != (1.0,):
            parts.append(f"at scales {' '.join(f'{scale:g}' for scale in self.scales)}")
        if self.flip:
            parts.append("and mirrored")
        if self.size_divisor > 1:
            parts.append(f"resized to multiples of {self.size_divisor}")
        return ", ".join(parts)

    def record(self) -> dict[str, object]:
        """The settings that apply, as JSON has them."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @property
    def window(self) -> SlidingWindow | None:
        """The sliding window; None for whole images."""
        if self.crop is None or self.stride is None:
            return None
        (height, width), (down, across) = self.crop, self.stride
        return SlidingWindow((height, width), (down, across))

    @property
    def is_one_pass(self) -> bool:
        """Whether the model is given the pixels of the image itself, once."""
        return self.scales == (1.0,) and not self.flip and self.size_divisor == 1


def _are_sides(sides: Sequence[object]) -> bool:
    return len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width of an image of `size` times `scale`, as `Resize(scale_factor=..., keep_ratio=True)` has them.

    That is the largest size of the image's own proportions inside the rounded one: up to a pixel less on one side.

    Raises:
      ValueError: a side would have no pixel.
    """
    bounds = [int(side * scale + 0.5) for side in size]
    factor = min(max(bounds) / max(size), min(bounds) / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    if not (height and width):
        raise ValueError(f"nothing is left of an image of {size[0]}x{size[1]} at scale {scale:g}; use a larger scale")
    return height, width


def scaled(image: np.ndarray, scale: float, size_divisor: int) -> np.ndarray:
    """An image (H, W, 3) uint8, resized by `scale` and from there up to multiples of `size_divisor`."""
    import cv2

    near = scaled_size(image.shape[:2], scale)
    for height, width in (near, [-(-side // size_divisor) * size_divisor for side in near]):
        if (height, width) != image.shape[:2]:
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def score(
    functional: FunctionalModel, params: Arrays, batch_stats: Arrays, images: jax.Array, *, normalise: Callable
) -> jax.Array:
    """Logits of uint8 images (B, H, W, 3) at their own size: float32 or wider (B, H, W, K).

    For a model that takes only multiples of some size, the image is padded with zeros, the mean colour, at the bottom
    and on the right, and the scores of the padding are cut off.
    """
    height, width = images.shape[1:3]
    below, right = -height % functional.size_multiple, -width % functional.size_multiple
    padded = jnp.pad(normalise(images), ((0, 0), (0, below), (0, right), (0, 0)))
    logits, _ = functional.bind(params, batch_stats)(padded)
    return layers.resize(logits, (height + below, width + right))[:, :height, :width]


def predict_labels(
    functional: FunctionalModel, params: Arrays, batch_stats: Arrays, images: jax.Array, *, normalise: Callable
) -> jax.Array:
    """Train ids of uint8 images (B, H, W, 3), as a whole: uint8 (B, H, W)."""
    return labels_of(score(functional, params, batch_stats, images, normalise=normalise)).astype(jnp.uint8)


class Inference:
    """A model and a protocol, compiled once for each shape of its input. Safe to call from several threads."""

    def __init__(
        self,
        model: SegmentationModel,
        protocol: Protocol = Protocol(),
        *,
        batch: int = 1,
        normalise: Callable[[jax.Array], jax.Array] = normalise,
    ):
        """Takes the parameters out of the model and puts them on every device.

        Args:
          batch: number of crops of a sliding window that the model scores at a time.
          normalise: uint8 images -> input of the model.
        """
        self.protocol = protocol
        self._batch = batch
        self._parallel = JitParallel()
        functional = FunctionalModel(model)
        self._arrays = self._parallel.replicate(functional.arrays())
        options = compiler_options(self._parallel.devices[0].platform)
        self._labels = jax.jit(partial(predict_labels, functional, normalise=normalise), compiler_options=options)
        self._score = jax.jit(partial(score, functional, normalise=normalise), compiler_options=options)

    def labels(self, images: np.ndarray) -> np.ndarray:
        """Train ids (B, H, W), uint8, of uint8 RGB images (B, H, W, 3)."""
        if not self.protocol.is_one_pass:
            return np.asarray(_labels_of_probabilities(self._mean(images)))
        if self.protocol.mode == "whole":
            return np.asarray(self._labels(*self._arrays, self._placed(images)))
        tiles = ([np.asarray(_labels(tile)) for tile in self.row_tiles(image)] for image in images)
        return np.stack([np.concatenate(of_image) for of_image in tiles])

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probability of each class, float32 (B, H, W, K); for K = 1 that of the class, not of the background."""
        return np.asarray(self._mean(images))

    def _mean(self, images: np.ndarray) -> jax.Array:
        """The mean of the probabilities over scales and flips, of which one is in memory next to the sum."""
        count = len(self.protocol.scales) * (1 + self.protocol.flip)
        return functools.reduce(operator.add, self._by_scale_and_flip(images)) / count

    def _by_scale_and_flip(self, images: np.ndarray) -> Iterator[jax.Array]:
        protocol, size = self.protocol, (images.shape[1], images.shape[2])
        for scale in protocol.scales:
            resized = np.stack([scaled(image, scale, protocol.size_divisor) for image in images])
            for flipped in (False, True)[: 1 + protocol.flip]:
                logits = self._logits(resized[:, :, ::-1] if flipped else resized)
                yield _probabilities(logits, size, flipped)

    def _logits(self, images: np.ndarray) -> jax.Array:
        if self.protocol.mode == "whole":
            return self._score(*self._arrays, self._placed(images))
        return jnp.stack([jnp.concatenate(list(self.row_tiles(image))) for image in images])

    def row_tiles(self, image: np.ndarray) -> Iterator[jax.Array]:
        """Logits of an image (H, W, 3) by the sliding window, in row tiles: see `sliding_window.row_tiles`.

        Raises:
          ValueError: the protocol has no sliding window.
        """
        window = self.protocol.window
        if window is None:
            raise ValueError(f"row tiles are those of a sliding window, and mode is {self.protocol.mode!r}")

        def logits_of(crops: np.ndarray) -> jax.Array:
            return self._score(*self._arrays, self._placed(crops))

        return row_tiles(logits_of, image, crop=window.crop, stride=window.stride, batch=self._batch)

    def _placed(self, images: np.ndarray) -> jax.Array:
        is_even = len(images) % len(self._parallel.devices) == 0
        return jax.device_put(images, self._parallel.split if is_even else self._parallel.whole)


_labels = jax.jit(lambda logits: labels_of(logits).astype(jnp.uint8))


@jax.jit
def _labels_of_probabilities(probabilities: jax.Array) -> jax.Array:
    return labels_of(probabilities, threshold=0.5).astype(jnp.uint8)


@partial(jax.jit, static_argnames=("size", "flipped"))
def _probabilities(logits: jax.Array, size: tuple[int, int], flipped: bool) -> jax.Array:
    """Of logits (B, h, w, K), at the image's size and the right way round: (B, H, W, K)."""
    logits = layers.resize(logits, size)
    probabilities = jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits)
    return probabilities[:, :, ::-1] if flipped else probabilities


@overload
def labels_of(scores: jax.Array, *, threshold: float = 0) -> jax.Array: ...


@overload
def labels_of(scores: np.ndarray, *, threshold: float = 0) -> np.ndarray: ...


def labels_of(scores: jax.Array | np.ndarray, *, threshold: float = 0) -> jax.Array | np.ndarray:
    """Train ids (...), int32, of scores (..., K): the class with the highest, or for K = 1 whether above `threshold`.

    Of several classes with the highest score it is the first. Labels of NumPy arrays are NumPy arrays.
    """
    if scores.shape[-1] == 1:
        return (scores[..., 0] > threshold).astype(np.int32)
    return scores.argmax(axis=-1).astype(np.int32)
