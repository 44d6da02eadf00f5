"""The page of a comparison, in a browser if there is one, and its pictures."""

import json

import numpy as np
import pytest

from segjax.data import specs
from segjax.viz import comparison
from tests.viz.test_report import CHROMIUM, decoded, page_data, seen_by

NAMES = ("road", "</script><b>sky", "nothing")
SPEC = specs.DatasetSpec("noise", NAMES, ((128, 64, 128), (70, 130, 180), (0, 0, 0)), 255)


def make_shown(seed, size):
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 255], size).astype(np.uint8)
    a, b = (np.where(rng.random(size) < 0.6, truth % 2, rng.integers(0, 3, size)).astype(np.uint8) for _ in "ab")
    return comparison.Shown(f"image <{seed}>", rng.integers(0, 256, (*size, 3), dtype=np.uint8), truth, a, b)


SHOWN = [make_shown(seed, (40, 64)) for seed in range(3)]
SUMMARY = {
    "mean_iou_a": 0.5,
    "mean_iou_b": 0.4375,
    "difference": -0.0625,
    "difference_interval": [-0.125, -0.03125],
    "differing_pixels": 0.25,
    "classes": [
        {
            "class": NAMES[0],
            "iou_a": 0.5,
            "iou_b": 0.25,
            "difference": -0.25,
            "interval": [-0.5, -0.1],
            "pixels": 12345,
        },
        {"class": NAMES[1], "iou_a": 0.5, "iou_b": 0.625, "difference": 0.125, "interval": [-0.1, 0.25], "pixels": 7},
        {"class": NAMES[2], "iou_a": None, "iou_b": 0.0, "difference": None, "interval": None, "pixels": 0},
    ],
    "images": [
        {"name": shown.name, "mean_iou_a": 0.5, "mean_iou_b": 0.25 + place / 2, "difference": place / 2 - 0.25}
        for place, shown in enumerate(SHOWN)
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    facts = {"A": "runs/<a>", "B": "runs/b"}
    comparison.write(folder, SUMMARY, SPEC, SHOWN, facts=facts, metadata={"duration_s": 3})
    return folder


def test_results_contain_the_summary_and_the_metadata(folder):
    assert json.loads((folder / "results.json").read_text()) == {"duration_s": 3, **SUMMARY}


def test_differences_are_in_the_colour_of_the_model_that_is_right(folder):
    for entry, shown in zip(page_data(folder)["images"], SHOWN, strict=True):
        layers = {name: decoded(entry[name]) for name in ("image", "truth", "A", "B", "differences")}
        assert {layer.shape[:2] for layer in layers.values()} == {(40, 64)}
        counted = shown.truth != 255
        palette = np.zeros((256, 3), np.uint8)
        palette[:3] = SPEC.colors
        for name, labels in (("truth", shown.truth), ("A", shown.a), ("B", shown.b)):
            np.testing.assert_array_equal(layers[name][counted][:, ::-1], palette[labels[counted]])
        right_a, right_b = shown.a == shown.truth, shown.b == shown.truth
        rgba = layers["differences"][..., [2, 1, 0, 3]]
        expected = {
            comparison.ONLY_A: counted & right_a & ~right_b,
            comparison.ONLY_B: counted & right_b & ~right_a,
            comparison.NEITHER: counted & ~right_a & ~right_b & (shown.a != shown.b),
        }
        for color, where in expected.items():
            assert where.any()
            np.testing.assert_array_equal((rgba == (*color, 255)).all(axis=-1), where)
        np.testing.assert_array_equal(rgba[..., 3] > 0, sum(expected.values()) > 0)


VISIT = r"""
const seen = {}, $ = (s) => [...document.querySelectorAll(s)];
seen.title = $("h1")[0].textContent;
seen.text = $("header")[0].innerText;
seen.rows = $("#classes tbody tr").map((row) => [...row.cells].map((cell) => cell.textContent));
seen.bars = $("#classes .span").map((line) => line.getAttribute("class"));
$("#classes th button")[3].click();
seen.sorted = $("#classes tbody tr").map((row) => row.cells[0].textContent);
seen.captions = $("#gallery figcaption").map((caption) => caption.innerText.replaceAll("\n", " "));
const figure = $("#gallery figure")[0];
const sides = () => figure.querySelector(".sides").innerText.split("\n").filter(Boolean);
seen.pairs = $("#pairs button").map((button) => (button.click(), sides()));
const overlay = () => getComputedStyle(figure.querySelector(".differences")).visibility;
seen.overlay = [overlay()]; $("#differences")[0].click(); seen.overlay.push(overlay());
seen.key = $("#key > span").map((item) => item.textContent);
seen.alts = [...figure.querySelectorAll("img")].map((image) => image.alt);
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.loaded = $("#gallery img").every((image) => image.naturalWidth > 0);
seen.bold = $("b").length;
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine to open the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_shows_the_whole_comparison(folder, width, tmp_path):
    seen = seen_by(folder / "index.html", VISIT, tmp_path, f"--window-size={width},900")
    assert seen["title"] == "Two models on noise" and seen["bold"] == 0 and seen["wide"] <= 0 and seen["loaded"]
    for words in ("runs/<a>", "−0.0625", "-0.1250 to -0.0312: A is better", "25.00% of the labelled"):
        assert words in seen["text"]
    assert [row[0] for row in seen["rows"]] == list(NAMES)
    assert seen["rows"][0][1:4] + seen["rows"][0][5:] == ["0.5000", "0.2500", "−0.2500", "12,345"]
    assert seen["rows"][2][1:5] == ["–", "0.0000", "–", "–"]
    assert seen["bars"] == ["span worse", "span"]
    assert seen["sorted"] == [NAMES[0], NAMES[1], NAMES[2]]
    assert seen["captions"][0] == "image <0> A 0.5000, B 0.2500, −0.2500"
    assert seen["pairs"] == [["A", "B"], ["truth", "A"], ["truth", "B"], ["image", "truth"]]
    assert seen["overlay"] == ["hidden", "visible"]
    assert seen["key"] == ["only A is right", "only B is right", "both are wrong, and differ"]
    assert len(seen["alts"]) == 5 and all(alt.endswith("of image <0>") for alt in seen["alts"])
