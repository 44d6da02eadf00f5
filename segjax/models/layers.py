"""What torch's layers compute, once, for every model of this package.

Activations are (B, H, W, C) throughout. Attribute names follow the one rule that conversion relies on: `kernel` is
torch's `weight` of a convolution (HWIO) or a linear layer (in, out), `scale` is the `weight` of a norm, `mean` and
`var` are the running statistics. Two dtypes meet in every layer: `param_dtype` is what is stored, `dtype` is what is
multiplied; norms, softmax and sums of logits never compute in less than float32.

Several functions come in two forms, a plain one and one that XLA's CPU backend runs faster; `parity/test_ops.py`
holds them equal. Which form runs is decided in `fast_cpu_forms` alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

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
    """Uniform within ±1 / sqrt(fan_in): what torch.nn.Linear and Conv2d draw unless told otherwise."""
    return fan_in_bias_init(key, shape, dtype, fan_in=math.prod(shape[:-1]))


def fan_in_bias_init(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, *, fan_in: int) -> jax.Array:
    """The same for their biases, whose fan_in is that of the kernel."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def _bias(init: Callable | None, kernel: nnx.Param, *, rngs: nnx.Rngs) -> nnx.Param:
    """Zeros where there is no `init`."""
    *inner, features = kernel.shape
    if init is None:
        return nnx.Param(jnp.zeros((features,), kernel.dtype))
    return nnx.Param(init(rngs.params(), (features,), kernel.dtype, fan_in=math.prod(inner)))


