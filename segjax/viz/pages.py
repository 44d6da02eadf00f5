"""HTML pages that need no server and nothing next to them: their style, their data and their pictures."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from segjax.runtime import console

LONGEST_NAME = 100  # columns of a name on a page


def fill(template: str, data: Any) -> str:
    """The text of a page.

    Args:
      template: File name of a page in this folder. @DATA@ in it is replaced by the data, @STYLE@ by the style sheet of
        report.html and @HELPERS@ by the helpers of its script, so that all pages look alike.
      data: Content of the page, in terms of JSON.
    """
    folder = Path(__file__).parent
    page, report = (folder.joinpath(name).read_text(encoding="utf-8") for name in (template, "report.html"))
    # Only `<` could end the script element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = page.replace("@STYLE@", _between(report, "<style>\n", "</style>"))
    page = page.replace("@HELPERS@", _between(report, '"use strict";\n', "// Classes."))
    return page.replace("@DATA@", text)


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]


def name(name: str) -> str:
    """The name of a class or an image as a page shows it; JSON and CSV have the original name."""
    return console.one_line(name, most=LONGEST_NAME)


def size_on_page(size: tuple[int, ...], largest: int) -> tuple[int, int]:
    """Width and height of a picture whose sides are at most `largest` pixels, from height and width."""
    factor = min(1, largest / max(size))
    height, width = (max(1, round(side * factor)) for side in size)
    return width, height


def photograph(pixels: np.ndarray, size: tuple[int, int]) -> str:
    """A data URI of a JPEG.

    Args:
      pixels: RGB, uint8 (H, W, 3).
      size: Width and height of the JPEG.
    """
    import cv2

    resized = cv2.resize(pixels[..., ::-1], size, interpolation=cv2.INTER_AREA)
    return _uri("jpeg", cv2.imencode(".jpg", resized, (cv2.IMWRITE_JPEG_QUALITY, 85))[1])


def drawing(pixels: np.ndarray, size: tuple[int, int]) -> str:
    """A data URI of a PNG; no colours are mixed.

    Args:
      pixels: RGB or RGBA, uint8 (H, W, 3 or 4).
      size: Width and height of the PNG.
    """
    import cv2

    bgr = pixels[..., [2, 1, 0, 3][: pixels.shape[-1]]]
    resized = cv2.resize(bgr, size, interpolation=cv2.INTER_NEAREST)
    return _uri("png", cv2.imencode(".png", resized, (cv2.IMWRITE_PNG_COMPRESSION, 9))[1])


def _uri(kind: str, data: np.ndarray) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
