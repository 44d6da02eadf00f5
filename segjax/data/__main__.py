"""Command line: prepares a dataset for training, and shows what is in it.

    python -m segjax.data prepare NAME --source PATH [PATH ...] [--data-dir DIR]

A PATH is a folder or an archive. A dataset that is prepared already is shown again, and needs no source.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from segjax.data import builders


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m segjax.data", description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("name", metavar="NAME", choices=builders.DATASETS, help=", ".join(builders.DATASETS))
    parser.add_argument("--source", nargs="+", metavar="PATH", help="folder, or the archives, or a folder with them")
    parser.add_argument("--data-dir", metavar="DIR", help="where to; default TFDS_DATA_DIR or ~/tensorflow_datasets")
    options = parser.parse_args(arguments)
    try:
        prepared = builders.prepare(options.name, source=options.source, data_dir=options.data_dir)
    except KeyboardInterrupt:
        print("segjax.data: stopped; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"segjax.data: {error}", file=sys.stderr)
        return 2
    print("\n".join(describe(prepared)))
    return 0


def describe(prepared: builders.Prepared) -> list[str]:
    """Images per split, and of the first labelled split the classes; lines of at most 80 columns but for the path."""
    lines = ["", f"{'split':<20} {'images':>9}  labels"]
    for split, count in prepared.splits.items():
        labels = "yes" if split in prepared.labelled else "not published"
        lines.append(f"{split:<20.20} {count:>9,}  {labels}")
    split = "train" if "train" in prepared.labelled else prepared.labelled[0]
    counts = np.array(prepared.pixel_counts(split), np.float64)
    rows = zip(prepared.spec.label_names, counts, weights(counts), strict=True)
    cells = [
        f"{name:<18.18} {100 * count / max(counts.sum(), 1):>8.4f} {'-' if not weight else format(weight, '>9.4f'):>9}"
        for name, count, weight in rows
    ]
    half = (len(cells) + 1) // 2 if len(cells) > 12 else len(cells)
    head = f"{'class':<18} {'% pixels':>8} {'weight':>9}"
    lines += ["", f"labelled pixels of {split}, and weights that balance them (median frequency)"]
    lines.append(head if half == len(cells) else f"{head}    {head}")
    lines += [f"{cells[i]}    {cells[i + half] if i + half < len(cells) else ''}".rstrip() for i in range(half)]
    return [*lines, "", f"{prepared.spec.name}: {prepared.path}"]


def weights(counts: np.ndarray) -> np.ndarray:
    """Median of the classes' shares / share of the class, (K,); 0 where there is no pixel.

    Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels", 2015, with the split as one image.
    """
    present = counts > 0
    balanced = np.zeros_like(counts)
    balanced[present] = np.median(counts[present]) / counts[present] if present.any() else 0
    return balanced


if __name__ == "__main__":
    sys.exit(main())
