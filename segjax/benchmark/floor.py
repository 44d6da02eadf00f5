"""Lower bound of the time of a step, from the measured peak rates of the machine."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

ADAMW_BYTES = 7 * 4


def floor_of(work: tuple, ceiling: Mapping) -> dict[str, float]:
    """Necessary FLOPs and bytes of a step, and their time on this machine; see `segjax/commands/benchmark.py`."""
    import jax.numpy as jnp

    from segjax.models import summary

    model, size, batch, mode, dtype, num_classes = work
    least = summary.least_work(model, size, batch=batch, num_classes=num_classes)
    passes, updates = (3, ADAMW_BYTES * least.parameters) if mode == "train" else (1, 0)
    flops = 2 * passes * least.multiply_adds
    moved = passes * least.values * jnp.dtype(dtype).itemsize + updates
    seconds = max(flops / ceiling["flops_per_second"], moved / ceiling["bytes_per_second"])
    return {"flops": flops, "bytes": moved, "milliseconds": 1e3 * seconds}


def ceilings(dtype: str) -> dict[str, Any]:
    """Peak rates of this machine in a dtype: large matrix products in FLOP/s, and a copy in bytes/s; and its name.

    Each rate is the best of ten measurements. Matrices have sides of 2048 and copies 64 Mi numbers on a CPU, 8192 and
    512 Mi on a GPU. The numbers are random, because zeros are multiplied faster. Call it in a separate process, which
    keeps freed memory as contenders do: with results in new pages, which the kernel zeroes, two cores copy 10 GB/s
    instead of 40 to 65.
    """
    from segjax.runtime import environment

    environment.keep_freed_memory()
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    if dtype == "float32" and not on_cpu:
        jax.config.update("jax_default_matmul_precision", "highest")

    def best(function, *arrays):
        program = jax.jit(function).lower(*arrays).compile()
        program(*arrays).block_until_ready()
        # With several kernels in the queue, a GPU does not wait for each launch.
        queued = 1 if on_cpu else 5
        seconds = []
        for _ in range(10):
            since = time.perf_counter()
            for _ in range(queued):
                done = program(*arrays)
            done.block_until_ready()
            seconds.append((time.perf_counter() - since) / queued)
        return min(seconds)

    side, length = (2048, 2**26) if on_cpu else (8192, 2**29)
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    long = jnp.ones((length,), dtype)
    return {
        "flops_per_second": 2 * side**3 / best(jnp.matmul, matrix, matrix),
        "bytes_per_second": 2 * long.nbytes / best(lambda x: x + 1, long),
        "dtype": dtype,
        "device": device.device_kind,
        "platform": device.platform,
    }


def measured_ceilings(dtype: str) -> dict[str, Any]:
    """`ceilings` in a separate process, which leaves nothing on a GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ceilings, dtype).result()
