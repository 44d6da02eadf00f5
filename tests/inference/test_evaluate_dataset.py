"""`segjax.evaluate_dataset` against NumPy, and the figures of runs against those that their training recorded."""

import json
import logging
from functools import partial

import jax
import numpy as np
import pytest

import segjax
from segjax.checkpoints import orbax_folder
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.data.open import OpenSplit
from segjax.inference import evaluate_dataset
from segjax.inference.engine import Inference, predict_labels
from segjax.inference.evaluate_dataset import are_the_same_classes
from segjax.models.functional import FunctionalModel
from segjax.runtime import memory
from tests import runs
from tests.pixels import SPEC, Pixels, scene
from tests.tiny import tiny_model

pytestmark = pytest.mark.one_python


def split_of(seed, number, size):
    """A split that is already open, with labels of which a part is ignored."""
    rng = np.random.default_rng(seed)
    images = np.stack([scene(seed + i, *size) for i in range(number)])
    labels = rng.choice([0, 1, 2, 3, 4, 255], (number, *size)).astype(np.uint8)
    split = specs.Split(images, labels, np.tile(np.int32(size), (number, 1)), tuple(f"{i}" for i in range(number)))
    return OpenSplit(split, SPEC, lambda: np.bincount(labels[labels != 255], minlength=5))


@pytest.mark.parametrize("seed, number, size", [(0, 7, (33, 50)), (3, 4, (40, 31))])
@pytest.mark.parametrize("settings", [{}, {"batch": 3}, {"mode": "slide", "crop": (24, 32), "batch": 2}])
def test_the_figures_match_pixels_counted_with_numpy(seed, number, size, settings):
    model, opened = Pixels(5, seed), split_of(seed, number, size)
    found = segjax.evaluate_dataset(model, opened, **settings)
    counts = np.zeros((5, 5), np.int64)
    for image, truth in zip(opened.data.images, opened.data.labels, strict=True):
        valid = truth != 255
        np.add.at(counts, (truth[valid], model.labels(image)[valid]), 1)
    expected = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
    np.testing.assert_allclose(found["per_class_iou"], expected, rtol=1e-12)
    assert found["mean_iou"] == pytest.approx(expected.mean(), rel=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(np.diag(counts).sum() / counts.sum(), rel=1e-12)
    assert [entry["class"] for entry in found["classes"]] == list(SPEC.class_names)
    assert [entry["pixels"] for entry in found["classes"]] == counts.sum(1).tolist() and found["step"] is None


def test_a_report_is_written_only_on_request_and_nothing_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opened = split_of(1, 4, (20, 28))
    quiet = segjax.evaluate_dataset(Pixels(5), opened)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")
    assert segjax.evaluate_dataset(Pixels(5), opened, output=tmp_path / "report") == quiet
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {key: written[key] for key in quiet} == quiet
    assert written["checkpoint"] == "pixels" and written["data"] == {"name": "noise", "split": "", "images": 4}
    assert len(written["worst_images"]) == 4
    assert 0 <= written["duration_s"] < 600
    (device, *others) = jax.local_devices()
    assert written["device"] == {"kind": device.device_kind, "platform": "cpu", "number": 1 + len(others)}
    assert written["versions"]["jax"] == jax.__version__ and {"python", "flax"} <= written["versions"].keys()
    assert written["segjax_version"] == segjax.__version__


def test_the_model_and_the_data_are_logged(caplog):
    with caplog.at_level(logging.INFO, "segjax"):
        segjax.evaluate_dataset(Pixels(5), split_of(1, 4, (20, 28)))
    lines = [record.getMessage() for record in caplog.records]
    assert "model    pixels, 5 classes" in lines and "data     noise, 4 images" in lines


@pytest.mark.parametrize(
    "source, data, settings, words",
    [
        (Pixels(3), None, {}, "is not the folder of a run"),
        ("nowhere", None, {}, "nowhere: there is no such file or folder"),
        ("nowhere", "mars", {}, "nowhere"),
        (Pixels(3), "mars", {}, "no dataset 'mars'"),
        (Pixels(3), split_of(0, 4, (8, 9)), {}, "the model has 3 classes, but noise has 5"),
        (Pixels(5), split_of(0, 4, (8, 9)), {"data_dir": "x"}, "data that is given by its name"),
        (Pixels(5), None, {"flip": True}, "name the data"),
        (Pixels(5), None, {"batch": 2}, "name the data"),
        (Pixels(5), None, {"crop": (8, 8)}, "crop needs mode 'slide'; add it"),
    ],
)
def test_impossible_evaluations_are_refused_with_the_reason(source, data, settings, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        segjax.evaluate_dataset(source, data, **settings)


@pytest.mark.parametrize("family", ["segformer", "ocr", "segnext"])
def test_labels_on_four_devices_equal_those_on_one(family):
    model = tiny_model(2, family)
    images = np.random.default_rng(2).integers(0, 256, (8, 64, 96, 3), dtype=np.uint8)
    functional = FunctionalModel(model)
    assert len(jax.devices()) == 4
    plain = jax.jit(partial(predict_labels, functional, normalise=normalise))
    found = np.stack(Inference(model, batch=8).labels(images))
    np.testing.assert_array_equal(found, plain(*functional.arrays(), images))
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize(
    "settings", [{"parallel": "pmap"}, {"model__dtype": "bfloat16", "seed": 2}, {"eval__batch": 8}]
)
def test_evaluating_a_run_gives_exactly_its_recorded_result(settings, tmp_path, monkeypatch):
    runs.cheap_step(monkeypatch)
    status, _ = runs.run(runs.make_config(**settings), tmp_path / "run")
    assert status == 0
    found, recorded = segjax.evaluate_dataset(tmp_path / "run"), runs.result_of(tmp_path / "run")
    for key in ("mean_iou", "pixel_accuracy", "per_class_iou", "step"):
        assert found[key] == recorded[key], key


def test_a_run_is_evaluated_on_its_moved_data(tmp_path, monkeypatch):
    """Source and folder that were given win over those of the run."""
    runs.cheap_step(monkeypatch)
    runs.run(runs.make_config(), tmp_path / "run")
    asked = []

    def open_splits(name, splits, *, source, data_dir, **_):
        asked.append((name, splits, source, data_dir))
        raise ValueError("seen")

    monkeypatch.setattr("segjax.inference.evaluate_dataset.open_splits", open_splits)
    for given in ({}, {"data_source": "there", "data_dir": "elsewhere"}):
        with pytest.raises(ValueError, match="seen"):
            segjax.evaluate_dataset(tmp_path / "run", **given)
    data = orbax_folder.load_metadata(tmp_path / "run")["config"]["data"]
    assert asked == [
        ("streets", ["val"], data["source"], data["dir"]),
        ("streets", ["val"], "there", "elsewhere"),
    ]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "dtype", None),
        ("model", "dtype", "float99"),
        ("data", "eval_split", 3),
        ("data", "eval_images", 1 << 70),
        ("data", "size", [3]),
        ("eval", "scales", "x"),
        ("eval", "scales", []),
        ("eval", "batch", 0),
        ("eval", "crop", [0, 5]),
        ("eval", None, None),
        ("data", None, None),
    ],
)
def test_a_run_with_an_edited_config_is_refused_with_the_key(tmp_path, section, key, value):
    config = {
        "seed": 0,
        "model": {"dtype": "float32"},
        "data": {
            **{"name": "streets", "train_split": "train", "eval_split": "val", "source": None, "dir": None},
            **{"train_images": 2, "eval_images": 2, "size": [64, 64]},
        },
        "eval": {"batch": 1, "mode": "whole"},
    }
    if key is None:
        del config[section]
    else:
        config[section][key] = value
    orbax_folder.save_model(tmp_path / "run", tiny_model(0, num_classes=19), metadata={"config": config})
    with pytest.raises(ValueError, match=rf"config: {section}" + (rf"\.{key}" if key else " is missing")):
        segjax.evaluate_dataset(tmp_path / "run")


