"""Stochastic depth and dropout of channels."""

from __future__ import annotations

import abc
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

# ---------------------------------------------------------------------------------------------------------- dropping


class RandomStream(nnx.RngStream):
    """The keys of `nnx.RngStream`, without its cost under a trace.

    Flax updates the count of keys through an index, and looks for the sharding of the traced count. jax answers with an
    error, into which it prints every operation that the count comes from: 10 of the 12 seconds that `nnx.eval_shape`
    takes for SegFormer-B5.
    """

    def __call__(self) -> jax.Array:
        count = self.count[...]
        self.count.set_raw_value(count + 1)
        return jax.random.fold_in(self.key[...], count)


def draw_per_sample(
    draw: Callable[[jax.Array, int], jax.Array], stream: nnx.RngStream, x: jax.Array, axis_name: str | None
) -> jax.Array:
    """`draw(key, number of samples)` for every sample of `x` (B, ...).

    Under `pmap` (axis_name set) it is drawn for the whole batch and each device takes its part, so that the result
    does not depend on the number of devices.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    drawn = draw(stream(), devices * x.shape[0])
    if axis_name is None:
        return drawn
    return lax.dynamic_slice_in_dim(drawn, lax.axis_index(axis_name) * x.shape[0], x.shape[0])


class Drop(nnx.Module):
    """Zeroes whole slices of a map at random in training and scales the rest by 1 / (1 - rate).

    Every layer has a random stream of its own: with one shared key all blocks would drop the same samples.
    """

    # A scan over blocks (`run_blocks`) passes it as an array.
    survival: float | jax.Array

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.rate = rate
        # Rounded once, in double precision, as torch does it.
        self.survival = 1 - rate
        self.deterministic = True
        self.axis_name: str | None = None
        self.stream = rngs.dropout.fork() if rate > 0 else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or self.stream is None:
            return x
        return jnp.where(self.keep(x, self.stream), x / jnp.asarray(self.survival, x.dtype), jnp.zeros_like(x))

    @abc.abstractmethod
    def keep(self, x: jax.Array, stream: nnx.RngStream) -> jax.Array:
        """Which values survive: boolean, of a shape that broadcasts to that of `x`."""


class DropPath(Drop):
    """Drop path, or stochastic depth (Huang et al., 2016): drops the whole branch of a sample.

    (B, H, W, C) -> the same.
    """

    def keep(self, x: jax.Array, stream: nnx.RngStream) -> jax.Array:
        def draw(key, samples):
            return jax.random.bernoulli(key, self.survival, (samples, 1, 1, 1))

        return draw_per_sample(draw, stream, x, self.axis_name)


class DropPathOfBatch(Drop):
    """Stochastic depth that drops a branch for the whole batch at once: torchvision's mode "batch"."""

    def keep(self, x: jax.Array, stream: nnx.RngStream) -> jax.Array:
        return jax.random.bernoulli(stream(), self.survival)


class Dropout2d(Drop):
    """torch.nn.Dropout2d: drops whole channels of a sample. (B, H, W, C) -> the same."""

    def keep(self, x: jax.Array, stream: nnx.RngStream) -> jax.Array:
        def draw(key, samples):
            return jax.random.bernoulli(key, self.survival, (samples, 1, 1, x.shape[-1]))

        return draw_per_sample(draw, stream, x, self.axis_name)
