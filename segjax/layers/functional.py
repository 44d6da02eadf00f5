"""Operations without parameters, and which implementation of each runs. The table lists every choice.

| operation | on a CPU | on a GPU |
|---|---|---|
| `conv`, 1x1, stride 1, no padding, no groups | matrix product | matrix product |
| `conv`, kernel as large as its stride, no padding, no groups | `convolution.conv_of_patches` | XLA |
| `conv`, depthwise, stride 1, size kept, odd kernel | `convolution.depthwise` | XLA |
| `conv`, any other, weights prepared | XLA | `convolution.conv_by_output` |
| `conv`, any other | XLA (`convolution.conv_plain`) | XLA |
| `conv_norm`, running statistics | layer by layer | one convolution (`layers.norm`) |
| `gelu` | `gelu.gelu_by_slope` | `gelu.gelu_recomputed` |
| `attention`, bfloat16 or float16, widths by eights to 128 | as any other | cuDNN (`attention.attention_by_cudnn`) |
| `attention`, static sizes, more than `MOST_SCORES` scores | `attention.attention_by_rows` | as any other |
| `attention`, any other | XLA (`attention.attention_plain`) | `attention.attention_recomputed` |
| `resize`, `align_corners=False`, whole factors | `resize.resize_by_phases` | `resize.resize_by_phases` |
| `resize`, `align_corners=True` | `resize.resize_aligned` | `resize.resize_aligned` |
| `resize`, any other | XLA (`resize.resize_plain`) | XLA |
| `residual`, `once` | `units.once` | XLA (an addition; nothing) |
| `LayerNorm`; `BatchNorm` in training | XLA (`layers.norm`) | `kernels.norm` |
| feed-forward networks, static sizes | `kernels.feed_forward` (`layers.feed_forward`) | layer by layer |
| decoders, evaluation, static sizes, whole factors | `kernels.decoder` (`layers.decode`) | order of the next row |
| decoders, any other | cheaper order: `project_and_fuse`, `conv1x1_of_resized` | cheaper order |
| patches of the simple SegFormer | one convolution: `embed_by_one_convolution` (its model) | one convolution |
| cross-entropy, no aligned corners, whole factors | `kernels.cross_entropy`, no other term | `kernels.cells` |
| cross-entropies, any other sizes, several classes | XLA (`losses`) | `cells.normaliser_and_chosen_by_rows` |
| labels of whole images, no aligned corners, whole factors | XLA (`inference.engine`) | `cells.labels_of` |
| parameters of a training step | one array each, or `stacked.Stacks` | `stacked.Vectors` |

"XLA" is the plain implementation in jax operations. "On a CPU" is `choice.is_fast_on_cpu`, "on a GPU"
`choice.is_fast_on_gpu`. Every other backend has the plain implementations, and so has a mesh with explicit axes. Inside
`published_implementations()` the products of decoders and patches run in the published order, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from segjax.kernels import attention as attention_kernels
from segjax.kernels import choice, convolution, units
from segjax.kernels.gelu import gelu_by_slope, gelu_plain, gelu_recomputed
from segjax.kernels.resize import resize_aligned, resize_by_phases, resize_plain


def cpu_implementation(fast: Callable) -> Callable:
    """Attaches a fast implementation for CPUs to a method, which itself holds the equation.

    Args:
      fast: function of the method's arguments, `self` included. It returns NotImplemented where it does not apply.
    """
    return _attached(fast, choice.is_fast_on_cpu)


def cheaper_order(fast: Callable) -> Callable:
    """Attaches an equal but cheaper order of products to a method.

    It runs on every platform, except inside `published_implementations()`.

    Args:
      fast: as in `cpu_implementation`.
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


def conv(x: jax.Array, kernel: jax.Array, *, stride: int, padding: tuple[int, int], groups: int) -> jax.Array:
    """Convolution of (B, H, W, in) with an HWIO kernel and explicit zero padding: (B, H', W', out).

    A 1x1 kernel is a matrix product (XLA:CPU: 7.0 ms against 10.9 ms for 270 channels at 128x128).
    """
    kernel_height, kernel_width, in_per_group, out_channels = kernel.shape
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0) and groups == 1:
        return jnp.matmul(x, kernel[0, 0])
    if kernel.shape[:2] == (stride, stride) and padding == (0, 0) and groups == 1 and choice.is_fast_on_cpu():
        return convolution.conv_of_patches(x, kernel)
    if in_per_group == 1 and groups < out_channels:
        # A channel multiplier: the input is repeated, so that each output channel has an input channel of its own. The
        # gradient of the grouped kernel would gather the batch of all devices.
        x, groups = jnp.repeat(x, out_channels // groups, axis=-1), out_channels
    keeps_size = padding == (kernel_height // 2, kernel_width // 2) and kernel_height % 2 and kernel_width % 2
    if in_per_group == 1 and stride == 1 and keeps_size and choice.is_fast_on_cpu():
        return convolution.depthwise(x, kernel)
    if choice.are_weights_prepared() and choice.is_fast_on_gpu():
        return convolution.conv_by_output(x, kernel, stride=stride, padding=padding, groups=groups)
    return convolution.conv_plain(x, kernel, stride=stride, padding=padding, groups=groups)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU by the error function; jax's default is the tanh approximation, which differs by up to 4.7e-4."""
    if choice.is_fast_on_gpu():
        return gelu_recomputed(x)
    return gelu_by_slope(x) if choice.is_fast_on_cpu() else gelu_plain(x)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Scaled dot-product attention, softmax(q kᵀ / sqrt(D)) v, with the softmax in at least float32.

    Args:
      query: (B, h, N, D); key, value: (B, h, M, D). Head-major, so that both products are plain batched ones.

    Returns:
      (B, h, N, D) in the dtype of `query`. `jax.nn.dot_product_attention` is not used: its softmax is float32 even for
      float64 inputs (1e-7).
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
        return attention_kernels.attention_plain(query, key, value)
    return attention_kernels.attention_by_rows(query, key, value, rows=-(-N // -(-N // rows)))


def resize(x: jax.Array, size: Sequence[int], *, align_corners: bool = False) -> jax.Array:
    """torch.nn.functional.interpolate(mode="bilinear", size=size): (B, H, W, C) -> (B, *size, C).

    Args:
      size: (H, W) of the result.
      align_corners: True maps the centres of the corner pixels onto each other; False (torch's default) the outer
        edges of the images.
    """
    if x.shape[1:3] == tuple(size):
        return x
    if align_corners:
        return resize_aligned(x, size)
    factors = [new // old if new % old == 0 else 0 for old, new in zip(x.shape[1:3], size, strict=True)]
    if all(factors) and (choice.is_fast_on_cpu() or choice.is_fast_on_gpu()):
        return resize_by_phases(x, factors)
    return resize_plain(x, size)


def upsample_nearest(x: jax.Array, factor: int) -> jax.Array:
    """torch.nn.Upsample(mode="nearest", scale_factor=factor): (B, H, W, C) -> (B, H * factor, W * factor, C)."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def once(x: jax.Array) -> jax.Array:
    """The same array, computed once and kept for all that read it, in the backward pass too; see `units.once`."""
    return units.once(x) if choice.is_fast_on_cpu() else x


def residual(x: jax.Array, branch: jax.Array) -> jax.Array:
    """x + branch, computed once however many layers read it."""
    return once(x + branch)


def recomputed(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The same function; on a GPU its backward pass computes again what lies between its input and its output.

    For elementwise functions whose result is as large as their input, in front of a product that has to keep it.
    """
    return jax.checkpoint(function) if choice.is_fast_on_gpu() else function
