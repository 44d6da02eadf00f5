"""Set-up of tests, which run on a CPU even if there are other devices."""

import os
from unittest import mock

import jax
import pytest

from tests import quick_compilation

# These tests count on four CPU devices; `pytest parity/` alone uses a GPU where there is one.
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    """Compiles in a third of the time to slower programs, which do not get to run for long in a test; processes too."""
    jax.config.update("jax_disable_most_optimizations", True)
    with mock.patch.dict(os.environ, quick_compilation.environment()):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def newer_emitters(quick_compile):
    """Compiles with the emitters that users have, for tests of the bits that different programs give."""
    with mock.patch.object(quick_compilation, "is_wanted", False):
        yield
