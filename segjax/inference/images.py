"""Converts NumPy arrays, PIL images and image files to the arrays that models take, for most models uint8 RGB.

Values are scaled by the rule of `segjax.data.scaling`.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np

from segjax.data import bands, codec, scaling, specs, tiff
from segjax.data.codec import MAX_PIXELS, ImageError
from segjax.data.scaling import Scale
from segjax.runtime import reading
from segjax.runtime.reading import user_path

# An array, the path of a file, or a PIL image, hence Any: PIL is not imported.
Image = np.ndarray | str | os.PathLike[str] | Any

_ORIENTATION = 274  # tag of EXIF
_SCALE = "give the values of black and white: --scale LOW HIGH, or scale=(low, high) in Python"


def as_rgb(image: Image, *, scale: Scale | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Converts an image to uint8 (H, W, 3); an image of that form is returned unchanged.

    Args:
      image: Array (H, W, 3); grey array (H, W) or (H, W, 1), which is repeated; or array (H, W, 4), whose alpha is
        dropped, so that hidden colours show. Or a PIL image, converted by its mode, without its EXIF orientation. Or
        the path of an image file, which is decoded upright.
      scale: Values that become 0 and 255, for numbers of more than 8 bits; values beyond are clipped.
      max_pixels: Maximum number of pixels of a file.

    Raises:
      ValueError: Any other image, or values of an unknown scale.
      OSError: The file cannot be opened.
    """
    check_scale(scale)
    if isinstance(image, str | os.PathLike):
        path = user_path(image)
        try:
            return read_image(path, scale=scale, max_pixels=max_pixels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    is_pil = hasattr(image, "mode") and hasattr(image, "convert")
    array = codec.as_grey_or_rgb(cast(Any, image)) if is_pil else np.asarray(image)
    return _as_rgb(array, scale, 255 if array.dtype == np.uint8 else None)


def read_image(path: Path, *, scale: Scale | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads an image file as uint8 (H, W, 3), upright; `as_rgb` describes the arguments.

    Raises:
      ValueError: It is not a regular file or not an image, is damaged, has too many pixels or values of an unknown
        scale. The message does not name the file.
      OSError: The file cannot be opened.
    """
    # A pixel has at most 8 bytes: four samples of 16 bits.
    most = reading.MOST if max_pixels <= MAX_PIXELS else max(reading.MOST, 8 * max_pixels)
    try:
        data = reading.read_bytes(path, most=most)
    except reading.UnreadableError as error:
        raise ImageError(str(error).removeprefix(f"{path}: ")) from None
    return decode(data, specs.ImageKind(), scale=scale, max_pixels=max_pixels)


def as_image(
    image: Image, kind: specs.ImageKind, *, scale: Scale | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Converts an image to the kind that a model takes: by `as_rgb` for 8-bit RGB, otherwise (H, W, C) unscaled.

    Args:
      image: As for `as_rgb`. For other kinds than 8-bit RGB, an array (H, W, C), or (H, W) with one channel, or a file
        that `bands.decode` reads.
      kind: Kind of images that the model takes.
      scale: As for `as_rgb`.
      max_pixels: As for `as_rgb`.

    Raises:
      ValueError: Any other image; the message names the file.
      OSError: The file cannot be opened.
    """
    if kind.is_rgb:
        return as_rgb(image, scale=scale, max_pixels=max_pixels)
    if isinstance(image, str | os.PathLike):
        path = user_path(image)
        try:
            return read_bands(path, kind, max_pixels=max_pixels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return of_kind(bands.of_array(np.asarray(image)), kind)


def read_bands(path: Path, kind: specs.ImageKind, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads a file as (H, W, C) for a model of other images than 8-bit RGB; `read_image` describes the errors."""
    # Enough for 13 bands of 32 bits.
    most = max(reading.MOST, 64 * max_pixels)
    try:
        data = reading.read_bytes(path, most=most)
    except reading.UnreadableError as error:
        raise ImageError(str(error).removeprefix(f"{path}: ")) from None
    return decode(data, kind, max_pixels=max_pixels)


def decode(
    data: bytes, kind: specs.ImageKind, *, scale: Scale | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes a file's content as the image (H, W, C) of the kind that a model takes; `as_image` has the arguments.

    Raises:
      ValueError: It is no such image, is damaged, has too many pixels or values of an unknown scale.
    """
    if not kind.is_rgb:
        return of_kind(bands.decode(data, max_pixels=max_pixels), kind)
    image, white = decode_upright(data, max_pixels=max_pixels)
    return _as_rgb(image, scale, white)


def of_kind(image: np.ndarray, kind: specs.ImageKind) -> np.ndarray:
    """Returns the image (H, W, C), or raises ImageError if a model for images of this kind does not take it."""
    found = specs.ImageKind(image.shape[2], image.dtype.name)
    if found.channels != kind.channels or kind.dtype not in (None, found.dtype):
        raise ImageError(f"has {found}, and the model takes {kind}")
    if strange := bands.strange_values(image):
        raise ImageError(f"has values that are NaN or infinite: {strange}; replace them")
    return image


def upright_size(path: Path) -> tuple[int, int] | None:
    """Height and width of an upright image from the header of its file; None if the header cannot be read."""
    from PIL import Image

    try:
        with reading.open_regular(path) as file, Image.open(file) as image:
            # Pillow would decode a PNG without an orientation to look for one after the pixels.
            is_upright = image.format == "PNG" and "exif" not in image.info
            orientation = 1 if is_upright else image.getexif().get(_ORIENTATION, 1)
            height, width = image.height, image.width
    # Pillow raises many types of errors, and warnings.
    except Exception:
        return None
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def has_more_images(path: Path) -> bool:
    """Whether a file has more than one image: pages of a TIFF, frames of an animation. False for a damaged file."""
    from PIL import Image

    try:
        with reading.open_regular(path) as file:
            found = codec.format_of(file.read(32))
            if found == "TIFF":
                return tiff.has_more_images(path)
            if found not in ("GIF", "WebP", "PNG"):
                return False
            file.seek(0)
            with Image.open(file) as image:
                return getattr(image, "is_animated", False)
    # Pillow raises many types of errors for damaged files. The code that decodes the file reports them.
    except Exception:
        return False


def decode_upright(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int | None]:
    """Decodes the first image of a file's content; see `codec.decode_upright`, `tiff.decode` and `bands.decode`."""
    found = codec.format_of(data[:32])
    if found == "NPY":
        image = bands.decode(data, max_pixels=max_pixels)
        if image.shape[2] not in (1, 3):
            raise ImageError(f"has {image.shape[2]} channels, and the model takes 3, RGB, or grey")
        return image, 255 if image.dtype == np.uint8 else None
    return (tiff.decode if found == "TIFF" else codec.decode_upright)(data, max_pixels=max_pixels)


def check_scale(scale: Scale | None) -> None:
    """Raises ValueError for an invalid scale."""
    if scale is None:
        return
    low, high = scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"scale has two numbers, the value of black and a larger one of white; not {low} {high}")


def _as_rgb(image: np.ndarray, scale: Scale | None, white: int | None) -> np.ndarray:
    channels = image.shape[2] if image.ndim == 3 else 1
    problems = []
    if image.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in image.shape:
        problems.append(f"its shape is {image.shape}; an image is (H, W, 3), or grey (H, W), or RGBA (H, W, 4)")
    if image.dtype.kind not in "uif":
        problems.append(f"its dtype is {image.dtype}; convert them to uint8, 0 to 255")
    if problems:
        raise ImageError(f"an image that cannot be used: {'; '.join(problems)}")
    try:
        image = scaling.as_uint8(image[..., :3] if image.ndim == 3 else image, scale, white)
    except scaling.UnknownScaleError as error:
        bits = image.dtype == np.uint16
        remedy = "--scale 0 65535 keeps its values" if bits else "or convert them to uint8"
        raise ImageError(f"an image that cannot be used: {error}; {_SCALE}{'; ' if bits else ', '}{remedy}") from None
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image
