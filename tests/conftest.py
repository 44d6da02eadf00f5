"""Set-up of tests that compile whole training steps."""

import jax
import pytest

# These tests count on four CPU devices; `pytest parity/` alone uses a GPU where there is one.
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles in half the time to slower programs, which do not get to run for long in a test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
