"""The confusion matrix against a loop over pixels, and IoU against its definition with sets."""

import math

import numpy as np
import pytest

from segjax.metrics import confusion_matrix, summarise


def draw(seed, shape, classes, *, ignore=255, share=0.2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < share] = ignore
    return labels, rng.integers(0, classes, shape).astype(np.uint8)


def by_loop(labels, predicted, classes, ignore):
    counts = np.zeros((classes, classes), np.int64)
    for truth, guess in zip(labels.ravel(), predicted.ravel(), strict=True):
        if truth != ignore:
            counts[truth, guess] += 1
    return counts


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("classes, ignore", [(2, 255), (5, 255), (11, 11), (19, 255), (4, 1)])
def test_the_confusion_matrix_counts_every_pixel_once(classes, ignore, seed):
    labels, predicted = draw(seed, (3, 7, 11), classes, ignore=ignore)
    counts = confusion_matrix(labels, predicted, num_classes=classes, ignore_label=ignore)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, by_loop(labels, predicted, classes, ignore))


def test_rows_are_the_truth_and_columns_the_prediction():
    counts = confusion_matrix(np.array([0, 0, 2]), np.array([1, 1, 0]), num_classes=3, ignore_label=255)
    np.testing.assert_array_equal(counts, [[0, 2, 0], [0, 0, 0], [1, 0, 0]])


def test_a_binary_model_is_measured_on_background_and_its_one_class():
    labels, predicted = draw(0, (2, 9, 5), 2)
    counts = confusion_matrix(labels, predicted, num_classes=1, ignore_label=255)
    np.testing.assert_array_equal(counts, by_loop(labels, predicted, 2, 255))
    assert len(summarise(counts)["per_class_iou"]) == 2


@pytest.mark.parametrize("seed", [0, 1])
def test_iou_is_intersection_over_union_and_its_mean_is_over_classes(seed):
    labels, predicted = draw(seed, (4, 6, 13), 4)
    valid = labels != 255
    expected = []
    for k in range(4):
        truth, guess = (labels == k) & valid, (predicted == k) & valid
        expected.append((truth & guess).sum() / (truth | guess).sum())
    summary = summarise(confusion_matrix(labels, predicted, num_classes=4, ignore_label=255))
    np.testing.assert_allclose(summary["per_class_iou"], expected, rtol=1e-15)
    assert math.isclose(summary["mean_iou"], sum(expected) / 4, rel_tol=1e-15)
    assert math.isclose(summary["pixel_accuracy"], (labels == predicted)[valid].mean(), rel_tol=1e-15)


def test_a_class_in_neither_truth_nor_prediction_is_not_in_the_mean():
    # 1 is only predicted and 3 only labelled: both count as 0. 2 and 4 occur nowhere.
    labels, predicted = np.array([[0, 0, 3, 0]]), np.array([[0, 1, 0, 0]])
    summary = summarise(confusion_matrix(labels, predicted, num_classes=5, ignore_label=255))
    assert summary["per_class_iou"] == [0.5, 0.0, None, 0.0, None]
    assert math.isclose(summary["mean_iou"], 0.5 / 3)
    assert summary["pixel_accuracy"] == 0.5


def test_a_class_predicted_only_on_ignored_pixels_is_absent():
    labels, predicted = np.array([0, 255, 255]), np.array([0, 1, 2])
    summary = summarise(confusion_matrix(labels, predicted, num_classes=3, ignore_label=255))
    assert summary == {"mean_iou": 1.0, "pixel_accuracy": 1.0, "per_class_iou": [1.0, None, None]}


def test_an_empty_confusion_matrix_gives_no_figures_rather_than_zero():
    labels = np.full((2, 3, 4), 255, np.uint8)
    summary = summarise(confusion_matrix(labels, np.zeros_like(labels), num_classes=2, ignore_label=255))
    assert summary == {"mean_iou": None, "pixel_accuracy": None, "per_class_iou": [None, None]}


def test_the_mean_iou_of_a_sum_is_not_the_mean_over_images():
    labels = np.array([[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]])
    predicted = np.array([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    images = [
        confusion_matrix(label, guess, num_classes=2, ignore_label=255)
        for label, guess in zip(labels, predicted, strict=True)
    ]
    whole = confusion_matrix(labels, predicted, num_classes=2, ignore_label=255)
    np.testing.assert_array_equal(sum(images), whole)
    assert math.isclose(summarise(whole)["mean_iou"], 5 / 7)
    assert math.isclose(np.mean([summarise(image)["mean_iou"] for image in images]), 5 / 12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_labels_without_a_class_are_refused_with_their_value(dtype):
    labels = np.array([[0, 7, 3], [255, 200, 7]], dtype)
    with pytest.raises(ValueError, match=r"\[3, 7, 200\] are neither in 0\.\.2 nor the ignore label 255"):
        confusion_matrix(labels, np.zeros_like(labels), num_classes=3, ignore_label=255)


def test_a_negative_label_is_refused_unless_it_is_the_ignore_label():
    labels = np.array([0, -1, 1])
    with pytest.raises(ValueError, match=r"\[-1\]"):
        confusion_matrix(labels, np.zeros_like(labels), num_classes=2, ignore_label=255)
    assert confusion_matrix(labels, np.zeros_like(labels), num_classes=2, ignore_label=-1).sum() == 2


def test_a_binary_label_of_two_is_refused():
    with pytest.raises(ValueError, match=r"\[2\] are neither in 0\.\.1"):
        confusion_matrix(np.array([0, 1, 2]), np.array([0, 1, 1]), num_classes=1, ignore_label=255)
