"""Several parameters in one array: stacks over consecutive equal blocks, and vectors of all parameters of a kind.

A scan over blocks, which `train.scan_blocks` turns on, reads stacks. With separate arrays, a training step of
SegFormer-B5 would stack most of its 1065 parameters, unstack their gradients, and update each parameter by its own
program. Stacked they are 285 arrays, or 113 if every group of equal blocks is scanned. The section "Compilation" of
benchmarks/README.md records the cost.

Vectors are for GPUs, where each kernel costs microseconds: a norm, an update or a check of all parameters takes one
kernel per array.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from segjax import layers

Tree = TypeVar("Tree")


class Stacks:
    """The parameters that are stacked into one array, by dotted name.

    Attributes:
      members: Names of the parameters along a stack's first axis, by the stack's name, for example
        "backbone.block3.0-39.norm1.scale".
    """

    def __init__(self, members: Mapping[str, tuple[str, ...]]):
        self.members = dict(members)
        self._stacked_names = frozenset[str]().union(*self.members.values())

    @classmethod
    def of(cls, params: Mapping[str, jax.Array], *, shortest: int, alike: Mapping[str, Hashable]) -> Stacks:
        """Stacks for every group of consecutive list entries whose parameters agree in names, shapes and dtypes.

        Args:
          params: Parameters by dotted name, or their shapes and dtypes.
          shortest: Minimum length of a group, at least 2; 0 stacks nothing.
          alike: Value by parameter name that must also agree within a group: the optimizer's rule for the parameter.
        """
        kinds = {tuple(name.split(".")): (array.shape, array.dtype, alike[name]) for name, array in params.items()}
        return cls(dict(_stacks((), kinds, shortest)) if shortest else {})

    def stacked(self, tree: Tree) -> Tree:
        """Replaces the members of each stack by the stack, in every dict of arrays by name in `tree`.

        A dict that lacks a stack's members gets no stack, such as the optimizer's moments of frozen parameters.
        """
        return self._in_dicts(self._stacked, tree)

    def apart(self, tree: Tree) -> Tree:
        """The inverse of `stacked`; a tree without stacks is returned unchanged.

        It is differentiable. The members of a numpy array are numpy arrays.
        """
        return self._in_dicts(self._apart, tree)

    def with_stacks(self, of_members: Mapping[str, object]) -> dict[str, object]:
        """Adds an entry for each stack to values by parameter name: the value shared by its members."""
        of_stacks = {stack: of_members[names[0]] for stack, names in self.members.items() if names[0] in of_members}
        return {**of_members, **of_stacks}

    def _in_dicts(self, change: Callable[[dict], dict], tree: Tree) -> Tree:
        def is_dict(node):
            return isinstance(node, dict)

        return jax.tree.map(lambda node: change(node) if is_dict(node) else node, tree, is_leaf=is_dict)

    def _stacked(self, arrays: dict) -> dict:
        others = {name: array for name, array in arrays.items() if name not in self._stacked_names}
        present = {stack: names for stack, names in self.members.items() if names[0] in arrays}
        return others | {stack: self._joined([arrays[name] for name in names]) for stack, names in present.items()}

    def _apart(self, arrays: dict) -> dict:
        found = {}
        for name, array in arrays.items():
            if name not in self.members:
                found[name] = array
                continue
            found |= zip(self.members[name], self._members_of(name, array), strict=True)
        return found

    def _joined(self, members: list[jax.Array]) -> jax.Array:
        return jnp.stack(members)

    def _members_of(self, _: str, stack: jax.Array | np.ndarray) -> Sequence[jax.Array | np.ndarray]:
        return (
            [stack[index, ...] for index in range(len(stack))] if isinstance(stack, np.ndarray) else _unstacked(stack)
        )


NO_STACKS = Stacks({})


@jax.custom_vjp
def _unstacked(stack: jax.Array) -> list[jax.Array]:
    return [lax.squeeze(lax.slice_in_dim(stack, index, index + 1), (0,)) for index in range(len(stack))]


# The gradient is one stack. jax's own rule for slices would instead add up one zero-padded array per member.
_unstacked.defvjp(lambda stack: (_unstacked(stack), None), lambda _, gradients: (jnp.stack(gradients),))


class Vectors(Stacks):
    """One vector for all parameters of a kind, and one for the running statistics, in place of stacks.

    Attributes:
      members: Names of the arrays in a vector, in order, by the vector's name, for example "vector0".
    """

    def __init__(self, members: Mapping[str, tuple[str, ...]], shapes: Mapping[str, tuple[int, ...]]):
        super().__init__(members)
        self._shapes = {vector: tuple(shapes[name] for name in names) for vector, names in self.members.items()}

    @classmethod
    def of_all(
        cls, params: Mapping[str, jax.Array], batch_stats: Mapping[str, jax.Array], *, alike: Mapping[str, Hashable]
    ) -> Vectors:
        """Vectors of all arrays.

        Args:
          params: Parameters by dotted name, or their shapes and dtypes.
          batch_stats: Running statistics by dotted name, or their shapes and dtypes.
          alike: Value by parameter name that must agree within a vector: the optimizer's rule for the parameter.
        """
        groups: dict[Hashable, list[str]] = {}
        for name, array in params.items():
            groups.setdefault((alike[name], array.dtype), []).append(name)
        for name, array in batch_stats.items():
            groups.setdefault(("batch_stats", array.dtype), []).append(name)
        members = {f"vector{number}": tuple(names) for number, names in enumerate(groups.values())}
        return cls(members, {name: array.shape for name, array in (*params.items(), *batch_stats.items())})

    def _joined(self, members: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([jnp.ravel(member) for member in members])

    def _members_of(self, vector: str, array: jax.Array | np.ndarray) -> Sequence[jax.Array | np.ndarray]:
        shapes = self._shapes[vector]
        if isinstance(array, np.ndarray):
            ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
            return [part.reshape(shape) for part, shape in zip(np.split(array, ends), shapes, strict=True)]
        return _cut(shapes, array)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cut(shapes: tuple[tuple[int, ...], ...], vector: jax.Array) -> list[jax.Array]:
    ends = itertools.accumulate(math.prod(shape) for shape in shapes)
    return [vector[end - math.prod(shape) : end].reshape(shape) for shape, end in zip(shapes, ends, strict=True)]


_cut.defvjp(
    lambda shapes, vector: (_cut(shapes, vector), None),
    lambda shapes, _, gradients: (jnp.concatenate([jnp.ravel(gradient) for gradient in gradients]),),
)


def stacks_for(
    execution: layers.BlockExecution,
    params: Mapping[str, jax.Array],
    batch_stats: Mapping[str, jax.Array],
    *,
    alike: Mapping[str, Hashable],
) -> Stacks:
    """The stacks or vectors of a training step's state on this platform; see `Stacks.of` for the arguments."""
    if layers.is_fast_on_gpu() and execution == layers.PLAIN:
        return Vectors.of_all(params, batch_stats, alike=alike)
    return Stacks.of(params, shortest=execution.scan_from, alike=alike)


def _stacks(
    parent: tuple[str, ...], inside: Mapping[tuple[str, ...], Hashable], shortest: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and members of every stack below `parent`.

    In nested lists, the outer list is stacked if its entries form a group, and the inner list otherwise.
    """
    children: dict[str, dict[tuple[str, ...], Hashable]] = {}
    for (child, *path), kind in inside.items():
        children.setdefault(child, {})[tuple(path)] = kind

    def is_next(child, last):
        numbered = child.isdigit() and last.isdigit() and int(child) == int(last) + 1
        return numbered and children[child] == children[last]

    groups: list[list[str]] = []
    for child in sorted(children, key=lambda child: (int(child) if child.isdigit() else -1, child)):
        if groups and is_next(child, groups[-1][-1]):
            groups[-1].append(child)
        else:
            groups.append([child])
    for group in groups:
        if len(group) >= shortest:
            for path in children[group[0]]:
                stack = ".".join((*parent, f"{group[0]}-{group[-1]}", *path))
                yield stack, tuple(".".join((*parent, child, *path)) for child in group)
            continue
        for child in group:
            if () not in children[child]:
                yield from _stacks((*parent, child), children[child], shortest)
