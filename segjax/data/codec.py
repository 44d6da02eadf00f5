"""Decodes and encodes image files, and finds files that are damaged or cannot be used as an image or a mask."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from segjax.runtime import native_messages, reading

if TYPE_CHECKING:
    from PIL.Image import Image

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"  # first bytes of such files
# Default limit of the pixels of an image: half a GiB as RGB. Pillow has the same limit.
MAX_PIXELS = 2**29 // 3
# Remedy for larger images, for commands that have this option.
HIGHER_LIMIT = "; to decode it, raise the limit: --max-pixels, or max_pixels in Python"
# Formats that Pillow decodes. OpenCV decodes PNG and JPEG, in half of Pillow's time.
BY_PILLOW = ("GIF", "WebP", "BMP")
# Markers of JPEG's frame headers, which hold the size; C4, C8 and CC mark other segments.
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# libjpeg's warnings about pixels that it made up.
_MADE_UP = ("Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression")
# libpng's warning about more pixels than an image of the stated size has.
_LEFT_OVER = "Too much image data"
# PIL's modes with alpha -> the mode in which colours are not multiplied by alpha.
_PIL_ALPHA = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}


class ImageError(ValueError):
    """An image that cannot be used; the message does not name the file."""


class LayoutError(ImageError):
    """An undamaged image whose shape or dtype cannot be used."""


class TooManyPixelsError(ImageError):
    """An image with more pixels than are decoded."""


# ------------------------------------------------------------------------------------------------------------- headers


def format_of(head: bytes) -> str | None:
    """Format by the first 32 bytes of a file: "PNG", "JPEG", "TIFF", "WebP", "BMP", "GIF", "NPY" or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if head.startswith(b"\x93NUMPY"):
        return "NPY"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    # A text could also begin with "BM"; bytes 14 to 17 are the size of the second header.
    if head.startswith(b"BM") and head[14:18] in (bytes([size, 0, 0, 0]) for size in (12, 40, 52, 56, 64, 108, 124)):
        return "BMP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "PNG" if head.startswith(PNG) else None


def size_of(data: bytes) -> tuple[int, int] | None:
    """(height, width) in the header of a PNG, JPEG, WebP, BMP or GIF; None if there is none."""
    try:
        match format_of(data[:32]):
            case "PNG":
                width, height = struct.unpack_from(">II", data, 16)
            case "GIF":
                width, height = struct.unpack_from("<HH", data, 6)
            case "BMP" if data[14] == 12:
                width, height = struct.unpack_from("<HH", data, 18)
            case "BMP":
                # A negative height means rows from top to bottom.
                width, height = map(abs, struct.unpack_from("<ii", data, 18))
            case "WebP":
                return _size_of_webp(data)
            case "JPEG":
                return _size_of_jpeg(data)
            case _:
                return None
    except struct.error:
        return None
    return height, width


def _size_of_webp(data: bytes) -> tuple[int, int] | None:
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if data[12:16] == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return None


