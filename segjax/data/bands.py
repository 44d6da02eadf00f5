"""Reads images with any number of channels, unscaled: TIFF with all bands, NumPy's .npy, grey PNG; and such masks.

Pixels are uint8, uint16 or float32 (H, W, C), in the unit of the data: values are not scaled, and no band is dropped.
"""

from __future__ import annotations

import ast
import io
import math
from typing import Any, NamedTuple

import numpy as np

from segjax.data import codec, specs, tiff
from segjax.data.codec import ImageError, LayoutError

# Percentiles of a band that are black and white in pictures.
_DARK, _BRIGHT = 2, 98
# Number of pixels for percentiles; with more pixels, the result changes by less than a grey level.
_SAMPLED = 1 << 16
# Version of a .npy -> number of bytes that hold the header's length; and the longest header that NumPy reads.
_LENGTHS_OF_HEADERS, _LONGEST_HEADER = {(1, 0): 2, (2, 0): 4, (3, 0): 4}, 10_000
_CONVERT = f"images are {', '.join(specs.IMAGE_DTYPES[:-1])} or {specs.IMAGE_DTYPES[-1]}; convert it to one of them"


def decode(data: bytes, *, max_pixels: int = codec.MAX_PIXELS) -> np.ndarray:
    """Decodes an image file of any format, upright, to uint8, uint16 or float32 (H, W, C).

    Every sample of a TIFF is a channel, including alpha; palette, CMYK and YCbCr become RGB. For PNG, JPEG, WebP, BMP
    and GIF, C is 1 for grey and else 3: alpha is dropped, and a palette is replaced by its colours.

    Raises:
      ImageError: The file is not an image, is damaged, has more than `max_pixels` pixels, or has another dtype.
    """
    match codec.format_of(data[:32]):
        case "TIFF":
            image = tiff.decode_bands(data, max_pixels=max_pixels)
        case "NPY":
            image = of_array(of_npy(data))
            codec.refuse_size(image.shape[:2], max_pixels)
        case _:
            image, _ = codec.decode_upright(data, max_pixels=max_pixels)
            if image.ndim == 3 and image.shape[2] == 3 and codec.is_grey(data):
                # The decoder repeated the grey channel.
                image = image[..., :1]
    return of_array(image)


def decode_mask(data: bytes, *, max_pixels: int = codec.MAX_PIXELS) -> codec.StoredMask:
    """Decodes a mask: a TIFF with one band, upright, or a .npy (H, W) or (H, W, 1); its values are kept exactly.

    Raises:
      LayoutError: The mask has several bands, or values that are not integers in 0..65535.
      ImageError: The file is damaged, or has more than `max_pixels` pixels.
    """
    palette = None
    if codec.format_of(data[:32]) == "TIFF":
        values, palette = tiff.decode_mask(data, max_pixels=max_pixels)
    else:
        values = of_npy(data)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if values.ndim != 2 or 0 in values.shape:
            hint = "; array[0] would be" * (values.ndim == 3 and values.shape[0] == 1)
            raise LayoutError(f"has the shape {values.shape}, which is not (H, W){hint}")
        codec.refuse_size((values.shape[0], values.shape[1]), max_pixels)
    if values.dtype.kind not in "biuf":
        raise LayoutError(f"has numbers of {values.dtype.name}")
    is_float = values.dtype.kind == "f"
    strange = values != np.floor(values) if is_float else (values < 0) | (values > specs.LARGEST_LABEL)
    if strange.any():
        row, column = np.argwhere(strange)[0].tolist()
        raise LayoutError(
            f"has {np.count_nonzero(strange):,} values of {values.dtype.name} that are "
            + ("not whole numbers" if is_float else f"outside of 0..{specs.LARGEST_LABEL}")
            + f", the first at row {row}, column {column}: {values[row, column]}"
        )
    if is_float:
        raise LayoutError(f"has numbers of {values.dtype.name}, from {values.min():.6g} to {values.max():.6g}")
    if palette is not None:
        return codec.of_indices(values.astype(np.uint8), palette)
    return codec.StoredMask(values.astype(specs.dtype_of_labels(int(values.max()))), None)


def of_array(image: np.ndarray) -> np.ndarray:
    """An array (H, W) or (H, W, C) as (H, W, C), in the byte order of the machine.

    Raises:
      LayoutError: The array has another shape or dtype.
    """
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise LayoutError(f"has the shape {image.shape}; an image is (H, W, C), or (H, W) of one channel")
    kind = image.dtype.newbyteorder("=")
    if kind.name not in specs.IMAGE_DTYPES:
        raise LayoutError(f"has numbers of {kind.name}; {_CONVERT}")
    return np.ascontiguousarray(image.reshape(*image.shape[:2], -1), kind)


