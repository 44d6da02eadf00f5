"""Checks of a model's settings and inputs, and the names of its feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import jax


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


def require_images(images: jax.Array, *, channels: int, multiple: int = 1) -> None:
    """Raises ValueError unless `images` are (B, H, W, channels) whose sides divide by `multiple`."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(f"images must be (B, H, W, {channels}); got {images.shape}")
    if any(side % multiple or not side for side in images.shape[1:3]):
        height, width = (-(-side // multiple) * multiple for side in images.shape[1:3])
        raise ValueError(
            f"this model takes images whose height and width divide by {multiple}; got {images.shape[1]}x"
            f"{images.shape[2]}. Pad or crop them, for example to {height}x{width}"
        )
