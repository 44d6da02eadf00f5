"""Initial distributions of weights, each with the code base that it is taken from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

LINEAR_STD = 0.02


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, std: float) -> jax.Array:
    # One program for a shape: drawn op by op, the weights of a B0 take 79 compilations instead of 40.
    return std * jax.random.normal(key, shape, dtype)


def linear_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Normal of std 0.02: the official MiT's linear layers.

    Published is a truncated normal, but timm's and torch's cut lies at the absolute values -2 and 2, a hundred standard
    deviations out. jax's initializer of the same name cuts at two of them and loses 12% of the std.
    """
    return _normal(key, tuple(shape), dtype, LINEAR_STD)


def fan_out_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, *, groups: int = 1) -> jax.Array:
    """Normal of std sqrt(2 / fan_out), fan_out = kh * kw * out / groups: the official MiT's convolutions.

    A linear layer's (in, out) counts as a 1x1 convolution.
    """
    *window, _, out_channels = shape
    fan_out = math.prod(window) * out_channels // groups
    return _normal(key, tuple(shape), dtype, math.sqrt(2.0 / fan_out))


def classifier_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Normal of std 0.01: the classifier of mmsegmentation's decoders."""
    return _normal(key, tuple(shape), dtype, 0.01)


def joint_projection_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Xavier-uniform of torch.nn.MultiheadAttention's joint (3C, C) projection, for any part of it, (C, out)."""
    bound = math.sqrt(6 / (4 * shape[0]))
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def fan_in_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Uniform within ±1 / sqrt(fan_in): the default of torch.nn.Linear and Conv2d."""
    return fan_in_bias_init(key, shape, dtype, fan_in=math.prod(shape[:-1]))


def fan_in_bias_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, *, fan_in: int) -> jax.Array:
    """The same for their biases, whose fan_in is that of the kernel."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)
