"""Reads TIFF by its tags, in every layout of samples; raises an error if the tags do not explain the samples.

A TIFF may hold anything, such as reflectances, elevations or twelve bands. `decode` reads grey or RGB; `decode_bands`
reads all bands, unscaled.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from segjax.data import codec
from segjax.data.codec import ImageError, LayoutError
from segjax.runtime import reading

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

# Keeps tifffile's messages off the terminal; faults are raised as errors.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
# Values of the tag PhotometricInterpretation.
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_ALPHA = (1, 2)  # values of the tag ExtraSamples, associated and unassociated
# Values of the tag Compression: none, JPEG as TIFF 6.0 first defined it, JPEG, and two more values for JPEG in raw
# files.
_NONE, _OLD_JPEG, _JPEG = 1, 6, 7
_JPEGS = (_OLD_JPEG, _JPEG, 34892, 33007)
# Compressions whose decoders convert YCbCr to RGB.
_DECODED_TO_RGB = (_OLD_JPEG, _JPEG)
_ORIENTATION, _SUB_IFDS, _INK_SET = 274, 330, 332
_COPY_OR_MASK = 1 | 4  # bits of the tag NewSubfileType
# Tags of GeoTIFF: pixel scale, tie points, transformation, keys; and RPC coefficients.
_GEOTIFF = (33550, 33922, 34264, 34735, 50844)


class Layout(NamedTuple):
    """Storage of the pixels on the first page of a TIFF, by its tags.

    Attributes:
      size: Height and width in pixels.
      colours: Number of leading samples of a pixel that form its colour: 1, 3, or 4 for CMYK; 0 if unknown.
      why_unknown: Reason why the colours are unknown, or "".
      dtype: Dtype of a sample.
      is_plain: Whether every decoder reads the samples as values of grey or RGB, in whole bytes.
      orientation: Value of the tag Orientation, 1 to 8; 1 is upright.
      parts, missing: Number of strips or tiles, and of those that the file lacks.
      largest_part: Number of pixels that are decoded together: a strip or tile, or a row of an uncompressed strip.
      is_geotiff: Whether the file has tags of GeoTIFF.
    """

    size: tuple[int, int]
    colours: int
    why_unknown: str
    dtype: np.dtype | None
    is_plain: bool
    orientation: int
    parts: int
    missing: int
    largest_part: int
    is_geotiff: bool


def layout(path: Path) -> Layout:
    """Reads the layout of a TIFF from its tags only.

    Raises:
      ImageError: The tags are damaged, or the first page is not an image.
      UnreadableError: The path is not a regular file.
      OSError: The file cannot be opened.
    """
    with reading.open_regular(path) as opened, _reported(), _opened(opened) as file:
        page, length = file.pages.first, os.fstat(opened.fileno()).st_size
        _refuse_no_image(page, _has_more_pages(file))
        colours, why_unknown = 0, ""
        try:
            colours = _colours(page, _has_more_pages(file))
        except ImageError as error:
            why_unknown = str(error)
        is_whole = page.dtype is not None and page.dtype.kind in "uif" and 8 * page.dtype.itemsize == page.bitspersample
        photometric, compression = int(page.photometric), int(page.compression)
        has_colours = photometric in (_BLACK_IS_ZERO, _RGB) or (photometric == _YCBCR and compression == _JPEG)
        return Layout(
            (page.imagelength, page.imagewidth),
            colours,
            why_unknown,
            page.dtype,
            is_whole and has_colours and (compression == _JPEG or compression not in _JPEGS),
            _value(page, _ORIENTATION, 1),
            math.prod(page.chunked),
            _missing(page, length),
            page.imagewidth if compression == _NONE and not page.is_tiled else _pixels_of_part(page),
            any(tag in page.tags for tag in _GEOTIFF),
        )


def has_more_images(path: Path) -> bool:
    """Whether a TIFF has a further page that is neither a preview or reduced copy nor a mask of another page.

    Raises:
      ImageError: The file is damaged.
      UnreadableError: The path is not a regular file.
      OSError: The file cannot be opened.
    """
    with reading.open_regular(path) as opened, _reported(), _opened(opened) as file:
        pages = itertools.islice(file.pages, 1, None)
        return any(not int(page.aspage().subfiletype) & _COPY_OR_MASK for page in pages)


def _pixels_of_part(page: TiffPage) -> int:
    return math.prod(page.chunks) // (page.chunks[-1] if page.axes.endswith("S") else 1)


def _opened(file: BinaryIO) -> TiffFile:
    import tifffile

    # With a name, because files of `open_regular` have none.
    return tifffile.TiffFile(file, name="TIFF")


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Raises the many kinds of errors of tifffile and its codecs for damaged files as ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"is a TIFF that cannot be decoded ({reading.stated(error)})") from error


def _has_more_pages(file: TiffFile) -> bool:
    return bool(file.pages.first.tags.get(_SUB_IFDS)) or len(file.pages) > 1


def decode(data: bytes, *, max_pixels: int) -> tuple[np.ndarray, int | None]:
    """Decodes the first page of a TIFF, upright, to grey or RGB.

    Returns:
      Grey (H, W, 1) or RGB (H, W, 3), of any dtype, without alpha and other extra samples; and the value of white, or
      None if it is unknown: for values of 16 bits or more, signed values and floats.

    Raises:
      ImageError: The file is damaged, its bands are not known to be grey or RGB, or it has more than `max_pixels`
        pixels.
    """
    with _reported(), _opened(io.BytesIO(data)) as file:
        page = file.pages.first
        colours = _colours(page, _has_more_pages(file))
        _refuse_size(page, max_pixels)
        _refuse_damaged(page, data, max_pixels)
        image = _samples(page)[..., :colours]
        return _upright(*_as_grey_or_rgb(page, image), page)


def decode_bands(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Decodes the first page of a TIFF with all of its samples, upright: (H, W, C) of any dtype.

    Grey with 0 as white is inverted; palette, CMYK and YCbCr become RGB.

    Raises:
      ImageError: The file is damaged, has more than `max_pixels` pixels, or has several images.
    """
    with _reported(), _opened(io.BytesIO(data)) as file:
        page = file.pages.first
        _refuse_no_image(page, _has_more_pages(file))
        if (pages := _pages(file)) > 1:
            raise LayoutError(
                f"has {pages} pages, and the bands of an image are read from one; write them into one page"
            )
        is_converted = int(page.photometric) in (_PALETTE, _CMYK, _YCBCR)
        samples = _colours(page, _has_more_pages(file)) if is_converted else page.samplesperpixel
        _refuse_size(page, max_pixels)
        _refuse_damaged(page, data, max_pixels)
        image = _samples(page)[..., :samples]
        if is_converted or int(page.photometric) == _WHITE_IS_ZERO:
            image, _ = _as_grey_or_rgb(page, image)
        return _upright(image.astype(np.uint8) if image.dtype == bool else image, None, page)[0]


