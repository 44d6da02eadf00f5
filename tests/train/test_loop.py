"""Whole runs: the files that they write, that they resume as if never stopped, and what they refuse."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.kill_resume import differences, events_of, records_of, remains
from configs import segformer
from segjax import layers
from segjax.checkpoints import metadata, orbax_folder
from segjax.checkpoints.load import load
from segjax.checkpoints.state_dict import named_variables
from segjax.data import specs, streets
from segjax.data.augment import normalise
from segjax.data.crops import draw_crops
from segjax.data.open import OpenSplit
from segjax.inference import evaluation
from segjax.inference.engine import Protocol, labels_of
from segjax.kernels import choice
from segjax.models.functional import params_sha256
from segjax.models.lora import NO_ADAPTERS
from segjax.recipes import common
from segjax.runtime import console, lock
from segjax.train import loop, optim, setup
from segjax.train.config import RunError, check, check_crop
from segjax.train.progress import Meter, Progress, StopRequest, describe, report
from segjax.train.step import TrainStep
from tests.runs import (
    STEPS,
    cheap_step,
    contents,
    functional_model,
    make_config,
    power_cut_before,
    power_cut_in_the_end,
    result_of,
    run,
    scored,
    signal_before,
)
from tests.tiny import FAMILIES, SIZES, numpy_draws

REPO = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps without interruption: (folder, exit status, what it printed)."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, *run(make_config(eval__pictures=3), workdir)


@pytest.fixture
def cheap(monkeypatch):
    cheap_step(monkeypatch)


def scores_of(model):
    """Pixel accuracy and IoU by class of a model on the evaluation images, counted with plain numpy."""
    split = streets.load("val", num_images=5, size=(40, 64), seed=0)
    logits = nnx.jit(lambda model, images: model(normalise(images))[0])(model, split.images)
    predicted = np.asarray(labels_of(layers.resize(logits, (40, 64))))
    valid = split.labels != 255
    right = (predicted == split.labels) & valid
    ious = []
    for k in range(19):
        union = ((predicted == k) | (split.labels == k)) & valid
        ious.append((right & (split.labels == k)).sum() / union.sum() if union.any() else None)
    return right.sum() / valid.sum(), ious


def miou_of(model):
    return np.mean([iou for iou in scores_of(model)[1] if iou is not None])


def stop_in_evaluation(patch):
    """Ctrl-C as an evaluation begins."""
    original = evaluation.evaluate

    def evaluate(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    patch.setattr(evaluation, "evaluate", evaluate)


# --------------------------------------------------------------------------------------------- what a run leaves behind


def test_a_run_writes_its_result_curve_predictions_and_checkpoints(finished):
    workdir, status, _ = finished
    assert status == 0
    assert sorted(path.name for path in workdir.iterdir()) == [
        "checkpoints",
        "curve.png",
        "metrics.jsonl",
        "predictions",
        "result.json",
        "tensorboard",
    ]
    names = [f"streets_val_{number:06d}.png" for number in (0, 2, 4)]
    assert sorted(path.name for path in (workdir / "predictions").iterdir()) == names
    for picture in (workdir / "curve.png", *(workdir / "predictions").iterdir()):
        assert picture.read_bytes().startswith(PNG)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6"]


def test_the_result_has_the_figures_and_the_settings(finished):
    result = result_of(finished[0])
    assert set(result) == {
        "format_version",
        "segjax_version",
        "mean_iou",
        "pixel_accuracy",
        "per_class_iou",
        "step",
        "stopped_early",
        "best",
        "images_per_second",
        "protocol",
        "config",
        "params_sha256",
        "classes",
        "versions",
        "device",
        "duration_s",
        "from_step",
    }
    assert result["classes"] == list(specs.STREETS.class_names) and len(result["classes"]) == len(
        result["per_class_iou"]
    )
    assert result["versions"]["jax"] == jax.__version__ and result["versions"]["python"] in sys.version
    assert result["device"] == {"kind": "cpu", "platform": "cpu", "number": jax.device_count()}
    assert result["from_step"] == 0 and 0 < result["duration_s"] < 3600
    assert result["protocol"] == {"mode": "whole", "scales": [1.0], "flip": False, "size_divisor": 1}
    assert result["step"] == STEPS and result["images_per_second"] > 0 and result["stopped_early"] is False
    assert result["best"] == {"step": STEPS, "mean_iou": result["mean_iou"]}
    assert result["config"] == json.loads(json.dumps(make_config(eval__pictures=3).to_dict()))
    assert len(result["per_class_iou"]) == 19
    present = [iou for iou in result["per_class_iou"] if iou is not None]
    assert present and all(0 <= iou <= 1 for iou in present)
    assert result["mean_iou"] == pytest.approx(sum(present) / len(present), rel=1e-12)


def test_the_result_equals_an_evaluation_of_the_saved_model(finished):
    workdir, _, _ = finished
    result, model = result_of(workdir), load(workdir).model
    variables = {name: variable.get_value() for name, variable in named_variables(model).items()}
    params = {name: value for name, value in variables.items() if not name.endswith((".mean", ".var"))}
    assert params_sha256(params) == result["params_sha256"]
    accuracy, ious = scores_of(model)
    assert result["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    for iou, expected in zip(result["per_class_iou"], ious, strict=True):
        assert iou == (expected if expected is None else pytest.approx(expected, abs=2e-3))


def test_the_metrics_follow_the_steps_and_the_schedule(finished):
    records = records_of(finished[0])
    training, evaluation = records[:-1], records[-1]
    assert [record["step"] for record in training] == [2, 4, 6]
    rate = optim.schedule(make_config().optim, steps=STEPS)
    for record in training:
        assert set(record) == {"step", "loss", "gradient_norm", "lr"}
        assert 0 < record["gradient_norm"] < 100
        assert 1 < record["loss"] < 6  # log(19) is 2.9
        assert record["lr"] == pytest.approx(float(rate(record["step"] - 1)), rel=1e-6)
    assert set(evaluation) == {"step", "mean_iou", "pixel_accuracy", "iou"} and evaluation["step"] == STEPS
    result = result_of(finished[0])
    assert evaluation["mean_iou"] == result["mean_iou"]
    assert evaluation["iou"] == dict(zip(specs.STREETS.label_names, result["per_class_iou"], strict=True))


def test_a_run_prints_its_progress_in_lines_of_80_columns(finished):
    workdir, _, printed = finished
    lines = printed.replace(str(workdir), "runs/name").splitlines()
    assert [line for line in lines if len(line) > 80] == []
    for phrase in (
        "model      segformer_b0, ",
        "data       streets",
        "to train on (train), 5 to evaluate (val)",
        "19 classes",
        "steps      6 of 4 crops of 32x48, adamw",
        "evaluation whole images",
        "device     4 x cpu, jit",
        "workdir    runs/name",
        "step 6/6  loss ",
        "evaluating on 5 images (val)",
        "vegetation",
        "mIoU ",
        "runs/name/result.json",
    ):
        assert sum(phrase in line for line in lines) >= 1, phrase


def test_a_run_is_reproducible_and_depends_on_the_seed(finished, tmp_path):
    run(make_config(), tmp_path / "again")
    again, first = result_of(tmp_path / "again"), result_of(finished[0])
    for same in ("params_sha256", "mean_iou", "per_class_iou"):
        assert again[same] == first[same]
    run(make_config(seed=1), tmp_path / "other")
    assert result_of(tmp_path / "other")["params_sha256"] != first["params_sha256"]


def test_a_run_without_steps_evaluates_the_initial_weights(tmp_path):
    status, _ = run(make_config(train__steps=0), tmp_path)
    result = result_of(tmp_path)
    assert status == 0 and result["step"] == 0 and result["images_per_second"] is None
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert [record["step"] for record in records_of(tmp_path)] == [0]


# ------------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("step", [0, 2])
def test_a_stopped_run_continues_as_if_uninterrupted(finished, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        signal_before(patch, step)
        status, printed = run(make_config(), tmp_path)
    # The step that was under way is finished first.
    assert status == 130 and f"stopped at step {step + 1} of 6 and saved" in printed
    assert not (tmp_path / "result.json").exists()
    status, printed = run(make_config(), tmp_path)
    assert status == 0 and f"resuming at step {step + 1} of 6" in printed
    result, expected = result_of(tmp_path), result_of(finished[0])
    assert result["params_sha256"] == expected["params_sha256"]
    assert result["per_class_iou"] == expected["per_class_iou"]
    assert [record["step"] for record in records_of(tmp_path)] == [2, 4, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ocr", "segnext"])
def test_runs_of_other_families_train_and_resume_bit_for_bit(family, tmp_path, monkeypatch):
    seen = []

    def create_model(*args, original=setup.create_model, **kwargs):
        with numpy_draws():
            return original(*args, **kwargs)

    def train_step(*, original=TrainStep, **settings):
        seen.append(settings["aux_weight"])
        return original(**settings)

    monkeypatch.setattr(setup, "create_model", create_model)
    monkeypatch.setattr(setup, "TrainStep", train_step)
    config = make_config(
        family, train__steps=3, loss__aux_weight=0.3, checkpoint__every=2, model__dropout_rate=0.2, data__eval_images=2
    )
    # Without the fast forms, which take longer to compile.
    with choice.published_implementations():
        assert run(config, tmp_path / "whole")[0] == 0
        with monkeypatch.context() as patch:
            signal_before(patch, 0)
            assert run(config, tmp_path / "stopped")[0] == 130
        status, printed = run(config, tmp_path / "stopped")
    assert status == 0 and "resuming at step 1 of 3" in printed
    assert set(seen) == {0.3}
    result, expected = result_of(tmp_path / "stopped"), result_of(tmp_path / "whole")
    for same in ("params_sha256", "mean_iou", "per_class_iou"):
        assert result[same] == expected[same]
    losses = [record["loss"] for record in records_of(tmp_path / "whole") if "loss" in record]
    assert len(losses) == 2 and all(1 < loss < 10 for loss in losses)

    hashes = {}
    for step in (2, 3):
        model = load(tmp_path / "whole" / "checkpoints" / str(step)).model
        variables = named_variables(model).items()
        hashes[step] = params_sha256({name: v.get_value() for name, v in variables if isinstance(v, nnx.Param)})
    assert hashes[3] == expected["params_sha256"] != hashes[2]
    assert (model.spec.name, model.spec.num_classes) == (FAMILIES[family][0], 19)
    assert dict(model.spec.overrides).items() >= FAMILIES[family][1].items()


def test_a_run_stopped_during_an_evaluation_has_saved_the_printed_step(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch)
        status, printed = run(make_config(eval__every=3), tmp_path)
    assert status == 130 and "stopped at step 3 of 6 and saved" in printed
    status, printed = run(make_config(eval__every=3), tmp_path)
    assert status == 0 and "resuming at step 3 of 6" in printed
    assert result_of(tmp_path)["params_sha256"] == result_of(finished[0])["params_sha256"]


def test_a_killed_run_continues_from_its_last_checkpoint(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        power_cut_before(patch, 5)
        with pytest.raises(SystemError, match="power cut"):
            run(make_config(train__log_every=1), tmp_path)
    # Half a line, as of a machine that stopped while writing it.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    status, printed = run(make_config(train__log_every=1), tmp_path)
    assert status == 0 and "resuming at step 4 of 6" in printed
    assert result_of(tmp_path)["params_sha256"] == result_of(finished[0])["params_sha256"]
    assert [record["step"] for record in records_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 6]


def test_a_run_stopped_between_two_log_lines_loses_no_step_of_them(tmp_path, monkeypatch, cheap):
    config = make_config(train__log_every=3, eval__every=2)
    run(config, tmp_path / "whole")
    # Ended three times: before a line, before an evaluation and after both.
    for step in (0, 2, 3):
        with monkeypatch.context() as patch:
            signal_before(patch, step, signal.SIGTERM)
            assert run(config, tmp_path / "stopped")[0] == 143
    run(config, tmp_path / "stopped")
    assert len({record.get("loss") for record in records_of(tmp_path / "whole")} - {None}) == 2
    assert records_of(tmp_path / "stopped") == records_of(tmp_path / "whole")
    assert events_of(tmp_path / "stopped") == events_of(tmp_path / "whole")


@pytest.mark.parametrize("has_pmap", [True, False])
def test_a_run_stopped_under_jit_continues_under_pmap_to_equal_weights(has_pmap, tmp_path, monkeypatch, cheap):
    if not has_pmap:
        # As in a jax that is to come.
        monkeypatch.delattr(jax, "pmap")
    run(make_config(), tmp_path / "jit")
    with monkeypatch.context() as patch:
        signal_before(patch, 2)
        assert run(make_config(), tmp_path / "mixed")[0] == 130
    status, printed = run(make_config(parallel="pmap"), tmp_path / "mixed")
    assert status == 0 and "resuming at step 3 of 6" in printed and "device     4 x cpu, pmap" in printed
    mixed, expected = result_of(tmp_path / "mixed"), result_of(tmp_path / "jit")
    for same in ("params_sha256", "mean_iou", "per_class_iou"):
        assert mixed[same] == expected[same]
    losses = [[record.get("loss") for record in records_of(tmp_path / kind)] for kind in ("jit", "mixed")]
    assert losses[0][-2:] == losses[1][-2:] and len(losses[0]) == len(losses[1])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_run_with_scanned_blocks_saves_and_restores_single_blocks(loopless, parallel, tmp_path, monkeypatch):
    changes, expected = loopless
    config, compiled = make_config(**changes, train__scan_blocks=True, parallel=parallel), []
    monkeypatch.setattr(setup, "_compiled", lambda f, given, *_, **__: compiled.append(given[0]) or f)
    with monkeypatch.context() as patch:
        signal_before(patch, 2)
        assert run(config, tmp_path)[0] == 130
    assert run(config, tmp_path)[0] == 0
    for state in compiled:
        assert all("backbone.block2.0-6.mlp.fc1.kernel" in held for held in (state.params, state.ema))
    assert len(compiled) == 2
    (best, about), (expected_best, expected_about) = (
        orbax_folder.read_items(folder / "best", "weights", "about") for folder in (tmp_path, expected)
    )
    assert about["step"] == expected_about["step"]
    (weights, training), (expected_weights, expected_training) = (
        orbax_folder.read_items(folder / "checkpoints" / str(STEPS), "weights", "training")
        for folder in (tmp_path, expected)
    )
    pairs = [(best, expected_best), (weights, expected_weights), (training, expected_training)]
    for found, others in pairs:
        assert found.keys() == others.keys()
        for name, array in found.items():
            np.testing.assert_allclose(array, others[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert training["optimizer.0.mu.backbone.block2.6.mlp.fc1.kernel"].any()
    before = functional_model(config, 19).arrays()[0]
    assert all((training[f"own.{name}"] != array).any() for name, array in before.items() if "fc1.kernel" in name)
    params = {name: array for name, array in weights.items() if name in before}
    assert params_sha256(params) == result_of(tmp_path)["params_sha256"]
    assert result_of(tmp_path)["mean_iou"] == pytest.approx(result_of(expected)["mean_iou"], abs=1e-3)


@pytest.fixture(scope="module")
def loopless(tmp_path_factory):
    """Settings of a model with a long row of blocks, and what a run without a loop over them leaves."""
    # Adam with its usual eps takes steps of full size from gradients that are rounding alone.
    changes = dict(model__depths=(1, 7, 1, 1), train__ema=0.4, eval__every=3, optim__eps=1e-3)
    workdir = tmp_path_factory.mktemp("loopless") / "run"
    assert run(make_config(**changes), workdir)[0] == 0
    return changes, workdir


def test_blocks_trained_differently_from_their_neighbours_are_not_stacked():
    config = make_config(model__depths=(1, 9, 1, 1), train__scan_blocks=True, optim__frozen=(r"block2\.0\.attn",))
    stacks = functional_model(config, 19).stacks
    assert {key.split(".")[2] for key in stacks.members} == {"1-8"}
    config.optim.frozen = (r"block2\.4\.attn",)
    assert functional_model(config, 19).stacks.members == {}


def test_more_steps_continue_where_the_run_ended(tmp_path, cheap):
    run(make_config(), tmp_path / "long")
    run(make_config(train__steps=4), tmp_path / "run")
    first = records_of(tmp_path / "run")
    status, printed = run(make_config(), tmp_path / "run")
    assert status == 0 and "resuming at step 4 of 6" in printed
    assert records_of(tmp_path / "run")[: len(first)] == first
    assert [record["step"] for record in records_of(tmp_path / "run")] == [2, 4, 4, 6, 6]
    result, expected = result_of(tmp_path / "run"), result_of(tmp_path / "long")
    assert result["step"] == 6 and result["params_sha256"] == expected["params_sha256"]


def test_a_finished_run_reports_that_and_changes_nothing(finished):
    workdir, _, _ = finished
    before = contents(workdir)
    status, printed = run(make_config(), workdir)
    # The name of the folder may break the line anywhere.
    assert status == 0 and "is finished: mIoU " in (said := " ".join(printed.split())) and "at step 6" in said
    assert "--config.train.steps=12" in printed and "--workdir" in printed
    assert contents(workdir) == before


def test_a_finished_run_asked_for_fewer_steps_suggests_a_larger_number(finished):
    status, printed = run(make_config(train__steps=2), finished[0])
    assert status == 0 and "at step 6" in " ".join(printed.split())
    (suggested,) = (line.rpartition("=")[2] for line in printed.splitlines() if "--config.train.steps=" in line)
    assert int(suggested) > 6


def test_evaluating_a_finished_run_again_logs_it_once(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        power_cut_in_the_end(patch)
        with pytest.raises(SystemError):
            run(make_config(), tmp_path)
    status, _ = run(make_config(), tmp_path)
    assert status == 0 and result_of(tmp_path)["params_sha256"] == result_of(finished[0])["params_sha256"]
    assert [(record["step"], "loss" in record) for record in records_of(tmp_path)] == [
        (2, True),
        (4, True),
        (6, True),
        (6, False),
    ]


@pytest.mark.parametrize(
    "key, value, there, now",
    [
        ("optim.lr", 0.5, "0.001", "0.5"),
        ("seed", 3, "0", "3"),
        ("data.train_images", 9, "7", "9"),
        ("augment.crop", (40, 48), "[32, 48]", "[40, 48]"),
        ("model.decoder_dim", 16, "12", "16"),
    ],
)
@pytest.mark.parametrize("steps", [6, 8])
def test_other_settings_are_refused_with_their_key_and_change_nothing(finished, key, value, there, now, steps):
    workdir, _, _ = finished
    before = contents(workdir)
    config = make_config(train__steps=steps, optim__momentum=0.1, **{key.replace(".", "__"): value})
    with pytest.raises(RunError) as caught:
        run(config, workdir)
    message = str(caught.value)
    assert f"  config.{key}: {there} in the run, {now} now\n" in message
    assert "  config.optim.momentum: 0.9 in the run, 0.1 now\n" in message
    assert message.count(" in the run, ") == 2 and "another --workdir" in message
    assert contents(workdir) == before


def test_resuming_with_other_data_and_settings_is_refused_with_a_full_list(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    before = contents(workdir)

    def record(spec, original=metadata.dataset_metadata):
        return original(spec) | {"name": "lanes", "ignore_label": 254}

    monkeypatch.setattr(setup, "dataset_metadata", record)
    with pytest.raises(RunError) as caught:
        run(make_config(optim__lr=0.5, model__decoder_dim=16), workdir)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:-1]] == [
        "  config.model.decoder_dim",
        "  config.optim.lr",
        "  dataset.ignore_label",
        # Not the name: a folder that was moved is the same dataset.
        "  --config.data.changed=accept continues with the current classes",
    ]
    assert contents(workdir) == before


@pytest.mark.parametrize(
    "key, value", [("eval.batch", 8), ("checkpoint.keep", 5), ("train.log_every", 1), ("parallel", "pmap")]
)
def test_settings_that_do_not_affect_the_weights_may_differ(finished, key, value):
    status, printed = run(make_config(**{key.replace(".", "__"): value}), finished[0])
    assert status == 0 and "is finished" in printed


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def no_data(monkeypatch):
    """Fails where a run gets as far as its data."""
    monkeypatch.setattr(setup, "load_data", lambda *_, **__: pytest.fail("data was loaded for settings that are wrong"))


BAD = {
    "train.batch": (6, "6; does not divide among 4 devices: 4 or 8 images do, or 3 devices"),
    "eval.batch": (0, "0; must be at least 1"),
    "augment.crop": ((8, 64), r"\(8, 64\); must be \(height, width\), each at least 32"),
    "augment.scale": ((2.0, 0.5), r"\(2.0, 0.5\); must be \(smallest, largest\)"),
    "augment.flip": (1.5, "1.5; must be at least 0 and at most 1"),
    "augment.cutmix": (1.5, "1.5; must be at least 0 and at most 1"),
    "model.name": ("segformer_b7", "'segformer_b7'; no such model; did you mean 'segformer_b"),
    "model.drop_path_rate": (1.0, "1.0; must be at least 0 and less than 1"),
    "model.dtype": ("float16", "'float16'; must be 'float32' or 'bfloat16'"),
    "parallel": ("vmap", "'vmap'; must be 'jit' or 'pmap'"),
    "optim.name": ("adam", "'adam'; must be 'adamw', 'sgd' or the dotted name of an optimizer of optax"),
    "optim.warmup_steps": (-1, "-1; must be at least 0"),
    "train.steps": (-1, "-1; must be at least 0"),
    "train.log_every": (0, "0; must be at least 1"),
    "checkpoint.every": (0, "0; must be at least 1"),
    "checkpoint.keep": (0, "0; must be at least 1"),
    "eval.every": (-5, "-5; must be at least 0"),
    "eval.pictures": (-1, "-1; must be at least 0"),
    "eval.patience": (2, "2; needs eval.every"),
    "optim.schedule": ("linear", "'linear'; must be 'poly' or 'cosine'"),
    "optim.clip_norm": (-0.5, "-0.5; must be finite and at least 0"),
    "train.accumulate": (0, "0; must be at least 1"),
    "train.ema": (1.0, "1.0; must be at least 0 and less than 1"),
    "train.may_skip": (-1, "-1; must be at least 0"),
    "init.keep": (("head.*",), "needs init.checkpoint"),
    "loss.ohem_threshold": (1.5, "1.5; must be at least 0 and at most 1"),
    "loss.cross_entropy": (0.0, "0.0; cross_entropy, ohem, dice, focal, lovasz, tversky, rmi are all 0; set"),
}


@pytest.mark.parametrize("key", BAD)
def test_an_invalid_setting_is_refused_before_anything_is_done(key, tmp_path, no_data):
    value, message = BAD[key]
    with pytest.raises(RunError, match=message) as caught:
        run(make_config(**{key.replace(".", "__"): value}), tmp_path / "run")
    assert f"config.{key}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tversky_loss_needs_a_weight_of_errors(tmp_path, no_data):
    settings = dict(loss__tversky=1.0, loss__tversky_alpha=0.0, loss__tversky_beta=0.0)
    with pytest.raises(RunError, match=r"config\.loss\.tversky_alpha: 0; tversky_alpha and tversky_beta are 0"):
        run(make_config(**settings), tmp_path / "run")


def test_mixing_needs_two_samples_and_probabilities_of_at_most_one(tmp_path, no_data, monkeypatch):
    with pytest.raises(RunError, match=r"config\.augment\.classmix: 0\.6; the sum of .* augment\.cutmix, 0\.5, and"):
        run(make_config(augment__cutmix=0.5, augment__classmix=0.6), tmp_path / "run")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(RunError, match=r"augment\.cutmix: 0\.5; mixes samples of a batch, and train.batch is 1"):
        run(make_config(augment__cutmix=0.5, train__batch=1), tmp_path / "run")


def test_all_invalid_settings_are_named_in_one_error(tmp_path, no_data):
    keys = ("train.batch", "augment.crop", "optim.name", "checkpoint.keep")
    with pytest.raises(RunError) as caught:
        run(make_config(**{key.replace(".", "__"): BAD[key][0] for key in keys}), tmp_path / "run")
    assert all(f"config.{key}" in str(caught.value) for key in keys)
    assert len(str(caught.value).splitlines()) == 1 + len(keys)


@pytest.mark.parametrize("sizes", [[(60, 200), (40, 64)], [(300, 63)]])
def test_a_crop_larger_than_every_image_is_refused(sizes):
    config = make_config(augment__crop=(128, 128), augment__scale=(0.5, 2.0))
    with pytest.raises(RunError, match=r"crop=\(128, 128\) is larger than every training image, even at .* 2.0,"):
        check_crop(config.augment, np.array(sizes))


def test_a_crop_that_is_too_large_ends_a_run_before_a_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "create_model", lambda *_, **__: pytest.fail("a model was made"))
    with pytest.raises(RunError, match="the best image has 60x96"):
        run(make_config(augment__crop=(64, 64), augment__scale=(1.0, 1.5)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_estimated_padding_matches_drawn_crops():
    sizes, crop = np.array([(40, 64), (40, 64), (100, 30)]), (48, 56)
    config = make_config(augment__crop=crop, augment__scale=(0.5, 2.0))
    keys = jax.random.split(jax.random.key(3), 6000)
    of_image = np.arange(6000) % 3
    scaled = np.asarray(draw_crops(keys, sizes[of_image], config.augment).scaled)
    drawn = 1 - np.minimum(scaled / crop, 1).prod(axis=1).mean()
    assert check_crop(config.augment, sizes) == pytest.approx(drawn, abs=0.01)
    roomy = make_config(augment__crop=(32, 32), augment__scale=(1.0, 2.0))
    assert check_crop(roomy.augment, sizes[:2]) == 0


# ------------------------------------------------------------------------------------------------- what is not finite


def weights_at(workdir, step):
    return {
        name: array.tobytes() for name, array in orbax_folder.load_weights(workdir / f"checkpoints/{step}")[0].items()
    }


@pytest.mark.parametrize(
    "losses, norms, became",
    [
        ({3: math.nan}, {}, "the loss became nan"),
        ({3: math.inf, 4: math.nan}, {}, "the loss became inf"),
        ({}, {3: math.inf}, "the gradient became inf"),
    ],
)
def test_a_non_finite_loss_ends_the_run_with_its_images_and_advice(tmp_path, monkeypatch, losses, norms, became):
    cheap_step(monkeypatch, losses, norms)
    with pytest.raises(RunError) as caught:
        run(make_config(train__log_every=3, checkpoint__every=6), tmp_path)
    message = str(caught.value)
    order = [image for epoch in range(3) for image in np.random.default_rng([0, epoch]).permutation(7)]
    names = ", ".join(f"streets_train_{image:06d}" for image in order[12:16])
    assert message.startswith(f"{became} at step 4, on {names}. The state before it is saved in {tmp_path}/checkpoints")
    for advice in (f"--workdir=NEW --config.init.checkpoint={tmp_path}\n", "optim.lr", "may_skip", "debug.nans"):
        assert advice in message
    lines = console.wrapped(f"segjax train: {message}".replace(str(tmp_path), "runs/name")).splitlines()
    assert max(map(len, lines)) <= 80
    assert [record["step"] for record in records_of(tmp_path)] == [3] and not (tmp_path / "result.json").exists()


def test_the_state_before_a_non_finite_loss_is_saved_and_resumed(tmp_path, monkeypatch):
    config = make_config(train__log_every=3, checkpoint__every=6)
    with monkeypatch.context() as patch:
        cheap_step(patch, {3: math.nan})
        for _ in range(2):
            # The second time from where the first one ended.
            with pytest.raises(RunError, match=r"at step 4, .*checkpoints/3\."):
                run(config, tmp_path / "run")
    cheap_step(monkeypatch)
    run(make_config(train__steps=3), tmp_path / "shorter")
    assert weights_at(tmp_path / "run", 3) == weights_at(tmp_path / "shorter", 3)
    # Once the cause is gone, it goes on as if there had been none.
    assert run(config, tmp_path / "run")[0] == 0 and run(config, tmp_path / "whole")[0] == 0
    assert records_of(tmp_path / "run") == records_of(tmp_path / "whole")
    assert weights_at(tmp_path / "run", 6) == weights_at(tmp_path / "whole", 6)


def test_allowed_steps_are_skipped_and_the_log_has_the_others(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        cheap_step(patch)
        run(make_config(train__log_every=1), tmp_path / "whole")
    cheap_step(monkeypatch, {1: math.nan, 2: math.inf, 5: math.nan})
    status, printed = run(make_config(train__may_skip=2), tmp_path / "run")
    assert status == 0
    said = " ".join(printed.split())
    for became, step in (("nan", 2), ("inf", 3), ("nan", 6)):
        assert f"the loss became {became} at step {step}, on streets_train_" in said
    assert said.count(": skipped") == 3
    losses = [record.get("loss") for record in records_of(tmp_path / "run")]
    whole = [record.get("loss") for record in records_of(tmp_path / "whole")]
    assert losses == [whole[0], whole[3], whole[4], None]
    rate = optim.schedule(make_config().optim, steps=STEPS)
    rates = [record["lr"] for record in records_of(tmp_path / "run") if "lr" in record]
    assert rates == [pytest.approx(float(rate(step))) for step in (0, 1, 2)]
    (training,) = orbax_folder.read_items(tmp_path / "run" / "checkpoints" / "6", "training")
    assert training["skipped"].tolist() == [3, 1] and training["step"] == 6


def test_one_more_bad_step_in_a_row_than_allowed_ends_the_run(tmp_path, monkeypatch):
    cheap_step(monkeypatch, dict.fromkeys((1, 2, 3, 4), math.nan))
    with pytest.raises(RunError, match=r"the loss became nan at step 4, .*\n?.*checkpoints/3\."):
        run(make_config(train__may_skip=2, train__log_every=6), tmp_path)


def test_the_layer_with_the_first_non_finite_output_is_named_on_request(finished, tmp_path):
    weights, about = orbax_folder.load_weights(finished[0])
    # Finite, but not its square.
    weights["backbone.block3.0.attn.proj.kernel"][:] = 3e38
    orbax_folder.save_weights(tmp_path / "start", weights, metadata=about)
    config = make_config(init__checkpoint=str(tmp_path / "start"), debug__nans=True)
    with pytest.raises(RunError, match=r"at step 1, on .* is that of backbone\.block3\.0\.norm2\. The state"):
        run(config, tmp_path / "run")


# --------------------------------------------------------------------------------------------- evaluations on the way


def test_evaluations_change_neither_weights_nor_the_training_log(tmp_path, cheap):
    for every in (0, 1, 3):
        run(make_config(eval__every=every, train__log_every=3), tmp_path / str(every))
    hashes = {result_of(tmp_path / str(every))["params_sha256"] for every in (0, 1, 3)}
    assert len(hashes) == 1
    never, always, sometimes = (
        [record for record in records_of(tmp_path / str(every)) if "loss" in record] for every in (0, 1, 3)
    )
    assert never == always == sometimes
    evaluated = [record["step"] for record in records_of(tmp_path / "1") if "mean_iou" in record]
    assert evaluated == [1, 2, 3, 4, 5, 6] and not (tmp_path / "0" / "best").exists()


@pytest.mark.parametrize("scores, best", [((0.1, 0.5, 0.3, 0.2, 0.4, 0.45), 2), ((None, 0.2, 0.2, 0.1, 0.15, 0.3), 6)])
def test_best_has_the_weights_of_the_best_evaluation_including_the_last(tmp_path, monkeypatch, cheap, scores, best):
    scored(monkeypatch, *scores)
    status, printed = run(make_config(eval__every=1, checkpoint__every=1, checkpoint__keep=6), tmp_path)
    assert status == 0
    weights, about = orbax_folder.load_weights(tmp_path / "best")
    assert {name: array.tobytes() for name, array in weights.items()} == weights_at(tmp_path, best)
    assert (about["step"], about["mean_iou"]) == (best, scores[best - 1])
    assert result_of(tmp_path)["best"] == {"step": best, "mean_iou": scores[best - 1]}
    assert f"step 2: mIoU {scores[1]:.4f}, the best so far\n" in printed
    assert f"step 4: mIoU {scores[3]:.4f}\n" in printed


@pytest.mark.parametrize("cut", [False, True])
def test_training_ends_after_patience_evaluations_without_improvement(tmp_path, monkeypatch, cheap, cut):
    config = make_config(eval__every=1, eval__patience=2)
    with monkeypatch.context() as patch:
        scored(patch, 0.5, 0.4, 0.5, 0.5, 0.5)
        if cut:
            with patch.context() as inner:
                power_cut_in_the_end(inner)
                with pytest.raises(SystemError):
                    run(config, tmp_path)
        status, printed = run(config, tmp_path)
    assert status == 0 and "stopped early at step 3: no better mIoU in 2 evaluations" in printed
    result = result_of(tmp_path)
    assert (result["step"], result["stopped_early"], result["best"]) == (3, True, {"step": 1, "mean_iou": 0.5})
    # One evaluation after each step, although the last was made again for its pictures.
    assert [record["step"] for record in records_of(tmp_path) if "mean_iou" in record] == [1, 2, 3]
    assert [step for step, _ in events_of(tmp_path)["mean_iou"]] == [1, 2, 3]
    before = contents(tmp_path)
    status, printed = run(config, tmp_path)
    assert status == 0 and "at step 3" in printed and "no better mIoU in 2 evaluations" in printed
    assert "--config.eval.patience=4" in printed and "--config.train.steps" not in printed
    assert max(map(len, printed.replace(str(tmp_path), "runs/name").splitlines())) <= 80
    assert contents(tmp_path) == before


def test_a_run_that_stopped_early_continues_with_more_patience(tmp_path, monkeypatch, cheap):
    with monkeypatch.context() as patch:
        scored(patch, 0.5, 0.4, 0.3, 0.3, 0.2, 0.6, 0.1)
        run(make_config(eval__every=1, eval__patience=2), tmp_path / "run")
        assert result_of(tmp_path / "run")["step"] == 3
        status, printed = run(make_config(eval__every=1, eval__patience=4), tmp_path / "run")
    assert status == 0 and "resuming at step 3" in printed
    result = result_of(tmp_path / "run")
    assert result["step"] == 6 and not result["stopped_early"] and result["best"] == {"step": 5, "mean_iou": 0.6}
    assert [step for step, _ in events_of(tmp_path / "run")["mean_iou"]] == [1, 2, 3, 4, 5, 6]
    run(make_config(), tmp_path / "whole")
    assert result["params_sha256"] == result_of(tmp_path / "whole")["params_sha256"]


def test_an_evaluation_caught_up_on_resuming_counts_even_after_a_kill(tmp_path, monkeypatch, cheap):
    config = make_config(eval__every=2, checkpoint__every=6)
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch)
        assert run(config, tmp_path / "run")[0] == 130
    assert not (tmp_path / "run" / "best").exists()
    with monkeypatch.context() as patch:
        power_cut_before(patch, 3)
        with pytest.raises(SystemError):
            run(config, tmp_path / "run")
    assert (tmp_path / "run" / "best").exists()
    run(config, tmp_path / "run")
    # The stop has left a checkpoint that the other run has not.
    left, expected = remains(tmp_path / "run"), remains(tmp_path / "whole")
    lines = differences(expected, left)
    assert [line for line in lines if not line.startswith("checkpoint")] == []
    assert left["checkpoint 6, record"] == expected["checkpoint 6, record"]


def test_evaluations_of_a_finished_run_count_when_it_continues(tmp_path, monkeypatch, cheap):
    with monkeypatch.context() as patch:
        scored(patch, 0.2, 0.9, 0.3)
        run(make_config(eval__every=2, train__steps=4), tmp_path)
        assert result_of(tmp_path)["best"]["step"] == 4
        run(make_config(eval__every=2, train__steps=6), tmp_path)
    assert result_of(tmp_path)["best"] == {"step": 4, "mean_iou": 0.9}
    assert orbax_folder.load_weights(tmp_path / "best")[1]["step"] == 4
    assert [step for step, _ in events_of(tmp_path)["mean_iou"]] == [2, 4, 6]
    assert [record["step"] for record in records_of(tmp_path) if "mean_iou" in record] == [2, 4, 6]


# ------------------------------------------------------------------------------------------------------------ averages


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run that keeps an average, with every state of it."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    config = make_config(train__ema=0.4, eval__every=3, checkpoint__every=1, checkpoint__keep=STEPS)
    assert run(config, workdir)[0] == 0
    return config, workdir


def test_the_average_of_the_weights_is_saved_and_evaluated(averaged):
    _, workdir = averaged
    average = None
    for step in range(1, STEPS + 1):
        saved, training = orbax_folder.read_items(workdir / "checkpoints" / str(step), "weights", "training")
        own = {name: training[f"own.{name}"] for name in saved}
        if average is not None:
            decay = min(0.4, (1 + step - 1) / (10 + step - 1))
            expected = {name: decay * average[name] + (1 - decay) * own[name] for name in own}
            for name in own:
                np.testing.assert_allclose(saved[name], expected[name], rtol=1e-5, atol=1e-7)
        average = saved
    assert any(not np.array_equal(saved[name], own[name]) for name in own)
    params = {name: array for name, array in saved.items() if not name.endswith((".mean", ".var"))}
    assert params_sha256(params) == result_of(workdir)["params_sha256"]


def test_the_best_model_has_the_score_in_its_metadata(averaged):
    _, workdir = averaged
    about = orbax_folder.load_weights(workdir / "best")[1]
    evaluations = {r["step"]: r["mean_iou"] for r in records_of(workdir) if "mean_iou" in r}
    assert set(evaluations) == {3, 6} and about["mean_iou"] == max(evaluations.values()) == evaluations[about["step"]]
    assert miou_of(load(workdir / "best").model) == pytest.approx(about["mean_iou"], abs=2e-3)


def test_a_run_with_averaged_weights_resumes_bit_for_bit(averaged, tmp_path, monkeypatch):
    config, whole = averaged
    with monkeypatch.context() as patch:
        signal_before(patch, 3)
        assert run(config, tmp_path / "run")[0] == 130
    assert run(config, tmp_path / "run")[0] == 0
    assert differences(remains(whole), remains(tmp_path / "run")) == []


# -------------------------------------------------------------------------------------------------------------- console


def test_images_per_second_exclude_compiling_saving_and_evaluating(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    meter = Meter(batch_size=8)
    assert meter.images_per_second is None
    clock.now = 60.0  # the compiler
    meter.restart(1, 0.0)
    clock.now = 62.0
    meter.lap(11, 0.5)  # 10 steps in 2 seconds
    assert meter.images_per_second == pytest.approx(40)
    clock.now = 162.0  # an evaluation
    meter.restart(11, 3.0)
    clock.now = 168.0
    meter.lap(21, 4.5)  # 10 steps in 6 seconds
    assert meter.images_per_second == pytest.approx(20)
    # Half a second of the first two, one and a half of the last six.
    assert meter.waiting == pytest.approx(2 / 8)


def test_the_time_left_does_not_include_compilation(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    meter, progress = Meter(batch_size=4), Progress(0, 1000)
    clock.now = 60.0  # the compiler; a tenth of a second a step from here on
    meter.restart(1, 0.0)
    for step in (100, 200, 300):
        clock.now = 60.0 + 0.1 * step
        meter.lap(step, 0.0)
        progress.show(step, 1.0, meter)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 300/1000  loss 1.0000  39.9 img/s  1.2 min left"


def test_on_a_terminal_progress_is_one_bar_of_80_columns(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    meter = SimpleNamespace(images_per_second=1234.5, waiting=0.25, seconds_for=lambda steps: None)
    with Progress(10, 40_000) as progress:
        for step in range(50, 500, 50):
            # The bar is drawn ten times a second.
            time.sleep(0.12)
            progress.show(step, 1.2345, meter)
    frames = terminal.getvalue().replace("\n", "\r").split("\r")
    assert max(map(len, frames)) <= 80
    assert any(
        "450/40000" in frame and "loss 1.23" in frame and "1234.5 img/s, 25% waiting" in frame for frame in frames
    )


@pytest.mark.parametrize(
    "dataset, counts", [("streets", (400, 64)), ("camvid", (367, 233)), ("folder", (12_345, 1_000))]
)
def test_the_description_of_every_default_fits_80_columns(dataset, counts, capsys):
    config = segformer.get_config(f"b5,{dataset}")
    config.augment.crop, config.train.steps = (512, 512), 3000
    workdir = loop.default_workdir(config)
    names = tuple(f"class {k}" for k in range(150))
    spec = {"streets": specs.STREETS, "camvid": specs.CAMVID}.get(
        dataset, specs.DatasetSpec("apartments", names, ((1, 2, 3),) * 150, 255)
    )
    splits = [OpenSplit(range(count), spec, None) for count in counts]
    model = SimpleNamespace(
        arrays=lambda: ({"w": np.empty((84_000_000,), np.int8)}, {}),
        spec=SimpleNamespace(name=config.model.name),
        adapters=NO_ADAPTERS,
        frozen=frozenset(),
    )
    parallel = SimpleNamespace(devices=[SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB")] * 8, kind="jit")
    steps = setup.summary_of_steps(config.train, config.augment, config.optim, padding=0.25)
    protocol = Protocol("slide", (1024, 1024), scales=(0.75, 1.25), flip=True, size_divisor=32, base_size=(2048, 1024))
    begins = "segformer.b5.640x640.ade.160k.pth: encoder and decoder, classifier random (150 classes there, 11 here)"
    summary = setup.summary(workdir, *splits, model, parallel, config, begins=begins, steps=steps, protocol=protocol)
    describe(
        summary, ["a class has no pixel in train and cannot be learned: " + "bicyclist " * 9], start=1000, steps=3000
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert f"workdir    runs/segformer-b5-{dataset}" in lines
    assert any(line.startswith("evaluation sliding window of 1024x1024 every 768x768, resized") for line in lines)
    assert "resuming at step 1000 of 3000" in lines and any(line.startswith("warning: a class") for line in lines)
    assert any("(25% padding)" in line for line in lines)


@pytest.mark.parametrize("num_classes", [1, 2, 11, 19])
def test_the_table_of_classes_shows_every_class_and_fits_80_columns(num_classes, capsys):
    names = tuple(f"class number {k} of many more" for k in range(num_classes))
    spec = specs.DatasetSpec("noise", names, ((0, 0, 0),) * num_classes, 255)
    ious = [k / 20 for k in range(max(num_classes, 2) - 1)] + [None]
    result = {"mean_iou": 0.5, "pixel_accuracy": 0.25, "per_class_iou": ious, "step": 7, "images_per_second": None}
    report(result, spec, Path("runs/name"))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for name in names if num_classes > 1 else ("background", *names):
        assert console.cell(name, 20) in printed
    for iou in ious[:-1]:
        assert f"{iou:.4f}" in printed
    assert "mIoU 0.5000   pixel accuracy 0.2500   step 7" in printed


def test_a_second_run_in_a_workdir_is_refused_before_changing_anything(tmp_path):
    config = make_config()
    with lock.held(tmp_path / "run" / loop.LOCK, what="the first", remedy=""):
        before = contents(tmp_path)
        with pytest.raises(lock.HeldError, match=f"run is being written by process {os.getpid()} .*another --workdir"):
            run(config, tmp_path / "run")
        assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "where, error",
    [
        ("compile_step", RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")),
        ("build", MemoryError()),
    ],
)
def test_a_run_without_enough_memory_names_settings_that_need_less(where, error, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise error

    if where == "compile_step":
        monkeypatch.setattr(setup, "build", lambda *_: (SimpleNamespace(summary={}, warnings=[], first=0, steps=6), 0))
    monkeypatch.setattr(setup, where, fails)
    with pytest.raises(RunError, match="not enough memory") as caught:
        run(make_config(), tmp_path / "run")
    for name in ("train.accumulate", "train.remat", "model.dtype=bfloat16", "train.batch", "augment.crop"):
        assert f"--config.{name}" in str(caught.value)


@pytest.mark.parametrize("resident", [0, 900])
def test_a_step_that_exceeds_memory_is_refused_before_it_runs(resident, monkeypatch, capsys):
    monkeypatch.setattr(setup.memory, "limit", lambda *_, **__: 10_000)
    step = jax.jit(lambda state, batch, key: state + 1)
    parallel = SimpleNamespace(own_devices=jax.local_devices()[:1])
    # Argument and result.
    for size, fits in ((4000, True), (4600, resident == 0), (6000, False)):
        arguments = np.zeros(size, np.uint8), 0, 0
        if fits:
            setup._compiled(step, arguments, parallel, resident=resident)
            continue
        with pytest.raises(RunError, match=r"a step needs .*; the device has") as caught:
            setup._compiled(step, arguments, parallel, resident=resident)
        assert ("data.resident_gb=0" in str(caught.value)) == (resident > 0)
    assert ("the images" in capsys.readouterr().out) == (resident > 0)


def test_a_first_ctrl_c_requests_a_stop_and_a_second_one_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_ctrl_c_is_not_handled():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


# ----------------------------------------------------------------------------------------------------- the configs


@pytest.mark.parametrize(
    "argument, name, dataset",
    [
        ("", "segformer_b0", "streets"),
        ("b2,camvid", "segformer_b2", "camvid"),
        ("folder, b5", "segformer_b5", "folder"),
        ("camvid", "segformer_b0", "camvid"),
    ],
)
def test_variant_and_dataset_after_the_colon_come_in_any_order(argument, name, dataset):
    config = segformer.get_config(argument)
    assert (config.model.name, config.data.name) == (name, dataset)
    assert str(loop.default_workdir(config)) == f"runs/{name.replace('_', '-')}-{dataset}"
    check(config, Path("runs/name"))


def test_an_unknown_variant_or_dataset_is_refused_with_both_lists():
    with pytest.raises(ValueError, match=r"'b9' is not a variant \(b0, .*b5\) or dataset \(streets, .*folder\)"):
        common.parse("b9,camvid", segformer.VARIANTS)


# ----------------------------------------------------------------------------------------------------- the command line

SMALL = (
    "--config.data.train_images=4",
    "--config.data.eval_images=3",
    "--config.data.size=(32,64)",
    "--config.augment.crop=(32,64)",
    "--config.train.batch=2",
    "--config.train.log_every=1",
    "--config.eval.batch=2",
    "--config.eval.pictures=2",
)


MANY = 150
TINY = f"""
from configs import segformer

