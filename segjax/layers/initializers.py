"""Initial distributions of weights, each with the code base that it is taken from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

LINEAR_STD = 0.02


def _drawn(draw: Callable[[jax.Array, Sequence[int]], jax.Array], key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """draw(key, shape), from a program that is shared by all shapes of about this size.

    A program compiles in half a second, and SegFormer-B0 has weights of 40 shapes. With jax's default generator a
    longer array begins with the values of a shorter one.
    """
    size = math.prod(shape)
    partitionable: bool = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    is_default = partitionable and jax.random.key_impl(key) == "threefry2x32"
    if isinstance(key, Tracer) or not is_default:
        return draw(key, tuple(shape))
    longer = draw(key, (1 << max(size - 1, 1023).bit_length(),))
    return jnp.asarray(np.asarray(longer)[:size].reshape(shape))


@partial(jax.jit, static_argnums=(1, 2))
def _scaled_normal(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, std: float) -> jax.Array:
    return std * jax.random.normal(key, shape, dtype)


def _normal(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, std: float) -> jax.Array:
    return _drawn(lambda key, shape: _scaled_normal(key, shape, dtype, std), key, shape)


def _uniform(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, bound: float) -> jax.Array:
    return _drawn(lambda key, shape: jax.random.uniform(key, shape, dtype, -bound, bound), key, shape)


def linear_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Normal of std 0.02: the official MiT's linear layers.

    Published is a truncated normal, but timm's and torch's cut lies at the absolute values -2 and 2, a hundred standard
    deviations out. jax's initializer of the same name cuts at two of them and loses 12% of the std.
    """
    return _normal(key, shape, dtype, LINEAR_STD)


def fan_out_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, *, groups: int = 1) -> jax.Array:
    """Normal of std sqrt(2 / fan_out), fan_out = kh * kw * out / groups: the official MiT's convolutions.

    A linear layer's (in, out) counts as a 1x1 convolution.
    """
    *window, _, out_channels = shape
    fan_out = math.prod(window) * out_channels // groups
    return _normal(key, shape, dtype, math.sqrt(2.0 / fan_out))


def classifier_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Normal of std 0.01: the classifier of mmsegmentation's decoders."""
    return _normal(key, shape, dtype, 0.01)


def joint_projection_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Xavier-uniform of torch.nn.MultiheadAttention's joint (3C, C) projection, for any part of it, (C, out)."""
    bound = math.sqrt(6 / (4 * shape[0]))
    return _uniform(key, shape, dtype, bound)


def fan_in_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Uniform within ±1 / sqrt(fan_in): the default of torch.nn.Linear and Conv2d."""
    return fan_in_bias_init(key, shape, dtype, fan_in=math.prod(shape[:-1]))


def fan_in_bias_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, *, fan_in: int) -> jax.Array:
    """The same for their biases, whose fan_in is that of the kernel."""
    bound = 1 / math.sqrt(fan_in)
    return _uniform(key, shape, dtype, bound)
