"""Runs of train.py in processes of their own that start at once: a server has imported everything, each run is a fork.

`Forks` is the tests' side; run as a program, this file is the server. It forks before JAX has a backend, whose threads
would not survive it.
"""

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

from segjax.train import setup
from tests.tiny import numpy_draws

REPO = Path(__file__).parents[1]


class Forks:
    """Starts runs, one at a time."""

    def __init__(self, cache: Path):
        """Args: cache: where compiled programs are kept."""
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(REPO),
        }
        self._last = None
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], cwd=REPO, env=environment, stdin=pipe, stdout=pipe, bufsize=0
        )

    def start(self, output: Path, *flags: str, largest_file: int | None = None) -> "Fork":
        """A run of train.py.

        Args:
          output: file that what it prints is appended to.
          largest_file: bytes that a file can have; what would make it larger fails, as on a full disk.
        """
        if self._last is not None and self._last.poll() is None:
            # Of a test that has failed.
            os.kill(self._last.pid, signal.SIGKILL)
            self._last.wait()
        request = {"output": str(output), "flags": flags, "largest_file": largest_file}
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

    def wait(self, timeout: float = 120) -> int:
        if self.returncode is None:
            assert select.select([self._answers], [], [], timeout)[0], "the run does not end"
        return self.poll()


def quickly(create_model):
    """Initial weights are drawn by NumPy: to draw them by JAX takes a second of compilation at each start."""

    def make(*args, **settings):
        with numpy_draws():
            return create_model(*args, **settings)

    return make


def serve() -> None:
    # What a run imports late.
    late = "cv2", "matplotlib.figure", "orbax.checkpoint", "segjax.train.loop", "tensorboardX", "configs.segformer"
    for name in late:
        importlib.import_module(name)
    setup.create_model = quickly(setup.create_model)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run(**request)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(output: str, flags: list[str], largest_file: int | None) -> None:
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
    sys.argv = ["train.py", *flags]
    sys.path[0] = str(REPO)
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    serve()
