"""Evaluates published weights with their published protocol, and lists measured next to published mIoU.

    python -m benchmarks.published --data cityscapes=DIR ade20k=DIR loveda=DIR [--pattern '*cityscapes*']
                                   [--multi-scale] --json FILE

It evaluates every row of `segjax weights PATTERN` whose dataset is given, with the protocol of its published figure;
`--multi-scale` repeats this at six scales and mirrored. DIR is the source from which the dataset is prepared. For a
dataset without a reader (LIP, Pascal Context, COCO-Stuff, LoveDA, Potsdam, Vaihingen, iSAID), it is a folder in the
layout of segjax/data/folder.py. Weights that are not in the cache are downloaded. FILE is written after each row; a row
that failed has the reason. The same command continues where it ended, and retries the rows that failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import recorded
from segjax.checkpoints.published import PublishedWeights, list_weights
from segjax.data import specs

# mmsegmentation's scales, which all sources use.
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def pairs(words: Sequence[str]) -> dict[str, str]:
    """Returns the folders by dataset from words DATASET=DIR. Raises ValueError for any other word."""
    found = dict(word.partition("=")[::2] for word in words)
    known = {row.dataset for row in list_weights() if row.dataset}
    if wrong := [name for name, folder in found.items() if name not in known or not folder]:
        raise ValueError(f"--data takes DATASET=DIR with DATASET one of {', '.join(sorted(known))}; not {wrong[0]!r}")
    return found


def measured(row: PublishedWeights, folder: str, **settings: Any) -> dict[str, Any]:
    """Returns the figures of a row, or the reason why it has none."""
    from segjax import evaluate_dataset

    data = row.dataset if row.dataset in specs.DATASETS else "folder"
    since = time.perf_counter()
    try:
        found = evaluate_dataset(row.name, data, data_source=folder, **settings)
    except (ValueError, OSError) as error:
        return {"failed": str(error)}
    figures = {"mean_iou": found["mean_iou"], "published": found["published"]}
    return {**figures, "seconds": round(time.perf_counter() - since, 1)}


def line(name: str, result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"{name:<44} failed: {result['failed'].splitlines()[0]}"
    published, found = result["published"]["mean_iou"], result["mean_iou"]
    difference = f"{100 * (found - published):+.2f}" if None not in (found, published) else "-"
    cells = ["-" if value is None else f"{100 * value:.2f}" for value in (published, found)]
    other = "" if result["published"]["is_same_protocol"] else "  another protocol"
    return f"{name:<44} {cells[0]:>9} {cells[1]:>9} {difference:>7}{other}"


def run(rows: Sequence[PublishedWeights], folders: Mapping[str, str], path: Path, options: argparse.Namespace) -> int:
    """Evaluates rows and writes the record after each; returns the number of those that failed."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": {}}
    record |= recorded.about("benchmarks.published", sys.argv[1:])
    print(f"{'':<44} published  measured  points")
    kinds = {"": {}} | ({" at several scales": {"scales": SCALES, "flip": True}} if options.multi_scale else {})
    failed = 0
    for row in rows:
        for kind, settings in kinds.items():
            key = row.name + kind
            result = record["results"].get(key, {"failed": ""})
            if "failed" in result:
                result = record["results"][key] = measured(row, folders[row.dataset], **settings)
                recorded.write(path, record)
            failed += "failed" in result
            print(line(key, result), flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="DATASET=DIR")
    parser.add_argument("--pattern", default="*", help="of names; default all")
    parser.add_argument("--multi-scale", action="store_true", help="also at six scales and mirrored")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the record")
    options = parser.parse_args(arguments)
    try:
        folders = pairs(options.data)
        rows = [row for row in list_weights(options.pattern) if row.dataset in folders]
    except ValueError as error:
        parser.error(str(error))
    return 1 if run(rows, folders, options.json, options) else 0


if __name__ == "__main__":
    sys.exit(main())