@contextlib.contextmanager
def _holding(variable: contextvars.ContextVar, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


_AS_PUBLISHED = contextvars.ContextVar("as_published", default=False)


@contextlib.contextmanager
def published_forms():
    """Models called inside run every layer as its publication writes it, in no equal but cheaper form.

    What is counted (`segjax.summary`) and what a fast form is compared with.
    """
    with _holding(_AS_PUBLISHED, True):
        yield


def as_published() -> bool:
    return _AS_PUBLISHED.get()


_PLATFORM = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def meant_for(platform: str):
    """Models called inside take the forms that are fast on `platform` ("cpu", "cuda"), wherever they are traced."""
    with _holding(_PLATFORM, platform):
        yield


def fast_cpu_forms() -> bool:
    """True where XLA's CPU backend will run the computation, for which several layers have a faster form.

    Measured on two cores (wall time of the plain form / of the fast one): depthwise 3x3 forward and backward 4 to 184,
    bilinear resizing by whole factors about 1.2 of a whole forward pass of SegFormer-B0.
    """
    return (_PLATFORM.get() or jax.default_backend()) == "cpu" and not as_published()


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for narrower floating types, else the type itself: the precision of norms, softmax and logits."""
    return jnp.promote_types(dtype, jnp.float32)


# ------------------------------------------------------------------------------------------------ linear, convolution


class Linear(nnx.Module):
    """torch.nn.Linear over the last axis: (..., in) -> (..., out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        kernel_init: Callable = linear_init,
        bias_init: Callable | None = None,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = _bias(bias_init, self.kernel, rngs=rngs) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
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
        init = partial(fan_out_init, groups=groups) if kernel_init is None else kernel_init
        shape = (*self.kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = _bias(bias_init, self.kernel, rngs=rngs) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = conv(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def classify(layer: Conv, x: jax.Array) -> jax.Array:
    """A 1x1 convolution to logits (B, H, W, K), summed and kept in at least float32 whatever its inputs are."""
    wide = at_least_float32(layer.dtype)
    kernel = layer.kernel[...][0, 0].astype(layer.dtype)
    return jnp.matmul(x.astype(layer.dtype), kernel, preferred_element_type=wide) + layer.bias[...].astype(wide)


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[int, int], groups: int) -> jax.Array:
    """Convolution (B, H, W, in) with an HWIO kernel, in whichever of the equal forms below is fastest.

    A 1x1 kernel is a matrix product (XLA:CPU: 7.0 ms against 10.9 ms for 270 channels at 128x128), on a CPU so is a
    kernel that steps by its own size, and a depthwise kernel of stride 1 goes to `depthwise`; all else is `conv_plain`.
    """
    kernel_height, kernel_width, in_per_group, out_channels = kernel.shape
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0) and groups == 1:
        return jnp.matmul(x, kernel[0, 0])
    if kernel.shape[:2] == (stride, stride) and padding == (0, 0) and groups == 1 and fast_cpu_forms():
        return conv_of_patches(x, kernel)
    keeps_size = padding == (kernel_height // 2, kernel_width // 2) and kernel_height % 2 and kernel_width % 2
    if in_per_group == 1 and stride == 1 and keeps_size and fast_cpu_forms():
        # Where a channel has several outputs, they are neighbours.
        repeated = x if groups == out_channels else jnp.repeat(x, out_channels // groups, axis=-1)
        return depthwise(repeated, kernel)
    return conv_plain(x, kernel, stride=stride, padding=padding, groups=groups)


def conv_plain(x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[int, int], groups: int) -> jax.Array:
    """The convolution as XLA offers it."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=[(padding[0], padding[0]), (padding[1], padding[1])],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def conv_of_patches(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution whose stride is its kernel's size, without padding: one matrix product over disjoint patches.

    Equal to `conv_plain(..., stride=r)`; rows and columns that fill no patch are left out, as there. Its input gradient
    is a product too, where XLA:CPU's dilated convolution is slow (8x8 on 32 channels, forward and backward: 3.3 to
    0.5 ms).

    Args:
      x: (B, H, W, C). kernel: (r, r, C, out).
    """
    r, _, channels, out_channels = kernel.shape
    batch, height, width = x.shape[0], x.shape[1] // r, x.shape[2] // r
    whole = x[:, : height * r, : width * r].reshape(batch, height, r, width, r, channels)
    patches = whole.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, r * r * channels)
    return jnp.matmul(patches, kernel.reshape(r * r * channels, out_channels))


def padded(x: jax.Array, kernel_size: Sequence[int]) -> jax.Array:
    """Zeros around a map, as an odd kernel reaches: (B, H, W, C) -> (B, H + kh - 1, W + kw - 1, C)."""
    top, left = (side // 2 for side in kernel_size)
    return jnp.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))


def shifted(x: jax.Array, kernel_size: Sequence[int]) -> list[list[jax.Array]]:
    """A padded input under every tap of a kernel: (B, H + kh - 1, W + kw - 1, C) -> [i][j] -> (B, H, W, C)."""
    (kernel_height, kernel_width) = kernel_size
    height, width = x.shape[1] - kernel_height + 1, x.shape[2] - kernel_width + 1
    return [[x[:, i : i + height, j : j + width] for j in range(kernel_width)] for i in range(kernel_height)]


def sum_of_taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution of a padded input, as a sum of shifted products.

    Args:
      x: (B, H + kh - 1, W + kw - 1, C). kernel: (kh, kw, 1, C).

    Returns:
      (B, H, W, C).
    """
    total = None
    for i, row in enumerate(shifted(x, kernel.shape[:2])):
        for j, moved in enumerate(row):
            product = moved * kernel[i, j, 0]
            total = product if total is None else total + product
    return total


def compiled_apart(function: Callable) -> Callable:
    """A function of arrays that XLA compiles by itself: what is computed in it is fused with nothing around it.

    XLA:CPU fuses a sum of shifted products into each of its readers, and computes it anew in every one: in a training
    step of SegNeXt, 46 products for every tap of a weight's gradient. `lax.optimization_barrier` does not hinder it.
    Two cores, with / without: SegNeXt-T 2x256x256 training 0.54, 1x512x512 inference 0.79.
    """

    @jax.jit
    @functools.wraps(function)
    def compiled(*arguments):
        # What it calls in its turn, `jnp.where` for one, belongs to it.
        with set_xla_metadata(inlineable="true"):
            return function(*arguments)

    @functools.wraps(function)
    def call(*arguments):
        # Calls are otherwise replaced by what is called before fusion.
        with set_xla_metadata(inlineable="false"):
            return compiled(*arguments)

    return call


def once(x: jax.Array) -> jax.Array:
    """The same array, computed once and kept, however many read it, on the way back as well.

    For the ends of blocks: XLA:CPU otherwise computes a chain of shortcuts from its beginning for every reader (two
    cores, with / without: HRNet-W18 1x512x512 inference 0.53, 2x256x256 training 0.40).
    """
    return _once(x) if fast_cpu_forms() else x


@jax.custom_vjp
def _once(x):
    return _unchanged(x)


@compiled_apart
def _unchanged(x):
    return x


_once.defvjp(lambda x: (_unchanged(x), None), lambda _, gradient: (_unchanged(gradient),))


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution of stride 1 that keeps the size, as a sum of shifted products.

    Equal to `conv_plain(..., groups=C)`. XLA:CPU lowers a grouped convolution to a scalar loop, 23 to 41 times slower
    than torch; a sum of shifted products it vectorises. The weight gradient has a rule of its own for the same reason.

    Args:
      x: (B, H, W, C).
      kernel: (kh, kw, 1, C), both sides odd.
    """
    return _sum_of_shifted(x, kernel)


@compiled_apart
def _sum_of_shifted(x, kernel):
    return sum_of_taps(padded(x, kernel.shape[:2]), kernel)


def _depthwise_forward(x, kernel):
    return depthwise(x, kernel), (x, kernel)


def _depthwise_backward(residuals, gradient):
    x, kernel = residuals
    # The input's gradient is the same convolution with the kernel turned by 180 degrees.
    input_gradient = depthwise(gradient, kernel[::-1, ::-1])
    return input_gradient, sums_of_products(_padded(x, kernel), _padded(gradient, kernel), kernel)


@compiled_apart
def _padded(x, kernel):
    return padded(x, kernel.shape[:2])


@compiled_apart
def sums_of_products(x: jax.Array, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of a depthwise kernel (kh, kw, 1, C), of input and output gradient, both padded."""
    kernel_height, kernel_width = kernel.shape[:2]
    top, left = kernel_height // 2, kernel_width // 2
    inner = gradient[:, top : gradient.shape[1] - top, left : gradient.shape[2] - left]
    taps = jnp.stack([_sum_of_bands(moved, inner) for row in shifted(x, kernel.shape[:2]) for moved in row])
    return jnp.sum(taps, axis=(1, 2, 3)).reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _sum_of_bands(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y, added up over bands of rows in at least float32: (B, H, W, C) twice -> (B, H / bands, W, C).

    A first step of a sum over pixels: XLA:CPU's reduction reads its input from memory, the whole product otherwise
    (nine taps of 128 channels at 2x64x64: 2.4 to 0.8 ms).
    """
    height = x.shape[1]
    bands = max(number for number in range(1, 9) if height % number == 0)
    wide = at_least_float32(x.dtype)
    products = (
        one.astype(wide) * other.astype(wide)
        for one, other in zip(jnp.split(x, bands, axis=1), jnp.split(y, bands, axis=1), strict=True)
    )
    return sum(products)


# ------------------------------------------------------------------------------------------------------------- norms


class LayerNorm(nnx.Module):
    """torch.nn.LayerNorm over the last axis, two-pass, in at least float32.

    The variance is the mean of squared deviations: the one-pass form E[x²] - E[x]² loses all digits of a map whose
    mean is large (3e-3 at mean 100) and can turn negative.
    """

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype, param_dtype: jnp.dtype):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(self.dtype))
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normed = centered * lax.rsqrt(variance + self.epsilon)
        return once(
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
        wide = x.astype(at_least_float32(self.dtype))
        if self.use_running_average:
            mean, variance = self.mean[...].astype(wide.dtype), self.var[...].astype(wide.dtype)
        else:
            mean, variance = self._observe(wide)
        factor = lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(wide.dtype)
        return ((wide - mean) * factor + self.bias[...].astype(wide.dtype)).astype(self.dtype)

    def _observe(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance of the whole batch, (C,) each; moves the running ones."""
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        count = x.size // x.shape[-1] * devices
        if count < 2:
            raise ValueError(
                f"BatchNorm in training needs more than one value per channel but got a map of shape {x.shape}; "
                "use a larger batch or image, or model.eval()"
            )
        mean = self._across_devices(jnp.mean(x, axis=(0, 1, 2)))
        variance = self._across_devices(jnp.mean(jnp.square(x - mean), axis=(0, 1, 2)))
        unbiased = variance * (count / (count - 1))
        self.mean[...] = _move(self.mean[...], mean, self.momentum)
        self.var[...] = _move(self.var[...], unbiased, self.momentum)
        return mean, variance

    def _across_devices(self, x: jax.Array) -> jax.Array:
        return x if self.axis_name is None else lax.pmean(x, self.axis_name)


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
        wide = x.astype(at_least_float32(self.dtype)).reshape(B, H, W, self.groups, C // self.groups)
        centered = wide - jnp.mean(wide, axis=(1, 2, 4), keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=(1, 2, 4), keepdims=True)
        normed = (centered * lax.rsqrt(variance + self.epsilon)).reshape(B, H, W, C)
        return (normed * self.scale[...].astype(wide.dtype) + self.bias[...].astype(wide.dtype)).astype(self.dtype)


def _move(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    return ((1 - momentum) * old.astype(new.dtype) + momentum * lax.stop_gradient(new)).astype(old.dtype)


# ---------------------------------------------------------------------------------------------------------- dropping


def draw_per_sample(draw: Callable, stream, x: jax.Array, axis_name: str | None) -> jax.Array:
    """`draw(key, number of samples)` for every sample of `x` (B, ...).

    Under `pmap` (axis_name set) it is drawn for the whole batch and each device takes its part, so that the result
    does not depend on the number of devices.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    drawn = draw(stream(), devices * x.shape[0])
    if axis_name is None:
        return drawn
    return lax.dynamic_slice_in_dim(drawn, lax.axis_index(axis_name) * x.shape[0], x.shape[0])


class _Drop(nnx.Module):
    """Zeroes whole slices of a map at random in training and scales the rest by 1 / (1 - rate).

    Every layer has a random stream of its own: with one shared key all blocks would drop the same samples. A subclass
    has `keep(x)`: what survives, boolean, of a shape that spreads over `x`.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.rate = rate
        # Rounded once, in double precision, as torch does it.
        self.survival = 1 - rate
        self.deterministic = True
        self.axis_name: str | None = None
        self.stream = rngs.dropout.fork() if rate > 0 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or self.stream is None:
            return x
        return jnp.where(self.keep(x), x / jnp.asarray(self.survival, x.dtype), jnp.zeros_like(x))


class DropPath(_Drop):
    """Stochastic depth (Huang et al., 2016): drops the whole branch of a sample. (B, H, W, C) -> the same."""

    def keep(self, x: jax.Array) -> jax.Array:
        def draw(key, samples):
            return jax.random.bernoulli(key, self.survival, (samples, 1, 1, 1))

        return draw_per_sample(draw, self.stream, x, self.axis_name)


class DropPathOfBatch(_Drop):
    """Stochastic depth that drops a branch for the whole batch at once: torchvision's mode "batch"."""

    def keep(self, x: jax.Array) -> jax.Array:
        return jax.random.bernoulli(self.stream(), self.survival)


class Dropout2d(_Drop):
    """torch.nn.Dropout2d: drops whole channels of a sample. (B, H, W, C) -> the same."""

    def keep(self, x: jax.Array) -> jax.Array:
        def draw(key, samples):
            return jax.random.bernoulli(key, self.survival, (samples, 1, 1, x.shape[-1]))

        return draw_per_sample(draw, self.stream, x, self.axis_name)


# --------------------------------------------------------------------------------------------------------- containers


class Sequential(nnx.List):
    """torch.nn.Sequential: an element's name is its index, so that published keys such as `fuse.2` fit."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self:
            x = layer(x)
        return x


class ReLU(nnx.Module):
    """A place in a Sequential."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)


class GELU(nnx.Module):
    """A place in a Sequential."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return gelu(x)


# ------------------------------------------------------------------------------------------------ rows of equal blocks


class BlockExecution(NamedTuple):
    """How `run_blocks` goes through a row of blocks; none of it changes what is computed.

    Attributes:
      scan_from: so many equal neighbours or more are compiled once, as the body of a loop: a deep model compiles in a
        fraction of the time. A step holds their weights and gradients once more, stacked, where they are not given
        as `segjax.stacks` has them. 0 makes no loops.
      remat: keeps nothing of a block for the backward pass but its input, and computes the rest a second time. On a CPU
        it needs loops: XLA there finds equal blocks of straight code computed twice, and computes them once.
    """

    scan_from: int = 0
    remat: bool = False

    @classmethod
    def of(cls, *, scan_blocks: bool, remat: bool) -> BlockExecution:
        """What the settings `train.scan_blocks` and `train.remat` mean.

        A loop copies weights in and gradients out; for short rows that costs more than what is saved in compiling.
        SegFormer-B5, rows of 3, 6, 40 and 3, training 2x256x256 on two cores, time over that without loops and seconds
        to compile: all as loops 1.17 and 17, the two longest 1.14 and 16, the longest 1.09 and 19; none 38. Computed
        again, all must be loops for the sake of memory.
        """
        return cls(scan_from=(2 if remat else 7) if scan_blocks else 0, remat=remat)


# Variables that a call may move: running statistics and the counters of random streams.
CHANGED_BY_A_CALL = nnx.Any(nnx.BatchStat, nnx.RngState)

PLAIN = BlockExecution()

_BLOCK_EXECUTION = contextvars.ContextVar("block_execution", default=PLAIN)


@contextlib.contextmanager
def blocks_executed(execution: BlockExecution):
    """Models called inside go through their rows of blocks so."""
    with _holding(_BLOCK_EXECUTION, execution):
        yield


def run_blocks(blocks: Sequence[nnx.Module], x, call: Callable = lambda block, x: block(x)):
    """`x = call(block, x)` for one block after the other; `x` is an array, or a tree of arrays."""
    execution = _BLOCK_EXECUTION.get()
    if execution == PLAIN:
        for block in blocks:
            x = call(block, x)
        return x
    for row in _equal_neighbours(blocks) if execution.scan_from else [[block] for block in blocks]:
        for part in [row] if len(row) >= execution.scan_from else [[block] for block in row]:
            x = _run_row(part, x, call, execution)
    return x


def _run_row(row: list[nnx.Module], x, call: Callable, execution: BlockExecution):
    """Through equal blocks: one alone as it is, several as one scanned body over their stacked arrays."""
    if len(row) == 1 and not execution.remat:
        return call(row[0], x)
    parts = [_split_without_rates(block) for block in row]
    graph = parts[0][0]

    def body(x, part):
        params, rest, survival = part
        block = nnx.merge(graph, params, rest, copy=True)
        for drop, kept in zip(_drops(block), survival, strict=True):
            drop.survival = nnx.data(kept)
        # Rows inside a block that is computed again would be a third time, for little: of HRNet-W18 at 256x256, 295 MiB
        # of temporaries instead of 316.
        with blocks_executed(execution._replace(remat=False)):
            return call(block, x), nnx.state(block, CHANGED_BY_A_CALL)

    if execution.remat:
        body = jax.checkpoint(body)
    if len(row) == 1:
        x, moved = body(x, parts[0][1:])
        nnx.update(row[0], moved)
        return x
    x, moved = lax.scan(body, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[1:] for part in parts)))
    for index, block in enumerate(row):
        nnx.update(block, jax.tree.map(lambda leaf, index=index: leaf[index], moved))
    return x


def _equal_neighbours(blocks: Sequence[nnx.Module]) -> list[list[nnx.Module]]:
    """Blocks that differ in nothing but their arrays and rates, as far as they stand side by side."""
    rows, kinds = [], []
    for block in blocks:
        graph, *arrays = _split_without_rates(block)
        leaves, structure = jax.tree.flatten(arrays)
        kind = graph, structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
        if kinds and kinds[-1] == kind:
            rows[-1].append(block)
        else:
            rows.append([block])
        kinds.append(kind)
    return rows


def _split_without_rates(block: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State, list[float]]:
    """Structure in which no rate shows, parameters, other variables, and what each drop layer keeps."""
    drops = _drops(block)
    rates = [(drop.rate, drop.survival) for drop in drops]
    for drop in drops:
        drop.rate = drop.survival = None
    graph, params, rest = nnx.split(block, nnx.Param, ...)
    for drop, (rate, survival) in zip(drops, rates, strict=True):
        drop.rate, drop.survival = rate, survival
    return graph, params, rest, [survival for _, survival in rates]


def _drops(block: nnx.Module) -> list[_Drop]:
    return [module for _, module in nnx.iter_modules(block) if isinstance(module, _Drop)]


# -------------------------------------------------------------------------------------------- activations, attention


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by the error function; jax's default is the tanh approximation, 4.7e-4 away."""
    return gelu_by_slope(x) if fast_cpu_forms() else gelu_plain(x)


def gelu_plain(x: jax.Array) -> jax.Array:
    """x (1 + erf(x / sqrt(2))) / 2 as torch writes it, in at least float32, differentiated by jax.

    `jax.nn.gelu(approximate=False)` takes the complementary function instead, which costs 2.5 times as much on a CPU.
    """
    return (x * _normal_below(x)).astype(x.dtype)


def _normal_below(x: jax.Array) -> jax.Array:
    """The standard normal distribution's share below x, in at least float32."""
    return 0.5 * (1 + lax.erf(x.astype(at_least_float32(x.dtype)) * math.sqrt(0.5)))


@jax.custom_vjp
def gelu_by_slope(x: jax.Array) -> jax.Array:
    """The same; its backward pass computes Φ(x) + x φ(x) once, as a unit.

    XLA:CPU otherwise computes the error function anew inside every reduction that reads the gradient, 18 times in front
    of a depthwise 3x3: a Mix-FFN of 128 channels at 4x32x64, forward and backward, fell from 35 to 11 ms
    (with a form that kept this slope instead of x).
    """
    return gelu_unit(x)


@compiled_apart
def gelu_unit(x):
    return gelu_plain(x)


def times_slope(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient of GELU's input."""
    wide = x.astype(at_least_float32(x.dtype))
    slope = _normal_below(x) + wide * jnp.exp(-0.5 * jnp.square(wide)) * (1 / math.sqrt(2 * math.pi))
    return (gradient * slope).astype(x.dtype)


times_slope_of_gelu = compiled_apart(times_slope)
gelu_by_slope.defvjp(lambda x: (gelu_unit(x), x), lambda x, gradient: (times_slope_of_gelu(x, gradient),))


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q kᵀ / sqrt(D)) v with the softmax in at least float32.

    Args:
      query: (B, h, N, D); key, value: (B, h, M, D). Head-major, so that both products are plain batched ones.

    Returns:
      (B, h, N, D) in the dtype of `query`. `jax.nn.dot_product_attention` is not used: its softmax is float32 even for
      float64 inputs (1e-7).
    """
    (B, h, N, _), M = query.shape, key.shape[2]
    # Of sizes that an exported program leaves open nobody knows whether the scores are many.
    if not fast_cpu_forms() or not all(isinstance(size, int) for size in (B, N, M)):
        return attention_plain(query, key, value)
    rows = max(1, MOST_SCORES // (B * h * M))
    if rows >= N:
        return attention_plain(query, key, value)
    return attention_by_rows(query, key, value, rows=-(-N // -(-N // rows)))


def attention_plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """All scores (B, h, N, M) at once."""
    wide = at_least_float32(query.dtype)
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = jnp.einsum("bhnd,bhmd->bhnm", scaled, key, preferred_element_type=wide)  # (B, h, N, M)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value)


# 64 MiB in float32. An image of 1024x2048 has 1 GiB of them in SegFormer's first stage, whose time is the same in parts
# of this size; that of its second falls by a fifth.
MOST_SCORES = 2**24


def attention_by_rows(query: jax.Array, key: jax.Array, value: jax.Array, *, rows: int) -> jax.Array:
    """The same for `rows` queries after another; the backward pass computes the scores again."""
    B, h, N, D = query.shape
    parts = -(-N // rows)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, parts * rows - N), (0, 0)))
    by_part = jnp.moveaxis(padded.reshape(B, h, parts, rows, D), 2, 0)
    mixed = lax.map(jax.checkpoint(lambda part: attention_plain(part, key, value)), by_part)  # (parts, B, h, rows, D)
    return jnp.moveaxis(mixed, 0, 2).reshape(B, h, parts * rows, D)[:, :, :N]


# ------------------------------------------------------------------------------------------------------------ resize


def resize(x: jax.Array, size: tuple[int, int], *, align_corners: bool = False) -> jax.Array:
    """torch.nn.functional.interpolate(mode="bilinear", size=size): (B, H, W, C) -> (B, *size, C).

    Args:
      align_corners: True maps the centres of the corner pixels onto each other; False (torch's default) the outer
        edges of the images.
    """
    if x.shape[1:3] == tuple(size):
        return x
    if align_corners:
        return _resize_aligned(x, size)
    factors = [new // old if new % old == 0 else 0 for old, new in zip(x.shape[1:3], size, strict=True)]
    if all(factors) and fast_cpu_forms():
        return resize_by_phases(x, tuple(factors))
    return resize_plain(x, size)


def enlarge_nearest(x: jax.Array, factor: int) -> jax.Array:
    """torch.nn.Upsample(mode="nearest", scale_factor=factor): (B, H, W, C) -> (B, H * factor, W * factor, C)."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def resize_plain(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Half-pixel bilinear. Without antialias=False jax low-passes when it shrinks, which torch does not (1.8 away)."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), method="bilinear", antialias=False)


def resize_by_phases(x: jax.Array, factors: tuple[int, int]) -> jax.Array:
    """Half-pixel bilinear enlargement by whole factors: (B, H, W, C) -> (B, H * factors[0], W * factors[1], C).

    Output pixel f * i + p always blends the same two neighbours with the same weights, so each of the f phases is one
    blend of the whole map with itself moved by one, edges repeated: slices and a reshape instead of a gather.
    """
    for axis, factor in zip((1, 2), factors, strict=True):
        if factor > 1:
            x = once(enlarge_axis(once(x), axis, factor))
    return x


def _phases(factor: int) -> list[tuple[int, float]]:
    """Which neighbour of input pixel i each of its output pixels blends in, -1 or 1, and with what weight."""
    offsets = [(phase + 0.5) / factor - 0.5 for phase in range(factor)]
    return [(-1 if offset < 0 else 1, abs(offset)) for offset in offsets]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def enlarge_axis(x: jax.Array, axis: int, factor: int) -> jax.Array:
    """One axis of `resize_by_phases`, with a backward pass that reads the gradient once."""
    length = x.shape[axis]
    ends = {-1: lax.slice_in_dim(x, 0, 1, axis=axis), 1: lax.slice_in_dim(x, length - 1, length, axis=axis)}
    neighbours = {
        -1: jnp.concatenate([ends[-1], lax.slice_in_dim(x, 0, length - 1, axis=axis)], axis),
        1: jnp.concatenate([lax.slice_in_dim(x, 1, length, axis=axis), ends[1]], axis),
    }
    phases = [x * (1 - weight) + neighbours[side] * weight for side, weight in _phases(factor)]
    shape = (*x.shape[:axis], length * factor, *x.shape[axis + 1 :])
    return jnp.stack(phases, axis=axis + 1).reshape(shape)


def _enlarge_forward(x, axis, factor):
    return enlarge_axis(x, axis, factor), None


def enlarge_axis_backward(axis, factor, _, gradient):
    if factor == 1:
        return (gradient,)  # the one phase blends nothing with the neighbour before
    length = gradient.shape[axis] // factor
    by_phase = gradient.reshape(*gradient.shape[:axis], length, factor, *gradient.shape[axis + 1 :])
    parts = [lax.index_in_dim(by_phase, phase, axis + 1, keepdims=False) for phase in range(factor)]
    weighted = list(zip(parts, _phases(factor), strict=True))
    own = sum(part * (1 - weight) for part, (_, weight) in weighted)
    to_side = {side: sum(part * weight for part, (to, weight) in weighted if to == side) for side in (-1, 1)}
    ends = {
        -1: lax.slice_in_dim(to_side[-1], 0, 1, axis=axis),
        1: lax.slice_in_dim(to_side[1], length - 1, length, axis=axis),
    }
    # What goes to the neighbour before comes, seen from there, from behind; an end is its own neighbour.
    from_behind = jnp.concatenate([lax.slice_in_dim(to_side[-1], 1, length, axis=axis), ends[1]], axis)
    from_before = jnp.concatenate([ends[-1], lax.slice_in_dim(to_side[1], 0, length - 1, axis=axis)], axis)
    return (own + from_behind + from_before,)


enlarge_axis.defvjp(_enlarge_forward, enlarge_axis_backward)


def _resize_aligned(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear with aligned corners as two matrix products, (B, H, W, C) -> (B, *size, C).

    In full precision, as `jax.image.resize` has it: the default of a GPU or TPU would round the pixels.
    """
    rows = _aligned_matrix(x.shape[1], size[0], x.dtype)
    columns = _aligned_matrix(x.shape[2], size[1], x.dtype)
    return jnp.einsum("ph,bhwc,qw->bpqc", rows, x, columns, precision=lax.Precision.HIGHEST)


def _aligned_matrix(old: int, new: int, dtype: jnp.dtype) -> jax.Array:
    """(new, old) interpolation weights; a single output pixel takes the first input pixel, as torch does."""
    scale = (old - 1) / (new - 1) if new > 1 else 0.0
    position = jnp.arange(new, dtype=at_least_float32(dtype)) * scale
    distance = jnp.abs(position[:, None] - jnp.arange(old, dtype=position.dtype)[None, :])
    return jnp.maximum(0, 1 - distance).astype(dtype)


# ------------------------------------------------------------------------------------------- decoders of several levels


def conv1x1_of_resized(
    layer: Conv, levels: Sequence[jax.Array], enlarge: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Enlarges maps to one size, concatenates them and applies the 1x1 convolution `layer`, in a cheaper order.

    Args:
      levels: maps (B, h, w, C_level), their channels in the order of the kernel's.
      enlarge: resizes a map to the common size.

    Returns:
      (B, H, W, C).
    """
    if as_published():
        return layer(jnp.concatenate([enlarge(x) for x in levels], axis=-1))
    kernels = slices_by_level(layer, levels)
    fused = _sum_of_levels([x.astype(layer.dtype) for x in levels], kernels, None, enlarge)
    return fused if layer.bias is None else fused + layer.bias[...].astype(layer.dtype)


def slices_by_level(layer: Conv, levels: Sequence[jax.Array]) -> list[jax.Array]:
    """Of a 1x1 convolution over concatenated levels: each level's part of the kernel, (C_level, C)."""
    ends = list(accumulate(x.shape[-1] for x in levels))
    return jnp.split(layer.kernel[...][0, 0].astype(layer.dtype), ends[:-1])


def _sum_of_levels(
    levels: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    biases: Sequence[jax.Array] | None,
    enlarge: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Sum of enlarge(level @ kernel + bias): a 1x1 convolution of the enlarged and concatenated levels.

    A 1x1 convolution commutes with resizing, whose weights sum to one, and over a concatenation it is a sum: so each
    level is multiplied by its slice of the kernel at its own resolution.
    """
    total = None
    for index, (x, kernel) in enumerate(zip(levels, kernels, strict=True)):
        y = jnp.matmul(x, kernel)
        y = enlarge(y if biases is None else y + biases[index])
        total = y if total is None else total + y
    return total


def project_and_fuse(
    levels: Sequence[jax.Array],
    projections: Sequence[Linear | Conv],
    fuse: Conv,
    enlarge: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Projects each level, enlarges, concatenates and applies the 1x1 convolution `fuse`, in a cheaper order.

    Nothing non-linear stands between projection and convolution, so that their product is one matrix (C_level, C).
    A projection after the enlargement gives the same.

    Args:
      projections: 1x1, with bias, each to as many channels as `fuse` has outputs per level.

    Returns:
      (B, H, W, C) in the dtype of `fuse`.
    """
    kernels, biases = fused_projections(projections, fuse)
    fused = _sum_of_levels([x.astype(fuse.dtype) for x in levels], kernels, biases, enlarge)
    return fused if fuse.bias is None else fused + fuse.bias[...].astype(fuse.dtype)


def fused_projections(projections: Sequence[Linear | Conv], fuse: Conv) -> tuple[list[jax.Array], list[jax.Array]]:
    """What is left of each projection and its slice of `fuse`: a kernel (C_level, C) and a bias (C,) for each level."""
    dtype = fuse.dtype
    # The two matrices are multiplied wide: rounding their product once is closer than rounding each factor.
    wide = jnp.promote_types(fuse.kernel[...].dtype, at_least_float32(dtype))
    slices = jnp.split(fuse.kernel[...][0, 0].astype(wide), len(projections))  # (C, C) each
    matrices = [p.kernel[...].reshape(p.kernel.shape[-2:]).astype(wide) for p in projections]  # (C_level, C) each
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    kernels = [product(matrix, part).astype(dtype) for matrix, part in zip(matrices, slices, strict=True)]
    biases = [product(p.bias[...].astype(wide), part) for p, part in zip(projections, slices, strict=True)]
    return kernels, [bias.astype(dtype) for bias in biases]


def feature_taps(features: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """The encoder's four maps as `feature0` (the largest) to `feature3`."""
    return {f"feature{i}": feature for i, feature in enumerate(features)}


def require_four(**settings: Sequence) -> None:
    """Raises ValueError for a setting that does not have one number for each of the four stages."""
    for name, value in settings.items():
        if not isinstance(value, Sequence) or len(value) != 4:
            raise ValueError(f"{name} needs four numbers, one per stage; got {value}")


def require_whole_heads(dims: Sequence[int], num_heads: Sequence[int]) -> None:
    """Raises ValueError for a stage whose width its heads do not divide."""
    for stage, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
        if dim % heads:
            raise ValueError(f"stage {stage + 1}: width {dim} does not divide into {heads} heads; set num_heads")


def require_images(images: jax.Array, *, multiple: int = 1) -> None:
    """Raises ValueError unless `images` are (B, H, W, 3) whose sides divide by `multiple`."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (B, H, W, 3); got {images.shape}")
    if any(side % multiple or not side for side in images.shape[1:3]):
        height, width = (-(-side // multiple) * multiple for side in images.shape[1:3])
        raise ValueError(
            f"this model takes images whose height and width divide by {multiple}; got {images.shape[1]}x"
            f"{images.shape[2]}. Pad or crop them, for example to {height}x{width}"
        )
