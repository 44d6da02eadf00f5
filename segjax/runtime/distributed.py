"""Several processes of one run: connecting them, and work that the first one does for all.

The import of this file imports neither jax nor numpy.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import TypeVar

from segjax.runtime import native_log

Result = TypeVar("Result")


def initialize(coordinator: str | None, processes: int | None, number: int | None) -> None:
    """Connects to the other processes. Call it before the first computation.

    JAX reads arguments that are None from the environment of the cluster (SLURM, Open MPI, Kubernetes, Cloud TPU).

    Args:
      coordinator: HOST:PORT of the first process, or None.
      processes: Number of processes, or None.
      number: Index of this process, from 0, or None.

    Raises:
      ValueError: The processes did not connect, or the environment does not define an argument that is None.
    """
    import jax

    # The service's handler of SIGTERM would replace that of the run.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, processes, number)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"the processes did not connect: {first}. Give each of them the same --coordinator=HOST:PORT and "
            "--num_processes=N, and its own --process_id from 0; under SLURM or Open MPI --coordinator=auto is enough"
        ) from error


def is_lead() -> bool:
    """Whether this is the process that prints, saves and draws."""
    # A command prints before it imports jax. The index is read only if there are several processes, because jax starts
    # its backends for it, which takes seconds and GPU memory.
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def from_lead(function: Callable[[], Result]) -> Result:
    """Calls `function` in the first process, and returns its result, or raises its exception, in every process."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return function()
    message = b""
    if is_lead():
        try:
            message = pickle.dumps((function(), None))
        except Exception as error:
            message = pickle.dumps((None, error))
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    mine = np.frombuffer(message, np.uint8) if is_lead() else np.zeros(length, np.uint8)
    value, error = pickle.loads(multihost_utils.broadcast_one_to_all(mine).tobytes())
    if error is not None:
        raise error
    return value


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; each process must call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def leave(status: int) -> int:
    """Returns the exit status of a failed program. With several processes it ends this one, so that the others notice.

    In a regular exit, this process would wait for the others, and they for this one.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        native_log.end()
        os._exit(status)
    return status
