"""The command `segjax evaluate`: its metrics, its files, and its error messages."""

import csv
import dataclasses
import json
import os
import resource
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from segjax import metrics
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.metadata import dataset_metadata
from segjax.commands import evaluate, inspect
from segjax.data import builders, prepared, specs, streets
from segjax.data.open import GENERATORS
from segjax.inference import evaluate_dataset, evaluation
from tests import runs
from tests.tiny import tiny_model

FILES = ["classes.csv", "confusion.csv", "confusion.png", "index.html", "results.json", "worst"]
SPEC = specs.DatasetSpec("shapes", ("ground", "thing", "other"), ((0, 0, 0), (200, 0, 0), (0, 200, 0)), 255)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on streets whose training is cheap and whose evaluation is real."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        runs.cheap_step(patch)
        status, _ = runs.run(runs.make_config(eval__every=3, seed=4), folder)
    assert status == 0
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A checkpoint of three classes, and a folder of images to prepare that has them."""
    root = tmp_path_factory.mktemp("shapes")
    model = tiny_model(1, num_classes=3)
    orbax_folder.save_model(root / "model", model, metadata={"dataset": dataset_metadata(SPEC)})
    rng = np.random.default_rng(0)
    source = root / "source"
    for split, sizes in {"val": [(33, 47), (40, 36), (33, 47)], "test": [(32, 32)]}.items():
        for folder in ("images", "labels"):
            (source / folder / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            image = cv2.resize(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8), size[::-1])
            cv2.imwrite(str(source / f"images/{split}/image{number}.png"), image)
            label = rng.choice([0, 1, 2, 255], size).astype(np.uint8)
            cv2.imwrite(str(source / f"labels/{split}/image{number}.png"), label)
    classes = {"names": SPEC.class_names, "colors": SPEC.colors, "ignore": 255}
    (source / "classes.json").write_text(json.dumps(classes))
    return SimpleNamespace(model=root / "model", source=source, data=root / "data")


def call(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line of an error, with status 2."""
    try:
        status = call(*arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    captured = capsys.readouterr()
    return " ".join(captured.err.split())


def results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_fits(text):
    assert max(len(line) for line in text.splitlines()) <= 80


# ---------------------------------------------------------------------------------------------------------- measuring


def make_split(seed, number=13, size=(6, 9)):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 255], (number, *size)).astype(np.uint8)
    labels[3] = 255
    images = rng.integers(0, 256, (number, *size, 3), dtype=np.uint8)
    # Some images are right in more of their pixels than others.
    right = rng.random((number, *size)) < rng.random((number, 1, 1))
    images[..., 0] = np.where(right & (labels < 3), labels, rng.integers(0, 3, labels.shape))
    return specs.Split(images, labels, np.tile(np.int32(size), (number, 1)), tuple(f"image{i}" for i in range(number)))


def red(images):
    return [image[..., 0] for image in images]


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_worst_images_have_the_lowest_mean_iou(seed, batch_size):
    split = make_split(seed)
    measured = evaluation.measure(red, split, SPEC, batch_size=batch_size, shown=5)
    ious, total = [], np.zeros((3, 3), np.int64)
    for number, (image, truth) in enumerate(zip(split.images, split.labels, strict=True)):
        counts = metrics.confusion_matrix(truth, image[..., 0], num_classes=3, ignore_label=255)
        total += counts
        if number != 3:
            ious.append((metrics.summarise(counts)["mean_iou"], number))
    np.testing.assert_array_equal(measured.confusion, total)
    assert measured.worst == sorted(ious)[:5]
    # In the order in which they were measured, which one size does not change.
    pairs = [(truth, image[..., 0]) for image, truth in zip(split.images, split.labels, strict=True)]
    of_one = dict(num_classes=3, ignore_label=255)
    np.testing.assert_array_equal(measured.by_image[:, 0].sum(axis=0), np.diag(total))
    np.testing.assert_array_equal(measured.boundary, sum(metrics.boundary_counts(*pair, **of_one) for pair in pairs))
    by_image = np.stack([metrics.class_counts(metrics.confusion_matrix(*pair, **of_one)) for pair in pairs])
    details = measured.details()
    assert details["image_iou"] == pytest.approx(metrics.over_images(by_image)["image_iou"])
    low, high = details["mean_iou_interval"]
    assert low < metrics.summarise(total)["mean_iou"] < high
    assert sorted(measured.predicted) == sorted(number for _, number in measured.worst)
    for number, predicted in measured.predicted.items():
        np.testing.assert_array_equal(predicted, split.images[number, ..., 0])
    confusion, kept = evaluation.evaluate(red, split, SPEC, batch_size=batch_size, keep={2, 11})
    np.testing.assert_array_equal(confusion, total)
    assert sorted(kept) == [2, 11]
    np.testing.assert_array_equal(kept[11], split.images[11, ..., 0])


