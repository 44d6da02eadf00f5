"""The table of measured and published figures: the rows that it measures, and how it continues after a failure."""

import json

import pytest

import segjax
from benchmarks import published
from segjax.checkpoints.published import list_weights


@pytest.fixture
def evaluated(monkeypatch):
    """What was evaluated; the second evaluation fails."""
    calls = []

    def evaluate_dataset(name, data, *, data_source, **settings):
        calls.append((name, data, data_source, settings))
        if len(calls) == 2:
            raise ValueError("no images\n  at all")
        row = list_weights(name)[0]
        figure = {"mean_iou": row.miou / 100, "source": row.figure_source, "is_multi_scale": bool(settings)}
        return {"mean_iou": 0.5, "published": {**figure, "is_same_protocol": True}}

    monkeypatch.setattr(segjax, "evaluate_dataset", evaluate_dataset)
    monkeypatch.setattr(published.recorded, "about", lambda *_: {"date": "today"})
    return calls


def test_rows_of_given_datasets_are_measured_once_and_failures_again(evaluated, tmp_path, capsys):
    words = [
        "--data",
        "loveda=a",
        "cityscapes=b",
        "--pattern",
        "hrnet_w18.*a*-small",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert published.main(words) == 1
    city, love = "hrnet_w18.cityscapes-small", "hrnet_w18.loveda-small"
    assert evaluated == [(city, "cityscapes", "b", {}), (love, "folder", "a", {})]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [city, "76.31", "50.00", "-26.31"]
    assert lines[2].split() == [love, "failed:", "no", "images"]
    assert published.main(words) == 0
    assert [call[0] for call in evaluated[2:]] == [love]
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["date"] == "today" and set(record["results"]) == {city, love}
    assert record["results"][love]["published"]["mean_iou"] == pytest.approx(0.4928)
    assert published.main([*words, "--multi-scale"]) == 0
    assert [call[3] for call in evaluated[3:]] == [{"scales": published.SCALES, "flip": True}] * 2


@pytest.mark.parametrize("word", ["loveda", "loveda=", "imagenet=a", "=a"])
def test_an_argument_other_than_dataset_and_folder_is_refused(word, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        published.main(["--data", word, "--json", str(tmp_path / "r.json")])
    assert "--data takes DATASET=DIR with DATASET one of ade20k" in " ".join(capsys.readouterr().err.split())
