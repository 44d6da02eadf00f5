"""Attention, plain and over tiles of query rows, which is as far as XLA:CPU has a fused attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import precision


def attention_plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """All scores (B, h, N, M) at once."""
    wide = precision.at_least_float32(query.dtype)
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = jnp.einsum("bhnd,bhmd->bhnm", scaled, key, preferred_element_type=wide)  # (B, h, N, M)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value)


# 64 MiB in float32. An image of 1024x2048 has 1 GiB of them in SegFormer's first stage, whose time is the same in parts
# of this size; that of its second falls by a fifth.
MOST_SCORES = 2**24


def attention_by_rows(query: jax.Array, key: jax.Array, value: jax.Array, *, rows: int) -> jax.Array:
    """The same for `rows` queries after another; the backward pass computes the scores again."""
    B, h, N, D = query.shape
    parts = -(-N // rows)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, parts * rows - N), (0, 0)))
    by_part = jnp.moveaxis(padded.reshape(B, h, parts, rows, D), 2, 0)
    mixed = lax.map(jax.checkpoint(lambda part: attention_plain(part, key, value)), by_part)  # (parts, B, h, rows, D)
    return jnp.moveaxis(mixed, 0, 2).reshape(B, h, parts * rows, D)[:, :, :N]