# -------------------------------------------------------------------------------------------------------- of a training


@pytest.mark.each_value_once
@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("named", [("--workdir",), ("--checkpoint",), ()], ids=" ".join)
def test_evaluating_a_run_gives_exactly_its_recorded_result(named, best, workdir, capsys):
    assert call(*named, workdir, *["--best"] * best) == 0
    printed = capsys.readouterr().out
    folder = workdir / ("report-best" if best else "report")
    found, recorded = results(folder), runs.result_of(workdir)
    assert sorted(os.listdir(folder)) == FILES
    assert ("exactly as in" in printed) == (not best) and "NOT" not in printed
    if not best:
        assert all(found[key] == recorded[key] for key in ("mean_iou", "pixel_accuracy", "per_class_iou", "step"))
    assert found["data"] == {"name": "streets", "split": "val", "images": 5}
    assert_fits(printed.replace(str(workdir), "run"))


def test_a_full_disk_leaves_the_older_report_intact(workdir, tmp_path, capfd):
    (tmp_path / "worst").mkdir()
    for name in (*FILES[:-1], "worst/01.png"):
        (tmp_path / name).write_text("old")
    before, limits = runs.contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        assert call(workdir, "--output", tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = " ".join(capfd.readouterr().err.split())
    assert said == (
        f"segjax evaluate: {tmp_path / 'index.html'}: File too large. Make room, and run the same command again"
    )
    assert runs.contents(tmp_path) == before


def test_a_run_older_than_some_settings_is_evaluated(workdir, tmp_path, capsys):
    weights, about = orbax_folder.load_weights(workdir)
    config = {key: value for key, value in about["config"].items() if key not in ("debug", "init", "loss", "optim")}
    config["data"] = {key: value for key, value in config["data"].items() if key not in ("cache_gb", "resident_gb")}
    old = {key: about[key] for key in ("model", "dataset")} | {"config": config}
    orbax_folder.save_weights(tmp_path / "checkpoints" / "6", weights, metadata=old)
    (tmp_path / "result.json").write_text((workdir / "result.json").read_text())
    assert call("--workdir", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "exactly as in" in printed and "step" not in printed and "drawing 5 images of streets" in printed
    assert inspect.main([str(tmp_path)]) == 0
    assert "a run of segjax\n" in capsys.readouterr().out


def test_a_run_is_evaluated_on_its_own_number_of_generated_scenes(workdir, monkeypatch):
    monkeypatch.setitem(GENERATORS, "streets", lambda split, **drawn: (split, drawn["num_images"]))
    config = orbax_folder.load_metadata(workdir)["config"]

    def drawn(split):
        return evaluate_dataset._opened("streets", split, config, data_source=None, data_dir=None).data

    of = {split: drawn(split) for split in ("train", "val", "test")}
    assert of == {"train": ("train", 7), "val": ("val", 5), "test": ("test", 5)}
    config["data"]["eval_split"] = "train"
    assert drawn("train") == ("train", 5)


def test_a_difference_from_the_recorded_result_is_reported(workdir, tmp_path, capsys):
    recorded = runs.result_of(workdir)
    summary = {key: recorded[key] for key in ("mean_iou", "pixel_accuracy", "per_class_iou", "step")}
    (tmp_path / "result.json").write_text(json.dumps(recorded | {"mean_iou": 0.9}))
    evaluate._compare_with_result(tmp_path / "result.json", summary)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("NOT as in") and "(mIoU 0.9000, " in printed
    assert float(printed.split("0.9000, ")[1].split(" ")[0]) == pytest.approx(0.9 - recorded["mean_iou"], rel=0.05)


def test_a_checkpoint_is_evaluated_on_the_scenes_of_its_run(workdir, tmp_path, capsys):
    output = tmp_path / "new" / "report"
    assert call("--checkpoint", workdir, "--data", "streets", "--output", output, "--batch", 4) == 0
    printed, found, recorded = capsys.readouterr().out, results(output), runs.result_of(workdir)
    assert found["per_class_iou"] == recorded["per_class_iou"] and found["step"] == runs.STEPS
    scenes = streets.load("val", num_images=5, size=(40, 64), seed=4)
    labelled = np.bincount(scenes.labels[scenes.labels != 255], minlength=19)
    assert [entry["pixels"] for entry in found["classes"]] == labelled.tolist()
    assert {image["name"] for image in found["worst_images"]} == set(scenes.names)
    first, *_ = printed.splitlines()
    assert first.startswith("evaluates ") and "data streets val, 5 images" in " ".join(printed.split())
    assert "mIoU" in printed and str(output / "index.html") in printed.replace("\n", "")
    assert_fits(printed.replace(str(output), "report").replace(str(workdir), "run"))


def test_a_fitted_temperature_is_used_later(workdir, tmp_path, capsys):
    run = shutil.copytree(workdir, tmp_path / "run")
    assert "no temperature was fitted for the weights" in refused(capsys, run, "--temperature", "fitted")
    assert call(run, "--data", "streets:train", "--fit-temperature", "--output", tmp_path / "a") == 0
    said = " ".join(capsys.readouterr().out.split())
    first, kept = results(tmp_path / "a"), json.loads((run / "temperature.json").read_text())["temperature"]
    assert kept == first["temperature"] and kept["data"] == "streets train"
    assert f"temperature {kept['value']:.4g}, with which NLL is {kept['nll']:.4f}" in said and "AUROC of errors" in said
    assert kept["nll"] <= kept["nll_before"] == pytest.approx(first["calibration"]["nll"], abs=1e-5)
    # On its own data, as during training: the labels are the same.
    assert call(run, "--temperature", "fitted", "--output", tmp_path / "b") == 0
    said, found = " ".join(capsys.readouterr().out.split()), results(tmp_path / "b")
    assert "exactly as in" in said and f"at a temperature of {kept['value']:g}" in said
    assert found["protocol"]["temperature"] == kept["value"] and found["mean_iou"] == runs.result_of(run)["mean_iou"]


# ---------------------------------------------------------------------------------------------------- of any checkpoint


def test_a_folder_is_evaluated_with_a_sliding_window_at_several_scales(shapes, tmp_path, capsys):
    given = (shapes.model, "--source", shapes.source, "--data-dir", shapes.data)
    protocol = ("--mode", "slide", "--crop", 32, 32, "--scales", 1, 1.25, "--flip", "--size-divisor", 8, "--batch", 3)
    base = ("--base-size", 64, 48)
    assert call(*given, "--data", "folder:val", *protocol, *base, "--output", tmp_path) == 0
    printed, found = " ".join(capsys.readouterr().out.split()), results(tmp_path)
    assert "sliding window of 32x32 every 24x24, resized to 64x48 with their aspect ratio kept, at scales 1" in printed
    assert found["protocol"] == {
        "mode": "slide",
        "crop": [32, 32],
        "stride": [24, 24],
        "scales": [1.0, 1.25],
        "flip": True,
        "size_divisor": 8,
        "base_size": [64, 48],
    }
    assert found["data"] == {"name": "source", "split": "val", "images": 3}
    with (tmp_path / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    counts = np.array([row[1:] for row in rows], int)
    assert header[1:] == [row[0] for row in rows] == list(SPEC.class_names)
    masks = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in (shapes.source / "labels/val").iterdir()]
    expected = sum(np.bincount(mask[mask != 255], minlength=3) for mask in masks)
    np.testing.assert_array_equal(counts.sum(axis=1), expected)
    assert found["mean_iou"] == metrics.summarise(counts)["mean_iou"]


def test_evaluations_of_corrupted_images_are_announced_and_printed(shapes, tmp_path, capsys):
    given = (shapes.model, "--data", "folder:test", "--source", shapes.source, "--data-dir", shapes.data)
    assert call(*given, "--corruptions", "--output", tmp_path / "out") == 0
    printed, corrupted = capsys.readouterr().out, results(tmp_path / "out")["corruptions"]
    words = " ".join(printed.split())
    assert "of 5 kinds at 5 severities each: 25 more evaluations" in words
    assert words.index("25 more evaluations") < words.index("compiling")
    for kind, figures in corrupted["kinds"].items():
        assert " ".join([kind, f"{figures['mean_iou']:.4f}", *(f"{x:.4f}" for x in figures["severities"])]) in words
    mean = f"mean over kinds and severities {corrupted['mean_iou']:.4f}, {corrupted['relative']:.3f} of that without"
    assert mean in words
    assert_fits(printed[printed.index("mIoU on corrupted images") :].replace(str(tmp_path), "x"))


def test_a_checkpoint_with_other_classes_is_refused(shapes, workdir, tmp_path, capsys):
    folder = ("--data", "folder:val", "--source", shapes.source, "--data-dir", shapes.data, "--output", tmp_path)
    message = refused(capsys, "--checkpoint", workdir, *folder)
    assert "the model has 19 classes of streets, but source has 3" in message
    other = specs.DatasetSpec("other", ("ground", "other", "thing"), SPEC.colors, 255)
    known = {"dataset": dataset_metadata(other)}
    orbax_folder.save_model(tmp_path / "other", tiny_model(1, num_classes=3), metadata=known)
    message = refused(capsys, "--checkpoint", tmp_path / "other", *folder)
    assert "1 is 'other', not 'thing', 2 is 'thing', not 'other'" in message and "of other are not those of" in message


def test_classes_without_names_are_accepted(shapes, tmp_path, capsys, monkeypatch):
    model = tiny_model(1, num_classes=19)
    orbax_folder.save_model(tmp_path / "model", model, metadata={})
    few = dataclasses.replace(specs.DATASETS["streets"], scenes=specs.Scenes(3, 2, (40, 64)))
    monkeypatch.setitem(specs.DATASETS, "streets", few)
    assert call("--checkpoint", tmp_path / "model", "--data", "streets", "--output", tmp_path / "report") == 0
    printed = capsys.readouterr().out
    assert "does not name its classes" in printed and "drawing 2 images of streets" in printed


def test_a_split_without_labels_is_refused(shapes, workdir, tmp_path, capsys, monkeypatch):
    metadata = {"pixels": {"val": [1] * 19}, "names": {"test": ["a"]}, "sizes": {"test": [[32, 32]]}}
    cityscapes = prepared.Prepared(specs.CITYSCAPES, {"val": 1, "test": 1}, ("val",), tmp_path, metadata)
    monkeypatch.setattr(builders, "prepare", lambda *_, **__: cityscapes)
    message = refused(capsys, "--checkpoint", workdir, "--data", "cityscapes:test", "--output", tmp_path / "report")
    assert "cityscapes test has no published labels; use val" in message
    message = refused(capsys, "--checkpoint", workdir, "--data", "cityscapes:nowhere", "--output", tmp_path / "report")
    assert "no split 'nowhere'" in message


OF_CHECKPOINT = ("--checkpoint", "nowhere", "--data")
WRONG = {
    ("nowhere",): "nowhere: there is no such file or folder",
    (*OF_CHECKPOINT, "mars:val"): "NAME one of streets, camvid, cityscapes, ade20k, voc, pet, folder, not 'mars:val'",
    (*OF_CHECKPOINT, "streets", "--crop", "64", "64"): "--crop and --stride go with --mode slide",
    (*OF_CHECKPOINT, "streets", "--batch", "0"): "argument --batch: 0; must be at least 1",
    (*OF_CHECKPOINT, "streets", "--source", "x"): "streets are generated",
    (*OF_CHECKPOINT, "streets", "--best"): "nowhere/best: there is no such file",
    (*OF_CHECKPOINT, "streets", "--scales", "0"): "argument --scales: 0; must be greater than 0",
    (*OF_CHECKPOINT, "streets", "--mode", "slide", "--crop", "8", "8", "--stride", "9", "8"): "leaves gaps",
    (*OF_CHECKPOINT, "streets", "--base-size", "0", "512"): "argument --base-size: 0; must be at least 1",
    ("--workdir", "nowhere", "--base-size", "9", "8"): "--base-size: without --data a run is evaluated as",
    (*OF_CHECKPOINT, "streets", "--mode", "windows"): "invalid choice: 'windows'",
    ("--workdir", "nowhere", "--flip", "--batch", "3"): "--flip, --batch: without --data a run is evaluated as",
    (*OF_CHECKPOINT, "streets", "--temperature", "0"): "argument --temperature: 0; must be greater than 0",
    (*OF_CHECKPOINT, "streets", "--temperature", "2", "--fit-temperature"): "a temperature is either given or fitted",
    (*OF_CHECKPOINT, "streets", "--fit-temperature"): "nowhere is no file or folder of this machine",
    ("--workdir", "nowhere"): "nowhere: there is no such file or folder",
    (*OF_CHECKPOINT, "streets"): "nowhere: there is no such file",
    (): "the following arguments are required: CHECKPOINT",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_arguments_are_reported_with_status_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert WRONG[arguments] in refused(capsys, *arguments)


def test_an_unwritable_report_is_refused_before_evaluation(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    message = refused(capsys, *OF_CHECKPOINT, "streets", "--output", tmp_path / "file" / "report")
    assert f"{tmp_path / 'file'} is a file; choose another folder" in message
    monkeypatch.setattr(os, "access", lambda *_: False)
    message = refused(capsys, *OF_CHECKPOINT, "streets", "--output", tmp_path)
    assert "cannot be written to" in message


def test_for_a_folder_that_is_not_a_run_the_error_names_the_option(shapes, capsys):
    for arguments in (("--workdir", shapes.model), (shapes.model,), (shapes.source / "classes.json",)):
        message = refused(capsys, *arguments)
        assert f"{arguments[-1]} is not the folder of a run" in message and "--data NAME" in message
