"""The scripts of benchmarks/ that write records: the figures that they derive, and the content that they omit."""

import argparse
import json
import math
import os
import sys

import numpy as np
import pytest

from benchmarks import camvid, compiling, feeding, growth, recorded
from configs import hrnet, segformer
from segjax.benchmark.machine import quartiles
from segjax.data import builders, streets
from segjax.data.pipeline import StreamBatches, TrainBatches
from segjax.runtime import environment
from segjax.train import progress, setup
from segjax.train.config import check
from tests.tiny import SIZES

# ------------------------------------------------------------------------------------------------------------- machine


def test_a_function_runs_in_another_process_and_its_error_is_raised_here():
    assert recorded.in_a_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="math domain error"):
        recorded.in_a_process(math.sqrt, -1.0)


def test_the_peak_counts_only_the_memory_held_during_the_call():
    def hold(megabytes):
        return lambda: np.ones(megabytes * 2**17).sum()

    hold(96)()
    assert 60 * 2**20 < recorded.peak_of(hold(64)) < 80 * 2**20
    # That of before is forgotten.
    assert recorded.peak_of(hold(8)) < 16 * 2**20


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [4.0, 1.0, 3.0, 9.0, 2.0]])
def test_quartiles_are_numpys(values):
    np.testing.assert_allclose(quartiles(values), np.percentile(values, (50, 25, 75)))


def test_a_record_contains_the_command_without_local_paths(tmp_path):
    words = ["--source", str(tmp_path), "--steps", "3", f"--config.data.dir={tmp_path}", "~/x", "a/b"]
    record = recorded.about("benchmarks.camvid", words)
    assert record["command"] == ("python -m benchmarks.camvid --source PATH --steps 3 --config.data.dir=PATH PATH a/b")
    path = tmp_path / "new" / "record.json"
    recorded.write(path, record)
    assert json.loads(path.read_text()) == record and {"jax", "python"} <= set(record["versions"])
    recorded.write(None, record)


# -------------------------------------------------------------------------------------------------------------- growth


def grown(*, time, work):
    """Rows of 10x10 and 20x20 pixels, of which the second takes so many times as much per pixel."""
    row = {"size": [10, 10], "milliseconds": [1.0, 1.0, 1.0], "temporaries": 3200, "peak": 6400}
    row |= {"labels_temporaries": 1, "multiply_adds": 10**6, "attention": 0}
    large = row | {"size": [20, 20], "milliseconds": [4.0 * time] * 3, "temporaries": 12800, "peak": 25600}
    return [row, large | {"multiply_adds": 4 * work * 10**6}]


def test_figures_are_per_pixel_and_growth_is_last_over_first():
    rows = grown(time=3, work=2)
    assert growth.per_pixel(rows[0]) == {
        "time, ns": 1e4,
        "XLA temporaries, B": 32.0,
        "process at most, B": 64.0,
        "multiply-adds, k": 10.0,
        "  of attention, k": 0.0,
    }
    expected = dict.fromkeys(growth.per_pixel(rows[0]), 1.0) | {"time, ns": 3.0, "multiply-adds, k": 2.0}
    assert growth.growth(rows) == pytest.approx(expected | {"  of attention, k": None})


@pytest.mark.parametrize(
    "time, work, said",
    [
        (1.1, 1, "is flat"),
        (0.5, 1, "falls"),
        (2.1, 2, "grows no more than the work that attention asks for"),
        (3.0, 2, "grows 1.50 times as much as the work"),
        (1.3, 1, "grows 1.30 times as much as the work"),
    ],
)
def test_the_verdict_is_flat_or_names_the_reason(time, work, said):
    rows = grown(time=time, work=work)
    assert growth.verdict(rows) == f"time per pixel {said}"
    assert f"  {growth.verdict(rows)}" in list(growth.report("hrnet_w18", rows))


