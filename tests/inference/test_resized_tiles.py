"""Resizing in tiles against `layers.resize` of the whole, and the number of programs that it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import layers
from segjax.inference import resized_tiles
from segjax.inference.engine import Computed, Inference, Protocol
from tests.inference.test_engine import Blurred, draw

SIZES = [(1, 1), (5, 300), (31, 256), (33, 257), (64, 96), (130, 511)]


def tiled(logits, sizes, *, flipped=False, align_corners=False, total=None):
    """Probabilities (H, W, K) of each image; `total` is added to every tile."""
    grid = resized_tiles.grid(sizes)
    samples = resized_tiles.samples(logits, sizes, flipped=flipped, align_corners=align_corners)
    tiles = {}
    for corner in grid:
        before = None if total is None else jnp.full((len(sizes), *resized_tiles.TILE, logits.shape[-1]), total)
        tiles[corner] = resized_tiles.add_probabilities(before, logits, *samples.of_tile(corner))
    rows = [[tiles[corner] for corner in grid if corner[0] == top] for top in dict.fromkeys(top for top, _ in grid)]
    return [np.asarray(Computed(rows, number, size)) for number, size in enumerate(sizes)]


def whole(logits, size, *, flipped=False, align_corners=False):
    scores = layers.resize(logits, size, align_corners=align_corners)
    probabilities = jax.nn.sigmoid(scores) if logits.shape[-1] == 1 else jax.nn.softmax(scores)
    return np.asarray(probabilities[:, :, ::-1] if flipped else probabilities)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("num_classes, seed", [(1, 0), (7, 1)])
def test_resized_tiles_equal_the_whole_resized_at_once(num_classes, seed, align_corners, float64):
    logits = jnp.asarray(np.random.default_rng(seed).normal(0, 3, (len(SIZES), 32, 48, num_classes)))
    for flipped in (False, True):
        found = tiled(logits, SIZES, flipped=flipped, align_corners=align_corners)
        for number, size in enumerate(SIZES):
            expected = whole(logits[number, None], size, flipped=flipped, align_corners=align_corners)[0]
            assert found[number].dtype == np.float64
            np.testing.assert_allclose(found[number], expected, rtol=1e-12, atol=1e-15)
            np.testing.assert_array_equal(found[number].argmax(axis=-1), expected.argmax(axis=-1))


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_and_probabilities_do_not_depend_on_the_size_of_tiles(seed, monkeypatch):
    logits = jnp.asarray(np.random.default_rng(seed).normal(0, 3, (len(SIZES), 40, 72, 5)), jnp.float32)
    in_tiles = tiled(logits, SIZES)
    monkeypatch.setattr(resized_tiles, "TILE", (130, 511))
    for found, expected in zip(in_tiles, tiled(logits, SIZES), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=2e-6)
        np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))


def test_probabilities_are_added_to_the_previous_ones():
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 3, (2, 20, 30, 4)), jnp.float32)
    sizes = [(33, 50), (20, 30)]
    for found, expected in zip(tiled(logits, sizes, total=0.25), tiled(logits, sizes), strict=True):
        np.testing.assert_array_equal(found, expected + np.float32(0.25))


@pytest.mark.parametrize("flip", [False, True])
def test_images_of_many_sizes_share_the_program_of_their_input_size(flip):
    protocol = Protocol(base_size=(256, 64), size_divisor=32, flip=flip)
    # Classes of its own, so that no other test has compiled for them.
    inference = Inference(Blurred(8 + flip), protocol)
    before = resized_tiles.add_probabilities._cache_size()
    sizes = [(60, 81), (30, 42), (120, 180), (64, 96), (128, 170), (200, 280), (61, 90), (512, 683)]
    assert {protocol.input_sizes(size) for size in sizes} == {((64, 96),)}
    for seed, size in enumerate(sizes):
        (labels,) = inference.labels([draw(seed, *size)])
        assert labels.shape == size
    assert inference._score.at_once._cache_size() == 1
    # The first of two passes has nothing to add to.
    assert resized_tiles.add_probabilities._cache_size() - before == 1 + flip


def test_a_batch_of_several_sizes_is_predicted_like_single_images():
    inference = Inference(Blurred(3), Protocol(base_size=(256, 64), size_divisor=32, scales=(1.0, 1.5), flip=True))
    images = [draw(seed, *size) for seed, size in enumerate([(60, 90), (30, 42), (240, 340), (64, 91)])]
    together = inference.probabilities(images)
    for image, found in zip(images, together, strict=True):
        (expected,) = inference.probabilities([image])
        assert found.shape == (*image.shape[:2], 3)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
