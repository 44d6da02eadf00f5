"""Labels and probabilities of images, from whole images or a sliding window, at one scale or several.

The protocols are mmsegmentation's. An image is resized (OpenCV's bilinear filter, in the image's dtype), and the model
scores it as a whole or crop by crop. The logits are upsampled to the size of the model's input and from there resized
to the size of the image, both with the model's `align_corners`, as in mmsegmentation and HRNet-Semantic-Segmentation.
With several scales or flips, probabilities are averaged.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from segjax import layers
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.inference import certainty, resized_tiles
from segjax.inference.certainty import CountedLabels
from segjax.inference.exported_model import ExportedModel
from segjax.inference.sliding_window import Pixels, RowTile, crops_together, row_tiles, window_starts
from segjax.kernels import cells
from segjax.models.functional import FunctionalModel
from segjax.models.prepared import Prepared
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import memory
from segjax.runtime.parallel import JitParallel, compiler_options

if TYPE_CHECKING:
    # This is jax.Device, which type checkers take for a variable.
    from jaxlib._jax import Device

# Parameters or running statistics by dotted path.
Arrays = dict[str, jax.Array]


class SlidingWindow(NamedTuple):
    """Size of the crops and of the steps between them, (height, width) in pixels."""

    crop: tuple[int, int]
    stride: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The computation of an image's scores.

    The steps from an image to the model's input are those of mmsegmentation 0.x: `base_size` times the scale is the
    size within which the image is resized, and `size_divisor` rounds the result up.

    Attributes:
      mode: "whole", or "slide" for a sliding window.
      crop: (height, width) of the sliding window in pixels, by default 512 per side; None for whole images. The last
        crop of a row or column is shifted inside the image; the scores of overlapping crops are averaged.
      stride: (height, width) of the window's steps in pixels, by default three quarters of the crop; None for whole
        images.
      scales: Factors of the image size, or of `base_size`; probabilities are averaged.
      flip: Whether to score each scale mirrored too.
      size_divisor: Divisor of the input's sides: each scaled image is resized again, up to multiples of it
        (mmsegmentation's AlignedResize).
      base_size: (long, short) in pixels; each image, also in portrait format, is resized to the largest size of its
        aspect ratio whose longer and shorter sides fit (mmcv's Resize(scale=base_size, keep_ratio=True)). None keeps
        the size of the image.
      threshold: Probability above which a pixel belongs to the class, for models of one class (one logit).
      temperature: Divisor of the logits before softmax or sigmoid, see `segjax.checkpoints.temperature`. It changes
        probabilities; labels only where these are averaged, or compared with another threshold than 0.5.
    """

    mode: str = "whole"
    crop: Sequence[int] | None = None
    stride: Sequence[int] | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    size_divisor: int = 1
    base_size: Sequence[int] | None = None
    threshold: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        if self.mode == "slide":
            crop = (512, 512) if self.crop is None else tuple(self.crop)
            stride = [max(side * 3 // 4, 1) for side in crop] if self.stride is None else self.stride
            object.__setattr__(self, "crop", crop)
            object.__setattr__(self, "stride", tuple(stride))
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.base_size is not None:
            object.__setattr__(self, "base_size", tuple(self.base_size))
        wrong = {
            f"mode is 'whole' or 'slide', not {self.mode!r}": self.mode not in ("whole", "slide"),
            f"crop is (height, width), not {self.crop}": self.crop is not None and not _are_sides(self.crop),
            f"stride is (height, width), not {self.stride}": self.stride is not None and not _are_sides(self.stride),
            f"scales are positive numbers, not {self.scales}": (
                not self.scales or not all(0 < scale < np.inf for scale in self.scales)
            ),
            f"size_divisor must be at least 1: {self.size_divisor}": self.size_divisor < 1,
            f"threshold is a probability between 0 and 1, not {self.threshold}": not 0 < self.threshold < 1,
            f"a temperature is a positive number, not {self.temperature}": not 0 < self.temperature < np.inf,
            f"base_size is (long, short), not {self.base_size}": (
                self.base_size is not None and not _are_sides(self.base_size)
            ),
        }
        problems = [message for message, is_wrong in wrong.items() if is_wrong]
        problems += window_contradictions(self.mode, self.crop, self.stride).values()
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Protocol:
        """The protocol of `config.eval`, or of its JSON. A setting that an older run lacks has its default."""
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: settings[name] for name in fields if name in settings})

    def __str__(self) -> str:
        parts = ["whole images"]
        if self.window:
            (height, width), (down, across) = self.window
            parts = [f"sliding window of {height}x{width} every {down}x{across}"]
        if self.base_size is not None:
            parts.append(f"resized to {self.base_size[0]}x{self.base_size[1]} with their aspect ratio kept")
        if self.scales != (1.0,):
            parts.append(f"at scales {' '.join(f'{scale:g}' for scale in self.scales)}")
        if self.flip:
            parts.append("and mirrored")
        if self.size_divisor > 1:
            parts.append(f"resized to multiples of {self.size_divisor}")
        if self.threshold != 0.5:
            parts.append(f"above a probability of {self.threshold:g}")
        if self.temperature != 1:
            parts.append(f"at a temperature of {self.temperature:g}")
        return ", ".join(parts)

    def record(self) -> dict[str, object]:
        """The settings that apply, in terms of JSON."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.threshold == 0.5:
            # Models of several classes have no threshold.
            del given["threshold"]
        if self.temperature == 1:
            del given["temperature"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @property
    def least_logit(self) -> float:
        """`threshold` as a logit, which the temperature does not divide."""
        return self.temperature * math.log(self.threshold / (1 - self.threshold))

    @property
    def window(self) -> SlidingWindow | None:
        """The sliding window; None for whole images."""
        if self.crop is None or self.stride is None:
            return None
        (height, width), (down, across) = self.crop, self.stride
        return SlidingWindow((height, width), (down, across))

    @property
    def passes(self) -> int:
        """Number of times that the model scores an image."""
        return len(self.scales) * (2 if self.flip else 1)

    @property
    def is_one_pass(self) -> bool:
        """Whether the model scores the image once, at its own size."""
        return self.scales == (1.0,) and not self.flip and self.size_divisor == 1 and self.base_size is None

    def images_at_a_time(self, batch: int) -> int:
        """Number of images to predict together if the model scores `batch` whole images, or crops, at a time."""
        return batch if self.mode == "whole" else 1

    def input_sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Height and width to which an image of `size` is resized, for each scale. They must be equal in a batch.

        Raises:
          ValueError: A side would have no pixel.
        """
        return tuple(_rounded_up(scaled_size(size, scale, self.base_size), self.size_divisor) for scale in self.scales)


