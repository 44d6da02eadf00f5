"""jit traces again for another choice of implementation, and layers call the lax functions that libraries intercept."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import segjax
from segjax import layers
from segjax.kernels import choice
from tests.tiny import tiny_model


@pytest.mark.parametrize("context", [choice.published_implementations, lambda: choice.meant_for("cuda")])
@pytest.mark.parametrize("family", ["segformer", "hrnet"])
def test_a_compiled_model_is_traced_again_in_another_context(family, context):
    graph, state = nnx.split(tiny_model(0, family))
    traces = []

    @jax.jit
    def run(state, x):
        traces.append(layers.is_fast_on_cpu())
        return nnx.merge(graph, state)(x)[0]

    x = jax.ShapeDtypeStruct((2, 32, 64, 3), jnp.float32)
    with choice.meant_for("cpu"):
        fast = run.lower(state, x).as_text()
        with context():
            other = run.lower(state, x).as_text()
        again = run.lower(state, x).as_text()
    assert traces == [True, False]
    assert fast == again and fast != other


def test_a_context_ends_with_its_block_even_after_an_error():
    with pytest.raises(ZeroDivisionError), choice.meant_for("cuda"):
        assert not choice.is_fast_on_cpu()
        raise ZeroDivisionError
    with choice.meant_for("cpu"):
        assert choice.is_fast_on_cpu()
        with choice.published_implementations(), choice.meant_for("cpu"):
            assert not choice.is_fast_on_cpu() and choice.is_published()
        assert choice.is_fast_on_cpu() and not choice.is_published()


def test_fast_implementations_are_not_used_on_meshes_with_explicit_axes():
    with choice.meant_for("cpu"), jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert not choice.is_fast_on_cpu()


def test_an_attached_implementation_runs_on_a_cpu_unless_it_declines():
    @layers.cpu_implementation(lambda x, y: NotImplemented if y else x * 2)
    def double(x, y):
        return x + x + 1

    with choice.meant_for("cpu"):
        assert (double(3, 0), double(3, 1)) == (6, 7)
    with choice.meant_for("cuda"):
        assert double(3, 0) == 7
    with choice.published_implementations():
        assert double(3, 0) == 7


def test_a_cheaper_order_runs_everywhere_except_as_published():
    @layers.cheaper_order(lambda x: -x)
    def negated(x):
        return 0 - x

    with choice.meant_for("cuda"):
        assert str(negated(0.0)) == "-0.0"
    with choice.published_implementations():
        assert str(negated(0.0)) == "0.0"


def test_a_linear_layer_calls_lax_dot_general_once_with_its_kernel(monkeypatch):
    layer = layers.Linear(3, 5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 4, 7, 3)).astype(np.float32)
    seen, product = [], lax.dot_general
    monkeypatch.setattr(
        lax, "dot_general", lambda lhs, rhs, *rest, **more: seen.append(rhs) or product(lhs, rhs, *rest, **more)
    )
    y = layer(x)
    assert len(seen) == 1 and np.array_equal(seen[0], layer.kernel[...])
    np.testing.assert_allclose(y, x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("context", "found"),
    [
        (choice.published_implementations, 44),
        (lambda: choice.meant_for("cuda"), 40),
        (lambda: choice.meant_for("cpu"), 24),
    ],
    ids=["as published", "cuda", "cpu"],
)
def test_published_linear_layers_all_call_dot_general(context, found, monkeypatch):
    model = nnx.eval_shape(lambda: segjax.create("segformer_b0", num_classes=5))
    assert sum(isinstance(module, layers.Linear) for _, module in nnx.iter_modules(model)) == 44
    calls, product = [], lax.dot_general

    def counted(*arguments, **settings):
        calls.append(sys._getframe(1).f_code.co_qualname)
        return product(*arguments, **settings)

    monkeypatch.setattr(lax, "dot_general", counted)
    with context():
        nnx.eval_shape(lambda model, images: model(images), model, jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32))
    assert calls.count("Linear.__call__") == found
