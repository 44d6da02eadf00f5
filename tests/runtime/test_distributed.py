"""Two processes on the loopback address train with train.py as a single one does, and end together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from segjax.checkpoints.orbax_folder import load_weights

REPO = Path(__file__).parents[2]
CONFIG = """
from configs import segformer

def get_config(argument=""):
    config = segformer.get_config("plain_b0,streets")
    config.model.update(dims=(4, 8, 10, 16), depths=(1, 1, 1, 1), decoder_dim=12, fuse="conv_bn", drop_path_rate=0.3)
    config.data.update(train_images=7, eval_images=5, size=(40, 64))
    config.augment.crop = (32, 48)
    config.train.update(steps=6, batch=4, log_every=2, ema=0.9)
    config.optim.update(name="sgd", lr=0.05, warmup_steps=2)
    config.eval.update(batch=4, every=4, pictures=2)
    config.checkpoint.every = 3
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


def started(config_file, workdir, processes, *settings):
    """train.py in one or two processes, with four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // processes),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-u", "train.py", f"--config={config_file}", f"--workdir={workdir}", *settings]
    meeting = [f"--coordinator=localhost:{port}", f"--num_processes={processes}"] if processes > 1 else []
    return [
        subprocess.Popen(
            [*command, *(meeting and [*meeting, f"--process_id={number}"])],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]


def ended(running, timeout=300):
    """-> (exit status, stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


def run(*arguments):
    results = ended(started(*arguments))
    assert all(status == 0 for status, *_ in results), "\n".join(errors[-3000:] for *_, errors in results)
    return results


@pytest.fixture(scope="module")
def of_two(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, run(config_file, workdir, 2)


@pytest.fixture(scope="module")
def of_one(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    run(config_file, workdir, 1)
    return workdir


def assert_same_run(ours, theirs):
    (weights, about), (expected, expected_about) = load_weights(ours), load_weights(theirs)
    assert about["step"] == expected_about["step"] == 6 and weights.keys() == expected.keys()
    for name, value in expected.items():
        # Sums over devices are taken in another order.
        np.testing.assert_allclose(weights[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
    moved = max(
        np.abs(value - load_weights(theirs / "checkpoints" / "3")[0][name]).max() for name, value in expected.items()
    )
    assert moved > 1e-3
    one, other = (json.loads((workdir / "result.json").read_text()) for workdir in (ours, theirs))
    np.testing.assert_allclose(one["pixel_accuracy"], other["pixel_accuracy"], atol=2e-3)


def test_two_processes_end_with_the_weights_of_one(of_two, of_one):
    assert_same_run(of_two[0], of_one)


def test_only_the_first_process_prints(of_two):
    (_, first, _), (_, second, _) = of_two[1]
    assert "4 x cpu of 2 processes, jit" in first and "mIoU" in first
    assert "mIoU" not in second and "step" not in second


@pytest.mark.slow
def test_a_run_of_two_processes_continues_in_one(of_two, of_one, config_file, tmp_path):
    shutil.copytree(of_two[0] / "checkpoints" / "3", tmp_path / "run" / "checkpoints" / "3")
    shutil.copy(of_two[0] / "metrics.jsonl", tmp_path / "run")
    (result,) = run(config_file, tmp_path / "run", 1)
    assert "resuming at step 3 of 6" in result[1]
    assert_same_run(tmp_path / "run", of_one)


@pytest.mark.slow
def test_pmap_in_two_processes_equals_jit_in_one(of_one, config_file, tmp_path):
    run(config_file, tmp_path / "run", 2, "--config.parallel=pmap")
    assert_same_run(tmp_path / "run", of_one)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_saving(config_file, tmp_path):
    running = started(config_file, tmp_path / "run", 2, "--config.train.steps=100000", "--config.eval.every=0")
    while not (line := running[0].stdout.readline()).startswith("step "):
        assert line or running[0].poll() is None, running[0].stderr.read()
    running[1].send_signal(signal.SIGTERM)
    (first, said, errors), (second, _, _) = ended(running, timeout=120)
    assert (first, second) == (143, 143), errors
    assert "to continue: run the same command" in said
    saved = load_weights(tmp_path / "run")[1]["step"]
    assert f"stopped at step {saved} of 100000" in said


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(config_file, tmp_path):
    running = started(config_file, tmp_path / "run", 2, "--config.train.steps=100000", "--config.eval.every=0")
    while not (line := running[0].stdout.readline()).startswith("step "):
        assert line or running[0].poll() is None, running[0].stderr.read()
    running[1].kill()
    since = time.monotonic()
    (first, _, errors), _ = ended(running, timeout=200)
    assert first != 0 and errors
    assert time.monotonic() - since < 150
