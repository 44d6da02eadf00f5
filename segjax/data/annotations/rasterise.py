"""Rasterises regions as class ids, by COCO's rule (pycocotools), for every format.

A pixel belongs to a polygon if the polygon covers its centre, which pycocotools computes in fifths of a pixel: a
rectangle with corners (2, 3) and (5, 7) has the 3 x 4 pixels between them. The parts of an object are united. Where
objects overlap, the smaller one is on top; of two with equally many pixels, the later one. Ignored regions lie below
all objects.
"""

from __future__ import annotations

import base64
import binascii
import collections
import re
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from segjax.data import codec
from segjax.data.annotations.found import IGNORED, Drawn
from segjax.data.sources import DataError

# Maximum length of an outline in pixels; such an outline takes 250 MB to rasterise.
_MOST_LENGTH = 1 << 21
# Digits of a run in COCO's compressed format, each offset by "0". All digits but the last have bit 5 set. Six digits
# are enough for any image.
_COMPRESSED = re.compile(r"(?:[P-o]{0,5}[0-O])+")

NO_PIXEL = "objects that cover no pixel"
OUTSIDE = "objects outside their image"
CLIPPED = "objects that reach more than a pixel beyond their image, which are clipped"
NO_AREA = "outlines with fewer than three corners, or an incomplete one"
TOO_LONG = f"outlines longer than {_MOST_LENGTH:,} pixels, which no object has"
BAD_RUNS = "run-length encodings that are damaged, or of another size than their image"
BAD_MASK = "masks inside annotations that are damaged, or do not fit their image"


class Outline(NamedTuple):
    """Polygons, the parts of an object.

    Attributes:
      corners: Coordinates x0, y0, x1, y1, ... of each polygon; the origin is the upper left corner of the image.
      is_relative: Whether the coordinates are fractions of the image's width and height instead of pixels.
    """

    corners: Sequence[Sequence[float]]
    is_relative: bool = False


class Runs(NamedTuple):
    """COCO's run-length encoding of a mask (height, width), column by column: lengths, or compressed text."""

    counts: Sequence[int] | str
    size: tuple[int, int]


class Bitmap(NamedTuple):
    """A PNG in base64, placed at (left, top); its non-zero pixels are the object."""

    png: str
    left: int
    top: int


class Region(NamedTuple):
    """An annotation: its class id or IGNORED, its shape, and its place in a file, for messages."""

    label: int
    shape: Outline | Runs | Bitmap
    place: str


class _UnusableError(ValueError):
    """A region that cannot be drawn; the message is the reason."""


def pycocotools() -> ModuleType:
    """Imports pycocotools' masks. Raises DataError, with the command that installs it, if it is missing."""
    try:
        from pycocotools import mask
    except ModuleNotFoundError:
        raise DataError("polygons need pycocotools: pip install 'segjax[import]'") from None
    return mask


def draw(regions: Sequence[Region], size: tuple[int, int]) -> Drawn:
    """Draws regions on an image of size (height, width); all other pixels are background."""
    masks = pycocotools()
    objects: collections.Counter[int] = collections.Counter()
    skipped: list[tuple[str, str]] = []
    drawn: list[tuple[bool, int, int, np.ndarray]] = []
    for region in regions:
        try:
            runs, is_clipped = _runs(masks, region.shape, size)
        except _UnusableError as error:
            skipped.append((str(error), region.place))
            continue
        if not (area := int(runs[1::2].sum())):
            skipped.append((NO_PIXEL, region.place))
            continue
        if is_clipped:
            skipped.append((CLIPPED, region.place))
        if region.label != IGNORED:
            objects[region.label] += 1
        drawn.append((region.label != IGNORED, -area, region.label, runs))
    columns = np.zeros(size[0] * size[1], np.uint16)
    # The sort is stable: the later one of two equal areas comes last.
    for _, _, label, runs in sorted(drawn, key=lambda entry: entry[:2]):
        ends = np.cumsum(runs).tolist()
        for start, end in zip(ends[0::2], ends[1::2], strict=False):
            columns[start:end] = label
    return Drawn(np.ascontiguousarray(columns.reshape(size[::-1]).T), objects, skipped)


