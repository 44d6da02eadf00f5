"""`segjax.audit_dataset` against its definition, with scipy's connected components."""

import csv
import json

import numpy as np
import pytest
import scipy.ndimage

import segjax
from segjax.data import specs
from segjax.data.open import OpenSplit
from segjax.inference import audit
from tests.inference.test_exported import MEAN, STD, file_of
from tests.pixels import BINARY, SPEC, Pixels, scene


def split_of(seed, model, number, size, spec=SPEC):
    """The labels that the model predicts, except in some rectangles."""
    rng = np.random.default_rng(seed)
    classes = max(spec.num_classes, 2)
    images = np.stack([scene(seed + i, *size) for i in range(number)])
    labels = np.stack([model.labels(image) for image in images])
    for label in labels[: number - 1]:
        for _ in range(4):
            top, left = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 9)
            label[top : top + 6, left : left + 9] = rng.integers(0, classes)
        label[: rng.integers(1, 5), :11] = 255
    split = specs.Split(images, labels, np.tile(np.int32(size), (number, 1)), tuple(f"{i}" for i in range(number)))
    return OpenSplit(split, spec, lambda: np.bincount(labels[labels != 255], minlength=classes))


def probabilities_of(model, image, scales=1):
    scores = model.scores(image)
    if scores.shape[-1] == 1:
        return np.concatenate([1 - 1 / (1 + np.exp(-scores)), 1 / (1 + np.exp(-scores))], axis=-1)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def expected_regions(model, opened):
    """By the definition, with scipy's components of four neighbours."""
    found = []
    for name, image, truth in zip(opened.data.names, opened.data.images, opened.data.labels, strict=True):
        probabilities = probabilities_of(model, image)
        predicted = probabilities.argmax(axis=-1)
        given = np.take_along_axis(probabilities, np.minimum(truth, probabilities.shape[-1] - 1)[..., None], -1)[..., 0]
        for k, word in enumerate(opened.spec.label_names):
            components, number = scipy.ndimage.label((truth == k) & (predicted != k))
            for component in range(1, number + 1):
                where = components == component
                rows, columns = np.nonzero(where)
                pixels = int(where.sum())
                nll = np.minimum(-np.log(given[where]), 16).mean()
                box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
                found.append(
                    {
                        "image": name,
                        "given": word,
                        "predicted": opened.spec.label_names[np.bincount(predicted[where]).argmax()],
                        "box": [int(side) for side in box],
                        "pixels": pixels,
                        "score": nll * pixels / (pixels + truth.size / 2000),
                        "confidence": probabilities.max(axis=-1)[where].mean(),
                    }
                )
    return sorted(found, key=lambda region: -region["score"])


@pytest.mark.parametrize("seed, spec", [(0, SPEC), (1, SPEC), (2, BINARY)])
@pytest.mark.parametrize("settings", [{"batch": 3}, {"mode": "slide", "crop": (24, 32), "batch": 2}])
def test_regions_match_their_definition(seed, spec, settings):
    model = Pixels(spec.num_classes, seed)
    opened = split_of(seed, model, 4, (45, 281), spec)
    found, expected = segjax.audit_dataset(model, opened, **settings), expected_regions(model, opened)
    assert len(found) == len(expected) > 5
    assert [region["score"] for region in found] == sorted((region["score"] for region in found), reverse=True)
    # Scores may be equal but for rounding.
    by_place = {(region["image"], region["given"], *region["box"]): region for region in found}
    for region in expected:
        own = by_place.pop((region["image"], region["given"], *region["box"]))
        assert (own["pixels"], own["predicted"]) == (region["pixels"], region["predicted"])
        assert own["score"] == pytest.approx(region["score"], abs=2e-3)
        assert own["confidence"] == pytest.approx(region["confidence"], abs=1e-4)
    assert by_place == {}


def test_only_the_first_regions_are_kept_in_any_order_of_images(monkeypatch, tmp_path):
    model = Pixels(5, 3)
    opened = split_of(3, model, 5, (40, 60))
    everything = segjax.audit_dataset(model, opened)
    monkeypatch.setattr(audit, "LISTED", 7)
    monkeypatch.setattr(audit, "SHOWN", 3)
    assert segjax.audit_dataset(model, opened) == everything[:7] and len(everything) > 9
    turned = OpenSplit(specs.Split(*(part[::-1] for part in opened.data)), opened.spec, opened.pixel_counts)
    assert segjax.audit_dataset(model, turned, output=tmp_path) == everything[:7]
    written = json.loads((tmp_path / "regions.json").read_text())
    assert written["regions"] == everything[:7] and written["data"]["images"] == 5
    with (tmp_path / "regions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [region["image"] for region in everything[:7]]
    for row, region in zip(rows, everything, strict=False):
        assert [int(row[side]) for side in ("left", "top", "width", "height")] == region["box"]
        assert float(row["score"]) == region["score"] and row["given"] == region["given"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "regions.csv", "regions.json"]


def test_masks_that_the_model_agrees_with_give_no_region(tmp_path, capsys):
    model = Pixels(5, 1)
    images = np.stack([scene(seed, 30, 44) for seed in range(2)])
    labels = np.stack([model.labels(image) for image in images])
    opened = OpenSplit(specs.Split(images, labels, np.tile(np.int32((30, 44)), (2, 1)), ("a", "b")), SPEC, lambda: [])
    assert segjax.audit_dataset(model, opened, output=tmp_path) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "data, settings, words",
    [
        ("mars", {}, "no dataset 'mars'"),
        (split_of(0, Pixels(1), 4, (18, 19), BINARY), {}, "the model has 5 classes, but one has 1"),
        (split_of(0, Pixels(5), 4, (18, 19)), {"data_dir": "x"}, "data that is given by its name"),
        (split_of(0, Pixels(5), 4, (18, 19)), {"threshold": 0.3}, "a threshold needs a model of one class"),
        (split_of(0, Pixels(5), 4, (18, 19)), {"output": __file__}, "cannot be written to"),
    ],
)
def test_impossible_audits_are_refused_with_the_reason(data, settings, words):
    with pytest.raises(ValueError, match=words):
        segjax.audit_dataset(Pixels(5), data, **settings)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_exported_file_is_audited_at_a_temperature(temperature, tmp_path):
    model, cooled = Pixels(5, 6), Pixels(5, 6)
    cooled.kernel[...] = cooled.kernel[...] / temperature
    opened = split_of(2, model, 4, (40, 56))
    path = file_of(tmp_path / "a.stablehlo", model)
    found = segjax.audit_dataset(path, opened, mean=MEAN, std=STD, temperature=temperature, output=tmp_path / "out")
    expected = {(region["image"], *region["box"]): region["score"] for region in expected_regions(cooled, opened)}
    assert {(region["image"], *region["box"]): region["score"] for region in found} == pytest.approx(expected, abs=2e-3)
    assert len(found) == len(expected) > 5
    assert json.loads((tmp_path / "out/regions.json").read_text())["checkpoint"] == str(path)


def test_a_file_that_gives_labels_is_refused(tmp_path):
    model = Pixels(5, 6)
    path = file_of(tmp_path / "a.stablehlo", model, gives="labels", metadata={"classes": list(SPEC.class_names)})
    with pytest.raises(ValueError, match="gives labels, and an audit needs scores"):
        segjax.audit_dataset(path, split_of(2, model, 4, (40, 56)), mean=MEAN, std=STD)
