"""Compilation units remain separate in the optimised program; otherwise each reader would silently recompute them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import layers
from segjax.kernels import choice, convolution, cross_entropy, gelu
from segjax.kernels import decoder as kernels_decoder
from segjax.kernels import units as kernels_units
from segjax.kernels.feed_forward import feed_forward_by_rows
from segjax.kernels.units import compiled_apart
from segjax.layers import once


def calls(function, *arguments):
    """Names of the functions that the optimised program calls instead of holding them itself."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return [line.split("to_apply=")[1].split(",")[0] for line in text.splitlines() if " call(" in line]


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def read_twice(function):
    def run(*arguments):
        x = function(*arguments)
        return jnp.sin(x), jnp.cos(x[::-1])

    return run


def slopes(function, *, of):
    return jax.grad(lambda *arguments: jnp.sum(jnp.sin(function(*arguments))), argnums=of)


def test_a_separately_compiled_function_is_called_in_the_program():
    x = normal(5, 7, seed=0)

    def product(x):
        return x * jnp.tanh(x)

    # Otherwise XLA inlines it, which shows that the absence of a call means something.
    assert calls(read_twice(jax.jit(product)), x) == []
    (called,) = calls(read_twice(compiled_apart(product)), x)
    assert "product" in called
    np.testing.assert_allclose(compiled_apart(product)(x), product(x), rtol=1e-6)


def test_once_is_a_call_in_the_forward_and_the_backward_pass():
    x = normal(3, 4, seed=1)
    with choice.meant_for("cpu"):
        assert len(calls(read_twice(lambda x: once(x * x)), x)) == 1
        back = calls(slopes(lambda x: once(x * x) + x, of=0), x)
    assert len(back) == 2 and all("_unchanged" in name for name in back)
    with choice.published_implementations():
        assert calls(read_twice(lambda x: once(x * x)), x) == []


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 7)])
def test_depthwise_is_called_forward_and_for_both_gradients(kernel_size):
    x, kernel = normal(2, 6, 5, 4, seed=2), normal(*kernel_size, 1, 4, seed=3)
    called = calls(slopes(convolution.depthwise, of=(0, 1)), x, kernel)
    assert sum("_sum_of_shifted" in name for name in called) == 2
    assert sum("sums_of_products" in name for name in called) == 1


def test_gelu_is_a_call_where_it_is_read_several_times():
    called = calls(read_twice(gelu.gelu_by_slope), normal(3, 5, seed=4))
    assert ["gelu_unit" in name for name in called] == [True]


def test_a_row_tile_is_upsampled_once_and_its_gradient_reduced_once(monkeypatch):
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 1)
    labels, weights = np.zeros((2, 16, 12), np.uint8), normal(2, 16, 12, seed=5)
    called = calls(jax.value_and_grad(cross_entropy.cross_entropy), normal(2, 4, 3, 5, seed=6), labels, weights)
    for name in ("upsample", "_loss_and_slope", "reduce"):
        assert sum(name in one for one in called) == 1, (name, called)


def test_only_one_row_tile_is_upsampled_at_a_time(monkeypatch):
    logits, labels = normal(2, 32, 32, 40, seed=7), np.zeros((2, 128, 128), np.uint8)
    weights = np.ones(labels.shape, np.float32)
    whole = labels.size * 40 * 4
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", whole // 32)
    program = jax.jit(jax.value_and_grad(cross_entropy.cross_entropy)).lower(logits, labels, weights).compile()
    assert program.memory_analysis().temp_size_in_bytes < whole / 4


KINDS = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def feed_forward(*, pointwise=False, channels=4, hidden=64):
    """A feed-forward network as a function of x, and its arrays by name."""
    kinds = dict(**KINDS, rngs=nnx.Rngs(0))
    first, last = layers.Linear(channels, hidden, **kinds), layers.Linear(hidden, channels, **kinds)
    depthwise = layers.Conv(hidden, hidden, 3, padding=1, groups=hidden, **kinds)
    middle = layers.Conv(hidden, hidden, 1, **kinds) if pointwise else None
    named = dict(first=first, depthwise=depthwise, last=last) | (dict(pointwise=middle) if pointwise else {})
    arrays = {name: (layer.kernel[...], layer.bias[...]) for name, layer in named.items()}

    @layers.cpu_implementation(lambda x: layers.feed_forward(first, depthwise, last, x, pointwise=middle))
    def run(x):
        hidden = depthwise(first(x))
        return last(layers.gelu(middle(hidden) if pointwise else hidden))

    return run, arrays