def of_npy(data: bytes) -> np.ndarray:
    """The array in the content of a .npy file, read-only; objects are never unpickled.

    Raises:
      ImageError: The file is damaged, or has objects.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        length = int.from_bytes(file.read(_LENGTHS_OF_HEADERS[version]), "little")
        # Limited as in NumPy, because a long expression could exhaust the stack.
        header: Any = ast.literal_eval(file.read(min(length, _LONGEST_HEADER)).decode("latin1"))
        dtype, shape, is_fortran = np.dtype(header["descr"]), tuple(header["shape"]), header["fortran_order"]
    # A damaged header can raise any exception.
    except Exception as error:
        raise ImageError("is a .npy that cannot be read (its header is damaged)") from error
    if not all(type(side) is int and side >= 0 for side in shape) or type(is_fortran) is not bool:
        raise ImageError("is a .npy that cannot be read (its header is damaged)")
    if dtype.hasobject:
        raise ImageError("is a .npy that cannot be read (it has Python objects, not numbers)")
    pixels = data[file.tell() :]
    # Compared before anything is allocated, because a header may state any size.
    if not dtype.itemsize or dtype.itemsize * math.prod(shape) != len(pixels):
        raise ImageError(
            f"is a .npy that cannot be read (its header has {dtype} of the shape {shape}, and {len(pixels):,} bytes "
            "follow)"
        )
    try:
        return np.ndarray(shape, dtype, pixels, order="F" if is_fortran else "C")
    # NumPy limits the number of axes, and sides even if another side is 0.
    except ValueError as error:
        raise ImageError(f"is a .npy that cannot be read (no array has the shape {shape})") from error


def to_npy(image: np.ndarray) -> bytes:
    """Content of a .npy file of an array."""
    file = io.BytesIO()
    np.save(file, image, allow_pickle=False)
    return file.getvalue()


def strange_values(image: np.ndarray) -> str | None:
    """Number of NaN or infinite values in an image (H, W, C), and place of the first; None if all are finite."""
    if image.dtype.kind != "f" or (is_finite := np.isfinite(image)).all():
        return None
    row, column, channel = np.argwhere(~is_finite)[0].tolist()
    number = int(is_finite.size - np.count_nonzero(is_finite))
    return f"{number:,} of {is_finite.size:,}, the first at row {row}, column {column}, channel {channel}"


def as_picture(image: np.ndarray) -> np.ndarray:
    """A picture, uint8 (H, W, 3), of an image (H, W, C) for viewing; 8-bit RGB is returned unchanged.

    The picture shows the first three bands, or the first band in grey if there are fewer. In each band, the 2nd
    percentile is black and the 98th white.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    bands = image[..., : 3 if image.shape[2] >= 3 else 1].astype(np.float32)
    step = max(int((bands.shape[0] * bands.shape[1] / _SAMPLED) ** 0.5), 1)
    low, high = np.percentile(bands[::step, ::step], (_DARK, _BRIGHT), axis=(0, 1))
    scaled = (bands - low) * (255 / np.maximum(high - low, np.finfo(np.float32).tiny))
    picture = np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture


# --------------------------------------------------------------------------------------------------------- statistics


class Moments(NamedTuple):
    """Number of pixels; and for each channel, the mean and the sum of squared deviations from it."""

    pixels: int
    of: tuple[tuple[float, float], ...]

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(mean for mean, _ in self.of)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviations; 1 for a constant channel, so that values can be divided by it."""
        return tuple(math.sqrt(squares / self.pixels) or 1.0 for _, squares in self.of)


def moments(image: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Mean of each channel of an image (H, W, C) and sum of squared deviations from it, in float64."""
    found = []
    for channel in np.moveaxis(image, 2, 0):
        if channel.dtype.kind == "u":
            # Exact integers. By rows, because np.bincount copies its input to 64 bits.
            rows = max(_SAMPLED * 16 // channel.shape[1], 1)
            counts = np.zeros(256**channel.itemsize, np.int64)
            for top in range(0, len(channel), rows):
                counts += np.bincount(channel[top : top + rows].ravel(), minlength=len(counts))
            occurring = [(value, int(counts[value])) for value in np.flatnonzero(counts).tolist()]
            total = sum(value * count for value, count in occurring)
            squares = sum(value * value * count for value, count in occurring)
            found.append((total / channel.size, (channel.size * squares - total * total) / channel.size))
        else:
            wide = channel.astype(np.float64)
            mean = float(wide.mean())
            found.append((mean, float(np.square(wide - mean).sum())))
    return tuple(found)


def merged(first: Moments, second: Moments) -> Moments:
    """Moments of the union of two sets of pixels (Chan, Golub and LeVeque, 1979)."""
    (n, ours), (m, theirs) = first, second
    both = n + m
    together = []
    for (mean, squares), (other_mean, other_squares) in zip(ours, theirs, strict=True):
        apart = other_mean - mean
        together.append((mean + apart * m / both, squares + other_squares + apart * apart * n * m / both))
    return Moments(both, tuple(together))
