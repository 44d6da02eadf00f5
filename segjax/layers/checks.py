"""Checks of a model's settings and inputs, and the names of its feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType


def feature_taps(features: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Name an encoder's maps `feature0` (the largest), `feature1` and so on.

    Args:
      features: Maps (B, h, w, C_level), the largest first.

    Returns:
      The maps by name.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> sorted(layers.feature_taps([jnp.ones((2, 8, 12, 3)), jnp.ones((2, 4, 6, 5))]))
      ['feature0', 'feature1']
    """
    return {f"feature{i}": feature for i, feature in enumerate(features)}


def require_four(**settings: Sequence) -> None:
    """Check that each setting has one number for each of the four stages.

    Args:
      **settings: Numbers by the name of the setting.

    Raises:
      ValueError: A setting has another length or is a single number.

    Example:
      >>> from segjax import layers
      >>> layers.require_four(depths=(2, 2, 2, 2))
    """
    for name, value in settings.items():
        if not isinstance(value, Sequence) or len(value) != 4:
            raise ValueError(f"{name} needs four numbers, one per stage; got {value}")


def require_whole_heads(dims: Sequence[int], num_heads: Sequence[int]) -> None:
    """Check that the number of heads divides the width of each stage.

    Args:
      dims: Width of each stage.
      num_heads: Number of attention heads of each stage.

    Raises:
      ValueError: A width is not a multiple of its number of heads.

    Example:
      >>> from segjax import layers
      >>> layers.require_whole_heads((32, 64), (1, 2))
    """
    for stage, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
        if dim % heads:
            raise ValueError(f"stage {stage + 1}: width {dim} does not divide into {heads} heads; set num_heads")


def require_images(images: jax.Array, *, channels: int, multiple: int = 1) -> None:
    """Check the shape and the sharding of images that a model receives.

    Args:
      images: (B, H, W, C).
      channels: Number of channels C that the model takes.
      multiple: Number that must divide H and W.

    Raises:
      ValueError: `images` have another rank or number of channels, an empty side, or a side that is not a multiple;
        or they are sharded over explicit axes of a mesh that `jax.set_mesh` has not set.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.require_images(jnp.ones((2, 64, 96, 3)), channels=3, multiple=32)
    """
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(f"images must be (B, H, W, {channels}); got {images.shape}")
    if any(side % multiple or not side for side in images.shape[1:3]):
        height, width = (-(-side // multiple) * multiple for side in images.shape[1:3])
        raise ValueError(
            f"this model takes images whose height and width divide by {multiple}; got {images.shape[1]}x"
            f"{images.shape[2]}. Pad or crop them, for example to {height}x{width}"
        )
    # The mesh that is set decides which implementations run. Those with custom gradients state no shardings.
    explicit = {AxisType.Explicit}
    if explicit & set(_mesh_of(images).axis_types) and not explicit & set(jax.sharding.get_abstract_mesh().axis_types):
        raise ValueError(
            "images are sharded over a mesh with explicit axes, which is not set. Call the model inside `with "
            "jax.set_mesh(mesh):`, or make the mesh with axis_types=(jax.sharding.AxisType.Auto,)"
        )


def _mesh_of(x: jax.Array) -> jax.sharding.AbstractMesh:
    return jax.typeof(x).sharding.mesh
