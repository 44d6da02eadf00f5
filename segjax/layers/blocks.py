"""Containers, and sequences of equal blocks as straight code, as a scan, or rematerialised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from segjax.layers import functional
from segjax.layers.drop import Drop
from segjax.layers.linear import Conv
from segjax.layers.norm import BatchNorm, conv_norm

# --------------------------------------------------------------------------------------------------------- containers


class Sequential(nnx.List):
    """torch.nn.Sequential: an element's name is its index, so that published keys such as `fuse.2` fit."""

    def __call__(self, x: jax.Array) -> jax.Array:
        elements = list(self)
        while elements:
            layer = elements.pop(0)
            if isinstance(layer, Conv) and elements and isinstance(elements[0], BatchNorm):
                x = conv_norm(layer, elements.pop(0), x)
            else:
                x = layer(x)
        return x


class ReLU(nnx.Module):
    """`jax.nn.relu` as an element of a Sequential."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)


class GELU(nnx.Module):
    """`functional.gelu` as an element of a Sequential."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return functional.gelu(x)


# ---------------------------------------------------------------------------------------------- groups of equal blocks


class BlockExecution(NamedTuple):
    """How `run_blocks` goes through a group of equal blocks; the result does not depend on it.

    Attributes:
      scan_from: Minimum length of a group that is compiled once, as the body of a scan, which makes a deep model
        compile in a fraction of the time. A step holds the group's weights and gradients once more, stacked, unless it
        is given them as `segjax.models.stacked` has them. 0 never scans.
      remat: Whether only a block's input is kept for the backward pass and the rest is computed again. On a CPU it
        needs scans: XLA finds equal blocks of straight code that are computed twice, and computes them once.
    """

    scan_from: int = 0
    remat: bool = False

    @classmethod
    def of(cls, *, scan_blocks: bool, remat: bool) -> BlockExecution:
        """The execution that the settings `train.scan_blocks` and `train.remat` ask for.

        A scan copies weights in and gradients out; for short groups that costs more than compiling gains.
        SegFormer-B5, groups of 3, 6, 40 and 3, training 2x256x256 on two cores, time over that without scans and
        seconds to compile: all scanned 1.17 and 17, the two longest 1.14 and 16, the longest 1.09 and 19; none 38.
        Rematerialised groups are all scanned, since memory is what they are for.
        """
        return cls(scan_from=(2 if remat else 7) if scan_blocks else 0, remat=remat)


# Variables that a call may move: running statistics and the counters of random streams.
CHANGED_BY_A_CALL = nnx.Any(nnx.BatchStat, nnx.RngState)

PLAIN = BlockExecution()

# An array, or a tree of arrays.
Maps = TypeVar("Maps")


def _called(block: Callable[[Maps], Maps], x: Maps) -> Maps:
    return block(x)


def run_blocks(
    blocks: Iterable[nnx.Module], x: Maps, execution: BlockExecution, call: Callable[[Any, Maps], Maps] = _called
) -> Maps:
    """`x = call(block, x)` for one block after the other.

    Args:
      x: Array, or tree of arrays.
      execution: Attribute `execution` of the module that calls, which training sets: `model.set_attributes(execution=
        ...)`. As part of the graph definition it is part of the key of jit's cache.
    """
    if execution == PLAIN:
        for block in blocks:
            x = call(block, x)
        return x
    for group in _equal_neighbours(blocks) if execution.scan_from else [[block] for block in blocks]:
        for part in [group] if len(group) >= execution.scan_from else [[block] for block in group]:
            x = _run_group(part, x, call, execution)
    return x


def _run_group(group: list[nnx.Module], x, call: Callable, execution: BlockExecution):
    """Through equal blocks: a single one as it is, several as one scanned body over their stacked arrays."""
    if len(group) == 1 and not execution.remat:
        return call(group[0], x)
    parts = [_split_without_rates(block) for block in group]
    graph = parts[0][0]

    def body(x, part):
        params, rest, survival = part
        block = nnx.merge(graph, params, rest, copy=True)
        for drop, kept in zip(_drops(block), survival, strict=True):
            drop.survival = nnx.data(kept)
        # Rematerialisation is not nested: a third forward pass saves little (HRNet-W18 at 256x256: 295 MiB of
        # temporaries instead of 316).
        block.set_attributes(execution=execution._replace(remat=False), raise_if_not_found=False)
        return call(block, x), nnx.state(block, CHANGED_BY_A_CALL)

    if execution.remat:
        body = jax.checkpoint(body)
    if len(group) == 1:
        x, moved = body(x, parts[0][1:])
        nnx.update(group[0], moved)
        return x
    x, moved = lax.scan(body, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[1:] for part in parts)))
    for index, block in enumerate(group):
        nnx.update(block, jax.tree.map(lambda leaf, index=index: leaf[index], moved))
    return x


def _equal_neighbours(blocks: Iterable[nnx.Module]) -> list[list[nnx.Module]]:
    """Groups of neighbouring blocks that differ in nothing but their arrays and rates."""
    groups, kinds = [], []
    for block in blocks:
        graph, *arrays = _split_without_rates(block)
        leaves, structure = jax.tree.flatten(arrays)
        kind = graph, structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
        if kinds and kinds[-1] == kind:
            groups[-1].append(block)
        else:
            groups.append([block])
        kinds.append(kind)
    return groups


def _split_without_rates(block: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State, list[float | jax.Array]]:
    """Graph definition without drop rates, parameters, other variables, and each drop layer's survival probability.

    Blocks differ in their rates; without them they are one graph definition, whose rates a scan gets as numbers.
    """
    drops = _drops(block)
    rates = [(drop.rate, drop.survival) for drop in drops]
    for drop in drops:
        drop.rate = drop.survival = 0.0
    graph, params, rest = nnx.split(block, nnx.Param, ...)
    for drop, (rate, survival) in zip(drops, rates, strict=True):
        drop.rate, drop.survival = rate, survival
    return graph, params, rest, [survival for _, survival in rates]


def _drops(block: nnx.Module) -> list[Drop]:
    return [module for _, module in nnx.iter_modules(block) if isinstance(module, Drop)]