def _runs(masks: ModuleType, shape: Outline | Runs | Bitmap, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    """Run lengths of a region, int64, and whether the image clips it.

    The lengths alternate between outside and inside, column by column.
    """
    if isinstance(shape, Runs):
        return _of_runs(shape, size), False
    if isinstance(shape, Bitmap):
        return _of_bitmap(shape, size)
    return _of_outline(masks, shape, size)


def _of_outline(masks: ModuleType, shape: Outline, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    height, width = size
    # pycocotools reads four numbers as a box, and does not refuse fewer than three corners.
    if any(len(corners) < 6 or len(corners) % 2 for corners in shape.corners) or not shape.corners:
        raise _UnusableError(NO_AREA)
    polygons = [np.asarray(corners, np.float64).reshape(-1, 2) for corners in shape.corners]
    if shape.is_relative:
        polygons = [polygon * (width, height) for polygon in polygons]
    every = np.concatenate(polygons)
    (left, top), (right, bottom) = every.min(0), every.max(0)
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise _UnusableError(OUTSIDE)
    # pycocotools keeps each step along an outline in memory, and counts in 32 bits.
    steps = [np.abs(polygon - np.roll(polygon, 1, axis=0)).max(1).sum() for polygon in polygons]
    if not sum(steps) <= _MOST_LENGTH:
        raise _UnusableError(TOO_LONG)
    merged = masks.merge(masks.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width))
    return _decompressed(merged["counts"]), left < -1 or top < -1 or right > width + 1 or bottom > height + 1


def _of_runs(shape: Runs, size: tuple[int, int]) -> np.ndarray:
    # Without pycocotools, which reads and writes outside its arrays if runs are damaged.
    if isinstance(shape.counts, str):
        if not _COMPRESSED.fullmatch(shape.counts):
            raise _UnusableError(BAD_RUNS)
        counts = _decompressed(shape.counts.encode())
    elif max(map(abs, shape.counts), default=0) > size[0] * size[1]:
        raise _UnusableError(BAD_RUNS)
    else:
        counts = np.array(shape.counts, np.int64)
    if shape.size != size or (counts < 0).any() or counts.sum() != size[0] * size[1]:
        raise _UnusableError(BAD_RUNS)
    return counts


def _decompressed(data: bytes) -> np.ndarray:
    """Run lengths, int64, of COCO's compressed format.

    A digit has five bits. The lowest digit of a number comes first; the highest bit of the last one is the sign. From
    the fourth number on, each is the difference to the length two places before.
    """
    digits = np.frombuffer(data, np.uint8).astype(np.int64) - ord("0")
    last = np.flatnonzero(digits & 32 == 0)
    first = np.append(0, last[:-1] + 1)
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    counts = np.add.reduceat((digits & 31) << 5 * place, first)
    counts -= np.where(digits[last] & 16, 1 << 5 * (last - first + 1), 0)
    for start in (1, 2):
        counts[start::2] = np.cumsum(counts[start::2])
    return counts


def _of_bitmap(shape: Bitmap, size: tuple[int, int]) -> tuple[np.ndarray, bool]:
    try:
        data = base64.b64decode(shape.png, validate=True)
    except (binascii.Error, ValueError):
        raise _UnusableError(BAD_MASK) from None
    # A much larger mask is a decompression bomb, or belongs to another image.
    found = codec.size_of(data) if codec.format_of(data[:32]) == "PNG" and not codec.damage(data) else None
    if found is None or found[0] > 2 * size[0] + 2 or found[1] > 2 * size[1] + 2:
        raise _UnusableError(BAD_MASK)
    mask = codec.decode_mask(data)
    if mask is None or mask.ndim != 2:
        raise _UnusableError(BAD_MASK)
    (height, width), (top, left) = size, (shape.top, shape.left)
    if left >= width or top >= height or left + mask.shape[1] <= 0 or top + mask.shape[0] <= 0:
        raise _UnusableError(OUTSIDE)
    part = mask[max(-top, 0) : height - top, max(-left, 0) : width - left]
    top, left = max(top, 0), max(left, 0)
    whole = np.zeros(size, bool)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part != 0
    changes = np.flatnonzero(np.diff(whole.T.ravel(), prepend=False, append=False))
    # As for outlines, one pixel outside the image is allowed.
    is_clipped = mask.shape[0] - part.shape[0] > 1 or mask.shape[1] - part.shape[1] > 1
    return np.diff(changes, prepend=0, append=height * width), is_clipped
