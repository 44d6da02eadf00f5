"""Labels and probabilities of whole images: at once or in windows, at one scale or several.

The protocols are mmsegmentation's. An image is resized (OpenCV's bilinear filter, rounded to 8 bits), the model scores
it as a whole or in overlapping windows, scores are enlarged to the size that the model was given and from there to the
image's own. With several scales or flips, probabilities are averaged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import layers
from segjax.data.augment import normalise
from segjax.models.functional import FunctionalModel
from segjax.runtime.parallel import Parallel, compiler_options


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the scores of an image come about.

    Attributes:
      mode: "whole", or "slide" for windows.
      crop, stride: height and width of the windows and of the steps between them, pixels. The last window of a row or
        column is shifted inside; where windows overlap, their scores are averaged.
      scales: of the image, probabilities averaged.
      flip: beside each scale its mirror image.
      size_divisor: each scaled image is resized once more, up to multiples of this (SegFormer's AlignedResize).
    """

    mode: str = "whole"
    crop: tuple[int, int] = (512, 512)
    stride: tuple[int, int] = (384, 384)
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    size_divisor: int = 1

    @classmethod
    def of(
        cls,
        mode: str = "whole",
        *,
        crop: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        size_divisor: int = 1,
    ) -> Protocol:
        """A protocol with the default crop for None, and strides of three quarters of the crop.

        Raises:
          ValueError: a crop or a stride for whole images, or settings that contradict each other.
        """
        settings: dict[str, Any] = dict(mode=mode, scales=tuple(scales), flip=flip, size_divisor=size_divisor)
        if mode != "slide":
            if crop is not None or stride is not None:
                raise ValueError("crop and stride are those of a sliding window: give mode='slide' too, or omit them")
            return cls(**settings)
        settings["crop"] = crop = cls.crop if crop is None else tuple(crop)
        settings["stride"] = tuple(max(side * 3 // 4, 1) for side in crop) if stride is None else tuple(stride)
        return cls(**settings)

    def __post_init__(self):
        wrong = {
            f"mode is 'whole' or 'slide', not {self.mode!r}": self.mode not in ("whole", "slide"),
            f"crop is (height, width), not {self.crop}": not _are_sides(self.crop),
            f"stride is (height, width), not {self.stride}": not _are_sides(self.stride),
            f"a stride of {self.stride} leaves gaps between windows of {self.crop}": (
                self.mode == "slide" and any(step > side for step, side in zip(self.stride, self.crop, strict=False))
            ),
            f"scales are positive numbers, not {self.scales}": (
                not self.scales or not all(0 < scale < np.inf for scale in self.scales)
            ),
            f"size_divisor must be at least 1: {self.size_divisor}": self.size_divisor < 1,
        }
        if problems := [message for message, is_wrong in wrong.items() if is_wrong]:
            raise ValueError("; ".join(problems))

    def __str__(self) -> str:
        (height, width), (down, across) = self.crop, self.stride
        parts = ["whole images"]
        if self.mode == "slide":
            parts = [f"windows of {height}x{width} every {down}x{across}"]
        if self.scales != (1.0,):
            parts.append(f"at scales {' '.join(f'{scale:g}' for scale in self.scales)}")
        if self.flip:
            parts.append("and mirrored")
        if self.size_divisor > 1:
            parts.append(f"resized to multiples of {self.size_divisor}")
        return ", ".join(parts)

    def record(self) -> dict[str, object]:
        """The settings that count, as JSON."""
        unused = () if self.mode == "slide" else ("crop", "stride")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}

    @property
    def is_one_pass(self) -> bool:
        """Whether the model sees the image itself and nothing else."""
        return self.scales == (1.0,) and not self.flip and self.size_divisor == 1


def _are_sides(sides) -> bool:
    return len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)


