"""Layer and batch normalisation in one pass over their input, with custom backward passes, for GPUs.

The backward pass keeps the input in its own dtype, and the mean and reciprocal deviation of each row or channel. The
statistics are computed from differences to a value near the mean: squares of the input itself would lose the digits of
a map whose mean is large.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: jnp.dtype) -> jax.Array:
    """`layers.LayerNorm` over the last axis: (..., C), (C,), (C,) -> (..., C) of `dtype`."""
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    wide = _wide(x, dtype)
    shift = wide[..., :1]
    first = jnp.mean(wide - shift, axis=-1, keepdims=True)
    second = jnp.mean(jnp.square(wide - shift), axis=-1, keepdims=True)
    mean, factor = shift + first, lax.rsqrt(jnp.maximum(second - jnp.square(first), 0) + epsilon)
    normed = (wide - mean) * factor
    return (normed * scale.astype(wide.dtype) + bias.astype(wide.dtype)).astype(dtype), (x, scale, bias, mean, factor)


def _layer_norm_backward(epsilon, dtype, kept, gradient):
    x, scale, bias, mean, factor = kept
    wide = _wide(x, dtype)
    normed, gradient = (wide - mean) * factor, gradient.astype(wide.dtype)
    of_normed = gradient * scale.astype(wide.dtype)
    average = jnp.mean(of_normed, axis=-1, keepdims=True)
    along = jnp.mean(of_normed * normed, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    of_scale, of_bias = jnp.sum(gradient * normed, axis=rows), jnp.sum(gradient, axis=rows)
    of_x = factor * (of_normed - average - normed * along)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _wide(x, dtype):
    return x.astype(precision.at_least_float32(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    near: jax.Array,
    epsilon: float,
    dtype: jnp.dtype,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`layers.BatchNorm` in training, over (B, H, W).

    Several devices exchange one sum in each pass: two sums are combined into one complex number.

    Args:
      x: (B, H, W, C).
      scale: (C,).
      bias: (C,).
      near: Values near the means, (C,), equal on every device; they receive no gradient.
      epsilon: Term added to the variance.
      dtype: Dtype of the output.
      axis_name: Mapped axis of devices, or None.

    Returns:
      The normalised map of `dtype`, then mean and biased variance of the whole batch, (C,) in at least float32, through
      which no gradient flows.
    """
    return _batch_norm_forward(x, scale, bias, near, epsilon, dtype, axis_name)[0]


def _batch_norm_forward(x, scale, bias, near, epsilon, dtype, axis_name):
    wide = _wide(x, dtype)
    near = near.astype(wide.dtype)
    first, second = _means(wide - near, jnp.square(wide - near), axis_name)
    mean, variance = near + first, jnp.maximum(second - jnp.square(first), 0)
    factor = lax.rsqrt(variance + epsilon)
    normed = (wide - mean) * (factor * scale.astype(wide.dtype)) + bias.astype(wide.dtype)
    return (normed.astype(dtype), mean, variance), (x, scale, bias, near, mean, factor)


def _batch_norm_backward(epsilon, dtype, axis_name, kept, gradients):
    x, scale, bias, near, mean, factor = kept
    wide, gradient = _wide(x, dtype), gradients[0].astype(mean.dtype)
    normed = (wide - mean) * factor
    count = x.size // x.shape[-1]
    # This device's sums are its gradients of bias and scale; the training step adds them up over devices.
    of_bias, of_scale = _sums(gradient, gradient * normed)
    average, along = of_bias / count, of_scale / count
    if axis_name is not None:
        both = lax.pmean(lax.complex(average, along), axis_name)
        average, along = both.real, both.imag
    of_x = (factor * scale.astype(wide.dtype)) * (gradient - average - normed * along)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype), jnp.zeros_like(near)


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _sums(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over (B, H, W), as a single reduction: under a mesh, each reduction is an exchange between all devices."""
    both = jnp.sum(lax.complex(one, other), axis=(0, 1, 2))
    return both.real, both.imag


def _means(one: jax.Array, other: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    both = jnp.mean(lax.complex(one, other), axis=(0, 1, 2))
    if axis_name is not None:
        both = lax.pmean(both, axis_name)
    return both.real, both.imag
