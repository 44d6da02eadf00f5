"""Several processes, one training: how they meet, and what one of them does for all."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize(coordinator: str | None, processes: int | None, number: int | None) -> None:
    """Meets the other processes; must come before the first computation.

    Args:
      coordinator: HOST:PORT of the first process. Whatever is None is taken from the cluster's environment, as JAX
        detects it (SLURM, Open MPI, Kubernetes, Cloud TPU).
      processes: how many there are. number: this one's, from 0.

    Raises:
      ValueError: the environment does not tell either.
    """
    # It would take SIGTERM for itself, and the run would never hear of it.
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
    # Asked for the index, jax would start its backends: seconds, and memory of a GPU, for a line of text.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_lead(function: Callable):
    """What `function()` returns in the first process, in every process; or its exception, likewise."""
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
    """Whether it is set in any process; each has to ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def leave(status: int) -> int:
    """The exit status of a program that failed; one of several processes ends here, so that the others notice.

    An orderly end would wait for them, and they for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        os._exit(status)
    return status
