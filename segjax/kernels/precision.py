"""The precision of norms, softmax and logits."""

from __future__ import annotations

import jax.numpy as jnp


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which norms, softmax and logits are computed.

    Args:
      dtype: Floating type of a layer.

    Returns:
      float32 for narrower types, otherwise the type itself.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.at_least_float32(jnp.bfloat16), layers.at_least_float32(jnp.float64)
      (dtype('float32'), dtype('float64'))
    """
    return jnp.promote_types(dtype, jnp.float32)
