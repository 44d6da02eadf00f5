"""What is compiled apart stays apart in the optimised program: else all its readers compute it anew, and silently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import banded_loss
from segjax.models import layers


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


def test_what_is_compiled_apart_is_called_in_the_optimised_program():
    x = normal(5, 7, seed=0)

    def product(x):
        return x * jnp.tanh(x)

    # Without being told XLA puts it in its place, by which the name of a call is known to mean something.
    assert calls(read_twice(jax.jit(product)), x) == []
    (called,) = calls(read_twice(layers.compiled_apart(product)), x)
    assert "product" in called
    np.testing.assert_allclose(layers.compiled_apart(product)(x), product(x), rtol=1e-6)


def test_once_is_a_call_on_the_way_there_and_on_the_way_back():
    x = normal(3, 4, seed=1)
    with layers.meant_for("cpu"):
        assert len(calls(read_twice(lambda x: layers.once(x * x)), x)) == 1
        back = calls(slopes(lambda x: layers.once(x * x) + x, of=0), x)
    assert len(back) == 2 and all("_unchanged" in name for name in back)
    with layers.published_forms():
        assert calls(read_twice(lambda x: layers.once(x * x)), x) == []


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 7)])
def test_depthwise_is_called_forward_and_for_both_gradients(kernel_size):
    x, kernel = normal(2, 6, 5, 4, seed=2), normal(*kernel_size, 1, 4, seed=3)
    called = calls(slopes(layers.depthwise, of=(0, 1)), x, kernel)
    assert sum("_sum_of_shifted" in name for name in called) == 2
    assert sum("sums_of_products" in name for name in called) == 1


def test_gelu_is_called_where_it_has_several_readers():
    called = calls(read_twice(layers.gelu_by_slope), normal(3, 5, seed=4))
    assert ["gelu_unit" in name for name in called] == [True]


def test_a_band_is_enlarged_once_and_its_slope_reduced_once(monkeypatch):
    monkeypatch.setattr(banded_loss, "BAND", 1)
    labels, weights = np.zeros((2, 16, 12), np.uint8), normal(2, 16, 12, seed=5)
    called = calls(jax.value_and_grad(banded_loss.cross_entropy), normal(2, 4, 3, 5, seed=6), labels, weights)
    for name in ("enlarge", "_loss_and_slope", "reduce"):
        assert sum(name in one for one in called) == 1, (name, called)


def test_a_band_is_all_that_is_ever_enlarged(monkeypatch):
    logits, labels = normal(2, 32, 32, 40, seed=7), np.zeros((2, 128, 128), np.uint8)
    weights = np.ones(labels.shape, np.float32)
    whole = labels.size * 40 * 4
    monkeypatch.setattr(banded_loss, "BAND", whole // 32)
    program = jax.jit(jax.value_and_grad(banded_loss.cross_entropy)).lower(logits, labels, weights).compile()
    assert program.memory_analysis().temp_size_in_bytes < whole / 4