# Units of a map in one piece, of a row tile, and of a forward pass with its backward pass.
UNITS = {
    "without pointwise": (
        ["_biased_and_padded", "_activated_taps"],
        ["_biased_and_padded_aside", "_activated_taps"],
        ["_biased_and_padded", "_biased_taps", "gelu_unit", "_padded_times_slope", "sums_of_products", "_taps"],
    ),
    "pointwise": (
        ["_biased_and_padded", "_biased_taps", "_activated"],
        ["_biased_and_padded_aside", "_biased_taps", "_activated"],
        ["_biased_and_padded", "_biased_taps", "gelu_unit", "times_slope", "_padded", "sums_of_products", "_taps"],
    ),
}


def units(function, *arguments):
    """Names of what the optimised program calls, without the numbers that XLA gives them."""
    return sorted(name.removeprefix("%").split(".")[0] for name in calls(function, *arguments))


@pytest.mark.parametrize("kind", UNITS)
def test_each_unit_of_a_feed_forward_network_is_called_once(kind, monkeypatch):
    run, arrays = feed_forward(pointwise=kind == "pointwise")
    x = normal(2, 8, 5, 4, seed=8)
    in_one, in_tiles, with_gradient = UNITS[kind]
    with choice.meant_for("cpu"):
        assert units(run, x) == sorted(in_one)
        monkeypatch.setattr(kernels_units, "TILE_BYTES", 2**12)
        # Anew, since what was traced holds the row tiles of that time.
        assert units(lambda x: run(x), x) == sorted(in_tiles)
        assert units(slopes(feed_forward_by_rows, of=(0, 1)), arrays, x) == sorted(with_gradient)


def temporaries(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_a_feed_forward_network_stores_one_row_tile_of_its_widest_map(monkeypatch):
    run, _ = feed_forward()
    x = normal(2, 64, 16, 4, seed=9)
    widest = 16 * x.nbytes
    with choice.published_implementations():
        assert temporaries(lambda x: run(x), x) >= widest
    monkeypatch.setattr(kernels_units, "TILE_BYTES", widest // 32)
    with choice.meant_for("cpu"):
        assert temporaries(run, x) < widest / 3


def test_a_decoder_stores_one_row_tile_of_its_upsampled_levels(monkeypatch):
    sizes = [(128, 16), (32, 4), (16, 2)]
    levels = [normal(2, *size, 4, seed=10 + index) for index, size in enumerate(sizes)]
    kinds = dict(**KINDS, rngs=nnx.Rngs(0))
    fuse, classifier = layers.Conv(12, 64, 1, **kinds), layers.Conv(64, 3, 1, **kinds)

    @layers.cpu_implementation(lambda *levels: layers.decode(levels, fuse, jax.nn.relu, classifier))
    def run(*levels):
        fused = layers.conv1x1_of_resized(fuse, levels, lambda x: layers.resize(x, sizes[0]))
        return layers.classify(classifier, jax.nn.relu(fused))

    upsampled = 2 * 128 * 16 * 64 * 4
    monkeypatch.setattr(kernels_units, "TILE_BYTES", upsampled // 16)
    with choice.meant_for("cpu"):
        assert temporaries(run, *levels) < upsampled / 2
        # One for each level, and one that sums them.
        names = [re.sub(r"_\d+$", "", name) for name in units(lambda *levels: run(*levels), *levels)]
        assert names == ["finished", "upsampled", "upsampled"]
        monkeypatch.setattr(kernels_decoder, "are_multiples", lambda shapes: False)
        assert temporaries(lambda *levels: run(*levels), *levels) >= upsampled
