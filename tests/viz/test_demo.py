"""The page of `segjax demo`, in a browser if there is one."""

import json

import numpy as np
import pytest

from segjax.data import specs
from segjax.viz import demo
from tests.viz.test_report import CHROMIUM, decoded, seen_by

NAMES = ("road", "</script><b>sky", "nothing")
SPEC = specs.DatasetSpec("noise", NAMES, ((128, 64, 128), (70, 130, 180), (0, 0, 0)), 255)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (30, 50, 3), dtype=np.uint8)
LABELS = (RNG.random((30, 50)) < 0.25).astype(np.uint8)
CONFIDENCE = np.where(LABELS == 1, 51, 204).astype(np.uint8)
ANSWER = demo.answer(IMAGE, LABELS, CONFIDENCE, SPEC)
TIMES = {"size": [30, 50], "given_size": [60, 100], "seconds": 0.1234, "compiled_seconds": 3.21}


def test_an_answer_has_coloured_pixels_and_classes_sorted_by_size():
    np.testing.assert_array_equal(decoded(ANSWER["labels"])[..., ::-1], np.array(SPEC.colors, np.uint8)[LABELS])
    np.testing.assert_array_equal(decoded(ANSWER["confidence"])[..., 0], CONFIDENCE)
    share = LABELS.mean()
    assert [entry["class"] for entry in ANSWER["classes"]] == list(NAMES[:2])
    assert [entry["share"] for entry in ANSWER["classes"]] == pytest.approx([1 - share, share])
    assert [entry["confidence"] for entry in ANSWER["classes"]] == pytest.approx([0.8, 0.2])
    assert ANSWER["mean_confidence"] == pytest.approx(0.8 * (1 - share) + 0.2 * share)


def test_a_model_that_gives_only_labels_has_no_confidence():
    answer = demo.answer(IMAGE, LABELS, None, SPEC)
    assert answer["confidence"] is answer["mean_confidence"] is answer["classes"][0]["confidence"] is None


def test_images_of_other_dtypes_are_shown_and_large_ones_reduced():
    image = RNG.integers(0, 4000, (40, 3200, 5)).astype(np.uint16)
    answer = demo.answer(image, np.zeros((40, 3200), np.uint16), None, SPEC)
    assert decoded(answer["picture"]).shape == (20, 1600, 3) and decoded(answer["labels"]).shape == (20, 1600, 3)


VISIT = """
const seen = {}, $ = (s) => [...document.querySelectorAll(s)];
seen.title = [document.title, $("#title")[0].textContent, $("#facts")[0].innerText];
seen.before = $("#result")[0].getClientRects().length;
show(ANSWER, "<i>photo.png");
seen.status = $("#status")[0].textContent;
seen.means = $("#means")[0].innerText;
seen.rows = $("#classes tbody tr").map((row) => [...row.children].map((cell) => cell.textContent));
seen.colors = $("#classes .swatch").map((swatch) => getComputedStyle(swatch).backgroundColor);
seen.layer = [$("#layer")[0].src === ANSWER.labels];
$("[data-layer=confidence]")[0].click(); seen.layer.push($("#layer")[0].src === ANSWER.confidence);
seen.alt = [$("#picture")[0].alt, $("#layer")[0].alt];
const opacity = () => getComputedStyle($("#layer")[0]).opacity;
seen.opacity = [opacity()];
$("#opacity")[0].value = 20; $("#opacity")[0].dispatchEvent(new Event("input")); seen.opacity.push(opacity());
seen.covers = [$("#picture")[0], $("#layer")[0]].map((image) => JSON.stringify(image.getBoundingClientRect()));
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
send(new Blob([new Uint8Array(33 * 2 ** 20)]), "large.tif");
seen.refused = [$("#status")[0].textContent, $("#status")[0].className];
seen.kept = $("#result")[0].getClientRects().length;
const nothing = { confidence: null, mean_confidence: null, compiled_seconds: null };
show({ ...ANSWER, ...nothing, given_size: ANSWER.size }, "next.png");
const tools = $("#layers")[0].getClientRects().length;
seen.plain = [$("#status")[0].textContent, tools, $("#layer")[0].src === ANSWER.labels];
seen.code = $("b:not(.drop b), i").length;
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine to open the page with")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_an_answer(width, tmp_path):
    page = tmp_path / "demo.html"
    page.write_text(demo.page("a <model>", {"checkpoint": "runs/<a>"}))
    answer = json.dumps(ANSWER | TIMES).replace("<", "\\u003c")
    seen = seen_by(page, f"const ANSWER = {answer};{VISIT}", tmp_path, f"--window-size={width},900")
    assert seen["title"] == ["a <model>", "a <model>", "checkpoint\nruns/<a>"] and seen["before"] == 0
    assert seen["status"] == "<i>photo.png: 100 × 60 pixels, resized to 50 × 30; compiled once for this size, in 3.2 s"
    share = LABELS.mean()
    assert f"{80 - 60 * share:.1f} %" in seen["means"] and "0.12 s" in seen["means"]
    shares = [f"{100 * (1 - share):.1f} %", f"{100 * share:.1f} %"]
    assert seen["rows"] == [[NAMES[0], shares[0], "80.0 %"], [NAMES[1], shares[1], "20.0 %"]]
    assert seen["colors"] == ["rgb(128, 64, 128)", "rgb(70, 130, 180)"] and seen["code"] == 0
    assert seen["layer"] == [True, True] and seen["opacity"] == ["0.55", "0.2"]
    assert seen["alt"] == ["<i>photo.png", "confidence of the prediction"] and seen["wide"] <= 0
    assert len(set(seen["covers"])) == 1
    assert seen["refused"] == ["large.tif: has 33.0 MiB; the most is 32.0 MiB", "wrong"] and seen["kept"] == 1
    assert seen["plain"] == ["next.png: 50 × 30 pixels", 0, True]
