"""Compilation units: functions that XLA neither splits nor fuses with their readers; and the size of row tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def compiled_apart(function: Callable) -> Callable:
    """Makes XLA compile a function of arrays as a unit: none of its operations is fused with operations outside it.

    XLA:CPU fuses a sum of shifted products into each of its readers, and computes it again in every one: in a training
    step of SegNeXt, 46 products for every tap of a weight's gradient. `lax.optimization_barrier` does not hinder it.
    Two cores, with / without: SegNeXt-T 2x256x256 training 0.54, 1x512x512 inference 0.79.
    """

    @jax.jit
    @functools.wraps(function)
    def compiled(*arguments):
        # Functions that it calls, such as `jnp.where`, are inlined into it.
        with set_xla_metadata(inlineable="true"):
            return function(*arguments)

    @functools.wraps(function)
    def call(*arguments):
        # XLA would otherwise inline the call before fusion.
        with set_xla_metadata(inlineable="false"):
            return compiled(*arguments)

    return call


@jax.custom_vjp
def once(x: jax.Array) -> jax.Array:
    """The same array, computed once however many operations read it, and its gradient likewise.

    For the outputs of blocks: XLA:CPU otherwise computes a chain of shortcuts from its start for every reader (two
    cores, time with / without: HRNet-W18 1x512x512 inference 0.53, 2x256x256 training 0.40).
    """
    return _unchanged(x)


@compiled_apart
def _unchanged(x):
    return x


once.defvjp(lambda x: (_unchanged(x), None), lambda _, gradient: (_unchanged(gradient),))


# Bytes of the widest map of a tile. SegFormer-B0's inference, over that without tiles: of 1 MiB 0.91, 2 0.89, 4 0.87,
# 8 0.88, 16 0.88.
TILE_BYTES = 2**22
