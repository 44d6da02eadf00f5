"""Sequences of layers in the forms that XLA's CPU backend runs fastest: few passes over memory, rows by rows.

XLA:CPU runs one operation after another, each over its whole map. A map of a network's first stage has 8 to 64 MiB:
what one operation leaves is out of the cache before the next one reads it. Here a network's widest parts go through
bands of rows small enough to stay there, and what stands between two products is one or two passes instead of five.

Every function has its plain form beside it; `parity/test_rows.py` holds the two equal. Arrays are (B, H, W, C); a
"unit" is what `layers.compiled_apart` makes: a function that XLA neither splits nor fuses with its readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from segjax.models import layers

# Bytes of the widest map of a band. SegFormer-B0's inference, over that without bands: of 1 MiB 0.91, 2 0.89, 4 0.87,
# 8 0.88, 16 0.88.
BAND_BYTES = 2**22


# ------------------------------------------------------------------------------- linear, depthwise 3x3, GELU, linear


def feed_forward(
    first,
    depthwise: layers.Conv,
    last,
    x: jax.Array,
    *,
    in_steps: Callable[[jax.Array], jax.Array],
    pointwise: layers.Conv | None = None,
) -> jax.Array:
    """in_steps(x) = last(gelu(pointwise(depthwise(first(x))))), the feed-forward network of every encoder here.

    On a CPU in bands of rows. Two cores, with / without: 32 to 256 and back to 32 channels at 128x128 pixels 0.53, 64
    to 512 at 64x64 0.74.

    Args:
      first, last: Linear, or Conv of 1x1. depthwise: 3x3, one or several outputs of each channel. pointwise: 1x1, or
        None for nothing. All with biases.
      x: (B, H, W, C).
      in_steps: calls the layers one by one.

    Returns:
      (B, H, W, out).
    """
    if not layers.fast_cpu_forms() or not all(isinstance(side, int) for side in x.shape):
        return in_steps(x)
    dtype = first.dtype
    parts = dict(first=first, depthwise=depthwise, pointwise=pointwise, last=last)
    arrays = {
        name: (layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype))
        for name, layer in parts.items()
        if layer is not None
    }
    return feed_forward_by_rows(arrays, x.astype(dtype))


@jax.custom_vjp
def feed_forward_by_rows(arrays: dict[str, tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """`feed_forward` of kernels and biases by name.

    With a gradient to come, over the whole map in as few passes as can be. Forward and backward, two cores, time of
    this over that of the layers one by one: 32 to 256 channels at 2x64x64 pixels 0.61, 64 to 512 at 2x32x32 0.72, 160
    to 640 at 2x16x16 0.96.
    """
    (kernel1, bias1), (taps, bias2) = arrays["first"], arrays["depthwise"]
    # Where a channel has several outputs, the product gives each of them a copy.
    kernel1 = jnp.repeat(_matrix(kernel1), taps.shape[-1] // bias1.size, axis=-1)
    bias1 = jnp.repeat(bias1, taps.shape[-1] // bias1.size)

    def after(hidden):
        if "pointwise" in arrays:
            kernel, bias = arrays["pointwise"]
            hidden = _activated(jnp.matmul(_biased_taps(hidden, taps, bias2), _matrix(kernel)), bias)
        else:
            hidden = _activated_taps(hidden, taps, bias2)
        kernel, bias = arrays["last"]
        return jnp.matmul(hidden, _matrix(kernel)) + bias

    B, H, W, _ = x.shape
    bands = min(H, -(-B * H * W * kernel1.shape[1] * x.dtype.itemsize // BAND_BYTES))
    if bands == 1:
        return after(_biased_and_padded(jnp.matmul(x, kernel1), bias1))
    rows = -(-H // bands)
    bands = -(-H // rows)
    # Each band with a row more above and below.
    reaching = jnp.pad(x, ((0, 0), (1, 1 + bands * rows - H), (0, 0), (0, 0)))

    def band(number):
        part = lax.dynamic_slice_in_dim(reaching, number * rows, rows + 2, axis=1)
        row = number * rows - 1 + jnp.arange(rows + 2)
        # The convolution is padded with zeros, where a row outside the image would hold the bias.
        inside = ((row >= 0) & (row < H)).astype(x.dtype)[:, None, None]
        return after(_biased_and_padded_aside(jnp.matmul(part, kernel1), bias1, inside))

    out = lax.map(band, jnp.arange(bands))  # (bands, B, rows, W, out)
    return jnp.moveaxis(out, 0, 1).reshape(B, bands * rows, W, -1)[:, :H]


def _feed_forward_forward(arrays, x):
    """Over the whole map, and what the backward pass needs of it."""
    (kernel1, bias1), (taps, bias2), (kernel3, bias3) = (arrays[name] for name in ("first", "depthwise", "last"))
    outputs = taps.shape[-1] // bias1.size
    hidden = _repeated_and_padded(jnp.matmul(x, _matrix(kernel1)), bias1, outputs)
    mixed = summed = _biased_taps(hidden, taps, bias2)
    if "pointwise" in arrays:
        kernel, bias = arrays["pointwise"]
        mixed = jnp.matmul(summed, _matrix(kernel)) + bias
    active = layers.gelu_unit(mixed)
    return jnp.matmul(active, _matrix(kernel3)) + bias3, (arrays, x, hidden, summed, mixed, active)


def _feed_forward_backward(kept, gradient):
    arrays, x, hidden, summed, mixed, active = kept
    (_, bias1), (taps, _) = arrays["first"], arrays["depthwise"]
    gradients = {}

    def through(name, x, gradient):
        """Notes the gradients of a product's kernel and bias; gives that of its input."""
        kernel, _ = arrays[name]
        of_kernel = jnp.matmul(_flat(x).T, _flat(gradient)).reshape(kernel.shape)
        gradients[name] = of_kernel, jnp.sum(gradient, axis=(0, 1, 2))
        return jnp.matmul(gradient, _matrix(kernel).T)

    gradient = through("last", active, gradient)
    if "pointwise" in arrays:
        gradient = _padded(through("pointwise", summed, layers.times_slope_of_gelu(mixed, gradient)))
    else:
        gradient = _padded_times_slope(mixed, gradient)
    # The zeros around it add nothing.
    gradients["depthwise"] = layers.sums_of_products(hidden, gradient, taps), jnp.sum(gradient, axis=(0, 1, 2))
    gradient = _taps(gradient, taps[::-1, ::-1])
    if (outputs := taps.shape[-1] // bias1.size) > 1:
        gradient = gradient.reshape(*gradient.shape[:3], bias1.size, outputs).sum(axis=-1)
    return gradients, through("first", x, gradient)


feed_forward_by_rows.defvjp(_feed_forward_forward, _feed_forward_backward)


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _matrix(kernel):
    return kernel.reshape(kernel.shape[-2:])


@layers.compiled_apart
def _biased_and_padded(x, bias):
    return layers.padded(x + bias, (3, 3))


def _repeated_and_padded(x, bias, outputs):
    return _biased_and_padded(jnp.repeat(x, outputs, axis=-1), jnp.repeat(bias, outputs))


@layers.compiled_apart
def _padded(x):
    return layers.padded(x, (3, 3))


@layers.compiled_apart
def _padded_times_slope(x, gradient):
    return layers.padded(layers.times_slope(x, gradient), (3, 3))


@layers.compiled_apart
def _biased_and_padded_aside(x, bias, inside):
    return layers.padded((x + bias) * inside, (1, 3))


@layers.compiled_apart
def _taps(x, taps):
    return layers.sum_of_taps(x, taps)


@layers.compiled_apart
def _biased_taps(x, taps, bias):
    return layers.sum_of_taps(x, taps) + bias


@layers.compiled_apart
def _activated_taps(x, taps, bias):
    return layers.gelu_plain(layers.sum_of_taps(x, taps) + bias)


@layers.compiled_apart
def _activated(x, bias):
    return layers.gelu_plain(x + bias)


# ---------------------------------------------------------------------------------------------------------- decoders


def decode(
    levels: Sequence[jax.Array],
    fuse: layers.Conv,
    finish: Callable[[jax.Array], jax.Array],
    classifier: layers.Conv,
    *,
    placing: str,
    training: bool,
    fused: Callable[[], jax.Array],
    projections: Sequence[layers.Linear | layers.Conv] | None = None,
) -> jax.Array:
    """classify(finish(fused())), in evaluation on a CPU in bands of rows: levels -> logits (B, H, W, K).

    Two cores, with / without, and MiB of temporaries: SegFormer-B0's decoder for 1x512x512 0.65, 80 -> 17; for
    1x1024x2048 0.57, 640 -> 84; B2's for 1x512x512 0.64, 240 -> 31.

    Args:
      levels: maps (B, h, w, C_level), in the order in which they are concatenated.
      fuse: 1x1 convolution over the enlarged and concatenated levels, or their `projections`, where there are some.
      finish: what stands between it and the classifier, element by element unless `training`.
      placing: how levels are enlarged: "half" pixels, "aligned" corners, or the "nearest" pixel.
      training: finish takes the map as a whole.
      fused: computes the convolution in steps.
    """
    if training or not layers.fast_cpu_forms() or not _are_multiples([x.shape for x in levels]):
        return layers.classify(classifier, finish(fused()))
    dtype = fuse.dtype
    levels = [x.astype(dtype) for x in levels]
    if projections is None:
        kernels, bias = layers.slices_by_level(fuse, levels), jnp.zeros((), dtype)
    else:
        kernels, biases = layers.fused_projections(projections, fuse)
        bias = sum(biases)
    if fuse.bias is not None:
        bias = bias + fuse.bias[...].astype(dtype)
    return decode_by_rows(levels, kernels, bias, finish, classifier, placing=placing)


def _are_multiples(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether one map is the largest and its sides are whole multiples of all others'."""
    if not all(isinstance(side, int) for shape in shapes for side in shape):
        return False
    largest = max(shape[1:3] for shape in shapes)
    others = [shape[1:3] for shape in shapes if shape[1:3] != largest]
    return len(others) == len(shapes) - 1 > 0 and all(
        large % small == 0 for other in others for large, small in zip(largest, other, strict=True)
    )


def decode_by_rows(
    levels: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    bias: jax.Array,
    finish: Callable[[jax.Array], jax.Array],
    classifier: layers.Conv,
    *,
    placing: str,
) -> jax.Array:
    """`decode` of kernels (C_level, C) and a bias (C,): nothing as large as an enlarged level is ever written.

    Each band reads the few rows of every level that it depends on, and one unit enlarges them and adds them up.
    """
    height, width = (max(x.shape[axis] for x in levels) for axis in (1, 2))
    base, coarse = None, []
    for x, kernel in zip(levels, kernels, strict=True):
        if x.shape[1:3] == (height, width):
            assert base is None, "one level is the largest"
            base = x, kernel
            continue
        y = jnp.matmul(x, kernel)
        coarse.append(
            (
                jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge"),
                *(blends(old, new // old, placing) for old, new in zip(x.shape[1:3], (height, width), strict=True)),
            )
        )
    # Of 28, 14, 7 and 4 rows, an image of 112, no factor is a multiple of all others.
    step = math.lcm(*(height // (y.shape[1] - 2) for y, *_ in coarse))
    B, dtype = len(levels[0]), kernels[0].dtype
    row_bytes = B * width * kernels[0].shape[1] * dtype.itemsize
    steps = [number for number in range(1, height // step + 1) if height // step % number == 0]
    rows = step * max(number for number in steps if number == 1 or number * step * row_bytes <= BAND_BYTES)

    def band(number):
        x, kernel = base
        part = jnp.matmul(lax.dynamic_slice_in_dim(x, number * rows, rows, axis=1), kernel)
        tall = [_taller(y, down, number, rows) for y, down, _ in coarse]

        @layers.compiled_apart
        def finished(part, bias, *tall):
            total = part + bias
            for y, (_, _, across) in zip(tall, coarse, strict=True):
                wide = sum(
                    y[:, :, tap : tap + len(weights), None] * jnp.asarray(weights, dtype)[:, :, None]
                    for tap, weights in enumerate(across)
                    if weights.any()
                )  # (B, rows, w, f, C)
                total = total + wide.reshape(total.shape)
            return finish(total)

        return layers.classify(classifier, finished(part, bias, *tall))

    if rows == height:
        return band(0)
    out = lax.map(band, jnp.arange(height // rows))  # (bands, B, rows, W, K)
    return jnp.moveaxis(out, 0, 1).reshape(B, height, width, -1)


def blends(length: int, factor: int, placing: str) -> np.ndarray:
    """How an axis is enlarged by a whole factor: weights (3, length, factor) of the pixel before, the same, the next.

    Pixel factor * j + p of the result blends pixels j - 1, j and j + 1; beyond the ends the last pixel is repeated.
    """
    before, pixel = np.arange(factor), np.arange(length)[:, None]
    if placing == "half":
        offset = (before + 0.5) / factor - 0.5 + 0 * pixel
    elif placing == "aligned":
        offset = (before * (length - 1) - pixel * (factor - 1)) / max(length * factor - 1, 1)
    else:
        offset = 0.0 * before * pixel
    return np.stack([np.maximum(-offset, 0), 1 - np.abs(offset), np.maximum(offset, 0)])


def _taller(y: jax.Array, weights: np.ndarray, number: jax.Array, rows: int) -> jax.Array:
    """Rows [number * rows, (number + 1) * rows) of a level (B, h + 2, w + 2, C) enlarged along its first axis."""
    factor = weights.shape[-1]
    own = rows // factor
    part = lax.dynamic_slice_in_dim(y, number * own, own + 2, axis=1)
    taps = [tap for tap in range(3) if weights[tap].any()]
    table = lax.dynamic_slice_in_dim(jnp.asarray(weights[taps], y.dtype), number * own, own, axis=1)

    @layers.compiled_apart
    def enlarged(part, table):
        total = sum(
            part[:, tap : tap + own, None] * table[place, :, :, None, None] for place, tap in enumerate(taps)
        )  # (B, own, f, w + 2, C)
        return total.reshape(len(part), rows, *part.shape[2:])

    return enlarged(part, table)