def _size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    at = len(JPEG)  # segments: 2 bytes marker, 2 bytes length that counts itself, content
    while at + 4 <= len(data) and data[at : at + 2] != b"\xff\xda":
        if data[at] == 0xFF and data[at + 1] in _FRAMES:
            return struct.unpack_from(">HH", data, at + 5)
        at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def refuse_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raises ImageError if a size (height, width) is empty, TooManyPixelsError above `max_pixels` pixels."""
    if size[0] * size[1] > max_pixels:
        raise TooManyPixelsError(
            f"has {size[0]}x{size[1]} pixels, {size[0] * size[1]:,}, more than {max_pixels:,}{HIGHER_LIMIT}"
        )
    if 0 in size:
        raise ImageError(f"has {size[0]}x{size[1]} pixels")


def is_grey(data: bytes) -> bool:
    """Whether a file is a PNG or JPEG with one colour channel, by its header."""
    if data.startswith(PNG):
        # Colour types grey, and grey with alpha.
        return data[25] in (0, 4)
    if not data.startswith(JPEG):
        return False
    at = len(JPEG)  # segments as in `_size_of_jpeg`; the number of components follows the size
    while at + 10 <= len(data) and data[at : at + 2] != b"\xff\xda":
        if data[at] == 0xFF and data[at + 1] in _FRAMES:
            return data[at + 9] == 1
        at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
    return False


# -------------------------------------------------------------------------------------------------------------- damage


def damage(data: bytes) -> str | None:
    """Reason why a file is not a complete image; None if it is. Needed because decoders fill truncated images.

    Not for TIFF and .npy, whose decoders in `bands` find damage themselves.
    """
    if not data:
        return "is empty"
    if data.startswith(PNG):
        if data[12:16] != b"IHDR":  # other functions read bit depth and colour type at bytes 24 and 25
            return "has no PNG header"
        at = len(PNG)  # chunks: 4 bytes length, 4 bytes type, content, 4 bytes CRC of type and content
        while at + 12 <= len(data):
            end = at + 12 + struct.unpack_from(">I", data, at)[0]
            if end > len(data):
                break
            if zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
                return f"is damaged at byte {at}"
            if data[at + 4 : at + 8] == b"IEND":
                return None
            at = end
        return "is truncated"
    if data.startswith(JPEG):
        at = len(JPEG)  # segments: 2 bytes marker, 2 bytes length that counts itself, content
        while at + 4 <= len(data) and data[at : at + 2] != b"\xff\xda":
            at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]  # 0xFF may be repeated
        # Searched from the scan on, because an earlier thumbnail has its own end marker.
        return None if data.find(b"\xff\xd9", at) >= 0 else "is truncated"
    if format_of(data[:32]) in BY_PILLOW:
        # `fault_of_image` reports an image that is too large.
        if _fault_of_size(data, "images") is None:
            try:
                decode_by_pillow(data)
            except ImageError as error:
                return str(error)
        return None
    return f"begins with {data[:8]!r}"


def damage_of_scan(data: bytes) -> str | None:
    """Reason why pixels of a complete JPEG are damaged, so that libjpeg makes them up; None if they are not."""
    import cv2

    _, messages = native_messages.captured(lambda: _decode(data, cv2.IMREAD_COLOR))
    return made_up(messages)


def made_up(messages: list[str]) -> str | None:
    """Fault of a JPEG or PNG according to the messages of libjpeg or libpng; None if there is none."""
    if any(_LEFT_OVER in line for line in messages):
        return "is damaged: it has more pixels than the size in its header"
    faults = [line for line in messages if line.startswith(_MADE_UP) and "bad ICC" not in line]
    return f"is damaged, and part of its pixels would be made up ({faults[0]})" if faults else None


def fault_of_image(data: bytes) -> str | None:
    """Reason and remedy if a complete file cannot be used as an image; None if it can."""
    if fault := _fault_of_size(data, "images"):
        return fault
    if format_of(data[:32]) in BY_PILLOW and getattr(decode_by_pillow(data), "n_frames", 1) > 1:
        return "GIF or WebP animations, of which a mask labels only one image; save that image as PNG"
    return None


def _fault_of_size(data: bytes, what: str) -> str | None:
    """Fault of a header with more than `MAX_PIXELS` pixels; None if it has fewer."""
    height, width = size_of(data) or (0, 0)
    return f"{what} of more than {MAX_PIXELS:,} pixels; cut them up" if height * width > MAX_PIXELS else None


def fault_of_mask(data: bytes, *, wide: bool, binary: bool) -> str | None:
    """Reason and remedy if a complete file cannot be used as a mask; None if it can.

    `bands.decode_mask` checks TIFF and .npy.

    Args:
      data: Content of the file.
      wide: Whether the labels of the data set have 16 bits.
      binary: Whether the labels are 0 and 1.
    """
    found = format_of(data[:32])
    if found in ("TIFF", "NPY"):
        return None
    if found == "GIF":
        return "masks that are GIF inside, whose palette may be in another order; export them as PNG"
    if found not in ("PNG", "BMP"):
        return f"masks that are {found} inside, which blurs class ids; export them as PNG from the original"
    if found == "PNG":
        depth, color_type = data[24], data[25]  # colour type 0 is grey, 3 palette
        if depth == 16 and color_type != 0:
            return "RGB or alpha masks of 16 bits per channel; save them with 8"
        if depth == 16 and not wide:
            return "16-bit masks, although the ids of these classes fit into 8 bits; save them as 8-bit grey"
        if color_type == 0 and (depth in (2, 4) or (depth == 1 and not binary)):
            return "masks of fewer than 8 bits, whose values decoders stretch; save class ids as 8-bit grey"
    return _fault_of_size(data, "masks")


def fault_of_published_mask(data: bytes) -> str | None:
    """`fault_of_mask` for published archives: masks are 8-bit grey, or palette images whose indices are the values."""
    if data.startswith(PNG) and (data[25] == 3 or (data[24], data[25]) == (8, 0)):
        return _fault_of_size(data, "masks")
    return "masks that are not 8-bit grey or palette PNG, as published; fetch their archive again"


# ------------------------------------------------------------------------------------------------ decoding, encoding


def decode_image(data: bytes) -> np.ndarray | None:
    """Decodes a PNG or JPEG to RGB, uint8 (H, W, 3), as it is stored; None if it cannot be decoded.

    For prepared data sets, whose files were checked: pixels that libjpeg makes up in a damaged JPEG are not reported.
    """
    import cv2

    with native_messages.silenced():
        return _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def decode_undamaged(data: bytes, *, upright: bool = False) -> np.ndarray | None:
    """Decodes an image of any format except TIFF and .npy to RGB (H, W, 3), uint8, or uint16 for a 16-bit PNG.

    Args:
      data: Content of the file.
      upright: Whether to rotate the image according to its EXIF data.

    Returns:
      The image; None if it cannot be decoded.

    Raises:
      ImageError: Pixels are damaged and would be made up, or Pillow cannot decode the image.
    """
    import cv2

    if format_of(data[:32]) in BY_PILLOW:
        image = decode_by_pillow(data)
        array = as_grey_or_rgb(_turned(image) if upright else image)
        return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    image, messages = native_messages.captured(lambda: _decode(data, flags))
    if fault := made_up(messages):
        raise ImageError(fault)
    return image


def has_exif(data: bytes) -> bool:
    """Whether an image file may have EXIF data, and so an orientation."""
    return any(mark in data for mark in (b"Exif\0\0", b"eXIf", b"EXIF"))


def decode_upright(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int | None]:
    """Decodes the first image of a file of any format except TIFF and .npy, rotated according to its EXIF data.

    Returns:
      Grey (H, W) or RGB (H, W, 3), uint8, or uint16 for a 16-bit PNG; alpha is dropped, and a palette is replaced by
      its colours. And the value of white; None if it is not known.

    Raises:
      ImageError: The file is not an image, is damaged, or has more than `max_pixels` pixels.
    """
    found = format_of(data[:32])
    if not data:
        raise ImageError("is empty")
    if found in (None, "TIFF", "NPY"):
        raise ImageError(f"is not an image that can be decoded; it begins with {data[:8]!r}")
    if found not in ("PNG", "JPEG"):
        return as_grey_or_rgb(_turned(decode_by_pillow(data, max_pixels=max_pixels))), 255
    if fault := damage(data):
        raise ImageError(fault)
    if (size := size_of(data)) is None:
        raise ImageError(f"is damaged: a {found} without a size")
    # A 16-bit pixel takes the memory of two.
    refuse_size(size, max_pixels // 2 if found == "PNG" and data[24:25] == b"\x10" else max_pixels)
    import cv2

    image, messages = native_messages.captured(lambda: _decode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH))
    if fault := made_up(messages):
        raise ImageError(fault)
    if image is None:
        raise ImageError(f"is a damaged {found}{f' ({messages[-1]})' if messages else ''}")
    return image, None if image.dtype == np.uint16 else 255


def decode_by_pillow(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decodes the first image of a WebP, BMP, GIF or PNG; unlike OpenCV, Pillow makes up no pixels.

    Raises:
      ImageError: The file is damaged, or has more than `max_pixels` pixels.
    """
    from PIL import BmpImagePlugin, GifImagePlugin, PngImagePlugin, WebPImagePlugin

    # By class, because Image.open has its own limit of pixels.
    opened = {
        "WebP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "PNG": PngImagePlugin.PngImageFile,
    }
    found = format_of(data[:32])
    if (size := size_of(data)) is None:
        raise ImageError(f"is damaged: a {found} without a size")
    refuse_size(size, max_pixels)
    try:
        image = opened[found or ""](io.BytesIO(data))
        image.load()
    # Pillow's decoders raise many kinds of errors for damaged files.
    except Exception as error:
        raise ImageError(f"is a damaged {found} ({reading.stated(error)})") from error
    return image


