"""Pictures of runs and evaluations: predictions next to the labels, learning curves, confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from segjax.data import bands, specs
from segjax.runtime import atomic, console
from segjax.viz import lettering


def colourise(labels: np.ndarray, spec: specs.DatasetSpec) -> np.ndarray:
    """Train ids (H, W) -> RGB uint8 (H, W, 3) in the dataset's colours, black for the ignore label."""
    palette = np.zeros((max(spec.ignore_label, 255) + 1, 3), np.uint8)
    palette[: len(spec.label_colors)] = spec.label_colors
    return palette[labels]


def save_prediction(
    path: Path, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, spec: specs.DatasetSpec, *, title: str
) -> None:
    """Writes a PNG of image, truth and prediction, with a legend of the classes in truth or prediction.

    Args:
      path: File.
      image: (H, W, C), as for `bands.as_picture`.
      truth: True train ids (H, W).
      predicted: Predicted train ids (H, W).
      spec: Dataset.
      title: Title above the pictures.
    """
    figure = _figure(*_three_panels(image.shape[:2]))
    panels = figure.subplots(1, 3)
    # Pixels that metrics ignore are black in the prediction too.
    shown = np.where(truth == spec.ignore_label, truth, predicted)
    names = ("image", "truth", "prediction")
    pictures = (bands.as_picture(image), colourise(truth, spec), colourise(shown, spec))
    for panel, name, picture in zip(panels, names, pictures, strict=True):
        panel.imshow(picture, interpolation="nearest")
        panel.set_title(name, fontsize=9)
        panel.axis("off")
    figure.suptitle(lettering.one_line(title, most=120), fontsize=9)
    _legend(figure, [k for k in np.union1d(truth, shown) if k != spec.ignore_label], spec)
    _save(figure, path)


def save_samples(
    path: Path, images: np.ndarray, labels: np.ndarray, spec: specs.DatasetSpec, *, titles: Sequence[str]
) -> None:
    """Writes a PNG of images, each next to its labels, with a legend of their classes; ignored pixels are striped.

    Args:
      path: File.
      images: Uint8 (B, H, W, 3).
      labels: Train ids (B, H, W).
      spec: Dataset.
      titles: Title of each image.
    """
    pairs = 2 if len(images) > 1 else 1
    rows = -(-len(images) // pairs)
    height, width = labels.shape[1:]
    classes = [k for k in np.unique(labels) if k != spec.ignore_label]
    panel, line = 3.6, 0.17  # inches
    page_width = 2 * pairs * panel
    legend = line * (len(classes) // _legend_columns(page_width, classes, spec) + 3)
    figure = _figure(page_width, rows * (panel * height / width + 0.25) + legend)
    panels = figure.subplots(rows, 2 * pairs, squeeze=False).reshape(-1, 2)
    for axis in panels.flat:
        axis.axis("off")
    # Stripes have the same width on the page for images of any size, and greys that are not colours of classes.
    stripes = np.add.outer(np.arange(height), np.arange(width)) // max(width // 80, 1) % 2 * 120 + 135
    for (left, right), image, label, title in zip(panels, images, labels, titles, strict=False):
        ignored = label == spec.ignore_label
        left.imshow(image)
        left.set_title(lettering.one_line(title, most=80), fontsize=8, loc="left")
        right.imshow(np.where(ignored[..., None], stripes[..., None], colourise(label, spec)), interpolation="nearest")
    _legend(figure, classes, spec, ignored=spec.ignore_label in labels)
    _save(figure, path)


def save_curves(path: Path, records: Sequence[Mapping[str, float]]) -> None:
    """Writes a PNG of the loss over steps, and of the mean IoU where it was measured."""
    figure = _figure(7.0, 3.6)
    axis = figure.subplots()
    steps = [record["step"] for record in records if "loss" in record]
    losses = [record["loss"] for record in records if "loss" in record]
    axis.plot(steps, losses, color="tab:blue", linewidth=1, label="training loss")
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per pixel")
    axis.set_ylim(bottom=0)
    scores = [(record["step"], record["mean_iou"]) for record in records if record.get("mean_iou") is not None]
    lines = axis.get_lines()
    if scores:
        right = axis.twinx()
        right.plot(*zip(*scores, strict=True), "o-", color="tab:orange", markersize=4, label="mean IoU")
        right.set_ylabel("mean IoU")
        right.set_ylim(0, 1)
        lines = [*lines, *right.get_lines()]
    axis.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, frameon=False, loc="upper center")
    _save(figure, path)


def save_confusion(path: Path, confusion: np.ndarray, spec: specs.DatasetSpec) -> None:
    """Writes a PNG of a confusion matrix: rows are true and columns predicted classes, cells are shares of their row.

    Args:
      path: File.
      confusion: Pixel counts (K, K).
      spec: Dataset.
    """
    classes, pixels = len(confusion), confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(pixels, 1)
    # Names and numbers fit into cells of a third of an inch. With many classes, cells have only colours.
    side = classes / 3 + 2.5 if classes <= 40 else 12.0
    figure = _figure(side + 0.8, side)
    axis = figure.subplots()
    drawn = axis.imshow(np.ma.masked_where(np.broadcast_to(pixels == 0, shares.shape), shares), "Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axis, shrink=0.7, label="share of the pixels of the true class")
    axis.set_xlabel("prediction")
    axis.set_ylabel("truth")
    if classes <= 40:
        names = lettering.class_names(spec)
        axis.set_xticks(range(classes), names, rotation=90, fontsize=7)
        axis.set_yticks(range(classes), names, fontsize=7)
        for (truth, guess), share in np.ndenumerate(shares):
            if share >= 0.005:
                color = "white" if share > 0.6 else "black"
                axis.text(guess, truth, f"{100 * share:.0f}", color=color, fontsize=6, ha="center", va="center")
    _save(figure, path)


def _three_panels(size: tuple[int, int]) -> tuple[float, float]:
    """Width and height of the figure in inches, for three images of this (height, width) side by side."""
    height, width = size
    return 10.5, 3.5 * height / width + 1.1


def _figure(width: float, height: float):
    # Not pyplot, which looks for a window system and keeps figures open.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure, classes: Sequence[int], spec: specs.DatasetSpec, *, ignored: bool = False) -> None:
    from matplotlib.patches import Patch

    names = lettering.class_names(spec)
    patches = [Patch(color=_unit(spec.label_colors[k])) for k in classes]
    labels = [names[k] for k in classes]
    if ignored:
        patches.append(Patch(facecolor="white", edgecolor="0.53", hatch="//////"))
        labels.append("ignored")
    columns = _legend_columns(figure.get_figwidth(), classes, spec)
    # Names are not labels of the patches: matplotlib omits labels that begin with an underscore.
    figure.legend(patches, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def _unit(color: tuple[int, int, int]) -> tuple[float, float, float]:
    """RGB in 0..255 -> RGB in 0..1."""
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def _legend_columns(width: float, classes: Sequence[int], spec: specs.DatasetSpec) -> int:
    """Number of columns for a width in inches. In the 7-point font, patch and spaces take 0.47 and a letter 0.058."""
    names = lettering.class_names(spec)
    longest = max((console.columns(names[k]) for k in classes), default=0)
    return max(1, min(10, int(width / (0.47 + 0.058 * longest))))


def _save(figure, path: Path) -> None:
    lettering.letter(figure)
    with atomic.replacing_file(path) as temporary:
        figure.savefig(temporary, format="png")
