"""Several processes of one run: connecting them, and work that the first one does for all.

Importing this module imports neither jax nor numpy.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from segjax.runtime import native_log

Result = TypeVar("Result")
Value = TypeVar("Value")


class LostProcessError(ValueError):
    """Raised when another process no longer answers."""


def problem(coordinator: str | None, processes: int | None, number: int | None) -> str:
    """The problem of the flags of several processes, taken together; "" if there is none."""
    if coordinator is None:
        given = {"--num_processes": processes, "--process_id": number}
        names = " and ".join(name for name, value in given.items() if value is not None)
        return f"{names}: of several processes; give --coordinator=HOST:PORT too, or auto" if names else ""
    if coordinator != "auto" and not re.fullmatch(r".+:\d{1,5}", coordinator):
        return f"--coordinator={coordinator}: must be HOST:PORT of the first process, or auto"
    if processes is not None and processes < 1:
        return f"--num_processes={processes}: must be at least 1"
    if processes is not None and number is not None and number >= processes:
        numbered = "is number 0" if processes == 1 else f"have the numbers from 0 to {processes - 1}"
        what = "the only process" if processes == 1 else f"{processes} processes"
        return f"--process_id={number}: {what} {numbered}"
    return ""


def connect(coordinator: str | None, processes: int | None, number: int | None) -> None:
    """Connects to the other processes, if there is a coordinator. Call it before the first computation.

    JAX reads missing arguments from the environment of the cluster (SLURM, Open MPI, Kubernetes, Cloud TPU).

    Args:
      coordinator: HOST:PORT of the first process, "auto", or None for a process by itself.
      processes: Number of processes, or None.
      number: Index of this process, from 0, or None.

    Raises:
      ValueError: The processes did not connect, or the environment does not define an argument that is missing.
    """
    if coordinator is None:
        return
    import jax

    # The service's handler of SIGTERM would replace that of the run.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(None if coordinator == "auto" else coordinator, processes, number)
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


def name() -> str:
    """ "process I" for one of several processes, with its --process_id; else ""."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return ""
    return f"process {jax.process_index()}"


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
    with _together():
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
        mine = np.frombuffer(message, np.uint8) if is_lead() else np.zeros(length, np.uint8)
        value, error = pickle.loads(multihost_utils.broadcast_one_to_all(mine).tobytes())
    if error is not None:
        _of_lead.append(error)
        raise error
    return value


# Errors that `from_lead` has raised in every process.
_of_lead: list[BaseException] = []


class SharedError(ValueError):
    """An error that every process raises."""


def is_everywhere(error: BaseException | None) -> bool:
    """Whether an error, or its cause, was raised in every process, so that one of them reports it for all."""
    while error is not None:
        if isinstance(error, SharedError) or any(error is other for other in _of_lead):
            return True
        error = error.__cause__
    return False


def gathered(value: Value) -> list[Value]:
    """The values of all processes, in the order of their indices, in every process; each process must call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(pickle.dumps(value), np.uint8)
    with _together():
        lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(message)))).tolist()
        padded = np.zeros(max(lengths), np.uint8)
        padded[: len(message)] = message
        rows = np.asarray(multihost_utils.process_allgather(padded))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def refuse_different(settings: Mapping[str, Any]) -> None:
    """Raises SharedError if the settings of the processes differ; each process must call this."""
    first, *others = gathered(dict(settings))
    for number, other in enumerate(others, 1):
        if differing := [name for name in first | other if first.get(name) != other.get(name)]:
            raise SharedError(
                f"process {number} has other {', '.join(differing)} than process 0; give all of them the same command, "
                "files and versions"
            )


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; each process must call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return flag
    with _together():
        return bool(multihost_utils.process_allgather(np.array(flag)).any())


_waits = itertools.count()


def wait_for_all() -> None:
    """Waits until every process has called this, for hours if need be; the functions above wait 30 min on CPUs."""
    import jax
    from jax._src import distributed

    client = distributed.global_state.client
    if jax.process_count() == 1 or client is None:
        return
    place = f"segjax/{next(_waits)}"
    with _together():
        client.key_value_set(f"{place}/{jax.process_index()}", "")
        for number in range(jax.process_count()):
            has_come = False
            while not has_come:
                # In short parts, between which Python handles signals.
                try:
                    client.blocking_key_value_get(f"{place}/{number}", 1000)
                    has_come = True
                except jax.errors.JaxRuntimeError as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Turns errors of the communication with other processes into `LostProcessError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise LostProcessError(
            "another process has died or cannot be reached; look at its messages, and start all of them again"
        ) from error


def leave(status: int) -> int:
    """Returns the exit status of a failed program. With several processes it ends this one, so that the others notice.

    In a regular exit, this process would wait for the others, and they for this one.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            # Its reader may be gone.
            with contextlib.suppress(OSError):
                stream.flush()
        native_log.end()
        os._exit(status)
    return status
