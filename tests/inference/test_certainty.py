"""Figures and pictures of a model's certainty, against its probabilities in NumPy."""

import numpy as np
import pytest

import segjax
from segjax import metrics
from segjax.data import specs
from segjax.data.open import OpenSplit
from segjax.inference import certainty
from segjax.inference.engine import Inference, Protocol
from tests.pixels import BINARY, SPEC, Pixels, scene

SIZE = (37, 50)
PROTOCOLS = {
    "whole": Protocol(),
    "temperature": Protocol(temperature=1.7),
    "slide": Protocol("slide", (24, 20), (16, 12)),
    "resized": Protocol(base_size=(64, 48), size_divisor=8, temperature=0.6),
    "scales": Protocol(scales=(0.75, 1.25), flip=True, temperature=1.7),
    "slide at a scale": Protocol("slide", (24, 32), (16, 20), scales=(1.25,)),
}


def softmax(scores, temperature=1.0):
    """float64 (..., K), of two classes for one."""
    if scores.shape[-1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=-1)
    scores = scores / temperature
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def truths_of(seed, number, classes, size=SIZE):
    return np.random.default_rng(seed).choice([*range(max(classes, 2)), 255], (number, *size)).astype(np.uint8)


def expected(probabilities, labels, truth):
    """All figures from definitions, of the pixels whose truth is not 255."""
    probabilities, labels, truth = (array[truth != 255] for array in (probabilities, labels, truth))
    numbers = np.arange(len(truth))
    confidence, of_truth = probabilities[numbers, labels], probabilities[numbers, truth]
    right = labels == truth
    ece = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        ece += abs(right[inside].sum() - confidence[inside].sum()) / len(truth)
    wanted = np.eye(probabilities.shape[1])[truth]
    # Pixels of one colour are equally sure, and in no order: each has their mean of errors.
    _, which, number = np.unique(-confidence.astype(np.float32), return_inverse=True, return_counts=True)
    errors = np.cumsum((np.bincount(which, weights=~right) / number)[np.sort(which)])
    pairs = confidence[right][:, None] - confidence[~right]
    return {
        "ece": ece,
        "brier": ((probabilities - wanted) ** 2).sum(axis=1).mean(),
        "nll": -np.log(of_truth).mean(),
        "aurc": (errors / np.arange(1, len(truth) + 1)).mean(),
        "error_auroc": ((pairs > 0) + 0.5 * (pairs == 0)).mean(),
    }


def agree(found, expected):
    for key, value in expected.items():
        # Ranks have no order of different pixels of one counter. The first terms of AURC's mean are of few pixels.
        assert found[key] == pytest.approx(value, abs=4e-4 if key in ("aurc", "error_auroc") else 2e-5), key


def found_of(counted, truth):
    labels, valid = np.asarray(counted.labels), truth != 255
    calibration = metrics.Calibration()
    brier, nll, *_ = counted.sums()
    calibration.add_counted(np.asarray(counted.counter)[valid], (labels == truth)[valid], brier=brier, nll=nll)
    return calibration.figures() | {"error_auroc": calibration.error_figures()["auroc"]}


@pytest.mark.parametrize("classes", [5, 1])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_counters_match_the_probabilities(name, classes):
    protocol, model = PROTOCOLS[name], Pixels(classes, classes)
    images = [scene(seed, *SIZE) for seed in range(protocol.images_at_a_time(2))]
    truths = truths_of(3, len(images), classes)
    inference = Inference(model, protocol, batch=2)
    counted = inference.begin_counted(images, truths, ignore_label=255)
    if protocol.is_one_pass:
        # Independent of segjax: scores of single pixels.
        probabilities = [softmax(model.scores(image), protocol.temperature) for image in images]
    else:
        # test_engine.py has averages over scales and mirror images.
        probabilities = [own.astype(np.float64) for own in inference.probabilities(images)]
        probabilities = [np.concatenate([1 - own, own], -1) if classes == 1 else own for own in probabilities]
    for one, labels, own, truth in zip(counted, inference.labels(images), probabilities, truths, strict=True):
        np.testing.assert_array_equal(np.asarray(one.labels), labels)
        agree(found_of(one, truth), expected(own, labels, truth))


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_with_a_threshold_confidence_is_that_of_the_predicted_class(temperature):
    model, image = Pixels(1, 2), scene(5, *SIZE)
    (truth,) = truths_of(1, 1, 1)
    inference = Inference(model, Protocol(threshold=0.2, temperature=temperature))
    (counted,) = inference.begin_counted([image], [truth], ignore_label=255)
    probabilities = softmax(model.scores(image), temperature)
    labels = (probabilities[..., 1] > 0.2).astype(np.uint8)
    assert (np.asarray(counted.labels) == labels).mean() > 0.999 and 0.05 < labels.mean() < 0.95
    agree(found_of(counted, truth), expected(probabilities, np.asarray(counted.labels), truth))


