"""The program that `test_many_processes.py` runs in each of two processes: it runs the commands in a JSON file in turn.

python divided.py PORT NUMBER COMMANDS [evaluate|predict]

With the last argument, process 1 kills itself once that command has done some work.
"""

import functools
import json
import os
import signal
import sys

import jax

from segjax.commands import evaluate, predict
from segjax.inference import batch_run, unfinished
from segjax.runtime import distributed, native_log

COMMANDS = {"evaluate": evaluate.main, "predict": predict.main}


@functools.cache
def connect(coordinator, processes, number):
    """Once for all commands; and the death of a process is noticed sooner."""
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(coordinator, processes, number, heartbeat_timeout_seconds=10)


def die_after(owner, name):
    original = getattr(owner, name)

    def dying(*arguments, **settings):
        original(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def main(port, number, commands, death=""):
    native_log.divert()
    distributed.connect = connect
    if death:
        unfinished.Unfinished.SECONDS = 0.0
    if number == "1" and death == "evaluate":
        die_after(unfinished.Unfinished, "keep")
    if number == "1" and death == "predict":
        die_after(batch_run, "save")
    of_process = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]
    with open(commands) as file:
        statuses = [COMMANDS[name]([*words, *of_process]) for name, *words in json.load(file)]
    print(f"statuses {statuses}")


if __name__ == "__main__":
    main(*sys.argv[1:])
