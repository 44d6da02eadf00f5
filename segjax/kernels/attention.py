"""Attention: plain; in blocks of scores, for CPUs; cuDNN's, and with a backward pass of its own, for GPUs."""

from __future__ import annotations

import functools
import logging
import math
import operator
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import precision

logger = logging.getLogger(__name__)


def attention_plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """All scores (B, h, N, M) at once."""
    weights = jax.nn.softmax(_scores(query, key), axis=-1).astype(query.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value)


def _scores(query, key):
    """(B, h, N, M), in at least float32."""
    wide = precision.at_least_float32(query.dtype)
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    return jnp.einsum("bhnd,bhmd->bhnm", scaled, key, preferred_element_type=wide)


# Scores of one head that are computed at a time, 16 MiB in float32; keys of one product.
TILE_SCORES, BLOCK_KEYS = 2**22, 1024
# Up to so many scores, and keys, all at once are as fast on two idle cores.
FEW_SCORES, FEW_KEYS = 2**24, 512


def goes_by_blocks(query: jax.Array, key: jax.Array) -> bool:
    """Whether blocks of scores are faster on a CPU, or the scores would take too much memory. For static sizes."""
    scores = math.prod(query.shape[:3]) * key.shape[2]
    return scores > FEW_SCORES or (key.shape[2] > FEW_KEYS and query.shape[2] > FEW_KEYS)


def attention_by_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, *, rows: int | None = None, keys: int = BLOCK_KEYS
) -> jax.Array:
    """The same one head after the other, `rows` queries at a time, with keys in blocks; scores are not kept.

    Forward on two idle cores, time over that of all scores in tiles of 64 MiB: 131,072 queries and 2,048 keys 0.80, five
    heads of 8,192 and 2,048 0.71, 57,600 and 920 0.94, 25,600 and 400 0.98.

    Args:
      rows: by default as many as have `TILE_SCORES`.
    """
    B, h, N, D = query.shape
    M, dtype = key.shape[2], query.dtype
    rows = max(1, TILE_SCORES // min(M, keys)) if rows is None else rows
    tiles = -(-N // rows)
    rows = -(-N // tiles)
    product = partial(jnp.matmul, preferred_element_type=precision.at_least_float32(dtype))
    scaled = query * jnp.asarray(D**-0.5, dtype)
    padded = jnp.pad(scaled, ((0, 0), (0, 0), (0, tiles * rows - N), (0, 0))).reshape(B * h, tiles, rows, D)

    def of_head(given):
        query, key, value = given
        blocks = [(key[start : start + keys], value[start : start + keys]) for start in range(0, M, keys)]

        @jax.checkpoint
        def of_tile(query):
            scores = [product(query, key.T) for key, _ in blocks]
            largest = reduce(jnp.maximum, (jnp.max(block, axis=-1, keepdims=True) for block in scores))
            powers = [jnp.exp(block - largest) for block in scores]
            total = reduce(operator.add, (jnp.sum(block, axis=-1, keepdims=True) for block in powers))
            parts = (product(power.astype(dtype), value) for power, (_, value) in zip(powers, blocks, strict=True))
            return (reduce(operator.add, parts) / total).astype(dtype)

        return lax.map(of_tile, query)

    mixed = lax.map(of_head, (padded, key.reshape(B * h, M, D), value.reshape(B * h, M, D)))
    return mixed.reshape(B, h, tiles * rows, D)[:, :, :N]


def attention_by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """cuDNN's fused attention, which stores no scores. For inputs that `cudnn_has` accepts."""
    by_token = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    return jax.nn.dot_product_attention(*by_token, implementation="cudnn").transpose(0, 2, 1, 3)


def cudnn_has(query: jax.Array) -> bool:
    """Whether cuDNN has a fused attention for queries of such a type and width."""
    is_narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    width = query.shape[-1]
    return is_narrow and width % 8 == 0 and width <= 128 and _cudnn_works(query.dtype.name, width)


@functools.cache
def _cudnn_works(dtype: str, width: int) -> bool:
    """Whether it runs on this machine's GPU; where it does not, that is logged once. True where there is no GPU."""
    if jax.default_backend() != "gpu":
        # Compiled for another machine.
        return True
    try:
        with jax.ensure_compile_time_eval():
            x = jnp.ones((1, 1, 64, width), dtype)
            slope = jax.jit(jax.grad(lambda *given: jnp.sum(attention_by_cudnn(*given).astype(jnp.float32))))
            jax.block_until_ready(slope(x, x, x))
    except Exception as error:  # of many kinds: by jax, XLA, or cuDNN
        why = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("cuDNN's attention does not run here, so that a slower one is used: %s", why)
        return False
    return True


@jax.custom_vjp
def attention_recomputed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attention_plain` whose backward pass computes the scores again and reads them fewer times."""
    return _recomputed_forward(query, key, value)[0]


def _recomputed_forward(query, key, value):
    scores = _scores(query, key)
    normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    output = jnp.einsum("bhnm,bhmd->bhnd", jnp.exp(scores - normaliser).astype(query.dtype), value)
    return output, (query, key, value, output, normaliser)


def _recomputed_backward(kept, gradient):
    query, key, value, output, normaliser = kept
    dtype, wide = query.dtype, normaliser.dtype
    weights = jnp.exp(_scores(query, key) - normaliser)
    of_weights = jnp.einsum("bhnd,bhmd->bhnm", gradient, value, preferred_element_type=wide)
    # The mean of a row of them, by the weights.
    mean = jnp.sum(gradient.astype(wide) * output.astype(wide), axis=-1, keepdims=True)
    of_scores = (weights * (of_weights - mean)).astype(dtype)
    scale = jnp.asarray(query.shape[-1] ** -0.5, dtype)
    of_query = jnp.einsum("bhnm,bhmd->bhnd", of_scores, key) * scale
    of_key = jnp.einsum("bhnm,bhnd->bhmd", of_scores, query * scale)
    return of_query, of_key, jnp.einsum("bhnm,bhnd->bhmd", weights.astype(dtype), gradient)


attention_recomputed.defvjp(_recomputed_forward, _recomputed_backward)