def test_the_size_of_row_tiles_changes_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 13, 9, 4)).astype(np.float32)
    labels, truth = scores.argmax(axis=-1), truths_of(0, 2, 4, (13, 9))
    settings = dict(ignore_label=255, are_logits=True, temperatures=(1.5, 1.0, 0.5))
    counter, sums = certainty.counts(scores, labels, truth, **settings)
    maps = certainty.maps(scores, labels, are_logits=True)
    for rows in (1, 4, 13):
        monkeypatch.setattr(certainty, "_TOGETHER", rows * 2 * 9)
        in_bands = certainty.counts(scores, labels, truth, **settings)
        assert in_bands[1].shape == (-(-13 // rows), 2, 4)
        np.testing.assert_array_equal(in_bands[0], counter)
        np.testing.assert_allclose(in_bands[1].sum(axis=0), sums[0], rtol=1e-5)
        np.testing.assert_array_equal(certainty.maps(scores, labels, are_logits=True), maps)


def test_the_nll_is_counted_for_each_temperature():
    rng = np.random.default_rng(1)
    scores = (5 * rng.standard_normal((1, 8, 9, 3))).astype(np.float32)
    truth = truths_of(2, 1, 3, (8, 9))
    grid = (2.0, 0.25, 1.0, 9.0)
    _, sums = certainty.counts(
        scores, scores.argmax(axis=-1), truth, ignore_label=255, are_logits=True, temperatures=grid
    )
    valid = truth != 255
    for temperature, nll in zip(grid, np.asarray(sums)[0, 0, 1:], strict=True):
        of_truth = np.take_along_axis(softmax(scores.astype(np.float64), temperature), truth[..., None] % 3, -1)
        assert nll == pytest.approx(-np.log(of_truth[valid]).sum(), rel=1e-5)


@pytest.mark.parametrize("are_logits", [True, False])
@pytest.mark.parametrize("classes", [1, 2, 6])
def test_maps_show_confidence_and_normalised_entropy(classes, are_logits):
    rng = np.random.default_rng(classes)
    scores = (4 * rng.standard_normal((2, 11, 7, classes))).astype(np.float32)
    scores[0, 0, 0] = 0
    probabilities = softmax(scores.astype(np.float64), 1.5)
    labels = probabilities.argmax(axis=-1)
    given = scores if are_logits else (probabilities[..., 1:] if classes == 1 else probabilities).astype(np.float32)
    maps = np.asarray(certainty.maps(given, labels, are_logits=are_logits, temperature=1.5 if are_logits else 1.0))
    entropy = -(probabilities * np.log(probabilities)).sum(axis=-1) / np.log(max(classes, 2))
    assert maps.dtype == np.uint8 and maps[0, 0, 0, 1] == 255
    # Half a step of rounding.
    np.testing.assert_allclose(maps[..., 0] / 255, probabilities.max(axis=-1), atol=0.501 / 255)
    np.testing.assert_allclose(maps[..., 1] / 255, entropy, atol=0.501 / 255)


@pytest.mark.parametrize("classes, spec", [(5, SPEC), (1, BINARY)])
@pytest.mark.parametrize("settings", [{"batch": 2}, {"mode": "slide", "crop": (24, 20)}, {"flip": True, "batch": 3}])
def test_an_evaluation_reports_the_calibration_over_all_images(classes, spec, settings):
    model, truths = Pixels(classes, 7), truths_of(9, 5, classes)
    images = np.stack([scene(seed, *SIZE) for seed in range(5)])
    split = specs.Split(images, truths, np.tile(np.int32(SIZE), (5, 1)), tuple("abcde"))
    opened = OpenSplit(split, spec, lambda: np.bincount(truths[truths != 255]))
    found = segjax.evaluate_dataset(model, opened, **settings)
    # A mirror image of single pixels has the same scores.
    probabilities = np.stack([softmax(model.scores(image)) for image in images])
    labels = np.stack([model.labels(image) for image in images])
    agree(found["calibration"], expected(probabilities, labels, truths))
    rows = found["calibration"]["reliability"]
    assert len(rows) == 15 and sum(row["pixels"] for row in rows) == (truths != 255).sum()
    right = sum(row["pixels"] * row["accuracy"] for row in rows if row["pixels"])
    assert right / (truths != 255).sum() == pytest.approx(found["pixel_accuracy"], rel=1e-9)


def test_a_split_without_labelled_pixels_has_no_figures():
    truths = np.full((2, *SIZE), 255, np.uint8)
    images = np.stack([scene(seed, *SIZE) for seed in range(2)])
    split = specs.Split(images, truths, np.tile(np.int32(SIZE), (2, 1)), tuple("ab"))
    found = segjax.evaluate_dataset(Pixels(5), OpenSplit(split, SPEC, lambda: np.zeros(5, int)))["calibration"]
    assert {value for key, value in found.items() if key != "reliability"} == {None}
