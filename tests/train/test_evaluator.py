"""Runs that evaluate with a protocol: their figures, their records, and a changed protocol."""

import json

import numpy as np
import pytest

import segjax
from segjax import metrics
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.load import load
from segjax.data import streets
from segjax.inference import evaluation
from segjax.inference.engine import Inference, Protocol
from segjax.runtime import memory
from segjax.train import setup
from segjax.train.config import RunError
from tests.runs import cheap_step, make_config, result_of, run, scored

SHARED = ("mean_iou", "pixel_accuracy", "per_class_iou", "step")
# Scenes have 40x64 pixels.
SETTINGS = {
    "slide": dict(mode="slide", crop=(32, 48), stride=(24, 40)),
    "base size": dict(base_size=(160, 48), size_divisor=32, scales=(0.75, 1.0), flip=True),
}


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    cheap_step(monkeypatch)


def with_protocol(given, **changes):
    return make_config(**{f"eval__{name}": value for name, value in given.items()}, **changes)


def counted(folder, protocol):
    """The mean IoU of a run's last weights, image by image with NumPy's counts."""
    split = streets.load("val", num_images=5, size=(40, 64), seed=0)
    inference, counts = Inference(load(folder).model, protocol), np.zeros((19, 19), np.int64)
    for image, truth in zip(split.images, split.labels, strict=True):
        (predicted,), valid = inference.labels([image]), truth != 255
        np.add.at(counts, (truth[valid], predicted[valid]), 1)
    return metrics.summarise(counts)


@pytest.mark.parametrize(
    "name, parallel",
    [("slide", "pmap"), *(pytest.param(name, "jit", marks=pytest.mark.slow) for name in ("base size", "slide"))],
)
def test_evaluation_of_a_run_follows_its_protocol_and_is_repeatable(name, parallel, tmp_path, capsys):
    protocol = Protocol(**SETTINGS[name])
    status, printed = run(with_protocol(SETTINGS[name], parallel=parallel, eval__every=3), tmp_path)
    assert status == 0 and f"evaluation {protocol}"[:60] in printed
    recorded = result_of(tmp_path)
    assert recorded["protocol"] == protocol.record() == json.loads(json.dumps(protocol.record()))
    assert recorded["mean_iou"] != pytest.approx(counted(tmp_path, Protocol())["mean_iou"], rel=1e-6)
    assert recorded["mean_iou"] == pytest.approx(counted(tmp_path, protocol)["mean_iou"], rel=1e-3)
    found = segjax.evaluate_dataset(tmp_path, output=tmp_path / "report")
    assert {key: found[key] for key in SHARED} == {key: recorded[key] for key in SHARED}
    assert json.loads((tmp_path / "report" / "results.json").read_text())["protocol"] == protocol.record()
    best = orbax_folder.load_metadata(tmp_path / "best")
    assert best["protocol"] == protocol.record()
    again = segjax.evaluate_dataset(tmp_path / "best")
    assert again["mean_iou"] == best["mean_iou"] and again["step"] == best["step"]


def test_a_run_without_a_recorded_protocol_is_evaluated_on_whole_images():
    config = make_config()
    older = {name: config.eval[name] for name in ("batch", "every", "patience", "pictures")}
    assert Protocol.of(older) == Protocol.of(config.eval) == Protocol()
    assert Protocol.of({**older, "mode": "slide", "crop": [64, 32]}) == Protocol("slide", (64, 32), (48, 24))


def test_a_finished_run_is_evaluated_again_with_another_protocol(tmp_path, monkeypatch):
    run(make_config(eval__every=3), tmp_path)
    before = result_of(tmp_path)
    status, printed = run(with_protocol(SETTINGS["slide"], eval__every=3), tmp_path)
    after = result_of(tmp_path)
    assert status == 0 and "earlier evaluations used whole images" in " ".join(printed.split())
    assert after["params_sha256"] == before["params_sha256"] and after["mean_iou"] != before["mean_iou"]
    assert after["best"] == {"step": 6, "mean_iou": after["mean_iou"]}
    assert orbax_folder.load_metadata(tmp_path / "best")["protocol"] == after["protocol"]
    _, printed = run(with_protocol(SETTINGS["slide"], eval__every=3), tmp_path)
    assert "is finished" in " ".join(printed.split()) and result_of(tmp_path) == after


def test_the_best_score_of_another_protocol_is_discarded(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # At steps 2 and 4; then at 4 again, and at 6.
        scored(patch, 0.9, 0.8, 0.3, 0.2)
        run(make_config(eval__every=2, train__steps=4), tmp_path)
        assert result_of(tmp_path)["best"] == {"step": 2, "mean_iou": 0.9}
        run(with_protocol(SETTINGS["slide"], eval__every=2, train__steps=6), tmp_path)
    assert result_of(tmp_path)["best"] == {"step": 4, "mean_iou": 0.3}
    assert orbax_folder.load_metadata(tmp_path / "best")["mean_iou"] == 0.3


def test_images_that_scaling_makes_too_small_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"an image of 40x64 has no pixels at scale 0\.001"):
        run(make_config(eval__scales=(1.0, 0.001)), tmp_path)


def test_an_evaluation_too_large_for_memory_is_refused_before_training(tmp_path, monkeypatch):
    def step(*_):
        pytest.fail("a step was taken")

    monkeypatch.setattr(setup, "compile_step", lambda *_: step)
    monkeypatch.setattr(memory, "limit", lambda *_, **__: 1000)
    with pytest.raises(
        RunError, match=r"the evaluation: a batch of \d+ crops of 32x48 needs .*, and the device"
    ) as caught:
        run(with_protocol(SETTINGS["slide"], eval__batch=8), tmp_path)
    for name in ("eval.mode", "eval.crop", "eval.batch", "model.dtype=bfloat16"):
        assert f"--config.{name}" in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == [] and not (tmp_path / "result.json").exists()


def test_running_out_of_memory_in_evaluation_names_its_settings(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(Inference, "refuse_too_large", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "evaluate", fails)
    with pytest.raises(RunError, match=r"not enough memory for the evaluation(?s:.*)--config.eval.mode") as caught:
        run(with_protocol({}, eval__every=3), tmp_path)
    assert "train.batch" not in str(caught.value)
