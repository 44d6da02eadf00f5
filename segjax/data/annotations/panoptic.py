"""Draws the masks of COCO's panoptic segmentation: a PNG per image, in which R + 256 G + 65,536 B is the segment id.

Pixels of id 0 are not annotated and get the ignore value.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np

from segjax.data import codec
from segjax.data.annotations.found import IGNORED, Drawn, Files
from segjax.data.annotations.rasterise import NO_PIXEL


def draw(files: Files, mask: str, segments: Mapping[int, int], place: str, size: tuple[int, int]) -> Drawn:
    """Draws the labels of an image of size (height, width).

    Args:
      files: Files of the source.
      mask: Path of the image's PNG.
      segments: Segment id -> class id or IGNORED.
      place: Place of the annotation, for messages.
      size: (height, width) of the image in pixels.

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
