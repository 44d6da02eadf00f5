"""Several processes of one run: how they connect, and what the first one does for all.

Importing it imports neither jax nor numpy.
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
    """Connects to the other processes; must come before the first computation.

    Args:
      coordinator: HOST:PORT of the first process. JAX reads whatever is None from the environment of the cluster
        (SLURM, Open MPI, Kubernetes, Cloud TPU).
      processes: number of processes.
      number: index of this process, from 0.

    Raises:
      ValueError: the processes did not connect, or the environment does not define what is None.
    """
    import jax

    # Its handler of SIGTERM would replace that of the run.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, processes, number)
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"the processes did not meet: {first}. Give each of them the same --coordinator=HOST:PORT and "
            "--num_processes=N, and its own --process_id from 0; under SLURM or Open MPI --coordinator=auto will do"
        ) from error


def is_lead() -> bool:
    """Whether this is the process that prints, saves and draws."""
    # A command prints before it imports jax. Then too, the index is read only where there are several processes: jax
    # would start its backends for it, which takes seconds and memory of a GPU.
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def from_lead(function: Callable[[], Result]) -> Result:
    """Calls `function` in the first process; returns its result, or raises its exception, in every process."""
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
    """Whether the flag is set in any process; each process has to call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def leave(status: int) -> int:
    """The exit status of a program that failed; one of several processes ends here, so that the others notice.

    An orderly end would wait for them, and they for this one.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        native_log.end()
        os._exit(status)
    return status
