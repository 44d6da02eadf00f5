"""Decodes and encodes JPEG and PNG files, and tells damaged files and those that cannot serve as image or mask."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"  # what such a file begins with


def damage(data: bytes) -> str | None:
    """Why a file is not a complete PNG or JPEG; None if it is one. Some decoders fill a truncated file silently."""
    if not data:
        return "is empty"
    if data.startswith(PNG):
        if data[12:16] != b"IHDR":  # so that bytes 24 and 25 are bit depth and colour type
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
        # Searched from the scan on, because a thumbnail before it has an end marker of its own.
        return None if data.find(b"\xff\xd9", at) >= 0 else "is truncated"
    return f"begins with {data[:8]!r}"


def fault_of_image(data: bytes) -> str | None:
    """The reason, with its remedy, why a complete file cannot be used as an image; None if it can."""
    if data.startswith(PNG) and data[24] == 16:
        return "images of 16 bits a channel, whose scale to 8 bits is not known; save them with 8 bits"
    return None


def fault_of_turning(data: bytes) -> str | None:
    """The same for an image that EXIF rotates, because its mask may be aligned with either orientation."""
    import cv2

    if b"Exif\0\0" in data or b"eXIf" in data:
        turned, as_stored = (
            _decode(data, cv2.IMREAD_COLOR),
            _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION),
        )
        if turned is not None and as_stored is not None and not np.array_equal(turned, as_stored):
            return "images that EXIF rotates, so that their masks may have another orientation; save them upright"
    return None


def fault_of_mask(data: bytes) -> str | None:
    """The reason, with its remedy, why a complete file cannot be used as a mask of train ids; None if it can."""
    if not data.startswith(PNG):
        return "masks that are JPEG inside, which blurs class ids; export them as PNG from the original"
    depth, color_type = data[24], data[25]  # colour type 0 is grey, 3 palette
    if color_type == 3:
        return (
            "palette masks, which decode to colours instead of class ids; with Pillow and NumPy, "
            "Image.fromarray(np.array(Image.open(path))).save(path) keeps the ids"
        )
    if color_type != 0:
        return 'RGB or alpha masks; save one 8-bit grey channel that holds each colour\'s position in "colors"'
    if depth != 8:
        return "masks of other than 8 bits, whose values decoders stretch or cut; save class ids as 8-bit grey"
    return None


def fault_of_published_mask(data: bytes) -> str | None:
    """The same for masks from archives, which may also be palette images; the indices are the values."""
    if data.startswith(PNG) and (data[25] == 3 or (data[24], data[25]) == (8, 0)):
        return None
    return "masks that are no 8-bit grey or palette PNG, as published; fetch their archive again"


def decode_image(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3), RGB; None if it cannot be decoded."""
    import cv2

    bgr = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if bgr is None else cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def decode_upright(data: bytes) -> np.ndarray | None:
    """(H, W, 3), RGB, in the depth of the file and rotated as its EXIF demands; None if it cannot be decoded.

    Grey is repeated, alpha is dropped, a palette becomes its colours; of several images in a file this is the first.
    """
    import cv2

    bgr = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    return None if bgr is None else np.ascontiguousarray(bgr[..., ::-1])


def decode_mask(data: bytes) -> np.ndarray | None:
    """uint8 (H, W), the stored values; the indices of a palette PNG; None if it cannot be decoded."""
    import cv2

    if data.startswith(PNG) and data[25:26] == b"\3":
        return _decode_palette(data)
    return _decode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION)


def encode_mask(labels: np.ndarray) -> bytes:
    """An 8-bit grey PNG of uint8 (H, W)."""
    import cv2

    return cv2.imencode(".png", labels)[1].tobytes()


def encode_palette(labels: np.ndarray, palette: np.ndarray) -> bytes:
    """An 8-bit palette PNG of uint8 (H, W) labels, which become its indices; palette: RGB, uint8 (256, 3)."""
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
    except cv2.error:  # raised for sizes beyond OpenCV's limits; other faults give None
        return None


def _decode_palette(data: bytes) -> np.ndarray | None:
    # With Pillow, because OpenCV gives the colours of a palette PNG.
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
