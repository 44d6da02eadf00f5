"""Two processes give the results of one, and each reads only its own part of the data."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from segjax.runtime.parallel import JitParallel
from tests import processes

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def of_two():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    running = [
        subprocess.Popen(
            [sys.executable, HERE / "processes.py", str(port), str(number)],
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
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors for _, errors in outputs)
    return [json.loads(text.splitlines()[-1]) for text, _ in outputs]


@pytest.fixture(scope="module")
def of_one():
    return processes.results(JitParallel(jax.devices()[:1]))


@pytest.mark.parametrize("kind", processes.KINDS)
@pytest.mark.parametrize("way", ["streamed", "resident"])
def test_training_in_two_processes_equals_that_in_one(kind, way, of_two, of_one):
    (weights, losses), (_, initial_loss) = of_one[way], of_one["resident"]
    assert weights == of_one["resident"][0] and losses == initial_loss and len(set(losses)) == processes.STEPS
    for of_process in of_two:
        ours, our_losses = of_process[kind][way]
        np.testing.assert_allclose(ours, weights, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    assert of_two[0][kind][way] == of_two[1][kind][way]


@pytest.mark.parametrize("kind", processes.KINDS)
def test_a_process_reads_only_the_rows_of_its_own_devices(kind, of_two, of_one):
    assert [of_process[kind]["rows"] for of_process in of_two] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert of_one["rows"] == list(range(8))
    for of_process in of_two:
        assert of_process[kind]["read others"] == []
        assert of_process[kind]["read"] >= 4 * processes.STEPS / 2


@pytest.mark.parametrize("kind", processes.KINDS)
def test_evaluation_in_two_processes_equals_that_in_one_in_both(kind, of_two, of_one):
    records = processes.Noise()
    expected = np.zeros((5, 5), np.int64)
    for image, label in records.pairs:
        np.add.at(expected, (label, image[..., 0] % 5), 1)
    np.testing.assert_array_equal(of_one["confusion"], expected)
    for of_process in of_two:
        np.testing.assert_array_equal(of_process[kind]["confusion"], expected)
        # Half of the batches each; nearly every image has a size, and so a batch, of its own.
        assert 14 <= len(of_process[kind]["evaluated"]) <= 16
    assert sorted(of_two[0][kind]["evaluated"] + of_two[1][kind]["evaluated"]) == list(range(30))


def test_counts_beyond_32_bits_are_summed(of_two, of_one):
    assert of_one["large sum"] == [2**40]
    assert [of_process["jit"]["large sum"] for of_process in of_two] == [[2**41 + 1]] * 2
