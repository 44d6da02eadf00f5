"""Set-up of tests that run on a CPU whatever else there is."""

import jax

# These tests count on four CPU devices; `pytest parity/` alone uses a GPU where there is one.
jax.config.update("jax_platforms", "cpu")
