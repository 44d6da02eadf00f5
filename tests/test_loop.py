"""Whole runs: what they leave behind, that they go on as if never stopped, and what they refuse."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FAMILIES, SIZES, numpy_draws

from configs import common, hrnet, segformer, segnext
from segjax import console, loop, optim, parts, settings
from segjax.checkpoint import load_model
from segjax.data import specs, streets
from segjax.data.augment import normalise
from segjax.losses import predictions
from segjax.models import layers
from segjax.state import params_sha256
from segjax.weights import named_variables

REPO = Path(__file__).parents[1]
STEPS = 6
FAMILY_CONFIGS = {"segformer": (segformer, "b0"), "ocr": (hrnet, "small_ocr"), "segnext": (segnext, "small")}
PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = pytest.mark.usefixtures("quick_compile")


def make_config(family="segformer", **changes):
    """Six steps of a tiny model; `changes` by dotted name, dots written as two underscores."""
    recipe, variant = FAMILY_CONFIGS[family]
    config = recipe.get_config(f"{variant},streets")
    config.model.update(FAMILIES[family][1])
    config.data.update(train_images=7, eval_images=5, size=(40, 64))
    config.augment.crop = (32, 48)
    config.train.update(steps=STEPS, batch=4, log_every=2)
    config.optim.update(warmup_steps=2, lr=1e-3)
    config.eval.update(batch=4, pictures=0)
    config.checkpoint.every = 4
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def run(config, workdir):
    """-> exit status, what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = loop.train(config, workdir)
    return status, printed.getvalue()


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())


