"""Metrics of boundaries, single images, calibration and scores, against their written-out definitions."""

import math

import cv2
import numpy as np
import pytest
import scipy.stats

from segjax import metrics

SEEDS = [0, 1]


def blobs(seed, height, width, classes, *, ignored=0.0, smooth=4):
    """Smooth regions, as a segmentation has them; some pixels have the label 255."""
    rng = np.random.default_rng(seed)
    fields = [cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), smooth) for _ in range(classes)]
    labels = np.argmax(fields, axis=0).astype(np.uint8)
    if ignored:
        labels[cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), 3) > 0.15 / ignored] = 255
        labels[:3, :4] = 255
    return labels


# ----------------------------------------------------------------------------------------------------------- boundaries


def eroded_band(mask, width):
    """The boundary of a mask as the paper has it: what `width` erosions by 3x3 take away, with zeros around."""
    padded = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)
    return mask & ~eroded[1:-1, 1:-1].astype(bool)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_boundary_band_equals_erosion_of_each_class(seed, width):
    labels = blobs(seed, 121, 167, 5, smooth=12)
    band = metrics.boundary_band(labels, width)
    assert 0.02 < band.mean() < 0.98
    for k in range(5):
        np.testing.assert_array_equal(band & (labels == k), eroded_band(labels == k, width))
    # More than 255 classes.
    np.testing.assert_array_equal(metrics.boundary_band(labels.astype(np.int32) * 300, width), band)


@pytest.mark.parametrize("seed", SEEDS)
def test_boundary_iou_equals_that_by_erosion_of_each_class(seed):
    labels, predicted = blobs(seed, 61, 83, 4, ignored=0.3), blobs(seed + 7, 61, 83, 4)
    predicted[20:] = labels[20:] % 4
    width = metrics.boundary_width(labels.shape)
    assert width == round(0.02 * math.sqrt(61**2 + 83**2)) == 2
    counts = metrics.boundary_counts(labels, predicted, num_classes=5, ignore_label=255)
    valid = labels != 255
    found = metrics.boundary_iou(counts)
    assert found["per_class_boundary_iou"][4] is None and counts.shape == (3, 5)
    for k in range(4):
        truth, guess = (eroded_band((array == k) & valid, width) for array in (labels, predicted))
        assert found["per_class_boundary_iou"][k] == (truth & guess).sum() / (truth | guess).sum()
    assert found["mean_boundary_iou"] == pytest.approx(np.mean(found["per_class_boundary_iou"][:4]))


def test_labels_that_the_filters_cannot_distinguish_are_refused():
    for wrong in (-1, 65_535):
        with pytest.raises(ValueError, match=str(wrong)):
            metrics.boundary_band(np.array([[0, wrong]]), 1)


# -------------------------------------------------------------------------------------------------------- single images


def matrices(seed, images=7, classes=4):
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 50, (images, classes, classes)) + 80 * np.eye(classes, dtype=int)
    # A class that an image does not have may be predicted there; one image has no labels.
    found[1, 2] = 0
    found[3] = 0
    return found


def counts_of(confusions):
    return np.stack([metrics.class_counts(confusion) for confusion in confusions])


