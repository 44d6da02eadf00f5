"""Report of an audit: regions.json, regions.csv, and one HTML page that needs no server."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax.data import bands, specs
from segjax.runtime import atomic, console
from segjax.viz import pages, pictures

LARGEST_SIDE = 256  # pixels of a picture on the page
MARGIN = 24  # pixels of the image around a region, at least


class Shown(NamedTuple):
    """A region of an audit, with what is around it.

    Attributes:
      image: Part of the image, (h, w, C), as for `bands.as_picture`.
      truth: Train ids of the mask in this part, (h, w).
      predicted: Predicted train ids, (h, w).
      region: Pixels of the region, bool (h, w).
    """

    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    region: np.ndarray


def part_around(box: Sequence[int], size: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of an image of `size` that show a box (left, top, width, height) with its surroundings."""
    left, top, width, height = box
    margin = max(MARGIN, max(width, height) // 2)
    return (
        slice(max(top - margin, 0), min(top + height + margin, size[0])),
        slice(max(left - margin, 0), min(left + width + margin, size[1])),
    )


def write(
    folder: Path,
    regions: Sequence[Mapping[str, Any]],
    spec: specs.DatasetSpec,
    shown: Sequence[Shown],
    *,
    title: str,
    facts: Mapping[str, str],
    metadata: Mapping[str, object],
) -> None:
    """Writes index.html, regions.json and regions.csv; they replace those of an older report when all are written.

    Args:
      folder: Folder of the report.
      regions: Regions as `segjax.audit_dataset` returns them.
      spec: Dataset.
      shown: Pictures of the first regions.
      title: Title of the page.
      facts: Facts below the title, by name.
      metadata: Entries of regions.json in addition to the regions.
    """
    with atomic.replacing_files(folder / "index.html") as page:
        page.write_text(_page(regions, spec, shown, title, facts), encoding="utf-8")
        results = json.dumps({**metadata, "regions": list(regions)}, indent=2) + "\n"
        page.with_name("regions.json").write_text(results, encoding="utf-8")
        page.with_name("regions.csv").write_text(_csv(regions), encoding="utf-8")


def _csv(regions: Sequence[Mapping[str, Any]]) -> str:
    names = ("image", "given", "predicted", "left", "top", "width", "height", "pixels", "score", "confidence")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(names)
    for region in regions:
        flat = {**region, **dict(zip(("left", "top", "width", "height"), region["box"], strict=True))}
        rows.writerow([flat[name] for name in names])
    # A name may have surrogates, Python's form of bytes that are not UTF-8, which cannot be encoded.
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


def _page(
    regions: Sequence[Mapping[str, Any]],
    spec: specs.DatasetSpec,
    shown: Sequence[Shown],
    title: str,
    facts: Mapping[str, str],
) -> str:
    colors = dict(zip(spec.label_names, spec.label_colors, strict=True))
    data = {
        "title": console.one_line(title),
        "means": [],
        "facts": [(name, console.one_line(fact)) for name, fact in facts.items()],
        "regions": [
            {
                **region,
                **{key: pages.name(region[key]) for key in ("image", "given", "predicted")},
                "colors": [" ".join(map(str, colors[region[key]])) for key in ("given", "predicted")],
                **_layers(each, spec),
            }
            for region, each in zip(regions, shown, strict=False)
        ],
    }
    return pages.fill("audit.html", data)


def _layers(shown: Shown, spec: specs.DatasetSpec) -> dict[str, str]:
    """Part of the image, mask, prediction and outline of the region (transparent elsewhere) as data URIs."""
    import cv2

    size = pages.size_on_page(shown.region.shape, LARGEST_SIDE)
    # Drawn at the size of the page, so that a line of a pixel is seen.
    region = cv2.resize(shown.region.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    around, line = cv2.dilate(region, cross) != region, cv2.erode(region, cross, borderValue=0) != region
    outline = np.zeros((*region.shape, 4), np.uint8)
    outline[around], outline[line] = (0, 0, 0, 255), (255, 255, 255, 255)
    return {
        "picture": pages.photograph(bands.as_picture(shown.image), size),
        "mask": pages.drawing(pictures.colourise(shown.truth, spec), size),
        "prediction": pages.drawing(pictures.colourise(shown.predicted, spec), size),
        "outline": pages.drawing(outline, size),
    }
