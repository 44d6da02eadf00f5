"""`benchmarks.audit`: the regions that it relabels, and those that it counts as found."""

import numpy as np
import pytest

from benchmarks import audit
from segjax.data import specs
from segjax.data.records import SplitRecords
from tests.pixels import SPEC


def split_of(seed, number=30, size=(60, 45)):
    """Masks of four rectangles; the last one and a speck are smaller than 100 pixels."""
    labels = np.zeros((number, *size), np.uint8)
    labels[:, :, 30:], labels[:, 40:, :30], labels[:, 57:, 20:], labels[:, 5:8, 5:8] = 1, 2, 255, 3
    images = np.random.default_rng(seed).integers(0, 256, (number, *size, 3), dtype=np.uint8)
    return SplitRecords(
        specs.Split(images, labels, np.tile(np.int32(size), (number, 1)), tuple(map(str, range(number))))
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_five_percent_of_the_regions_are_relabelled_completely(seed):
    records = split_of(seed)
    found = audit.Relabelled(records, SPEC, seed)
    assert found.number == 90 and found.changed == round(0.05 * 90)
    changed = 0
    for number in range(len(found)):
        (image, labels), (same, before) = found[number], records[number]
        np.testing.assert_array_equal(image, same)
        where = found.where(number)
        np.testing.assert_array_equal(labels != before, where > 0)
        for region in np.unique(where[where > 0]):
            # One class before, another one now, and all of it.
            (own,), (new,) = np.unique(before[where == region]), np.unique(labels[where == region])
            assert own != new and own < 3 and (where[before == own] == region).all()
            changed += 1
    assert changed == found.changed
    np.testing.assert_array_equal(audit.Relabelled(records, SPEC, seed)[0][1], found[0][1])


def test_a_relabelled_region_counts_once_if_it_covers_most_of_a_region():
    assert audit.hit_of(3, np.array([7, 7, 0])) == (3, 7)
    assert audit.hit_of(3, np.array([7, 7, 0, 0])) is None and audit.hit_of(3, np.array([0, 0, 7])) is None
    hits = [(0, 1), (0, 1), None, (1, 1)]
    entries = [audit.Entry(float(-place), hit) for place, hit in enumerate(hits)]
    entries += [audit.Entry(-100.0 - place, (9, place + 1)) for place in range(100)]
    # Two of the first four, and 46 or 100 of those that follow.
    assert audit.precisions(entries[::-1]) == {"50": 48 / 50, "200": 102 / 200}
