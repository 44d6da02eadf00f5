"""Labels and probabilities of images: by one pass of the model or by a sliding window, at one scale or several.

The protocols are mmsegmentation's. An image is resized (OpenCV's bilinear filter, in its dtype), the model scores
it as a whole or crop by crop, and the logits are upsampled to the size that the model was given and from there resized
to the image's own, both with the model's `align_corners`, as in mmsegmentation and in HRNet-Semantic-Segmentation. With
several scales or flips, probabilities are averaged.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from segjax import layers
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.inference import resized_tiles
from segjax.inference.sliding_window import Pixels, RowTile, row_tiles, window_starts
from segjax.kernels import cells
from segjax.models.functional import FunctionalModel
from segjax.models.prepared import Prepared
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import memory
from segjax.runtime.parallel import JitParallel, compiler_options

if TYPE_CHECKING:
    # jax.Device, which a type checker takes for a variable.
    from jaxlib._jax import Device

# Parameters or running statistics by dotted path.
Arrays = dict[str, jax.Array]


class SlidingWindow(NamedTuple):
    """Crops and the steps between them, (height, width) in pixels."""

    crop: tuple[int, int]
    stride: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the scores of an image are computed.

    An image becomes an input of the model in the steps of mmsegmentation 0.x: `base_size` times the scale gives the
    size that the image has to fit into, and `size_divisor` rounds that up.

    Attributes:
      mode: "whole", or "slide" for a sliding window.
      crop, stride: of the sliding window, (height, width) in pixels: 512 a side and three quarters of the crop unless
        given; None for whole images. The last crop of a row or column is shifted inside; where crops overlap, their
        scores are averaged.
      scales: factors of the image size, or of `base_size`; probabilities are averaged.
      flip: whether each scale is also scored mirrored.
      size_divisor: each scaled image is resized once more, up to multiples of this (mmsegmentation's AlignedResize).
      threshold: probability above which a pixel is of the class, of models of one class (one logit).
      base_size: (long, short) in pixels; each image is resized to the largest size of its own proportions whose longer
        and shorter sides are within this, upright images too (mmcv's Resize(scale=base_size, keep_ratio=True)). None
        for the size that the image has.
    """

    mode: str = "whole"
    crop: Sequence[int] | None = None
    stride: Sequence[int] | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    size_divisor: int = 1
    base_size: Sequence[int] | None = None
    threshold: float = 0.5

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
        """The protocol of `config.eval`, also as JSON has it. A run older than these settings has the default."""
        fields = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: settings[name] for name in fields if name in settings})

    def __str__(self) -> str:
        parts = ["whole images"]
        if self.window:
            (height, width), (down, across) = self.window
            parts = [f"sliding window of {height}x{width} every {down}x{across}"]
        if self.base_size is not None:
            parts.append(f"resized to {self.base_size[0]}x{self.base_size[1]} with their proportions kept")
        if self.scales != (1.0,):
            parts.append(f"at scales {' '.join(f'{scale:g}' for scale in self.scales)}")
        if self.flip:
            parts.append("and mirrored")
        if self.size_divisor > 1:
            parts.append(f"resized to multiples of {self.size_divisor}")
        if self.threshold != 0.5:
            parts.append(f"above a probability of {self.threshold:g}")
        return ", ".join(parts)

    def record(self) -> dict[str, object]:
        """The settings that apply, as JSON has them."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.threshold == 0.5:
            # Of models of several classes there is none.
            del given["threshold"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @property
    def least_logit(self) -> float:
        """`threshold` as a logit, above which a pixel is of the class."""
        return math.log(self.threshold / (1 - self.threshold))

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
        return self.scales == (1.0,) and not self.flip and self.size_divisor == 1 and self.base_size is None

    def images_at_a_time(self, batch: int) -> int:
        """Number of images to predict together, if the model scores `batch` whole images, or crops, at a time."""
        return batch if self.mode == "whole" else 1

    def input_sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Height and width to which an image of `size` is resized, for each scale. Images with equal ones make a batch.

        Raises:
          ValueError: a side would have no pixel.
        """
        return tuple(_rounded_up(scaled_size(size, scale, self.base_size), self.size_divisor) for scale in self.scales)


