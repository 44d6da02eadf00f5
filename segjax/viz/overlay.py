"""Predictions over their images or next to them, at the size of the images, with a legend below."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segjax.data import bands, specs
from segjax.viz import lettering
from segjax.viz.pictures import colourise

OPACITY = 0.55  # of the colours over the image
NARROWEST = 320  # pixels; a narrower picture gets white space at its right, for the legend
# The legend of a video has a fixed size. It lists all classes, or with more classes than this, the largest of a frame.
MOST_IN_VIDEO = 24


def over(image: np.ndarray, labels: np.ndarray, spec: specs.DatasetSpec, *, still: bool = True) -> np.ndarray:
    """The image under the colours of its labels: uint8 (H + legend, at least W, 3).

    Args:
      image: (H, W, C), as for `bands.as_picture`.
      labels: Train ids (H, W).
      spec: Dataset.
      still: Whether the legend has only the classes of the image. Otherwise, for the frames of a video, its height is
        fixed.
    """
    import cv2

    blended = cv2.addWeighted(bands.as_picture(image), 1 - OPACITY, colourise(labels, spec), OPACITY, 0)
    return _with_legend(blended, labels, spec, still)


def side_by_side(image: np.ndarray, labels: np.ndarray, spec: specs.DatasetSpec, *, still: bool = True) -> np.ndarray:
    """The image and the colours of its labels, side by side: uint8 (H + legend, at least 2W, 3)."""
    gap = np.full((len(image), max(image.shape[1] // 200, 2) * 2, 3), 255, np.uint8)
    return _with_legend(
        np.concatenate([bands.as_picture(image), gap, colourise(labels, spec)], axis=1), labels, spec, still
    )


def _with_legend(picture: np.ndarray, labels: np.ndarray, spec: specs.DatasetSpec, still: bool) -> np.ndarray:
    names = range(len(spec.label_names))
    if still or len(names) > MOST_IN_VIDEO:
        counts = np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
        classes = [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k]]
        shown = sorted(classes if still else classes[:MOST_IN_VIDEO])
    else:
        shown = names
    width = max(picture.shape[1], NARROWEST)
    legend = _legend(tuple(shown), spec, width, 0 if still else min(len(names), MOST_IN_VIDEO))
    missing = width - picture.shape[1]
    if missing:
        picture = np.pad(picture, ((0, 0), (0, missing), (0, 0)), constant_values=255)
    return np.concatenate([picture, legend])


@functools.lru_cache(maxsize=16)
def _legend(classes: Sequence[int], spec: specs.DatasetSpec, width: int, room: int) -> np.ndarray:
    """Colours and names in columns: uint8 (h, width, 3), with space for at least `room` classes."""
    from PIL import Image, ImageDraw

    size = min(max(width // 70, 13), 40)
    names = lettering.class_names(spec)
    fonts = [_font(lettering.font_of(name), size) for name in names]
    listed = classes if not room else range(len(names))
    patch, line, margin = size, round(1.6 * size), size // 2
    column = patch + margin + round(max((fonts[k].getlength(names[k]) for k in listed), default=0)) + 2 * margin
    columns = max((width - margin) // column, 1)
    rows = -(-max(len(classes), room) // columns)
    height = rows * line + 2 * margin
    # The height is even, as a video needs.
    drawn = Image.new("RGB", (width, height + height % 2), "white")
    draw = ImageDraw.Draw(drawn)
    for place, k in enumerate(classes):
        left, top = margin + place % columns * column, margin + place // columns * line
        middle = top + line // 2
        box = (left, middle - patch // 2, left + patch, middle + patch // 2)
        draw.rectangle(box, fill=spec.label_colors[k], outline="gray")
        draw.text((left + patch + margin, middle), names[k], fill="black", font=fonts[k], anchor="lm")
    return np.array(drawn)


@functools.cache
def _font(file: Path, size: int):
    from PIL import ImageFont

    return ImageFont.truetype(file, size)
