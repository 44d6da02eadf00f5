"""Losses at the resolution of the labels, as sums and counts: means are taken once, over the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from segjax.models import layers


def cross_entropy(logits: jax.Array, labels: jax.Array, *, ignore_label: int) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(label) over all pixels that count, and how many those are.

    The logits are enlarged to the labels' size first (bilinear, align_corners False), as every published recipe does.

    Args:
      logits: (B, h, w, K), float32 or wider. K = 1 is a binary model: sigmoid, labels 0 and 1.
      labels: (B, H, W) integers; `ignore_label` does not count.

    Returns:
      Scalar sum in the dtype of `logits` and scalar int32 count. Nothing to count gives (0, 0).
    """
    logits = layers.resize(logits, labels.shape[1:3])
    valid = labels != ignore_label
    labels = labels.astype(jnp.int32)
    if logits.shape[-1] == 1:
        score = logits[..., 0]
        # -log sigmoid(±score) without overflow.
        loss = jnp.logaddexp(0, jnp.where(labels == 1, -score, score))
    else:
        # A comparison instead of a gather: its gradient is a subtraction, where a gather's is a scatter.
        chosen = labels[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
        loss = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    return jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(valid, dtype=jnp.int32)


def predictions(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Train ids (B, H, W), int32: logits enlarged in float32 to `size`, then argmax (K = 1: probability above 0.5)."""
    logits = layers.resize(logits, size)
    if logits.shape[-1] == 1:
        return (logits[..., 0] > 0).astype(jnp.int32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
