"""Runs commands in processes that start at once: each is a fork of a server that has imported everything.

Tests use `Forks`; run as a program, this file is the server. It forks before JAX has a backend, whose threads would not
survive a fork.
"""

import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path

import jax

from segjax.runtime import atomic
from segjax.train import setup
from tests.tiny import numpy_draws

REPO = Path(__file__).parents[1]
# What train.py imports late.
OF_TRAINING = "cv2", "matplotlib.figure", "orbax.checkpoint", "segjax.train.loop", "tensorboardX", "configs.segformer"
DIED = 99
# What Python reports of operations that change a disk, `open` only for writing; `segjax.runtime.atomic` adds its own.
CHANGES = {
    f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "link", "symlink", "truncate", "chmod", "utime")
} | {"fcntl.flock", "fsync", "exchange"}


class Forks:
    """Starts commands, one at a time."""

    def __init__(self, cache: Path, modules: tuple[str, ...] = OF_TRAINING):
        """Args: cache: where compiled programs are kept. modules: what the server imports for all."""
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(REPO),
        }
        self._last = None
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", *modules],
            cwd=REPO,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            bufsize=0,
        )

    def start(
        self,
        output: Path,
        *flags: str,
        command: str = "",
        largest_file: int | None = None,
        operations: Path | None = None,
        dies_at: int | None = None,
    ) -> "Fork":
        """A run of train.py, or of another command.

        Args:
          output: file that what it prints is appended to.
          command: function to call with the flags, as module:function; "" for train.py.
          largest_file: bytes that a file can have; what would make it larger fails, as on a full disk.
          operations: file that gets a line before each of its operations that change the disk.
          dies_at: number of such an operation, from 0, at which it ends, with the status `DIED`.
        """
        if self._last is not None and self._last.poll() is None:
            # Of a test that has failed.
            os.kill(self._last.pid, signal.SIGKILL)
            self._last.wait()
        request = {"output": str(output), "flags": flags, "command": command, "largest_file": largest_file}
        request |= {"operations": operations and str(operations), "dies_at": dies_at}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._last = Fork(self._server.stdout)
        return self._last

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


class Fork:
    """A run, as `subprocess.Popen` has it."""

    def __init__(self, answers):
        self._answers = answers
        self.pid = int(answers.readline())
        self.returncode = None

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def wait(self, timeout: float = 400) -> int:
        if self.returncode is None:
            assert select.select([self._answers], [], [], timeout)[0], "the run does not end"
        return self.poll()


def quickly(create_model):
    """Initial weights are drawn by NumPy: to draw them by JAX takes a second of compilation at each start."""

    def make(*args, **settings):
        with numpy_draws():
            return create_model(*args, **settings)

    return make


def serve(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    setup.create_model = quickly(setup.create_model)
    # A fork that collects garbage would copy all of these.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run(**request)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(
    output: str,
    flags: list[str],
    command: str,
    largest_file: int | None,
    operations: str | None,
    dies_at: int | None,
) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if largest_file is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
        # The disk that programs are kept on is another one: those that are there are read, and none is written, which
        # it would be where a small one took longer to compile than in the run before.
        never = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
        os.environ[never] = "1e9"
        jax.config.update(never.lower(), 1e9)
    if operations is not None:
        count_operations(operations, dies_at)
    sys.path[0] = str(REPO)
    if command:
        module, _, function = command.partition(":")
        status = getattr(importlib.import_module(module), function)(flags)
        sys.stdout.flush()
        # At once: to take down all that the server has imported takes a second.
        os._exit(status or 0)
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")


def count_operations(log: str, dies_at: int | None) -> None:
    """Writes a line before each operation of this process that changes the disk; ends it at number `dies_at`."""
    file, number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0
    fsync, exchange = os.fsync, atomic._exchange

    def happens(event, arguments=()):
        nonlocal number
        if event == "open":
            path, _, flags = arguments
            is_change = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not str(path).startswith(("/dev/", "/proc/"))
        else:
            is_change = event in CHANGES
        if is_change:
            if number == dies_at:
                os._exit(DIED)
            number += 1
            os.write(file, f"{event}\n".encode())

    os.fsync = lambda handle: (happens("fsync"), fsync(handle))[1]
    atomic._exchange = lambda *names: (happens("exchange"), exchange(*names))[1]
    sys.addaudithook(happens)


if __name__ == "__main__":
    serve(sys.argv[1:])
