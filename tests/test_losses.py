"""Losses and predictions against float64 numpy, pixel by pixel, with an independent bilinear upsampling."""

import contextlib
import functools
import itertools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import layers, losses
from segjax.data import class_weights, specs
from segjax.inference.engine import labels_of
from segjax.kernels import cross_entropy as kernels_cross_entropy
from segjax.kernels.choice import meant_for, published_implementations
from segjax.kernels.cross_entropy import _rows
from segjax.recipes import common
from segjax.train import schema


def loss_under_test(logits, labels, *, ignore_label):
    """Sum over the pixels that count, as the loss of a part of a batch of one pixel; and how many there are."""
    criterion = losses.Criterion(num_classes=logits.shape[-1], ignore_label=ignore_label)
    return criterion.total(logits, labels, jnp.ones(1)), criterion.counts(labels)[0]


def test_defaults_are_those_of_a_run():
    settings = {setting.name: setting.default for setting in schema.LOSS.settings}
    made = losses.criterion(settings, num_classes=7, ignore_label=255)
    assert made == losses.Criterion(num_classes=7)


def predictions(logits, size):
    return labels_of(layers.resize(logits, size))


cross_entropy = jax.jit(loss_under_test, static_argnames="ignore_label")
loss_and_gradient = jax.jit(jax.value_and_grad(loss_under_test, has_aux=True), static_argnames="ignore_label")

# (logits h, w), (labels H, W): a whole factor, as the models have it, and two that are not whole.
SIZES = [((3, 5), (12, 20)), ((4, 3), (13, 7)), ((6, 7), (6, 7))]


def bilinear(old, new):
    """(new, old) weights of half-pixel bilinear upsampling, edges repeated."""
    weights = np.zeros((new, old))
    for i in range(new):
        position = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = int(position)
        weights[i, low] += 1 - (position - low)
        weights[i, min(low + 1, old - 1)] += position - low
    return weights


def upsampled(logits, size):
    rows, columns = (bilinear(old, new) for old, new in zip(logits.shape[1:3], size, strict=True))
    return np.einsum("ph,bhwk,qw->bpqk", rows, logits.astype(np.float64), columns)


def shrunk(gradient, size):
    """The transpose of `upsampled`: (B, H, W, K) -> (B, *size, K)."""
    rows, columns = (bilinear(new, old) for old, new in zip(gradient.shape[1:3], size, strict=True))
    return np.einsum("ph,bpqk,qw->bhwk", rows, gradient, columns)


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def draw(seed, small, large, *, batch=3, classes=5, ignore=255):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((batch, *small, classes))
    labels = rng.integers(0, max(classes, 2), (batch, *large)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = ignore
    return logits, labels


def by_hand(logits, labels, ignore):
    """Sum of -log softmax and the count, one pixel at a time."""
    total, count = 0.0, 0
    pixels = upsampled(logits, labels.shape[1:]).reshape(-1, logits.shape[-1])
    for scores, label in zip(pixels, labels.ravel(), strict=True):
        if label != ignore:
            total -= np.log(softmax(scores)[label])
            count += 1
    return total, count


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("small, large", SIZES)
def test_cross_entropy_sums_over_counted_pixels_of_upsampled_logits(small, large, seed, float64):
    for ignore in (255, 2):  # 2 lies inside the range of the classes: no label value is special by itself
        logits, labels = draw(seed, small, large, ignore=ignore)
        total, count = cross_entropy(logits, labels, ignore_label=ignore)
        expected = by_hand(logits, labels, ignore)
        assert int(count) == expected[1] and 0 < expected[1] < labels.size
        np.testing.assert_allclose(total, expected[0], rtol=1e-13)


def test_the_sum_keeps_the_dtype_of_the_logits(float64):
    logits, labels = draw(0, *SIZES[0])
    for dtype, rtol in ((jnp.float32, 2e-6), (jnp.float64, 1e-13)):
        for label_dtype in (jnp.uint8, jnp.int32):
            total, count = cross_entropy(logits.astype(dtype), labels.astype(label_dtype), ignore_label=255)
            assert total.dtype == dtype and total.shape == count.shape == ()
            np.testing.assert_allclose(total, by_hand(logits, labels, 255)[0], rtol=rtol)


@pytest.mark.parametrize("classes", [1, 4])
def test_ignored_pixels_do_not_affect_the_loss_or_the_gradient(classes, float64):
    logits, labels = draw(2, (5, 6), (5, 6), classes=classes)
    ignored = labels == 255
    assert ignored.any()
    other = np.where(ignored[..., None], 100 * logits[::-1] + 7, logits)
    (total, _), gradient = loss_and_gradient(logits, labels, ignore_label=255)
    assert total == loss_and_gradient(other, labels, ignore_label=255)[0][0]
    assert (np.asarray(gradient)[ignored] == 0).all() and (np.asarray(gradient)[~ignored] != 0).any()


@pytest.mark.parametrize("classes", [1, 6])
def test_a_batch_of_only_ignored_pixels_has_zero_loss_count_and_gradient(classes):
    logits, labels = draw(3, (3, 5), (9, 20), classes=classes)
    labels[:] = 255
    (total, count), gradient = loss_and_gradient(logits.astype(np.float32), labels, ignore_label=255)
    assert total == 0 and count == 0
    np.testing.assert_array_equal(gradient, np.zeros(logits.shape))


@pytest.mark.parametrize("classes", [1, 4])
def test_sums_and_counts_of_images_add_up_to_those_of_the_batch(classes, float64):
    logits, labels = draw(4, (3, 5), (12, 20), classes=classes)
    labels[1, :10] = 255  # so that a mean of means would differ
    whole = cross_entropy(logits, labels, ignore_label=255)
    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1], ignore_label=255) for i in range(3)]
    np.testing.assert_allclose(whole[0], sum(total for total, _ in parts), rtol=1e-13)
    assert whole[1] == sum(count for _, count in parts)
    assert len({int(count) for _, count in parts}) > 1


@pytest.mark.parametrize("small, large", SIZES)
@pytest.mark.parametrize("seed", [0, 5])
def test_the_gradient_is_softmax_minus_one_hot_through_the_upsampling(small, large, seed, float64):
    logits, labels = draw(seed, small, large)
    _, gradient = loss_and_gradient(logits, labels, ignore_label=255)
    one_hot = np.eye(256)[labels][..., : logits.shape[-1]]
    expected = (softmax(upsampled(logits, large)) - one_hot) * (labels != 255)[..., None]
    np.testing.assert_allclose(gradient, shrunk(expected, small), rtol=0, atol=1e-13 * np.abs(expected).sum())


@pytest.mark.parametrize("small, large", SIZES)
def test_a_binary_model_has_the_loss_and_gradient_of_the_logistic_function(small, large, float64):
    logits, labels = draw(6, small, large, classes=1)
    (total, count), gradient = loss_and_gradient(logits, labels, ignore_label=255)
    score, valid, positive = upsampled(logits, large)[..., 0], labels != 255, labels == 1
    probability = 1 / (1 + np.exp(-score))
    likelihood = np.where(positive, probability, 1 - probability)
    np.testing.assert_allclose(total, -np.log(likelihood[valid]).sum(), rtol=1e-12)
    assert count == valid.sum()
    expected = shrunk(((probability - positive) * valid)[..., None], small)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "label, logit, loss, slope", [(1, 1e4, 0, 0), (1, -1e4, 1e4, -1), (0, 1e4, 1e4, 1), (0, -1e4, 0, 0)]
)
def test_extreme_binary_logits_neither_overflow_nor_lose_the_gradient(label, logit, loss, slope):
    logits, labels = jnp.full((2, 3, 4, 1), logit), jnp.full((2, 3, 4), label, jnp.uint8)
    (value, _), gradient = loss_and_gradient(logits, labels, ignore_label=255)
    assert value == 24 * loss
    np.testing.assert_array_equal(gradient, np.full(logits.shape, slope))


