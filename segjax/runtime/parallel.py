"""Where arrays live, and how a step runs on several devices: `jit` over a data mesh, or `pmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


@functools.cache
def compiler_options(platform: str) -> dict[str, int] | None:
    """What programs for "cpu" or "gpu" are compiled with: `jax.jit(..., compiler_options=compiler_options(platform))`.

    XLA:CPU uses half of AVX-512's registers unless told otherwise; two cores, with / without: SegNeXt-T 1x512x512
    inference 0.89, the other models 0.95 to 1.0. An XLA that does not know the option refuses it, and goes without.
    """
    if platform != "cpu":
        return None
    options = {"xla_cpu_prefer_vector_width": 512}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


class Parallel:
    """Where arrays live and how a step body is compiled: `jit` over a data mesh, or `pmap`.

    Both give the numbers of one device with the whole batch: under jit the compiler sees whole arrays; under pmap the
    body sums over the named axis, and the model's layers do where they need to. Of several processes each one calls the
    same; arrays of `jit` span them all, while those of `pmap` are the process's own part.
    """

    def __init__(self, kind: str, devices: list[jax.Device] | None = None):
        if kind not in ("jit", "pmap"):
            raise ValueError(f"parallel is 'jit' or 'pmap'; got {kind!r}")
        self.kind = kind
        self.devices = jax.devices() if devices is None else devices
        mesh = Mesh(np.array(self.devices), (AXIS,))
        self.own_devices = list(mesh.local_mesh.devices)
        if kind == "pmap":
            mesh = mesh.local_mesh
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec(AXIS))
        self._compiler_options = compiler_options(self.devices[0].platform)

    @property
    def axis_name(self) -> str | None:
        """What `BatchNorm` and the drop layers must be told: `model.set_attributes(axis_name=...)`."""
        return AXIS if self.kind == "pmap" else None

    def check(self, batch_size: int) -> None:
        if batch_size % len(self.devices):
            raise ValueError(f"a batch of {batch_size} does not divide among {len(self.devices)} devices")

    def replicate(self, tree):
        """The same arrays on every device: under pmap with a leading axis of devices."""
        if self.kind == "jit":
            return jax.device_put(tree, self.whole)
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(self.own_devices), *jnp.shape(x))), tree)
        return jax.device_put(stacked, self.split)

    def fetch(self, tree):
        """Undoes `replicate`: one copy of every array, on the host, which no later step can touch."""
        if self.kind == "jit":
            return jax.tree.map(np.array, jax.device_get(tree))
        first = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))
        return jax.tree.map(lambda whole, part: np.array(part.reshape(-1, *whole.shape[1:])[0]), tree, first)

    def scalars(self, steps: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
        """What several steps gave, one number a step, by name."""
        rows = [{name: np.ravel(value)[0] for name, value in row.items()} for row in jax.device_get(steps)]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def rows(self, batch_size: int) -> np.ndarray:
        """Which rows of a batch the devices of this process hold, in their order: int64 (b,)."""
        share = batch_size // len(self.devices)
        own = [place for place, device in enumerate(self.devices) if device in self.own_devices]
        return np.concatenate([np.arange(place * share, (place + 1) * share) for place in own])

    def spread(self, batch):
        """Arrays (b, ...) of this process's `rows` -> the whole batch on the devices, as `compile_train` takes it."""
        if self.kind == "jit":
            return jax.make_array_from_process_local_data(self.split, batch)
        return jax.device_put(jax.tree.map(self._by_device, batch), self.split)

    def _by_device(self, array):
        return array.reshape(len(self.own_devices), -1, *array.shape[1:])

    def batch(self, gather: Callable) -> Callable:
        """Compiles `gather(arrays, rows (b,)) -> arrays (b, ...)`, whose result is spread over the devices.

        Under jit `rows` are those of the whole batch, under pmap those of this process.
        """

        def shaped(arrays, rows):
            batch = gather(arrays, rows)
            return batch if self.kind == "jit" else jax.tree.map(self._by_device, batch)

        return jax.jit(shaped, out_shardings=self.split)

    def compile_train(self, body: Callable) -> Callable:
        """`body(state, batch, key, axis_name=...)` over all devices; the state given to it is used up."""
        if self.kind == "jit":
            return jax.jit(body, donate_argnums=0, out_shardings=self.whole, compiler_options=self._compiler_options)
        return jax.pmap(
            partial(body, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(0, 0, None),
            donate_argnums=0,
            devices=self.devices,
        )

    def compile_eval(self, body: Callable) -> Callable:
        """`body(params, batch_stats, images (B, ...)) -> (B, ...)` over all devices; takes and gives whole batches.

        The devices are those of this process alone: each evaluates by itself.
        """
        if self.kind == "jit":
            compiled = jax.jit(body, out_shardings=self.split, compiler_options=self._compiler_options)
            # Of several processes, jit would take the images for those of all.
            return lambda params, batch_stats, images: compiled(params, batch_stats, jax.device_put(images, self.split))
        mapped = jax.pmap(body, axis_name=AXIS, devices=self.devices)

        def whole(params, batch_stats, images):
            spread = images.reshape(len(self.devices), -1, *images.shape[1:])
            predicted = mapped(params, batch_stats, spread)
            return predicted.reshape(-1, *predicted.shape[2:])

        return whole