def test_a_checkpoint_without_data_in_its_config_takes_other_data(tmp_path):
    model = tiny_model(0)
    orbax_folder.save_model(tmp_path / "a", model, metadata={"config": {"augment": {}}})
    loaded = segjax.load(tmp_path / "a")
    assert loaded.metadata["config"] == {"augment": {}}
    with pytest.raises(ValueError, match="classes"):
        segjax.evaluate_dataset(tmp_path / "a", "streets:val")


def test_differing_class_names_are_refused_or_reported(tmp_path, caplog):
    opened, model = split_of(0, 4, (33, 40)), tiny_model(0, num_classes=5)
    names = {1: ["red thing", "green thing", "blue", "yellow", "purple"], 2: ["red thing", "green", "blue", "x", "y"]}
    for number, class_names in names.items():
        dataset = {"name": "other", "class_names": class_names, "colors": [[0, 0, 0]] * 5, "ignore_label": 255}
        orbax_folder.save_model(tmp_path / str(number), model, metadata={"dataset": dataset})
    with caplog.at_level(logging.INFO, "segjax"):
        segjax.evaluate_dataset(tmp_path / "1", opened)
    assert any("different names in the checkpoint: 4 is 'purple', not 'violet'" in line for line in caplog.messages)
    with pytest.raises(ValueError, match="the classes of the model of other are not those of noise: 1 is 'green'"):
        segjax.evaluate_dataset(tmp_path / "2", opened)


def test_swapped_classes_are_a_difference_and_a_synonym_is_not():
    names = [f"class {k}" for k in range(11)]
    assert are_the_same_classes(names, [*names[:9], "another", " Class 10"])
    assert not are_the_same_classes(names, [*names[:9], names[10], names[9]])
    assert not are_the_same_classes(names, [*names[:8], "x", "y", "z"])
    screens = ["screen", "plate", "screen", *names]
    assert are_the_same_classes(screens, ["screen", "plate", "crt screen", *names])
    assert are_the_same_classes(["screen", "plate", "crt screen", *names], screens)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batch": 3}, "a batch of 3 images of 41x50 needs"),
        ({"mode": "slide", "crop": (24, 32), "batch": 2}, "a batch of 2 crops of 24x32 needs"),
    ],
)
def test_images_too_large_for_memory_are_refused_before_evaluation(settings, words, tmp_path, monkeypatch):
    opened = split_of(0, 4, (41, 50))
    opened.data.sizes[:2] = 30, 20
    # Enough for the small ones: a label takes a byte, and a score four.
    monkeypatch.setattr(memory, "needed", lambda compiled: compiled.memory_analysis().output_size_in_bytes)
    monkeypatch.setattr(memory, "limit", lambda *_, **__: 3 * 41 * 50 - 1)
    monkeypatch.setattr(evaluate_dataset, "measure", None)
    with pytest.raises(memory.TooLittleMemoryError, match=words):
        segjax.evaluate_dataset(Pixels(5), opened, output=tmp_path / "report", **settings)
    assert not (tmp_path / "report").exists()
