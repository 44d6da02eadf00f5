"""Normalisation in one pass with custom backward passes, against the layers' plain equations and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from segjax import layers
from segjax.kernels import choice

C = 6


def layer_norm(dtype):
    return layers.LayerNorm(C, epsilon=1e-6, dtype=dtype, param_dtype=dtype)


def batch_norm(dtype):
    layer = layers.BatchNorm(C, dtype=dtype, param_dtype=dtype)
    layer.use_running_average = False
    layer.mean[...] = jnp.linspace(-1, 3, C, dtype=dtype)
    return layer


def called(make, platform, x, gradient, scale, bias, *, axis_name=None, jit=lambda f: f):
    """-> output, gradients of x, scale and bias, and for BatchNorm the running statistics."""

    def of(x, scale, bias):
        layer = make(x.dtype)
        layer.scale[...], layer.bias[...] = scale, bias
        if make is batch_norm:
            layer.axis_name = axis_name
        return layer(x), [layer.mean[...], layer.var[...]] if make is batch_norm else []

    def both(x, gradient, scale, bias):
        output, back, moved = jax.vjp(of, x, scale, bias, has_aux=True)
        return [output, *back(gradient), *moved]

    with choice.meant_for(platform):
        return jit(both)(x, gradient, scale, bias)


def made(seed, *, mean=3.0, dtype=np.float64, shape=(4, 3, 5, C)):
    rng = np.random.default_rng(seed)
    x, gradient = mean + rng.standard_normal(shape), rng.standard_normal(shape)
    return [array.astype(dtype) for array in (x, gradient, *rng.standard_normal((2, C)))]


@pytest.mark.parametrize("make", [layer_norm, batch_norm])
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_gradients_and_statistics_equal_those_of_the_plain_layer(make, seed, float64):
    given = made(seed)
    for found, expected in zip(called(make, "cuda", *given), called(make, "cpu", *given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make, mean", [(layer_norm, 1e4), (batch_norm, 100)])
def test_float32_stays_accurate_where_the_mean_is_large(make, mean):
    x, gradient, scale, bias = made(0, mean=mean, dtype=np.float32, shape=(4, 9, 7, C))
    found = called(make, "cuda", x, gradient, scale, bias)[0]
    axes = -1 if make is layer_norm else (0, 1, 2)
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(axis=axes, keepdims=True) + (1e-6 if make is layer_norm else 1e-5))
    expected = (wide - wide.mean(axis=axes, keepdims=True)) / deviation * scale + bias
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)


def test_a_constant_channel_gives_its_bias():
    x, gradient, scale, bias = made(0, dtype=np.float32)
    x[..., 2] = 5.0
    found = called(batch_norm, "cuda", x, gradient, scale, bias)
    np.testing.assert_allclose(found[0][..., 2], bias[2], atol=1e-3)
    assert all(np.isfinite(array).all() for array in found)


@pytest.mark.parametrize("seed", [0, 1])
def test_batch_norm_of_a_mapped_batch_equals_that_of_the_whole_batch(seed, float64):
    x, gradient, scale, bias = made(seed)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def mapped(both):
        def on_one(*given):
            output, of_x, of_scale, of_bias, *moved = both(*given)
            return output, of_x, jax.lax.psum((of_scale, of_bias), "data"), moved

        specs = dict(mesh=mesh, in_specs=(split, split, whole, whole), out_specs=(split, split, whole, whole))
        return jax.jit(jax.shard_map(on_one, **specs, check_vma=False))

    found = jax.tree.leaves(called(batch_norm, "cuda", x, gradient, scale, bias, axis_name="data", jit=mapped))
    for one, other in zip(found, called(batch_norm, "cpu", x, gradient, scale, bias), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_batch_norm_communicates_once_in_each_direction(kind):
    """All sums over devices of a compiled forward and backward pass, beside those of the gradients."""
    x, gradient, scale, bias = made(0, dtype=np.float32)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = (jax.sharding.NamedSharding(mesh, PartitionSpec(*name)) for name in (["data"], []))
    texts = []

    def compiled(both):
        if kind == "pmap":
            specs = dict(in_specs=(split.spec, split.spec, whole.spec, whole.spec), out_specs=split.spec)
            both = jax.shard_map(both, mesh=mesh, **specs, check_vma=False)
        program = jax.jit(both, in_shardings=(split, split, whole, whole))
        texts.append(program.lower(x, gradient, scale, bias).compile().as_text())
        return program

    called(batch_norm, "cuda", x, gradient, scale, bias, axis_name="data" * (kind == "pmap") or None, jit=compiled)
    assert texts[0].count(" all-reduce(") == 2