def records_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt_before(monkeypatch, step):
    """Ctrl-C while step number `step` (from 0) is being made ready."""
    original = loop.TrainBatches.at

    def at(self, number):
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, number)

    monkeypatch.setattr(loop.TrainBatches, "at", at)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compile):
    """A run of six steps without interruption: (folder, exit status, what it printed)."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, *run(make_config(eval__pictures=3), workdir)


class CheapStep(loop.TrainStep):
    """In place of a training step where only the loop is looked at: shifts all weights by what is in the batch.

    The loss is not finite where `fails(step)` says so, and the state then as the real step leaves it.
    """

    @staticmethod
    def fails(step):
        return jnp.zeros((), bool)

    value = jnp.nan

    def __call__(self, state, batch, key, *, axis_name=None):
        total = jnp.sum(batch["image"], dtype=jnp.int32)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        shift = 1e-9 * total.astype(jnp.float32)
        loss = jnp.where(self.fails(state.step), self.value, 1000 * shift)
        params = {name: 0.9 * value + shift for name, value in state.params.items()}
        after = self._unless_not_finite(
            jnp.isfinite(loss),
            state,
            dict(params=params, batch_stats=state.batch_stats, opt_state=state.opt_state, ema=state.ema),
        )
        stopped = after.skipped[1] > self.may_skip
        return after, {"loss": loss, "gradient_norm": jnp.ones(()), "stopped": stopped}


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(loop, "TrainStep", CheapStep)


# --------------------------------------------------------------------------------------------- what a run leaves behind


def test_a_run_leaves_its_result_curve_predictions_and_checkpoints(finished):
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


def test_the_result_says_what_was_reached_and_with_which_settings(finished):
    result = result_of(finished[0])
    assert set(result) == {
        "mean_iou",
        "pixel_accuracy",
        "per_class_iou",
        "step",
        "stopped_early",
        "best",
        "images_per_second",
        "config",
        "params_sha256",
    }
    assert result["step"] == STEPS and result["images_per_second"] > 0 and result["stopped_early"] is False
    assert result["best"] == {"step": STEPS, "mean_iou": result["mean_iou"]}
    assert result["config"] == json.loads(json.dumps(make_config(eval__pictures=3).to_dict()))
    assert len(result["per_class_iou"]) == 19
    present = [iou for iou in result["per_class_iou"] if iou is not None]
    assert present and all(0 <= iou <= 1 for iou in present)
    assert result["mean_iou"] == pytest.approx(sum(present) / len(present), rel=1e-12)


def test_the_result_is_that_of_the_saved_model_on_the_evaluation_images(finished):
    workdir, _, _ = finished
    result, model = result_of(workdir), load_model(workdir)
    variables = {name: variable.get_value() for name, variable in named_variables(model).items()}
    params = {name: value for name, value in variables.items() if not name.endswith((".mean", ".var"))}
    assert params_sha256(params) == result["params_sha256"]
    split = streets.load("val", num_images=5, size=(40, 64), seed=0)
    logits = nnx.jit(lambda model, images: model(normalise(images))[0])(model, split.images)
    predicted = np.asarray(predictions(logits, (40, 64)))
    valid = split.labels != 255
    right = (predicted == split.labels) & valid
    assert result["pixel_accuracy"] == pytest.approx(right.sum() / valid.sum(), abs=1e-3)
    for k, iou in enumerate(result["per_class_iou"]):
        union = ((predicted == k) | (split.labels == k)) & valid
        expected = (right & (split.labels == k)).sum() / union.sum() if union.any() else None
        assert iou == (expected if expected is None else pytest.approx(expected, abs=2e-3))


def test_the_metrics_follow_the_steps_and_the_schedule(finished):
    records = records_of(finished[0])
    training, evaluation = records[:-1], records[-1]
    assert [record["step"] for record in training] == [2, 4, 6]
    rate = optim.schedule(make_config().optim, steps=STEPS)
    for record in training:
        assert set(record) == {"step", "loss", "gradient_norm", "lr", "images_per_second", "waiting"}
        assert 0 < record["gradient_norm"] < 100
        assert 1 < record["loss"] < 6  # log(19) is 2.9
        assert record["lr"] == pytest.approx(float(rate(record["step"] - 1)), rel=1e-6)
    assert set(evaluation) == {"step", "mean_iou", "pixel_accuracy", "iou"} and evaluation["step"] == STEPS
    result = result_of(finished[0])
    assert evaluation["mean_iou"] == result["mean_iou"]
    assert evaluation["iou"] == dict(zip(specs.STREETS.label_names, result["per_class_iou"], strict=True))


def test_a_run_says_what_it_does_in_lines_of_80_columns(finished):
    workdir, _, printed = finished
    lines = printed.replace(str(workdir), "runs/name").splitlines()
    assert [line for line in lines if len(line) > 80] == []
    for phrase in (
        "model    segformer_b0, ",
        "data     streets",
        "to train on (train), 5 to evaluate (val)",
        "19 classes",
        "steps    6 of 4 crops of 32x48, adamw",
        "device   4 x cpu, jit",
        "workdir  runs/name",
        "step 6/6  loss ",
        "evaluating on 5 images (val)",
        "vegetation",
        "mIoU ",
        "runs/name/result.json",
    ):
        assert sum(phrase in line for line in lines) >= 1, phrase


def test_a_second_run_elsewhere_is_the_same_bit_for_bit_and_another_seed_is_not(finished, tmp_path):
    run(make_config(), tmp_path / "again")
    again, first = result_of(tmp_path / "again"), result_of(finished[0])
    for same in ("params_sha256", "mean_iou", "per_class_iou"):
        assert again[same] == first[same]
    run(make_config(seed=1), tmp_path / "other")
    assert result_of(tmp_path / "other")["params_sha256"] != first["params_sha256"]


def test_a_run_without_steps_measures_the_initial_weights(tmp_path):
    status, _ = run(make_config(train__steps=0), tmp_path)
    result = result_of(tmp_path)
    assert status == 0 and result["step"] == 0 and result["images_per_second"] is None
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert [record["step"] for record in records_of(tmp_path)] == [0]


# ------------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(finished, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        interrupt_before(patch, step)
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


@pytest.mark.parametrize("family", ["ocr", "segnext"])
def test_a_run_of_another_family_trains_goes_on_bit_for_bit_and_is_built_again(family, tmp_path, monkeypatch):
    seen = []

    def make_skeleton(*args, original=parts.make_skeleton, **kwargs):
        with numpy_draws():
            return original(*args, **kwargs)

    def train_step(*, original=loop.TrainStep, **settings):
        seen.append(settings["aux_weight"])
        return original(**settings)

    monkeypatch.setattr(parts, "make_skeleton", make_skeleton)
    monkeypatch.setattr(loop, "TrainStep", train_step)
    config = make_config(
        family, train__steps=3, loss__aux_weight=0.3, checkpoint__every=2, model__dropout_rate=0.2, data__eval_images=2
    )
    # Without the fast forms, which take longer to compile.
    with layers.published_forms():
        assert run(config, tmp_path / "whole")[0] == 0
        with monkeypatch.context() as patch:
            interrupt_before(patch, 0)
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
        model = load_model(tmp_path / "whole" / "checkpoints" / str(step))
        variables = named_variables(model).items()
        hashes[step] = params_sha256({name: v.get_value() for name, v in variables if isinstance(v, nnx.Param)})
    assert hashes[3] == expected["params_sha256"] != hashes[2]
    assert (model.spec.name, model.spec.num_classes) == (FAMILIES[family][0], 19)
    assert dict(model.spec.overrides).items() >= FAMILIES[family][1].items()


def test_a_run_that_was_stopped_during_an_evaluation_has_saved_what_it_says(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        original = loop.evaluate

        def evaluate(*args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return original(*args, **kwargs)

        patch.setattr(loop, "evaluate", evaluate)
        status, printed = run(make_config(eval__every=3), tmp_path)
    assert status == 130 and "stopped at step 3 of 6 and saved" in printed
    status, printed = run(make_config(eval__every=3), tmp_path)
    assert status == 0 and "resuming at step 3 of 6" in printed
    assert result_of(tmp_path)["params_sha256"] == result_of(finished[0])["params_sha256"]


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        original = loop.TrainBatches.at

        def at(self, number):
            if number == 5:
                raise SystemError("power cut")
            return original(self, number)

        patch.setattr(loop.TrainBatches, "at", at)
        with pytest.raises(SystemError, match="power cut"):
            run(make_config(train__log_every=1), tmp_path)
    # Half a line, as of a machine that stopped while writing it.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    status, printed = run(make_config(train__log_every=1), tmp_path)
    assert status == 0 and "resuming at step 4 of 6" in printed
    assert result_of(tmp_path)["params_sha256"] == result_of(finished[0])["params_sha256"]
    assert [record["step"] for record in records_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 6]


def test_a_run_stopped_under_jit_goes_on_under_pmap_to_the_same_weights(tmp_path, monkeypatch, cheap):
    run(make_config(), tmp_path / "jit")
    with monkeypatch.context() as patch:
        interrupt_before(patch, 2)
        assert run(make_config(), tmp_path / "mixed")[0] == 130
    status, printed = run(make_config(parallel="pmap"), tmp_path / "mixed")
    assert status == 0 and "resuming at step 3 of 6" in printed and "device   4 x cpu, pmap" in printed
    mixed, expected = result_of(tmp_path / "mixed"), result_of(tmp_path / "jit")
    for same in ("params_sha256", "mean_iou", "per_class_iou"):
        assert mixed[same] == expected[same]
    losses = [[record.get("loss") for record in records_of(tmp_path / kind)] for kind in ("jit", "mixed")]
    assert losses[0][-2:] == losses[1][-2:] and len(losses[0]) == len(losses[1])


def test_more_steps_go_on_where_the_run_ended(tmp_path, cheap):
    run(make_config(), tmp_path / "long")
    run(make_config(train__steps=4), tmp_path / "run")
    first = records_of(tmp_path / "run")
    status, printed = run(make_config(), tmp_path / "run")
    assert status == 0 and "resuming at step 4 of 6" in printed
    assert records_of(tmp_path / "run")[: len(first)] == first
    assert [record["step"] for record in records_of(tmp_path / "run")] == [2, 4, 4, 6, 6]
    result, expected = result_of(tmp_path / "run"), result_of(tmp_path / "long")
    assert result["step"] == 6 and result["params_sha256"] == expected["params_sha256"]


def test_a_finished_run_says_so_and_changes_nothing(finished):
    workdir, _, _ = finished
    before = contents(workdir)
    status, printed = run(make_config(), workdir)
    assert status == 0 and "is finished: mIoU " in printed and "at step 6" in printed
    assert "--config.train.steps=12" in printed and "--workdir" in printed
    assert contents(workdir) == before


def test_a_finished_run_asked_for_fewer_steps_suggests_more_than_it_has(finished):
    status, printed = run(make_config(train__steps=2), finished[0])
    assert status == 0 and "at step 6" in printed
    (suggested,) = (line.rpartition("=")[2] for line in printed.splitlines() if "--config.train.steps=" in line)
    assert int(suggested) > 6


def test_evaluating_a_finished_training_again_logs_it_once(finished, tmp_path, monkeypatch):
    # Stopped between the last step and the result.
    def draw(*_):
        raise SystemError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "draw", draw)
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
def test_other_settings_are_refused_by_key_and_change_nothing(finished, key, value, there, now, steps):
    workdir, _, _ = finished
    before = contents(workdir)
    config = make_config(train__steps=steps, optim__momentum=0.1, **{key.replace(".", "__"): value})
    with pytest.raises(loop.RunError) as caught:
        run(config, workdir)
    message = str(caught.value)
    assert f"  config.{key}: {there} there, {now} now\n" in message
    assert "  config.optim.momentum: 0.9 there, 0.1 now\n" in message
    assert message.count(" there, ") == 2 and "another --workdir" in message
    assert contents(workdir) == before


@pytest.mark.parametrize(
    "key, value", [("eval.batch", 8), ("checkpoint.keep", 5), ("train.log_every", 1), ("parallel", "pmap")]
)
def test_settings_that_change_no_weights_may_differ(finished, key, value):
    status, printed = run(make_config(**{key.replace(".", "__"): value}), finished[0])
    assert status == 0 and "is finished" in printed


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def no_data(monkeypatch):
    """Fails where a run gets as far as its data."""
    monkeypatch.setattr(parts, "load_data", lambda config: pytest.fail("data was loaded for settings that are wrong"))


BAD = {
    "train.batch": (6, "does not divide among 4 devices"),
    "eval.batch": (0, "eval.batch=0"),
    "augment.crop": ((8, 64), r"at least 32 each, not \(8, 64\)"),
    "augment.scale": ((2.0, 0.5), r"\(smallest, largest\), not \(2.0, 0.5\)"),
    "augment.flip": (1.5, "flip"),
    "model.name": ("segformer_b7", "'segformer_b7'"),
    "model.dtype": ("float16", "'float16'"),
    "parallel": ("vmap", "'vmap'"),
    "optim.name": ("adam", "'adam'"),
    "optim.warmup_steps": (-1, "warmup_steps"),
    "train.steps": (-1, "must not be negative: -1"),
    "train.log_every": (0, "at least 1: 0"),
    "checkpoint.every": (0, "at least 1: 0"),
    "checkpoint.keep": (0, "at least 1: 0"),
    "eval.every": (-5, "eval.every"),
    "eval.pictures": (-1, "eval.pictures"),
}


@pytest.mark.parametrize("key", BAD)
def test_a_setting_that_cannot_be_used_is_refused_before_anything_is_done(key, tmp_path, no_data):
    value, message = BAD[key]
    with pytest.raises(loop.RunError, match=message) as caught:
        run(make_config(**{key.replace(".", "__"): value}), tmp_path / "run")
    assert f"config.{key}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_all_settings_that_cannot_be_used_are_named_in_one_error(tmp_path, no_data):
    keys = ("train.batch", "augment.crop", "optim.name", "checkpoint.keep")
    with pytest.raises(loop.RunError) as caught:
        run(make_config(**{key.replace(".", "__"): BAD[key][0] for key in keys}), tmp_path / "run")
    assert all(f"config.{key}" in str(caught.value) for key in keys)
    assert len(str(caught.value).splitlines()) == 1 + len(keys)


# NAN TESTS


# -------------------------------------------------------------------------------------------------------------- console


def test_images_per_second_leave_out_compiling_saving_and_evaluating(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    meter = console.Meter(batch_size=8)
    assert meter.images_per_second is None
    clock.now = 60.0  # the compiler
    meter.restart(1)
    clock.now = 62.0
    meter.lap(11)  # 10 steps in 2 seconds
    assert meter.images_per_second == pytest.approx(40)
    clock.now = 162.0  # an evaluation
    meter.restart(11)
    clock.now = 168.0
    meter.lap(21)  # 10 steps in 6 seconds
    assert meter.images_per_second == pytest.approx(20)


def test_the_time_left_does_not_count_the_compiler(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    meter, progress = console.Meter(batch_size=4), console.Progress(0, 1000)
    clock.now = 60.0  # the compiler; a tenth of a second a step from here on
    meter.restart(1)
    for step in (100, 200, 300):
        clock.now = 60.0 + 0.1 * step
        meter.lap(step)
        progress.show(step, 1.0, meter)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 300/1000  loss 1.0000  39.9 img/s  1.2 min left"


def test_on_a_terminal_progress_is_one_bar_of_80_columns(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    meter = SimpleNamespace(images_per_second=1234.5)
    with console.Progress(10, 40_000) as progress:
        for step in range(50, 500, 50):
            progress.show(step, 1.2345, meter)
    frames = terminal.getvalue().replace("\n", "\r").split("\r")
    assert max(map(len, frames)) <= 80
    assert any("450/40000" in frame and "loss 1.23" in frame and "1234.5 img/s" in frame for frame in frames)


@pytest.mark.parametrize(
    "dataset, counts", [("streets", (400, 64)), ("camvid", (367, 233)), ("folder", (12_345, 1_000))]
)
def test_the_description_of_every_default_fits_80_columns(dataset, counts, capsys):
    config = segformer.get_config(f"b5,{dataset}")
    names = tuple(f"class {k}" for k in range(150))
    spec = {"streets": specs.STREETS, "camvid": specs.CAMVID}.get(
        dataset, specs.DatasetSpec("apartments", names, ((1, 2, 3),) * 150, 255)
    )
    splits = [SimpleNamespace(images=range(count)) for count in counts]
    params = {"w": np.empty((84_000_000,), np.int8)}
    parallel = SimpleNamespace(devices=[SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB")] * 8, kind="jit")
    console.describe(config, loop.default_workdir(config), params, *splits, spec, parallel, start=1000)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert f"workdir  runs/segformer-b5-{dataset}" in lines
    assert f"resuming at step 1000 of {config.train.steps}" in lines


@pytest.mark.parametrize("num_classes", [1, 2, 11, 19])
def test_the_table_of_classes_shows_every_class_and_fits_80_columns(num_classes, capsys):
    names = tuple(f"class number {k} of many more" for k in range(num_classes))
    spec = specs.DatasetSpec("noise", names, ((0, 0, 0),) * num_classes, 255)
    ious = [k / 20 for k in range(max(num_classes, 2) - 1)] + [None]
    result = {"mean_iou": 0.5, "pixel_accuracy": 0.25, "per_class_iou": ious, "step": 7, "images_per_second": None}
    console.report(result, spec, Path("runs/name"))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for name in names if num_classes > 1 else ("background", *names):
        assert name[:20] in printed
    for iou in ious[:-1]:
        assert f"{iou:.4f}" in printed
    assert "mIoU 0.5000   pixel accuracy 0.2500   step 7" in printed


def test_a_first_ctrl_c_asks_and_a_second_one_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with console.StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_than_the_main_one_ctrl_c_is_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with console.StopRequest() as stop:
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
def test_the_word_after_the_colon_picks_variant_and_dataset_in_any_order(argument, name, dataset):
    config = segformer.get_config(argument)
    assert (config.model.name, config.data.name) == (name, dataset)
    assert str(loop.default_workdir(config)) == f"runs/{name.replace('_', '-')}-{dataset}"
    settings.check(config, Path("runs/name"))


def test_a_word_that_is_neither_variant_nor_dataset_is_refused_with_both_lists():
    with pytest.raises(ValueError, match=r"'b9' is neither a variant \(b0, .*b5\) nor a dataset \(streets, .*folder\)"):
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


def test_ctrl_c_ends_train_py_with_130_after_saving(command_line):
    status, out, err = command_line.stopped
    assert status == 130
    assert f"stopped at step {command_line.newest} of {MANY} and saved in {command_line.workdir}" in out
    assert "Traceback" not in err and "stopping after this step and saving" in err


def test_ctrl_c_before_the_first_step_ends_train_py_with_130_and_without_traceback(tmp_path):
    with started(f"--workdir={tmp_path / 'run'}", "--config.data.train_images=5000") as process:
        assert process.stdout.readline().startswith("drawing")
        # Again where it was lost: code of others that is being imported may swallow the exception.
        for _ in range(10):
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=4)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_the_same_command_goes_on_and_finishes(command_line):
    status, out, err = command_line.resumed
    assert (status, err) == (0, "")
    assert 0 < command_line.newest < MANY and f"resuming at step {command_line.newest} of {MANY}" in out
    result = result_of(command_line.workdir)
    assert result["step"] == MANY and len(result["params_sha256"]) == 64
    steps = [record["step"] for record in records_of(command_line.workdir)]
    assert steps == [*range(1, MANY + 1), MANY]
    assert (command_line.workdir / "curve.png").exists()
    assert len(list((command_line.workdir / "predictions").glob("*.png"))) == 2
    lines = out.replace(str(command_line.workdir), "runs/name").splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_train_py_says_that_a_run_is_finished_or_has_other_settings(command_line):
    status, out, err = train_py(*command_line.settings)
    assert (status, err) == (0, "") and f"is finished: mIoU {result_of(command_line.workdir)['mean_iou']:.4f}" in out
    status, out, err = train_py(*command_line.settings, "--config.optim.lr=0.5")
    assert (status, out) == (2, "") and "Traceback" not in err
    assert f"config.optim.lr: {segformer.get_config().optim.lr} there, 0.5 now" in err


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--config.augment.crop=(8,8)", "config.augment.crop is (height, width), at least 32 each, not (8, 8)"),
        ("--config.train.steps=many", "--config.train.steps=many"),
        ("--config.trian.steps=3", "trian"),
        ("--config=configs/segformer.py:b9", "'b9' is neither a variant (b0, b1, b2, b3, b4, b5, plain_b0, "),
        ("--config=configs/nothing.py", "configs/nothing.py"),
        ("--workdri=runs/x", "workdri"),
        ("config.train.steps=3", "config.train.steps=3"),
        ("--workdir=pyproject.toml/run", "pyproject.toml"),
    ],
)
def test_train_py_refuses_what_it_cannot_do_in_a_few_words(argument, said):
    status, _, err = train_py("--workdir=/nonexistent/never", argument, *SMALL[:2])
    assert status != 0
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 12
