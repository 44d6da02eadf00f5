"""Attention: plain; with a custom backward pass; over tiles of queries, for CPUs; by cuDNN, for GPUs."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

from segjax.kernels import choice, precision

logger = logging.getLogger(__name__)


def attention_plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention with all scores (B, h, N, M) at once: (B, h, N, D), (B, h, M, D) twice -> (B, h, N, D)."""
    weights = jax.nn.softmax(_scores(query, key), axis=-1).astype(query.dtype)
    return jnp.einsum("bhnm,bhmd->bhnd", weights, value)


def _scores(query, key):
    """Scores (B, h, N, M), in at least float32."""
    wide = precision.at_least_float32(query.dtype)
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    return jnp.einsum("bhnd,bhmd->bhnm", scaled, key, preferred_element_type=wide)


# Most scores computed at once, 64 MiB in float32. An image of 1024x2048 has 1 GiB of scores in SegFormer's first stage.
# In parts of this size that stage takes the same time, and the second stage a fifth less.
MOST_SCORES = 2**24


def attention_by_rows(query: jax.Array, key: jax.Array, value: jax.Array, *, rows: int) -> jax.Array:
    """`attention_recomputed` of `rows` queries at a time."""
    B, h, N, D = query.shape
    parts = -(-N // rows)
    padded = jnp.pad(query, ((0, 0), (0, 0), (0, parts * rows - N), (0, 0)))
    by_part = jnp.moveaxis(padded.reshape(B, h, parts, rows, D), 2, 0)
    mixed = lax.map(lambda part: attention_recomputed(part, key, value), by_part)  # (parts, B, h, rows, D)
    return jnp.moveaxis(mixed, 0, 2).reshape(B, h, parts * rows, D)[:, :, :N]


def attention_by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """cuDNN's fused attention, which stores no scores, for inputs that `cudnn_has` accepts."""
    by_token = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    return jax.nn.dot_product_attention(*by_token, implementation="cudnn").transpose(0, 2, 1, 3)


def cudnn_has(query: jax.Array) -> bool:
    """Whether cuDNN has a fused attention for queries of this dtype and width."""
    is_narrow = query.dtype in (jnp.bfloat16, jnp.float16)
    width = query.shape[-1]
    return is_narrow and width % 8 == 0 and width <= 128 and _cudnn_works(query.dtype.name, width)


@functools.cache
def _cudnn_works(dtype: str, width: int) -> bool:
    """Whether cuDNN's attention runs on this machine's GPU, or True without a GPU. Logs a failure once."""
    if jax.default_backend() != "gpu":
        # The program is compiled for another machine.
        return True
    try:
        with jax.ensure_compile_time_eval():
            x = jnp.ones((1, 1, 64, width), dtype)
            slope = jax.jit(jax.grad(lambda *given: jnp.sum(attention_by_cudnn(*given).astype(jnp.float32))))
            jax.block_until_ready(slope(x, x, x))
    except Exception as error:  # jax, XLA and cuDNN raise many types
        why = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("cuDNN's attention does not run here; a slower one is used: %s", why)
        return False
    return True


@jax.custom_vjp
def attention_recomputed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attention_plain` whose backward pass recomputes the scores and reads them fewer times.

    Both passes on two cores, float32, heads of 32 channels: 4.3 to 5.1 ns per score instead of 5.5 to 8.0, and about
    half the memory.
    """
    return attention_plain(query, key, value)


def _recomputed_forward(query, key, value):
    scores = _scores(query, key)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided after the product, which has fewer elements than the weights.
    product = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(query.dtype), value, preferred_element_type=scores.dtype)
    output = (product / total).astype(query.dtype)
    return output, (query, key, value, output, largest + jnp.log(total))


# Zeros after the keys. Rows of scores that are a multiple of 1 KiB long share a few sets of a CPU's cache, and products
# with the transposed scores take 1.5 times as long (512 and 1,024 keys, float32).
_MORE_KEYS, _ALIASED_BYTES = 16, 1024


def _recomputed_backward(kept, gradient):
    query, key, value, output, normaliser = kept
    keys = key.shape[2]
    if choice.is_fast_on_cpu() and keys * normaliser.dtype.itemsize % _ALIASED_BYTES == 0:
        # Such a key has a weight, but that changes only the gradients of key and value, which are cut off.
        key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, _MORE_KEYS), (0, 0))) for x in (key, value))
    dtype, wide = query.dtype, normaliser.dtype
    # No key has a weight above 1, except an added one if all other scores are far below its score of 0.
    weights = jnp.exp(jnp.minimum(_scores(query, key) - normaliser, 0))
    of_weights = jnp.einsum("bhnd,bhmd->bhnm", gradient, value, preferred_element_type=wide)
    # The mean of each row of `of_weights`, weighted by `weights`.
    mean = jnp.sum(gradient.astype(wide) * output.astype(wide), axis=-1, keepdims=True)
    of_scores = (weights * (of_weights - mean)).astype(dtype)
    scale = jnp.asarray(query.shape[-1] ** -0.5, dtype)
    of_query = jnp.einsum("bhnm,bhmd->bhnd", of_scores, key) * scale
    of_key = jnp.einsum("bhnm,bhnd->bhmd", of_scores, query * scale)
    of_value = jnp.einsum("bhnm,bhnd->bhmd", weights.astype(dtype), gradient)
    return of_query, of_key[:, :, :keys], of_value[:, :, :keys]


attention_recomputed.defvjp(_recomputed_forward, _recomputed_backward)
