"""The scale of an image's values, by one rule for files of data sets and of predictions.

8 bits have their own, and so have the bit depths below 16 of a TIFF. 16 bits are taken for 0 to 65535, as PNG and TIFF
define them, only if at least 1% of the values are in the upper half: cameras and satellites store 12 bits or
reflectances in 16, which would be black to a model. All other numbers need a `scale`: the values of black and white.
"""

from __future__ import annotations

import numpy as np

from segjax.data.codec import ImageError

Scale = tuple[float, float]

# Share of 16-bit values in the upper half from which on an image uses all of its 16 bits.
LEAST_BRIGHT = 0.01


class UnknownScaleError(ImageError):
    """Values of which black and white are not known; the message lacks the remedy, which depends on the command."""


def as_uint8(image: np.ndarray, scale: Scale | None, white: int | None) -> np.ndarray:
    """uint8 of values of any scale.

    Args:
      image: An array of any shape, of integers or float.
      scale: Values that become 0 and 255, values beyond are cut; None for the rule of this module.
      white: The value of white where the file states it.

    Raises:
      UnknownScaleError: No scale is given, and the rule finds none. ImageError: values that are not finite.
    """
    if image.dtype == np.uint8 and white == 255:
        return image
    if scale is None and white is None:
        white = _white_of(image)
    low, high = scale or (0, white or 0)
    if image.dtype.kind == "u" and image.dtype.itemsize <= 2:
        # A table: to compute with wider numbers would take four times the memory of the image.
        values = np.arange(256**image.dtype.itemsize)
        return _linear(values, low, high)[image]
    if image.dtype.kind == "f" and (strange := image.size - int(np.isfinite(image).sum())):
        raise ImageError(f"an image that cannot be used: {strange:,} of its values are NaN or infinite; replace them")
    return np.stack([_linear(row, low, high) for row in image])


def _linear(values: np.ndarray, low: float, high: float) -> np.ndarray:
    # float64 is exact for all integers of up to 53 bits; half is rounded up.
    return np.clip(np.floor((values.astype(np.float64) - low) * 255 / (high - low) + 0.5), 0, 255).astype(np.uint8)


def _white_of(image: np.ndarray) -> int:
    """The value of white of 16 bits that are used as such. Raises UnknownScaleError for all others."""
    smallest, largest = image.min(), image.max()
    if image.dtype.kind != "u" or image.dtype.itemsize != 2:
        raise UnknownScaleError(
            f"its dtype is {image.dtype}, from {smallest:.6g} to {largest:.6g}, and its scale is not known"
        )
    bright = np.count_nonzero(image >= 2**15) / image.size
    # Black is black at any scale.
    if largest and bright < LEAST_BRIGHT:
        raise UnknownScaleError(
            f"its brightest value is {largest} of 65535, and {100 * bright:.2g}% are in the upper half, so that 65535 "
            "may not be white"
        )
    return 2**16 - 1
