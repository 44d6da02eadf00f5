"""Products with matrices of weights: as matmul, and their gradients without transposed copies on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import layers


@pytest.mark.parametrize("seed, shape", [(0, (2, 6, 10, 7)), (1, (3, 11, 5)), (2, (4, 3))])
def test_products_by_rows_are_those_of_matmul(seed, shape, float64):
    rng = np.random.default_rng(seed)
    x, kernel = jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=(shape[-1], 9)))
    weights = jnp.asarray(rng.normal(size=(*shape[:-1], 9)))

    def outputs(platform):
        with layers.meant_for(platform):
            return jax.value_and_grad(lambda *both: jnp.vdot(weights, layers.product(*both)), (0, 1))(x, kernel)

    for found, expected in zip(*map(jax.tree.leaves, map(outputs, ("cpu", "plain"))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["Linear", "Conv"])
def test_no_gradient_of_a_product_is_copied_transposed_on_a_cpu(kind):
    shape, kinds = (2, 24, 40, 16), dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = layers.Linear(16, 48, **kinds) if kind == "Linear" else layers.Conv(16, 48, 1, **kinds)
    graph, params = nnx.split(layer)

    def transposed_copies(platform):
        @jax.jit
        def gradient(params, x):
            return jax.grad(lambda params, x: jnp.tanh(nnx.merge(graph, params)(x)).sum(), (0, 1))(params, x)

        with layers.meant_for(platform):
            text = gradient.lower(params, jnp.ones(shape)).compile().as_text()
        return re.findall(r"f32\[48,(?:1920|2,24,40)\]\S* (?:copy|transpose|fusion)\(", text)

    assert transposed_copies("plain") and not transposed_copies("cpu")
