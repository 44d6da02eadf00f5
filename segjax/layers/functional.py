"""Operations without parameters, and the choice of each one's implementation. The table lists every choice.

| operation | on a CPU | on a GPU |
|---|---|---|
| `product`, `Linear`, static sizes | product of two matrices | XLA |
| `conv`, 1x1, stride 1, no padding, no groups | `product` | `product` |
| `conv`, kernel as large as its stride, no padding, no groups | `convolution.conv_of_patches` | XLA |
| `conv`, depthwise, stride 1, size kept, odd kernel | `convolution.depthwise` | `convolution.depthwise_fused` or XLA |
| `conv`, any other, weights prepared | XLA | `convolution.conv_by_output` |
| `conv`, any other | XLA (`convolution.conv_plain`) | XLA |
| `conv_norm`, running statistics | layer by layer | one convolution (`layers.norm`) |
| `gelu` | `gelu.gelu_by_slope` | `gelu.gelu_recomputed` |
| `attention`, bfloat16 or float16, widths by eights to 128 | as any other | cuDNN (`attention.attention_by_cudnn`) |
| `attention`, static sizes, more than `MOST_SCORES` scores | `attention.attention_by_rows` | as any other |
| `attention`, any other static sizes | `attention.attention_recomputed` | `attention.attention_recomputed` |
| `attention`, symbolic sizes | XLA (`attention.attention_plain`) | `attention.attention_recomputed` |
| `resize`, `align_corners=False`, whole factors | `resize.resize_by_phases` | `resize.resize_by_repeats` |
| `resize`, `align_corners=True` | `resize.resize_aligned` | `resize.resize_aligned` |
| `resize`, any other | XLA (`resize.resize_plain`) | XLA |
| `residual`, `once` | `units.once` | XLA (an addition; nothing) |
| `LayerNorm`, weights prepared | XLA (`layers.norm`) | XLA, one kernel |
| `LayerNorm`; `BatchNorm` in training | XLA (`layers.norm`) | `kernels.norm` |
| feed-forward networks, static sizes | `kernels.feed_forward` (`layers.feed_forward`) | layer by layer |
| decoders, evaluation, static sizes, whole factors | `kernels.decoder` (`layers.decode`) | order of the next row |
| decoders, any other | cheaper order: `project_and_fuse`, `conv1x1_of_resized` | cheaper order |
| patches of the simple SegFormer | one convolution: `embed_by_one_convolution` (its model) | one convolution |
| cross-entropy, no aligned corners, whole factors | `kernels.cross_entropy`, no other term | `kernels.cells` |
| cross-entropies, any other sizes, several classes | XLA (`losses`) | `cells.normaliser_and_chosen_by_rows` |
| labels of whole images, no aligned corners, whole factors | XLA (`inference.engine`) | `cells.labels_of` |
| parameters of a training step | one array each, or `stacked.Stacks` | `stacked.Vectors` |

"XLA" is the plain implementation in jax operations. "On a CPU" means `choice.is_fast_on_cpu()`, "on a GPU"
`choice.is_fast_on_gpu()`. The plain implementations run on every other backend and under a mesh with explicit axes.
They also run inside `published_implementations()`, with the products of decoders and patches in the published order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from segjax.kernels import attention as attention_kernels
from segjax.kernels import choice, convolution, units
from segjax.kernels.gelu import gelu_by_slope, gelu_plain, gelu_recomputed
from segjax.kernels.resize import resize_aligned, resize_by_phases, resize_by_repeats, resize_plain


def cpu_implementation(fast: Callable) -> Callable:
    """Attach a fast implementation for CPUs to a method, whose own body states the equation.

    Args:
      fast: Function of the method's arguments, including `self`. It returns NotImplemented where it does not apply;
        the method's own body runs then.

    Returns:
      Decorator of the method.

    Example:
      >>> from segjax import layers
      >>> class Square:
      ...     @layers.cpu_implementation(lambda self, x: x**2)
      ...     def __call__(self, x):
      ...         return x * x
      >>> Square()(3.0)
      9.0
    """
    return _attached(fast, choice.is_fast_on_cpu)


def cheaper_order(fast: Callable) -> Callable:
    """Attach a cheaper order of the same products to a method.

    It runs on every platform, except inside `published_implementations()`.

    Args:
      fast: Function of the method's arguments, including `self`. It returns NotImplemented where it does not apply;
        the method's own body runs then.

    Returns:
      Decorator of the method.

    Example:
      >>> from segjax import layers
      >>> class Sum:
      ...     @layers.cheaper_order(lambda self, a, b, c: a * (b + c))
      ...     def __call__(self, a, b, c):
      ...         return a * b + a * c
      >>> Sum()(2.0, 3.0, 4.0)
      14.0
    """
    return _attached(fast, lambda: not choice.is_published())


def _attached(fast: Callable, applies: Callable[[], bool]) -> Callable:
    def attach(method: Callable) -> Callable:
        @functools.wraps(method)
        def chosen(self, *arguments):
            output = fast(self, *arguments) if applies() else NotImplemented
            return method(self, *arguments) if output is NotImplemented else output

        return chosen

    return attach


def as_rows(x: jax.Array) -> jax.Array:
    """Flatten all axes but the last on a CPU, for a product with a matrix of weights.

    Otherwise the gradient of the weights sums over several axes, and XLA:CPU writes a transposed copy of the other
    gradient for it. With rows, a product and its backward pass take 0.4 to 0.8 of the time (64 to 270 channels at
    64x64 to 256x256).

    Args:
      x: (..., C).

    Returns:
      (N, C) on a CPU, if all sizes are static; otherwise `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> from segjax.layers import functional
      >>> with layers.meant_for("cpu"):
      ...     functional.as_rows(jnp.ones((2, 6, 8, 3))).shape
      (96, 3)
    """
    if choice.is_fast_on_cpu() and all(isinstance(size, int) for size in x.shape):
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x


def product(x: jax.Array, kernel: jax.Array, *, preferred_element_type: jnp.dtype | None = None) -> jax.Array:
    """Multiply the last axis by a matrix of weights.

    Args:
      x: (..., in).
      kernel: (in, out).
      preferred_element_type: Dtype of the result; None for that of the factors.

    Returns:
      (..., out).

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.product(jnp.ones((2, 6, 8, 3)), jnp.ones((3, 5))).shape
      (2, 6, 8, 5)
    """
    y = jnp.matmul(as_rows(x), kernel, preferred_element_type=preferred_element_type)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[int, int], groups: int) -> jax.Array:
    """Convolve a map with explicit zero padding, as torch.nn.functional.conv2d does.

    A 1x1 kernel is a matrix product (XLA:CPU: 7.0 ms instead of 10.9 ms for 270 channels at 128x128).

    Args:
      x: (B, H, W, in).
      kernel: (kh, kw, in / groups, out).
      stride: Stride along both axes, in pixels.
      padding: Zeros on both sides of H and of W, in pixels.
      groups: Number of groups of channels.

    Returns:
      (B, H', W', out).

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.conv(jnp.ones((2, 6, 8, 3)), jnp.ones((3, 3, 3, 5)), stride=2, padding=(1, 1), groups=1).shape
      (2, 3, 4, 5)
    """
    kernel_height, kernel_width, in_per_group, out_channels = kernel.shape
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0) and groups == 1:
        return product(x, kernel[0, 0])
    if kernel.shape[:2] == (stride, stride) and padding == (0, 0) and groups == 1 and choice.is_fast_on_cpu():
        return convolution.conv_of_patches(x, kernel)
    if in_per_group == 1 and groups < out_channels:
        # A channel multiplier: the input is repeated so that each output channel has its own input channel. The
        # gradient of the grouped kernel would gather the batch from all devices.
        x, groups = jnp.repeat(x, out_channels // groups, axis=-1), out_channels
    keeps_size = padding == (kernel_height // 2, kernel_width // 2) and kernel_height % 2 and kernel_width % 2
    if in_per_group == 1 and stride == 1 and keeps_size:
        if choice.is_fast_on_cpu():
            return convolution.depthwise(x, kernel)
        is_inference = choice.are_weights_prepared()
        if choice.is_fast_on_gpu() and convolution.is_fused_on_gpu(x, kernel, is_inference=is_inference):
            return convolution.depthwise_fused(x, kernel)
    if choice.are_weights_prepared() and choice.is_fast_on_gpu():
        return convolution.conv_by_output(x, kernel, stride=stride, padding=padding, groups=groups)
    return convolution.conv_plain(x, kernel, stride=stride, padding=padding, groups=groups)


def gelu(x: jax.Array) -> jax.Array:
    """Compute GELU exactly, by the error function, as torch.nn.functional.gelu does.

    jax's default is the tanh approximation, which differs by up to 4.7e-4.

    Args:
      x: Array of any shape.

    Returns:
      x (1 + erf(x / sqrt(2))) / 2, in the shape and dtype of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> [f"{value:.4f}" for value in layers.gelu(jnp.array([-1.0, 0.0, 1.0]))]
      ['-0.1587', '0.0000', '0.8413']
    """
    if choice.is_fast_on_gpu():
        return gelu_recomputed(x)
    return gelu_by_slope(x) if choice.is_fast_on_cpu() else gelu_plain(x)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Compute scaled dot-product attention, softmax(q kᵀ / sqrt(D)) v, with the softmax in at least float32.

    The plain implementation is not `jax.nn.dot_product_attention`, whose softmax is float32 for float64 inputs too
    (an error of 1e-7).

    Args:
      query: (B, h, N, D): heads before tokens, so that both products are plain batched ones.
      key: (B, h, M, D).
      value: (B, h, M, D).

    Returns:
      (B, h, N, D) in the dtype of `query`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> query, key = jnp.ones((2, 1, 3, 4)), jnp.ones((2, 1, 5, 4))
      >>> layers.attention(query, key, key).shape
      (2, 1, 3, 4)
    """
    if choice.is_fast_on_gpu():
        if attention_kernels.cudnn_has(query):
            return attention_kernels.attention_by_cudnn(query, key, value)
        return attention_kernels.attention_recomputed(query, key, value)
    (B, h, N, _), M = query.shape, key.shape[2]
    # The number of scores is unknown for the symbolic sizes of an export.
    if not choice.is_fast_on_cpu() or not all(isinstance(size, int) for size in (B, N, M)):
        return attention_kernels.attention_plain(query, key, value)
    rows = max(1, attention_kernels.MOST_SCORES // (B * h * M))
    if rows >= N:
        return attention_kernels.attention_recomputed(query, key, value)
    return attention_kernels.attention_by_rows(query, key, value, rows=-(-N // -(-N // rows)))


def resize(x: jax.Array, size: Sequence[int], *, align_corners: bool = False) -> jax.Array:
    """Resize bilinearly, as torch.nn.functional.interpolate(mode="bilinear", size=size) does, without antialiasing.

    Args:
      x: (B, h, w, C).
      size: (H, W) of the result.
      align_corners: True aligns the centres of the corner pixels; False (torch's default) aligns the outer edges.

    Returns:
      (B, H, W, C) in the dtype of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> x = jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1)
      >>> layers.resize(x, (1, 4)).ravel().tolist()
      [0.0, 0.25, 0.75, 1.0]
      >>> layers.resize(x, (1, 3), align_corners=True).ravel().tolist()
      [0.0, 0.5, 1.0]
    """
    if x.shape[1:3] == tuple(size):
        return x
    if align_corners:
        return resize_aligned(x, size)
    height, width = (new // old if new % old == 0 else 0 for old, new in zip(x.shape[1:3], size, strict=True))
    if height and width and choice.is_fast_on_gpu():
        return resize_by_repeats(x, (height, width))
    if height and width and choice.is_fast_on_cpu():
        return resize_by_phases(x, (height, width))
    return resize_plain(x, size)


def upsample_nearest(x: jax.Array, factor: int) -> jax.Array:
    """Repeat each pixel, as torch.nn.Upsample(mode="nearest", scale_factor=factor) does.

    Args:
      x: (B, H, W, C).
      factor: Whole factor of both axes.

    Returns:
      (B, H * factor, W * factor, C).

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.upsample_nearest(jnp.array([0, 1]).reshape(1, 1, 2, 1), 2)[0, :, :, 0].tolist()
      [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def once(x: jax.Array) -> jax.Array:
    """Return the same array, computed once for all its readers, also in the backward pass; see `units.once`.

    Args:
      x: Array of any shape.

    Returns:
      `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.once(jnp.array([1.0, 2.0])).tolist()
      [1.0, 2.0]
    """
    return units.once(x) if choice.is_fast_on_cpu() else x


def residual(x: jax.Array, branch: jax.Array) -> jax.Array:
    """Add a branch to its shortcut; the sum is computed once for all its readers.

    Args:
      x: Shortcut, of any shape.
      branch: Array of the same shape.

    Returns:
      x + branch.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.residual(jnp.array([1.0]), jnp.array([2.0])).tolist()
      [3.0]
    """
    return once(x + branch)


def recomputed(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Make the backward pass of a function recompute its intermediate values, on a GPU only.

    This suits elementwise functions whose result is as large as their input and feeds a product that must keep it.

    Args:
      function: Function of one array.

    Returns:
      Function with the same values and gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.recomputed(jnp.square)(jnp.array([3.0])).tolist()
      [9.0]
    """
    return jax.checkpoint(function) if choice.is_fast_on_gpu() else function