def window_contradictions(mode: str, crop: Sequence[int] | None, stride: Sequence[int] | None) -> dict[str, str]:
    """Problems of the settings of a sliding window that do not fit each other, by the name of the setting."""
    found = {}
    for name, value in (("crop", crop), ("stride", stride)):
        if mode == "whole" and value is not None:
            found[name] = f"{name} needs mode 'slide'; add it, or omit {name}"
    if mode == "slide" and stride is not None:
        sides = (512, 512) if crop is None else crop
        if any(step > side for step, side in zip(stride, sides, strict=False)):
            found["stride"] = f"a stride of {tuple(stride)} leaves gaps between crops of {tuple(sides)}"
    return found


def _are_sides(sides: Sequence[object]) -> bool:
    return len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)


def scaled_size(size: tuple[int, int], scale: float, base_size: Sequence[int] | None = None) -> tuple[int, int]:
    """Height and width of an image of `size` at a scale: the largest size of its aspect ratio within a target size.

    The target is the image's size times the scale, rounded (`Resize(scale_factor=scale, keep_ratio=True)` of mmcv 2.x);
    a side of the result may be a pixel smaller. With `base_size`, the target is `base_size` times the scale, rounded
    down (`MultiScaleFlipAug(img_scale=base_size, img_ratios=[scale])` of mmsegmentation 0.x); its longer side bounds
    the longer side of the image. Training rounds differently: `segjax.data.crops.scaled_size`.

    Raises:
      ValueError: A side would have no pixel.
    """
    target = [int(side * scale + 0.5) for side in size] if base_size is None else [int(s * scale) for s in base_size]
    factor = min(max(target) / max(size), min(target) / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    if not (height and width):
        raise ValueError(f"an image of {size[0]}x{size[1]} has no pixels at scale {scale:g}; use a larger scale")
    return height, width


def _rounded_up(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def scaled(image: np.ndarray, scale: float, size_divisor: int, base_size: Sequence[int] | None = None) -> np.ndarray:
    """Resizes an image (H, W, C) to its `scaled_size`, and from there up to multiples of `size_divisor`.

    Raises:
      MemoryError: There is not enough memory.
    """
    near = scaled_size(image.shape[:2], scale, base_size)
    for size in (near, _rounded_up(near, size_divisor)):
        if size != image.shape[:2]:
            image = resized(image, size)
    return image


def resized(image: np.ndarray, size: tuple[int, int], *, is_smaller: bool = False) -> np.ndarray:
    """An image (H, W, C) of any number of channels at another size, (height, width), bilinear or by areas.

    Args:
      image: Image.
      size: Height and width of the result.
      is_smaller: Whether each pixel of the result is the mean of an area, for sizes that are smaller.

    Raises:
      MemoryError: There is not enough memory.
    """
    import cv2

    (height, width), interpolation = size, cv2.INTER_AREA if is_smaller else cv2.INTER_LINEAR
    try:
        # OpenCV accepts at least four channels on all platforms, and returns a single channel without its axis.
        parts = (image[..., first : first + 4] for first in range(0, image.shape[2], 4))
        done = [cv2.resize(part, (width, height), interpolation=interpolation) for part in parts]
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"an image of {height}x{width}") from error
        raise
    done = [part.reshape(height, width, -1) for part in done]
    return done[0] if len(done) == 1 else np.concatenate(done, axis=2)


def score(
    functional: FunctionalModel, params: Arrays, batch_stats: Arrays, images: jax.Array, *, normalise: Callable
) -> jax.Array:
    """Logits of images (B, H, W, C) at their own size, (B, H, W, K) in at least float32.

    If the model needs multiples of some size, images are padded at the bottom and right with zeros, the mean colour,
    and the scores of the padding are removed.
    """
    logits, padded = _small_logits(functional, params, batch_stats, images, normalise=normalise)
    return _upsampled(logits, padded, images.shape[1:3], align_corners=functional.align_corners)


def _upsampled(logits: jax.Array, padded: tuple[int, int], size: tuple[int, ...], *, align_corners: bool) -> jax.Array:
    """Logits (B, h, w, K) of padded images at the size of the images, (B, H, W, K)."""
    return layers.resize(logits, padded, align_corners=align_corners)[:, : size[0], : size[1]]


_upsample = jax.jit(_upsampled, static_argnames=("padded", "size", "align_corners"))


def _small_logits(functional, params, batch_stats, images, *, normalise) -> tuple[jax.Array, tuple[int, int]]:
    """The model's logits of padded images, and height and width of the padded images."""
    height, width = images.shape[1:3]
    below, right = -height % functional.size_multiple, -width % functional.size_multiple
    padded = jnp.pad(normalise(images), ((0, 0), (0, below), (0, right), (0, 0)))
    logits, _ = functional.bind(params, batch_stats)(padded)
    return logits, (height + below, width + right)


def predict_labels(
    functional: FunctionalModel,
    params: Arrays,
    batch_stats: Arrays,
    images: jax.Array,
    *,
    normalise: Callable,
    least_logit: float = 0,
) -> jax.Array:
    """Train ids (B, H, W) of whole images (B, H, W, C); see `compact`."""
    return labels_and_logits(functional, params, batch_stats, images, normalise=normalise, least_logit=least_logit)[0]


def labels_and_logits(
    functional: FunctionalModel,
    params: Arrays,
    batch_stats: Arrays,
    images: jax.Array,
    *,
    normalise: Callable,
    least_logit: float = 0,
) -> tuple[jax.Array, jax.Array]:
    """`predict_labels`, and the logits at the model's own stride, (B, h, w, K), from which they were computed."""
    logits, padded = _small_logits(functional, params, batch_stats, images, normalise=normalise)
    size, align_corners = images.shape[1:3], functional.align_corners
    return _labels_at(logits, padded, size, align_corners=align_corners, least_logit=least_logit), logits


def _labels_at(
    logits: jax.Array, padded: tuple[int, int], size: tuple[int, ...], *, align_corners: bool, least_logit: float
) -> jax.Array:
    """Train ids (B, H, W) of images from logits (B, h, w, K) of padded images; see `compact`."""
    if layers.is_fast_on_gpu() and not align_corners and cells.applies(logits.shape, padded):
        labels = cells.labels_of(logits, padded)[:, : size[0], : size[1]]
        return labels.astype(specs.dtype_of_labels(logits.shape[-1] - 1))
    return compact(_upsampled(logits, padded, size, align_corners=align_corners), threshold=least_logit)


class Inference:
    """A model and a protocol, compiled once for each size of the model's input. Several threads may call it.

    Programs depend only on the size of the model's input: images of different sizes share them if their inputs have
    the same size.
    """

    def __init__(
        self,
        model: SegmentationModel | FunctionalModel | ExportedModel,
        protocol: Protocol = Protocol(),
        *,
        batch: int = 1,
        normalise: Callable[[jax.Array], jax.Array] = normalise,
        image_dtype: str | None = "uint8",
        devices: Sequence[Device] | None = None,
    ):
        """Copies the parameters of the model to every device.

        Args:
          model: Model, or functional model, which has no arrays; `with_arrays` provides them. Or an exported file,
            which normalises images as it needs them.
          protocol: Protocol of the scores.
          batch: Number of crops of a sliding window that the model scores at a time.
          normalise: Function from images to the model's input.
          image_dtype: Dtype of the images; None if they may have several, of which float32 is the largest.
          devices: Devices of this process; by default all.
        """
        self.protocol = protocol
        self._batch = batch
        self._dtype, self._channels = np.dtype(image_dtype or "float32"), model.in_channels
        if protocol.threshold != 0.5 and (classes := model.spec.num_classes) != 1:
            raise ValueError(f"a threshold needs a model of one class, but this one has {classes}; omit it")
        # Each of several processes predicts images of its own.
        self._parallel = JitParallel(jax.local_devices() if devices is None else devices)
        self._align_corners, self._num_classes = model.align_corners, model.spec.num_classes
        # Weights prepared for the programs, by `Prepared.key`. Copies with other arrays share only the programs.
        self._prepared: dict[str, list[jax.Array]] = {}
        self._compiling = threading.Lock()
        if isinstance(model, ExportedModel):
            self._arrays: tuple[Arrays, Arrays] = ({}, {})
            align_corners = model.align_corners
            self._score = FileProgram(model, partial(_upsampled, align_corners=align_corners))
            to_labels = partial(_labels_at, least_logit=protocol.least_logit, align_corners=align_corners)
            self._labels = FileProgram(model, to_labels, gives_labels=True)
            self._labels_and_logits = FileProgram(model, lambda *given: (to_labels(*given), given[0]))
            self._padded_size = model.padded_size
            return
        if isinstance(model, FunctionalModel):
            functional, self._arrays = model, ({}, {})
        else:
            functional = FunctionalModel(model)
            self._arrays = self._parallel.replicate(functional.arrays())
        self._padded_size = partial(_rounded_up, divisor=functional.size_multiple)
        settings: dict[str, Any] = dict(normalise=normalise, least_logit=protocol.least_logit)
        self._labels = Program(partial(predict_labels, functional, **settings), self._parallel)
        self._labels_and_logits = Program(partial(labels_and_logits, functional, **settings), self._parallel)
        self._score = Program(partial(score, functional, normalise=normalise), self._parallel)

    def refuse_too_large(self, sizes: Iterable[tuple[int, int]], *, batch: int = 1, counted: bool = False) -> None:
        """Refuses images for which there is not enough memory, before any prediction.

        It compiles the program for the largest images, which predictions reuse.

        Args:
          sizes: Height and width of the images.
          batch: Number of images that are predicted together.
          counted: Whether predictions are those of `begin_counted`.

        Raises:
          TooLittleMemoryError: The program needs more memory than a device has.
        """
        images = set(sizes)
        for image in images:
            self._refuse_too_large_when_resized(image, batch)
        inputs = {size for image in images for size in self.protocol.input_sizes(image)}
        if (window := self.protocol.window) is None:
            shapes = {(batch, *size) for size in inputs}
        else:
            shapes = set()
            for size in inputs:
                height, width = map(min, window.crop, size)
                crops = len(window_starts(size[1], width, window.stride[1]))
                shapes.add((crops_together(crops, self._batch, len(self._parallel.devices)), height, width))
        program = self._labels_and_logits if counted else self._labels
        if window is not None or not self.protocol.is_one_pass:
            program = self._score
        if shapes:
            self._refuse_too_large(program, (*max(shapes, key=math.prod), self._channels), self._dtype)
        if counted and images and window is None and self.protocol.is_one_pass:
            # Calibration reads float32 logits of the images' own size, which another program upsamples.
            height, width = max(images, key=math.prod)
            own = self._sharding(batch).shard_shape((batch, height, width, self._num_classes))
            what = f"calibration of {'an image' if batch == 1 else f'a batch of {batch} images'} of {height}x{width}"
            memory.refuse_too_large(4 * math.prod(own), self._parallel.own_devices, what=what)

    def _refuse_too_large_when_resized(self, size: tuple[int, int], batch: int) -> None:
        """Raises TooLittleMemoryError if resized images, or their logits by a sliding window, do not fit."""
        if self.protocol.is_one_pass:
            return
        height, width = max(self.protocol.input_sizes(size), key=math.prod)
        what = f"an image of {size[0]}x{size[1]} that is resized to {height}x{width}"
        pixels = batch * height * width
        memory.refuse_more_than_host(self._channels * self._dtype.itemsize * pixels, what=what)
        if self.protocol.window:
            # Float32 logits exist twice: in row tiles, and in the array that joins them.
            logits = 2 * 4 * self._num_classes * pixels
            memory.refuse_too_large(logits, self._parallel.own_devices, what=what)

    def _refuse_too_large(self, program: Program | FileProgram, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Raises TooLittleMemoryError if a program for images of this shape (B, H, W, C) and dtype does not fit."""
        with self._compiling:
            images = jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding(shape[0]))
            needed = program.needed(self._arrays, images)
            batch, height, width = shape[:3]
            kind = "crop" if self.protocol.window else "image"
            what = f"{kind} of {height}x{width}" if batch == 1 else f"batch of {batch} {kind}s of {height}x{width}"
            article = "an" if what.startswith("image") else "a"
            memory.refuse_too_large(needed, self._parallel.own_devices, what=f"{article} {what}")

    def with_arrays(self, arrays: tuple[Arrays, Arrays]) -> Inference:
        """A copy with other parameters and running statistics, in the order of `FunctionalModel.arrays`."""
        other = copy.copy(self)
        other._arrays, other._prepared = self._parallel.replicate(arrays), {}
        return other

    def labels(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Train ids (H, W), see `compact`, of images (H, W, C) with equal `Protocol.input_sizes`."""
        return [np.asarray(labels) for labels in self.begin(images)]

    def begin(self, images: Sequence[np.ndarray]) -> Sequence[Computed | np.ndarray]:
        """Starts to compute `labels`; `np.asarray` of a result waits for it."""
        if not self.protocol.is_one_pass:
            return self._computed(images, partial(_labels_of_sum, threshold=self.protocol.threshold))
        if self.protocol.mode == "whole":
            batch = self._run(self._labels, images)
            return [Computed([[batch]], number, image.shape[:2]) for number, image in enumerate(images)]
        return [_put_together(image.shape[:2], self.label_tiles(image)) for image in images]

    def begin_counted(
        self,
        images: Sequence[np.ndarray],
        truths: Sequence[np.ndarray],
        *,
        ignore_label: int,
        temperatures: Sequence[float] = (),
    ) -> Sequence[CountedLabels]:
        """Starts to compute the results of `begin`, with what calibration counts.

        Args:
          images: As for `labels`.
          truths: True train ids (H, W) of the images.
          ignore_label: Label of the pixels that do not count.
          temperatures: Further temperatures for `CountedLabels.sums`; only if the model scores an image once.

        Raises:
          ValueError: There are temperatures, and several scales or flips.
        """
        protocol = self.protocol
        if temperatures and protocol.passes > 1:
            raise ValueError("NLL at several temperatures is that of one scale, without flips")
        settings: dict[str, Any] = dict(ignore_label=ignore_label, temperatures=(protocol.temperature, *temperatures))
        if not protocol.is_one_pass:
            return self._counted_tiles(images, truths, **settings)
        if protocol.mode == "slide":
            return [self._counted_rows(image, truth, **settings) for image, truth in zip(images, truths, strict=True)]
        size = images[0].shape[:2]
        labels, logits = self._labels_and_scores(images)
        truth = jax.device_put(np.stack(truths), self._sharding(len(truths)))
        counter, sums = certainty.counts(logits, labels, truth, are_logits=True, **settings)
        return [
            CountedLabels(Computed([[labels]], number, size), Computed([[counter]], number, size), [sums], number)
            for number in range(len(images))
        ]

    def _labels_and_scores(self, images: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """Train ids (B, H, W) of whole images of one size, and logits (B, H, W, K)."""
        size = images[0].shape[:2]
        labels, logits = self._run(self._labels_and_logits, images)
        return labels, _upsample(logits, self._padded_size(size), size, align_corners=self._align_corners)

    def _counted_rows(self, image: np.ndarray, truth: np.ndarray, **settings: Any) -> CountedLabels:
        """`begin_counted` of one image by the sliding window, row tile by row tile."""
        labels = np.empty(truth.shape, specs.dtype_of_labels(self._num_classes - 1))
        counter, parts = np.empty(truth.shape, np.uint16), []
        for top, left, logits, part in self.row_tiles(image):
            predicted = _labels(logits, threshold=self.protocol.least_logit)
            there = np.s_[top : top + logits.shape[0], left : left + part.stop - part.start]
            # Columns outside the part do not count.
            own = np.full(predicted.shape, settings["ignore_label"], truth.dtype)
            own[:, part] = truth[there]
            counters, sums = certainty.counts(logits[None], predicted[None], own[None], are_logits=True, **settings)
            labels[there], counter[there] = np.asarray(predicted)[:, part], np.asarray(counters)[0][:, part]
            parts.append(np.asarray(sums))
            # Freed before the next row of crops needs memory.
            del logits, predicted, counters
        return CountedLabels(labels, counter, parts, 0)

    def _counted_tiles(
        self, images: Sequence[np.ndarray], truths: Sequence[np.ndarray], **settings: Any
    ) -> list[CountedLabels]:
        """`begin_counted` with resized images, several scales or flips."""
        height, width = (max(sides) for sides in zip(*(truth.shape for truth in truths), strict=True))
        whole = [-(-side // step) * step for side, step in zip((height, width), resized_tiles.TILE, strict=True)]
        padded = np.full((len(truths), *whole), settings["ignore_label"], truths[0].dtype)
        for own, truth in zip(padded, truths, strict=True):
            own[: truth.shape[0], : truth.shape[1]] = truth

        def finish(total: jax.Array, count: int, corner: tuple[int, int], logits: jax.Array | None):
            labels = _labels_of_sum(total, count, threshold=self.protocol.threshold)
            rows, columns = (slice(start, start + side) for start, side in zip(corner, resized_tiles.TILE, strict=True))
            scores = _mean_of_sum(total, count) if logits is None else logits
            truth = padded[:, rows, columns]
            return labels, *certainty.counts(scores, labels, truth, are_logits=logits is not None, **settings)

        tiles = self._finished(images, finish)
        parts = [sums for _, _, sums in tiles.values()]
        labels, counter = (_in_rows({corner: tile[kind] for corner, tile in tiles.items()}) for kind in (0, 1))
        return [
            CountedLabels(Computed(labels, number, size), Computed(counter, number, size), parts, number)
            for number, size in enumerate(truth.shape for truth in truths)
        ]

    def mapped(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`labels` of images, and `certainty.maps`, uint8 (H, W, 2)."""
        protocol = self.protocol
        if not protocol.is_one_pass:

            def finish(total: jax.Array, count: int, _corner: tuple[int, int], _logits: jax.Array | None):
                labels = _labels_of_sum(total, count, threshold=protocol.threshold)
                return labels, certainty.maps(_mean_of_sum(total, count), labels, are_logits=False)

            tiles = self._finished(images, finish)
            labels, maps = (_in_rows({corner: tile[kind] for corner, tile in tiles.items()}) for kind in (0, 1))
        elif protocol.mode == "slide":
            return [self._mapped_rows(image) for image in images]
        else:
            batch, logits = self._labels_and_scores(images)
            labels = [[batch]]
            maps = [[certainty.maps(logits, batch, are_logits=True, temperature=protocol.temperature)]]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return [
            (np.asarray(Computed(labels, number, size)), np.asarray(Computed(maps, number, size)))
            for number, size in enumerate(sizes)
        ]

    def _mapped_rows(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.empty(image.shape[:2], specs.dtype_of_labels(self._num_classes - 1))
        maps = np.empty((*image.shape[:2], 2), np.uint8)
        for top, left, *parts in self.mapped_tiles(image):
            there = np.s_[top : top + parts[0].shape[0], left : left + parts[0].shape[1]]
            labels[there], maps[there] = parts
        return labels, maps

    def mapped_tiles(self, image: Pixels) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """`label_tiles`, each with `certainty.maps`, uint8 (h, w, 2)."""
        for top, left, logits, part in self.row_tiles(image):
            labels = _labels(logits, threshold=self.protocol.least_logit)
            temperature = self.protocol.temperature
            maps = certainty.maps(logits[None], labels[None], are_logits=True, temperature=temperature)
            tile = np.asarray(labels)[:, part], np.asarray(maps)[0][:, part]
            # Freed before the next row of crops needs memory.
            del logits, labels, maps
            yield top, left, *tile

    def label_tiles(self, image: Pixels) -> Iterator[tuple[int, int, np.ndarray]]:
        """Train ids of an image (H, W, C) by the sliding window, at its own size, in tiles: top, left, labels (h, w).

        The tiles cover the image once, panel by panel, and equal `labels`; see `sliding_window.row_tiles`.
        """
        for top, left, logits, part in self.row_tiles(image):
            labels = np.asarray(_labels(logits, threshold=self.protocol.least_logit))
            # Freed before the next row of crops needs memory.
            del logits
            yield top, left, labels[:, part]

    def probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Probability of each class, float32 (H, W, K); for K = 1 that of the class, not of the background.

        Args:
          images: As for `labels`.
        """
        return [np.asarray(probabilities) for probabilities in self.begin_probabilities(images)]

    def begin_probabilities(self, images: Sequence[np.ndarray]) -> list[Computed]:
        """Starts to compute `probabilities`, whose tiles stay on the device until `np.asarray` of a result."""
        return self._computed(images, _mean_of_sum)

    def _computed(self, images: Sequence[np.ndarray], finish: Callable[[jax.Array, int], jax.Array]) -> list[Computed]:
        """Applies `finish` to the sum of probabilities over scales and flips, and their number, tile by tile."""
        rows = _in_rows(self._finished(images, lambda total, count, _corner, _logits: finish(total, count)))
        return [Computed(rows, number, (image.shape[0], image.shape[1])) for number, image in enumerate(images)]

    def _finished(
        self,
        images: Sequence[np.ndarray],
        finish: Callable[[jax.Array, int, tuple[int, int], jax.Array | None], Result],
    ) -> dict[tuple[int, int], Result]:
        """Applies `finish` to each tile of the images.

        Args:
          images: As for `labels`.
          finish: Function of the sum of probabilities over scales and flips (B, *TILE, K), their number, the upper left
            corner, and, if the model scores an image once, the logits (B, *TILE, K).

        Returns:
          The results by upper left corner, row by row.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        grid = resized_tiles.grid(sizes)
        totals: dict[tuple[int, int], jax.Array] = {}
        tiles: dict[tuple[int, int], Result] = {}
        passes = [(scale, flipped) for scale in self.protocol.scales for flipped in (False, True)[: self._flips]]
        for number, (scale, flipped) in enumerate(passes, 1):
            logits = self._logits(self._resized(images, scale, flipped))
            samples = resized_tiles.samples(logits, sizes, flipped=flipped, align_corners=self._align_corners)
            for corner in grid:
                total = resized_tiles.add_probabilities(
                    totals.pop(corner, None), logits, *samples.of_tile(corner), self.protocol.temperature
                )
                if number < len(passes):
                    totals[corner] = total
                    continue
                # The last pass finishes tile by tile, so that not all sums are in memory together.
                own = resized_tiles.logits_of(logits, *samples.of_tile(corner)) if len(passes) == 1 else None
                tiles[corner] = finish(total, number, corner, own)
        return tiles

    @property
    def _flips(self) -> int:
        return 2 if self.protocol.flip else 1

    def _resized(self, images: Sequence[np.ndarray], scale: float, flipped: bool) -> np.ndarray:
        protocol = self.protocol
        # All images are resized to the same size.
        self._refuse_too_large_when_resized(images[0].shape[:2], len(images))
        resized = np.stack([scaled(image, scale, protocol.size_divisor, protocol.base_size) for image in images])
        return resized[:, :, ::-1] if flipped else resized

    def _logits(self, images: np.ndarray) -> jax.Array:
        if self.protocol.mode == "whole":
            return self._run(self._score, images)
        return jnp.stack([self._logits_of_crops(image) for image in images])

    def _logits_of_crops(self, image: np.ndarray) -> jax.Array:
        by_panel: dict[int, list[jax.Array]] = {}
        for _, left, logits, part in self.row_tiles(image):
            by_panel.setdefault(left, []).append(logits[:, part])
        return jnp.concatenate([jnp.concatenate(tiles) for tiles in by_panel.values()], axis=1)

    def row_tiles(self, image: Pixels) -> Iterator[RowTile]:
        """Logits of an image (H, W, C) by the sliding window, in row tiles; see `sliding_window.row_tiles`.

        Raises:
          ValueError: The protocol has no sliding window.
        """
        window = self.protocol.window
        if window is None:
            raise ValueError(f"row tiles are those of a sliding window, and mode is {self.protocol.mode!r}")

        def logits_of(crops: np.ndarray) -> jax.Array:
            return self._run(self._score, crops)

        number = len(self._parallel.devices)
        return row_tiles(logits_of, image, crop=window.crop, stride=window.stride, batch=self._batch, devices=number)

    def _run(self, program: Program | FileProgram, images: Sequence[np.ndarray] | np.ndarray) -> Any:
        """Calls a program with images (B, H, W, C) if there is enough memory for it."""
        # Checked before the images are stacked, because a large batch may not fit in host memory.
        self._refuse_too_large(program, (len(images), *images[0].shape), images[0].dtype)
        on_devices = jax.device_put(np.asarray(images), self._sharding(len(images)))
        with self._compiling:
            call = program.of(self._arrays, on_devices, self._prepared)
        return call(on_devices)

    def _sharding(self, batch: int) -> NamedSharding:
        return self._parallel.split if batch % len(self._parallel.devices) == 0 else self._parallel.whole


class Program:
    """A function (params, batch_stats, images) -> array or arrays, compiled for each shape of the images.

    On a GPU, operations on weights only run once instead of for every image; see `segjax.models.prepared`.
    """

    def __init__(self, function: Callable[..., Any], parallel: JitParallel):
        self._function, self._whole = function, parallel.whole
        self._jit = partial(jax.jit, compiler_options=compiler_options(parallel.devices[0].platform))
        self.at_once = self._jit(function)
        # Jitted once each: evaluations during training prepare new weights again and again.
        self._parts: dict[tuple[tuple[int, ...], np.dtype], _Parts] = {}
        self._needed: dict[tuple[tuple[int, ...], np.dtype], int | None] = {}

    def needed(self, arrays: tuple[Arrays, Arrays], images: jax.ShapeDtypeStruct) -> int | None:
        """Bytes that the program needs, see `memory.needed`. The next call finds the compiled program."""
        key = images.shape, images.dtype
        if key not in self._needed:
            if layers.is_fast_on_gpu():
                parts = self._parts_for(arrays, images)
                shapes = jax.eval_shape(parts.prepare, arrays)
                weights = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole) for x in shapes]
                lowered = parts.program.lower(weights, images)
            else:
                lowered = self.at_once.lower(*arrays, images)
            self._needed[key] = memory.needed(lowered.compile())
        return self._needed[key]

    def of(
        self, arrays: tuple[Arrays, Arrays], images: jax.Array, prepared: dict[str, list[jax.Array]]
    ) -> Callable[[jax.Array], Any]:
        """The function of the images.

        Args:
          arrays: Parameters and running statistics.
          images: Images of the shape to compile for.
          prepared: Arrays prepared from `arrays` before, by `Prepared.key`. This call adds to them.
        """
        if not layers.is_fast_on_gpu():
            return partial(self.at_once, *arrays)
        parts = self._parts_for(arrays, images)
        if parts.key not in prepared:
            prepared[parts.key] = parts.prepare(arrays)
        return partial(parts.program, prepared[parts.key])

    def _parts_for(self, arrays: tuple[Arrays, Arrays], images: jax.Array | jax.ShapeDtypeStruct) -> _Parts:
        key = images.shape, images.dtype
        if key not in self._parts:
            whole = Prepared(lambda arrays, images: self._function(*arrays, images), arrays, images)
            prepare = jax.jit(whole.prepare, out_shardings=self._whole)
            self._parts[key] = _Parts(whole.key, prepare, self._jit(whole.program))
        return self._parts[key]


class FileProgram:
    """Stands in for a `Program` where another package runs the model; only what follows the model is compiled."""

    def __init__(self, model: ExportedModel, finish: Callable[..., Any], *, gives_labels: bool = False):
        """`finish` is a function of logits (B, h, w, K) of padded images, of the padded and of the images' own size."""
        self._model, self._finish = model, jax.jit(finish, static_argnums=(1, 2))
        self._gives_labels = gives_labels

    def needed(self, arrays: tuple[Arrays, Arrays], images: jax.ShapeDtypeStruct) -> None:
        """The packages do not tell what they need."""

    def of(self, arrays: tuple[Arrays, Arrays], images: jax.Array, prepared: dict[str, list[jax.Array]]) -> FileProgram:
        return self

    def __call__(self, images: jax.Array) -> Any:
        output, padded = self._model(np.asarray(images))
        height, width = images.shape[1:3]
        if self._model.output != "labels":
            return self._finish(output, padded, (height, width))
        if not self._gives_labels:
            raise ValueError(f"{self._model.path.name} gives labels; scores need a file without --with-argmax")
        rows, columns = (
            np.arange(side) * small // whole
            for side, small, whole in zip((height, width), output.shape[1:], padded, strict=True)
        )
        return jnp.asarray(output[:, rows[:, None], columns])


class _Parts(NamedTuple):
    """Both jitted parts of a program, see `Prepared`."""

    key: str
    prepare: jax.stages.Wrapped
    program: jax.stages.Wrapped


class Computed(NamedTuple):
    """An array (H, W, ...) of one image, in tiles of a batch; `np.asarray` waits for the tiles and joins them.

    Attributes:
      tiles: Rows of tiles (B, h, w, ...) by their position in the image; the last ones reach beyond it.
      number: Index of the image in the batch.
      size: H and W.
    """

    tiles: Sequence[Sequence[jax.Array]]
    number: int
    size: tuple[int, int]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        height, width = self.size
        rows = [np.concatenate([np.asarray(tile)[self.number] for tile in row], axis=1) for row in self.tiles]
        whole = np.concatenate(rows)[:height, :width]
        return whole if dtype is None else whole.astype(dtype)


Result = TypeVar("Result")


def _in_rows(tiles: Mapping[tuple[int, int], Result]) -> list[list[Result]]:
    """The tiles, by upper left corner, row by row."""
    rows: dict[int, list[Result]] = {}
    for (top, _), tile in tiles.items():
        rows.setdefault(top, []).append(tile)
    return list(rows.values())


def _put_together(size: tuple[int, int], tiles: Iterable[tuple[int, int, np.ndarray]]) -> np.ndarray:
    """Joins tiles that cover an image to labels (H, W)."""
    whole = None
    for top, left, labels in tiles:
        if whole is None:
            whole = np.empty(size, labels.dtype)
        whole[top : top + labels.shape[0], left : left + labels.shape[1]] = labels
    if whole is None:
        raise ValueError("an image without pixels")
    return whole


@partial(jax.jit, static_argnames=("count", "threshold"))
def _labels_of_sum(total: jax.Array, count: int, *, threshold: float) -> jax.Array:
    """Train ids (B, H, W), see `compact`, from the sum (B, H, W, K) of `count` probabilities."""
    return compact(total / count, threshold=threshold)


@partial(jax.jit, static_argnames="count")
def _mean_of_sum(total: jax.Array, count: int) -> jax.Array:
    return total / count


def compact(scores: jax.Array, *, threshold: float = 0) -> jax.Array:
    """The result of `labels_of` as uint8, or as uint16 for more than 256 classes."""
    return labels_of(scores, threshold=threshold).astype(specs.dtype_of_labels(scores.shape[-1] - 1))


_labels = jax.jit(compact, static_argnames="threshold")


@overload
def labels_of(scores: jax.Array, *, threshold: float = 0) -> jax.Array: ...


@overload
def labels_of(scores: np.ndarray, *, threshold: float = 0) -> np.ndarray: ...


def labels_of(scores: jax.Array | np.ndarray, *, threshold: float = 0) -> jax.Array | np.ndarray:
    """Train ids, int32 (...), of scores (..., K): the class of the highest score, or for K = 1 score > `threshold`.

    Among equal highest scores the first class wins. The result for a NumPy array is a NumPy array.
    """
    if scores.shape[-1] == 1:
        return (scores[..., 0] > threshold).astype(np.int32)
    return scores.argmax(axis=-1).astype(np.int32)
