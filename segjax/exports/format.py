"""Formats of exported files: inputs, outputs and the dtype of the weights."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from segjax.data import specs

if TYPE_CHECKING:
    import jax
    import numpy as np

SUFFIXES = {"stablehlo": ".stablehlo", "onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
# Formats whose weights and activations may be INT8.
INT8_FORMATS = ("onnx", "openvino")
PLATFORMS = ("cpu", "cuda")
# Opsets of an ONNX file, from that of TensorRT 8.6 and onnxruntime 1.12 to the newest that torch.onnx writes.
OPSETS = range(17, 26)
# Smallest side of an image, in pixels, with dynamic sizes. It gives at least two pixels in the smallest map of every
# family; for a map of one pixel, `torch.export` would trace another program.
LEAST = 64
# Largest accepted error of a file, max |file - model| / max |model|, by the dtype to which a file rounds more than its
# weights. Both sides have the same, possibly rounded weights. The largest measured error in float32 is 2e-6; in 16 bits
# XLA rounds in another order.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """Format of an exported file.

    Attributes:
      format: Key of `SUFFIXES`.
      size: (height, width) of the images in pixels.
      dynamic: Whether batch, height and width are dynamic; otherwise the batch is 1.
      preprocessing: Whether the file normalises its images.
      argmax: Whether the output is labels instead of logits.
      dtype: Dtype of the stored weights, a key of `BOUNDS`.
      int8: Whether the file is quantised afterwards, see `segjax.exports.int8`.
      opset: Opset of an ONNX file, one of `OPSETS`; None for the default of torch.onnx.
      threshold: Probability above which a pixel belongs to the class, in labels of models of one class.
      temperature: Divisor of the logits.
      mean: Mean of the training images, one number per channel.
      std: Standard deviation of the training images, one number per channel.
      image_kind: Channels and dtype of the training images.
    """

    format: str
    size: tuple[int, int]
    dynamic: bool = False
    preprocessing: bool = False
    argmax: bool = False
    dtype: str = "float32"
    int8: bool = False
    opset: int | None = None
    threshold: float = 0.5
    temperature: float = 1.0
    mean: tuple[float, ...] = specs.IMAGENET_MEAN
    std: tuple[float, ...] = specs.IMAGENET_STD
    image_kind: specs.ImageKind = specs.RGB

    def normalise(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Images (..., C) of any dtype, RGB in 0..255 -> normalised float32."""
        from segjax.data.augment import normalise

        return normalise(images, self.mean, self.std)

    def scaled(self, logits: Any) -> Any:
        """Logits, an array of jax or torch, divided by the temperature."""
        # A program without temperature has no such operation.
        return logits if self.temperature == 1 else logits / self.temperature

    @property
    def channels_last(self) -> bool:
        """Whether the file takes images (B, H, W, C) instead of (B, C, H, W)."""
        return self.preprocessing or self.format == "stablehlo"

    @property
    def input_dtype(self) -> str:
        """Dtype of the file's input: with preprocessing that of the training images if known, otherwise float32."""
        return (self.image_kind.dtype or "float32") if self.preprocessing else "float32"

    def input_shape(self, batch: Any, height: Any, width: Any) -> tuple[Any, ...]:
        """Shape of the file's input, from numbers or symbols."""
        channels = self.image_kind.channels
        return (batch, height, width, channels) if self.channels_last else (batch, channels, height, width)

    @property
    def computes_in(self) -> str:
        """Dtype of the model with which the file is compared."""
        return self.dtype if self.format == "stablehlo" else "float32"

    @property
    def bound(self) -> float:
        """Largest accepted error of the file, see `BOUNDS`."""
        # These store 16-bit weights for a computation in float32.
        is_float32 = self.format == "torch" or (self.format, self.dtype) == ("onnx", "bfloat16")
        return BOUNDS["float32" if is_float32 else self.dtype]

    @property
    def traced_dtype(self) -> str:
        """Dtype of the weights in the PyTorch program from which the file is made."""
        # ONNX and OpenVINO files become float16 after their graphs are optimised, which would widen other weights.
        is_later = self.dtype == "float16" and self.format in ("onnx", "openvino")
        return "float32" if is_later else self.dtype

    @property
    def weights(self) -> str:
        """What the metadata of the file say of its weights."""
        return "int8" if self.int8 else self.dtype

    @property
    def least_logit(self) -> float:
        """`threshold` as a logit."""
        return math.log(self.threshold / (1 - self.threshold))

    @property
    def output(self) -> str:
        return "labels" if self.argmax else "logits"