@pytest.mark.parametrize("seed", SEEDS)
def test_means_over_images_are_those_defined_in_the_paper(seed):
    confusions = matrices(seed)
    by_image, by_class = [], {k: [] for k in range(4)}
    for confusion in confusions:
        ious = {}
        for k in range(4):
            if confusion[k].sum():
                ious[k] = confusion[k, k] / (confusion[k].sum() + confusion[:, k].sum() - confusion[k, k])
                by_class[k].append(ious[k])
        if ious:
            by_image.append(np.mean(list(ious.values())))
    found = metrics.over_images(counts_of(confusions), worst=0.35)
    assert found["image_iou"] == pytest.approx(np.mean(by_image), rel=1e-12)
    assert found["class_iou"] == pytest.approx(np.mean([np.mean(ious) for ious in by_class.values()]), rel=1e-12)
    assert found["worst_image_iou"] == pytest.approx(np.mean(sorted(by_image)[:2]), rel=1e-12)
    nothing = metrics.over_images(np.zeros((2, 3, 3), int))
    assert nothing == {"image_iou": None, "class_iou": None, "worst_image_iou": None}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_interval_has_the_quantiles_of_resampled_datasets(seed):
    confusions = matrices(seed, images=40)
    low, high = metrics.bootstrap_interval(counts_of(confusions), draws=4000, seed=seed)
    rng = np.random.default_rng(seed + 100)
    drawn = []
    labelled = confusions[confusions.sum(axis=(1, 2)) > 0]
    for _ in range(4000):
        total = labelled[rng.integers(0, len(labelled), len(labelled))].sum(axis=0)
        drawn.append(metrics.summarise(total)["mean_iou"])
    spread = np.std(drawn)
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=0.15 * spread)
    assert low < metrics.summarise(confusions.sum(axis=0))["mean_iou"] < high
    first, again = (metrics.bootstrap_interval(counts_of(confusions), seed=3) for _ in range(2))
    assert first == again and metrics.bootstrap_interval(counts_of(confusions[:1])) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_the_interval_of_a_difference_is_scipys_paired_bootstrap(seed):
    rng = np.random.default_rng(seed)
    first = matrices(seed, images=40)
    # Another prediction of the same labels, better in class 0.
    shares = np.full((4, 4), 0.1) + np.diag([0.6, 0.3, 0.3, 0.3])
    second = rng.multinomial(first.sum(axis=2), shares / shares.sum(axis=1, keepdims=True))
    # A class that only the second model predicts, in one image only.
    first, second = (np.pad(confusions, ((0, 0), (0, 1), (0, 1))) for confusions in (first, second))
    second[5, 0, 4], second[5, 0, 0] = second[5, 0, 0], 0
    found = metrics.bootstrap_difference(counts_of(first), counts_of(second), seed=seed)
    labelled = np.flatnonzero(first.sum(axis=(1, 2)))

    def differences(images):
        """Of mIoU and of each class."""
        one, other = (metrics.summarise(confusions[images].sum(axis=0)) for confusions in (first, second))
        pairs = zip(one["per_class_iou"], other["per_class_iou"], strict=True)
        classes = [math.nan if None in pair else pair[1] - pair[0] for pair in pairs]
        return np.array([other["mean_iou"] - one["mean_iou"], *classes[:4]])

    expected = scipy.stats.bootstrap(
        (labelled,), differences, n_resamples=4000, method="percentile", vectorized=False, rng=seed + 100
    )
    spread, ends = expected.standard_error, expected.confidence_interval
    for place, pair in enumerate([found.mean_iou, *found.per_class_iou[:4]]):
        np.testing.assert_allclose(pair, [ends.low[place], ends.high[place]], atol=0.15 * spread[place])
    assert found.per_class_iou[0][0] > 0 and found.per_class_iou[4] is None


def test_a_difference_to_itself_is_zero_and_different_labels_are_refused():
    counts = counts_of(matrices(0))
    assert metrics.bootstrap_difference(counts, counts) == metrics.Differences((0.0, 0.0), [(0.0, 0.0)] * 4)
    assert metrics.bootstrap_difference(counts[:1], counts[:1]) == metrics.Differences(None, [None] * 4)
    for other in (counts[:5], counts_of(matrices(1))):
        with pytest.raises(ValueError, match="not those of the same labels"):
            metrics.bootstrap_difference(counts, other)


# ---------------------------------------------------------------------------------------------------------- calibration


def probabilities(seed, pixels=6000, classes=5):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((pixels, classes))
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.where(rng.random(pixels) < 0.6, scores.argmax(axis=1), rng.integers(0, classes, pixels))
    return scores, labels


