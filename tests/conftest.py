"""Set-up of tests that compile whole training steps."""

import jax
import pytest

# These tests count on the four CPU devices of the root's conftest.py; `pytest parity/` alone uses a GPU if there is one.
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles in half the time to slower programs, which do not get to run for long in a test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
