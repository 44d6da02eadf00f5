"""Containers, and groups of equal blocks, run one by one, in a scan, or rematerialised."""

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
    """Layers called in turn, as torch.nn.Sequential; an element is named by its index, as in published keys (`fuse.2`).

    Args:
      it: Iterable of layers, functions of one array each.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.Sequential([layers.ReLU(), layers.GELU()])(jnp.array([-1.0, 0.0])).tolist()
      [0.0, 0.0]
    """

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
    """`jax.nn.relu` as an element of a `Sequential`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.ReLU()(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x)


class GELU(nnx.Module):
    """`gelu`, the exact one, as an element of a `Sequential`.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> layers.GELU()(jnp.array([0.0, 100.0])).tolist()
      [0.0, 100.0]
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        return functional.gelu(x)


# ---------------------------------------------------------------------------------------------- groups of equal blocks


class BlockExecution(NamedTuple):
    """Execution of a group of equal blocks by `run_blocks`; the result does not depend on it.

    Attributes:
      scan_from: Minimum length of a group that runs as a scan, whose body is compiled once; 0 for no scans. A deep
        model compiles in a fraction of the time. A step holds a second, stacked copy of the group's weights and
        gradients, unless it receives them stacked (`segjax.models.stacked`).
      remat: Whether the backward pass keeps only the input of each block and recomputes the rest. On a CPU it needs
        scans: without them XLA merges the second computation of a block with the first.

    Example:
      >>> from segjax import layers
      >>> layers.BlockExecution.of(scan_blocks=True, remat=False)
      BlockExecution(scan_from=7, remat=False)
    """

    scan_from: int = 0
    remat: bool = False

    @classmethod
    def of(cls, *, scan_blocks: bool, remat: bool) -> BlockExecution:
        """The execution for the settings `train.scan_blocks` and `train.remat`.

        A scan copies weights in and gradients out; for short groups that costs more than compiling once saves. The
        figures of SegFormer-B5, with groups of 3, 6, 40 and 3, training 2x256x256 on two cores, are the time relative
        to no scans and the seconds to compile: all groups scanned 1.17 and 17, the two longest 1.14 and 16, the longest
        1.09 and 19, none 1 and 38. With `remat` all groups are scanned, because its purpose is to save memory.
        """
        return cls(scan_from=(2 if remat else 7) if scan_blocks else 0, remat=remat)


# Variables that a call may change: running statistics and the counters of random streams.
CHANGED_BY_A_CALL = nnx.Any(nnx.BatchStat, nnx.RngState)

PLAIN = BlockExecution()

# An array, or a tree of arrays.
Maps = TypeVar("Maps")


def _called(block: Callable[[Maps], Maps], x: Maps) -> Maps:
    return block(x)


def run_blocks(
    blocks: Iterable[nnx.Module], x: Maps, execution: BlockExecution, call: Callable[[Any, Maps], Maps] = _called
) -> Maps:
    """Run blocks in turn: `x = call(block, x)`.

    Args:
      blocks: Modules that return an array, or tree of arrays, like their input.
      x: Array, or tree of arrays.
      execution: The calling module's attribute `execution`, which training sets by `model.set_attributes(execution=
        ...)`. It belongs to the graph definition, and so to the key of jit's cache.
      call: Function of a block and its input; by default it calls the block.

    Returns:
      The output of the last block.

    Example:
      >>> import jax.numpy as jnp
      >>> from segjax import layers
      >>> blocks = [layers.LayerNorm(2, epsilon=0, dtype=jnp.float32, param_dtype=jnp.float32) for _ in range(3)]
      >>> layers.run_blocks(blocks, jnp.array([[1.0, 3.0]]), layers.BlockExecution(scan_from=2)).tolist()
      [[-1.0, 1.0]]
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
    """Runs equal blocks: a single block directly, several as a scan over their stacked arrays."""
    if len(group) == 1 and not execution.remat:
        return call(group[0], x)
    parts = [_split_without_rates(block) for block in group]
    graph = parts[0][0]

    def body(x, part):
        params, rest, survival = part
        block = nnx.merge(graph, params, rest, copy=True)
        for drop, kept in zip(_drops(block), survival, strict=True):
            drop.survival = nnx.data(kept)
        # Blocks inside this one are not rematerialised: a third forward pass would save little (HRNet-W18 at 256x256:
        # 295 MiB of temporaries instead of 316).
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
    """Groups of neighbouring blocks that differ only in their arrays and drop rates."""
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

    Without their rates, equal blocks share one graph definition. A scan receives the rates as numbers.
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
