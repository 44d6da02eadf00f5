"""Reductions over the classes of bilinearly upsampled logits, without the upsampled logits in memory, for GPUs.

In upsampling by a whole factor f with half-pixel centres, the f * f outputs between four neighbouring pixels of the
small map blend these four pixels with f * f constant sets of weights. The kernel that reduces over the classes computes
such a cell of outputs from its four corners. It reads only the small map; the upsampled map of 150 classes would be by
far the largest array of a training step. The backward pass recomputes the outputs and adds up the gradients of a cell's
outputs at its corners.

XLA:GPU fuses an operation into a reduction or a sum if only one operation reads its result. This explains the code:
one reduction has an operand for each output of a cell, and one complex number holds two of the four corners. Compiled
for an H200, the roofline of 32x512x512 pixels and 150 classes, forward and backward, falls from 22.5 to 3.6 ms
(`benchmarks/gpu_static.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import resize

MOST_OUTPUTS = 64  # per cell
PARTS = 16  # groups of rows, for logits that are not upsampled by whole factors
OPERANDS = 16  # per reduction: with 64, XLA stores the outputs instead of fusing them


def applies(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether logits of `shape` (B, h, w, K) with K > 1 are upsampled to `size` (H, W) by whole factors above 1."""
    batch, height, width, num_classes = shape
    if not all(isinstance(side, int) for side in (*shape, *size)):
        return False
    if size[0] % height or size[1] % width or num_classes == 1 or not batch:
        return False
    factors = size[0] // height, size[1] // width
    return min(factors) > 1 and factors[0] * factors[1] <= MOST_OUTPUTS


# ------------------------------------------------------------------------------------------------------- cross-entropy


