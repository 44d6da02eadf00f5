"""Names and layouts of arrays in segjax and in PyTorch.

The attribute names of segjax's modules are the keys of the published checkpoints, so that one rule converts every
model: `kernel` and `scale` are called `weight` in PyTorch, `mean` and `var` are the running statistics, a convolution
kernel HWIO is transposed to OIHW, and a linear kernel (in, out) to (out, in).
"""

from __future__ import annotations

import numpy as np

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def torch_name(path: str) -> str:
    """ "backbone.norm1.scale" -> "backbone.norm1.weight"; other names are the same in both."""
    module, _, tensor = path.rpartition(".")
    return f"{module}.{_TORCH_NAMES.get(tensor, tensor)}"


def to_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW and (in, out) -> (out, in) for a kernel; other arrays unchanged."""
    if not path.endswith(".kernel"):
        return value
    return np.ascontiguousarray(value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0)))


def from_torch_layout(path: str, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if not path.endswith(".kernel"):
        return value
    return np.ascontiguousarray(value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0)))


def blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes no memory, to rename where only shapes matter."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def blank_of(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """`blank` in PyTorch's layout, for an array of this shape in segjax's."""
    if not path.endswith(".kernel"):
        return blank(shape)
    return blank(shape).transpose((3, 2, 0, 1) if len(shape) == 4 else (1, 0))
