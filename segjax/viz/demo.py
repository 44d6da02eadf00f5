"""The page of `segjax demo`, and its answer for an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from segjax.data import bands, specs
from segjax.runtime import console
from segjax.viz import pages, pictures

LARGEST_SIDE = 1600  # pixels of a picture on the page
MOST_BYTES = 32 * 2**20  # of an image file


def page(title: str, facts: Mapping[str, str]) -> str:
    """The page, which sends images to /predict and shows the answers of `answer`.

    Args:
      title: Title of the page.
      facts: Facts below the title, by name.
    """
    data = {
        "title": console.one_line(title),
        "means": [],
        "facts": [(name, console.one_line(fact)) for name, fact in facts.items()],
        "most_bytes": MOST_BYTES,
    }
    return pages.fill("demo.html", data)


def answer(
    image: np.ndarray, labels: np.ndarray, confidence: np.ndarray | None, spec: specs.DatasetSpec
) -> dict[str, Any]:
    """What the page shows of an image, in terms of JSON.

    Args:
      image: (H, W, C), as for `bands.as_picture`.
      labels: Predicted train ids (H, W).
      confidence: Probability of the predicted class, uint8 (H, W), 255 for 1; None where a model gives only labels.
      spec: Classes of the model.

    Returns:
      "picture", "labels" and "confidence" (None without) as data URIs; "mean_confidence"; and "classes", the classes in
      the image, the largest first, each with "class", "color", "share" of the pixels and "confidence", the mean of its
      pixels.
    """
    size = pages.size_on_page(labels.shape, LARGEST_SIDE)
    counts = np.bincount(labels.ravel(), minlength=len(spec.label_names))
    sums = None if confidence is None else np.bincount(labels.ravel(), confidence.ravel(), len(counts))

    classes = [
        {
            "class": pages.name(spec.label_names[k]),
            "color": " ".join(map(str, spec.label_colors[k])),
            "share": int(counts[k]) / labels.size,
            "confidence": None if sums is None else float(sums[k] / 255 / counts[k]),
        }
        for k in np.argsort(-counts, kind="stable").tolist()
        if counts[k]
    ]
    grey = None if confidence is None else np.repeat(confidence[..., None], 3, axis=2)
    return {
        "picture": pages.photograph(bands.as_picture(image), size),
        "labels": pages.drawing(pictures.colourise(labels, spec), size),
        "confidence": None if grey is None else pages.drawing(grey, size),
        "mean_confidence": None if sums is None else float(sums.sum() / 255 / labels.size),
        "classes": classes,
    }
