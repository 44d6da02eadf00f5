"""Set-up of every test: four CPU devices, compiled programs kept on disk, float64 where a test asks for it."""

import jax
import pytest

from segjax import runtime

# Data parallelism is tested for real: on a CPU one process can be split into several devices. Before the first use.
jax.config.update("jax_num_cpu_devices", 4)
runtime.prepare()


@pytest.fixture
def float64():
    """Switches jax to 64 bits for one test."""
    with jax.enable_x64(True):
        yield
