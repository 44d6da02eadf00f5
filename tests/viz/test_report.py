"""The files of a report against the counts that they are made from; the page in a browser, if there is one."""

import base64
import csv
import errno
import html
import json
import math
import os
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from segjax import metrics
from segjax.data import specs
from segjax.viz import report
from tests.runs import contents

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The third occurs nowhere; a name could end the script or be taken for a tag.
NAMES = ("road", "</script><b>sky", "nothing", 'a "quoted" & car')
SPEC = specs.DatasetSpec("noise", NAMES, ((128, 64, 128), (70, 130, 180), (0, 0, 0), (0, 0, 142)), 255)
FACTS = {"checkpoint": "runs/x", "protocol": "whole images"}


def make_shown(seed, size, labels=(0, 1, 3)):
    rng = np.random.default_rng(seed)
    truth = cv2.resize(rng.choice([*labels, 255], (4, 6)).astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    predicted = np.where(rng.random(size) < 0.7, np.minimum(truth, 3), rng.choice(labels, size)).astype(np.uint8)
    return report.Shown(f"image {seed}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), truth, predicted)


def count(shown, num_classes=4):
    return metrics.confusion_matrix(shown.truth, shown.predicted, num_classes=num_classes, ignore_label=255)


SHOWN = [make_shown(0, (40, 64)), make_shown(1, (900, 300)), make_shown(2, (40, 64), labels=(0, 1))]
CONFUSION = sum(map(count, SHOWN))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    report.write(
        folder,
        CONFUSION,
        SPEC,
        SHOWN,
        title="a <model>",
        facts=FACTS,
        metadata={"step": 7, "checkpoint": "x"},
        details={"calibration": CALIBRATION},
    )
    return folder


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_by_class_match_sets_of_pixels(seed):
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, 3, 500), rng.integers(0, 4, 500)
    table = metrics.by_class(metrics.confusion_matrix(truth, guess, num_classes=5, ignore_label=255))
    for k in range(3):
        hits, here, said = np.sum((truth == k) & (guess == k)), np.sum(truth == k), np.sum(guess == k)
        assert math.isclose(table["iou"][k], hits / np.sum((truth == k) | (guess == k)))
        assert math.isclose(table["recall"][k], hits / here) and table["accuracy"][k] == table["recall"][k]
        assert math.isclose(table["precision"][k], hits / said)
        harmonic = 2 / (1 / table["recall"][k] + 1 / table["precision"][k])
        assert math.isclose(table["dice"][k], harmonic) and table["pixels"][k] == here
    # 3 is predicted and never true, 4 neither.
    assert [table[name][3] for name in report.COLUMNS] == [0.0, None, 0.0, None, 0.0, 0]
    assert [table[name][4] for name in report.COLUMNS] == [None, None, None, None, None, 0]


def test_results_contain_their_origin_and_all_figures(folder):
    results = json.loads((folder / "results.json").read_text())
    table = metrics.by_class(CONFUSION)
    assert (results["step"], results["checkpoint"]) == (7, "x")
    assert {key: results[key] for key in ("mean_iou", "pixel_accuracy", "per_class_iou")} == metrics.summarise(
        CONFUSION
    )
    assert results["mean_accuracy"] == np.mean([value for value in table["accuracy"] if value is not None])
    assert [entry["class"] for entry in results["classes"]] == list(NAMES)
    assert [entry["precision"] for entry in results["classes"]] == table["precision"]
    own = [metrics.summarise(count(shown))["mean_iou"] for shown in SHOWN]
    assert results["worst_images"] == [
        {"name": shown.name, "mean_iou": iou, "picture": f"worst/{place:02d}.png"}
        for place, (shown, iou) in enumerate(zip(SHOWN, own, strict=True), start=1)
    ]
    for place in (1, 2, 3):
        assert cv2.imread(str(folder / f"worst/{place:02d}.png")).shape[1] == 1260


def test_further_measures_are_in_the_results_and_their_means_on_the_page(tmp_path):
    details = {"mean_boundary_iou": 0.125, "per_class_boundary_iou": [0.125, None, 0.125, 0.125], "image_iou": None}
    details |= {"class_iou": 0.375, "worst_image_iou": 0.0625, "mean_iou_interval": [0.25, 0.5]}
    report.write(tmp_path, CONFUSION, SPEC, SHOWN[:1], title="t", facts=FACTS, metadata={}, details=details)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {key: results[key] for key in details} == details
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for words in ('["mean boundary IoU",0.125]', '["mean IoU of an image",null]', "mean IoU 0.2500 to 0.5000"):
        assert words in page


CALIBRATION = {"ece": 0.0625, "adaptive_ece": 0.125, "brier": 0.5, "nll": 0.75, "aurc": 0.03125}
CALIBRATION |= {"error_auroc": 0.875, "error_average_precision": None, "error_fpr95": 0.25}
EMPTY = {"pixels": 0, "confidence": None, "accuracy": None}
CALIBRATION["reliability"] = [EMPTY] * 12 + [
    {"pixels": 1000, "confidence": 0.83, "accuracy": 0.6},
    {"pixels": 1000, "confidence": 0.9, "accuracy": 0.95},
    {"pixels": 6000, "confidence": 0.97, "accuracy": 0.0},
]


def test_calibration_is_in_the_results_and_on_the_page(tmp_path):
    arguments = dict(title="t", facts=FACTS, metadata={})
    report.write(tmp_path, CONFUSION, SPEC, SHOWN[:1], **arguments, details={"calibration": CALIBRATION})
    assert json.loads((tmp_path / "results.json").read_text())["calibration"] == CALIBRATION
    found = page_data(tmp_path)["calibration"]
    assert [figure for _, figure in found["figures"]] == [CALIBRATION[key] for key in report.CALIBRATION]
    assert found["text"] == (
        "Reliability diagram. Bins of pixels from the lowest confidence: confidence 0.83, accuracy 0.60; "
        "confidence 0.90, accuracy 0.95; confidence 0.97, accuracy 0.00."
    )
    nothing = CALIBRATION | {"ece": None, "reliability": [EMPTY] * 15}
    for details in ({}, {"calibration": nothing}):
        report.write(tmp_path, CONFUSION, SPEC, SHOWN[:1], **arguments, details=details)
        assert page_data(tmp_path)["calibration"] is None


def test_tables_are_read_back_as_written(folder):
    with (folder / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = metrics.by_class(CONFUSION)
    assert [row["class"] for row in rows] == list(NAMES)
    for column in report.COLUMNS:
        assert [float(row[column]) if row[column] else None for row in rows] == table[column]
    with (folder / "confusion.csv").open(newline="") as file:
        header, *body = csv.reader(file)
    assert header[1:] == [row[0] for row in body] == list(NAMES)
    np.testing.assert_array_equal([[int(value) for value in row[1:]] for row in body], CONFUSION)


KINDS = {
    "blur": {"mean_iou": 0.25, "severities": [0.5, 0.25, 0.25, 0.125, 0.125]},
    "<b>jpeg": {"mean_iou": None, "severities": [None] * 5},
}


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine to open the page with")
def test_the_page_has_a_table_of_corruptions_only_if_evaluated(tmp_path):
    details = {"corruptions": {"mean_iou": 0.25, "relative": 0.5, "kinds": KINDS}}
    visit = r"""
    const seen = {}, section = document.getElementById("corrupted");
    seen.hidden = section.hidden; seen.text = section.innerText;
    seen.rows = [...section.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    """
    for name, given in (("without", {}), ("with", details)):
        folder = tmp_path / name
        report.write(folder, CONFUSION, SPEC, SHOWN[:1], title="t", facts=FACTS, metadata={}, details=given)
        seen = seen_by(folder / "index.html", visit, folder, "--window-size=390,900")
        assert seen["hidden"] == (name == "without") and seen["wide"] <= 0
    assert json.loads((folder / "results.json").read_text())["corruptions"] == details["corruptions"]
    assert "Mean over kinds and severities: 0.2500, 50.0 % of that without." in seen["text"]
    assert seen["rows"] == [
        ["Corruption", "Mean", "1", "2", "3", "4", "5"],
        ["blur", "0.2500", "0.5000", "0.2500", "0.2500", "0.1250", "0.1250"],
        ["<b>jpeg", *["–"] * 6],
    ]


@pytest.mark.parametrize("num_classes", [1, 150])
def test_a_matrix_of_any_size_is_drawn_including_classes_without_pixels(num_classes, tmp_path):
    spec = specs.DatasetSpec("k", tuple(f"class {k}" for k in range(num_classes)), ((9, 9, 9),) * num_classes, 255)
    classes = max(num_classes, 2)
    confusion = np.random.default_rng(0).integers(0, 50, (classes, classes)) + 500 * np.eye(classes, dtype=int)
    confusion[1] = 0
    report.write(tmp_path, confusion, spec, [], title="t", facts={}, metadata={})
    drawn = cv2.imread(str(tmp_path / "confusion.png"))
    assert min(drawn.shape[:2]) > 300 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20
    assert json.loads((tmp_path / "results.json").read_text())["worst_images"] == []


def test_a_report_replaces_an_older_one_and_nothing_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = dict(title="t", facts={}, metadata={})
    report.write(tmp_path, CONFUSION, SPEC, SHOWN, **arguments)
    (tmp_path / "worst" / "mine.png").write_text("mine")
    report.write(tmp_path, CONFUSION, SPEC, SHOWN[:1], **arguments)
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == ["01.png", "mine.png"]
    files = {"classes.csv", "confusion.csv", "confusion.png", "index.html", "notes.txt", "results.json", "worst"}
    assert {path.name for path in tmp_path.iterdir()} == files


def test_a_report_that_fails_while_replacing_leaves_the_older_page_intact(tmp_path, monkeypatch):
    arguments = dict(facts={}, metadata={})
    report.write(tmp_path, CONFUSION, SPEC, SHOWN[:1], title="first", **arguments)
    before = (tmp_path / "index.html").read_bytes()
    replace = os.replace

    def torn_down(temporary, path):
        if path.name == "index.html":
            raise OSError("power cut")
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", torn_down)
    with pytest.raises(OSError, match="power cut"):
        report.write(tmp_path, CONFUSION, SPEC, SHOWN[:1], title="second", **arguments)
    assert (tmp_path / "index.html").read_bytes() == before


def test_a_report_that_fails_while_writing_leaves_all_older_files(tmp_path, monkeypatch):
    arguments = dict(facts={}, metadata={})
    report.write(tmp_path, CONFUSION, SPEC, SHOWN[:1], title="first", **arguments)
    before = contents(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report.pictures, "save_prediction", full)
    with pytest.raises(OSError, match="No space left") as caught:
        report.write(tmp_path, 2 * CONFUSION, SPEC, SHOWN[:1], title="second", **arguments)
    assert caught.value.filename == str(tmp_path / "index.html") and contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------ the page


def page_data(folder):
    text = (folder / "index.html").read_text()
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(inside)


def decoded(uri):
    return cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_UNCHANGED)


def test_the_page_loads_nothing_from_elsewhere(folder):
    text = (folder / "index.html").read_text()
    without_pictures = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", without_pictures))
    # The names of a language, which no browser asks a server for.
    assert addresses <= {"http://www.w3.org/1999/xhtml"}
    links = set(re.findall(r'(?:src|href)="([^"]*)"', without_pictures))
    assert links == {"results.json", "classes.csv", "confusion.csv", "confusion.png", "worst/"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<link", without_pictures)
    assert "prefers-color-scheme: dark" in text


def test_pictures_of_the_page_are_in_the_colours_of_the_classes(folder):
    data = page_data(folder)
    for entry, shown in zip(data["images"], SHOWN, strict=True):
        factor = min(1, report.LARGEST_SIDE / max(shown.truth.shape))
        size = tuple(round(side * factor) for side in shown.truth.shape)
        layers = {name: decoded(entry[name]) for name in ("image", "truth", "prediction", "errors")}
        assert {layer.shape[:2] for layer in layers.values()} == {size}
        assert {int(k) for k in entry["ious"]} == set(np.unique(count(shown).nonzero()).tolist())
        if factor < 1:
            continue
        palette = np.zeros((256, 3), np.uint8)
        palette[:4] = SPEC.colors
        ignored = shown.truth == 255
        np.testing.assert_array_equal(layers["truth"][..., ::-1], palette[shown.truth])
        np.testing.assert_array_equal(layers["prediction"][~ignored][:, ::-1], palette[shown.predicted[~ignored]])
        assert not layers["prediction"][ignored].any()
        wrong = (shown.truth != shown.predicted) & ~ignored
        np.testing.assert_array_equal(layers["errors"][..., 3] > 0, wrong)
        assert 0 < wrong.mean() < 1
    assert len(json.dumps(data)) < 3e6


# What a person would do, and what can be seen after it.
VISIT = r"""
const seen = {}, $ = (s) => [...document.querySelectorAll(s)];
const column = (n) => $(`#classes tbody tr td:nth-child(${n})`).map((cell) => cell.textContent);
const press = (n) => $("#classes th button")[n - 1].click();
const visible = () => $("#gallery figure").filter((figure) => figure.getClientRects().length);
const shown = () => visible().map((figure) => figure.querySelector("figcaption").textContent);
seen.title = [document.title, $("h1")[0].textContent];
seen.text = $("header")[0].innerText;
seen.names = column(1);
press(2); seen.ascending = column(2);
press(2); seen.descending = column(2);
seen.arrow = $("#classes th").map((head) => head.getAttribute("aria-sort"));
press(6); seen.pixels = column(6);
press(1); seen.sorted_names = column(1);
seen.cells = $("#matrix rect.cell").length;
seen.heights = ["#matrix text", "h2"].map((what) => $(what)[0].getBoundingClientRect().height);
const drawn = (kind) => $(`#reliability .${kind}`).map((rect) => Number(rect.getAttribute("height")));
seen.reliability = ["right", "gap", "share"].map(drawn);
seen.diagram = [$("#reliability")[0].getAttribute("aria-label"), $("#reliability")[0].getBoundingClientRect().width];
seen.calibrated = $("#calibrated dd").map((cell) => cell.textContent);
seen.confused = $("#confused li").map((item) => item.textContent);
const figure = $("#gallery figure")[0], input = figure.querySelector("input");
const look = (layer) => getComputedStyle(figure.querySelector("." + layer));
const pull = (value) => { input.value = value; input.dispatchEvent(new Event("input")); return look("left").clipPath; };
seen.slider = Object.fromEntries([0, 25, 50, 100].map((value) => [value, pull(value)]));
seen.width = figure.querySelector(".view").getBoundingClientRect().width;
// What is seen a quarter of the way in from the left, and from the right.
const sides = () => {
  figure.scrollIntoView();
  const box = figure.querySelector(".view").getBoundingClientRect();
  const at = (share) => document.elementFromPoint(box.left + share * box.width, box.top + box.height / 2);
  return [0.25, 0.75].map((share) => at(share).className.split(" ")[0]);
};
pull(50); seen.pairs = [sides()];
for (const button of $("#pairs button")) {
  button.click();
  seen.pairs.push([...sides(), figure.querySelector(".sides").innerText.split("\n").filter(Boolean)]);
}
seen.layers = figure.querySelectorAll("img").length;
const errors = () => getComputedStyle(figure.querySelector(".errors")).visibility;
seen.errors = [errors()]; $("#errors")[0].click(); seen.errors.push(errors());
const choose = $("#filter")[0];
seen.options = [...choose.options].map((option) => option.textContent);
seen.unfiltered = shown();
choose.value = "3"; choose.dispatchEvent(new Event("change"));
seen.filtered = shown(); seen.note = $("#shown")[0].textContent;
choose.value = ""; choose.dispatchEvent(new Event("change")); seen.again = shown();
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.loaded = $("#gallery img").every((image) => image.naturalWidth > 0);
seen.bold = $("b").length;
"""


def browse(page, *arguments):
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000")
    command = [CHROMIUM, *flags, f"--user-data-dir={page.parent / 'profile'}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def seen_by(page, visit, folder, *flags):
    """What a script has put into `seen`, in a page that a browser has opened; a copy of it lies in the folder."""
    copy = folder / "page.html"
    script = f'<script>window.onload = () => {{ {visit} document.body.innerHTML = ""; '
    script += 'document.body.append(Object.assign(document.createElement("pre"), '
    script += '{id: "seen", textContent: JSON.stringify(seen)})); }</script>'
    copy.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    dom = browse(copy, "--dump-dom", *flags)
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(seen))


@pytest.fixture(scope="module")
def visited(folder, tmp_path_factory):
    """What a visit of the page has seen."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine to open the page with")
    return seen_by(folder / "index.html", VISIT, tmp_path_factory.mktemp("visit"), "--window-size=1200,900")


def figures(column):
    """As the page writes them."""
    return ["–" if value is None else f"{value:.4f}" for value in metrics.by_class(CONFUSION)[column]]


def test_names_are_shown_literally_and_never_as_code(visited):
    assert visited["title"] == ["a <model>"] * 2
    assert visited["names"] == list(NAMES) and visited["bold"] == 0
    assert "runs/x" in visited["text"] and f"{metrics.summarise(CONFUSION)['mean_iou']:.4f}" in visited["text"]


def test_the_diagram_has_a_bar_for_each_bin_with_pixels(visited):
    right, gap, share = visited["reliability"]
    np.testing.assert_allclose(right, [280 * 0.6, 280 * 0.95, 0])
    np.testing.assert_allclose(gap, [280 * 0.23, 280 * 0.05, 280 * 0.97])
    np.testing.assert_allclose(share, [5, 5, 30])
    text, width = visited["diagram"]
    assert "confidence 0.83, accuracy 0.60" in text and width > 200
    assert visited["calibrated"] == ["0.0625", "0.1250", "0.5000", "0.7500", "0.0313", "0.8750", "–", "0.2500"]


def test_a_column_is_sorted_either_way_with_missing_figures_last(visited):
    known = sorted(value for value in figures("iou") if value != "–")
    assert visited["ascending"] == [*known, "–"]
    assert visited["descending"] == [*known[::-1], "–"]
    assert visited["arrow"] == [None, "descending", None, None, None, None]
    pixels = sorted(metrics.by_class(CONFUSION)["pixels"])
    assert visited["pixels"] == [f"{value:,}" for value in pixels]
    assert sorted(visited["sorted_names"]) == sorted(NAMES) and visited["sorted_names"] != list(NAMES)


def test_the_matrix_has_a_cell_for_every_pair_and_names_the_worst(visited):
    assert visited["cells"] == np.count_nonzero(CONFUSION)
    wrong = CONFUSION - np.diag(np.diag(CONFUSION))
    truth, guess = np.unravel_index(wrong.argmax(), wrong.shape)
    share = 100 * wrong.max() / wrong.sum()
    assert visited["confused"][0].startswith(f"{NAMES[truth]} → {NAMES[guess]}")
    assert float(re.search(r"([\d.]+) %$", visited["confused"][0]).group(1)) == pytest.approx(share, abs=0.06)
    assert len(visited["confused"]) == np.count_nonzero(wrong)


def test_the_names_next_to_a_small_matrix_are_smaller_than_a_heading(visited):
    name, heading = visited["heights"]
    assert 8 < name < heading


def test_the_line_between_two_pictures_follows_the_slider(visited):
    right = {}
    for stop, path in visited["slider"].items():
        # From the right side, as the browser has worked it out: a share of the width and pixels.
        share, sign, pixels = re.search(r"([\d.]+)%(?: ([+-]) ([\d.]+)px)?", path).groups()
        right[int(stop)] = float(share) / 100 * visited["width"] + float(f"{sign or '+'}{pixels or 0}")
    width = visited["width"]
    assert width > 200
    assert right == pytest.approx({stop: width - 8 - (width - 16) * stop / 100 for stop in (0, 25, 50, 100)}, abs=0.5)


def test_a_picture_compares_any_two_of_image_truth_and_prediction(visited):
    pairs = [["image", "truth"], ["truth", "prediction"], ["image", "prediction"]]
    # Of each the two layers that are on top, and what is written below them.
    assert visited["pairs"] == [pairs[1], *([*pair, pair] for pair in pairs)]
    assert visited["errors"] == ["hidden", "visible"]
    assert visited["layers"] == 4 and visited["loaded"] and visited["wide"] == 0


def test_the_filter_shows_the_images_of_a_class_with_its_iou(visited):
    assert visited["options"] == ["any", "road (3)", "</script><b>sky (3)", 'a "quoted" & car (2)']
    assert len(visited["unfiltered"]) == 3 and visited["again"] == visited["unfiltered"]
    ious = [metrics.summarise(count(shown))["per_class_iou"][3] for shown in SHOWN[:2]]
    expected = [f"{shown.name}IoU {iou:.4f}" for shown, iou in zip(SHOWN, ious, strict=False)]
    assert visited["filtered"] == expected
    assert visited["note"].startswith("2 of 3")


HOSTILE = (
    "</script><script>alert(1)",
    "<!--",
    "&amp;",
    "\u2028",
    "\u202eevil",
    "a\nb",
    "\udc80",
    "x" * 5000,
    "$x^$",
    "道路",
)


def test_hostile_names_cannot_break_the_page_or_the_tables(tmp_path):
    number = len(HOSTILE)
    spec = specs.DatasetSpec("noise", HOSTILE, ((9, 9, 9),) * number, 255)
    shown = [make_shown(seed, (30, 50), labels=(0, 1, 3))._replace(name=name) for seed, name in enumerate(HOSTILE)]
    confusion = sum(count(one, number) for one in shown)
    report.write(tmp_path, confusion, spec, shown, title=HOSTILE[0], facts={"checkpoint": HOSTILE[4]}, metadata={})
    data, text = page_data(tmp_path), (tmp_path / "index.html").read_text()
    assert text.count("<script") == 2 and "\u2028" not in text
    names = [entry["class"] for entry in data["classes"]] + [image["name"] for image in data["images"]]
    for name in (*names, data["title"], *dict(data["facts"]).values()):
        assert name.isprintable() and len(name) <= 100
    assert names[:number] == names[number:] and names[4] == "\\u202eevil" and names[-1] == "道路"
    with (tmp_path / "classes.csv").open(newline="") as file:
        read = [row["class"] for row in csv.DictReader(file)]
    assert read == [name.replace("\udc80", "\\udc80") for name in HOSTILE]
    assert [entry["class"] for entry in json.loads((tmp_path / "results.json").read_text())["classes"]] == list(HOSTILE)
