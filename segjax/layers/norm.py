"""Layer, batch and group normalisation."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from segjax.kernels import choice, norm, precision
from segjax.layers import functional
from segjax.layers.linear import Conv

# ------------------------------------------------------------------------------------------------------------- norms


class LayerNorm(nnx.Module):
    """torch.nn.LayerNorm over the last axis, two-pass, in at least float32.

    The variance is the mean of squared deviations: the one-pass formula E[x²] - E[x]² loses all digits of a map whose
    mean is large (3e-3 at mean 100) and can turn negative.
    """

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        if choice.is_fast_on_gpu():
            return norm.layer_norm(x, self.scale[...], self.bias[...], self.epsilon, self.dtype)
        wide = x.astype(precision.at_least_float32(self.dtype))
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normed = centered * lax.rsqrt(variance + self.epsilon)
        return functional.once(
            (normed * self.scale[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)).astype(self.dtype)
        )


class BatchNorm(nnx.Module):
    """torch.nn.BatchNorm2d over (B, H, W), two-pass, in at least float32, across devices.

    In training it normalises with the biased variance of the whole batch and moves the running variance by the
    unbiased one, as torch does (flax's own layer stores the biased one). Under `pmap` the layer must know the mapped
    axis: `model.set_attributes(axis_name="data")`; under `jit` over a mesh the statistics are global by themselves.

    Attributes:
      momentum: weight of the new observation, torch's convention (0.1), not flax's (0.9).
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        momentum: float = 0.1,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
    ):
        self.epsilon = epsilon
        self.momentum = momentum
        self.dtype = dtype
        self.use_running_average = True
        self.axis_name: str | None = None
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros((features,), param_dtype))
        self.var = nnx.BatchStat(jnp.ones((features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        if choice.is_fast_on_gpu() and not self.use_running_average:
            arrays = self.scale[...], self.bias[...], lax.stop_gradient(self.mean[...])
            found = norm.batch_norm(x, *arrays, self.epsilon, self.dtype, self.axis_name)
            normed, mean, variance = cast(tuple[jax.Array, jax.Array, jax.Array], found)
            self._move(mean, variance, self._count(x))
            return normed
        wide = x.astype(precision.at_least_float32(self.dtype))
        if self.use_running_average:
            mean, variance = self.mean[...].astype(wide.dtype), self.var[...].astype(wide.dtype)
        else:
            mean, variance = self._observe(wide)
        factor = lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(wide.dtype)
        return ((wide - mean) * factor + self.bias[...].astype(wide.dtype)).astype(self.dtype)

    def _observe(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance of the whole batch, (C,) each; moves the running ones."""
        count = self._count(x)
        mean = self._across_devices(jnp.mean(x, axis=(0, 1, 2)))
        variance = self._across_devices(jnp.mean(jnp.square(x - mean), axis=(0, 1, 2)))
        self._move(mean, variance, count)
        return mean, variance

    def _count(self, x: jax.Array) -> int:
        """Number of values of a channel in the whole batch."""
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        count = x.size // x.shape[-1] * devices
        if count < 2:
            raise ValueError(
                f"BatchNorm in training needs more than one value per channel but got a map of shape {x.shape}; "
                "use a larger batch or image, or model.eval()"
            )
        return count

    def _move(self, mean: jax.Array, variance: jax.Array, count: int) -> None:
        self.mean[...] = _move(self.mean[...], mean, self.momentum)
        self.var[...] = _move(self.var[...], variance * (count / (count - 1)), self.momentum)

    def _across_devices(self, x: jax.Array) -> jax.Array:
        return x if self.axis_name is None else lax.pmean(x, self.axis_name)


def conv_norm(conv: Conv, norm: BatchNorm, x: jax.Array) -> jax.Array:
    """`norm(conv(x))`. On a GPU a norm that uses its running statistics is folded into the weights of the convolution.

    cuDNN then computes convolution, bias, addition of a shortcut and ReLU in one kernel. The weights are rounded to
    `conv.dtype` after the fold instead of before it. `segjax.models.prepared` computes them once instead of at every
    call.

    Args:
      x: (B, H, W, in). norm: Over the output channels of `conv`.

    Returns:
      (B, H', W', out) in the dtype of the norm.
    """
    if not (norm.use_running_average and choice.is_fast_on_gpu()):
        return norm(conv(x))
    wide = precision.at_least_float32(norm.dtype)
    factor = lax.rsqrt(norm.var[...].astype(wide) + norm.epsilon) * norm.scale[...].astype(wide)
    start = -norm.mean[...].astype(wide) if conv.bias is None else conv.bias[...].astype(wide) - norm.mean[...]
    bias = norm.bias[...].astype(wide) + start * factor
    kernel = (conv.kernel[...].astype(wide) * factor).astype(conv.dtype)
    y = functional.conv(x.astype(conv.dtype), kernel, stride=conv.stride, padding=conv.padding, groups=conv.groups)
    return (y + bias.astype(conv.dtype)).astype(norm.dtype)


class GroupNorm(nnx.Module):
    """torch.nn.GroupNorm over (H, W) and the channels of a group, two-pass, in at least float32."""

    def __init__(self, groups: int, features: int, *, epsilon: float, dtype: jnp.dtype, param_dtype: jnp.dtype):
        if features % groups:
            raise ValueError(f"{features} channels do not divide into {groups} groups")
        self.groups = groups
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        wide = x.astype(precision.at_least_float32(self.dtype)).reshape(B, H, W, self.groups, C // self.groups)
        centered = wide - jnp.mean(wide, axis=(1, 2, 4), keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=(1, 2, 4), keepdims=True)
        normed = (centered * lax.rsqrt(variance + self.epsilon)).reshape(B, H, W, C)
        return (normed * self.scale[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)).astype(self.dtype)


def _move(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    return ((1 - momentum) * old.astype(new.dtype) + momentum * lax.stop_gradient(new)).astype(old.dtype)