def counted(scores, labels, parts=3):
    total = metrics.Calibration()
    for part in np.array_split(np.arange(len(labels)), parts):
        some, of = scores[part], labels[part]
        one = metrics.Calibration()
        one.add(some.max(axis=1), some.argmax(axis=1) == of, some[np.arange(len(of)), of], (some**2).sum(axis=1))
        total = total + one
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_matches_its_definitions(seed):
    scores, labels = probabilities(seed)
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    found = counted(scores, labels)
    figures = found.figures()
    ece = 0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
            row = found.reliability()[index]
            assert row["pixels"] == inside.sum() and row["accuracy"] == pytest.approx(right[inside].mean())
        else:
            assert found.reliability()[index] == {"pixels": 0, "confidence": None, "accuracy": None}
    assert figures["ece"] == pytest.approx(ece, abs=1e-9)
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, 15)
    adaptive = sum(len(part) * abs(right[part].mean() - confidence[part].mean()) for part in bins) / len(labels)
    # Counters of 1/53,760 or less, which an edge of a bin divides.
    assert figures["adaptive_ece"] == pytest.approx(adaptive, abs=1e-4)
    wanted = np.eye(scores.shape[1])[labels]
    assert figures["brier"] == pytest.approx(((scores - wanted) ** 2).sum(axis=1).mean(), rel=1e-9)
    assert figures["nll"] == pytest.approx(-np.log(scores[np.arange(len(labels)), labels]).mean(), rel=1e-9)
    falling = np.argsort(-confidence, kind="stable")
    risks = np.cumsum(~right[falling]) / np.arange(1, len(labels) + 1)
    assert figures["aurc"] == pytest.approx(risks.mean(), abs=2e-4)


def test_the_area_is_exact_if_all_pixels_of_a_counter_are_equal():
    found = metrics.Calibration()
    confidence, right = np.array([0.9, 0.9, 0.5, 0.2]), np.array([True, True, False, False])
    found.add(confidence, right, confidence, confidence)
    assert found.figures()["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4, rel=1e-12)
    many = metrics.Calibration()
    many.add(np.repeat([0.8, 0.3], 1000), np.repeat([True, False], 1000), np.ones(2000), np.ones(2000))
    expected = sum(k / (1000 + k) for k in range(1, 1001)) / 2000
    assert many.figures()["aurc"] == pytest.approx(expected, rel=1e-12)
    assert set(metrics.Calibration().figures().values()) == {None}


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shift", [0.0, -30.0])
def test_ranking_measures_match_their_definitions(seed, shift):
    rng = np.random.default_rng(seed)
    is_found = rng.random(700) < 0.2
    # Few values, so that there are ties, and exact ones in float32.
    score = (np.round(4 * (rng.standard_normal(700) + is_found)) / 4 + shift).astype(np.float32)
    counts = metrics.ScoreCounts()
    for part in (slice(0, 300), slice(300, None)):
        one = metrics.ScoreCounts()
        one.add(score[part], is_found[part])
        counts = counts + one
    figures = counts.figures()
    pairs = score[is_found][:, None] - score[~is_found][None]
    assert figures["auroc"] == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean(), rel=1e-12)
    precision, recall, false = [], [0.0], []
    for threshold in np.unique(score)[::-1]:
        taken = score >= threshold
        precision.append(is_found[taken].mean())
        recall.append(is_found[taken].sum() / is_found.sum())
        false.append((taken & ~is_found).sum() / (~is_found).sum())
    assert figures["average_precision"] == pytest.approx(np.sum(np.diff(recall) * precision), rel=1e-12)
    assert figures["fpr95"] == false[int(np.argmax(np.array(recall[1:]) >= 0.95))]


def test_scores_keep_their_order_over_the_whole_range():
    values = np.array([-np.inf, -1e30, -3.0, -1e-20, 0.0, 1e-20, 0.5, 1.0, 1e30, np.inf])
    for count in range(1, len(values)):
        counts = metrics.ScoreCounts()
        counts.add(values, np.arange(len(values)) >= count)
        assert counts.figures()["auroc"] == 1.0
    zeros = metrics.ScoreCounts()
    zeros.add(np.array([0.0, -0.0]), np.array([True, False]))
    assert zeros.figures()["auroc"] == 0.5
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        zeros.add(np.array([0.0, np.nan]), np.array([True, False]))
    assert set(metrics.ScoreCounts().figures().values()) == {None}
