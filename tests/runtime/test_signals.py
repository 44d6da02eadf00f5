"""Ctrl-C and SIGTERM give one line and the status of the signal, whatever the process is doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segjax.runtime import signals

REPO = Path(__file__).parents[2]
# What a command does, in a process of its own. `ready()` prints "ready", after which the signal comes.
START = """
import gc, hashlib, importlib.machinery, os, signal, sys, time
from segjax.runtime import signals
# A test in the background of a shell would hear no Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
def ready():
    os.write(1, b"ready\\n")
def run():
    with signals.raising():
        {body}
    return 0
status = signals.run_process("segjax try", run)
{after}
sys.exit(status)
"""


def started(body, after=""):
    code = START.format(body=body.strip().replace("\n", "\n        "), after=after)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, env=environment)
    assert process.stdout.readline() == b"ready\n", process.stderr.read()
    return process


def ended(process, *numbers, apart=0.2, within=20):
    for number in numbers:
        process.send_signal(number)
        time.sleep(apart)
    _, err = process.communicate(timeout=within)
    return process.returncode, err.decode()


BODIES = {
    "Python code": "ready()\nwhile True: pass",
    "a wait": "ready()\ntime.sleep(60)",
    "an exception that another replaces": (
        "try:\n    ready()\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('a module') from None"
    ),
    "a callback of the garbage collector": (
        "def callback(phase, info):\n    if phase == 'start':\n        ready()\n        time.sleep(1)\n"
        "gc.callbacks.append(callback)\ngc.collect()\ngc.callbacks.clear()\ntime.sleep(60)"
    ),
    "a finalizer": (
        "class Thing:\n    def __del__(self):\n        ready()\n        time.sleep(1)\n"
        "thing = Thing()\ndel thing\ntime.sleep(60)"
    ),
}


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("body", BODIES)
def test_a_signal_ends_a_process_with_one_line_and_its_status(body, number, status):
    assert ended(started(BODIES[body]), number) == (status, "segjax try: stopped\n")


# Like a compilation, it frees the GIL, and ends after minutes only.
NATIVE = "ready()\nhashlib.pbkdf2_hmac('sha256', b'word', b'salt', 10**9)"


def test_in_native_code_a_signal_is_acknowledged_and_a_second_one_ends_it():
    process = started(NATIVE)
    # From "ready" to the native code.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    since = time.monotonic()
    assert process.stderr.readline() == b"segjax try: stopping; press again to end it at once\n"
    assert time.monotonic() - since < 1
    assert process.poll() is None
    assert ended(process, signal.SIGTERM, within=2) == (143, "segjax try: stopped at once\n")


def test_a_signal_in_an_exit_callback_is_not_lost():
    process = started("import atexit\natexit.register(lambda: (ready(), time.sleep(60)))")
    assert ended(process, signal.SIGTERM) == (143, "segjax try: stopped\n")


def test_outside_a_command_a_signal_raises_no_exception():
    body = "signals._is_raising = False\ntry:\n    ready()\n    time.sleep(60)\nfinally:\n    os.write(2, b'unwound')"
    assert ended(started(body), signal.SIGTERM) == (143, "segjax try: stopped\n")


# Their initialisation may call Python code, of which an exception would end up in C++.
IMPORTS = """
class Loader(importlib.machinery.ExtensionFileLoader):
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        ready()
        for _ in range(20):
            time.sleep(0.01)
        os.write(2, b"imported\\n")
spec = importlib.machinery.ModuleSpec("native", Loader("native", "native.so"))
importlib._bootstrap._load(spec)
time.sleep(60)
"""


def test_a_signal_stops_the_command_after_the_import_of_a_native_module():
    assert ended(started(IMPORTS), signal.SIGINT) == (130, "imported\nsegjax try: stopped\n")


def test_a_signal_after_the_last_exit_callback_keeps_the_status():
    class_ = "class Late:\n    def __del__(self, kill=os.kill, own=os.getpid()):\n        kill(own, signal.SIGINT)\n"
    done = started("ready()", after=f"import builtins\n{class_}builtins.late = Late()")
    assert ended(done) == (0, "")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.answered(lambda *_: seen.append(1), first="", second=""):
            seen = []
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert (seen, signal.getsignal(signal.SIGINT)) == ([1], signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, before)


def test_after_the_body_the_previous_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with signals.answered(lambda *_: seen.append(1), first="", second=""):
        seen = []
        signal.raise_signal(signal.SIGTERM)
    assert seen == [1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


# ------------------------------------------------------------------------------------------------------------- commands

# The signal comes when a module of the given name is imported: at the first line, during the arguments, or later.
DURING = """
import os, runpy, signal, sys, time
_, module, number, program, *sys.argv[1:] = sys.argv
class Finder:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), int(number))
            time.sleep(0.1)
sys.meta_path.insert(0, Finder())
(runpy.run_path if program.endswith(".py") else runpy.run_module)(program, run_name="__main__")
"""


@pytest.mark.parametrize(
    "module, program, arguments",
    [
        ("argparse", "segjax.convert", ["a.pth", "b.pth"]),
        ("jax", "segjax", ["convert", "a.pth", "b.pth"]),
        ("numpy", "segjax.data", ["prepare", "folder", "--source", "a"]),
        ("jax", "segjax.predict", ["a.png", "--checkpoint", "a.pth", "--output", "out"]),
        ("absl", "train.py", ["--config=segformer:b0,streets", "--workdir=out"]),
        ("segjax.train.loop", "train.py", ["--config=segformer:b0,streets", "--workdir=out"]),
    ],
)
def test_a_signal_during_imports_ends_a_command_with_one_line(module, program, arguments, tmp_path):
    program = str(REPO / program) if program.endswith(".py") else program
    done = subprocess.run(
        [sys.executable, "-c", DURING, module, str(int(signal.SIGTERM)), program, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    assert done.returncode == 143, done.stderr
    assert len(done.stderr.splitlines()) == 1 and ": stopped" in done.stderr
    assert list(tmp_path.iterdir()) == []