def _turned(image: Image) -> Image:
    """An image rotated according to its EXIF data; unchanged if these are damaged."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    # Pillow raises many kinds of errors for damaged EXIF data, which OpenCV ignores.
    except Exception:
        return image


def as_grey_or_rgb(image: Image) -> np.ndarray:
    """The array of a PIL image, (H, W) or (H, W, 3), uint8; uint16 for mode "I;16", int32 for "I", float32 for "F".

    Alpha is dropped, so that transparent colours show; colours that were multiplied by alpha are restored.

    Raises:
      ImageError: The mode has no conversion to RGB.
    """
    mode = image.mode
    if mode in ("L", "RGB", "I", "F") or mode.startswith("I;16"):
        return np.asarray(image)
    try:
        if mode in _PIL_ALPHA:
            image = image.convert(_PIL_ALPHA[mode])
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise ImageError(f"has PIL's mode {mode!r} ({error}); convert it to 'RGB'") from None


def decode_mask(data: bytes) -> np.ndarray | None:
    """Values of a grey PNG of 8 or 16 bits, or indices of a palette PNG, (H, W); None if it cannot be decoded."""
    import cv2

    if data.startswith(PNG) and data[25:26] == b"\3":
        return _decode_palette(data)
    with native_messages.silenced():
        return _decode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION)


class StoredMask(NamedTuple):
    """A mask as it is in its file.

    Attributes:
      values: Grey values or palette indices, uint8 or uint16 (H, W); or RGB colours, uint8 (H, W, 3).
      palette: RGB of each index, uint8 (N, 3); None for a mask without indices.
    """

    values: np.ndarray
    palette: np.ndarray | None


def decode_stored_mask(data: bytes) -> StoredMask | None:
    """Decodes a PNG or BMP without `fault_of_mask`; None if it cannot be decoded. A 1-bit mask has values 0 and 1.

    Alpha is dropped. A palette is dropped if each used colour is the grey of its index.

    Raises:
      ImageError: The file is damaged, with a known reason.
    """
    if data.startswith(PNG) and data[25] == 0:
        mask = decode_mask(data)
        return mask if mask is None else StoredMask(mask // 255 if data[24] == 1 else mask, None)
    image = decode_by_pillow(data)
    if image.mode == "P":
        return of_indices(np.asarray(image), np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3))
    if image.mode == "1":
        return StoredMask(np.asarray(image).astype(np.uint8), None)
    if image.mode in ("L", "LA"):
        return StoredMask(np.asarray(image.getchannel(0)), None)
    return StoredMask(np.asarray(image.convert("RGB")), None)


def of_indices(indices: np.ndarray, palette: np.ndarray) -> StoredMask:
    """A mask of indices (H, W) with their RGB, uint8 (N, 3). Raises ImageError for indices of N or more."""
    if indices.max() >= len(palette):
        raise ImageError("is damaged: its palette lacks colours that occur")
    used = np.unique(indices)
    return StoredMask(indices, None if np.all(palette[used] == used[:, None]) else palette)


def encode_mask(labels: np.ndarray) -> bytes:
    """Encodes labels, uint8 or uint16 (H, W), as a grey PNG of 8 or 16 bits."""
    import cv2

    return cv2.imencode(".png", labels)[1].tobytes()


def encode_image(image: np.ndarray) -> bytes:
    """Encodes RGB, uint8 (H, W, 3), as PNG."""
    import cv2

    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def encode_palette(labels: np.ndarray, palette: np.ndarray) -> bytes:
    """Encodes labels, uint8 (H, W), as the indices of an 8-bit palette PNG; palette: RGB, uint8 (256, 3)."""
    from PIL import Image

    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    import cv2

    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # for sizes beyond OpenCV's limits; other faults give None
        return None


def _decode_palette(data: bytes) -> np.ndarray | None:
    # Pillow, because OpenCV returns the colours of a palette PNG, not its indices.
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
