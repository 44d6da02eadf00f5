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
    """Layer normalisation over the last axis, equal to torch.nn.LayerNorm: (..., C) -> (..., C).

    It is computed in at least float32. The plain implementation makes two passes: its variance is the mean of the
    squared deviations. The one-pass formula E[x²] - E[x]² loses the digits of a map whose mean is large (error 3e-3 at
    mean 100) and can turn negative.

    Args:
      features: Number of channels C.
      epsilon: Term added to the variance.
      dtype: Dtype of the output.
      param_dtype: Dtype of the parameters `scale` and `bias`, (C,) each.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> norm = layers.LayerNorm(2, epsilon=1e-6, dtype=jnp.float32, param_dtype=jnp.float32)
      >>> norm(jnp.array([[1.0, 3.0]])).round(3).tolist()
      [[-1.0, 1.0]]
    """

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Without gradients, XLA:GPU computes the formula below in a single kernel.
        if choice.is_fast_on_gpu() and not choice.are_weights_prepared():
            return norm.layer_norm(x, self.scale[...], self.bias[...], self.epsilon, self.dtype)
        wide = x.astype(precision.at_least_float32(self.dtype))
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normed = centered * lax.rsqrt(variance + self.epsilon)
        return functional.once(
            (normed * self.scale[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)).astype(self.dtype)
        )


class BatchNorm(nnx.Module):
    """Batch normalisation over (B, H, W), equal to torch.nn.BatchNorm2d: (B, H, W, C) -> (B, H, W, C).

    It is computed in at least float32, in two passes in the plain implementation. In training it normalises with the
    biased variance of the whole batch and updates the running variance with the unbiased one, as torch does (flax's
    own layer stores the biased one). Under `pmap` the layer needs the name of the mapped axis,
    `model.set_attributes(axis_name="data")`; under `jit` over a mesh the statistics are those of the global batch
    without it.

    Args:
      features: Number of channels C.
      epsilon: Term added to the variance.
      momentum: Weight of the new observation: torch's convention (0.1), not flax's (0.9).
      dtype: Dtype of the output.
      param_dtype: Dtype of `scale`, `bias` and the running statistics `mean` and `var`, (C,) each.

    Raises:
      ValueError: A training batch has only one value per channel, when the layer is called.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> norm = layers.BatchNorm(1, dtype=jnp.float32, param_dtype=jnp.float32)
      >>> norm.train()
      >>> norm(jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)).ravel().round(3).tolist()
      [-1.0, 1.0]
      >>> print(norm.mean[...], norm.var[...])
      [0.2] [1.1]
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
        """Returns mean and biased variance of the whole batch, (C,) each, and updates the running statistics."""
        count = self._count(x)
        mean = self._across_devices(jnp.mean(x, axis=(0, 1, 2)))
        variance = self._across_devices(jnp.mean(jnp.square(x - mean), axis=(0, 1, 2)))
        self._move(mean, variance, count)
        return mean, variance

    def _count(self, x: jax.Array) -> int:
        """Number of values per channel in the whole batch."""
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
    """Compute `norm(conv(x))`, on a GPU with the norm folded into the convolution if it uses running statistics.

    cuDNN then computes convolution, bias, shortcut and ReLU in one kernel. The folded weights are rounded to
    `conv.dtype` after the fold instead of before it; `segjax.models.prepared` computes them once, not in every call.

    Args:
      conv: Convolution with `out` output channels.
      norm: Norm over `out` channels.
      x: (B, H, W, in).

    Returns:
      (B, H', W', out) in the dtype of the norm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> kinds = dict(dtype=jnp.float32, param_dtype=jnp.float32)
      >>> conv = layers.Conv(3, 8, 3, padding=1, rngs=nnx.Rngs(0), **kinds)
      >>> layers.conv_norm(conv, layers.BatchNorm(8, **kinds), jnp.ones((2, 6, 4, 3))).shape
      (2, 6, 4, 8)
    """
    if not (norm.use_running_average and choice.is_fast_on_gpu()):
        return norm(conv(x))
    wide = precision.at_least_float32(norm.dtype)
    factor = lax.rsqrt(norm.var[...].astype(wide) + norm.epsilon) * norm.scale[...].astype(wide)
    shift = (
        -norm.mean[...].astype(wide) if conv.bias is None else conv.bias[...].astype(wide) - norm.mean[...].astype(wide)
    )
    bias = norm.bias[...].astype(wide) + shift * factor
    kernel = (conv.kernel[...].astype(wide) * factor).astype(conv.dtype)
    y = functional.conv(x.astype(conv.dtype), kernel, stride=conv.stride, padding=conv.padding, groups=conv.groups)
    return (y + bias.astype(conv.dtype)).astype(norm.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation over (H, W) and the channels of a group, equal to torch.nn.GroupNorm: (B, H, W, C) -> same.

    It is computed in at least float32, in two passes.

    Args:
      groups: Number of groups of consecutive channels.
      features: Number of channels C, a multiple of `groups`.
      epsilon: Term added to the variance.
      dtype: Dtype of the output.
      param_dtype: Dtype of the parameters `scale` and `bias`, (C,) each.

    Raises:
      ValueError: `groups` does not divide `features`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> norm = layers.GroupNorm(2, 4, epsilon=1e-5, dtype=jnp.float32, param_dtype=jnp.float32)
      >>> norm(jnp.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 1, 4)).ravel().round(3).tolist()
      [-1.0, 1.0, -1.0, 1.0]
    """

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
