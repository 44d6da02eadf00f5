"""`evaluate` and `predict` in two processes of two devices equal one process of four, and finish interrupted work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import pytest

from segjax.checkpoints import orbax_folder
from segjax.checkpoints.metadata import dataset_metadata
from segjax.commands import evaluate, predict
from segjax.data import specs
from tests.pixels import scene
from tests.tiny import tiny_model
from tests.viz.test_video import film, seen

HERE = Path(__file__).parents[1]
SPEC = specs.DatasetSpec("shapes", ("ground", "thing", "other"), ((0, 0, 0), (200, 0, 0), (0, 200, 0)), 255)
SIZES = [(33, 47), (40, 36), (33, 47), (33, 47), (40, 36), (33, 47), (33, 47)]
SLIDE = ["--mode", "slide", "--crop", "32", "40"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of three classes, a prepared folder of data, folders of images of several sizes, and of videos."""
    root = tmp_path_factory.mktemp("made")
    model = tiny_model(5, num_classes=3)
    orbax_folder.save_model(root / "model", model, metadata={"dataset": dataset_metadata(SPEC)})
    rng = np.random.default_rng(0)
    for folder in ("data/images/val", "data/labels/val", "images/deep", "few"):
        (root / folder).mkdir(parents=True)
    for number, size in enumerate(SIZES):
        cv2.imwrite(str(root / f"data/images/val/{number}.png"), scene(number, *size))
        cv2.imwrite(str(root / f"data/labels/val/{number}.png"), rng.choice([0, 1, 2, 255], size).astype(np.uint8))
        cv2.imwrite(str(root / f"images/{'deep/' * (number % 2)}{number}.png"), scene(number, *size))
    classes = {"names": SPEC.class_names, "colors": SPEC.colors, "ignore": 255}
    (root / "data/classes.json").write_text(json.dumps(classes))
    cv2.imwrite(str(root / "few/only.png"), scene(9, 33, 47))
    for number, size in enumerate([(32, 48), (40, 36), (32, 48)]):
        film(root / f"videos/{number}.mp4", [scene(7 * number + frame, *size) for frame in range(3 + number)])
    (root / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    return root


def commands(made, output):
    data = ["--data", "folder:val", "--source", f"{made}/data", "--data-dir", f"{made}/prepared"]
    written = ["--write", "labels", "overlay", "entropy"]
    return [
        ["evaluate", f"{made}/model", *data, "--output", f"{output}/report"],
        ["evaluate", f"{made}/model", *data, *SLIDE, "--output", f"{output}/slide"],
        ["predict", f"{made}/model", f"{made}/images", *written, "--output", f"{output}/images"],
        ["predict", f"{made}/model", f"{made}/few", *written, "--output", f"{output}/few"],
        ["predict", f"{made}/model", f"{made}/videos", "--write", "labels", "overlay", "--output", f"{output}/videos"],
    ]


def run_here(*given):
    return {"evaluate": evaluate.main, "predict": predict.main}[given[0]](list(map(str, given[1:])))


def run_in_two(tmp_path, given, death=""):
    """-> (exit status, stdout, stderr) of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (tmp_path / "commands.json").write_text(json.dumps(given))
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, HERE / "divided.py", str(port), str(number), tmp_path / "commands.json", death],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


@pytest.fixture(scope="module")
def both(made, tmp_path_factory):
    """The outputs of two processes, and of this one."""
    root = tmp_path_factory.mktemp("both")
    ended = run_in_two(root, commands(made, root / "two"))
    assert len(jax.devices()) == 4
    statuses = [run_here(*command) for command in commands(made, root / "one")]
    # A file that cannot be read.
    assert statuses == [0, 0, 1, 0, 0]
    for status, said, errors in ended:
        assert status == 0 and "statuses [0, 0, 1, 0, 0]" in said, errors
    return SimpleNamespace(one=root / "one", two=root / "two", ended=ended)


def assert_same_results(ours, theirs):
    """-> the results of the first folder."""
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (ours, theirs))
    own, calibration = found.pop("calibration"), expected.pop("calibration")
    assert len(own.pop("reliability")) == len(calibration.pop("reliability")) == 15
    for each in (found, expected):
        del each["duration_s"]
    assert found == expected
    # Probabilities are float32, and a program for two devices rounds otherwise than one for four.
    sums = ("brier", "nll")
    assert {key: own.pop(key) for key in sums} == pytest.approx({key: calibration.pop(key) for key in sums}, rel=1e-6)
    # One of 8,000 pixels that is in the next counter then.
    assert own == pytest.approx(calibration, rel=1e-4)
    return found


@pytest.mark.parametrize("report", ["report", "slide"])
def test_results_of_two_processes_equal_those_of_one(report, both):
    found = assert_same_results(both.two / report, both.one / report)
    assert found["device"]["number"] == 4 and found["data"]["images"] == len(SIZES)
    for name in ("confusion.csv", "classes.csv"):
        assert (both.one / report / name).read_bytes() == (both.two / report / name).read_bytes()
    assert sorted(os.listdir(both.one / report)) == sorted(os.listdir(both.two / report))


@pytest.mark.parametrize("folder", ["images", "few"])
def test_files_of_two_processes_equal_those_of_one(folder, both):
    def files(root):
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    of_one = files(both.one / folder)
    assert of_one == files(both.two / folder)
    assert len(of_one) == 1 + 3 * {"images": len(SIZES), "few": 1}[folder]


def test_videos_of_two_processes_equal_those_of_one(both):
    def paths(root):
        return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())

    one, two = both.one / "videos", both.two / "videos"
    assert paths(one) == paths(two)
    frames = [path for path in paths(one) if path.suffix == ".png"]
    videos = [path for path in paths(one) if path.suffix == ".mp4"]
    assert (len(frames), len(videos)) == (3 + 4 + 5, 3)
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in frames)
    for path in videos:
        (images, times, *_), (others, their_times, *_) = seen(one / path), seen(two / path)
        np.testing.assert_array_equal(images, others)
        assert times == their_times


def test_only_the_first_process_reports(both):
    (_, first, errors), (_, second, others) = both.ended
    words = " ".join(first.split())
    assert "4 x cpu of 2 processes" in words and "wrote 7 images" in words and "wrote 1 image in" in words
    assert "1 of 8 inputs failed:" in errors and "broken.png" in errors
    # Gloo's own lines.
    (last,) = [line for line in second.splitlines() if not line.startswith("[Gloo]")]
    assert last == "statuses [0, 0, 1, 0, 0]" and others == ""


def test_an_evaluation_continues_with_the_counts_from_before_a_death(made, tmp_path, capsys, both):
    command = commands(made, tmp_path)[0]
    (first, _, errors), (second, _, _) = run_in_two(tmp_path, [command], death="evaluate")
    assert first not in (0, 1) and second == -9
    told = " ".join(errors.split())
    assert "another process has died or cannot be reached" in told and "start all of them again" in told
    assert "stack trace" not in told
    assert not (tmp_path / "report/index.html").exists()
    assert run_here(*command) == 0
    # Process 0 counted the first and the third batch, of two images and of one; process 1 died after an image.
    assert "4 of 7 images were evaluated before" in capsys.readouterr().out
    assert_same_results(tmp_path / "report", both.one / "report")
    assert sorted(os.listdir(tmp_path / "report")) == sorted(os.listdir(both.one / "report"))


def test_a_prediction_is_finished_after_a_process_died(made, tmp_path, capsys, both):
    command = commands(made, tmp_path)[2]
    (first, _, errors), (second, _, _) = run_in_two(tmp_path, [command], death="predict")
    assert first not in (0, 1) and second == -9
    told = " ".join(errors.split())
    assert "another process has died or cannot be reached" in told and "start all of them again" in told
    assert "stack trace" not in told
    ours, theirs = (len(list((root / "images").rglob("*.png"))) for root in (tmp_path, both.one))
    assert 0 < ours < theirs
    assert run_here(*command, "--resume") == 1
    assert "are done" in capsys.readouterr().out
    for path in (both.one / "images").rglob("*"):
        if path.is_file():
            assert (tmp_path / "images" / path.relative_to(both.one / "images")).read_bytes() == path.read_bytes()
