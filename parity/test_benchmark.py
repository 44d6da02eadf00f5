"""The contenders of a benchmark do the same work, and none that computes something else is timed."""

import json

import numpy as np
import pytest

from benchmarks import contenders
from segjax import benchmark

WORK = ("segformer_b0", (64, 96), 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_two_are_timed_turn_by_turn_and_compute_the_same(mode, tmp_path, capsys):
    model, size, batch = WORK
    height, width = map(str, size)
    options = ["--model", model, "--size", height, width, "--batch", str(batch), "--mode", mode]
    path = tmp_path / "record.json"
    assert benchmark.main([*options, "--against", "torch", "--rounds", "3", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    ours, theirs = result["contenders"]
    assert (ours["name"], theirs["name"], result["mode"]) == ("segjax", "torch", mode)
    assert 0 < theirs["difference"] < 1e-4 and ours["difference"] == 0
    for row in (ours, theirs):
        middle, low, high = row["milliseconds"]
        assert 0 < low <= middle <= high and row["compile_seconds"] > 0 and row["flops_per_second"] > 1e6
    assert ours["ours_over_theirs"] == [1, 1, 1] and theirs["ours_over_theirs"][0] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == f"wrote {path}" and max(map(len, lines)) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in contenders.CONTENDERS if "compile" not in name])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_every_contender_computes_what_the_plain_one_does(name, mode):
    model = "segformer_simple" if name == "segformer-pytorch" else "segformer_b0"
    assert name == "segjax" or name in contenders.rivals(model)
    work = contenders.Work(model, (64, 96), 2, mode)
    theirs, plain = (contenders.CONTENDERS[which](work).outcome for which in (name, "torch"))
    bound = 1e-4 if name == "transformers" else 1e-5
    np.testing.assert_allclose(theirs, plain, rtol=0, atol=bound * np.abs(plain).max())


@pytest.mark.slow
def test_a_step_of_training_changes_the_loss_of_the_next_on_either_side():
    work = contenders.Work("segformer_b0", (64, 96), 2, "train")
    ours, theirs = (contenders.CONTENDERS[name](work) for name in ("segjax", "torch"))
    losses = [[float(side.outcome), float(side.run()), float(side.run())] for side in (ours, theirs)]
    assert min(np.abs(np.diff(losses[0]))) > 1e-5
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_what_computes_something_else_is_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.CLOSE, "float32", 0.0)
    options = ["--size", "32", "64", "--against", "torch", "--rounds", "1"]
    assert benchmark.main(options) == 2
    assert "torch computes something else than segjax: off by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", "segformer_b9"], "--model: segformer_b9 is none of segformer_b0"),
        (["--model", "hrnet_w18", "--against", "transformers"], "hrnet_w18 can be timed against torch, torch-channels"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is_made(options, said, capsys):
    assert benchmark.main(options) == 2
    assert said in capsys.readouterr().err


def test_the_table_of_a_record_has_a_column_for_each_rival(tmp_path, capsys):
    def row(name, ratio):
        return {"name": name, "milliseconds": [20.0, 19.0, 21.0], "ours_over_theirs": [ratio, 0.1, 0.9]}

    common = dict(mode="infer", batch=1, size=[64, 96])
    results = [
        {"model": "segformer_b0", **common, "contenders": [row("segjax", 1.0), row("torch", 0.254), row("x", 0.5)]},
        {"model": "hrnet_w18", **common, "contenders": [row("segjax", 1.0), row("torch", 0.7)]},
    ]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"results": results}))
    assert benchmark.main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | work | segjax, ms | torch | x |",
        "|---|---|---|---|---|",
        "| `segformer_b0` | infer 1x64x96 | 20 | 0.25 | 0.50 |",
        "| `hrnet_w18` | infer 1x64x96 | 20 | 0.70 |  |",
    ]
