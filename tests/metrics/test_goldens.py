"""Calibration against published packages: scikit-learn, torchmetrics, netcal and torch-uncertainty.

parity/record_calibration.py recorded their figures; goldens.json states their versions.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from segjax import metrics
from segjax.inference import certainty

HERE = Path(__file__).parent
INPUTS = np.load(HERE / "goldens.npz")
FIGURES = json.loads((HERE / "goldens.json").read_text())["figures"]
# The packages' float32 for sums; half a counter where pixels are ranked. torch-uncertainty integrates by trapezoids,
# which counts the first and the last of 1,350 pixels as half.
BOUNDS = {"ece": 1e-6, "ece_netcal": 1e-6, "adaptive_ece": 1e-6, "brier": 1e-6, "nll": 1e-6, "aurc": 5e-4}
BOUNDS |= {"error_average_precision": 1e-4, "error_auroc": 2e-5, "error_fpr95": 1e-3}


def agree(calibration, name, **looser):
    found = calibration.figures() | {f"error_{key}": value for key, value in calibration.error_figures().items()}
    for key, value in FIGURES[name].items():
        bound = (BOUNDS | looser)[key]
        assert found[key.removesuffix("_netcal")] == pytest.approx(value, abs=bound), (key, name)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_equal_those_of_published_packages(name):
    probabilities, labels = INPUTS[f"{name}_probabilities"], INPUTS[f"{name}_labels"]
    valid = labels != 255
    assert 0.05 < 1 - valid.mean() < 0.2
    probabilities, labels = probabilities[valid], labels[valid]
    numbers = np.arange(len(labels))
    calibration = metrics.Calibration()
    right = probabilities.argmax(axis=1) == labels
    squares = (probabilities.astype(np.float64) ** 2).sum(axis=1)
    calibration.add(probabilities.max(axis=1), right, probabilities[numbers, labels], squares)
    agree(calibration, name)


@pytest.mark.parametrize("name, one_logit", [("five", False), ("sure", False), ("two", False), ("two", True)])
@pytest.mark.parametrize("are_logits", [True, False])
def test_counters_on_a_device_give_the_figures_of_published_packages(name, one_logit, are_logits):
    probabilities, labels = INPUTS[f"{name}_probabilities"], INPUTS[f"{name}_labels"]
    scores = np.log(np.maximum(probabilities, 1e-38)) if are_logits else probabilities
    if one_logit:
        scores = scores[:, 1:] - scores[:, :1] if are_logits else scores[:, 1:]
    # As an image of 30 rows.
    scores, predicted, truth = (
        array.reshape(1, 30, 50, *array.shape[1:]) for array in (scores, probabilities.argmax(axis=1), labels)
    )
    counter, sums = certainty.counts(scores, predicted, truth, ignore_label=255, are_logits=are_logits)
    calibration, valid = metrics.Calibration(), truth != 255
    brier, nll = np.asarray(sums, np.float64).sum(axis=(0, 1)).tolist()
    calibration.add_counted(np.asarray(counter)[valid], (predicted == truth)[valid], brier=brier, nll=nll)
    # The middles of counters in place of confidences.
    agree(calibration, name, ece=5e-6, ece_netcal=5e-6, adaptive_ece=5e-6)
