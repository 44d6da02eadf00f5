"""`segjax.compare_models` against NumPy, and the models that it refuses."""

import json
import logging

import numpy as np
import pytest

import segjax
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.data import specs
from segjax.data.open import OpenSplit
from tests.inference.test_exported import MEAN, STD, file_of
from tests.pixels import BINARY, SPEC, Pixels, scene
from tests.tiny import tiny_model


def split_of(seed, number, size, spec=SPEC):
    """Labels that are the first model's in a part of the pixels, so that the models are not equally bad."""
    rng = np.random.default_rng(seed)
    classes = max(spec.num_classes, 2)
    images = np.stack([scene(seed + i, *size) for i in range(number)])
    labels = np.stack([Pixels(spec.num_classes, seed).labels(image) for image in images])
    labels = np.where(rng.random(labels.shape) < 0.4, labels, rng.integers(0, classes, labels.shape)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 255
    labels[2] = 255
    split = specs.Split(images, labels, np.tile(np.int32(size), (number, 1)), tuple(f"{i}" for i in range(number)))
    return OpenSplit(split, spec, lambda: np.bincount(labels[labels != 255], minlength=classes))


def mean_of(ious):
    return float(np.mean([iou for iou in ious if iou is not None]))


def ious_of(truth, predicted, classes):
    valid = truth != 255
    found = []
    for k in range(classes):
        either = ((truth == k) | (predicted == k)) & valid
        found.append(((truth == k) & (predicted == k)).sum() / either.sum() if either.any() else None)
    return found


@pytest.mark.parametrize("seed, spec", [(0, SPEC), (1, SPEC), (2, BINARY)])
@pytest.mark.parametrize("settings", [{"batch": 3}, {"mode": "slide", "crop": (24, 32), "batch": 2}])
def test_the_report_has_both_models_figures_and_the_most_differing_images(seed, spec, settings):
    opened, classes = split_of(seed, 13, (33, 41), spec), max(spec.num_classes, 2)
    models = [Pixels(spec.num_classes, seed + place) for place in (0, 5)]
    found = segjax.compare_models(*models, opened, **settings)
    images, truth = opened.data.images, opened.data.labels
    a, b = (np.stack([model.labels(image) for image in images]) for model in models)
    valid = truth != 255
    for key, model, predicted in (("a", models[0], a), ("b", models[1], b)):
        ious = ious_of(truth, predicted, classes)
        np.testing.assert_allclose([entry[f"iou_{key}"] for entry in found["classes"]], ious, rtol=1e-12)
        assert found[f"mean_iou_{key}"] == pytest.approx(mean_of(ious), rel=1e-12)
        assert found[f"mean_iou_{key}"] == segjax.evaluate_dataset(model, opened, **settings)["mean_iou"]
    assert found["difference"] == pytest.approx(found["mean_iou_b"] - found["mean_iou_a"]) and found["difference"] < 0
    low, high = found["difference_interval"]
    assert low < found["difference"] < high < 0
    assert found["differing_pixels"] == pytest.approx((a != b)[valid].mean(), rel=1e-12)
    assert [entry["class"] for entry in found["classes"]] == list(spec.label_names)
    assert [entry["pixels"] for entry in found["classes"]] == [(truth == k).sum() for k in range(classes)]
    for entry in found["classes"]:
        assert entry["interval"][0] <= entry["difference"] <= entry["interval"][1]
    own = {}
    for number in range(13):
        pair = [ious_of(truth[number], predicted[number], classes) for predicted in (a, b)]
        if valid[number].any():
            own[str(number)] = [mean_of(ious) for ious in pair]
    order = sorted(own, key=lambda name: (-abs(own[name][1] - own[name][0]), int(name)))
    assert [image["name"] for image in found["images"]] == order[:10]
    for image in found["images"]:
        pair = own[image["name"]]
        assert (image["mean_iou_a"], image["mean_iou_b"]) == pytest.approx(pair, rel=1e-12)
        assert image["difference"] == pytest.approx(pair[1] - pair[0], abs=1e-12)


def test_a_model_does_not_differ_from_itself(tmp_path):
    opened = split_of(0, 4, (20, 28))
    found = segjax.compare_models(Pixels(5), Pixels(5), opened, output=tmp_path)
    assert (found["difference"], found["difference_interval"], found["differing_pixels"]) == (0, [0, 0], 0)
    assert found["images"] == [] and {entry["difference"] for entry in found["classes"]} == {0}


def test_a_report_is_written_only_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opened = split_of(1, 4, (20, 28))
    models = Pixels(5, 1), Pixels(5, 2)
    quiet = segjax.compare_models(*models, opened)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")
    assert segjax.compare_models(*models, opened, output="new/report") == quiet
    written = json.loads((tmp_path / "new/report/results.json").read_text())
    assert {key: written[key] for key in quiet} == quiet
    assert written["data"] == {"name": "noise", "split": "", "images": 4}
    assert written["a"]["checkpoint"] == written["b"]["checkpoint"] == "pixels"
    assert written["a"]["protocol"]["mode"] == "whole" and written["segjax_version"] == segjax.__version__
    assert sorted(path.name for path in (tmp_path / "new/report").iterdir()) == ["index.html", "results.json"]


def save(folder, names):
    dataset = {"name": folder.name, "class_names": list(names), "colors": [[0, 0, 0]] * 5, "ignore_label": 255}
    orbax_folder.save_model(folder, tiny_model(0, num_classes=5), metadata={"dataset": dataset})
    return folder


def test_models_with_different_classes_are_refused(tmp_path, caplog):
    names = list(SPEC.class_names)
    same, spelled, swapped, other = (
        save(tmp_path / name, entries)
        for name, entries in {
            "same": names,
            "spelled": [*names[:4], "purple"],
            "swapped": [*names[:3], names[4], names[3]],
            "other": [*names[:3], "x", "y"],
        }.items()
    )
    opened = split_of(0, 4, (33, 40))
    with pytest.raises(ValueError, match=r"A has 5 classes of same, and B has 3; compare models of the same classes"):
        segjax.compare_models(same, Pixels(3), opened)
    for wrong, words in ((other, "3 is 'yellow', not 'x', 4 is 'violet', not 'y'"), (swapped, "3 is 'yellow', not '")):
        with pytest.raises(ValueError, match=f"the classes of A of same are not those of B of {wrong.name}: {words}"):
            segjax.compare_models(same, wrong, opened)
    with caplog.at_level(logging.INFO, "segjax"):
        segjax.compare_models(same, spelled, opened)
    assert "classes with other names in A than in B: 4 is 'violet', not 'purple'" in caplog.messages


@pytest.mark.parametrize(
    "data, settings, words",
    [
        ("mars", {}, "no dataset 'mars'"),
        (split_of(0, 4, (8, 9), BINARY), {}, "the model has 5 classes, but one has 1"),
        (split_of(0, 4, (8, 9)), {"data_dir": "x"}, "data that is given by its name"),
        (split_of(0, 4, (8, 9)), {"crop": (8, 8)}, "crop needs mode 'slide'; add it"),
        (split_of(0, 4, (8, 9)), {"threshold": 0.3}, "a threshold needs a model of one class"),
        (split_of(0, 4, (8, 9)), {"output": __file__}, "cannot be written to"),
    ],
)
def test_impossible_comparisons_are_refused_with_the_reason(data, settings, words):
    with pytest.raises(ValueError, match=words):
        segjax.compare_models(Pixels(5), Pixels(5, 1), data, **settings)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_exported_file_is_compared_like_its_model(seed, tmp_path):
    opened, other = split_of(seed, 5, (33, 50)), Pixels(5, seed + 7)
    path = file_of(tmp_path / "a.stablehlo", other)
    of_file = segjax.compare_models(Pixels(5, seed), path, opened, mean=MEAN, std=STD, output=tmp_path / "out")
    assert of_file == segjax.compare_models(Pixels(5, seed), other, opened) and of_file["difference"] < 0
    assert json.loads((tmp_path / "out/results.json").read_text())["b"]["checkpoint"] == str(path)
    assert segjax.compare_models(other, path, opened, mean=MEAN, std=STD)["differing_pixels"] == 0
    with pytest.raises(CheckpointError, match="does not say how its images are normalised"):
        segjax.compare_models(path, other, opened)


def test_the_temperature_applies_to_both_models():
    opened, (first, second) = split_of(3, 4, (33, 50)), (Pixels(5, 3, context=True), Pixels(5, 4, context=True))
    protocol = dict(mode="slide", crop=(24, 32), scales=(0.5, 1.0), flip=True)
    found = segjax.compare_models(first, second, opened, temperature=4.0, **protocol)
    own = [segjax.evaluate_dataset(model, opened, temperature=4.0, **protocol) for model in (first, second)]
    assert [found["mean_iou_a"], found["mean_iou_b"]] == [each["mean_iou"] for each in own]
    assert found != segjax.compare_models(first, second, opened, **protocol)
