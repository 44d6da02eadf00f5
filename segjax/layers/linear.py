"""Linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from segjax.kernels import precision
from segjax.layers import functional, initializers


def _bias(init: Callable | None, kernel: nnx.Param, *, rngs: nnx.Rngs) -> nnx.Param:
    """Zeros where there is no `init`."""
    *inner, features = kernel.shape
    if init is None:
        return nnx.Param(jnp.zeros((features,), kernel.dtype))
    return nnx.Param(init(rngs.params(), (features,), kernel.dtype, fan_in=math.prod(inner)))


# ------------------------------------------------------------------------------------------------ linear, convolution


class Linear(nnx.Module):
    """torch.nn.Linear over the last axis: (..., in) -> (..., out).

    The product is `lax.dot_general`, which quantisation and LoRA libraries such as qwix intercept. Inside
    `published_implementations()` they find every Linear. Otherwise decoders, and on a CPU feed-forward networks, read
    the weight arrays of their layers themselves and are not intercepted: of the 44 Linear layers of a SegFormer-B0, 24
    are found on a CPU and 40 elsewhere.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Callable = initializers.linear_init,
        bias_init: Callable | None = None,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = _bias(bias_init, self.kernel, rngs=rngs) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = dtypes.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Conv(nnx.Module):
    """torch.nn.Conv2d: cross-correlation with explicit, symmetric zero padding; (B, H, W, in) -> (B, H', W', out).

    `'SAME'` is never used: on a stride of 2 it pads on one side only, where torch pads on both.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        groups: int = 1,
        use_bias: bool = True,
        kernel_init: Callable | None = None,
        bias_init: Callable | None = None,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.padding = (padding, padding) if isinstance(padding, int) else padding
        self.stride = stride
        self.groups = groups
        self.dtype = dtype
        init = partial(initializers.fan_out_init, groups=groups) if kernel_init is None else kernel_init
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = _bias(bias_init, self.kernel, rngs=rngs) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = functional.conv(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def classify(layer: Conv, x: jax.Array) -> jax.Array:
    """A 1x1 convolution to logits (B, H, W, K), summed and kept in at least float32 whatever its inputs are."""
    wide = precision.at_least_float32(layer.dtype)
    kernel = layer.kernel[...][0, 0].astype(layer.dtype)
    logits = jnp.matmul(x.astype(layer.dtype), kernel, preferred_element_type=wide)
    return logits if layer.bias is None else logits + layer.bias[...].astype(wide)


def bias_of(layer: Linear | Conv) -> jax.Array:
    """The bias (out,) of a layer that must have one; ValueError for a layer made with `use_bias=False`."""
    if layer.bias is None:
        raise ValueError(f"this {type(layer).__name__} has no bias, which the operation reads")
    return layer.bias[...]
