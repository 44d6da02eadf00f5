"""Measures how many deliberately relabelled regions `segjax audit` finds.

    python -m benchmarks.audit CHECKPOINT --data camvid:test --source DIR [--seeds 0 1 2] --json FILE

For each seed, 5% of the masks' regions (connected pixels of one class, at least 100) get another class, drawn
uniformly. The model must not have been trained on these images. A region in a ranking is a hit if most of its pixels
were relabelled; a relabelled region counts once. Errors that the masks already had do not count as hits. The ranking of
`segjax audit` is compared with two baselines: the masks' regions in ascending order of the mean probability of their
class, and the same without regions below 100 pixels, a threshold that a user would not know.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import recorded
from segjax.data import specs
from segjax.data.records import Records

SHARE, LEAST = 0.05, 100
FIRST = (50, 200)


def components(labels: np.ndarray, ignore_label: int) -> np.ndarray:
    """Numbers the 4-connected regions of one class from 1, int32 (H, W); ignored pixels have 0."""
    import cv2

    found, total = np.zeros(labels.shape, np.int32), 0
    for k in np.unique(labels[labels != ignore_label]).tolist():
        number, own = cv2.connectedComponents((labels == k).astype(np.uint8), connectivity=4)
        found[own > 0] = own[own > 0] + total
        total += number - 1
    return found


class Relabelled:
    """Records in which some regions have another class.

    Attributes:
      sizes, names: As in `Records`.
      number: Number of regions that are large enough.
      changed: Number of regions that got another class.
    """

    def __init__(self, records: Records, spec: specs.DatasetSpec, seed: int):
        self._records, self._ignore_label = records, spec.ignore_label
        self.sizes, self.names = records.sizes, records.names
        rng, regions = np.random.default_rng(seed), []
        for number in range(len(records)):
            labels = records[number][1]
            areas = np.bincount(components(labels, spec.ignore_label).ravel())
            regions += [(number, component) for component in np.flatnonzero(areas[1:] >= LEAST) + 1]
        self.number, self.changed = len(regions), round(SHARE * len(regions))
        self._classes: dict[int, dict[int, int]] = {}
        for place in rng.choice(len(regions), self.changed, replace=False):
            number, component = regions[place]
            labels = records[number][1]
            own = labels[components(labels, spec.ignore_label) == component][0]
            others = [k for k in range(len(spec.label_names)) if k != own]
            self._classes.setdefault(number, {})[component] = int(rng.choice(others))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        image, labels = self._records[number]
        found, labels = components(labels, self._ignore_label), labels.copy()
        for component, k in self._classes.get(number, {}).items():
            labels[found == component] = k
        return image, labels

    def where(self, number: int) -> np.ndarray:
        """Returns the numbers of the relabelled regions, int32 (H, W), with 0 elsewhere."""
        found = components(self._records[number][1], self._ignore_label)
        return np.where(np.isin(found, list(self._classes.get(number, {}))), found, 0)


class Entry(NamedTuple):
    """A ranked region: its score, and the relabelled region that it hits, as (image, number), or None."""

    score: float
    hit: tuple[int, int] | None


def hit_of(number: int, relabelled: np.ndarray) -> tuple[int, int] | None:
    """Returns the relabelled region that most pixels of a region belong to, or None.

    Args:
      number: Number of the image.
      relabelled: `Relabelled.where` at the pixels of the region, (n,).
    """
    counts = np.bincount(relabelled)
    return (number, int(counts.argmax())) if counts.argmax() and 2 * counts.max() > len(relabelled) else None


def precisions(entries: Sequence[Entry]) -> dict[str, float]:
    """Returns the precision among the first 50 and 200 entries; a relabelled region counts once."""
    ranked = sorted(entries, key=lambda entry: -entry.score)
    return {str(first): len({entry.hit for entry in ranked[:first] if entry.hit}) / first for first in FIRST}


def measured(checkpoint: Any, opened: Any, seed: int) -> dict[str, Any]:
    """Returns the precisions of all rankings for one seed."""
    from segjax.data.records import records_of
    from segjax.inference.audit import LARGEST_NLL, contradictions, regions_of
    from segjax.inference.engine import Protocol
    from segjax.inference.evaluate_dataset import inference_for

    spec = opened.spec
    data = Relabelled(records_of(opened.data), spec, seed)
    changed = opened._replace(data=data)
    inference = inference_for(checkpoint, changed, Protocol(), batch=1)
    audit, lowest, large = [], [], []
    for number, labels, found in contradictions(inference, changed, batch=1):
        where = data.where(number)
        for region, pixels in regions_of(labels, found, spec.ignore_label).items():
            left, top, width, height = region.box
            inside = where[top : top + height, left : left + width][pixels]
            audit.append(Entry(region.score, hit_of(number, inside)))
        given = np.exp(-LARGEST_NLL * found.nll / 65_535)
        numbers = components(labels, spec.ignore_label).ravel()
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(1, numbers.max() + 2))
        for start, stop in itertools.pairwise(bounds.tolist()):
            own = order[start:stop]
            entry = Entry(-float(given.ravel()[own].mean()), hit_of(number, where.ravel()[own]))
            lowest.append(entry)
            if len(own) >= LEAST:
                large.append(entry)
    rankings = {"audit": audit, "lowest probability": lowest, "lowest probability, from 100 pixels": large}
    return {
        "regions": data.number,
        "relabelled": data.changed,
        "most": {str(first): min(1.0, data.changed / first) for first in FIRST},
        **{name: precisions(entries) for name, entries in rankings.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, metavar="NAME:SPLIT")
    parser.add_argument("--source", metavar="DIR", help="what the data is prepared from at first use")
    parser.add_argument("--data-dir", metavar="DIR", help="where to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE", help="the record")
    options = parser.parse_args(arguments)
    from segjax import load
    from segjax.inference.evaluate_dataset import open_labelled

    checkpoint = load(options.checkpoint)
    opened, _ = open_labelled(checkpoint, options.data, data_source=options.source, data_dir=options.data_dir)
    record: dict[str, Any] = recorded.about("benchmarks.audit", sys.argv[1:]) | {"results": {}}
    for seed in options.seeds:
        result = record["results"][str(seed)] = measured(checkpoint, opened, seed)
        recorded.write(options.json, record)
        print(f"seed {seed}: {result}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
