"""The page of an audit, in a browser if there is one, and its pictures."""

import numpy as np
import pytest

from segjax.data import specs
from segjax.viz import audit
from tests.viz.test_report import CHROMIUM, decoded, page_data, seen_by

NAMES = ("road", "</script><b>sky", "nothing")
SPEC = specs.DatasetSpec("noise", NAMES, ((128, 64, 128), (70, 130, 180), (0, 0, 0)), 255)
SIZE = (90, 70)


def make_region(seed, given, predicted):
    rng = np.random.default_rng(seed)
    left, top, width, height = box = [int(side) for side in (*rng.integers(0, 40, 2), *rng.integers(8, 20, 2))]
    rows, columns = audit.part_around(box, SIZE)
    region = np.zeros(SIZE, bool)
    region[top : top + height, left : left + width] = True
    truth, guess = (rng.integers(0, 3, SIZE).astype(np.uint8) for _ in "ab")
    image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    entry = {"image": f"image <{seed}>", "given": NAMES[given], "predicted": NAMES[predicted], "box": box}
    entry |= {"pixels": width * height, "score": 4.0 - seed, "confidence": 0.75}
    return entry, audit.Shown(*(part[rows, columns] for part in (image, truth, guess, region)))


MADE = [make_region(0, 0, 1), make_region(1, 1, 0), make_region(2, 0, 2)]
REGIONS, SHOWN = [entry for entry, _ in MADE], [shown for _, shown in MADE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    facts, more = {"checkpoint": "runs/<a>"}, {**REGIONS[2], "image": "not shown"}
    audit.write(folder, [*REGIONS, more], SPEC, SHOWN, title="a <title>", facts=facts, metadata={"step": 3})
    return folder


def test_the_shown_part_of_an_image_has_the_box_and_its_surroundings():
    assert audit.part_around((100, 50, 10, 20), (400, 500)) == (slice(26, 94), slice(76, 134))
    assert audit.part_around((0, 300, 200, 100), (400, 500)) == (slice(200, 400), slice(0, 300))


def test_pictures_show_class_colours_and_the_outline_of_the_region(folder):
    entries = page_data(folder)["regions"]
    assert len(entries) == 3
    for entry, shown in zip(entries, SHOWN, strict=True):
        layers = {name: decoded(entry[name]) for name in ("picture", "mask", "prediction", "outline")}
        assert {layer.shape[:2] for layer in layers.values()} == {shown.region.shape}
        colors = np.array(SPEC.colors, np.uint8)
        np.testing.assert_array_equal(layers["mask"][..., ::-1], colors[shown.truth])
        np.testing.assert_array_equal(layers["prediction"][..., ::-1], colors[shown.predicted])
        # Pixels of a rectangle with a neighbour outside, and their neighbours outside.
        padded = np.pad(shown.region, 1)
        shifts = [np.roll(padded, step, axis)[1:-1, 1:-1] for axis in (0, 1) for step in (-1, 1)]
        white = (layers["outline"] == 255).all(axis=-1)
        black = (layers["outline"] == (0, 0, 0, 255)).all(axis=-1)
        np.testing.assert_array_equal(white, shown.region & ~np.all(shifts, axis=0))
        np.testing.assert_array_equal(black, ~shown.region & np.any(shifts, axis=0))


VISIT = r"""
const seen = {}, $ = (s) => [...document.querySelectorAll(s)];
seen.text = $("header")[0].innerText;
seen.count = $("#count")[0].textContent;
const visible = () => $("#gallery figure").filter((figure) => figure.getClientRects().length);
const captions = () => visible().map((figure) => figure.querySelector("figcaption > span > span").textContent);
seen.captions = captions();
seen.place = $(".place")[0].textContent;
const choose = $("#filter")[0];
seen.options = [...choose.options].map((option) => option.textContent);
choose.value = "nothing"; choose.dispatchEvent(new Event("change"));
seen.filtered = captions(); seen.note = $("#shown")[0].textContent;
choose.value = ""; choose.dispatchEvent(new Event("change"));
const outline = () => getComputedStyle($(".outline")[0]).visibility;
seen.outline = [outline()]; $("#outlines")[0].click(); seen.outline.push(outline());
seen.alts = [...$("#gallery figure")[1].querySelectorAll("img")].map((image) => image.alt);
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.loaded = $("#gallery img").every((image) => image.naturalWidth > 0);
seen.bold = $("b").length;
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine to open the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_shows_the_regions_and_filters_them(folder, width, tmp_path):
    seen = seen_by(folder / "index.html", VISIT, tmp_path, f"--window-size={width},900")
    assert "a <title>" in seen["text"] and "runs/<a>" in seen["text"] and seen["bold"] == 0
    assert seen["count"] == "The first 3 regions" and seen["wide"] <= 0 and seen["loaded"]
    assert seen["captions"][:2] == [f"1. road, predicted {NAMES[1]}", f"2. {NAMES[1]}, predicted road"]
    left, top, wide, high = REGIONS[0]["box"]
    where = f"image <0>: column {left}, row {top}, {wide} x {high}; {wide * high} pixels, mean probability 0.750"
    assert seen["place"] == where
    assert seen["options"] == ["any", f"{NAMES[1]} (2)", "nothing (1)", "road (3)"]
    assert seen["filtered"] == ["3. road, predicted nothing"] and seen["note"] == "1 of 3"
    assert seen["outline"] == ["visible", "hidden"]
    assert seen["alts"] == [
        words for kind in ("image", "mask", "prediction") for words in (f"{kind} around region 2", "")
    ]