def get_config(argument=""):
    config = segformer.get_config(argument)
    config.model.update({SIZES!r})
    return config
"""


@contextlib.contextmanager
def started(*arguments):
    """train.py in a process of its own, which does not outlive the test."""
    command = [sys.executable, "train.py", *arguments]
    quick, pipe = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}, subprocess.PIPE
    with subprocess.Popen(command, cwd=REPO, env=quick, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def train_py(*arguments):
    """-> exit status, stdout, stderr of a run of train.py."""
    with started(*arguments) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def command_line(tmp_path_factory):
    """A run with a config of its own, stopped by Ctrl-C and started again by the same command."""
    folder = tmp_path_factory.mktemp("command_line")
    (folder / "tiny.py").write_text(TINY)
    workdir = folder / "run"
    settings = (f"--config={folder / 'tiny.py'}:b0,streets", f"--workdir={workdir}", *SMALL)
    settings += (f"--config.train.steps={MANY}",)
    # A checkpoint at every step takes time, so that the signal comes long before the last one.
    with started(*settings, "--config.checkpoint.every=1") as process:
        log, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
        while not (log.exists() and log.read_text()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    stopped = process.returncode, out, err
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    return SimpleNamespace(
        workdir=workdir, stopped=stopped, newest=newest, settings=settings, resumed=train_py(*settings)
    )


@pytest.mark.slow
def test_ctrl_c_ends_train_py_with_130_after_saving(command_line):
    status, out, err = command_line.stopped
    assert status == 130
    said = " ".join(out.split())
    assert f"stopped at step {command_line.newest} of {MANY} and saved in {command_line.workdir} to continue" in said
    assert "Traceback" not in err and "stopping after this step and saving" in err


def test_ctrl_c_before_the_first_step_ends_train_py_with_130(tmp_path):
    with started(f"--workdir={tmp_path / 'run'}", "--config.data.train_images=5000") as process:
        assert any(line.startswith("drawing") for line in process.stdout)
        # Again where it was lost: code of others that is being imported may swallow the exception.
        for _ in range(10):
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=4)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_the_same_command_resumes_and_finishes(command_line):
    status, out, err = command_line.resumed
    assert (status, err) == (0, "")
    assert 0 < command_line.newest < MANY and f"resuming at step {command_line.newest} of {MANY}" in out
    result = result_of(command_line.workdir)
    assert result["step"] == MANY and len(result["params_sha256"]) == 64
    steps = [record["step"] for record in records_of(command_line.workdir)]
    assert steps == [*range(1, MANY + 1), MANY]
    assert (command_line.workdir / "curve.png").exists()
    assert len(list((command_line.workdir / "predictions").glob("*.png"))) == 2
    lines = out.replace(str(command_line.workdir.parent), "runs").splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_train_py_reports_a_finished_run_and_other_settings(command_line):
    status, out, err = train_py(*command_line.settings)
    said = f"is finished: mIoU {result_of(command_line.workdir)['mean_iou']:.4f}"
    assert (status, err) == (0, "") and said in " ".join(out.split())
    status, out, err = train_py(*command_line.settings, "--config.optim.lr=0.5")
    assert status == 2 and "model  " not in out and "Traceback" not in err
    assert f"config.optim.lr: {segformer.get_config().optim.lr} in the run, 0.5 now" in err


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--config.augment.crop=(8,8)", "config.augment.crop: (8, 8); must be (height, width), each at least 32"),
        ("--config.train.steps=many", "--config.train.steps=many"),
        ("--config.trian.steps=3", "trian"),
        ("--config=configs/segformer.py:b9", "'b9' is not a variant (b0, b1, b2, b3, b4, b5, plain_b0, "),
        ("--config=configs/nothing.py", "configs/nothing.py"),
        ("--workdri=runs/x", "workdri"),
        ("config.train.steps=3", "config.train.steps=3"),
        ("--workdir=pyproject.toml/run", "pyproject.toml"),
    ],
)
def test_train_py_refuses_invalid_arguments_in_a_few_words(argument, said):
    status, _, err = train_py("--workdir=/nonexistent/never", argument, *SMALL[:2])
    assert status != 0
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 12
