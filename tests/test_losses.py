"""Losses and predictions against float64 numpy with a bilinear enlargement of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.losses import cross_entropy as loss_under_test
from segjax.losses import predictions

cross_entropy = jax.jit(loss_under_test, static_argnames="ignore_label")
loss_and_gradient = jax.jit(jax.value_and_grad(loss_under_test, has_aux=True), static_argnames="ignore_label")

# (logits h, w), (labels H, W): a whole factor, as the models have it, and two that are not whole.
SIZES = [((3, 5), (12, 20)), ((4, 3), (13, 7)), ((6, 7), (6, 7))]


def bilinear(old, new):
    """(new, old) weights of half-pixel bilinear enlargement, edges repeated."""
    weights = np.zeros((new, old))
    for i in range(new):
        position = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = int(position)
        weights[i, low] += 1 - (position - low)
        weights[i, min(low + 1, old - 1)] += position - low
    return weights


def enlarged(logits, size):
    rows, columns = (bilinear(old, new) for old, new in zip(logits.shape[1:3], size, strict=True))
    return np.einsum("ph,bhwk,qw->bpqk", rows, logits.astype(np.float64), columns)


def shrunk(gradient, size):
    """The transpose of `enlarged`: (B, H, W, K) -> (B, *size, K)."""
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
    pixels = enlarged(logits, labels.shape[1:]).reshape(-1, logits.shape[-1])
    for scores, label in zip(pixels, labels.ravel(), strict=True):
        if label != ignore:
            total -= np.log(softmax(scores)[label])
            count += 1
    return total, count


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("small, large", SIZES)
def test_cross_entropy_sums_over_counted_pixels_of_enlarged_logits(small, large, seed, float64):
    for ignore in (255, 2):  # 2 lies inside the range of the classes: no label value is special by itself
        logits, labels = draw(seed, small, large, ignore=ignore)
        total, count = cross_entropy(logits, labels, ignore_label=ignore)
        expected = by_hand(logits, labels, ignore)
        assert int(count) == expected[1] and 0 < expected[1] < labels.size
        np.testing.assert_allclose(total, expected[0], rtol=1e-13)


def test_the_sum_keeps_the_dtype_of_the_logits_and_the_count_is_int32(float64):
    logits, labels = draw(0, *SIZES[0])
    for dtype, rtol in ((jnp.float32, 2e-6), (jnp.float64, 1e-13)):
        for label_dtype in (jnp.uint8, jnp.int32):
            total, count = cross_entropy(logits.astype(dtype), labels.astype(label_dtype), ignore_label=255)
            assert total.dtype == dtype and count.dtype == jnp.int32 and total.shape == count.shape == ()
            np.testing.assert_allclose(total, by_hand(logits, labels, 255)[0], rtol=rtol)


@pytest.mark.parametrize("classes", [1, 4])
def test_ignored_pixels_have_no_part_in_the_loss_nor_in_the_gradient(classes, float64):
    logits, labels = draw(2, (5, 6), (5, 6), classes=classes)
    ignored = labels == 255
    assert ignored.any()
    other = np.where(ignored[..., None], 100 * logits[::-1] + 7, logits)
    (total, _), gradient = loss_and_gradient(logits, labels, ignore_label=255)
    assert total == loss_and_gradient(other, labels, ignore_label=255)[0][0]
    assert (np.asarray(gradient)[ignored] == 0).all() and (np.asarray(gradient)[~ignored] != 0).any()


@pytest.mark.parametrize("classes", [1, 6])
def test_a_batch_of_ignored_pixels_alone_has_loss_count_and_gradient_zero(classes):
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
def test_the_gradient_is_softmax_minus_one_hot_through_the_enlargement(small, large, seed, float64):
    logits, labels = draw(seed, small, large)
    _, gradient = loss_and_gradient(logits, labels, ignore_label=255)
    one_hot = np.eye(256)[labels][..., : logits.shape[-1]]
    expected = (softmax(enlarged(logits, large)) - one_hot) * (labels != 255)[..., None]
    np.testing.assert_allclose(gradient, shrunk(expected, small), rtol=0, atol=1e-13 * np.abs(expected).sum())


@pytest.mark.parametrize("small, large", SIZES)
def test_a_binary_model_has_the_loss_and_gradient_of_the_logistic_function(small, large, float64):
    logits, labels = draw(6, small, large, classes=1)
    (total, count), gradient = loss_and_gradient(logits, labels, ignore_label=255)
    score, valid, positive = enlarged(logits, large)[..., 0], labels != 255, labels == 1
    probability = 1 / (1 + np.exp(-score))
    likelihood = np.where(positive, probability, 1 - probability)
    np.testing.assert_allclose(total, -np.log(likelihood[valid]).sum(), rtol=1e-12)
    assert count == valid.sum()
    expected = shrunk(((probability - positive) * valid)[..., None], small)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "label, logit, loss, slope", [(1, 1e4, 0, 0), (1, -1e4, 1e4, -1), (0, 1e4, 1e4, 1), (0, -1e4, 0, 0)]
)
def test_extreme_binary_logits_neither_overflow_nor_lose_their_gradient(label, logit, loss, slope):
    logits, labels = jnp.full((2, 3, 4, 1), logit), jnp.full((2, 3, 4), label, jnp.uint8)
    (value, _), gradient = loss_and_gradient(logits, labels, ignore_label=255)
    assert value == 24 * loss
    np.testing.assert_array_equal(gradient, np.full(logits.shape, slope))


def test_extreme_logits_of_many_classes_neither_overflow_nor_lose_their_gradient():
    logits = jnp.array([[[[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]]]])  # (1, 1, 2, 3)
    labels = jnp.array([[[0, 1]]])
    (value, _), gradient = loss_and_gradient(logits, labels, ignore_label=9)
    assert value == 2e4
    np.testing.assert_array_equal(gradient[0, 0], [[0, 0, 0], [1, -1, 0]])


def test_predictions_are_the_argmax_of_enlarged_logits_not_enlarged_argmaxes():
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
    np.testing.assert_array_equal(predicted, enlarged(logits, large).argmax(-1))


@pytest.mark.parametrize("small, large", SIZES)
def test_a_binary_prediction_is_a_probability_above_one_half_after_enlarging(small, large):
    logits, _ = draw(7, small, large, classes=1)
    predicted = predictions(jnp.array(logits, jnp.float32), large)
    assert predicted.dtype == jnp.int32
    np.testing.assert_array_equal(predicted, 1 / (1 + np.exp(-enlarged(logits, large)[..., 0])) > 0.5)


def test_a_binary_probability_of_exactly_one_half_is_background():
    assert (predictions(jnp.zeros((2, 3, 4, 1)), (6, 8)) == 0).all()
