"""Initial distributions of weights, each named with the code base that it comes from."""

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
    """Returns draw(key, shape), computed by one compiled program for all shapes of similar size.

    A program takes half a second to compile, and the weights of SegFormer-B0 have 40 shapes. With jax's default
    generator a longer array begins with the values of a shorter one.
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
    """Draw a linear layer's kernel as the official MiT does: normal with std 0.02.

    The publication has a truncated normal, but timm and torch truncate at the absolute values -2 and 2, a hundred
    standard deviations out. jax's initializer of that name truncates at two standard deviations and loses 12% of the
    std.

    Args:
      key: Random key.
      shape: Shape of the kernel.
      dtype: Floating type of the kernel.

    Returns:
      Array of `shape` and `dtype`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> round(float(layers.linear_init(jax.random.key(0), (64, 64), jnp.float32).std()), 3)
      0.02
    """
    return _normal(key, shape, dtype, LINEAR_STD)


def fan_out_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, *, groups: int = 1) -> jax.Array:
    """Draw a convolution's kernel as the official MiT does: normal with std sqrt(2 / fan_out).

    Args:
      key: Random key.
      shape: Shape of the kernel: (kh, kw, in, out), or (in, out) for a linear layer, taken as a 1x1 convolution.
      dtype: Floating type of the kernel.
      groups: Groups of the convolution: fan_out = kh * kw * out / groups.

    Returns:
      Array of `shape` and `dtype`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> round(float(layers.fan_out_init(jax.random.key(0), (1, 1, 64, 50), jnp.float32).std()), 1)
      0.2
    """
    *window, _, out_channels = shape
    fan_out = math.prod(window) * out_channels // groups
    return _normal(key, shape, dtype, math.sqrt(2.0 / fan_out))


def classifier_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Draw a classifier's kernel as mmsegmentation's decoders do: normal with std 0.01.

    Args:
      key: Random key.
      shape: Shape of the kernel.
      dtype: Floating type of the kernel.

    Returns:
      Array of `shape` and `dtype`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> round(float(layers.classifier_init(jax.random.key(0), (64, 64), jnp.float32).std()), 3)
      0.01
    """
    return _normal(key, shape, dtype, 0.01)


def joint_projection_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Draw a part of the joint (3C, C) projection of torch.nn.MultiheadAttention: Xavier-uniform over the whole.

    Args:
      key: Random key.
      shape: Shape of the part, (C, out).
      dtype: Floating type of the kernel.

    Returns:
      Array of `shape` and `dtype`, within ±sqrt(6 / (4 C)).

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> bool(abs(layers.joint_projection_init(jax.random.key(0), (6, 12), jnp.float32)).max() <= 0.5)
      True
    """
    bound = math.sqrt(6 / (4 * shape[0]))
    return _uniform(key, shape, dtype, bound)


def fan_in_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """Draw a kernel as torch.nn.Linear and Conv2d do by default: uniform within ±1 / sqrt(fan_in).

    Args:
      key: Random key.
      shape: Shape of the kernel, (..., out); fan_in is the product of the other sides.
      dtype: Floating type of the kernel.

    Returns:
      Array of `shape` and `dtype`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> bool(abs(layers.fan_in_init(jax.random.key(0), (16, 8), jnp.float32)).max() <= 0.25)
      True
    """
    return fan_in_bias_init(key, shape, dtype, fan_in=math.prod(shape[:-1]))


def fan_in_bias_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, *, fan_in: int) -> jax.Array:
    """Draw a bias as torch.nn.Linear and Conv2d do by default: uniform within ±1 / sqrt(fan_in) of the kernel.

    Args:
      key: Random key.
      shape: Shape of the bias, (out,).
      dtype: Floating type of the bias.
      fan_in: Number of inputs of an output: the product of the kernel's sides except the last.

    Returns:
      Array of `shape` and `dtype`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> bool(abs(layers.fan_in_bias_init(jax.random.key(0), (8,), jnp.float32, fan_in=16)).max() <= 0.25)
      True
    """
    bound = 1 / math.sqrt(fan_in)
    return _uniform(key, shape, dtype, bound)
