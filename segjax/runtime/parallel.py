"""Data parallelism by `jit` or `pmap`: the placement of arrays, and the compilation of steps for several devices."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    # This is jax.Device, which type checkers take for a variable.
    from jaxlib._jax import Device

AXIS = "data"
# Partition specs of an array that every device holds, and of an array that is split over its first axis.
WHOLE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)


@functools.cache
def compiler_options(platform: str) -> dict[str, int] | None:
    """XLA options for a platform, "cpu" or "gpu": `jax.jit(..., compiler_options=compiler_options(platform))`.

    By default XLA:CPU uses half the width of AVX-512's registers. Time with the option / without, on two cores:
    SegNeXt-T inference, 1x512x512, 0.89; the other models 0.95 to 1.0. The result is None if XLA does not know the
    option.
    """
    if platform != "cpu":
        return None
    options = {"xla_cpu_prefer_vector_width": 512}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


class Parallel(abc.ABC):
    """Interface to the devices of a run, implemented by `JitParallel` and `PmapParallel`; `parallel_for` chooses.

    The result equals that of one device with the whole batch. Several processes must call the same methods in the same
    order.

    Attributes:
      kind: The setting `parallel` of a run, "jit" or "pmap".
      devices: The devices that share a batch, including those of other processes.
      own_devices: The devices of this process.
      axis_name: Name of the mapped axis, which `BatchNorm` and the drop layers need,
        `model.set_attributes(axis_name=...)`; None if the compiler sees whole arrays.
      whole: Sharding of an array that every device holds.
      split: Sharding of an array split over its first axis.
      compiles_ahead: Whether `compile_train(...)` can be lowered and compiled before its first call.
    """

    kind: str
    axis_name: str | None = None
    compiles_ahead = True
    whole: NamedSharding
    split: NamedSharding

    def __init__(self, devices: Sequence[Device] | None = None):
        """Uses `devices`, by default all."""
        self.devices = jax.devices() if devices is None else list(devices)
        self._mesh = Mesh(np.array(self.devices), (AXIS,))
        self.own_devices = list(self._mesh.local_mesh.devices)

    def check(self, batch_size: int) -> None:
        """Raises ValueError if a batch does not split evenly."""
        if batch_size % len(self.devices):
            raise ValueError(f"a batch of {batch_size} does not divide among {len(self.devices)} devices")

    def rows(self, batch_size: int) -> np.ndarray:
        """Rows of a batch on the devices of this process, in the order of the devices: int64 (b,)."""
        share = batch_size // len(self.devices)
        own = [place for place, device in enumerate(self.devices) if device in self.own_devices]
        return np.concatenate([np.arange(place * share, (place + 1) * share) for place in own])

    def scalars(self, steps: Sequence[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
        """The scalars of several training steps, as arrays (steps,) by name on the host."""
        rows = [{name: np.ravel(value)[0] for name, value in row.items()} for row in jax.device_get(steps)]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    @abc.abstractmethod
    def replicate(self, tree: Any) -> Any:
        """Copies the arrays of `tree` to every device, in the layout for `compile_train`."""

    @abc.abstractmethod
    def fetch(self, tree: Any) -> Any:
        """The inverse of `replicate`: one copy of every array on the host, which no later step can change."""

    @abc.abstractmethod
    def spread(self, batch: Any) -> Any:
        """Arrays (b, ...) of this process's `rows` -> the batch on the devices, in the layout for `compile_train`."""

    @abc.abstractmethod
    def batch(self, gather: Callable) -> Callable:
        """Compiles `gather(arrays, rows) -> batch`, so that every device makes its own part of the batch.

        Returns:
          Function of `arrays`, which every device holds (`whole`), and of `rows`, a tree of arrays (B, ...) with an
          entry for each sample of the whole batch. It returns the batch in the layout for `compile_train`.
        """

    @abc.abstractmethod
    def compile_train(self, body: Callable) -> Callable:
        """Compiles `body(state, batch, key, axis_name=...) -> (state, scalars)`, which donates its argument `state`."""