def test_extreme_logits_neither_overflow_nor_lose_the_gradient():
    logits = jnp.array([[[[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]]]])  # (1, 1, 2, 3)
    labels = jnp.array([[[0, 1]]])
    (value, _), gradient = loss_and_gradient(logits, labels, ignore_label=9)
    assert value == 2e4
    np.testing.assert_array_equal(gradient[0, 0], [[0, 0, 0], [1, -1, 0]])


def test_predictions_are_the_argmax_of_upsampled_logits():
    # Second everywhere, class 2 wins halfway between a sure 0 and a sure 1.
    logits = jnp.array([[[[10.0, 0, 9], [0, 10, 9]]]])  # (1, 1, 2, 3)
    assert np.argmax(logits, -1).tolist() == [[[0, 1]]]
    np.testing.assert_array_equal(predictions(logits, (3, 8))[0], [[0, 0, 2, 2, 2, 2, 1, 1]] * 3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("small, large", SIZES)
def test_predictions_equal_numpy_at_every_pixel(small, large, seed):
    logits, _ = draw(seed, small, large)
    predicted = predictions(jnp.array(logits, jnp.float32), large)
    assert predicted.dtype == jnp.int32
    np.testing.assert_array_equal(predicted, upsampled(logits, large).argmax(-1))


@pytest.mark.parametrize("small, large", SIZES)
def test_binary_labels_are_upsampled_probabilities_above_one_half(small, large):
    logits, _ = draw(7, small, large, classes=1)
    predicted = predictions(jnp.array(logits, jnp.float32), large)
    assert predicted.dtype == jnp.int32
    np.testing.assert_array_equal(predicted, 1 / (1 + np.exp(-upsampled(logits, large)[..., 0])) > 0.5)


def test_a_binary_probability_of_exactly_one_half_is_background():
    assert (predictions(jnp.zeros((2, 3, 4, 1)), (6, 8)) == 0).all()


# ------------------------------------------------------------------------------------------------------------- terms

# The terms of single pixels; rmi, of regions, has a section of its own.
TERMS = ("cross_entropy", "ohem", "dice", "focal", "lovasz", "tversky")
SETTINGS = {"label_smoothing": 0.0, "focal_gamma": 2.0, "ohem_threshold": 0.7, "ohem_min_kept": 1 / 16}
SETTINGS |= {"tversky_alpha": 0.3, "tversky_beta": 0.7, "tversky_power": 1.0}
SETTINGS |= {"ohem_images": 0, "mean_over": "labelled", "aux": "same", "rmi": 0.0}
# Of 5 classes, of 3, and of a binary model's positive one; a weight of 0 takes a class out.
WEIGHTS = {5: (0.5, 2.0, 0.0, 1.25, 3.0), 3: (0.3, 1.0, 2.5), 1: (2.5,)}


def build(factors, *, classes, ignore=255, weights=None, **settings):
    settings = dict.fromkeys(TERMS, 0.0) | SETTINGS | factors | settings
    return losses.criterion(settings, num_classes=classes, ignore_label=ignore, class_weights=weights)


@functools.cache
def compiled(criterion, tile):
    """Counts, loss and gradient; a program goes by the `kernels_cross_entropy.TILE_BYTES` that it was traced with."""
    assert tile == kernels_cross_entropy.TILE_BYTES
    return jax.jit(criterion.counts), jax.jit(jax.value_and_grad(criterion.total))


def loss_of(criterion, logits, labels, counts=None):
    """Loss and gradient."""
    counts_of, run = compiled(criterion, kernels_cross_entropy.TILE_BYTES)
    return run(logits, labels, counts_of(labels) if counts is None else counts)


def log_probabilities(pixel):
    """-log p of each label value at one pixel, from its K logits."""
    return -np.log(softmax(np.concatenate([[0.0], pixel]) if len(pixel) == 1 else pixel))


def pixels_of(logits, labels, ignore):
    """[[(logits (K,), label) of each labelled pixel] of each image that has any]."""
    images = []
    for scores, truth in zip(upsampled(logits, labels.shape[1:]), labels, strict=True):
        pairs = zip(scores.reshape(-1, scores.shape[-1]), truth.ravel(), strict=True)
        images.append([(pixel, int(label)) for pixel, label in pairs if label != ignore])
    return [image for image in images if image]


def weight_in_loss_and_in_count(label, classes, weights):
    """Of one pixel: torch divides by the sum of the weights, but with a pos_weight by the number of pixels."""
    if weights is None:
        return 1.0, 1.0
    return (weights[0] if label == 1 else 1.0, 1.0) if classes == 1 else (weights[label], weights[label])


def cross_entropy_by_hand(logits, labels, ignore, *, weights=None, label_smoothing=0.0, **_):
    classes = logits.shape[-1]
    total = count = 0.0
    for pixel, label in [pair for image in pixels_of(logits, labels, ignore) for pair in image]:
        values = len(log_probabilities(pixel))
        share = np.full(values, label_smoothing / values)
        share[label] += 1 - label_smoothing
        weighted = [weight_in_loss_and_in_count(c, classes, weights)[0] for c in range(values)]
        total += np.sum(share * weighted * log_probabilities(pixel))
        count += weight_in_loss_and_in_count(label, classes, weights)[1]
    return total / count


def focal_by_hand(logits, labels, ignore, *, weights=None, focal_gamma=2.0, **_):
    """Lin et al., equation 5: -alpha (1 - p)^gamma log p."""
    total = count = 0.0
    for pixel, label in [pair for image in pixels_of(logits, labels, ignore) for pair in image]:
        alpha, counted = weight_in_loss_and_in_count(label, logits.shape[-1], weights)
        negative_log = log_probabilities(pixel)[label]
        total += alpha * (1 - np.exp(-negative_log)) ** focal_gamma * negative_log
        count += counted
    return total / count


def ohem_by_hand(logits, labels, ignore, *, weights=None, ohem_threshold=0.7, ohem_min_kept=1 / 16, **_):
    means = []
    for image in pixels_of(logits, labels, ignore):
        hardest = sorted(((log_probabilities(pixel)[label], label) for pixel, label in image), reverse=True)
        least = max(math.ceil(ohem_min_kept * len(hardest)), 1)
        kept = [pair for place, pair in enumerate(hardest) if place < least or np.exp(-pair[0]) < ohem_threshold]
        both = [weight_in_loss_and_in_count(label, logits.shape[-1], weights) for _, label in kept]
        total = sum(weight * loss for (weight, _), (loss, _) in zip(both, kept, strict=True))
        count = sum(counted for _, counted in both)
        means.append(total / count if count else 0.0)
    return np.mean(means)


def dice_by_hand(logits, labels, ignore, **_):
    means = []
    for image in pixels_of(logits, labels, ignore):
        probabilities = np.exp([-log_probabilities(pixel) for pixel, _ in image])
        truths = np.array([label for _, label in image])
        values = []
        for c in range(probabilities.shape[1]) if logits.shape[-1] > 1 else [1]:
            p, y = probabilities[:, c], (truths == c).astype(float)
            values.append(1 - (2 * (p * y).sum() + 1) / ((p**2).sum() + (y**2).sum() + 1))
        means.append(np.mean(values))
    return np.mean(means)


def jaccard_loss(truth, wrong):
    """Berman et al., equation 6, of two sets of pixels; 0 where nothing is wrong."""
    return len(wrong) / len(truth | wrong) if wrong else 0.0


def extension(truth, errors):
    """The Lovász extension as an integral: of the set of the errors of at least t, over t from 0 up."""
    heights = [0.0, *sorted(set(errors[errors > 0]))]
    return sum(
        (high - low) * jaccard_loss(truth, set(np.flatnonzero(errors >= high)))
        for low, high in itertools.pairwise(heights)
    )


def lovasz_by_hand(logits, labels, ignore, **_):
    means = []
    for image in pixels_of(logits, labels, ignore):
        truths = np.array([label for _, label in image])
        if logits.shape[-1] == 1:
            scores = np.array([pixel[0] for pixel, _ in image])
            margins = np.maximum(1 - scores * np.where(truths == 1, 1, -1), 0)
            means.append(extension(set(np.flatnonzero(truths == 1)), margins))
            continue
        probabilities = np.exp([-log_probabilities(pixel) for pixel, _ in image])
        values = []
        for c in np.unique(truths):
            errors = np.where(truths == c, 1 - probabilities[:, c], probabilities[:, c])
            values.append(extension(set(np.flatnonzero(truths == c)), errors))
        means.append(np.mean(values))
    return np.mean(means)


def tversky_by_hand(logits, labels, ignore, *, tversky_alpha=0.3, tversky_beta=0.7, tversky_power=1.0, **_):
    """Salehi et al., equation 4, smoothed by 1 as dice is; Abraham and Khan, equation 4, is a power of it."""
    means = []
    for image in pixels_of(logits, labels, ignore):
        probabilities = np.exp([-log_probabilities(pixel) for pixel, _ in image])
        truths = np.array([label for _, label in image])
        values = []
        for c in range(probabilities.shape[1]) if logits.shape[-1] > 1 else [1]:
            p, y = probabilities[:, c], (truths == c).astype(float)
            right, added, missed = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
            index = (right + 1) / (right + tversky_alpha * added + tversky_beta * missed + 1)
            values.append((1 - index) ** tversky_power)
        means.append(np.mean(values))
    return np.mean(means)


BY_HAND = {
    "cross_entropy": cross_entropy_by_hand,
    "ohem": ohem_by_hand,
    "dice": dice_by_hand,
    "focal": focal_by_hand,
    "lovasz": lovasz_by_hand,
    "tversky": tversky_by_hand,
}
assert tuple(BY_HAND) == TERMS


def draw_uneven(seed, small, large, *, classes, ignore=255):
    """A batch of three: one image of two classes at most, one barely labelled, one that is well predicted."""
    logits, labels = draw(seed, small, large, classes=classes, ignore=ignore)
    labels[0] = np.where(labels[0] == ignore, ignore, labels[0] % 2)
    labels[1].flat[: labels[1].size * 3 // 4] = ignore
    labels[2] = np.where(labels[2] == ignore, ignore, 1)
    logits[2, ..., min(1, classes - 1)] += 6
    # Upsampling repeats the edges, and which of two equally hard pixels is among the hardest is up to the last bit.
    labels[:, [0, -1]] = labels[:, :, [0, -1]] = ignore
    return logits, labels


VARIATIONS = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("ohem", {}),
    ("ohem", {"ohem_threshold": 0.0, "ohem_min_kept": 0.3}),
    ("ohem", {"ohem_threshold": 0.95, "ohem_min_kept": 0.0}),
    ("dice", {}),
    ("focal", {}),
    ("focal", {"focal_gamma": 0.5}),
    ("lovasz", {}),
    ("tversky", {}),
    ("tversky", {"tversky_alpha": 0.9, "tversky_beta": 0.2}),
    ("tversky", {"tversky_power": 0.75}),
]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("name, settings", VARIATIONS)
def test_each_term_equals_its_published_definition(name, settings, classes, weighted, float64):
    weights = WEIGHTS[classes] if weighted else None
    # Also one that lies inside the range of the classes.
    ignore = 255 if weighted or classes == 1 else 2
    criterion = build({name: 1.0}, classes=classes, ignore=ignore, weights=weights, **settings)
    loss_alone = jax.jit(lambda logits, labels: criterion.total(logits, labels, criterion.counts(labels)))
    for seed in (0, 1):
        logits, labels = draw_uneven(seed, *SIZES[weighted], classes=classes, ignore=ignore)
        expected = BY_HAND[name](logits, labels, ignore, weights=weights, **settings)
        np.testing.assert_allclose(loss_alone(logits, labels), expected, rtol=1e-12)
    # Neither weights nor settings are without effect here, except of weights where a term takes none.
    has_effect = settings or (weighted and name not in ("dice", "lovasz", "tversky"))
    assert (abs(BY_HAND[name](logits, labels, ignore) - expected) > 1e-6) == bool(has_effect)


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("name", TERMS)
def test_each_term_equals_its_definition_in_float32(name, classes):
    logits, labels = draw_uneven(3, *SIZES[1], classes=classes)
    criterion = build({name: 1.0}, classes=classes, weights=WEIGHTS[classes])
    loss, gradient = loss_of(criterion, logits.astype(np.float32), labels)
    assert loss.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(loss, BY_HAND[name](logits, labels, 255, weights=WEIGHTS[classes]), rtol=2e-5)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name, settings", VARIATIONS)
def test_the_gradient_of_each_term_is_that_of_its_definition(name, settings, classes, float64):
    weights = WEIGHTS[classes]
    logits, labels = draw_uneven(4, (2, 3), (5, 6), classes=classes)
    _, gradient = loss_of(build({name: 1.0}, classes=classes, weights=weights, **settings), logits, labels)
    slopes = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[place] = 1e-6
        above, below = (BY_HAND[name](logits + s, labels, 255, weights=weights, **settings) for s in (step, -step))
        slopes[place] = (above - below) / 2e-6
    assert np.abs(slopes).max() > 1e-3
    np.testing.assert_allclose(gradient, slopes, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_the_lovasz_extension_is_the_maximum_over_all_orders_of_pixels(seed, float64):
    # Of a submodular set function, as Berman et al. show that the Jaccard loss is one.
    rng = np.random.default_rng(seed)
    errors, truth = rng.random(6), rng.random(6) < 0.1 + 0.2 * seed
    pixels = set(np.flatnonzero(truth))

    def along(order):
        values = [jaccard_loss(pixels, set(order[:i])) for i in range(7)]
        return sum(errors[pixel] * (values[i + 1] - values[i]) for i, pixel in enumerate(order))

    largest = max(along(order) for order in itertools.permutations(range(6)))
    np.testing.assert_allclose(losses._lovasz_extension(errors, truth), largest, rtol=1e-13)
    np.testing.assert_allclose(extension(pixels, errors), largest, rtol=1e-13)


def test_the_lovasz_gradient_of_a_million_pixels_is_accurate_in_float32():
    # Where float32 differences of neighbouring Jaccard losses would keep a digit or two.
    rng = np.random.default_rng(0)
    errors = rng.permutation(2**20).astype(np.float32) / 2**20
    truth = rng.random(2**20) < 0.5
    order = np.argsort(-errors)
    sizes = truth.sum() + np.concatenate([[0], np.cumsum(~truth[order])])
    jaccard = 1 - (truth.sum() - np.concatenate([[0], np.cumsum(truth[order])])) / sizes
    gradient = jax.jit(jax.grad(losses._lovasz_extension))(errors, truth)
    np.testing.assert_allclose(np.asarray(gradient)[order], np.diff(jaccard), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("classes", [1, 5])
def test_terms_are_added_with_their_factors(classes, float64):
    logits, labels = draw_uneven(5, (3, 5), (12, 20), classes=classes)
    factors = dict(zip(TERMS, (0.5, 1.5, 2.0, 0.25, 3.0, 0.75), strict=True))
    weights = WEIGHTS[classes]
    loss, gradient = loss_of(build(factors, classes=classes, weights=weights), logits, labels)
    each = [loss_of(build({name: 1.0}, classes=classes, weights=weights), logits, labels) for name in TERMS]
    np.testing.assert_allclose(
        loss, sum(f * one for f, (one, _) in zip(factors.values(), each, strict=True)), rtol=1e-13
    )
    together = sum(f * np.asarray(one) for f, (_, one) in zip(factors.values(), each, strict=True))
    np.testing.assert_allclose(gradient, together, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ignore", [255, 2])
@pytest.mark.parametrize("classes", [1, 5])
def test_losses_of_parts_divided_by_the_total_counts_add_up(classes, ignore, float64):
    if classes == 1 and ignore == 2:
        ignore = 11
    logits, labels = draw_uneven(6, (3, 5), (12, 20), classes=classes, ignore=ignore)
    labels[0] = ignore  # counts of images differ from the number of images
    criterion = build(
        dict.fromkeys(TERMS, 1.0), classes=classes, ignore=ignore, weights=WEIGHTS[classes], label_smoothing=0.2
    )
    whole = criterion.counts(labels)
    parts = [criterion.counts(labels[i : i + 1]) for i in range(3)]
    assert whole.shape == (len(TERMS),) and whole.dtype == jnp.float64
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-15)
    assert whole[1] == whole[2] == whole[4] == 2
    loss, gradient = loss_of(criterion, logits, labels)
    pieces = [loss_of(criterion, logits[i : i + 1], labels[i : i + 1], whole) for i in range(3)]
    np.testing.assert_allclose(loss, sum(piece for piece, _ in pieces), rtol=1e-13)
    np.testing.assert_allclose(gradient, np.concatenate([piece for _, piece in pieces]), rtol=0, atol=1e-15)
    # It is the counts of the whole that make it so.
    alone = [loss_of(criterion, logits[i : i + 1], labels[i : i + 1])[0] for i in range(3)]
    assert abs(np.mean(alone) - loss) > 1e-3


@pytest.mark.parametrize("classes", [1, 5])
def test_counts_are_weighted_pixels_or_labelled_images(classes):
    _, labels = draw_uneven(7, (3, 5), (12, 20), classes=classes)
    labels[1] = 255
    every = dict.fromkeys(TERMS, 1.0)
    pixels = (labels != 255).sum()
    plain = build(every, classes=classes).counts(labels)
    assert plain.dtype == jnp.float32
    np.testing.assert_array_equal(plain, [pixels, 2, 2, pixels, 2, 2])
    weighted = build(every, classes=classes, weights=WEIGHTS[classes]).counts(labels)
    expected = pixels if classes == 1 else sum(WEIGHTS[5][label] for label in labels[labels != 255])
    np.testing.assert_allclose(weighted, [expected, 2, 2, expected, 2, 2], rtol=1e-6)
    # Terms that are left out have no count.
    np.testing.assert_array_equal(build({"dice": 2.0}, classes=classes).counts(labels), [2])
    np.testing.assert_array_equal(build({"lovasz": 2.0, "focal": 1}, classes=classes).counts(labels), [pixels, 2])


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("name", TERMS)
def test_ignored_pixels_do_not_affect_any_term(name, classes, float64):
    logits, labels = draw_uneven(8, (5, 6), (5, 6), classes=classes)
    ignored = labels == 255
    other = np.where(ignored[..., None], 100 * logits[::-1] + 7, logits)
    criterion = build({name: 1.0}, classes=classes, label_smoothing=0.1)
    loss, gradient = loss_of(criterion, logits, labels)
    assert loss == loss_of(criterion, other, labels)[0]
    assert (np.asarray(gradient)[ignored] == 0).all() and (np.asarray(gradient)[~ignored] != 0).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize(
    "weighted, settings",
    [(False, {}), (True, {"focal_gamma": 0.3, "label_smoothing": 0.1}), (True, {"focal_gamma": 0.0})],
)
def test_losses_and_gradients_are_finite_for_all_inputs(weighted, settings, classes, dtype):
    logits, labels = draw_uneven(9, (3, 5), (6, 10), classes=classes)
    coin = np.random.default_rng(0).random(logits.shape) < 0.5
    ignored = np.full_like(labels, 255)
    one_class = np.where(labels == 255, 255, 0).astype(np.uint8)
    half_ignored = np.concatenate([ignored[:1], labels[1:]])
    criterion = build(
        dict.fromkeys(TERMS, 1.0), classes=classes, weights=WEIGHTS[classes] if weighted else None, **settings
    )
    for scores in (logits, np.where(coin, 1e4, -1e4), np.where(coin, 30, -30), np.zeros_like(logits)):
        for truth in (labels, one_class, half_ignored, ignored):
            loss, gradient = loss_of(criterion, jnp.asarray(scores, dtype), truth)
            assert loss.dtype == jnp.float32 and gradient.dtype == dtype
            assert np.isfinite(loss) and np.isfinite(gradient.astype(np.float32)).all()
            assert loss > 0 or truth is ignored
            if truth is ignored:
                assert loss == 0 and not np.asarray(gradient, np.float32).any()


def test_a_batch_of_only_weightless_pixels_has_zero_loss_and_gradient():
    logits, _ = draw(10, (3, 5), (6, 10), classes=3)
    labels = np.full((3, 6, 10), 2, np.uint8)
    # Smoothing gives weight to the other classes, and torch divides that by zero.
    criterion = build(
        {"cross_entropy": 1.0, "focal": 1.0, "ohem": 1.0}, classes=3, weights=(1.0, 1.0, 0.0), label_smoothing=0.1
    )
    loss, gradient = loss_of(criterion, logits.astype(np.float32), labels)
    assert loss == 0 and not np.asarray(gradient).any()


def test_bfloat16_logits_are_cast_to_float32_before_upsampling():
    logits, labels = draw(11, (3, 5), (12, 20))
    narrow = jnp.asarray(logits, jnp.bfloat16)
    criterion = build(dict.fromkeys(TERMS, 1.0), classes=5)
    assert loss_of(criterion, narrow, labels)[0] == loss_of(criterion, narrow.astype(jnp.float32), labels)[0]


@pytest.mark.parametrize("classes", [1, 5])
def test_plain_cross_entropy_is_exactly_sum_divided_by_count(classes):
    logits, labels = draw(12, (3, 5), (12, 20), classes=classes)
    logits = logits.astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def by_sum_and_count(logits, labels):
        total, count = loss_under_test(logits, labels, ignore_label=255)
        return total / jnp.maximum(count, 1)

    criterion = build({"cross_entropy": 1.0}, classes=classes)
    for ours, theirs in zip(loss_of(criterion, logits, labels), by_sum_and_count(logits, labels), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_equally_hard_pixels_are_all_kept():
    logits, labels = np.zeros((2, 4, 6, 3), np.float32), np.zeros((2, 4, 6), np.uint8)
    loss, gradient = loss_of(build({"ohem": 1.0}, classes=3, ohem_threshold=0.1), logits, labels)
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
    assert (np.asarray(gradient) != 0).all()


def test_a_focal_loss_with_exponent_0_is_cross_entropy(float64):
    for classes in (1, 5):
        logits, labels = draw(13, (3, 5), (12, 20), classes=classes)
        pair = [
            loss_of(build({name: 1.0}, classes=classes, weights=WEIGHTS[classes], focal_gamma=0.0), logits, labels)
            for name in ("focal", "cross_entropy")
        ]
        for ours, theirs in zip(*pair, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-16)


def assert_devices_equal_one(kind, criterion, logits, labels, *, number=4):
    loss, gradient = loss_of(criterion, logits, labels)
    devices = jax.devices()[:number]
    if kind == "pmap":

        def body(logits, labels):
            counts = jax.lax.psum(criterion.counts(labels), "data")
            part, gradient = jax.value_and_grad(criterion.total)(logits, labels, counts)
            return jax.lax.psum(part, "data"), gradient

        split = [x.reshape(number, -1, *x.shape[1:]) for x in (logits, labels)]
        parts, gradients = jax.pmap(body, axis_name="data", devices=devices)(*split)
        spread, gradients = parts[0], gradients.reshape(gradient.shape)
    else:
        mesh = jax.sharding.Mesh(np.array(devices), ("data",))
        split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        spread, gradients = loss_of(criterion, *jax.device_put((logits, labels), split))
    np.testing.assert_allclose(spread, loss, rtol=1e-13)
    np.testing.assert_allclose(gradients, gradient, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_four_devices_give_the_loss_and_gradient_of_one(kind, float64):
    logits, labels = draw(14, (3, 5), (12, 20), batch=8)
    labels[0], labels[3, :6] = 255, 255
    criterion = build(dict.fromkeys(TERMS, 1.0), classes=5, weights=WEIGHTS[5])
    assert_devices_equal_one(kind, criterion, logits, labels)


@pytest.mark.parametrize("kind, number", [("jit", 2), ("jit", 4), ("pmap", 1), ("pmap", 2), ("pmap", 4)])
def test_ohem_groups_and_the_overall_mean_do_not_depend_on_devices(kind, number, float64):
    logits, labels = draw(20, (3, 5), (12, 20), batch=8)
    # A group with few labels, and one without.
    labels[2:4, 2:] = labels[6:] = 255
    settings = dict(ohem_images=2, ohem_threshold=0.3, ohem_min_kept=0.1, mean_over="all")
    factors = {"cross_entropy": 0.5, "ohem": 1.0, "dice": 0.3}
    criterion = build(factors, classes=5, weights=WEIGHTS[5], **settings)
    np.testing.assert_array_equal(criterion.counts(labels), [labels.size, 3, 6])
    assert_devices_equal_one(kind, criterion, logits, labels, number=number)
    by_image = build(factors, classes=5, weights=WEIGHTS[5], **settings | {"ohem_images": 0})
    loss, other = (loss_of(each, logits, labels)[0] for each in (criterion, by_image))
    assert abs(loss - other) > 1e-3


def test_a_group_without_hard_pixels_has_zero_loss_and_gradient(float64):
    # All true classes have the same probability, 0.9 or more: HRNet's own has NaN here.
    logits, labels = np.zeros((4, 3, 5, 2)), np.zeros((4, 3, 5), np.uint8)
    logits[:2, ..., 0] = 3
    criterion = build({"ohem": 1.0}, classes=2, ohem_images=2, ohem_threshold=0.9)
    loss, gradient = loss_of(criterion, logits, labels)
    np.testing.assert_allclose(loss, np.log(2) / 2, rtol=1e-14)
    assert not np.asarray(gradient)[:2].any() and np.asarray(gradient)[2:].all()


def test_images_that_do_not_divide_into_groups_are_refused():
    logits, labels = draw(21, (3, 5), (12, 20), batch=4)
    logits = logits.astype(np.float32)
    criterion = build({"ohem": 1.0}, classes=5, ohem_images=3)
    for compute in (criterion.counts, lambda labels: criterion.total(logits, labels, jnp.ones(1))):
        with pytest.raises(ValueError, match="ohem_images=3: 4 images do not divide into groups"):
            compute(labels)
    # A loss without ohem has no groups.
    assert build(CROSS_ENTROPY, classes=5, ohem_images=3).counts(labels) == (labels != 255).sum()


def test_the_loss_of_auxiliary_logits_is_the_same_or_only_cross_entropy():
    settings = dict(classes=5, weights=WEIGHTS[5], mean_over="all", label_smoothing=0.1)
    factors = {"cross_entropy": 0.5, "ohem": 2.0, "dice": 0.3}
    same, other = (build(factors, aux=aux, **settings) for aux in ("same", "cross_entropy"))
    assert same.auxiliary is same
    assert other.auxiliary == build(CROSS_ENTROPY, **settings) and other.auxiliary.auxiliary == other.auxiliary


# --------------------------------------------------------------------------------------------------------- in row tiles


@pytest.fixture
def in_row_tiles(monkeypatch):
    """Tiles of one row, where there are tiles at all."""
    monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", 1)


CROSS_ENTROPY = {"cross_entropy": 1.0}


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("ignore", [255, 2])
@pytest.mark.parametrize("small, factors", [((6, 5), (2, 4)), ((6, 1), (3, 1)), ((6, 3), (1, 5)), ((6, 4), (1, 1))])
def test_in_row_tiles_loss_and_gradient_equal_numpys(small, factors, ignore, rows, float64, monkeypatch):
    large = small[0] * factors[0], small[1] * factors[1]
    logits, labels = draw(15 + rows, small, large, ignore=ignore)
    labels[1] = ignore
    monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", rows * 3 * factors[0] * large[1] * 5 * 8)
    assert kernels_cross_entropy.pays(logits, large) and _rows(logits, large) == rows
    loss, gradient = loss_of(
        build({"cross_entropy": 0.5}, classes=5, ignore=ignore, weights=WEIGHTS[5]), logits, labels
    )
    np.testing.assert_allclose(
        loss, 0.5 * cross_entropy_by_hand(logits, labels, ignore, weights=WEIGHTS[5]), rtol=1e-13
    )
    of_pixel = np.where(labels == ignore, 0, np.take(WEIGHTS[5], labels, mode="clip"))[..., None]
    slope = (softmax(upsampled(logits, large)) - np.eye(256)[labels][..., :5]) * of_pixel / of_pixel.sum()
    np.testing.assert_allclose(gradient, 0.5 * shrunk(slope, small), rtol=0, atol=1e-15)
    assert not np.asarray(gradient)[1].any() and np.asarray(gradient)[0].any()


@pytest.mark.parametrize("weights", [None, WEIGHTS[3]])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_row_tiles_only_ignored_pixels_give_zero_loss_and_gradient(dtype, weights, in_row_tiles):
    logits, labels = draw(16, (3, 5), (12, 20), classes=3)
    labels[:] = 255
    loss, gradient = loss_of(build(CROSS_ENTROPY, classes=3, weights=weights), jnp.asarray(logits, dtype), labels)
    assert loss.dtype == jnp.float32 and gradient.dtype == dtype
    assert loss == 0 and not np.asarray(gradient, np.float32).any()


def test_in_row_tiles_extreme_logits_keep_their_gradient(in_row_tiles):
    # The first image is right everywhere, the second wrong.
    logits = jnp.broadcast_to(jnp.array([1e4, -1e4, 0.0]), (2, 4, 3, 3))
    labels = np.zeros((2, 16, 12), np.uint8)
    labels[1] = 1
    loss, gradient = loss_of(build(CROSS_ENTROPY, classes=3), logits, labels)
    assert loss == 1e4
    np.testing.assert_array_equal(gradient[0], np.zeros((4, 3, 3)))
    np.testing.assert_allclose(gradient[1], np.broadcast_to([1 / 24, -1 / 24, 0], (4, 3, 3)), rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 40])
def test_in_row_tiles_extreme_logits_of_both_signs_equal_numpy(classes, in_row_tiles):
    logits, labels = draw(17, (4, 3), (32, 24), classes=classes)
    logits = np.where(logits > 0, 1e4, -1e4).astype(np.float32)
    assert kernels_cross_entropy.pays(logits, (32, 24))
    loss, gradient = loss_of(build(CROSS_ENTROPY, classes=classes), logits, labels)
    scores, valid = upsampled(logits, (32, 24)), labels != 255
    chosen = np.take_along_axis(scores, np.where(valid, labels, 0)[..., None], -1)[..., 0]
    largest = scores.max(-1)
    of_pixel = np.log(np.exp(scores - largest[..., None]).sum(-1)) + largest - chosen
    np.testing.assert_allclose(loss, of_pixel[valid].mean(), rtol=2e-6)
    slope = (softmax(scores) - np.eye(256)[labels][..., :classes]) * valid[..., None] / valid.sum()
    expected = shrunk(slope, (4, 3))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_in_row_tiles_bfloat16_logits_are_cast_before_upsampling(in_row_tiles):
    logits, labels = draw(11, (3, 5), (12, 20))
    narrow, criterion = jnp.asarray(logits, jnp.bfloat16), build(CROSS_ENTROPY, classes=5)
    (loss, gradient), (expected, slope) = (loss_of(criterion, x, labels) for x in (narrow, narrow.astype(jnp.float32)))
    assert loss == expected and gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, slope.astype(jnp.bfloat16))


def test_row_tiles_need_whole_factors_several_classes_and_a_cpu(monkeypatch):
    logits, size = jnp.zeros((2, 6, 5, 3)), (24, 20)
    monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", 1)
    assert kernels_cross_entropy.pays(logits, size)
    for other in ((25, 20), (24, 21), (6, 7), (3, 20), (24, 4)):
        assert not kernels_cross_entropy.pays(logits, other), other
    assert not kernels_cross_entropy.pays(logits[..., :1], size)
    assert kernels_cross_entropy.pays(logits[..., :2], size)
    # A single row, or all that are there in one tile.
    assert not kernels_cross_entropy.pays(logits[:, :1], (4, 20))
    whole = 2 * 24 * 20 * 3 * 4
    for tile, pays in ((whole - 1, True), (whole, False)):
        monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", tile)
        assert kernels_cross_entropy.pays(logits, size) == pays


@pytest.mark.parametrize("context", [published_implementations, lambda: meant_for("cuda")])
def test_the_loss_uses_row_tiles_only_on_a_cpu(context, monkeypatch):
    def refuse(*_):
        raise AssertionError("in row tiles")

    monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", 1)
    monkeypatch.setattr(kernels_cross_entropy, "cross_entropy", refuse)
    logits, labels = draw(12, (3, 5), (12, 20))
    criterion, logits = build(CROSS_ENTROPY, classes=5), jnp.asarray(logits, jnp.float32)
    with context():
        assert np.isfinite(criterion.total(logits, labels, criterion.counts(labels)))
    with meant_for("cpu"), pytest.raises(AssertionError, match="in row tiles"):
        criterion.total(logits, labels, criterion.counts(labels))


def test_a_row_tile_has_the_most_rows_that_fit_and_divide_the_height(monkeypatch):
    one_row = 2 * 4 * 20 * 3 * 4
    for height, fit, rows in ((6, 1, 1), (6, 2, 2), (6, 5, 3), (6, 6, 6), (7, 6, 1), (7, 7, 7), (12, 5, 4)):
        monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", fit * one_row)
        assert _rows(jnp.zeros((2, height, 5, 3)), (4 * height, 20)) == rows, (height, fit)


NOT_IN_BANDS = [
    ((12, 20), 5, CROSS_ENTROPY, {"label_smoothing": 0.1}),
    ((12, 20), 5, {"cross_entropy": 1.0, "dice": 1.0}, {}),
    ((12, 20), 5, {"focal": 1.0}, {}),
    ((12, 20), 1, CROSS_ENTROPY, {}),
    ((13, 20), 5, CROSS_ENTROPY, {}),
]


@pytest.mark.parametrize("large, classes, factors, settings", NOT_IN_BANDS)
def test_other_losses_are_computed_without_row_tiles(large, classes, factors, settings, monkeypatch):
    logits, labels = draw(18, (3, 5), large, classes=classes)
    logits, criterion = logits.astype(np.float32), build(factors, classes=classes, **settings)

    def traced_now():
        return jax.jit(lambda x, y: jax.value_and_grad(criterion.total)(x, y, criterion.counts(y)))(logits, labels)

    def refuse(*_):
        raise AssertionError("computed in row tiles")

    expected = traced_now()
    monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", 1)
    monkeypatch.setattr(kernels_cross_entropy, "cross_entropy", refuse)
    for found, before in zip(traced_now(), expected, strict=True):
        np.testing.assert_array_equal(found, before)
    plain, arguments = build(CROSS_ENTROPY, classes=5), (jnp.zeros((3, 3, 5, 5)), np.zeros((3, 12, 20), np.uint8))
    assert np.isfinite(plain.total(*arguments, jnp.ones(1), align_corners=True))
    with pytest.raises(AssertionError, match="computed in row tiles"):
        plain.total(*arguments, jnp.ones(1))


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_in_row_tiles_four_devices_give_the_loss_and_gradient_of_one(kind, float64, monkeypatch):
    logits, labels = draw(19, (6, 5), (24, 20), batch=8)
    labels[0], labels[3, :6] = 255, 255
    # A tile is one row of eight images, or three of the two that a device has under pmap.
    monkeypatch.setattr(kernels_cross_entropy, "TILE_BYTES", 8 * 4 * 20 * 5 * 8)
    assert [_rows(logits[:number], (24, 20)) for number in (8, 2)] == [1, 3]
    criterion = build(CROSS_ENTROPY, classes=5, weights=WEIGHTS[5])
    assert_devices_equal_one(kind, criterion, logits, labels)
    expected = cross_entropy_by_hand(logits, labels, 255, weights=WEIGHTS[5])
    np.testing.assert_allclose(loss_of(criterion, logits, labels)[0], expected, rtol=1e-13)


# ---------------------------------------------------------------------------------------------------------- settings


def test_the_defaults_are_plain_cross_entropy():
    settings = common.get_config("streets").loss
    criterion = losses.criterion(settings, num_classes=19, ignore_label=255)
    assert criterion.factors == (("cross_entropy", 1.0),)
    assert criterion.class_weights is None and criterion.label_smoothing == 0
    assert class_weights.class_weights(settings.class_weights, specs.STREETS) is None
    assert hash(criterion) == hash(losses.criterion(settings, num_classes=19, ignore_label=255))


def test_a_loss_without_any_term_is_refused():
    with pytest.raises(ValueError, match="cross_entropy, ohem, dice, focal, lovasz, tversky, rmi are all 0; set"):
        build({"cross_entropy": 0.0}, classes=5)
    with pytest.raises(ValueError, match="tversky_alpha and tversky_beta are 0, so the Tversky loss is 0"):
        build({"tversky": 1.0, "tversky_alpha": 0.0, "tversky_beta": 0.0}, classes=5)


@pytest.mark.parametrize("name", [*TERMS, *SETTINGS])
def test_a_missing_setting_of_a_loss_is_refused_by_name(name):
    settings = dict.fromkeys(TERMS, 1.0) | SETTINGS
    del settings[name]
    with pytest.raises(ValueError, match=f"loss.{name} is missing"):
        losses.criterion(settings, num_classes=5, ignore_label=255)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dice": -1.0},
        {"focal": math.nan, "label_smoothing": 1.5, "ohem": "x"},
        {"focal_gamma": math.inf, "ohem_threshold": -0.1, "ohem_min_kept": 2},
        {"ohem_images": 1.5, "mean_over": "pixels", "aux": None},
    ],
    ids=str,
)
def test_all_settings_out_of_range_are_in_one_error(wrong):
    settings = dict.fromkeys(TERMS, 1.0) | SETTINGS | wrong
    with pytest.raises(ValueError) as caught:
        losses.criterion(settings, num_classes=5, ignore_label=255, class_weights=(1.0, 2.0))
    message = str(caught.value)
    assert all(f"loss.{name} must be" in message and f"got {value!r}" in message for name, value in wrong.items())
    assert "class_weights" in message


@pytest.mark.parametrize("name", [*TERMS, *SETTINGS])
def test_the_loss_and_the_config_schema_allow_the_same_values(name):
    settings = dict.fromkeys(TERMS, 1.0) | SETTINGS
    words = ("1", "all", "labelled", "same", "cross_entropy")
    for value in (-1.0, -1e-6, 0.0, 0.5, 1.0, 1.0001, 7.0, 3, -3, math.inf, math.nan, *words, None, True):
        config = schema.default_config("streets").to_dict()
        config["loss"][name] = value
        is_allowed = f"loss.{name}" not in schema.problems(config)
        with contextlib.nullcontext() if is_allowed else pytest.raises(ValueError, match=f"loss.{name} must be"):
            losses.criterion(settings | {name: value}, num_classes=5, ignore_label=255)


def test_all_problems_of_class_weights_are_in_one_error():
    with pytest.raises(ValueError) as caught:
        build({"dice": 1.0}, classes=3, weights=(1.0, -2.0))
    for part in ("loss.class_weights has 2 numbers for 3 classes", "finite and not negative: (1.0, -2.0)"):
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------------- region mutual information


def vectors_of_regions(channel):
    """The 9 numbers of each 3x3 cells, cells of 4x4 pixels, averaged with two rows of zeros around: (9, N)."""
    padded = np.pad(channel, 2)
    height, width = (side // 4 for side in padded.shape)
    cells = padded[: 4 * height, : 4 * width].reshape(height, 4, width, 4).mean((1, 3))
    places = itertools.product(range(height - 2), range(width - 2))
    return np.array([cells[i : i + 3, j : j + 3].ravel() for i, j in places]).T


def rmi_by_hand(logits, labels, ignore):
    """Zhao et al., equation 15, with the covariances as sums, as their code has them."""
    values, ridge = [], 5e-4 * np.eye(9)
    for scores, truth in zip(upsampled(logits, labels.shape[1:]), labels, strict=True):
        if (truth == ignore).all():
            continue
        total = 0.0
        for c in range(scores.shape[-1]):
            sigmoid = np.where(truth == ignore, 0, 1 / (1 + np.exp(-scores[..., c])))
            is_class = (truth == (1 if scores.shape[-1] == 1 else c)) & (truth != ignore)
            y, p = (vectors_of_regions(channel) for channel in (is_class.astype(float), sigmoid))
            y, p = y - y.mean(1, keepdims=True), p - p.mean(1, keepdims=True)
            unexplained = y @ y.T - y @ p.T @ np.linalg.inv(p @ p.T + ridge) @ p @ y.T
            total += np.linalg.slogdet(unexplained + ridge)[1] / 2 / 9
        values.append(total)
    return np.mean(values)


def draw_regions(seed, *, classes, size=(42, 51), batch=3, ignore=255):
    """Labels of blocks that do not fit the cells, with logits that partly agree."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, max(classes, 2), (batch, 9, 11)).astype(np.uint8)
    labels = np.kron(blocks, np.ones((1, 5, 5), np.uint8))[:, : size[0], : size[1]]
    labels[rng.random(labels.shape) < 0.1] = ignore
    logits = rng.standard_normal((batch, 9, 11, classes))
    logits += 2.0 * (blocks[..., None] == (np.arange(classes) if classes > 1 else [1]))
    return logits, labels


@pytest.mark.parametrize("classes, ignore", [(1, 255), (4, 255), (4, 2)])
def test_rmi_and_its_gradient_equal_the_published_definition(classes, ignore, float64):
    criterion = build({"rmi": 0.5}, classes=classes, ignore=ignore)
    for seed in (0, 1):
        logits, labels = draw_regions(seed, classes=classes, ignore=ignore)
        labels[seed] = ignore  # an image that does not count
        loss, gradient = loss_of(criterion, logits, labels)
        np.testing.assert_allclose(loss, 0.5 * rmi_by_hand(logits, labels, ignore), rtol=1e-10)
        rng = np.random.default_rng(seed + 9)
        for _ in range(3):
            direction = rng.standard_normal(logits.shape)
            above, below = (rmi_by_hand(logits + step * direction, labels, ignore) for step in (1e-5, -1e-5))
            np.testing.assert_allclose(np.vdot(gradient, direction), 0.5 * (above - below) / 2e-5, rtol=1e-5)
        assert not np.asarray(gradient)[seed].any() and np.asarray(gradient).any()


@pytest.mark.parametrize("classes", [1, 5])
def test_rmi_in_float32_equals_its_definition(classes):
    criterion = build({"rmi": 1.0}, classes=classes)
    logits, labels = draw_regions(2, classes=classes, size=(45, 55))
    loss, gradient = loss_of(criterion, logits.astype(np.float32), labels)
    assert loss.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(loss, rmi_by_hand(logits, labels, 255), rtol=2e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_rmi_and_its_gradient_equal_those_of_a_published_package(seed, float64):
    # See parity/record_rmi.py.
    with np.load(Path(__file__).with_name("rmi.npz")) as recorded:
        logits, labels = recorded[f"logits{seed}"].astype(np.float64), recorded[f"labels{seed}"]
        expected, slope = recorded[f"loss{seed}"], recorded[f"gradient{seed}"]
    criterion = losses.Criterion(num_classes=3, factors=(("rmi", 1.0),))
    loss, gradient = jax.jit(jax.value_and_grad(criterion.total))(logits, labels, criterion.counts(labels))
    np.testing.assert_allclose(loss, expected, rtol=1e-7)
    np.testing.assert_allclose(gradient, slope, atol=1e-7 * np.abs(slope).max())


def test_rmi_decreases_as_predictions_get_the_structure_of_the_labels():
    logits, labels = draw_regions(3, classes=4)
    criterion = build({"rmi": 1.0}, classes=4)
    right = 6.0 * (labels[:, 2::5, 2::5, None] == np.arange(4)) - 3
    flat = np.zeros_like(right)
    found = [float(loss_of(criterion, jnp.asarray(s, jnp.float32), labels)[0]) for s in (right, logits, flat)]
    assert found == sorted(found) and found[1] - found[0] > 0.3 and found[2] - found[1] > 0.3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("classes", [1, 3])
def test_rmi_of_structure_without_noise_is_finite_in_float32(classes, dtype):
    # Straight edges make covariances singular, and large crops make them large: in float32 the published form of the
    # matrix is indefinite here.
    labels = np.zeros((3, 256, 512), np.uint8)
    labels[0, 128:], labels[1, :, 200:], labels[2, :, ::2] = 1, 1, 255
    criterion = build({"rmi": 1.0}, classes=classes)
    is_class = labels[:, ::4, ::4, None] == (np.arange(classes) if classes > 1 else [1])
    for scores in (np.where(is_class, 9.0, -9.0), np.where(is_class, 1e4, -1e4), np.zeros(is_class.shape)):
        loss, gradient = loss_of(criterion, jnp.asarray(scores, dtype), labels)
        assert np.isfinite(loss) and np.isfinite(gradient.astype(jnp.float32)).all()
    ignored = np.full_like(labels, 255)
    loss, gradient = loss_of(criterion, jnp.asarray(scores, dtype), ignored)
    assert loss == 0 and not np.asarray(gradient, np.float32).any()


@pytest.mark.parametrize("classes", [1, 4])
def test_rmi_of_parts_adds_up_and_ignores_ignored_pixels(classes, float64):
    logits, labels = draw_regions(4, classes=classes, size=(24, 29), batch=4)
    # As large as the labels, so that an ignored pixel is a pixel of the logits.
    logits = upsampled(logits, labels.shape[1:])
    labels[1] = 255
    criterion = build({"rmi": 1.0}, classes=classes)
    counts = criterion.counts(labels)
    np.testing.assert_array_equal(counts, [3])
    loss, gradient = loss_of(criterion, logits, labels)
    pieces = [loss_of(criterion, logits[i : i + 2], labels[i : i + 2], counts) for i in (0, 2)]
    np.testing.assert_allclose(loss, sum(piece for piece, _ in pieces), rtol=1e-13)
    np.testing.assert_allclose(gradient, np.concatenate([g for _, g in pieces]), rtol=0, atol=1e-12)
    ignored = labels == 255
    other = np.where(ignored[..., None], 100 * logits[::-1] + 7, logits)
    assert loss == loss_of(criterion, other, labels)[0]
    assert not np.asarray(gradient)[ignored].any() and np.asarray(gradient)[~ignored].any()


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_rmi_on_four_devices_equals_that_on_one(kind, float64):
    logits, labels = draw_regions(5, classes=3, size=(12, 21), batch=4)
    labels[3] = 255
    assert_devices_equal_one(kind, build({"rmi": 0.5, "cross_entropy": 0.5}, classes=3), logits, labels)


def test_labels_too_small_for_a_region_are_refused():
    logits, labels = jnp.zeros((1, 2, 5, 3)), jnp.zeros((1, 7, 20), jnp.uint8)
    criterion = build({"rmi": 1.0}, classes=3)
    with pytest.raises(ValueError, match=r"loss\.rmi needs labels of at least 8x8 pixels; got 7x20"):
        criterion.total(logits, labels, criterion.counts(labels))


# ------------------------------------------------------------------------------------------------------- distillation


def divergence(p, q):
    return np.sum(p * np.log(p / q))


def channel_wise_by_hand(student, teacher, temperature):
    """Shu et al., equation 4, divided by the channels, mean over images."""
    images = []
    for one, other in zip(student, teacher, strict=True):
        channels = [
            divergence(softmax(other[..., c].ravel() / temperature), softmax(one[..., c].ravel() / temperature))
            for c in range(one.shape[-1])
        ]
        images.append(temperature**2 * np.mean(channels))
    return np.mean(images)


def pixel_wise_by_hand(student, teacher, temperature):
    """Hinton et al., of the probabilities of each pixel; those of a single class are p and 1 - p."""

    def probabilities(logits):
        if logits.shape[-1] > 1:
            return softmax(logits / temperature)
        p = 1 / (1 + np.exp(-logits / temperature))
        return np.concatenate([p, 1 - p], axis=-1)

    p, q = probabilities(teacher), probabilities(student)
    return temperature**2 * np.mean([divergence(p[place], q[place]) for place in np.ndindex(p.shape[:3])])


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("factors, temperature", [((3.0, 0.0), 4.0), ((0.0, 0.5), 2.0), ((1.5, 0.25), 1.0)])
def test_divergences_from_a_teacher_equal_their_published_definitions(factors, temperature, classes, float64):
    rng = np.random.default_rng(classes)
    student, teacher = 3 * rng.standard_normal((2, 3, 4, 6, classes))
    loss = losses.Divergence(*factors, temperature=temperature)

    def by_hand(student):
        channel_wise = channel_wise_by_hand(student, teacher, temperature)
        return factors[0] * channel_wise + factors[1] * pixel_wise_by_hand(student, teacher, temperature)

    found, gradient = jax.value_and_grad(loss.total)(student, teacher, jnp.array(3.0))
    np.testing.assert_allclose(found, by_hand(student), rtol=1e-12)
    direction = rng.standard_normal(student.shape)
    slope = (by_hand(student + 1e-5 * direction) - by_hand(student - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-7)
    parts = [loss.total(student[i : i + 1], teacher[i : i + 1], jnp.array(3.0)) for i in range(3)]
    np.testing.assert_allclose(found, sum(parts), rtol=1e-13)
    assert abs(loss.total(teacher, teacher, jnp.array(3.0))) < 1e-15


@pytest.mark.parametrize("classes", [1, 3])
def test_divergences_of_extreme_logits_are_finite(classes):
    signs = np.random.default_rng(0).choice([-1e4, 1e4], (2, 2, 4, 5, classes))
    loss = losses.Divergence(3.0, 1.0, temperature=1.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        student, teacher = jnp.asarray(signs, dtype)
        found, gradient = jax.value_and_grad(loss.total)(student, teacher, jnp.array(2))
        assert found.dtype == jnp.float32 and np.isfinite(found) and found > 0
        assert np.isfinite(gradient.astype(jnp.float32)).all()


# ----------------------------------------------------------------------------------------------------- class weights


def test_median_frequency_is_that_of_eigen_and_fergus():
    # Two images; class 3 is in the second alone, class 2 in none.
    pixels = np.array([[60, 40, 0, 0], [100, 80, 0, 20]])
    frequencies = [160 / 300, 120 / 300, 20 / 200]
    weights = class_weights.median_frequency(pixels)
    np.testing.assert_allclose(weights, [0.4 / frequencies[0], 1.0, 0.0, 0.4 / frequencies[2]], rtol=1e-14)
    # Sums alone: the dataset counts as one image.
    whole = class_weights.median_frequency(pixels.sum(axis=0))
    np.testing.assert_allclose(whole, [0.4 / frequencies[0], 1.0, 0.0, 0.4 / (20 / 300)], rtol=1e-14)
    with pytest.raises(ValueError, match="no class has a pixel"):
        class_weights.median_frequency(np.zeros((2, 3)))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_class_balanced_weights_are_those_of_cui(beta):
    counts = np.array([3, 40, 0, 5000, 11])
    powers = [math.fsum(beta**i for i in range(n)) for n in counts]  # (1 - β ** n) / (1 - β)
    expected = np.array([1 / power if power else 0.0 for power in powers])
    expected /= expected[expected > 0].mean()
    np.testing.assert_allclose(class_weights.class_balanced(counts, beta=beta), expected, rtol=1e-9)


def test_class_balanced_weights_differ_among_millions_of_pixels():
    counts = 1e6 * np.array([[40.0, 3.0, 0.0, 0.05], [10.0, 1.0, 0.0, 0.0]])
    weights = class_weights.class_balanced(counts)
    assert weights[2] == 0 and weights[weights > 0].mean() == pytest.approx(1)
    # Inverse to the pixels of rare classes, and at most 1 / (1 - 1 / e) apart among frequent ones.
    assert weights[3] / weights[1] == pytest.approx(4 / 0.05, rel=0.15) and weights[1] > 3 * weights[0]
    assert class_weights.class_weights("class_balanced", specs.VOC, np.full(21, 7.0)) == pytest.approx((1.0,) * 21)
    with pytest.raises(ValueError, match="no class has a pixel"):
        class_weights.class_balanced(np.zeros((2, 3)))


def test_inverse_sqrt_is_one_over_the_root_of_the_share_of_all_pixels():
    # Of the labelled pixels of CamVid's 367 training images; SalsaNext's formula, to two digits.
    shares = [0.1754, 0.2421, 0.0102, 0.3296, 0.0467, 0.1012, 0.0122, 0.0117, 0.0611, 0.0067, 0.0030]
    expected = [2.39, 2.03, 9.90, 1.74, 4.63, 3.14, 9.05, 9.25, 4.05, 12.22, 18.26]
    weights = class_weights.class_weights("inverse_sqrt", specs.CAMVID, 1e6 * np.array(shares))
    np.testing.assert_allclose(weights, expected, rtol=2e-3)
    # Images are added up, and a class without a pixel has no weight.
    assert class_weights.inverse_sqrt(np.array([[1, 0, 9], [3, 0, 3]])).tolist() == [2.0, 0.0, (16 / 12) ** 0.5]
    with pytest.raises(ValueError, match="no class has a pixel"):
        class_weights.inverse_sqrt(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="class_weights=inverse_sqrt needs the pixels of each of the 11"):
        class_weights.class_weights("inverse_sqrt", specs.CAMVID)


def test_median_frequency_weights_come_from_the_labels_of_the_dataset():
    pixels = np.random.default_rng(0).integers(1, 1000, (4, 11))
    weights = class_weights.class_weights("median_frequency", specs.CAMVID, pixels)
    assert weights == tuple(class_weights.median_frequency(pixels)) and len(weights) == 11
    for wrong, said in ((None, "got none"), (np.ones((4, 12)), re.escape("(4, 12)"))):
        with pytest.raises(ValueError, match=f"11 label values of camvid.*{said}"):
            class_weights.class_weights("median_frequency", specs.CAMVID, wrong)


def test_the_weight_of_a_binary_dataset_balances_the_background():
    spec = specs.DatasetSpec("cells", ("cell",), ((0, 0, 255),), 255)
    (weight,) = class_weights.class_weights("median_frequency", spec, np.array([900, 100]))
    np.testing.assert_allclose(weight, 9.0)
    assert class_weights.class_weights("median_frequency", spec, np.array([900, 0])) == (1.0,)
    assert class_weights.class_weights((3,), spec) == (3.0,)


def test_weights_of_cityscapes_are_only_for_its_classes():
    weights = class_weights.class_weights("cityscapes", specs.STREETS)
    assert len(weights) == 19 and (weights[0], weights[9], weights[18]) == (0.8373, 1.0023, 1.0507)
    assert 1 < np.mean(weights) < 1.002
    with pytest.raises(ValueError, match=r"19 classes of cityscapes \(road.* camvid has others \(sky"):
        class_weights.class_weights("cityscapes", specs.CAMVID)


@pytest.mark.parametrize("choice", [None, ""])
def test_no_choice_gives_no_weights(choice):
    assert class_weights.class_weights(choice, specs.CAMVID) is None


@pytest.mark.parametrize(
    "choice, message",
    [
        ("enet", "'enet'"),
        (3, "got 3"),
        (("a",) * 11, "11 numbers in parentheses"),
        ((), r"got \(\)"),
        ((1.0, 2.0), "camvid: loss.class_weights has 2 numbers for 11 classes"),
        ((1.0,) * 10 + (-1.0,), "must be finite and not negative"),
        ((1.0,) * 10 + (math.nan,), "must be finite and not negative"),
        ((0,) * 11, "are all 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        class_weights.class_weights(choice, specs.CAMVID)
    assert class_weights.class_weights([0.5] * 11, specs.CAMVID) == (0.5,) * 11