def decode_mask(data: bytes, *, max_pixels: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes the first page of a TIFF with one band, upright.

    Returns:
      The stored values (H, W), of any dtype; and the palette, uint8 (N, 3), or None without a palette of up to 8 bits.

    Raises:
      ImageError: The file is damaged, has more than `max_pixels` pixels, several bands, or several images.
    """
    with _reported(), _opened(io.BytesIO(data)) as file:
        page = file.pages.first
        _refuse_no_image(page, _has_more_pages(file))
        if (pages := _pages(file)) > 1:
            raise LayoutError(f"has {pages} pages")
        if page.samplesperpixel > 1:
            raise LayoutError(f"has {page.samplesperpixel} bands")
        if page.compression in _JPEGS:
            raise LayoutError("is compressed as JPEG, which blurs class ids")
        if int(page.photometric) == _WHITE_IS_ZERO:
            # Some readers invert such values, and some do not.
            raise LayoutError("has values of which 0 is white (tag PhotometricInterpretation)")
        _refuse_size(page, max_pixels)
        _refuse_damaged(page, data, max_pixels)
        has_palette = int(page.photometric) == _PALETTE and page.bitspersample <= 8
        return _upright(_samples(page)[..., 0], None, page)[0], _palette_of(page) if has_palette else None


def _pages(file: TiffFile) -> int:
    """Number of images; reduced copies and masks do not count."""
    return sum(not int(each.aspage().subfiletype) & _COPY_OR_MASK for each in file.pages)


def _samples(page: TiffPage) -> np.ndarray:
    """All samples of a page, (H, W, S)."""
    image = page.asarray()
    if page.axes.startswith("S"):
        image = np.moveaxis(image, 0, -1)
    return image.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)


def _refuse_no_image(page: TiffPage, has_more_pages: bool) -> None:
    if int(page.subfiletype) & 1 and has_more_pages:
        raise ImageError("has a preview as its first page, as in raw files of cameras; convert it to RGB")
    if page.imagedepth > 1:
        raise ImageError(f"is a volume of {page.imagedepth} slices, not an image")
    if not isinstance(page.bitspersample, int):
        raise ImageError(f"has samples of {page.bitspersample} bits; convert it to 8 bits a sample")


def _colours(page: TiffPage, has_more_pages: bool) -> int:
    """Number of leading samples of a pixel that form its colour: 1, 3, or 4 for CMYK; ImageError if it is unknown."""
    _refuse_no_image(page, has_more_pages)
    photometric, samples = int(page.photometric), page.samplesperpixel
    if photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
        bands = samples - sum(int(kind) in _ALPHA for kind in page.extrasamples)
        if bands == 1 or (bands == 3 and photometric == _BLACK_IS_ZERO):
            return bands
        raise ImageError(
            f"has {bands} bands, and its tags do not state which are red, green and blue, the 3 channels that the "
            "model takes; write these three as RGB, for example: gdal_translate -b 3 -b 2 -b 1 -colorinterp "
            "red,green,blue IN.tif OUT.tif"
        )
    needed = {_RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}.get(photometric)
    if needed is None:
        name = getattr(page.photometric, "name", photometric)
        raise ImageError(f"has colours of the kind {name} (tag PhotometricInterpretation); convert it to RGB")
    if samples < needed:
        raise ImageError(f"is damaged: {samples} samples per pixel, but its kind of colours needs {needed}")
    if photometric == _CMYK and (page.compression in _DECODED_TO_RGB or _value(page, _INK_SET, 1) != 1):
        raise ImageError("has inks as colours; convert it to RGB")
    if photometric == _YCBCR and page.compression not in _DECODED_TO_RGB and page.is_subsampled:
        raise ImageError("has YCbCr colours at a reduced resolution; convert it to RGB")
    return needed


def _value(page: TiffPage, number: int, default: int) -> int:
    tag = page.tags.get(number)
    return default if tag is None else tag.value


def _refuse_size(page: TiffPage, max_pixels: int) -> None:
    codec.refuse_size((page.imagelength, page.imagewidth), max_pixels)
    if page.is_tiled:
        codec.refuse_size((page.tilelength, page.tilewidth), max_pixels)
    # The limit allows four 8-bit samples per pixel. All samples are decoded and copied before extra ones are dropped.
    if page.nbytes > 4 * max_pixels:
        raise ImageError(
            f"has {page.samplesperpixel} samples of {page.bitspersample} bits per pixel, {page.nbytes:,} bytes; the "
            f"limit is {4 * max_pixels:,}; write fewer samples, or parts of the image"
        )


def _missing(page: TiffPage, size: int) -> int:
    """Number of strips or tiles that a file of `size` bytes lacks."""
    places = zip(page.dataoffsets, page.databytecounts, strict=False)
    there = sum(start > 0 and 0 < length <= size - start for start, length in places)
    return max(math.prod(page.chunked) - there, 0)


def _refuse_damaged(page: TiffPage, data: bytes, max_pixels: int) -> None:
    """Refuses missing strips and tiles, which tifffile fills with zeros, and damaged JPEG, which libjpeg completes."""
    if missing := _missing(page, len(data)):
        raise ImageError(f"is truncated: {missing} of its {math.prod(page.chunked)} strips or tiles are missing")
    if page.compression in _JPEGS:
        tables = (page.jpegtables or codec.JPEG + b"\xff\xd9")[:-2]
        for start, length in zip(page.dataoffsets, page.databytecounts, strict=False):
            segment = data[start : start + length]
            if page.compression == _OLD_JPEG and not segment.startswith(codec.JPEG):
                # Its tables are elsewhere in the file, and each writer stored them differently.
                raise ImageError("is JPEG of an obsolete kind (tag Compression 6); convert it, with magick for example")
            codec.refuse_size(codec.size_of(segment) or (0, 0), max_pixels)
            if fault := codec.damage(segment) or codec.damage_of_scan(tables + segment[2:]):
                raise ImageError(fault)


def _as_grey_or_rgb(page: TiffPage, image: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Converts the colours of a page to grey or RGB; also returns the value of white, as in `decode`."""
    from PIL import Image

    photometric, bits = int(page.photometric), page.bitspersample
    if photometric == _PALETTE:
        palette = _palette_of(page)
        if image.max() >= len(palette):
            raise ImageError("is damaged: its palette lacks colours that occur")
        return palette[image[..., 0].astype(np.intp)], 255
    if photometric == _CMYK or (photometric == _YCBCR and page.compression not in _DECODED_TO_RGB):
        if image.dtype != np.uint8 or bits != 8:
            raise ImageError(f"has CMYK or YCbCr colours of {bits} bits; convert it to RGB")
        mode = "CMYK" if photometric == _CMYK else "YCbCr"
        size = (page.imagewidth, page.imagelength)
        return np.asarray(Image.frombytes(mode, size, np.ascontiguousarray(image).tobytes()).convert("RGB")), 255
    if image.dtype == bool:
        image = image.astype(np.uint8)
    if image.dtype.kind != "u":
        if photometric == _WHITE_IS_ZERO:
            raise ImageError(f"has {image.dtype} values of which 0 is white; invert them")
        return image, None
    if photometric == _WHITE_IS_ZERO:
        image = np.asarray(2**bits - 1, image.dtype) - image
    # Values of 16 bits or more often have another scale; with fewer bits, the writer chose the full range.
    return image, 2**bits - 1 if bits < 16 else None


def _palette_of(page: TiffPage) -> np.ndarray:
    """RGB of each index, uint8 (N, 3)."""
    table = np.asarray(page.colormap)
    if table.ndim != 2 or len(table) != 3:
        raise ImageError("is damaged: its palette is not a table of red, green and blue")
    # The standard has 16 bits; some writers store 8.
    return (table >> 8 if table.max() > 255 else table).astype(np.uint8).T


def _upright(image: np.ndarray, white: int | None, page: TiffPage) -> tuple[np.ndarray, int | None]:
    orientation = _value(page, _ORIENTATION, 1)
    # From 5 on, rows and columns are swapped. Then rows, columns or both may be reversed.
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image), white