class JitParallel(Parallel):
    """`jax.jit` over a mesh of all devices: the compiler sees whole arrays and inserts the communication.

    With several processes, arrays are global: they span the devices of all processes.
    """

    kind = "jit"

    def __init__(self, devices: Sequence[Device] | None = None):
        super().__init__(devices)
        self.whole, self.split = NamedSharding(self._mesh, WHOLE), NamedSharding(self._mesh, SPLIT)
        self._jit = partial(jax.jit, compiler_options=compiler_options(self.devices[0].platform))

    def replicate(self, tree: Any) -> Any:
        return jax.device_put(tree, self.whole)

    def fetch(self, tree: Any) -> Any:
        return jax.tree.map(np.array, jax.device_get(tree))

    def spread(self, batch: Any) -> Any:
        return jax.make_array_from_process_local_data(self.split, batch)

    def batch(self, gather: Callable) -> Callable:
        return jax.jit(gather, out_shardings=self.split)

    def compile_train(self, body: Callable) -> Callable:
        return self._jit(body, donate_argnums=0, out_shardings=self.whole)


class PmapParallel(Parallel):
    """`jax.pmap`: every device runs the body on its own samples, and the body sums over the axis `axis_name`.

    Arrays have a leading axis of devices. Each process holds its own part of them.
    """

    kind, axis_name = "pmap", AXIS

    def __init__(self, devices: Sequence[Device] | None = None):
        super().__init__(devices)
        own = self._mesh.local_mesh
        self.whole, self.split = NamedSharding(own, WHOLE), NamedSharding(own, SPLIT)
        # Lowering needs the arrays of all processes, but each process has only its own.
        self.compiles_ahead = len(self.own_devices) == len(self.devices)

    def _by_device(self, array):
        """(b, ...) -> (own devices, b / own devices, ...)."""
        return array.reshape(len(self.own_devices), -1, *array.shape[1:])

    def replicate(self, tree: Any) -> Any:
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self.own_devices), *jnp.shape(x))), tree)
        return jax.device_put(stacked, self.split)

    def fetch(self, tree: Any) -> Any:
        first = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))
        return jax.tree.map(lambda whole, part: np.array(part.reshape(-1, *whole.shape[1:])[0]), tree, first)

    def spread(self, batch: Any) -> Any:
        return jax.device_put(jax.tree.map(self._by_device, batch), self.split)

    def batch(self, gather: Callable) -> Callable:
        @partial(jax.jit, out_shardings=self.split)
        def by_device(arrays, rows):
            return jax.tree.map(self._by_device, gather(arrays, rows))

        return lambda arrays, rows: by_device(arrays, jax.tree.map(lambda x: x[self.rows(len(x))], rows))

    def compile_train(self, body: Callable) -> Callable:
        body = partial(body, axis_name=AXIS)
        return jax.pmap(body, axis_name=AXIS, in_axes=(0, 0, None), donate_argnums=0, devices=self.devices)


class ShardMapParallel(JitParallel):
    """`pmap` for a jax without `jax.pmap`: `jax.shard_map` inside `jit`, with the array layout of `JitParallel`.

    Every device runs the same body as under `PmapParallel`, with bitwise equal results.
    """

    kind, axis_name = "pmap", AXIS

    def _mapped(self, body: Callable, in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec) -> Callable:
        # With check_vma=True, jax would sum the gradients of replicated parameters, which the body sums itself.
        return jax.shard_map(body, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def compile_train(self, body: Callable) -> Callable:
        mapped = self._mapped(partial(body, axis_name=AXIS), (WHOLE, SPLIT, WHOLE), WHOLE)
        # No compiler options, which pmap does not accept either.
        return jax.jit(mapped, donate_argnums=0)


def parallel_for(kind: str, devices: Sequence[Device] | None = None) -> Parallel:
    """The implementation for the setting `parallel` of a run, on `devices`, by default all.

    Raises:
      ValueError: A kind other than "jit" and "pmap".
    """
    if kind == "jit":
        return JitParallel(devices)
    if kind == "pmap":
        return PmapParallel(devices) if hasattr(jax, "pmap") else ShardMapParallel(devices)
    raise ValueError(f"parallel is 'jit' or 'pmap'; got {kind!r}")
