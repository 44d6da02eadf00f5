"""Records figures of published packages on generated probabilities, for tests/metrics/test_goldens.py.

    pip install numpy torch matplotlib scikit-learn
    pip install --no-deps torchmetrics lightning-utilities netcal torch-uncertainty
    python parity/record_calibration.py

It writes tests/metrics/goldens.npz with the inputs, and goldens.json with the figures and the packages' versions.
"""

import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from netcal.metrics import ECE

FOLDER = Path(__file__).parents[1] / "tests" / "metrics"
PACKAGES = ("scikit-learn", "torchmetrics", "netcal", "torch-uncertainty", "torch", "numpy")


def draw(seed, classes, sharpness, pixels=1500):
    """Probabilities, float32 (N, K), and labels (N,), of which one in ten is 255: the others fill 15 equal bins."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.standard_normal((pixels, classes))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    labels = np.where(rng.random(pixels) < 0.7, logits.argmax(axis=1), rng.integers(0, classes, pixels))
    labels[rng.permutation(pixels)[: pixels // 10]] = 255
    return probabilities, labels.astype(np.uint8)


def of_torch_uncertainty(name):
    """A module of its metrics of classification; the package as a whole imports torchvision."""
    # For charts only.
    sys.modules.setdefault("seaborn", types.ModuleType("seaborn"))
    place = importlib.util.find_spec("torch_uncertainty").submodule_search_locations[0]
    path = (Path(place) / "metrics" / "classification" / name).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def aurc_of(probabilities, labels):
    metric = of_torch_uncertainty("risk_coverage").AURC()
    metric.update(torch.from_numpy(probabilities), torch.from_numpy(labels))
    return float(metric.compute())


def adaptive_ece_of(confidence, right):
    module = of_torch_uncertainty("calibration/adaptive_calibration_error")
    return float(module._ace_compute(torch.from_numpy(confidence), torch.from_numpy(right).float(), 15))


def figures_of(probabilities, labels):
    valid = labels != 255
    probabilities, labels = probabilities[valid], labels[valid].astype(np.int64)
    classes = probabilities.shape[1]
    confidence, wrong = probabilities.max(axis=1), probabilities.argmax(axis=1) != labels
    doubtful = 1 - confidence.astype(np.float64)
    false, true, _ = sklearn.metrics.roc_curve(wrong, doubtful, drop_intermediate=False)
    normed = probabilities.astype(np.float64) / probabilities.sum(axis=1, dtype=np.float64, keepdims=True)
    one_hot = np.eye(classes)[labels]
    ece = tm.multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(labels), num_classes=classes, n_bins=15, norm="l1"
    )
    # netcal takes the positive class's probability of two classes, and then means another measure.
    of_netcal = {} if classes == 2 else {"ece_netcal": float(ECE(bins=15).measure(probabilities, labels))}
    return {
        "ece": float(ece),
        **of_netcal,
        "adaptive_ece": adaptive_ece_of(confidence, ~wrong),
        # Of each class as one of two, of which scikit-learn's binary score has one.
        "brier": sum(sklearn.metrics.brier_score_loss(one_hot[:, k], normed[:, k]) for k in range(classes)),
        "nll": float(sklearn.metrics.log_loss(labels, normed, labels=range(classes))),
        "aurc": aurc_of(probabilities, labels),
        "error_average_precision": float(sklearn.metrics.average_precision_score(wrong, doubtful)),
        "error_auroc": float(sklearn.metrics.roc_auc_score(wrong, doubtful)),
        "error_fpr95": float(false[np.argmax(true >= 0.95)]),
    }


def main():
    arrays, figures = {}, {}
    for name, (seed, classes, sharpness) in {"five": (0, 5, 2.0), "sure": (1, 7, 4.0), "two": (2, 2, 3.0)}.items():
        probabilities, labels = draw(seed, classes, sharpness)
        arrays |= {f"{name}_probabilities": probabilities, f"{name}_labels": labels}
        figures[name] = figures_of(probabilities, labels)
    np.savez_compressed(FOLDER / "goldens.npz", **arrays)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    content = {"versions": versions, "figures": figures}
    (FOLDER / "goldens.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