def windows(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin along an axis: every `stride`, the last one at the end."""
    return [min(start, max(length - crop, 0)) for start in range(0, max(length - crop, 0) + stride, stride)]


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width of an image of `size` times `scale`, as `Resize(scale_factor=..., keep_ratio=True)` has them.

    That is the largest size of the image's own proportions inside the rounded one: up to a pixel less on one side.
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


def score(skeleton: FunctionalModel, params, batch_stats, images: jax.Array, *, normalise: Callable) -> jax.Array:
    """Logits of uint8 images (B, H, W, 3) at their own size: float32 or wider (B, H, W, K).

    A model that takes multiples of some size alone is given the image with zeros, the mean colour, below and to the
    right of it, and its scores there are cut off.
    """
    height, width = images.shape[1:3]
    below, right = -height % skeleton.size_multiple, -width % skeleton.size_multiple
    padded = jnp.pad(normalise(images), ((0, 0), (0, below), (0, right), (0, 0)))
    logits, _ = skeleton.bind(params, batch_stats)(padded)
    return layers.resize(logits, (height + below, width + right))[:, :height, :width]


def predict_labels(
    skeleton: FunctionalModel, params, batch_stats, images: jax.Array, *, normalise: Callable
) -> jax.Array:
    """Train ids of uint8 images (B, H, W, 3), as a whole: uint8 (B, H, W)."""
    return labels_of(score(skeleton, params, batch_stats, images, normalise=normalise)).astype(jnp.uint8)


class Inference:
    """A model and a protocol, compiled once for each size of image. Safe to call from several threads."""

    def __init__(
        self,
        model: nnx.Module,
        protocol: Protocol = Protocol(),
        *,
        batch: int = 1,
        normalise: Callable[[jax.Array], jax.Array] = normalise,
    ):
        """Takes the model apart.

        Args:
          batch: windows at a time.
          normalise: uint8 images -> what the model takes.
        """
        self.protocol = protocol
        self._batch = batch
        self._parallel = Parallel("jit")
        skeleton = FunctionalModel(model)
        self._arrays = self._parallel.replicate(skeleton.arrays())
        options = compiler_options(self._parallel.devices[0].platform)
        self._labels = jax.jit(partial(predict_labels, skeleton, normalise=normalise), compiler_options=options)
        self._score = jax.jit(partial(score, skeleton, normalise=normalise), compiler_options=options)
        self._num_classes = skeleton.spec.num_classes

    def labels(self, images: np.ndarray) -> np.ndarray:
        """Train ids (B, H, W), uint8, of uint8 RGB images (B, H, W, 3)."""
        if not self.protocol.is_one_pass:
            return np.asarray(_labels_of_probabilities(self._mean(images)))
        if self.protocol.mode == "whole":
            return np.asarray(self._labels(*self._arrays, self._placed(images)))
        return np.stack([np.concatenate([np.asarray(_labels(band)) for band in self.bands(image)]) for image in images])

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probability of each class, float32 (B, H, W, K); K = 1 is that of the class, not of the background."""
        return np.asarray(self._mean(images))

    def _mean(self, images: np.ndarray) -> jax.Array:
        protocol, size, total = self.protocol, images.shape[1:3], None
        for scale in protocol.scales:
            resized = np.stack([scaled(image, scale, protocol.size_divisor) for image in images])
            for flipped in (False, True)[: 1 + protocol.flip]:
                logits = self._logits(resized[:, :, ::-1] if flipped else resized)
                part = _probabilities(logits, size, flipped)
                total = part if total is None else total + part
        return total / (len(protocol.scales) * (1 + protocol.flip))

    def _logits(self, images: np.ndarray) -> jax.Array:
        if self.protocol.mode == "whole":
            return self._score(*self._arrays, self._placed(images))
        return jnp.stack([jnp.concatenate(list(self.bands(image))) for image in images])

    def bands(self, image: np.ndarray) -> Iterator[jax.Array]:
        """Logits of an image (H, W, 3) in windows, from top to bottom: arrays (h, W, K) whose h add up to H.

        No more than one row of windows is kept at a time, so that images of any height need the memory of one.
        """
        crop = tuple(map(min, self.protocol.crop, image.shape))
        tops, lefts = map(windows, image.shape[:2], crop, self.protocol.stride)
        across, down = (
            np.bincount(np.add.outer(starts, np.arange(side)).ravel())
            for starts, side in ((lefts, crop[1]), (tops, crop[0]))
        )
        # Groups of one size, the last of which repeats its last window.
        groups = [lefts[start : start + self._batch] for start in range(0, len(lefts), self._batch)]
        size = min(self._batch, len(lefts))
        band = None
        for top, below in zip(tops, [*tops[1:], len(image)], strict=True):
            for group in groups:
                starts = group + group[-1:] * (size - len(group))
                stack = np.stack([image[top : top + crop[0], left : left + crop[1]] for left in starts])
                logits = self._score(*self._arrays, self._placed(stack))
                if band is None:
                    band = jnp.zeros((crop[0], image.shape[1], logits.shape[-1]), logits.dtype)
                band = _added(band, logits, np.array(starts), len(group))
            done, band = _split(band, np.outer(down[top:below], across), rows=below - top)
            yield done

    def _placed(self, images: np.ndarray) -> jax.Array:
        whole = len(images) % len(self._parallel.devices)
        return jax.device_put(images, self._parallel.whole if whole else self._parallel.split)


@partial(jax.jit, donate_argnums=0)
def _added(band: jax.Array, logits: jax.Array, lefts: jax.Array, count: int) -> jax.Array:
    """A band (h, W, K) and the first `count` of the windows (B, h, w, K) that begin at its columns `lefts`."""

    def add(number, band):
        at = (0, lefts[number], 0)
        old = jax.lax.dynamic_slice(band, at, logits.shape[1:])
        return jax.lax.dynamic_update_slice(band, old + logits[number], at)

    return jax.lax.fori_loop(0, count, add, band)


@partial(jax.jit, static_argnames="rows")
def _split(band: jax.Array, counts: jax.Array, *, rows: int) -> tuple[jax.Array, jax.Array]:
    """The mean of the first rows, and a band that begins below them."""
    return band[:rows] / counts[..., None].astype(band.dtype), jnp.pad(band[rows:], ((0, rows), (0, 0), (0, 0)))


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


def predictions(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Train ids (B, H, W), int32: logits enlarged in float32 to `size`, then argmax (K = 1: probability above 0.5)."""
    return labels_of(layers.resize(logits, size))


def labels_of(scores: jax.Array, *, threshold: float = 0) -> jax.Array:
    """Train ids (...), int32, of scores (..., K): the highest, or for K = 1 whether it is above `threshold`."""
    if scores.shape[-1] == 1:
        return (scores[..., 0] > threshold).astype(jnp.int32)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)
