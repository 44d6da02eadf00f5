"""A model in an exported file, which another package runs, in place of a model of segjax."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from segjax.checkpoints.state_dict import model_metadata
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.inference.runtimes import Runnable, files_of
from segjax.models.functional import FunctionalModel, params_sha256
from segjax.models.segmentation_model import ModelSpec, SegmentationModel
from segjax.runtime import memory, reading


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedModel:
    """Images as they are read -> logits or labels. `Inference` takes it in place of a `SegmentationModel`.

    Attributes:
      path: The file.
      runnable: What runs it.
      spec: Name of the model, and number of classes K.
      output: "logits", "probabilities" or "labels".
      mean: Mean of the training images, C numbers.
      std: Their standard deviation, C numbers.
      normalises: Whether the file normalises images itself.
      channels_last: Whether it takes (B, H, W, C) instead of (B, C, H, W).
      scores_last: Whether its scores are (B, h, w, K) instead of (B, K, h, w).
      output_name: Name of the output.
      align_corners: As of `SegmentationModel`.
      size_multiple: As of `SegmentationModel`.
      threshold: Probability above which the file labels a pixel with its only class.
    """

    path: Path
    runnable: Runnable
    spec: ModelSpec
    output: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalises: bool
    channels_last: bool
    scores_last: bool
    output_name: str
    align_corners: bool = False
    size_multiple: int = 1
    threshold: float = 0.5
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    @property
    def in_channels(self) -> int:
        return len(self.mean)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images; None if they may have any."""
        height, width = self.runnable.shape[1:3] if self.channels_last else self.runnable.shape[2:4]
        return None if height is None or width is None else (height, width)

    @property
    def metadata(self) -> dict[str, object]:
        """What a report records of it, as JSON."""
        return {"name": self.spec.name, "num_classes": self.spec.num_classes, "run_by": self.runnable.package}

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width to which images are padded before the file gets them.

        Raises:
          ValueError: The file takes images of one size, and they are larger.
        """
        if self.size is None:
            height, width = (-(-side // self.size_multiple) * self.size_multiple for side in size)
            return height, width
        if size[0] > self.size[0] or size[1] > self.size[1]:
            height, width = self.size
            remedy = "export it with dynamic sizes, or for this one"
            if self.output != "labels":
                remedy = f"use mode 'slide', whose window is {height}x{width}, or {remedy}"
            raise ValueError(
                f"{self.path.name} takes images of {height}x{width} and smaller ones, not of {size[0]}x{size[1]}; "
                f"{remedy}"
            )
        return self.size

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Runs the file. Images smaller than it takes are padded with the mean colour at the bottom and right.

        Args:
          images: (B, H, W, C), not normalised.

        Returns:
          Logits, float32 (B, h, w, K), or labels (B, h, w); and height and width of the padded images.

        Raises:
          ValueError: The file does not take such images, or its output is none of segmentation.
        """
        given, size = self.input_of(images)
        # Packages let a model run in one thread at a time.
        with self._lock:
            outputs = [self._outputs(part)[self.output_name] for part in self._batches(given)]
        output = np.concatenate(outputs)[: len(images)]
        if self.output == "labels":
            return self._labels(output), size
        scores = (output if self.scores_last else np.moveaxis(output, 1, -1)).astype(np.float32)
        return (_logits(scores) if self.output == "probabilities" else scores), size

    def input_of(self, images: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Images (B, H, W, C) as the file takes them, and their padded size."""
        height, width = self.padded_size(images.shape[1:3])
        pads = ((0, 0), (0, height - images.shape[1]), (0, width - images.shape[2]))
        dtype = self.runnable.dtype
        mean = np.asarray(self.mean, np.float32)
        fill = np.rint(mean) if self.normalises and dtype.kind in "ui" else mean * self.normalises
        given = images if self.normalises else np.asarray(normalise(images, self.mean, self.std))
        given = given.astype(dtype)
        channels = [
            np.pad(given[..., channel], pads, constant_values=np.asarray(fill[channel]).astype(dtype))
            for channel in range(given.shape[-1])
        ]
        return np.stack(channels, axis=-1 if self.channels_last else 1), (height, width)

    def _batches(self, given: np.ndarray) -> list[np.ndarray]:
        """The images in batches of the file's size; the last one repeats its last image."""
        batch = self.runnable.shape[0]
        if batch is None or batch == len(given):
            return [given]
        filled = np.concatenate([given, *[given[-1:]] * (-len(given) % batch)])
        return [filled[start : start + batch] for start in range(0, len(filled), batch)]

    def _outputs(self, given: np.ndarray) -> Mapping[str, np.ndarray]:
        try:
            return self.runnable.outputs(given)
        except Exception as error:
            # Every package has errors of its own.
            if memory.is_exhausted(error):
                raise
            raise ValueError(
                f"{self.path.name} does not run in {self.runnable.package} on images {given.shape} of {given.dtype} "
                f"({reading.stated(error)})"
            ) from error

    def _labels(self, output: np.ndarray) -> np.ndarray:
        # Some exporters keep the axis over which argmax went.
        labels = output if output.ndim == 3 else output.squeeze(-1 if self.scores_last else 1)
        most = max(self.spec.num_classes, 2) - 1
        if labels.min() < 0 or labels.max() > most:
            raise ValueError(
                f"{self.path.name} gives labels from {labels.min()} to {labels.max()}, and those of its "
                f"{self.spec.num_classes} classes are 0 to {most}"
            )
        return labels.astype(specs.dtype_of_labels(most))


def _logits(probabilities: np.ndarray) -> np.ndarray:
    """Scores whose softmax, or sigmoid for one class, are the probabilities (..., K)."""
    tiny = np.finfo(np.float32).tiny
    if probabilities.shape[-1] == 1:
        return np.log(np.maximum(probabilities, tiny)) - np.log(np.maximum(1 - probabilities, tiny))
    return np.log(np.maximum(probabilities, tiny))


def metadata_of(model: SegmentationModel | ExportedModel) -> dict[str, object]:
    """What a report says of a model."""
    return model.metadata if isinstance(model, ExportedModel) else model_metadata(model)


def identity_of(model: SegmentationModel | ExportedModel) -> dict[str, object]:
    """What the predictions of a model depend on, except for its weights, as JSON."""
    if isinstance(model, ExportedModel):
        names = ("output", "output_name", "normalises", "align_corners", "size_multiple", "threshold")
        return model.metadata | {name: getattr(model, name) for name in names}
    return model_metadata(model) | {"dtype": jnp.dtype(model.dtype).name, "align_corners": model.align_corners}


def weights_sha256(model: SegmentationModel | ExportedModel) -> str:
    """Hash of the weights of a model, or of an exported file."""
    if isinstance(model, ExportedModel):
        return reading.sha256_of(files_of(model.path))
    params, batch_stats = FunctionalModel(model).arrays()
    return params_sha256(params | batch_stats)
