"""Cross-entropy and labels of upsampled logits in cells, against logits that two matrices upsample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import losses
from segjax.inference import engine
from segjax.kernels import cells, choice
from segjax.recipes import common

K = 7


def matrix(old, new):
    """(new, old): the weights of half-pixel bilinear interpolation, by their definition."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    weights[np.arange(new), low] += 1 - (places - low)
    weights[np.arange(new), np.minimum(low + 1, old - 1)] += places - low
    return weights


def upsampled(logits, size, einsum=jnp.einsum):
    rows, columns = (matrix(old, new) for old, new in zip(logits.shape[1:3], size, strict=True))
    return einsum("yh,bhwk,xw->byxk", rows, logits, columns)


def made(seed, factors, *, dtype=np.float64):
    """Logits (2, 5, 7, K), and labels of which some are no class, one of them 255."""
    rng = np.random.default_rng(seed)
    logits = (5 * rng.standard_normal((2, 5, 7, K))).astype(dtype)
    labels = rng.integers(0, K + 2, (2, 5 * factors[0], 7 * factors[1]))
    return logits, np.where(labels == K + 1, 255, labels).astype(np.uint8)


FACTORS = [(4, 4), (2, 3), (8, 8), (5, 2)]


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_normaliser_and_chosen_logit_equal_those_of_upsampled_logits(factors, seed, float64):
    logits, labels = made(seed, factors)
    weights = np.random.default_rng(seed + 2).standard_normal((2, *labels.shape))

    def of_upsampled(logits):
        full = upsampled(logits, labels.shape[1:])
        chosen = jnp.take_along_axis(full, np.minimum(labels, K - 1)[..., None].astype(int), axis=-1)[..., 0]
        return jax.nn.logsumexp(full, axis=-1), jnp.where(labels < K, chosen, 0)

    found, back = jax.vjp(lambda x: cells.normaliser_and_chosen(x, labels), logits)
    expected, expected_back = jax.vjp(of_upsampled, logits)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(back(tuple(weights)), expected_back(tuple(weights)), rtol=0, atol=1e-11)


def test_float32_stays_finite_and_close_for_large_logits():
    logits, labels = made(3, (4, 4), dtype=np.float32)
    logits = 200 * logits + 1000
    found = np.subtract(*cells.normaliser_and_chosen(logits, labels))
    full = upsampled(logits.astype(np.float64), labels.shape[1:], np.einsum)
    largest = full.max(axis=-1)
    expected = largest + np.log(np.exp(full - largest[..., None]).sum(axis=-1))
    expected -= np.take_along_axis(full, np.minimum(labels, K - 1)[..., None].astype(int), axis=-1)[..., 0]
    is_class = labels < K
    np.testing.assert_allclose(found[is_class], expected[is_class], rtol=0, atol=1e-6 * np.abs(full).max())


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_equal_those_of_upsampled_logits(factors, seed, float64):
    logits, labels = made(seed, factors)
    # Equal logits, of which the first class counts.
    logits[0, 1:3, 2:5] = 1.0
    expected = np.argmax(upsampled(logits, labels.shape[1:], np.einsum), axis=-1)
    found = np.array(cells.labels_of(logits, labels.shape[1:]))
    inside = (0, slice(3 * factors[0] // 2, 5 * factors[0] // 2), slice(5 * factors[1] // 2, 9 * factors[1] // 2))
    assert (found[inside] == 0).all()
    # Blends of equal numbers round apart.
    found[inside] = expected[inside] = 0
    np.testing.assert_array_equal(found, expected)


def test_labels_next_to_nan_are_the_class_of_nan_as_in_argmax():
    logits, labels = made(0, (4, 4), dtype=np.float32)
    logits[1, 2, 3, 4] = np.nan
    found = np.array(cells.labels_of(logits, labels.shape[1:]))
    expected = np.asarray(cells.labels_of(np.nan_to_num(logits), labels.shape[1:]))
    # Every output between this pixel and its neighbours.
    touched = np.zeros(found.shape, bool)
    touched[1, 6:14, 10:18] = True
    assert (found[touched] == 4).all()
    np.testing.assert_array_equal(found[~touched], expected[~touched])


LOSSES = [
    dict(),
    dict(label_smoothing=0.1, class_weights=(0.3, 1.0, 2.0, 0.0, 1.5, 0.5, 1.0)),
    dict(cross_entropy=0.0, ohem=1.0, ohem_threshold=0.3, ohem_min_kept=0.2),
    dict(cross_entropy=0.0, ohem=1.0, ohem_images=2, ohem_threshold=0.3, ohem_min_kept=0.2),
    dict(cross_entropy=0.5, focal=1.0, focal_gamma=1.5, mean_over="all"),
    dict(dice=0.5),
]


@pytest.mark.each_value_once
@pytest.mark.parametrize("terms", LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("align_corners, size", [(False, (20, 28)), (False, (37, 29)), (True, (20, 28))])
def test_every_loss_is_equal_with_the_implementations_for_gpus(terms, seed, align_corners, size, float64):
    terms = dict(terms)
    weights, settings = terms.pop("class_weights", None), common.get_config("folder").loss
    settings.update(terms)
    criterion = losses.criterion(settings, num_classes=K, ignore_label=255, class_weights=weights)
    logits, _ = made(seed, (4, 4))
    labels = np.random.default_rng(seed).choice([*range(K), 255], (2, *size)).astype(np.uint8)

    def total(logits):
        return criterion.total(logits, labels, criterion.counts(labels), align_corners=align_corners)

    with choice.meant_for("cuda"):
        found, of_logits = jax.value_and_grad(total)(logits)
    with choice.published_implementations():
        expected, expected_of_logits = jax.value_and_grad(total)(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(of_logits, expected_of_logits, rtol=0, atol=1e-13)


def test_cells_do_not_apply_to_other_sizes_and_one_class():
    assert cells.applies((2, 5, 7, 3), (20, 28))
    others = [((2, 5, 7, 1), (20, 28)), ((2, 5, 7, 3), (5, 28)), ((2, 5, 7, 3), (21, 28)), ((2, 5, 7, 3), (80, 112))]
    assert not any(cells.applies(*other) for other in others)


@pytest.mark.parametrize("num_classes", [3, 300])
def test_predicted_labels_follow_from_the_scores(num_classes, float64):
    class Model:
        align_corners, size_multiple = False, 8

        def bind(self, params, batch_stats):
            return lambda images: (params["logits"], {})

    params = {"logits": np.random.default_rng(0).standard_normal((2, 6, 4, num_classes))}
    images = np.zeros((2, 21, 13, 3), np.uint8)
    with choice.meant_for("cuda"):
        found = engine.predict_labels(Model(), params, {}, images, normalise=lambda x: x)
        scores = engine.score(Model(), params, {}, images, normalise=lambda x: x)
    assert found.shape == (2, 21, 13) and found.dtype == (np.uint8 if num_classes == 3 else np.uint16)
    np.testing.assert_array_equal(found, np.argmax(scores, axis=-1))
