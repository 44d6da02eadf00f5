"""A program in two parts equals the whole, and its first part computes everything that depends only on weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import layers
from segjax.inference.engine import Inference, Protocol
from segjax.models.functional import FunctionalModel
from segjax.models.prepared import Prepared
from tests.tiny import FAMILIES, tiny_model

QUICK = ("segformer", "hrnet", "segnext")
SIZES = [(64, 96, 3), (96, 64, 3)]
EVERY = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def normal(seed, *shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def forward(functional):
    return lambda arrays, images: functional.bind(*arrays)(images)[0]


@pytest.mark.parametrize("family", EVERY)
def test_every_family_computes_the_same_with_prepared_weights(family, float64):
    for seed in (0, 1):
        model = tiny_model(seed, family, dtype=jnp.float64)
        functional, images = FunctionalModel(model), normal(seed, 2, 64, 96, 3)
        arrays = functional.arrays()
        with layers.meant_for("plain"):
            expected = jax.jit(forward(functional))(arrays, images)
        with layers.meant_for("cuda"):
            parts = Prepared(forward(functional), arrays, images)
            found = jax.jit(parts.program)(jax.jit(parts.prepare)(arrays), images)
        assert float(jnp.abs(found - expected).max() / jnp.abs(expected).max()) < 1e-11


def test_the_first_part_computes_only_what_depends_on_the_weights(float64):
    table = np.arange(6.0)

    def function(weights, x, y):
        scale = jnp.exp(weights["scale"]).astype(jnp.float32)
        repeated = jnp.broadcast_to(weights["bias"] * 2, (50, 3))
        return {"sum": x * scale + repeated.sum() + y + table.sum(), "scale": scale, "unused": weights["unused"]}

    weights = {"scale": normal(0, 4), "bias": normal(1, 3), "unused": normal(2, 2), "never": normal(3, 5)}
    x, y = normal(4, 7, 4), normal(5, 7, 1)
    parts = Prepared(function, weights, x, y)
    prepared = parts.prepare(weights)
    # Neither the repeated bias nor the array that is never read.
    assert {array.shape for array in prepared} == {(2,), (3,), (4,), (1, 4)}
    # A second tree of weights is prepared anew.
    for values in (weights, jax.tree.map(lambda array: array + 1, weights)):
        found, expected = parts.program(parts.prepare(values), x, y), function(values, x, y)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype


def test_keys_are_equal_if_the_first_parts_are(float64):
    def twice(weights, x):
        return x @ (2 * weights)

    def thrice(weights, x):
        return x @ (3 * weights)

    keys = [Prepared(f, normal(0, 4, 5), normal(1, size, 4)).key for f in (twice, thrice) for size in (2, 3)]
    assert keys[0] == keys[1] != keys[2] == keys[3]


@pytest.mark.parametrize("family", [pytest.param("segformer", marks=pytest.mark.slow), "hrnet"])
def test_inference_on_a_gpu_prepares_weights_once_for_all_sizes(family, float64):
    model, other = (tiny_model(seed, family, dtype=jnp.float64) for seed in (2, 3))
    images = [np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8) for seed, size in enumerate(SIZES)]
    expected = [Inference(which).labels([image])[0] for which in (model, other) for image in images]
    with layers.meant_for("cuda"):
        inference = Inference(model)
        found = [inference.labels([image])[0] for image in images]
        assert len(inference._prepared) == 1
        changed = inference.with_arrays(FunctionalModel(other).arrays())
        found += [changed.labels([image])[0] for image in images]
        # The first one keeps its own weights.
        np.testing.assert_array_equal(inference.labels([images[0]])[0], found[0])
        # Probabilities of a sliding window, which is another program.
        slide = Protocol("slide", (32, 32), (20, 24))
        scores = Inference(model, slide, batch=3).probabilities(images[:1])[0]
    for one, another in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, another)
    np.testing.assert_allclose(scores, Inference(model, slide, batch=3).probabilities(images[:1])[0], atol=1e-9)


@pytest.mark.parametrize("stride, groups, use_bias", [(1, 1, True), (2, 1, False), (1, 4, True)])
def test_a_norm_is_folded_into_the_convolution_before_it(stride, groups, use_bias, float64):
    rngs = nnx.Rngs(0)
    kinds = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    conv = layers.Conv(8, 12, 3, stride=stride, padding=1, groups=groups, use_bias=use_bias, rngs=rngs, **kinds)
    norm = layers.BatchNorm(12, **kinds)
    for number, variable in enumerate((norm.scale, norm.bias, norm.mean, norm.var)):
        variable[...] = 0.5 + jnp.abs(normal(number, 12))
    if use_bias:
        conv.bias[...] = normal(9, 12)
    x = normal(10, 2, 9, 7, 8)
    expected = norm(conv(x))
    with layers.meant_for("cuda"):
        np.testing.assert_allclose(layers.conv_norm(conv, norm, x), expected, rtol=1e-12, atol=1e-12)
        assert "rsqrt" in str(jax.make_jaxpr(lambda x: layers.conv_norm(conv, norm, x))(x))
        # In training it is normalised by its own statistics.
        norm.use_running_average = False
        np.testing.assert_allclose(jnp.mean(layers.conv_norm(conv, norm, x), (0, 1, 2)), norm.bias[...], atol=1e-12)


@pytest.mark.parametrize("platform", ["plain", "cuda"])
def test_a_sequential_calls_each_of_its_layers_once(platform, float64):
    rngs = nnx.Rngs(1)
    kinds = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    parts = [layers.Conv(3, 4, 1, rngs=rngs, **kinds), layers.ReLU(), layers.Conv(4, 5, 3, rngs=rngs, **kinds)]
    parts += [layers.BatchNorm(5, **kinds), layers.Conv(5, 6, 1, rngs=rngs, **kinds)]
    parts[3].var[...] = jnp.full(5, 3.0)
    x = expected = normal(2, 2, 6, 5, 3)
    for part in parts:
        expected = part(expected)
    with layers.meant_for(platform):
        np.testing.assert_allclose(layers.Sequential(parts)(x), expected, rtol=1e-12, atol=1e-12)
