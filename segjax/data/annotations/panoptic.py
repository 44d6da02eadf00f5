"""The masks of COCO's panoptic segmentation: a PNG for each image, whose colours R + 256 G + 65,536 B are segment ids.

Id 0, which has no segment, is not annotated and becomes the ignore value.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np

from segjax.data import codec
from segjax.data.annotations.found import IGNORED, Drawn, Files
from segjax.data.annotations.rasterise import NO_PIXEL


def draw(files: Files, mask: str, segments: Mapping[int, int], place: str, size: tuple[int, int]) -> Drawn:
    """The labels of an image of (height, width).

    Args:
      mask: Path of its PNG.
      segments: Id -> class id or IGNORED.
      place: Of the annotation, for messages.

    Raises:
      ImageError: The PNG cannot be read, has another size, or has an id that is not in `segments`.
    """
    pixels = codec.decode_image(files.png(mask))
    if pixels is None or pixels.shape != (*size, 3):
        raise codec.ImageError(f"its mask {mask} does not decode, or has another size than its image")
    colors = pixels.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)
    found, places = np.unique(colors, return_inverse=True)
    ids, labels = found.tolist(), {0: IGNORED, **segments}
    if unknown := [number for number in ids if number not in labels]:
        raise codec.ImageError(f"its mask {mask} has the segment {unknown[0]}, which {place} does not list")
    objects = collections.Counter(labels[number] for number in ids if labels[number] != IGNORED)
    skipped = [(NO_PIXEL, f"{place}: segment {number}") for number in sorted(segments.keys() - set(ids))]
    return Drawn(np.array([labels[number] for number in ids], np.uint16)[places].reshape(size), objects, skipped)
