"""Images of every usual kind as uint8 RGB arrays: NumPy arrays, PIL images, files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from segjax.data import codec

# An array, the path of a file, or a PIL image, hence Any: PIL is not imported.
Image = np.ndarray | str | os.PathLike[str] | Any
# A 16-bit image that is nowhere as bright as this looks black: it holds 12 bits or fewer.
DARKEST_16_BIT = 2**12
# PIL's modes with alpha: first to the mode in which colours are not multiplied by it, then without it.
_PIL_ALPHA = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}


def as_rgb(image: Image) -> np.ndarray:
    """uint8 (H, W, 3) of an image; one that is that already is returned itself.

    Args:
      image: an array, uint8 or uint16: (H, W, 3); grey, (H, W) or (H, W, 1), which is repeated; or (H, W, 4), whose
        alpha is dropped, so that hidden colours show. uint16 is rounded to 8 bits, 65535 to 255. Or a PIL image of any
        mode except "I" and "F", which PIL converts; its EXIF orientation is not applied. Or the path of an image file,
        which is decoded upright.

    Raises:
      ValueError: any other image, or 16 bits of which only 12 are used. OSError: a file that cannot be opened.
    """
    if isinstance(image, str | os.PathLike):
        path = Path(image).expanduser()
        try:
            return read_image(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if hasattr(image, "mode") and hasattr(image, "convert"):
        image = _array_of_pil(image)
    return _array_as_rgb(np.asarray(image))


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3), upright. Raises ValueError for a file that is no image or damaged, or has numbers that `as_rgb`
    refuses; the message does not name the file."""
    data = path.read_bytes()
    if not data:
        raise ValueError("is empty")
    if data.startswith((codec.PNG, codec.JPEG)) and (fault := codec.damage(data)):
        raise ValueError(fault)
    image = codec.decode_upright(data)
    if image is None:
        raise ValueError(f"is no image that can be decoded; it begins with {data[:8]!r}")
    return _array_as_rgb(image)


def _array_as_rgb(image: np.ndarray) -> np.ndarray:
    channels = image.shape[2] if image.ndim == 3 else 1
    is_16_bit = image.dtype.kind == "u" and image.dtype.itemsize == 2
    problems = []
    if image.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in image.shape:
        problems.append(f"its shape is {image.shape}; an image is (H, W, 3), or grey (H, W), or RGBA (H, W, 4)")
    if image.dtype != np.uint8 and not is_16_bit:
        problems.append(f"its numbers are {image.dtype}; convert them to uint8, 0 to 255")
    elif is_16_bit and image.size and 0 < (brightest := int(image.max())) < DARKEST_16_BIT:
        problems.append(
            f"its brightest value is {brightest} of 65535, black to the model; if fewer bits are used, scale them up"
        )
    if problems:
        raise ValueError(f"an image that cannot be used: {'; '.join(problems)}")
    if is_16_bit:
        # A table: to compute with wider numbers would take four times the memory of the image.
        image = ((np.arange(2**16) + 128) // 257).astype(np.uint8)[image]
    if channels == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image[..., :3]


def _array_of_pil(image) -> np.ndarray:
    """Grey, RGB or RGBA, 8 or 16 bits, of a PIL image. PIL itself is not imported."""
    mode = image.mode
    if mode in ("I", "F"):
        raise ValueError(
            f"an image that cannot be used: PIL's mode {mode!r} has no brightest value; scale it to 0..255 and convert "
            "it to 'L' or 'RGB'"
        )
    if mode in ("L", "RGB", "RGBA", "RGBX") or mode.startswith("I;16"):
        return np.asarray(image)
    try:
        if mode in _PIL_ALPHA:
            image = image.convert(_PIL_ALPHA[mode])
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"an image that cannot be used: PIL's mode {mode!r} ({error}); convert it to 'RGB'") from None
