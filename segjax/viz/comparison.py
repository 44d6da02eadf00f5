"""Report of a comparison of two models: results.json, and one HTML page that needs no server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax.data import bands, specs
from segjax.runtime import atomic, console
from segjax.viz import pages, pictures

LARGEST_SIDE = 768  # pixels of a picture on the page
# Colours of pixels whose predictions differ, which people of any colour vision can tell apart: only A is right, only B
# is right, both are wrong.
ONLY_A, ONLY_B, NEITHER = (255, 140, 0), (30, 110, 255), (150, 150, 150)


class Shown(NamedTuple):
    """An image of a comparison.

    Attributes:
      name: Name of the image.
      image: (H, W, C), as for `bands.as_picture`.
      truth: True train ids (H, W).
      a: Train ids (H, W) predicted by A.
      b: Train ids (H, W) predicted by B.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    a: np.ndarray
    b: np.ndarray


def write(
    folder: Path,
    summary: Mapping[str, Any],
    spec: specs.DatasetSpec,
    shown: Sequence[Shown],
    *,
    facts: Mapping[str, str],
    metadata: Mapping[str, object],
) -> None:
    """Writes index.html and results.json; they replace those of an older report when both are written.

    Args:
      folder: Folder of the report.
      summary: Result of `segjax.compare_models`.
      spec: Dataset.
      shown: The images in `summary["images"]`.
      facts: Facts below the title, by name; "A" and "B" are the models.
      metadata: Entries of results.json in addition to the summary.
    """
    with atomic.replacing_files(folder / "index.html") as page:
        page.write_text(_page(summary, spec, shown, facts), encoding="utf-8")
        results = json.dumps({**metadata, **summary}, indent=2) + "\n"
        page.with_name("results.json").write_text(results, encoding="utf-8")


def _page(summary: Mapping[str, Any], spec: specs.DatasetSpec, shown: Sequence[Shown], facts: Mapping[str, str]) -> str:
    images = [
        {**figures, "name": pages.name(each.name), **_layers(each, spec)}
        for figures, each in zip(summary["images"], shown, strict=True)
    ]
    classes = [
        {**entry, "class": pages.name(entry["class"]), "color": " ".join(map(str, color))}
        for entry, color in zip(summary["classes"], spec.label_colors, strict=True)
    ]
    means = [("mean IoU of A", "mean_iou_a"), ("mean IoU of B", "mean_iou_b"), ("B − A", "difference")]
    data = {
        "title": f"Two models on {pages.name(spec.name)}",
        "means": [(name, summary[key]) for name, key in means],
        "kind": _kind(summary["difference_interval"]),
        "facts": [(name, console.one_line(fact)) for name, fact in [*facts.items(), *_in_words(summary)]],
        "classes": classes,
        "images": images,
        "colors": {"A": _css(ONLY_A), "B": _css(ONLY_B), "neither": _css(NEITHER)},
    }
    return pages.fill("comparison.html", data)


def _kind(interval: Sequence[float] | None) -> str:
    """Whether B is "better" or "worse" than A; "" where the interval contains 0, or there is none."""
    if not interval:
        return ""
    low, high = interval
    return "better" if low > 0 else "worse" if high < 0 else ""


def _in_words(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if interval := summary["difference_interval"]:
        low, high = interval
        facts.append(("95% interval", f"B − A {low:+.4f} to {high:+.4f}: {verdict(summary)}"))
    if summary["differing_pixels"] is not None:
        facts.append(("differing", f"{100 * summary['differing_pixels']:.2f}% of the labelled pixels"))
    return facts


def verdict(summary: Mapping[str, Any]) -> str:
    """What the interval of the difference means, in words; "" where there is none."""
    if not (interval := summary["difference_interval"]):
        return ""
    low, high = interval
    if low > 0 or high < 0:
        return f"{'B' if low > 0 else 'A'} is better on images of this kind: the interval does not contain 0"
    return "either may be better on images of this kind: the interval contains 0" if low or high else "no difference"


def _css(color: tuple[int, int, int]) -> str:
    return f"rgb({' '.join(map(str, color))})"


def _layers(shown: Shown, spec: specs.DatasetSpec) -> dict[str, str]:
    """Image, truth, both predictions and their differences (transparent in equal pixels) as data URIs."""
    ignored = shown.truth == spec.ignore_label
    # Ignored pixels are not compared.
    a, b = (np.where(ignored, shown.truth, predicted) for predicted in (shown.a, shown.b))
    colors = np.array([(*color, 255) for color in (ONLY_A, ONLY_B, NEITHER)] + [(0, 0, 0, 0)], np.uint8)
    which = np.select([a == b, a == shown.truth, b == shown.truth], [3, 0, 1], default=2)
    size = pages.size_on_page(shown.truth.shape, LARGEST_SIDE)
    labels = {"truth": shown.truth, "A": a, "B": b}
    drawn = {name: pictures.colourise(each, spec) for name, each in labels.items()} | {"differences": colors[which]}
    layers = {name: pages.drawing(pixels, size) for name, pixels in drawn.items()}
    return {"image": pages.photograph(bands.as_picture(shown.image), size), **layers}
