"""Initial weights drawn by shared programs equal those of a separate program per shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from segjax import layers
from segjax.layers import initializers

DRAWS = {
    "normal": lambda key, shape, dtype: initializers.linear_init(key, shape, dtype) / 0.02,
    "uniform": lambda key, shape, dtype: initializers.fan_in_bias_init(key, shape, dtype, fan_in=1),
}
PLAIN = {
    "normal": jax.random.normal,
    "uniform": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1.0, 1.0),
}


@pytest.mark.parametrize("shape", [(1,), (7, 1, 3), (31, 33), (1024,), (5, 205), (3, 3, 37, 41)])
@pytest.mark.parametrize("kind", DRAWS)
def test_a_longer_draw_begins_with_the_values_of_a_shorter_one(kind, shape):
    for seed in (0, 1):
        key = jax.random.key(seed)
        drawn = DRAWS[kind](key, shape, jnp.float32)
        assert drawn.shape == shape and drawn.dtype == jnp.float32
        np.testing.assert_allclose(drawn, PLAIN[kind](key, shape, jnp.float32), rtol=5e-7, atol=0)
        # The same under a trace, where each shape is drawn by itself.
        np.testing.assert_allclose(
            drawn, jax.jit(DRAWS[kind], static_argnums=(1, 2))(key, shape, jnp.float32), rtol=5e-7
        )


@pytest.mark.parametrize("kind", DRAWS)
def test_another_generator_draws_other_values(kind):
    key = jax.random.key(3, impl="rbg")
    shape = (9, 11)
    np.testing.assert_allclose(DRAWS[kind](key, shape, jnp.float32), PLAIN[kind](key, shape, jnp.float32), rtol=5e-7)


def test_weights_of_one_size_share_a_program():
    programs = initializers._scaled_normal
    jax.clear_caches()
    for shape in ((3, 7), (1000,), (2, 4, 8, 16), (1024,)):
        initializers.linear_init(jax.random.key(0), shape, jnp.float32)
    assert programs._cache_size() == 1


@pytest.mark.parametrize("seed", [0, 5])
def test_a_stream_gives_the_keys_of_flax(seed):
    ours, theirs = (kind(jax.random.key(seed), tag="params") for kind in (layers.RandomStream, nnx.RngStream))
    for _ in range(2):
        np.testing.assert_array_equal(jax.random.key_data(ours()), jax.random.key_data(theirs()))
        np.testing.assert_array_equal(jax.random.key_data(ours.fork()()), jax.random.key_data(theirs.fork()()))
    assert int(ours.count[...]) == int(theirs.count[...]) == 4

    def from_outside():
        return jax.random.key_data(ours())

    with pytest.raises(errors.TraceContextError):
        jax.jit(from_outside)()
