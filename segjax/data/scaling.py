"""Scales the values of images to 8 bits, by one rule for data sets and predictions.

The scale of 8-bit images, and of TIFF with fewer than 16 bits, is the full range. 16-bit images have the range 0 to
65535, as PNG and TIFF define it, only if at least 1% of their values are in the upper half: cameras and satellites
store 12-bit values or reflectances in 16 bits, which a model would see as black. All other images need a `scale`: the
values of black and white.
"""

from __future__ import annotations

import numpy as np

from segjax.data.codec import ImageError

Scale = tuple[float, float]

# Minimum share of values in the upper half for 65535 to be white.
LEAST_BRIGHT = 0.01


class UnknownScaleError(ImageError):
    """The values of black and white are not known; the command adds the remedy to the message."""


def as_uint8(image: np.ndarray, scale: Scale | None, white: int | None) -> np.ndarray:
    """Scales values to uint8.

    Args:
      image: Integers or floats, of any shape.
      scale: Values that become 0 and 255; values outside are clipped. By default, the rule of this module applies.
      white: Value of white, if the file states it.

    Raises:
      UnknownScaleError: No scale is given, and the rule finds none.
      ImageError: Some values are not finite.
    """
    if image.dtype == np.uint8 and white == 255:
        return image
    if scale is None and white is None:
        white = _white_of(image)
    low, high = scale or (0, white or 0)
    if image.dtype.kind == "u" and image.dtype.itemsize <= 2:
        # A lookup table, because a float64 image would take four times the memory.
        values = np.arange(256**image.dtype.itemsize)
        return _linear(values, low, high)[image]
    if image.dtype.kind == "f" and (strange := image.size - int(np.isfinite(image).sum())):
        raise ImageError(f"an image that cannot be used: {strange:,} of its values are NaN or infinite; replace them")
    return np.stack([_linear(row, low, high) for row in image])


def _linear(values: np.ndarray, low: float, high: float) -> np.ndarray:
    # float64 is exact for all integers of up to 53 bits; half is rounded up.
    return np.clip(np.floor((values.astype(np.float64) - low) * 255 / (high - low) + 0.5), 0, 255).astype(np.uint8)


def _white_of(image: np.ndarray) -> int:
    """Value of white of an image that uses all 16 bits. Raises UnknownScaleError for any other image."""
    smallest, largest = image.min(), image.max()
    if image.dtype.kind != "u" or image.dtype.itemsize != 2:
        raise UnknownScaleError(
            f"it has {image.dtype} values from {smallest:.6g} to {largest:.6g}, and its scale is not known"
        )
    bright = np.count_nonzero(image >= 2**15) / image.size
    # An image that is all black is black at any scale.
    if largest and bright < LEAST_BRIGHT:
        raise UnknownScaleError(
            f"its brightest value is {largest} of 65535, and {100 * bright:.2g}% are in the upper half, so that 65535 "
            "may not be white"
        )
    return 2**16 - 1
