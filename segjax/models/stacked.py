"""Parameters of equal blocks as one array, the form in which a loop over blocks (`train.scan_blocks`) takes them.

A training step of SegFormer-B5 would otherwise put most of 1065 parameters into stacks, take their gradients out again,
and update each by programs of its own; in stacks they are 285, and 113 where every row is a loop. What that costs is
recorded under "Compiling" in benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Stacks:
    """Which parameters stand in one array, by dotted name.

    Attributes:
      rows: names of the parameters that a stack has along its first axis, by the name of the stack, for example
        "backbone.block3.0-39.norm1.scale".
    """

    def __init__(self, rows: Mapping[str, tuple[str, ...]]):
        self.rows = dict(rows)
        self._members = frozenset().union(*self.rows.values())

    @classmethod
    def of(cls, params: Mapping[str, jax.Array], *, shortest: int, alike: Mapping[str, Hashable]) -> Stacks:
        """The rows of neighbours in a list whose parameters have the same names, shapes and types.

        Args:
          shortest: how many make a row, at least 2; or 0, for no rows at all.
          alike: what else must be equal, by name: how a parameter is trained.
        """
        kinds = {tuple(name.split(".")): (array.shape, array.dtype, alike[name]) for name, array in params.items()}
        return cls(dict(_rows((), kinds, shortest)) if shortest else {})

    def stacked(self, tree):
        """A tree with dicts of arrays by name, in which every row whose members are there has become a stack."""
        return self._in_dicts(self._stacked, tree)

    def apart(self, tree):
        """Undoes `stacked`; a tree that is apart stays as it is. Differentiable; numpy arrays stay numpy arrays."""
        return self._in_dicts(self._apart, tree)

    def with_stacks(self, of_members: Mapping[str, object]) -> dict[str, object]:
        """What holds for parameters by name, and the same for their stacks: members of one are alike."""
        of_stacks = {stack: of_members[names[0]] for stack, names in self.rows.items()}
        return {**of_members, **of_stacks}

    def _in_dicts(self, change, tree):
        def is_dict(node):
            return isinstance(node, dict)

        return jax.tree.map(lambda node: change(node) if is_dict(node) else node, tree, is_leaf=is_dict)

    def _stacked(self, arrays: dict) -> dict:
        alone = {name: array for name, array in arrays.items() if name not in self._members}
        rows = {key: names for key, names in self.rows.items() if names[0] in arrays}
        return alone | {key: jnp.stack([arrays[name] for name in names]) for key, names in rows.items()}

    def _apart(self, arrays: dict) -> dict:
        found = {}
        for name, array in arrays.items():
            if name not in self.rows:
                found[name] = array
                continue
            on_host = isinstance(array, np.ndarray)
            members = [array[index, ...] for index in range(len(array))] if on_host else _unstacked(array)
            found |= zip(self.rows[name], members, strict=True)
        return found


NO_STACKS = Stacks({})


@jax.custom_vjp
def _unstacked(stack: jax.Array) -> list[jax.Array]:
    return [lax.squeeze(lax.slice_in_dim(stack, index, index + 1), (0,)) for index in range(len(stack))]


# XLA takes a stack of slices for the array that they are slices of; jax's own rule would add up as many padded arrays.
_unstacked.defvjp(lambda stack: (_unstacked(stack), None), lambda _, gradients: (jnp.stack(gradients),))


def _rows(
    parent: tuple[str, ...], inside: Mapping[tuple[str, ...], Hashable], shortest: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and members of every stack; of a list inside a list the outer one counts, where its entries are a row."""
    children: dict[str, dict[tuple[str, ...], Hashable]] = {}
    for (child, *path), kind in inside.items():
        children.setdefault(child, {})[tuple(path)] = kind

    def is_next(child, last):
        numbered = child.isdigit() and last.isdigit() and int(child) == int(last) + 1
        return numbered and children[child] == children[last]

    rows: list[list[str]] = []
    for child in sorted(children, key=lambda child: (int(child) if child.isdigit() else -1, child)):
        if rows and is_next(child, rows[-1][-1]):
            rows[-1].append(child)
        else:
            rows.append([child])
    for row in rows:
        if len(row) >= shortest:
            for path in children[row[0]]:
                stack = ".".join((*parent, f"{row[0]}-{row[-1]}", *path))
                yield stack, tuple(".".join((*parent, child, *path)) for child in row)
            continue
        for child in row:
            if () not in children[child]:
                yield from _rows((*parent, child), children[child], shortest)