@jax.custom_vjp
def normaliser_and_chosen(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log Σ exp over the classes, and the logit of the label, of logits upsampled to the size of the labels.

    Their difference is the cross-entropy of each pixel. The upsampling equals `resize_plain`.

    Args:
      logits: (B, h, w, K), float32 or wider, for which `applies` holds.
      labels: Integers (B, H, W). A label that is not a class has a logit of 0 without gradient.

    Returns:
      Two arrays (B, H, W) of the logits' dtype.
    """
    return _forward(logits, labels)[0]


def _forward(logits, labels):
    cells = _Cells(logits.shape, labels.shape[1:])
    corners = cells.corners(logits)
    # The largest logit of the outputs, not of the corners: if corners differ by hundreds, all powers would be 0.
    largest = _reduced(cells.outputs(corners), jnp.maximum, -jnp.inf)
    # The barrier makes XLA recompute the outputs instead of storing them.
    again = cells.outputs(lax.optimization_barrier(corners))
    powers = [jnp.exp(output - one[..., None]) for output, one in zip(again, largest, strict=True)]
    normaliser = jnp.stack(largest) + jnp.log(jnp.stack(_reduced(powers, jnp.add, 0)))  # (F, B, h + 1, w + 1)
    chosen = cells.chosen(corners, labels)
    return (cells.as_map(normaliser), cells.as_map(chosen)), (logits, labels, normaliser)


def _backward(kept, gradients):
    logits, labels, normaliser = kept
    cells = _Cells(logits.shape, labels.shape[1:])
    of_normaliser, of_chosen = (cells.of_map(gradient)[..., None] for gradient in gradients)
    is_label = cells.of_map(labels)[..., None] == jnp.arange(logits.shape[-1], dtype=labels.dtype)
    slopes = [
        jnp.exp(output - normaliser[n, ..., None]) * of_normaliser[n] + jnp.where(is_label[n], of_chosen[n], 0)
        for n, output in enumerate(cells.outputs_by_rows(cells.corners(logits)))
    ]
    return cells.to_pixels(slopes), None


normaliser_and_chosen.defvjp(_forward, _backward)


def _reduced(arrays: Sequence[jax.Array], combine: Callable, start: float) -> list[jax.Array]:
    """Each array reduced over its last axis."""

    def combined(ones, others):
        return tuple(combine(one, other) for one, other in zip(ones, others, strict=True))

    found = []
    for part in _in_parts(arrays):
        starts = tuple(jnp.asarray(start, array.dtype) for array in part)
        found += lax.reduce(tuple(part), starts, combined, (part[0].ndim - 1,))
    return found


def _in_parts(arrays: Sequence[jax.Array]) -> list[Sequence[jax.Array]]:
    return [arrays[start : start + OPERANDS] for start in range(0, len(arrays), OPERANDS)]


def normaliser_and_chosen_by_rows(
    logits: jax.Array, labels: jax.Array, *, align_corners: bool
) -> tuple[jax.Array, jax.Array]:
    """`normaliser_and_chosen` for any sizes and both conventions, in `PARTS` groups of rows; K > 1.

    The backward pass upsamples again.
    """
    height, width = labels.shape[1:]
    rows = -(-height // PARTS)
    parts = -(-height // rows)
    by_row = resize.matrix(logits.shape[1], height, logits.dtype, align_corners=align_corners)
    by_row = jnp.pad(by_row, ((0, parts * rows - height), (0, 0)), mode="edge").reshape(parts, rows, -1)
    by_column = resize.matrix(logits.shape[2], width, logits.dtype, align_corners=align_corners)
    padded = jnp.pad(labels, ((0, 0), (0, parts * rows - height), (0, 0)))
    by_part = jnp.moveaxis(padded.reshape(len(labels), parts, rows, width), 1, 0)
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)

    @jax.checkpoint
    def part(given):
        matrix, labels = given
        upsampled = resize.by_matrices(logits, matrix, by_column)
        chosen = jnp.where(labels[..., None].astype(jnp.int32) == classes, upsampled, 0)
        return jax.nn.logsumexp(upsampled, axis=-1), jnp.sum(chosen, axis=-1)

    def whole(parts):
        return jnp.moveaxis(parts, 0, 1).reshape(len(labels), -1, width)[:, :height]

    normaliser, chosen = lax.map(part, (by_row, by_part))
    return whole(normaliser), whole(chosen)


# -------------------------------------------------------------------------------------------------------------- labels


def labels_of(logits: jax.Array, size: Sequence[int]) -> jax.Array:
    """The class of the largest logit, with logits upsampled to `size`: (B, h, w, K) -> int32 (B, H, W).

    As in `jnp.argmax`, the first of equal logits is the largest, and NaN is larger than any number.
    """
    cells = _Cells(logits.shape, size)
    found = []
    for outputs in _in_parts(cells.outputs(cells.corners(logits))):
        number = len(outputs)
        classes = lax.broadcasted_iota(jnp.int32, outputs[0].shape, 3)
        least = [jnp.asarray(-jnp.inf, logits.dtype)] * number + [jnp.asarray(logits.shape[-1], jnp.int32)] * number
        found += lax.reduce((*outputs, *[classes] * number), tuple(least), _larger, (3,))[number:]
    return cells.as_map(jnp.stack(found))


def _larger(ones: Sequence[jax.Array], others: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The larger values and their classes; each argument has the values first and then their classes."""
    number = len(ones) // 2
    firsts = []
    for a, i, b, j in zip(ones[:number], ones[number:], others[:number], others[number:], strict=True):
        are_equal = (a == b) | ((a != a) & (b != b))
        firsts.append((a > b) | ((a != a) & (b == b)) | (are_equal & (i < j)))
    return tuple(lax.select(first, one, other) for first, one, other in zip(2 * firsts, ones, others, strict=True))


# --------------------------------------------------------------------------------------------------------------- cells


class _Cells:
    """The outputs of an upsampling from (h, w) by factors (fy, fx), in (h + 1, w + 1) cells of F = fy * fx each.

    A cell lies between the centres of four pixels. Cells at a border reach beyond the image: edge pixels are repeated
    there, and the outputs are padding. With an odd factor, the first output of a cell lies in the centre of a pixel.
    """

    def __init__(self, shape: Sequence[int], size: Sequence[int]):
        self._batch, *self._small = shape[:3]
        self._size = tuple(size)
        self._factors = tuple(new // old for old, new in zip(self._small, size, strict=True))
        # Weight of the second of two neighbours in each output between them.
        self._shares = [[(n + (0.5 if f % 2 == 0 else 0)) / f for n in range(f)] for f in self._factors]

    def corners(self, x: jax.Array) -> list[jax.Array]:
        """Upper left, upper right, lower left, lower right corners: (B, h, w, ...) -> 4 * (B, h + 1, w + 1, ...)."""
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), *((0, 0),) * (x.ndim - 3)), mode="edge")
        height, width = self._small
        return [padded[:, i : i + height + 1, j : j + width + 1] for i in (0, 1) for j in (0, 1)]

    def outputs(self, corners: Sequence[jax.Array]) -> list[jax.Array]:
        """The F outputs, row by row, (B, h + 1, w + 1, ...) each. Each intermediate result is read only once."""
        return [
            (1 - y) * (1 - x) * corners[0] + (1 - y) * x * corners[1] + y * (1 - x) * corners[2] + y * x * corners[3]
            for y in self._shares[0]
            for x in self._shares[1]
        ]

    def outputs_by_rows(self, corners: Sequence[jax.Array]) -> list[jax.Array]:
        """`outputs` in fewer operations, for kernels that compute all outputs of a cell at once."""
        found = []
        for y in self._shares[0]:
            left, right = ((1 - y) * corners[n] + y * corners[n + 2] for n in (0, 1))
            found += [(1 - x) * left + x * right for x in self._shares[1]]
        return found

    def chosen(self, corners: Sequence[jax.Array], labels: jax.Array) -> jax.Array:
        """The output of the label's class, (F, B, h + 1, w + 1); 0 for a label that is not a class."""
        num_classes = corners[0].shape[-1]
        of_cells = jnp.moveaxis(self.of_map(labels), 0, -1).astype(jnp.int32)
        parts = [jnp.take_along_axis(corner, of_cells, axis=-1, mode="clip") for corner in corners]
        by_output = zip(*(jnp.moveaxis(part, -1, 0) for part in parts), strict=True)
        blended = [self.outputs(part)[n] for n, part in enumerate(by_output)]
        is_class = (of_cells >= 0) & (of_cells < num_classes)
        return jnp.where(jnp.moveaxis(is_class, -1, 0), jnp.stack(blended), 0)

    def of_map(self, x: jax.Array) -> jax.Array:
        """(B, H, W) -> (F, B, h + 1, w + 1), with zeros as padding."""
        (fy, fx), (h, w) = self._factors, self._small
        around = [(f - f // 2, f // 2) for f in self._factors]
        cells = jnp.pad(x, ((0, 0), *around)).reshape(self._batch, h + 1, fy, w + 1, fx)
        return cells.transpose(2, 4, 0, 1, 3).reshape(fy * fx, self._batch, h + 1, w + 1)

    def as_map(self, cells: jax.Array) -> jax.Array:
        """The inverse of `of_map`."""
        (fy, fx), (h, w) = self._factors, self._small
        apart = cells.reshape(fy, fx, self._batch, h + 1, w + 1).transpose(2, 3, 0, 4, 1)
        top, left = (f - f // 2 for f in self._factors)
        padded = apart.reshape(self._batch, (h + 1) * fy, (w + 1) * fx)
        return padded[:, top : top + self._size[0], left : left + self._size[1]]

    def to_pixels(self, outputs: Sequence[jax.Array]) -> jax.Array:
        """The transpose of `outputs` and `corners`: F times (B, h + 1, w + 1, K) -> (B, h, w, K)."""
        of_row = len(self._shares[1])
        sums = []  # per row of outputs: left corner as real part, right corner as imaginary part
        for number in range(len(self._shares[0])):
            parts = zip(self._shares[1], outputs[number * of_row : (number + 1) * of_row], strict=True)
            sums.append(reduce(operator.add, (lax.complex((1 - x) * part, x * part) for x, part in parts)))
        upper, lower = (
            reduce(operator.add, (share * row for share, row in zip(shares, sums, strict=True)))
            for shares in ([1 - y for y in self._shares[0]], self._shares[0])
        )
        a, b, c, d = upper.real, upper.imag, lower.real, lower.imag
        height, width = self._small
        total = a[:, 1:, 1:] + b[:, 1:, :-1] + c[:, :-1, 1:] + d[:, :-1, :-1]
        # Corners beyond an edge are repeated edge pixels.
        rows = (a[:, :1, 1:] + b[:, :1, :-1], c[:, -1:, 1:] + d[:, -1:, :-1])
        columns = (a[:, 1:, :1] + c[:, :-1, :1], b[:, 1:, -1:] + d[:, :-1, -1:])
        angles = (a[:, :1, :1], b[:, :1, -1:], c[:, -1:, :1], d[:, -1:, -1:])
        for number, part in enumerate((*rows, *columns, *angles)):
            top = (0, height - 1, 0, 0, 0, 0, height - 1, height - 1)[number]
            left = (0, 0, 0, width - 1, 0, width - 1, 0, width - 1)[number]
            below, beside = height - part.shape[1] - top, width - part.shape[2] - left
            total += jnp.pad(part, ((0, 0), (top, below), (left, beside), (0, 0)))
        return total
