"""Containers, and sequences of equal blocks as straight code, as a scan, or rematerialised."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from segjax.kernels import choice
from segjax.layers import functional
from segjax.layers.drop import Drop

# --------------------------------------------------------------------------------------------------------- containers


class Sequential(nnx.List):
    """torch.nn.Sequential: an element's name is its index, so that published keys such as `fuse.2` fit."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self:
            x = layer(x)
        return x


class ReLU(nnx.Module):
    """A place in a Sequential."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)


class GELU(nnx.Module):
    """A place in a Sequential."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return functional.gelu(x)


# ------------------------------------------------------------------------------------------------ rows of equal blocks


class BlockExecution(NamedTuple):
    """How `run_blocks` goes through a row of blocks; none of it changes what is computed.

    Attributes:
      scan_from: so many equal neighbours or more are compiled once, as the body of a loop: a deep model compiles in a
        fraction of the time. A step holds their weights and gradients once more, stacked, where they are not given
        as `segjax.stacks` has them. 0 makes no loops.
      remat: keeps nothing of a block for the backward pass but its input, and computes the rest a second time. On a CPU
        it needs loops: XLA there finds equal blocks of straight code computed twice, and computes them once.
    """

    scan_from: int = 0
    remat: bool = False

    @classmethod
    def of(cls, *, scan_blocks: bool, remat: bool) -> BlockExecution:
        """What the settings `train.scan_blocks` and `train.remat` mean.

        A loop copies weights in and gradients out; for short rows that costs more than what is saved in compiling.
        SegFormer-B5, rows of 3, 6, 40 and 3, training 2x256x256 on two cores, time over that without loops and seconds
        to compile: all as loops 1.17 and 17, the two longest 1.14 and 16, the longest 1.09 and 19; none 38. Computed
        again, all must be loops for the sake of memory.
        """
        return cls(scan_from=(2 if remat else 7) if scan_blocks else 0, remat=remat)


# Variables that a call may move: running statistics and the counters of random streams.
CHANGED_BY_A_CALL = nnx.Any(nnx.BatchStat, nnx.RngState)

PLAIN = BlockExecution()

_BLOCK_EXECUTION = contextvars.ContextVar("block_execution", default=PLAIN)


@contextlib.contextmanager
def blocks_executed(execution: BlockExecution):
    """Models called inside go through their rows of blocks so."""
    with choice.holding(_BLOCK_EXECUTION, execution):
        yield


def run_blocks(blocks: Sequence[nnx.Module], x, call: Callable = lambda block, x: block(x)):
    """`x = call(block, x)` for one block after the other; `x` is an array, or a tree of arrays."""
    execution = _BLOCK_EXECUTION.get()
    if execution == PLAIN:
        for block in blocks:
            x = call(block, x)
        return x
    for row in _equal_neighbours(blocks) if execution.scan_from else [[block] for block in blocks]:
        for part in [row] if len(row) >= execution.scan_from else [[block] for block in row]:
            x = _run_row(part, x, call, execution)
    return x


def _run_row(row: list[nnx.Module], x, call: Callable, execution: BlockExecution):
    """Through equal blocks: one alone as it is, several as one scanned body over their stacked arrays."""
    if len(row) == 1 and not execution.remat:
        return call(row[0], x)
    parts = [_split_without_rates(block) for block in row]
    graph = parts[0][0]

    def body(x, part):
        params, rest, survival = part
        block = nnx.merge(graph, params, rest, copy=True)
        for drop, kept in zip(_drops(block), survival, strict=True):
            drop.survival = nnx.data(kept)
        # Rows inside a block that is computed again would be a third time, for little: of HRNet-W18 at 256x256, 295 MiB
        # of temporaries instead of 316.
        with blocks_executed(execution._replace(remat=False)):
            return call(block, x), nnx.state(block, CHANGED_BY_A_CALL)

    if execution.remat:
        body = jax.checkpoint(body)
    if len(row) == 1:
        x, moved = body(x, parts[0][1:])
        nnx.update(row[0], moved)
        return x
    x, moved = lax.scan(body, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[1:] for part in parts)))
    for index, block in enumerate(row):
        nnx.update(block, jax.tree.map(lambda leaf, index=index: leaf[index], moved))
    return x


def _equal_neighbours(blocks: Sequence[nnx.Module]) -> list[list[nnx.Module]]:
    """Blocks that differ in nothing but their arrays and rates, as far as they stand side by side."""
    rows, kinds = [], []
    for block in blocks:
        graph, *arrays = _split_without_rates(block)
        leaves, structure = jax.tree.flatten(arrays)
        kind = graph, structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
        if kinds and kinds[-1] == kind:
            rows[-1].append(block)
        else:
            rows.append([block])
        kinds.append(kind)
    return rows


def _split_without_rates(block: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State, list[float]]:
    """Structure in which no rate shows, parameters, other variables, and what each drop layer keeps."""
    drops = _drops(block)
    rates = [(drop.rate, drop.survival) for drop in drops]
    for drop in drops:
        drop.rate = drop.survival = None
    graph, params, rest = nnx.split(block, nnx.Param, ...)
    for drop, (rate, survival) in zip(drops, rates, strict=True):
        drop.rate, drop.survival = rate, survival
    return graph, params, rest, [survival for _, survival in rates]


def _drops(block: nnx.Module) -> list[Drop]:
    return [module for _, module in nnx.iter_modules(block) if isinstance(module, Drop)]
