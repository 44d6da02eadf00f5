"""Set-up of tests that compile whole training steps."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles in half the time to slower programs, which do not get to run for long in a test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
