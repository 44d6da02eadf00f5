"""The command `segjax audit`: its output, its files, and its error messages."""

import dataclasses
import json

import pytest

from segjax.checkpoints import orbax_folder
from segjax.checkpoints.metadata import dataset_metadata
from segjax.commands import audit
from segjax.data import specs
from tests.tiny import tiny_model


@pytest.fixture
def model(tmp_path):
    """A model of the classes of `streets`."""
    known = {"dataset": dataset_metadata(specs.STREETS)}
    orbax_folder.save_model(tmp_path / "model", tiny_model(0, num_classes=19), metadata=known)
    return tmp_path / "model"


def call(*arguments):
    return audit.main([str(argument) for argument in arguments])


def test_audit_prints_the_first_regions_and_writes_a_report(model, tmp_path, capsys, monkeypatch):
    few = dataclasses.replace(specs.DATASETS["streets"], scenes=specs.Scenes(3, 2, (40, 64)))
    monkeypatch.setitem(specs.DATASETS, "streets", few)
    assert call(model, "streets", "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/regions.json").read_text())
    assert results["checkpoint"] == str(model) and results["data"]["images"] == 2
    words = " ".join(printed.split())
    assert words.startswith("looks for regions of streets that")
    for region in results["regions"][:10]:
        assert f"{region['score']:.2f} {region['given']} {region['predicted']} {region['pixels']:,}" in words
    assert f"all {len(results['regions'])} regions in regions.json" in words
    assert max(map(len, printed.replace(str(tmp_path), "x").splitlines())) <= 80


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_on_the_audited_images_is_reported(split, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        specs.DATASETS,
        "streets",
        dataclasses.replace(specs.DATASETS["streets"], scenes=specs.Scenes(2, 2, (40, 64))),
    )
    data = {"name": "streets", "train_split": "train", "eval_split": "val", "train_images": 2, "eval_images": 2}
    known = {"dataset": dataset_metadata(specs.STREETS), "config": {"seed": 0, "data": {**data, "size": [40, 64]}}}
    orbax_folder.save_model(tmp_path / "run", tiny_model(0, num_classes=19), metadata=known)
    assert call(tmp_path / "run", f"streets:{split}", "--output", tmp_path / "out") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert ("the model was trained on train, and may have learnt the errors" in words) == (split == "train")


WRONG = {
    ("model",): "the following arguments are required: NAME[:SPLIT]",
    ("model", "mars:val"): "the data are NAME or NAME:SPLIT with NAME one of streets, camvid,",
    ("model", "streets", "--data-dir", "x"): "streets are generated and need neither --source nor --data-dir",
    ("model", "streets", "--stride", "8", "8"): "--crop and --stride go with --mode slide",
    ("model", "streets", "--reference", "model"): "--reference is for exported files: a checkpoint says all itself",
    ("model", "streets", "--mean", "0", "0", "0"): "--mean and --std are for exported files",
    ("model", "streets", "--temperature", "fitted"): "no temperature was fitted for the weights of model:",
    ("nowhere", "streets"): "segjax audit: nowhere: there is no such file",
    ("model", "camvid"): "the model has 19 classes of streets, but camvid has 11",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_arguments_are_reported_with_status_2(arguments, model, capsys, monkeypatch):
    monkeypatch.chdir(model.parent)
    if "camvid" in arguments:
        opened = specs.DATASETS["camvid"].spec
        monkeypatch.setattr(
            "segjax.inference.evaluate_dataset._opened",
            lambda *_, **__: type("Opened", (), {"spec": opened}),
        )
    try:
        status = call(*arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2 and WRONG[arguments] in " ".join(capsys.readouterr().err.split())
    assert not (model.parent / "audit").exists()
