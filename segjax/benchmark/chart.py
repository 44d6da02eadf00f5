"""A chart of a record: time per megapixel over the size of the image, where a program that is fit for some sizes only
shows as a cliff."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from segjax.benchmark.runner import OURS
from segjax.runtime import atomic

TITLES = {"infer": "inference", "train": "training step"}


class Curve(NamedTuple):
    """Milliseconds per megapixel of a contender, in the order of the sizes.

    Attributes:
      megapixels: Of one image.
    """

    model: str
    contender: str
    megapixels: list[float]
    milliseconds: list[float]


def curves(record: Mapping, mode: str) -> Iterator[Curve]:
    """The curves of a record that have at least two sizes, segjax's first."""
    points: dict[tuple[str, str], dict[float, float]] = {}
    for result in record["results"]:
        if result["mode"] != mode:
            continue
        height, width = result["size"]
        for row in result["contenders"]:
            if "failed" not in row:
                pixels = height * width / 1e6
                time = row["milliseconds"][0] / (pixels * result["batch"])
                points.setdefault((result["model"], row["name"]), {})[pixels] = time
    for (model, name), times in sorted(points.items(), key=lambda item: item[0][1] != OURS):
        if len(times) > 1:
            sizes = sorted(times)
            yield Curve(model, name, sizes, [times[size] for size in sizes])


def save_chart(path: Path, record: Mapping) -> None:
    """Writes the chart as PNG: a panel for inference and one for training, as far as the record has them.

    Raises:
      ValueError: no model was timed at two sizes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    found = {mode: list(curves(record, mode)) for mode in TITLES}
    found = {mode: drawn for mode, drawn in found.items() if drawn}
    if not found:
        raise ValueError("no model was timed at two sizes, which a chart of sizes needs")
    # Without pyplot, which looks for a window system.
    figure = Figure(figsize=(6.4 * len(found), 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    models = list(dict.fromkeys(curve.model for drawn in found.values() for curve in drawn))
    names = list(dict.fromkeys(curve.contender for drawn in found.values() for curve in drawn))
    styles = ("-", "--", ":", "-.")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (mode, drawn) in zip(panels, found.items(), strict=True):
        for curve in drawn:
            colour, style = f"C{models.index(curve.model) % 10}", styles[names.index(curve.contender) % len(styles)]
            label = curve.model if curve.contender == OURS else None
            panel.plot(curve.megapixels, curve.milliseconds, style, marker="o", markersize=3, color=colour, label=label)
        ticks = sorted({size for curve in drawn for size in curve.megapixels})
        panel.set(title=TITLES[mode], xlabel="megapixels of an image", ylabel="milliseconds per megapixel")
        # Labels of sizes that nearly coincide would overlap.
        apart = [not before or size > 1.05 * before for before, size in zip([0, *ticks], ticks, strict=False)]
        labels = [f"{size:.2f}" if is_apart else "" for size, is_apart in zip(ticks, apart, strict=True)]
        panel.set(xscale="log", yscale="log", xticks=ticks, xticklabels=labels)
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.tick_params(axis="x", rotation=60)
        panel.grid(alpha=0.3)
    for name, style in zip(names, styles, strict=False):
        panels[-1].plot([], [], style, color="0.3", label=name)
    panels[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    parts = (str(record.get("device", "")), str(record.get("date", "")), str(record["results"][0].get("dtype", "")))
    figure.suptitle(", ".join(part for part in parts if part), fontsize=10)
    with atomic.replacing_file(path) as temporary:
        figure.savefig(temporary, format="png")