def window_contradictions(mode: str, crop: Sequence[int] | None, stride: Sequence[int] | None) -> dict[str, str]:
    """What is wrong with the settings of a sliding window together, by the name of the setting."""
    found = {}
    for name, value in (("crop", crop), ("stride", stride)):
        if mode == "whole" and value is not None:
            found[name] = f"{name} is that of a sliding window: give mode 'slide' too, or omit it"
    if mode == "slide" and stride is not None:
        sides = (512, 512) if crop is None else crop
        if any(step > side for step, side in zip(stride, sides, strict=False)):
            found["stride"] = f"a stride of {tuple(stride)} leaves gaps between crops of {tuple(sides)}"
    return found


def _are_sides(sides: Sequence[object]) -> bool:
    return len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)


def scaled_size(size: tuple[int, int], scale: float, base_size: Sequence[int] | None = None) -> tuple[int, int]:
    """Height and width of an image of `size` at a scale: the largest size of its own proportions within the target.

    The target is a multiple of the image's own size, rounded (`Resize(scale_factor=scale, keep_ratio=True)` of mmcv
    2.x), so that a side may be a pixel less than it. With `base_size` it is a multiple of that, rounded down
    (`MultiScaleFlipAug(img_scale=base_size, img_ratios=[scale])` of mmsegmentation 0.x), and its longer side is for the
    longer side of the image. Training rounds otherwise: `segjax.data.crops.scaled_size`.

    Raises:
      ValueError: a side would have no pixel.
    """
    target = [int(side * scale + 0.5) for side in size] if base_size is None else [int(s * scale) for s in base_size]
    factor = min(max(target) / max(size), min(target) / min(size))
    height, width = (int(side * factor + 0.5) for side in size)
    if not (height and width):
        raise ValueError(f"nothing is left of an image of {size[0]}x{size[1]} at scale {scale:g}; use a larger scale")
    return height, width


