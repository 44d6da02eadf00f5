"""Stochastic depth, and dropout of channels."""

from __future__ import annotations

import abc
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

# ---------------------------------------------------------------------------------------------------------- dropping


class RandomStream(nnx.RngStream):
    """Stream of random keys, equal to `nnx.RngStream` but cheap to trace.

    Flax updates the counter of keys through an index and looks up the sharding of the traced counter. jax then raises
    an error whose message prints every operation behind the counter: 10 of the 12 seconds that `nnx.eval_shape` takes
    for SegFormer-B5.

    Example:
      >>> from flax import nnx
      >>> from segjax import layers
      >>> stream = layers.RandomStream(0, tag="dropout")
      >>> bool((stream() != stream()).any())
      True
    """

    def __call__(self) -> jax.Array:
        count = self.count[...]
        self.count.set_raw_value(count + 1)
        return jax.random.fold_in(self.key[...], count)


def draw_per_sample(
    draw: Callable[[jax.Array, int], jax.Array], stream: nnx.RngStream, x: jax.Array, axis_name: str | None
) -> jax.Array:
    """Draw a random value for every sample of a batch.

    Under `pmap` every device draws for the whole batch and keeps the part of its own samples, so the result does not
    depend on the number of devices.

    Args:
      draw: Function of a key and a number of samples N that returns an array (N, ...).
      stream: Random stream, which advances by one key.
      x: Batch (B, ...), or this device's part of it.
      axis_name: Mapped axis of devices under `pmap`, otherwise None.

    Returns:
      (B, ...), the values of the samples of `x`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> stream = layers.RandomStream(0, tag="dropout")
      >>> layers.draw_per_sample(lambda key, n: jax.random.uniform(key, (n,)), stream, jnp.ones((3, 4)), None).shape
      (3,)
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    drawn = draw(stream(), devices * x.shape[0])
    if axis_name is None:
        return drawn
    return lax.dynamic_slice_in_dim(drawn, lax.axis_index(axis_name) * x.shape[0], x.shape[0])


class Drop(nnx.Module):
    """In training, zeroes whole slices of a map at random and scales the others by 1 / (1 - rate).

    Every layer has its own random stream: with a shared key all blocks would drop the same samples.
    """

    # An array inside a scan over blocks (`run_blocks`).
    survival: float | jax.Array

    def __init__(self, rate: float, *, rngs: nnx.Rngs):
        self.rate = rate
        # Rounded once, in double precision, as in torch.
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
        """Mask of the values that survive: boolean, of a shape that broadcasts to that of `x`."""


class DropPath(Drop):
    """Drop path, or stochastic depth (Huang et al., 2016), per sample: (B, H, W, C) -> (B, H, W, C).

    In training it zeroes the whole map of a sample with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
      rate: Probability to drop a sample, in [0, 1).
      rngs: Random streams; a rate above 0 forks the stream `dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> drop = layers.DropPath(0.5, rngs=nnx.Rngs(dropout=0))
      >>> drop.train()
      >>> set(drop(jnp.ones((8, 1, 1, 2)))[:, 0, 0, 0].tolist()) <= {0.0, 2.0}
      True
    """

    def keep(self, x: jax.Array, stream: nnx.RngStream) -> jax.Array:
        def draw(key, samples):
            return jax.random.bernoulli(key, self.survival, (samples, 1, 1, 1))

        return draw_per_sample(draw, stream, x, self.axis_name)


class DropPathOfBatch(Drop):
    """Stochastic depth that drops a branch for the whole batch at once: torchvision's mode "batch".

    Args:
      rate: Probability to drop the batch, in [0, 1).
      rngs: Random streams; a rate above 0 forks the stream `dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> drop = layers.DropPathOfBatch(0.5, rngs=nnx.Rngs(dropout=0))
      >>> drop.train()
      >>> len(set(drop(jnp.ones((8, 1, 1, 2))).ravel().tolist()))
      1
    """

    def keep(self, x: jax.Array, stream: nnx.RngStream) -> jax.Array:
        return jax.random.bernoulli(stream(), self.survival)


class Dropout2d(Drop):
    """Dropout of whole channels of a sample, equal to torch.nn.Dropout2d: (B, H, W, C) -> (B, H, W, C).

    Args:
      rate: Probability to drop a channel, in [0, 1).
      rngs: Random streams; a rate above 0 forks the stream `dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from segjax import layers
      >>> drop = layers.Dropout2d(0.5, rngs=nnx.Rngs(dropout=0))
      >>> drop.train()
      >>> x = drop(jnp.ones((2, 3, 4, 8)))
      >>> bool((x == x[:, :1, :1]).all())
      True
    """

    def keep(self, x: jax.Array, stream: nnx.RngStream) -> jax.Array:
        def draw(key, samples):
            return jax.random.bernoulli(key, self.survival, (samples, 1, 1, x.shape[-1]))

        return draw_per_sample(draw, stream, x, self.axis_name)
