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
    """Bias of the layer with this kernel, drawn by `init`, or zeros without it."""
    *inner, features = kernel.shape
    if init is None:
        return nnx.Param(jnp.zeros((features,), kernel.dtype))
    return nnx.Param(init(rngs.params(), (features,), kernel.dtype, fan_in=math.prod(inner)))


# ------------------------------------------------------------------------------------------------ linear, convolution


class Linear(nnx.Module):
    """Linear layer over the last axis, equal to torch.nn.Linear: (..., in) -> (..., out).

    The product is `lax.dot_general`, which quantisation and LoRA libraries such as qwix intercept. Inside
    `published_implementations()` they intercept every Linear. Otherwise decoders, and feed-forward networks on a CPU,
    read the weight arrays of their layers directly and are not intercepted: of the 44 Linear layers of SegFormer-B0,
    24 are intercepted on a CPU and 40 elsewhere.

    Args:
      in_features: Number of inputs.
      out_features: Number of outputs.
      use_bias: Whether to add a bias.
      kernel_init: Function (key, shape, dtype) that draws `kernel`, (in, out).
      bias_init: Function `(key, shape, dtype, *, fan_in)` that draws `bias`, (out,); None sets it to zeros.
      dtype: Dtype of the product and of the output.
      param_dtype: Dtype of the parameters.
      rngs: Random streams; the stream `params` is read.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> layer = layers.Linear(3, 5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 4, 3))).shape
      (2, 4, 5)
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
        rows = functional.as_rows(x)
        y = jax.lax.dot_general(rows, kernel, (((rows.ndim - 1,), (0,)), ((), ())))
        y = y.reshape(*x.shape[:-1], kernel.shape[-1])
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Conv(nnx.Module):
    """Convolution with explicit, symmetric zero padding, equal to torch.nn.Conv2d: (B, H, W, in) -> (B, H', W', out).

    There is no padding `'SAME'`: with a stride of 2 it pads on one side only, where torch pads on both.

    Args:
      in_channels: Number of input channels.
      out_channels: Number of output channels.
      kernel_size: Side of the kernel, or (height, width), in pixels.
      stride: Stride along both axes, in pixels.
      padding: Zeros on each side of both axes, or (on each side of H, on each side of W), in pixels.
      groups: Number of groups of channels.
      use_bias: Whether to add a bias.
      kernel_init: Function (key, shape, dtype) that draws `kernel`, (kh, kw, in / groups, out); None takes
        `fan_out_init`.
      bias_init: Function `(key, shape, dtype, *, fan_in)` that draws `bias`, (out,); None sets it to zeros.
      dtype: Dtype of the product and of the output.
      param_dtype: Dtype of the parameters.
      rngs: Random streams; the stream `params` is read.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> kinds = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> layers.Conv(3, 5, 3, stride=2, padding=1, **kinds)(jnp.ones((2, 6, 8, 3))).shape
      (2, 3, 4, 5)
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
    """Apply a 1x1 convolution that sums and returns logits in at least float32.

    Args:
      layer: 1x1 `Conv` to K classes.
      x: (B, H, W, C).

    Returns:
      Logits (B, H, W, K), float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> layer = layers.Conv(3, 5, 1, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
      >>> layers.classify(layer, jnp.ones((2, 6, 8, 3))).dtype
      dtype('float32')
    """
    wide = precision.at_least_float32(layer.dtype)
    kernel = layer.kernel[...][0, 0].astype(layer.dtype)
    logits = functional.product(x.astype(layer.dtype), kernel, preferred_element_type=wide)
    return logits if layer.bias is None else logits + layer.bias[...].astype(wide)


def bias_of(layer: Linear | Conv) -> jax.Array:
    """The bias (out,) of a layer. Raises ValueError for a layer made with `use_bias=False`."""
    if layer.bias is None:
        name = type(layer).__name__
        raise ValueError(f"this {name} has no bias, but the operation needs one; create it with use_bias=True")
    return layer.bias[...]