def _rounded_up(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    height, width = (-(-side // divisor) * divisor for side in size)
    return height, width


def scaled(image: np.ndarray, scale: float, size_divisor: int, base_size: Sequence[int] | None = None) -> np.ndarray:
    """An image (H, W, C), resized to its `scaled_size` and from there up to multiples of `size_divisor`.

    Raises:
      MemoryError: there is not enough memory for it.
    """
    import cv2

    near = scaled_size(image.shape[:2], scale, base_size)
    for height, width in (near, _rounded_up(near, size_divisor)):
        if (height, width) != image.shape[:2]:
            try:
                # OpenCV takes four channels everywhere, and returns one without its axis.
                parts = (image[..., first : first + 4] for first in range(0, image.shape[2], 4))
                resized = [cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR) for part in parts]
                resized = [part.reshape(height, width, -1) for part in resized]
                image = resized[0] if len(resized) == 1 else np.concatenate(resized, axis=2)
            except cv2.error as error:
                if error.code == cv2.Error.StsNoMem:
                    raise MemoryError(f"an image of {height}x{width}") from error
                raise
    return image


def score(
    functional: FunctionalModel, params: Arrays, batch_stats: Arrays, images: jax.Array, *, normalise: Callable
) -> jax.Array:
    """Logits of images (B, H, W, C) at their own size: float32 or wider (B, H, W, K).

    For a model that takes only multiples of some size, the image is padded with zeros, the mean colour, at the bottom
    and on the right, and the scores of the padding are cut off.
    """
    logits, padded = _small_logits(functional, params, batch_stats, images, normalise=normalise)
    upsampled = layers.resize(logits, padded, align_corners=functional.align_corners)
    return upsampled[:, : images.shape[1], : images.shape[2]]


def _small_logits(functional, params, batch_stats, images, *, normalise) -> tuple[jax.Array, tuple[int, int]]:
    """The model's logits of padded images, and their height and width with the padding."""
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
    """Train ids of images (B, H, W, C), as a whole, (B, H, W); see `compact`."""
    logits, padded = _small_logits(functional, params, batch_stats, images, normalise=normalise)
    height, width = images.shape[1:3]
    if layers.is_fast_on_gpu() and not functional.align_corners and cells.applies(logits.shape, padded):
        labels = cells.labels_of(logits, padded)[:, :height, :width]
        return labels.astype(specs.dtype_of_labels(logits.shape[-1] - 1))
    upsampled = layers.resize(logits, padded, align_corners=functional.align_corners)
    return compact(upsampled[:, :height, :width], threshold=least_logit)


class Inference:
    """A model and a protocol, compiled once for each size of its input. Safe to call from several threads.

    Programs depend on the size of the model's input only: images of many sizes that become inputs of one size share
    them.
    """

    def __init__(
        self,
        model: SegmentationModel | FunctionalModel,
        protocol: Protocol = Protocol(),
        *,
        batch: int = 1,
        normalise: Callable[[jax.Array], jax.Array] = normalise,
        image_dtype: str | None = "uint8",
        devices: Sequence[Device] | None = None,
    ):
        """Takes the parameters out of the model and puts them on every device.

        Args:
          model: a functional model has no arrays; give them with `with_arrays`.
          batch: number of crops of a sliding window that the model scores at a time.
          normalise: images -> input of the model.
          image_dtype: of images; None where they may have several, of which float32 is the largest.
          devices: devices of this process; all by default.
        """
        self.protocol = protocol
        self._batch = batch
        self._dtype, self._channels = np.dtype(image_dtype or "float32"), model.in_channels
        if protocol.threshold != 0.5 and (classes := model.spec.num_classes) != 1:
            raise ValueError(f"a threshold is for models of one class, and this one has {classes}; omit it")
        self._parallel = JitParallel(devices)
        if isinstance(model, FunctionalModel):
            functional, self._arrays = model, ({}, {})
        else:
            functional = FunctionalModel(model)
            self._arrays = self._parallel.replicate(functional.arrays())
        self._align_corners, self._num_classes = functional.align_corners, functional.spec.num_classes
        # Copies with other arrays share the programs, but not the weights that are prepared for them, by their key.
        self._prepared: dict[str, list[jax.Array]] = {}
        self._compiling = threading.Lock()
        labels = partial(predict_labels, functional, normalise=normalise, least_logit=protocol.least_logit)
        self._labels = Program(labels, self._parallel)
        self._score = Program(partial(score, functional, normalise=normalise), self._parallel)

    def refuse_too_large(self, sizes: Iterable[tuple[int, int]], *, batch: int = 1) -> None:
        """Refuses images for which there is not enough memory, before any is predicted.

        Compiles the program for the largest of them, which predictions then use.

        Args:
          sizes: height and width of the images. batch: number of images that are predicted together.

        Raises:
          TooLittleMemoryError: a device has less memory than the program needs.
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
                shapes.add((min(self._batch, crops), height, width))
        program = self._labels if window is None and self.protocol.is_one_pass else self._score
        if shapes:
            self._refuse_too_large(program, (*max(shapes, key=math.prod), self._channels), self._dtype)

    def _refuse_too_large_when_resized(self, size: tuple[int, int], batch: int) -> None:
        """Raises TooLittleMemoryError where resized images do not fit, or their logits by a sliding window."""
        if self.protocol.is_one_pass:
            return
        height, width = max(self.protocol.input_sizes(size), key=math.prod)
        what = f"an image of {size[0]}x{size[1]} that is resized to {height}x{width}"
        pixels = batch * height * width
        memory.refuse_more_than_host(self._channels * self._dtype.itemsize * pixels, what=what)
        if self.protocol.window:
            # float32, in row tiles and in the array that these are put together in.
            logits = 2 * 4 * self._num_classes * pixels
            memory.refuse_too_large(logits, self._parallel.own_devices, what=what)

    def _refuse_too_large(self, program: Program, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Raises TooLittleMemoryError where a program does not fit for images of this shape (B, H, W, C) and dtype."""
        with self._compiling:
            images = jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding(shape[0]))
            needed = program.needed(self._arrays, images)
            batch, height, width = shape[:3]
            kind = "crop" if self.protocol.window else "image"
            what = f"{kind} of {height}x{width}" if batch == 1 else f"batch of {batch} {kind}s of {height}x{width}"
            article = "an" if what.startswith("image") else "a"
            memory.refuse_too_large(needed, self._parallel.own_devices, what=f"{article} {what}")

    def with_arrays(self, arrays: tuple[Arrays, Arrays]) -> Inference:
        """The same programs with other parameters and running statistics, in the order of `FunctionalModel.arrays`."""
        other = copy.copy(self)
        other._arrays, other._prepared = self._parallel.replicate(arrays), {}
        return other

    def labels(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Train ids (H, W), see `compact`, of images (H, W, C) with equal `Protocol.input_sizes`."""
        return [np.asarray(labels) for labels in self.begin(images)]

    def begin(self, images: Sequence[np.ndarray]) -> Sequence[Computed | np.ndarray]:
        """`labels`, which the devices may still be computing: `np.asarray` waits for those of an image."""
        if not self.protocol.is_one_pass:
            return self._computed(images, partial(_labels_of_sum, threshold=self.protocol.threshold))
        if self.protocol.mode == "whole":
            batch = self._run(self._labels, images)
            return [Computed([[batch]], number, image.shape[:2]) for number, image in enumerate(images)]
        return [_put_together(image.shape[:2], self.label_tiles(image)) for image in images]

    def label_tiles(self, image: Pixels) -> Iterator[tuple[int, int, np.ndarray]]:
        """Train ids of an image (H, W, C) by the sliding window, at its own size, in tiles: top, left, labels (h, w).

        The tiles cover the image once, panel by panel, and are those of `labels`; see `sliding_window.row_tiles`.
        """
        for top, left, logits, part in self.row_tiles(image):
            labels = np.asarray(_labels(logits, threshold=self.protocol.least_logit))
            # Before the next row of crops needs memory.
            del logits
            yield top, left, labels[:, part]

    def probabilities(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Probability of each class, float32 (H, W, K); for K = 1 that of the class, not of the background.

        Args:
          images: as for `labels`.
        """
        return [np.asarray(probabilities) for probabilities in self._computed(images, _mean_of_sum)]

    def _computed(self, images: Sequence[np.ndarray], finish: Callable[[jax.Array, int], jax.Array]) -> list[Computed]:
        """`finish` of the sum of the probabilities over scales and flips, and their number, tile by tile."""
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        grid = resized_tiles.grid(sizes)
        tiles: dict[tuple[int, int], jax.Array] = {}
        passes = [(scale, flipped) for scale in self.protocol.scales for flipped in (False, True)[: self._flips]]
        for number, (scale, flipped) in enumerate(passes, 1):
            logits = self._logits(self._resized(images, scale, flipped))
            samples = resized_tiles.samples(logits, sizes, flipped=flipped, align_corners=self._align_corners)
            for corner in grid:
                total = resized_tiles.add_probabilities(tiles.get(corner), logits, *samples.of_tile(corner))
                # The last pass finishes one tile after the other, so that their sums need not be in memory together.
                tiles[corner] = finish(total, number) if number == len(passes) else total
        rows = [[tiles[corner] for corner in grid if corner[0] == top] for top in dict.fromkeys(top for top, _ in grid)]
        return [Computed(rows, number, size) for number, size in enumerate(sizes)]

    @property
    def _flips(self) -> int:
        return 2 if self.protocol.flip else 1

    def _resized(self, images: Sequence[np.ndarray], scale: float, flipped: bool) -> np.ndarray:
        protocol = self.protocol
        # Its height and width, which the others share.
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
        """Logits of an image (H, W, C) by the sliding window, in row tiles: see `sliding_window.row_tiles`.

        Raises:
          ValueError: the protocol has no sliding window.
        """
        window = self.protocol.window
        if window is None:
            raise ValueError(f"row tiles are those of a sliding window, and mode is {self.protocol.mode!r}")

        def logits_of(crops: np.ndarray) -> jax.Array:
            return self._run(self._score, crops)

        return row_tiles(logits_of, image, crop=window.crop, stride=window.stride, batch=self._batch)

    def _run(self, program: Program, images: Sequence[np.ndarray] | np.ndarray) -> jax.Array:
        """Calls a program with images (B, H, W, C) if there is enough memory for it."""
        # Before they are stacked, because a large batch may be too much for the host.
        self._refuse_too_large(program, (len(images), *images[0].shape), images[0].dtype)
        on_devices = jax.device_put(np.asarray(images), self._sharding(len(images)))
        with self._compiling:
            call = program.of(self._arrays, on_devices, self._prepared)
        return call(on_devices)

    def _sharding(self, batch: int) -> NamedSharding:
        return self._parallel.split if batch % len(self._parallel.devices) == 0 else self._parallel.whole


class Program:
    """A function (params, batch_stats, images) -> array, compiled for each shape of the images.

    On a GPU what it computes of the weights only is computed once: see `segjax.models.prepared`.
    """

    def __init__(self, function: Callable[..., jax.Array], parallel: JitParallel):
        self._function, self._whole = function, parallel.whole
        self._jit = partial(jax.jit, compiler_options=compiler_options(parallel.devices[0].platform))
        self.at_once = self._jit(function)
        self._parts: dict[tuple[tuple[int, ...], np.dtype], tuple[Prepared, jax.stages.Wrapped]] = {}
        self._needed: dict[tuple[tuple[int, ...], np.dtype], int | None] = {}

    def needed(self, arrays: tuple[Arrays, Arrays], images: jax.ShapeDtypeStruct) -> int | None:
        """Bytes that the program needs; see `memory.needed`. The call that follows finds the compiled program."""
        key = images.shape, images.dtype
        if key not in self._needed:
            if layers.is_fast_on_gpu():
                part, program = self._part(arrays, images)
                shapes = jax.eval_shape(part.prepare, arrays)
                weights = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole) for x in shapes]
                lowered = program.lower(weights, images)
            else:
                lowered = self.at_once.lower(*arrays, images)
            self._needed[key] = memory.needed(lowered.compile())
        return self._needed[key]

    def of(
        self, arrays: tuple[Arrays, Arrays], images: jax.Array, prepared: dict[str, list[jax.Array]]
    ) -> Callable[[jax.Array], jax.Array]:
        """The function of the images.

        Args:
          images: of this shape. prepared: what was computed of `arrays` before, which is added to.
        """
        if not layers.is_fast_on_gpu():
            return partial(self.at_once, *arrays)
        part, program = self._part(arrays, images)
        if part.key not in prepared:
            prepared[part.key] = jax.jit(part.prepare, out_shardings=self._whole)(arrays)
        return partial(program, prepared[part.key])

    def _part(self, arrays: tuple[Arrays, Arrays], images) -> tuple[Prepared, jax.stages.Wrapped]:
        key = images.shape, images.dtype
        if key not in self._parts:
            part = Prepared(lambda arrays, images: self._function(*arrays, images), arrays, images)
            self._parts[key] = part, self._jit(part.program)
        return self._parts[key]


class Computed(NamedTuple):
    """An array (H, W, ...) of one image, in tiles that hold a batch: `np.asarray` waits for it and puts it together.

    Attributes:
      tiles: rows of tiles (B, h, w, ...), as they lie in the image; the last ones reach beyond it.
      number: of the image in the batch.
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


def _put_together(size: tuple[int, int], tiles: Iterable[tuple[int, int, np.ndarray]]) -> np.ndarray:
    """Labels (H, W) of tiles that cover them."""
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
    """Train ids (B, H, W), see `compact`, of a sum (B, H, W, K) of `count` probabilities."""
    return compact(total / count, threshold=threshold)


@partial(jax.jit, static_argnames="count")
def _mean_of_sum(total: jax.Array, count: int) -> jax.Array:
    return total / count


def compact(scores: jax.Array, *, threshold: float = 0) -> jax.Array:
    """What `labels_of` returns, as uint8 of up to 256 classes, as uint16 of more."""
    return labels_of(scores, threshold=threshold).astype(specs.dtype_of_labels(scores.shape[-1] - 1))


_labels = jax.jit(compact, static_argnames="threshold")


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
