"""The command `segjax compare`: its output, its files, and its error messages."""

import json

import pytest

from segjax.checkpoints import orbax_folder
from segjax.checkpoints.metadata import dataset_metadata
from segjax.commands import compare
from segjax.data import specs
from tests.tiny import tiny_model


@pytest.fixture
def models(tmp_path):
    """Two models of the classes of `streets`."""
    known = {"dataset": dataset_metadata(specs.STREETS)}
    for seed, name in enumerate("ab"):
        orbax_folder.save_model(tmp_path / name, tiny_model(seed, num_classes=19), metadata=known)
    return tmp_path / "a", tmp_path / "b"


def call(*arguments):
    return compare.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    try:
        status = call(*arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    return " ".join(capsys.readouterr().err.split())


def test_compare_prints_a_table_and_writes_a_report(models, tmp_path, capsys, monkeypatch):
    import dataclasses

    few = dataclasses.replace(specs.DATASETS["streets"], scenes=specs.Scenes(3, 2, (40, 64)))
    monkeypatch.setitem(specs.DATASETS, "streets", few)
    assert call(*models, "streets", "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["a"]["checkpoint"] == str(models[0]) and results["data"]["images"] == 2
    words = " ".join(printed.split())
    assert words.startswith("compares A,") and "differences are B minus A" in words
    road = results["classes"][0]
    assert f"road {road['iou_a']:.4f} {road['iou_b']:.4f} {road['difference']:+.4f}" in words
    low, high = results["difference_interval"]
    assert f"B - A {results['difference']:+.4f} 95% interval {low:+.4f} to {high:+.4f}" in words
    assert "index.html" in words and max(map(len, printed.replace(str(tmp_path), "x").splitlines())) <= 80


WRONG = {
    ("a", "b"): "the following arguments are required: NAME[:SPLIT]",
    ("a", "b", "mars:val"): "the data are NAME or NAME:SPLIT with NAME one of streets, camvid,",
    ("a", "b", "streets", "--source", "x"): "streets are generated and need neither --source nor --data-dir",
    ("a", "b", "streets", "--crop", "8", "8"): "--crop and --stride go with --mode slide",
    ("a", "b", "streets", "--mean", "0", "0", "0", "--std", "1", "1", "1"): "--mean and --std are for exported files",
    ("a", "b", "streets", "--reference", "a"): "--reference is for exported files: a checkpoint says all itself",
    ("a", "b.onnx", "streets", "--weights-b", "ema"): "--weights-b: an exported file holds one set of weights; omit it",
    ("a", "b", "streets", "--temperature", "0"): "argument --temperature: 0; must be",
    ("a", "b", "streets", "--temperature", "fitted"): "no temperature was fitted for the weights of a:",
    ("nowhere", "b", "streets"): "segjax compare: nowhere: there is no such file",
    ("a", "b", "camvid", "--data-dir", "empty"): "--source PATH",
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_arguments_are_reported_with_status_2(arguments, models, capsys, monkeypatch):
    monkeypatch.chdir(models[0].parent)
    if "camvid" in arguments:
        monkeypatch.setattr("segjax.inference.evaluate_dataset.refuse_other_classes", lambda *_: None)
    assert WRONG[arguments] in refused(capsys, *arguments)
    assert not (models[0].parent / "comparison").exists()
