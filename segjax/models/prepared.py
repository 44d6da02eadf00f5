"""Programs in two parts: one that depends on the weights only and runs once, and one that runs for every image.

Casts to the dtype of the computation, layouts, folded norms and products of weights are the same for every image. In a
single program, such kernels precede almost every convolution: 265 of the 906 kernels of HRNet-W48 on a GPU.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from segjax import layers


class Prepared:
    """`function(weights, *inputs)` split into `program(prepare(weights), *inputs)`, with the same result.

    Both parts can be jitted.

    Attributes:
      key: Hash of `prepare`. Functions of the same weights with equal keys can share its result.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from segjax.models.prepared import Prepared
      >>> def function(weights, x):
      ...     return x @ (weights * 2).astype(jnp.bfloat16)
      >>> weights, x = jnp.ones((4, 3)), jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)
      >>> parts = Prepared(function, weights, x)
      >>> [array.dtype.name for array in parts.prepare(weights)]
      ['bfloat16']
    """

    def __init__(self, function: Callable[..., Any], weights: Any, *inputs: jax.Array | jax.ShapeDtypeStruct):
        """Traces the function.

        Args:
          function: Function of `weights` and `inputs`.
          weights: Tree of arrays, or of their shapes and dtypes.
          inputs: Shapes and dtypes of the other arguments.
        """
        with layers.weights_are_prepared():
            closed, shape = jax.make_jaxpr(function, return_shape=True)(weights, *inputs)
        jaxpr, self._tree = closed.jaxpr, jax.tree.structure(shape)
        count = len(jax.tree.leaves(weights))
        given, others = jaxpr.invars[:count], jaxpr.invars[count:]
        of_weights, early, late = set(given), [], []
        for equation in jaxpr.eqns:
            operands = _variables(equation.invars)
            if operands and not equation.effects and of_weights.issuperset(operands) and not _grows(equation):
                of_weights.update(equation.outvars)
                early.append(equation)
            else:
                late.append(equation)
        read = [variable for equation in late for variable in _variables(equation.invars)] + _variables(jaxpr.outvars)
        crossing = [variable for variable in dict.fromkeys(read) if variable in of_weights]
        self._early = _part(closed, given, crossing, _needed(early, crossing))
        self._late = _part(closed, [*crossing, *others], jaxpr.outvars, late)
        self.key = hashlib.sha256(str(self._early.jaxpr).encode()).hexdigest()

    def prepare(self, weights: Any) -> list[jax.Array]:
        """The arrays that `program` reads, including weights that it reads unchanged."""
        return core.jaxpr_as_fun(self._early)(*jax.tree.leaves(weights))

    def program(self, prepared: Sequence[jax.Array], *inputs: jax.Array) -> Any:
        """The result of `function`, from the result of `prepare`."""
        return jax.tree.unflatten(self._tree, core.jaxpr_as_fun(self._late)(*prepared, *inputs))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _grows(equation: core.JaxprEqn) -> bool:
    """Whether the results are larger than the operands, such as a bias that is repeated for every pixel."""
    return _elements(equation.outvars) > _elements(_variables(equation.invars))


def _elements(variables: Sequence[Any]) -> int:
    return sum(math.prod(variable.aval.shape) for variable in variables)


def _needed(equations: Sequence[core.JaxprEqn], results: Sequence[Any]) -> list[core.JaxprEqn]:
    """The equations that the results depend on."""
    wanted, found = set(results), []
    for equation in reversed(equations):
        if not wanted.isdisjoint(equation.outvars):
            wanted.update(_variables(equation.invars))
            found.append(equation)
    return found[::-1]


def _part(closed: core.ClosedJaxpr, inputs: Sequence[Any], results: Sequence[Any], equations) -> core.ClosedJaxpr:
    jaxpr = closed.jaxpr
    read = {variable for equation in equations for variable in _variables(equation.invars)} | set(_variables(results))
    constants = [pair for pair in zip(jaxpr.constvars, closed.consts, strict=True) if pair[0] in read]
    part = jaxpr.replace(
        constvars=[variable for variable, _ in constants],
        invars=list(inputs),
        outvars=list(results),
        eqns=list(equations),
        debug_info=jaxpr.debug_info._replace(arg_names=("",) * len(inputs), result_paths=("",) * len(results)),
    )
    return core.ClosedJaxpr(part, [constant for _, constant in constants])
