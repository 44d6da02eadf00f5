"""Report of an evaluation: metrics as JSON and CSV, pictures, and one HTML page that needs no server."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax import metrics
from segjax.data import bands, specs
from segjax.runtime import atomic, console
from segjax.viz import pages, pictures
from segjax.viz.pages import name as _name

LARGEST_SIDE = 768  # pixels of a picture on the page
# Means of `details` in the page.
DETAILS = {
    "mean_boundary_iou": "mean boundary IoU",
    "image_iou": "mean IoU of an image",
    "worst_image_iou": "of the worst 5%",
}
COLUMNS = ("iou", "accuracy", "precision", "recall", "dice", "pixels")


class Shown(NamedTuple):
    """An image of a report.

    Attributes:
      name: Name of the image.
      image: (H, W, C), as for `bands.as_picture`.
      truth: True train ids (H, W).
      predicted: Predicted train ids (H, W).
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray


def summarise(confusion: np.ndarray, spec: specs.DatasetSpec) -> dict[str, Any]:
    """The result of `metrics.summarise`, further means that mmsegmentation prints, and "classes", a dict per class."""
    table = metrics.by_class(confusion)
    means = {f"mean_{column}": metrics.mean(table[column]) for column in COLUMNS[1:-1]}
    rows = zip(spec.label_names, *(table[column] for column in COLUMNS), strict=True)
    classes = [dict(zip(("class", *COLUMNS), row, strict=True)) for row in rows]
    return metrics.summarise(confusion) | means | {"classes": classes}


def write(
    folder: Path,
    confusion: np.ndarray,
    spec: specs.DatasetSpec,
    worst: Sequence[Shown],
    *,
    title: str,
    facts: Mapping[str, str],
    metadata: Mapping[str, object],
    details: Mapping[str, Any] = {},
) -> None:
    """Writes index.html, results.json, classes.csv, confusion.csv, confusion.png and worst/.

    The files replace those of an older report when all are written (`atomic.replacing_files`). Other files in the
    folder stay, except further pictures of the older report.

    Args:
      folder: Folder of the report.
      confusion: Pixel counts (K, K).
      spec: Dataset.
      worst: Images to show, in order.
      title: Title of the page.
      facts: Facts below the title, by name.
      metadata: Entries of results.json in addition to the metrics.
      details: Further measures for results.json, see `inference.evaluation.Measured.details`; the page shows their
        means.
    """
    summary = summarise(confusion, spec)
    images = [_figures_of(shown, spec) for shown in worst]
    files = {f"worst/{number:02d}.png": image for number, image in enumerate(images, start=1)}
    listed = [{"name": image["name"], "mean_iou": image["mean_iou"], "picture": file} for file, image in files.items()]
    results = {**metadata, **summary, **details, "worst_images": listed}
    by_class = [["class", *COLUMNS], *(entry.values() for entry in summary["classes"])]
    names = spec.label_names
    rows = ([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
    with atomic.replacing_files(folder / "index.html") as page:
        texts = {
            "index.html": _page(title, facts, {**summary, **details}, confusion, images, spec),
            "results.json": json.dumps(results, indent=2) + "\n",
            "classes.csv": _csv(by_class),
            "confusion.csv": _csv([["truth / prediction", *names], *rows]),
        }
        for name, text in texts.items():
            page.with_name(name).write_text(text, encoding="utf-8")
        pictures.save_confusion(page.with_name("confusion.png"), confusion, spec)
        for (file, image), shown in zip(files.items(), worst, strict=True):
            own = "-" if image["mean_iou"] is None else f"{image['mean_iou']:.4f}"
            title = f"{shown.name}   mIoU of this image {own}"
            pictures.save_prediction(page.parent / file, *shown[1:], spec, title=title)
    for left in (folder / "worst").glob("[0-9][0-9].png"):
        if f"worst/{left.name}" not in files:
            left.unlink()


def _figures_of(shown: Shown, spec: specs.DatasetSpec) -> dict[str, Any]:
    """Name, mean IoU and pictures as URIs of one image, and the IoU of each class in its truth or prediction."""
    confusion = metrics.confusion_matrix(
        shown.truth, shown.predicted, num_classes=spec.num_classes, ignore_label=spec.ignore_label
    )
    summary = metrics.summarise(confusion)
    ious = {k: iou for k, iou in enumerate(summary["per_class_iou"]) if iou is not None}
    return {"name": shown.name, "mean_iou": summary["mean_iou"], "ious": ious, **_layers(shown, spec)}


def _layers(shown: Shown, spec: specs.DatasetSpec) -> dict[str, str]:
    """Image, truth, prediction and errors (transparent in correct pixels) as data URIs."""
    ignored = shown.truth == spec.ignore_label
    # Ignored pixels are not compared.
    predicted = np.where(ignored, shown.truth, shown.predicted)
    wrong = (predicted != shown.truth)[..., None]
    red = np.where(wrong, np.array([255, 30, 60, 255], np.uint8), np.uint8(0))
    size = pages.size_on_page(shown.truth.shape, LARGEST_SIDE)
    labels = {"truth": pictures.colourise(shown.truth, spec), "prediction": pictures.colourise(predicted, spec)}
    layers = {name: pages.drawing(pixels, size) for name, pixels in (labels | {"errors": red}).items()}
    return {"image": pages.photograph(bands.as_picture(shown.image), size), **layers}


def _page(title, facts, summary, confusion, images, spec) -> str:
    data = {
        "title": console.one_line(title),
        "corruptions": summary.get("corruptions"),
        "means": [
            ("mean IoU", summary["mean_iou"]),
            ("pixel accuracy", summary["pixel_accuracy"]),
            ("mean accuracy", summary["mean_accuracy"]),
            ("mean Dice", summary["mean_dice"]),
            *((name, summary[key]) for key, name in DETAILS.items() if key in summary),
        ],
        "facts": [(name, console.one_line(fact)) for name, fact in [*facts.items(), *_interval(summary)]],
        "classes": [
            {**entry, "class": _name(entry["class"]), "color": " ".join(map(str, color))}
            for entry, color in zip(summary["classes"], spec.label_colors, strict=True)
        ],
        "confusion": confusion.tolist(),
        "images": [{**image, "name": _name(image["name"])} for image in images],
    }
    return pages.fill("report.html", data)


def _interval(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The interval of mIoU as a fact, where there is one."""
    if not (ends := summary.get("mean_iou_interval")):
        return []
    low, high = ends
    return [("95% interval", f"mean IoU {low:.4f} to {high:.4f}, by drawing the images again")]


def _csv(rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    # A name may have surrogates, Python's form of bytes that are not UTF-8, which cannot be encoded.
    return text.getvalue().encode("utf-8", "backslashreplace").decode()
