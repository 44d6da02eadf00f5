"""The precision of norms, softmax and logits."""

from __future__ import annotations

import jax.numpy as jnp


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float32 for narrower floating types, else the type itself: the precision of norms, softmax and logits."""
    return jnp.promote_types(dtype, jnp.float32)
