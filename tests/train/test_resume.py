"""Damaged or manually edited records of a run: errors name file and key."""

import json

import pytest

from segjax.commands import evaluate
from segjax.train import resume
from segjax.train.config import RunError, plain
from tests.runs import make_config

DELETED = object()


def result(**changes):
    """A result.json as a run writes it; `changes` by dotted name, dots written as two underscores."""
    content = {"step": 6, "mean_iou": 0.5, "pixel_accuracy": 0.75, "per_class_iou": [0.5, None], "stopped_early": False}
    content |= {"config": plain(make_config())}
    for name, value in changes.items():
        *parents, key = name.split("__")
        owner = content
        for parent in parents:
            owner = owner[parent]
        if value is DELETED:
            del owner[key]
        else:
            owner[key] = value
    return json.dumps(content)


DAMAGED = {
    "": "not JSON",
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    "\x00\x01": "not JSON",
    "{}": "step",
    "[1]": "[1]",
    "null": "None",
    result(step=DELETED): "step",
    result(step="six"): "step",
    result(step=True): "step",
    result(mean_iou=[]): "mean_iou",
    result(mean_iou=float("nan")): "mean_iou",
    result(per_class_iou=3): "per_class_iou",
    result(per_class_iou=[0.5, "x"]): "per_class_iou.1",
    result(stopped_early="no"): "stopped_early",
    result(config=DELETED): "config",
    result(config=[]): "config",
    result(config__model=3): "config.model",
    result(config__eval="whole"): "config.eval",
    result(config__eval__mode=3): "config.eval.mode",
    result(config__eval__scales=[]): "config.eval.scales",
    result(config__eval__patience="\x1b"): "config.eval.patience",
    result(format_version="x"): "format_version",
}


@pytest.mark.parametrize("text, fault", DAMAGED.items(), ids=range(len(DAMAGED)))
def test_a_damaged_result_is_refused_with_file_and_key(text, fault, tmp_path):
    (tmp_path / "result.json").write_text(text)
    for read in (resume.recorded_config, lambda workdir: resume.earlier_result(plain(make_config()), workdir)):
        with pytest.raises(ValueError) as error:
            read(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / 'result.json'}: ") and fault in str(error.value)


def test_a_folder_in_place_of_the_result_is_refused(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(RunError, match=r"result\.json: a folder, not a file\. Remove"):
        resume.recorded_config(tmp_path)


def test_an_intact_result_is_read_with_defaults_for_missing_entries(tmp_path):
    config = plain(make_config())
    (tmp_path / "result.json").write_text(result(stopped_early=DELETED, config__eval__patience=DELETED))
    found = resume.earlier_result(config, tmp_path)
    assert found["step"] == 6 and found["stopped_early"] is False and found["config"] == config
    assert resume.recorded_config(tmp_path) == config
    assert resume.is_finished(found, steps=6, evaluation=config["eval"])


@pytest.mark.parametrize("text", ["{}", "{", result(mean_iou="x")])
def test_an_evaluation_continues_without_a_damaged_result(text, tmp_path, capsys):
    (tmp_path / "result.json").write_text(text)
    summary = {"mean_iou": 0.5, "pixel_accuracy": 0.75, "per_class_iou": [0.5, None], "step": 6}
    evaluate._compare_with_result(tmp_path / "result.json", summary)
    assert "not compared" in capsys.readouterr().out
    (tmp_path / "result.json").write_text(result())
    evaluate._compare_with_result(tmp_path / "result.json", summary)
    assert "exactly as in" in capsys.readouterr().out
