"""The compiler options of programs."""

import jax
import numpy as np
import pytest

from segjax.runtime import parallel


@pytest.fixture
def asked_anew():
    """What is asked once a process is asked in this test, and again after it."""
    parallel.compiler_options.cache_clear()
    yield
    parallel.compiler_options.cache_clear()


def test_only_programs_for_cpus_are_compiled_with_options(asked_anew):
    options = parallel.compiler_options("cpu")
    assert options, "this XLA refuses the option"
    double = jax.jit(lambda x: 2 * x, compiler_options=options)
    np.testing.assert_array_equal(double(np.ones(3, np.float32)), 2)
    # Such a program is another one than that without: the compiler reads the option.
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: 2 * x, compiler_options=dict.fromkeys(options, "wide")).lower(1.0).compile()
    assert parallel.compiler_options("gpu") is None and parallel.compiler_options("tpu") is None


def test_an_xla_without_the_option_compiles_without_it(asked_anew, monkeypatch):
    given = []

    def as_if_unknown(function, *, compiler_options):
        given.append(compiler_options)
        return jit(
            function, compiler_options={f"{name}_of_tomorrow": value for name, value in compiler_options.items()}
        )

    jit = jax.jit
    monkeypatch.setattr(jax, "jit", as_if_unknown)
    assert parallel.compiler_options("cpu") is None
    assert parallel.compiler_options("cpu") is None
    assert len(given) == 1 and given[0], "the compiler is asked once"
