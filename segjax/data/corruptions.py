"""Corrupted images: Gaussian noise, blur, JPEG, brightness and contrast, each at five severities.

Kinds and constants are those of ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, arXiv:1903.12261), which Kamann and Rother (CVPR 2020) adopted for
segmentation. The constants do not depend on the size of the image: a blur of 6 pixels changes a small image more.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from segjax.data.records import Records

SEVERITIES = (1, 2, 3, 4, 5)
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of values from 0 to 1
BLUR = (1, 2, 3, 4, 6)  # standard deviation in pixels
JPEG = (25, 18, 15, 10, 7)  # quality of libjpeg
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the HSV value, from 0 to 1
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor of the distance from the mean colour of the image


def gaussian_noise(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise to each value."""
    return _as_uint8(image + 255 * NOISE[severity - 1] * rng.standard_normal(image.shape, np.float32))


def blur(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Convolves with a Gaussian; the image is mirrored at its borders."""
    import cv2

    return cv2.GaussianBlur(image, (0, 0), BLUR[severity - 1])


def jpeg(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Encodes and decodes as JPEG, with 4:2:0 chroma subsampling."""
    import cv2

    _, data = cv2.imencode(".jpg", image[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, JPEG[severity - 1]))
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]


def brightness(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Adds to the HSV value, the maximum of the three channels; hue and saturation do not change."""
    value = image.max(axis=-1, keepdims=True).astype(np.float32)
    brighter = np.minimum(value + 255 * BRIGHTNESS[severity - 1], 255)
    # Black has no hue and becomes grey.
    return _as_uint8(np.where(value > 0, image * (brighter / np.maximum(value, 1)), brighter))


def contrast(image: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Moves every pixel towards the mean colour of the image."""
    mean = image.mean(axis=(0, 1))
    return _as_uint8(mean + CONTRAST[severity - 1] * (image - mean))


# Name: (image uint8 (H, W, 3), severity from 1 to 5, generator) -> uint8 (H, W, 3).
KINDS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "gaussian noise": gaussian_noise,
    "blur": blur,
    "jpeg": jpeg,
    "brightness": brightness,
    "contrast": contrast,
}


class CorruptedRecords:
    """Records of 8-bit RGB images, corrupted; labels are unchanged.

    The name of an image seeds its noise, which therefore depends neither on the order nor on the number of images.

    Attributes:
      sizes: As in `Records`.
      names: As in `Records`.
    """

    def __init__(self, records: Records, kind: str, severity: int):
        self._records, self._corrupt, self._severity = records, KINDS[kind], severity
        self.sizes: np.ndarray = records.sizes
        self.names: Sequence[str] = records.names

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self._records[number]
        rng = np.random.default_rng(zlib.crc32(self.names[number].encode("utf-8", "surrogatepass")))
        return np.ascontiguousarray(self._corrupt(image, self._severity, rng)), label


def _as_uint8(image: np.ndarray) -> np.ndarray:
    return image.round().clip(0, 255).astype(np.uint8)
