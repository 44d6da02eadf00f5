"""Compilation units, which XLA neither splits nor fuses with their readers, and the size of row tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def compiled_apart(function: Callable) -> Callable:
    """Makes XLA compile a function of arrays as a unit, whose operations are not fused with those outside it.

    XLA:CPU fuses a sum of shifted products into each of its readers and recomputes it in each: in a training step of
    SegNeXt, 46 products for every tap of a weight's gradient. `lax.optimization_barrier` does not prevent this. Time
    with / without a unit, on two cores: SegNeXt-T 2x256x256 training 0.54, 1x512x512 inference 0.79.
    """

    @jax.jit
    @functools.wraps(function)
    def compiled(*arguments):
        # Inlines the functions that it calls, such as `jnp.where`.
        with set_xla_metadata(inlineable="true"):
            return function(*arguments)

    @functools.wraps(function)
    def call(*arguments):
        # Otherwise XLA would inline the call before it fuses operations.
        with set_xla_metadata(inlineable="false"):
            return compiled(*arguments)

    return call


@jax.custom_vjp
def once(x: jax.Array) -> jax.Array:
    """The same array, computed once for all its readers; so is its gradient.

    This is for the outputs of blocks: otherwise XLA:CPU recomputes a chain of shortcuts from its start for every
    reader. Time with / without, on two cores: HRNet-W18 1x512x512 inference 0.53, 2x256x256 training 0.40.
    """
    return _unchanged(x)


@compiled_apart
def _unchanged(x):
    return x


once.defvjp(lambda x: (_unchanged(x), None), lambda _, gradient: (_unchanged(gradient),))


# Bytes of a tile's widest map. Time of SegFormer-B0's inference with tiles / without: 1 MiB 0.91, 2 MiB 0.89, 4 MiB
# 0.87, 8 MiB 0.88, 16 MiB 0.88.
TILE_BYTES = 2**22