def test_the_table_of_four_sizes_fits_80_columns():
    rows = [grown(time=1e3, work=1)[1] | {"size": list(size)} for size in growth.SIZES]
    assert max(map(len, growth.report("segformer_zuppichini", rows))) <= 80


@pytest.mark.parametrize("text", ["512", "512x", "x512", "512x-1", "512xx512", "1e3x4"])
def test_an_invalid_size_is_refused_with_an_example(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no size; write HEIGHTxWIDTH, as in 512x1024"):
        growth.size_of(text)
    assert growth.size_of("512x1024") == (512, 1024)


@pytest.mark.slow
def test_growth_of_a_model_is_measured(tmp_path, capsys):
    path = tmp_path / "record.json"
    assert (
        growth.main(["--models", "segformer_b0", "--sizes", "32x64", "64x64", "--rounds", "2", "--json", str(path)])
        == 0
    )
    first, last = json.loads(path.read_text())["models"]["segformer_b0"]["rows"]
    assert (first["size"], last["size"]) == ([32, 64], [64, 64])
    assert 0 < first["attention"] < first["multiply_adds"] < last["multiply_adds"]
    for row in (first, last):
        # The program's temporaries are part of what the process holds while it runs.
        assert row["temporaries"] > 0 and row["peak"] > 0.5 * row["temporaries"]
        assert 0 < row["milliseconds"][1] <= row["milliseconds"][0] <= row["milliseconds"][2]
    assert "segformer_b0" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- compiling


def test_a_command_is_ended_after_its_first_line():
    code = "import time; print('here', flush=True); time.sleep(600)"
    assert 0 < compiling.first_line(["-c", code]) < 60


def test_a_command_without_output_is_an_error_with_its_stderr():
    with pytest.raises(RuntimeError, match="said nothing:\nwhat is wrong"):
        compiling.first_line(["-c", "import sys; sys.exit('what is wrong')"])


def test_the_tables_of_compiling_fit_80_columns():
    once = {"trace": 12.0, "compile": 110.0, "temporaries": 5 * 2**30}
    found = {"cold": once, "cached": once, "large": once, "seconds": [1.0, 1.0, 1.0], "ratio": [1.0, 0.9, 1.1]}
    record = {"model": "segformer_b5", "num_classes": 150, "timed": compiling.TIMED, "large": compiling.LARGE}
    record |= {"forms": dict.fromkeys(compiling.FORMS, found), "starts": dict.fromkeys(compiling.COMMANDS, [1.0] * 3)}
    lines = list(compiling.report(record))
    assert max(map(len, lines)) <= 80
    assert any(
        line.split() == ["unrolled", "122.0", "(12.0)", "122.0", "(12.0)", "1.000", "1.00", "5120"] for line in lines
    )


def test_compiled_shapes_are_those_of_the_given_arrays():
    _, abstract, arguments = compiling.training("segformer_b0", (1, 32, 64), "scan", SIZES | dict(depths=(1, 7, 1, 1)))
    assert "backbone.block2.0-6.mlp.fc1.kernel" in abstract[0].params
    described = [str((leaf.shape, leaf.dtype, leaf.sharding)) for leaf in leaves(abstract)]
    assert described == [str((leaf.shape, leaf.dtype, leaf.sharding)) for leaf in leaves(arguments())]


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.slow
def test_the_second_compilation_comes_from_the_cache(tmp_path):
    work = str(tmp_path), "segformer_b0", (1, 32, 64), "unrolled", SIZES
    cold, cached = (recorded.in_a_process(compiling.compile_once, *work) for _ in range(2))
    assert cached["compile"] < 0.6 * cold["compile"] and cached["temporaries"] == cold["temporaries"]


# ------------------------------------------------------------------------------------------------------------- feeding


def test_rates_between_two_records_follow_from_their_means(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    meter, waited, found = progress.Meter(8), 0.0, {}
    meter.restart(1, waited)
    # Slow and waiting until step 11; then 40 steps of 0.5 s, 0.1 s of which are spent waiting.
    for step, seconds, lost in ((11, 3.0, 2.0), (51, 0.5, 0.1)):
        count = step - (11 if step > 11 else 1)
        now[0] += count * seconds
        waited += count * lost
        meter.lap(step, waited)
        found[step] = {"step": step, "images_per_second": meter.images_per_second, "waiting": meter.waiting}
    result = feeding.between(found[11], found[51])
    assert result == pytest.approx({"waiting": 0.2, "rate": 16.0, "consumed": 20.0})


def test_a_run_in_memory_never_waits():
    records = [{"step": step, "images_per_second": 4.0, "waiting": 0.0} for step in (11, 51)]
    assert feeding.between(*records) == {"waiting": 0.0, "rate": 4.0, "consumed": 4.0}


def test_an_incomplete_line_is_read_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert feeding.records(path) == {}
    path.write_text('{"step": 5, "waiting": 0.5}\n{"step": 10, "wai')
    assert feeding.records(path) == {5: {"step": 5, "waiting": 0.5}}


def test_images_are_fed_as_specified_by_the_settings(tmp_path):
    cases = feeding.cases(tmp_path, tmp_path, tmp_path, "float32")
    assert len(cases) == 3
    for name, (argument, changes) in cases.items():
        config = segformer.get_config(argument)
        config.update_from_flattened_dict(changes)
        check(config, tmp_path)
        streamed = "streamed" in name
        assert (config.data.resident_gb == 0 and config.data.cache_gb == 0) == streamed
        # Records are written at the steps that are waited for.
        assert feeding.WARM % config.train.log_every == 0 and config.train.steps > 10**5


def test_generated_images_can_be_trained_on(tmp_path):
    feeding.draw_images(tmp_path / "large", size=(32, 64), number=3)
    prepared = builders.prepare("folder", source=str(tmp_path / "large"), data_dir=str(tmp_path / "data"))
    records = prepared.records("train")
    assert len(records) == 3 and records.sizes.tolist() == [[32, 64]] * 3
    for mine, theirs in zip(records[1], streets.scene(0, 1, (32, 64)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", list(feeding.OFFICIAL))
def test_batches_of_official_sizes_are_read_in_every_way(name, tmp_path, monkeypatch):
    kind = feeding.OFFICIAL[name]
    small = kind._replace(
        size=(48, 96), crop=(32, 64), number=5, base_size=None if kind.base_size is None else (96, 64)
    )
    feeding.draw_images(tmp_path / "drawn", size=small.size, number=small.number, suffix=small.suffix)
    assert {path.suffix for path in (tmp_path / "drawn" / "images" / "train").iterdir()} == {f".{small.suffix}"}
    made, make_batches = [], setup.make_batches

    def watched(*given, **named):
        made.append(make_batches(*given, **named))
        return made[-1]

    monkeypatch.setattr(setup, "make_batches", watched)
    monkeypatch.setattr(environment, "prepare", lambda: None)
    for way in feeding.WAYS:
        settings = feeding.official_settings(small, tmp_path / "drawn", tmp_path / "data", way)
        assert feeding.delivered("b0,folder", settings, 1, 2) > 0
    kinds = {"decoded": StreamBatches, "cut": StreamBatches, "gathered": TrainBatches}
    assert list(map(type, made)) == [kinds[way] for way in feeding.WAYS]


def test_the_number_of_cores_follows_from_images_per_second(tmp_path):
    results = {name: {"decoded": 40.0, "cut": 200.0, "gathered": 1000.0} for name in feeding.OFFICIAL}
    programs = [{"name": "segformer_b0", "mode": mode, "batch": 32, "ms": 16.0} for mode in ("train", "infer")]
    (tmp_path / "record.json").write_text(json.dumps({"programs": programs}))
    assert feeding.needed(tmp_path / "record.json") == {"segformer_b0": 2000.0}
    # The record in the repository has the models of the published recipes.
    assert {"segformer_b0", "segformer_b5"} <= set(feeding.needed(feeding.ROOFLINE))
    lines = [*feeding.report_of_sizes(results, 2), *feeding.report_of_needs(results, 2, {"segformer_b0": 2000.0})]
    assert lines[-1].split() == ["segformer_b0", "2000", "100.0", "20.0"] and max(map(len, lines)) <= 80


def test_a_run_that_ends_too_early_is_an_error_with_its_output(tmp_path):
    argument, changes = "b0,camvid", {"data.source": str(tmp_path / "absent"), "data.dir": str(tmp_path)}
    with pytest.raises(RuntimeError, match=r"ended with 2:\n(.|\n)*absent"):
        feeding.trained(argument, changes, 5, 5, tmp_path)


# -------------------------------------------------------------------------------------------------------------- camvid

RUNS = [
    {"seed": 0, "single": 0.70, "multi": 0.71, "per_class_iou": {"sky": 0.9, "pole": 0.2, "fence": None}},
    {"seed": 1, "single": 0.74, "multi": 0.75, "per_class_iou": {"sky": 0.8, "pole": None, "fence": None}},
]


@pytest.mark.parametrize("number, most, expected", [(3, 5, [1, 2, 3]), (9, 5, [1, 3, 5, 7, 9]), (2, 2, [1, 2])])
def test_a_curve_has_the_losses_of_evenly_spaced_steps(number, most, expected, tmp_path):
    lines = [{"step": k, "loss": k / 3} for k in range(1, number + 1)] + [{"step": number, "mean_iou": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert camvid.curve(tmp_path, most) == [(k, round(k / 3, 4)) for k in expected]


def test_mean_and_deviation_are_over_the_seeds():
    total = camvid.summary(RUNS)
    assert total["single"] == pytest.approx(
        {"mean": 0.72, "deviation": np.std([0.70, 0.74], ddof=1), "smallest": 0.70, "largest": 0.74}
    )
    assert total["multi"]["mean"] == pytest.approx(0.73)
    assert total["per_class_iou"] == pytest.approx({"sky": 0.85, "pole": 0.2, "fence": None})
    assert camvid.summary(RUNS[:1])["single"]["deviation"] is None
    for runs in (RUNS, RUNS[:1]):
        assert max(map(len, camvid.report(runs))) <= 80


def options(tmp_path, *flags):
    return argparse.Namespace(
        source=tmp_path,
        data_dir=None,
        variant="w18",
        train_split="train",
        steps=None,
        workdir=tmp_path,
        scales=(0.5,),
        flags=list(flags),
    )


@pytest.fixture
def called(monkeypatch):
    """Commands that would be run; each leaves what the real one would, of the step in `called.step`."""

    class Calls(list):
        step = 5

    calls = Calls()

    def call(command):
        calls.append(command)
        if "train.py" in command:
            workdir = next(word.removeprefix("--workdir=") for word in command if word.startswith("--workdir="))
            result = {"images_per_second": 1.0, "params_sha256": "", "config": {}, "step": calls.step}
            recorded.write(camvid.Path(workdir) / "result.json", result)
            (camvid.Path(workdir) / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
        else:
            report = {"step": calls.step, "mean_iou": 0.5, "classes": [{"class": "sky", "iou": 0.5}]}
            recorded.write(camvid.Path(command[command.index("--output") + 1]) / "results.json", report)

    monkeypatch.setattr(camvid, "call", call)
    return calls


def test_a_finished_seed_is_evaluated_again_only_after_more_training(called, tmp_path):
    run = camvid.of_seed(options(tmp_path), 3, "float32")
    assert (run["single"], run["multi"], run["step"], len(called)) == (0.5, 0.5, 5, 3)
    assert "--flip" not in called[1] and called[2][-3:] == ["--scales", "0.5", "--flip"]
    called.clear()
    assert camvid.of_seed(options(tmp_path), 3, "float32") == run
    # train.py itself finds that it has nothing to do.
    assert len(called) == 1
    called.clear()
    called.step = 9
    assert camvid.of_seed(options(tmp_path), 3, "float32")["step"] == 9 and len(called) == 3


def test_the_steps_option_applies_only_to_the_training_on_crops(called, tmp_path):
    run = options(tmp_path)
    run.variant, run.steps = "small", 11
    camvid.of_seed(run, 3, "float32")
    crops, whole = (command for command in called if "train.py" in command)
    assert "--config.train.steps=11" in crops and [word for word in whole if "train.steps" in word] == [
        "--config.train.steps=900"
    ]


def test_flags_after_two_dashes_come_last_and_reach_only_the_training(called, tmp_path):
    camvid.of_seed(options(tmp_path, "--config.train.steps=7"), 3, "bfloat16")
    assert called[0][-1] == "--config.train.steps=7" and "--config.seed=3" in called[0]
    assert "--config.model.dtype=bfloat16" in called[0]
    assert not any("train.steps" in word for command in called[1:] for word in command)
    assert camvid._cut(["--seeds", "0", "--", "--x", "--"]) == (["--seeds", "0"], ["--x", "--"])
    assert camvid._cut(["--seeds", "0"]) == (["--seeds", "0"], [])


def test_small_models_are_trained_a_second_time_on_whole_images(called, tmp_path):
    few = options(tmp_path, "--config.train.steps=7")
    few.variant, few.train_split = "small", "train+val"
    assert camvid.of_seed(few, 3, "float32")["step"] == 5 and len(called) == 4
    first, second = called[:2]
    assert "--config.data.train_split=train+val" in first and "--config.data.train_split=train+val" in second
    workdir = next(word for word in first if word.startswith("--workdir=")).removeprefix("--workdir=")
    assert workdir.endswith("small-train+val-seed-3") and f"--config.init.checkpoint={workdir}" in second
    assert "--config.augment.crop=(360,480)" in second and second[-1] == "--config.train.steps=7"
    assert [command[command.index("--output") + 1] for command in called[2:]] == [
        f"{workdir}-whole/{folder}" for folder in ("report", "report-scales")
    ]


def test_a_failed_training_ends_the_benchmark_with_its_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recorded, "has_gpu", lambda: False)
    monkeypatch.setattr(camvid, "training", lambda *_, **__: [sys.executable, "-c", "raise SystemExit(130)"])
    path = tmp_path / "record.json"
    assert camvid.main(["--source", str(tmp_path), "--workdir", str(tmp_path), "--json", str(path)]) == 130
    assert "the same command again goes on from there" in capsys.readouterr().err and not path.exists()


def test_the_record_contains_no_local_paths(called, monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "has_gpu", lambda: False)
    config = {"seed": 0, "data": {"source": str(tmp_path)}, "init": {"checkpoint": str(tmp_path / "first-run")}}
    monkeypatch.setattr(camvid, "of_seed", lambda *_: {**RUNS[0], "config": config})
    path = tmp_path / "record.json"
    words = ["--source", str(tmp_path), "--seeds", "0", "1", "--json", str(path), "--", f"--config.data.dir={tmp_path}"]
    assert camvid.main(words) == 0
    text = path.read_text()
    assert str(tmp_path) not in text and "first-run" in text and len(json.loads(text)["runs"]) == 2


@pytest.mark.parametrize("variant", ["w48_ocr", "w18", "small"])
def test_the_camvid_recipe_does_not_change_those_of_other_data(variant):
    config = hrnet.get_config(f"{variant},camvid")
    assert (config.loss.dice, config.loss.class_weights, config.train.ema) == (1.0, "inverse_sqrt", 0.999)
    for dataset in ("streets", "cityscapes", "folder"):
        config = hrnet.get_config(f"{variant},{dataset}")
        weights = "cityscapes" if dataset == "cityscapes" else None
        assert (config.loss.dice, config.loss.class_weights, config.train.ema) == (0.0, weights, 0.0)
