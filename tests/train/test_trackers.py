"""Trackers receive each record of a run once, also when it is resumed; none of them can end a run.

The guests are stand-ins with wandb's calls; the last tests use the real packages, offline, if they are installed.
"""

import importlib.machinery
import importlib.util
import json
import sqlite3
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from segjax.data import specs
from segjax.train.config import RunError, check
from segjax.train.metrics_log import Log
from segjax.train.trackers import NAMES, STATE
from tests.runs import cheap_step, make_config, run

REPO = Path(__file__).parents[2]
SPEC = specs.DatasetSpec("dots", ("a", "b"), ((255, 0, 0), (0, 255, 0)), 255)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
LABELS = PIXELS[..., 0] % 2
JOINED = np.concatenate([PIXELS, *[np.array(SPEC.colors, np.uint8)[LABELS]] * 2], axis=1)
SETTINGS = {"label": "x", "train": {"batch": 4, "trackers": ["wandb"]}}


class Fake(types.ModuleType):
    """A module with the calls of wandb that segjax makes; `calls` has them, and `fails` those that raise."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls, self.fails = [], ()
        self.Settings, self.Image = dict, np.asarray

    def _note(self, name, *call):
        self.calls.append((name, *call))
        if name in self.fails:
            raise ConnectionError(f"no {name}\nat all")

    def init(self, **settings):
        self._note("init", settings)
        self.id, self.config = settings["id"], self
        return self

    def update(self, settings, allow_val_change):
        assert allow_val_change
        self._note("config", settings)

    def log(self, values, step):
        (kind,) = {"image" if name.startswith("predictions/") else "scalars" for name in values}
        self._note(kind, step, values)

    def log_artifact(self, path, name, type):
        self._note("artifact", path, name, type)

    def finish(self, exit_code):
        self._note("close", exit_code)

    def of(self, name):
        return [call for kind, *call in self.calls if kind == name]


@pytest.fixture
def fake(monkeypatch):
    module = Fake()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def begin(workdir, start=0, trackers=("wandb",), **settings):
    return Log(workdir, start, evaluated=False, trackers=trackers, settings=SETTINGS, **settings)


def write(log, *steps):
    for step in steps:
        log.write({"step": step, "loss": step / 8, "lr": None})


def evaluate(log, step, score=0.5):
    log.write({"step": step, "mean_iou": score, "iou": {"road": 0.25, "sky": None, "道 路=": 0.5}})
    log.picture(step, "x.png", PIXELS, LABELS, LABELS, SPEC)


def steps_of(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_settings_numbers_pictures_and_files_in_this_order(fake, tmp_path):
    with begin(tmp_path / "mine") as log:
        write(log, 1, 2)
        evaluate(log, 2)
        log.artifact(tmp_path / "mine" / "result.json", "result")
    (settings,) = fake.of("init")[0]
    assert settings["name"] == "mine" and settings["resume"] == "allow" and settings["dir"] == str(tmp_path / "mine")
    assert [kind for kind, *_ in fake.calls] == ["init", "config", *["scalars"] * 3, "image", "artifact", "close"]
    assert fake.of("config") == [[SETTINGS]] and fake.of("close") == [[0]]
    scores = {"mean_iou": 0.5, "iou/road": 0.25, "iou/道 路=": 0.5}
    assert fake.of("scalars") == [[1, {"loss": 0.125}], [2, {"loss": 0.25}], [2, scores]]
    ((step, images),) = fake.of("image")
    np.testing.assert_array_equal(images["predictions/x.png"], JOINED)
    path = str(tmp_path / "mine" / "result.json")
    assert step == 2 and fake.of("artifact") == [[path, f"{settings['id']}-result.json", "result"]]


@pytest.mark.parametrize("starts", [(4, 4), (4, 8)])
def test_a_resumed_run_continues_its_record_and_sends_nothing_twice(starts, fake, tmp_path):
    log = begin(tmp_path).__enter__()
    write(log, *range(1, 5))
    log.cut(4)
    write(log, *range(5, 10))
    # Killed after step 9, and again after the first checkpoint: nothing is closed.
    log = begin(tmp_path, 4).__enter__()
    write(log, *range(5, 9))
    with begin(tmp_path, starts[1]) as log:
        write(log, *range(starts[1] + 1, 12))
        evaluate(log, 11)
    assert [step for step, values in fake.of("scalars") if "loss" in values] == list(range(1, 12))
    assert len({settings["id"] for (settings,) in fake.of("init")}) == 1 and len(fake.of("init")) == 3
    assert steps_of(tmp_path) == [*range(1, 12), 11] and len(fake.of("image")) == 1


def test_a_tracker_that_was_absent_gets_recomputed_steps(fake, tmp_path):
    log = begin(tmp_path).__enter__()
    write(log, *range(1, 5))
    log = begin(tmp_path, 4, trackers=()).__enter__()
    write(log, *range(5, 9))
    with begin(tmp_path, 6) as log:
        write(log, 7, 8, 9)
    assert [step for step, _ in fake.of("scalars")] == [1, 2, 3, 4, 7, 8, 9] and steps_of(tmp_path) == [*range(1, 10)]
    assert len({settings["id"] for (settings,) in fake.of("init")}) == 1 and len(fake.of("init")) == 2


def test_a_tracker_that_failed_gets_the_missing_records_once_it_works(fake, tmp_path):
    log = begin(tmp_path).__enter__()
    write(log, 1, 2, 3)
    fake.fails = ("scalars",)
    write(log, 4, 5, 6)
    assert [step for step, _ in fake.of("scalars")] == [1, 2, 3, 4]
    fake.fails, fake.calls = (), []
    with begin(tmp_path, 2) as log:
        write(log, *range(3, 8))
    assert [step for step, _ in fake.of("scalars")] == [4, 5, 6, 7]


def test_a_repeated_evaluation_at_the_checkpoint_is_sent_again(fake, tmp_path):
    with begin(tmp_path) as log:
        write(log, 1, 2)
        evaluate(log, 2)
    with begin(tmp_path, 2) as log:
        evaluate(log, 2, 0.75)
    assert [values["mean_iou"] for _, values in fake.of("scalars") if "mean_iou" in values] == [0.5, 0.75]


def test_a_run_that_starts_over_or_lost_its_id_gets_a_new_record(fake, tmp_path, capsys):
    for start in (0, 0, 1):
        with begin(tmp_path, start) as log:
            write(log, start + 1)
    assert capsys.readouterr().out == ""
    (tmp_path / STATE).write_text('{"id": "../.."}')
    with begin(tmp_path, 1):
        pass
    assert f"{STATE}: id" in " ".join(capsys.readouterr().out.split())
    ids = [settings["id"] for (settings,) in fake.of("init")]
    assert ids[1] == ids[2] and len({ids[0], ids[1], ids[3]}) == 3


def test_a_tracker_that_joins_a_run_gets_only_later_records(fake, tmp_path):
    with begin(tmp_path, trackers=()) as log:
        write(log, 1, 2, 3)
    assert not (tmp_path / STATE).exists() and not (tmp_path / "tensorboard").exists()
    with begin(tmp_path, 2, trackers=("tensorboard", "wandb")) as log:
        write(log, 3, 4)
    assert [step for step, _ in fake.of("scalars")] == [3, 4] and (tmp_path / "tensorboard").is_dir()


@pytest.mark.parametrize("call", ["init", "config", "scalars", "image", "artifact", "close"])
def test_a_failing_tracker_gives_one_warning_and_the_run_continues(call, fake, tmp_path, capsys):
    fake.fails = (call,)
    with begin(tmp_path) as log:
        write(log, 1, 2)
        evaluate(log, 2)
        write(log, 3)
        log.artifact(tmp_path / "result.json", "result")
    assert steps_of(tmp_path) == [1, 2, 2, 3] and len(fake.of(call)) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("warning") == 1 and "wandb fails and is skipped; the run continues" in said
    assert f"ConnectionError: no {call}\\nat all" in said and fake.calls[-1][0] == call


def test_a_run_that_ends_with_an_error_is_recorded_as_failed(fake, tmp_path):
    with pytest.raises(ZeroDivisionError), begin(tmp_path):
        raise ZeroDivisionError
    assert fake.of("close") == [[1]]


def test_only_one_of_several_processes_has_the_trackers(fake, tmp_path):
    with begin(tmp_path, active=False) as log:
        write(log, 1)
        evaluate(log, 1)
        log.artifact(tmp_path / "result.json", "result")
    assert fake.calls == [] and list(tmp_path.iterdir()) == []
    with begin(tmp_path) as log:
        write(log, 1, 2, 3)
    calls, state = len(fake.calls), (tmp_path / "trackers.json").read_bytes()
    with begin(tmp_path, start=2, active=False) as log:
        write(log, 3)
    assert len(fake.calls) == calls and (tmp_path / "trackers.json").read_bytes() == state


def test_missing_packages_are_named_with_their_extras_at_the_start(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in NAMES else found(name))
    config = make_config(train__trackers=("tensorboard", "wandb", "mlflow", "wandb"))
    with pytest.raises(
        RunError, match=r"train\.trackers: .*wandb and mlflow are not installed: .*segjax\[wandb,mlflow\]"
    ):
        check(config, tmp_path)
    check(make_config(train__trackers=("tensorboard",)), tmp_path)


def test_a_run_sends_its_records_and_its_result(fake, tmp_path, monkeypatch):
    cheap_step(monkeypatch)
    run(make_config(train__trackers=("wandb",), train__steps=4, eval__pictures=1), tmp_path / "x")
    assert [kind for kind, *_ in fake.calls][:2] == ["init", "config"] and fake.calls[-1] == ("close", 0)
    assert fake.of("config")[0][0]["train"]["steps"] == 4
    assert [step for step, _ in fake.of("scalars")] == steps_of(tmp_path / "x") == [2, 4, 4]
    assert [path.rpartition("/")[2] for path, *_ in fake.of("artifact")] == ["result.json", "curve.png"]
    ids = {settings["id"] for (settings,) in fake.of("init")}
    run(make_config(train__trackers=("wandb",), train__steps=6, eval__pictures=1), tmp_path / "x")
    assert ids == {settings["id"] for (settings,) in fake.of("init")}
    assert [step for step, _ in fake.of("scalars")][3:] == [6, 6] and fake.calls[-1] == ("close", 0)


# ---------------------------------------------------------------------------------------------------- the real packages


def first_stretch(workdir, name):
    """Steps 1 to 6, with a checkpoint at 4."""
    log = begin(workdir, trackers=(name,)).__enter__()
    write(log, *range(1, 7))
    log.close(failed=True)


def second_stretch(workdir, name):
    """Taken up at the checkpoint, to step 8 and an evaluation."""
    with begin(workdir, 4, trackers=(name,)) as log:
        write(log, *range(5, 9))
        evaluate(log, 8)
        (workdir / "result.json").write_text("{}")
        log.artifact(workdir / "result.json", "result")


def in_a_process(stretch, workdir, name):
    """-> what it prints."""
    code = "import pathlib, sys; from tests.train import test_trackers as tests; path, name, stretch = sys.argv[1:]; "
    code += "getattr(tests, stretch)(pathlib.Path(path), name)"
    command = [sys.executable, "-c", code, str(workdir), name, stretch.__name__]
    return subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout


LOSSES = [(step, step / 8) for step in range(1, 9)]
package = pytest.mark.filterwarnings("default")


def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs the extra {name}")


def records_of_wandb(path):
    """Records of a .wandb file: 7 bytes, then blocks of 32 KiB of parts, each checksum, length, kind and content."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@package
