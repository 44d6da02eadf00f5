"""Set-up of every test: four CPU devices, compiled programs kept on disk, float64 where a test asks for it."""

import collections
import gc
import os
import signal

import jax
import pytest

from segjax.runtime import environment
from tests import quick_compilation

# Tests run in a process per core, where threads of torch wait for cores in busy loops: minutes for what takes seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with SIGINT ignored, and so do their children: tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Data parallelism is tested for real: on a CPU one process can be split into several devices. Before the first use.
jax.config.update("jax_num_cpu_devices", 4)
environment.prepare()
quick_compilation.install()
# Tracing makes hundreds of thousands of objects that live on: looking through them again and again takes a third of it.
gc.freeze()
gc.set_threshold(200_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as slow what `each_value_once` leaves out: each case whose values earlier cases of its test have had."""
    had = collections.defaultdict(set)
    for item in items:
        if item.get_closest_marker("each_value_once") and not item.get_closest_marker("slow"):
            values = set(enumerate(item.nodeid.partition("[")[2].rstrip("]").split("-")))
            seen = had[item.nodeid.partition("[")[0]]
            if values <= seen:
                item.add_marker(pytest.mark.slow)
            seen |= values


@pytest.fixture
def float64():
    """Switches jax to 64 bits for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs are kept for as long as a process lives: several GiB in the end."""
    yield
    jax.clear_caches()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Prints a failure at once: a run that a time limit ends prints no summary."""
    if report.failed and not os.environ.get("PYTEST_XDIST_WORKER"):
        print(f"\n{report.longreprtext}\n{report.when} of {report.nodeid} FAILED", flush=True)
