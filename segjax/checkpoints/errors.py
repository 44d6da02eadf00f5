"""The error for checkpoints that cannot be used, and helpers for its messages."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from segjax.runtime import console


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, used or written; the message lists every problem."""


def torch_module() -> ModuleType:
    """The module torch. Raises CheckpointError if PyTorch is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        raise CheckpointError(
            "writing a .pth needs PyTorch, which is not installed: "
            'pip install "segjax[parity]" (or write a .safetensors, which needs nothing)'
        ) from None
    return torch


def shorten(names: Iterable[str], most: int = 12) -> str:
    names = [console.one_line(name, most=100) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
