"""Polygons, encoded masks and bitmaps give the pixels of COCO's own tools; damaged ones give none."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycocotools

from segjax.data.annotations import rasterise
from segjax.data.annotations.found import IGNORED
from segjax.data.annotations.rasterise import Bitmap, Outline, Region, Runs, draw
from tests.made_annotations import drawn, rectangle

# Of pycocotools' decode, which segjax does not call.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def of(shape, size=(6, 9), label=1):
    return draw([Region(label, shape, "here")], size)


def png(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_rectangle_covers_the_pixels_between_its_corners():
    assert of(Outline([rectangle(2, 1, 5, 5)])).labels.tolist() == (
        drawn("000000000 001110000 001110000 001110000 001110000 000000000").tolist()
    )


def test_a_triangle_covers_the_pixels_whose_centre_it_contains():
    # Below the diagonal from (0, 0) to (6, 6): row r has the middles 0.5 ... r - 0.5, and r + 0.5 is on it.
    found = of(Outline([[0, 0, 6, 6, 0, 6]])).labels
    strictly_inside = np.tri(6, 9, -1, dtype=np.uint8)
    on_the_edge = np.eye(6, 9, dtype=bool)
    np.testing.assert_array_equal(np.where(on_the_edge, 0, found), strictly_inside)


def test_relative_coordinates_are_multiplied_by_width_and_height():
    shares = [x / 9 if k % 2 == 0 else x / 6 for k, x in enumerate(rectangle(2, 1, 5, 5))]
    np.testing.assert_array_equal(
        of(Outline([shares], is_relative=True)).labels, of(Outline([rectangle(2, 1, 5, 5)])).labels
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_polygons_have_the_pixels_and_areas_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, 2).tolist()
    for _ in range(20):
        # Two decimals, as COCO has them; some reach out of the image.
        polygons = [
            (rng.uniform(-5, 65, (corners, 2)).round(2)).ravel().tolist()
            for corners in rng.integers(3, 9, rng.integers(1, 4))
        ]
        runs = pycocotools.merge(pycocotools.frPyObjects(polygons, height, width))
        found = of(Outline(polygons), (height, width))
        np.testing.assert_array_equal(found.labels, pycocotools.decode(runs))
        assert found.labels.sum() == pycocotools.area(runs)


def test_the_smaller_object_is_on_top_and_ignored_regions_are_below_all():
    large, small = Outline([rectangle(0, 0, 6, 4)]), Outline([rectangle(4, 2, 8, 4)])
    crowd = Outline([rectangle(5, 0, 7, 3)])
    regions = [Region(2, small, "a"), Region(1, large, "b"), Region(IGNORED, crowd, "c")]
    expected = drawn("111111#00 111111#00 111122220 111122220")
    for order in (regions, regions[::-1]):
        found = draw(order, (4, 9))
        np.testing.assert_array_equal(np.where(found.labels == IGNORED, 255, found.labels), expected)
        assert found.objects == {1: 1, 2: 1} and not found.skipped


def test_of_two_objects_of_equal_size_the_later_is_on_top():
    regions = [Region(k, Outline([rectangle(k, 0, k + 3, 1)]), "") for k in (1, 2)]
    assert draw(regions, (1, 6)).labels.tolist() == [[0, 1, 2, 2, 2, 0]]
    assert draw(regions[::-1], (1, 6)).labels.tolist() == [[0, 1, 1, 1, 2, 0]]


def test_run_lengths_are_columnwise_in_both_encodings():
    counts = [2, 3, 4, 1, 8]
    expected = np.repeat([0, 1, 0, 1, 0], counts).reshape(6, 3).T
    compressed = pycocotools.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"].decode()
    for form in (counts, compressed):
        np.testing.assert_array_equal(of(Runs(form, (3, 6)), (3, 6)).labels, expected)


def test_run_lengths_of_noise_round_trip():
    mask = (np.random.default_rng(3).random((37, 53)) < 0.4).astype(np.uint8)
    compressed = pycocotools.encode(np.asfortranarray(mask))["counts"].decode()
    np.testing.assert_array_equal(of(Runs(compressed, mask.shape), mask.shape).labels, mask)


def test_a_bitmap_is_placed_at_its_corner_and_clipped_at_the_border():
    mask = np.array([[1, 0, 1], [1, 1, 0]], np.uint8)
    found = of(Bitmap(png(mask), 4, 1), (4, 9))
    np.testing.assert_array_equal(found.labels, drawn("000000000 000010100 000011000 000000000"))
    np.testing.assert_array_equal(of(Bitmap(png(mask * 255), -1, -1), (2, 3)).labels, drawn("100 000"))
    assert of(Bitmap(png(mask), 8, 1), (4, 9)).skipped == [(rasterise.CLIPPED, "here")]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Outline([[1, 1, 4, 4]]), rasterise.NO_AREA),
        (Outline([[1, 1, 4, 4, 2]]), rasterise.NO_AREA),
        (Outline([]), rasterise.NO_AREA),
        (Outline([[1, 1, 4, 4, 1, 1]]), rasterise.NO_PIXEL),
        (Outline([rectangle(2.1, 2.1, 2.2, 2.2)]), rasterise.NO_PIXEL),
        (Outline([rectangle(9, 0, 12, 6)]), rasterise.OUTSIDE),
        (Outline([rectangle(-5, -5, 3, 0)]), rasterise.OUTSIDE),
        (Outline([rectangle(-1e9, 0, 1e9, 6)]), rasterise.TOO_LONG),
        (Outline([rectangle(-1e300, 0, 1e300, 6)]), rasterise.TOO_LONG),
        (Outline([[0, 0, 9, 6, 9, 0, 0, 6] * 100_000]), rasterise.TOO_LONG),
        # Too few pixels, too many, another size, negative; compressed: without an end, digits without end, no digits.
        (Runs([5, 5], (6, 9)), rasterise.BAD_RUNS),
        (Runs([5, 50], (6, 9)), rasterise.BAD_RUNS),
        (Runs([5, 13], (3, 6)), rasterise.BAD_RUNS),
        (Runs([100, -46], (6, 9)), rasterise.BAD_RUNS),
        (Runs([], (6, 9)), rasterise.BAD_RUNS),
        (Runs("", (6, 9)), rasterise.BAD_RUNS),
        (Runs("55", (6, 9)), rasterise.BAD_RUNS),
        (Runs("5o", (6, 9)), rasterise.BAD_RUNS),
        (Runs("ooooooooo0", (6, 9)), rasterise.BAD_RUNS),
        (Runs("é", (6, 9)), rasterise.BAD_RUNS),
        (Runs("00" * 100, (6, 9)), rasterise.BAD_RUNS),
        (Runs("OOO", (6, 9)), rasterise.BAD_RUNS),
        (Bitmap("?", 0, 0), rasterise.BAD_MASK),
        (Bitmap(base64.b64encode(b"text").decode(), 0, 0), rasterise.BAD_MASK),
        (Bitmap(png(np.ones((2, 2), np.uint8))[:-20], 0, 0), rasterise.BAD_MASK),
        (Bitmap(png(np.ones((90, 2), np.uint8)), 0, 0), rasterise.BAD_MASK),
        (Bitmap(png(np.ones((2, 2), np.uint8)), 9, 0), rasterise.OUTSIDE),
        (Bitmap(png(np.zeros((2, 2), np.uint8)), 0, 0), rasterise.NO_PIXEL),
    ],
)
def test_a_damaged_or_empty_shape_is_named_and_not_drawn(shape, reason):
    found = of(shape)
    assert found.skipped == [(reason, "here")]
    assert not found.labels.any() and not found.objects


def test_an_object_that_extends_beyond_the_image_is_drawn_and_named():
    found = of(Outline([rectangle(-3, 1, 2, 3)]), (4, 5))
    np.testing.assert_array_equal(found.labels, drawn("00000 11000 11000 00000"))
    assert found.skipped == [(rasterise.CLIPPED, "here")]
    assert not of(Outline([rectangle(-1, 1, 2, 3)]), (4, 5)).skipped