@installed("wandb")
def test_wandb_has_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    # A process of wandb keeps one record of an id.
    for stretch in (first_stretch, second_stretch):
        assert in_a_process(stretch, tmp_path / "mine", "wandb") == ""
    files = sorted(tmp_path.glob("mine/wandb/offline-run-*/*.wandb"))
    records = [record for path in files for record in records_of_wandb(path)]
    losses, scores = [], []
    for history in (record.history for record in records if record.HasField("history")):
        values = {item.key or "/".join(item.nested_key): item.value_json for item in history.item}
        losses += [(history.step.num, float(values["loss"]))] if "loss" in values else []
        scores += [float(values["mean_iou"])] if "mean_iou" in values else []
    assert losses == LOSSES and scores == [0.5]
    assert {record.run.run_id for record in records if record.HasField("run")} == {
        json.loads((tmp_path / "mine" / STATE).read_text())["id"]
    }
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1, 0]


@package
@pytest.mark.slow
@installed("mlflow")
def test_mlflow_has_the_record(tmp_path, monkeypatch, capsys):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first_stretch(tmp_path / "mine", "mlflow")
    second_stretch(tmp_path / "mine", "mlflow")
    assert "fails" not in capsys.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("segjax").experiment_id])
    id = found.info.run_id
    assert [(metric.step, metric.value) for metric in client.get_metric_history(id, "loss")] == LOSSES
    assert client.get_metric_history(id, "iou/道 路_")[0].value == 0.5
    assert found.data.params["train.batch"] == "4" and found.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(id, "result")] == ["result/result.json"]
    assert len([file for file in client.list_artifacts(id, "images") if file.path.endswith(".png")]) == 1


@package
@installed("trackio")
def test_trackio_has_the_record(tmp_path, monkeypatch, capsys):
    import trackio

    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    first_stretch(tmp_path / "mine", "trackio")
    second_stretch(tmp_path / "mine", "trackio")
    assert "fails" not in capsys.readouterr().out
    with sqlite3.connect(tmp_path / "trackio" / "segjax.db") as base:
        rows = base.execute("select run_id, step, metrics from metrics order by id").fetchall()
    assert len({id for id, *_ in rows}) == 1
    records = [(step, json.loads(values)) for _, step, values in rows]
    assert [(step, values["loss"]) for step, values in records if "loss" in values] == LOSSES
    assert [values["mean_iou"] for _, values in records if "mean_iou" in values] == [0.5]
    assert trackio.__version__
