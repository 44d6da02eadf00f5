"""Compiles faster on CPUs than `jax_disable_most_optimizations` does."""

import functools
from typing import Any

import jax
from jax._src import compiler

# The older of XLA's emitters of loops compile in a third of the time. jaxlib 0.12 has them no more.
_NAME = "xla_cpu_use_fusion_emitters"
_original = compiler.get_compile_options
# Whether to take them; two programs of one computation differ by more roundings with them.
is_wanted = True


def install() -> None:
    """Takes the older emitters wherever `jax_disable_most_optimizations` is set; jax has no setting for that."""
    compiler.get_compile_options = _compile_options


@functools.cache
def has_older_emitters() -> bool:
    try:
        jax.jit(lambda: 0.0, compiler_options={_NAME: False})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def environment() -> dict[str, str]:
    """Variables for processes that are to compile as quickly."""
    variables = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return variables | ({"XLA_FLAGS": f"--{_NAME}=false"} if has_older_emitters() else {})


def _compile_options(*args: Any, env_options_overrides: dict[str, Any] | None = None, **others: Any) -> Any:
    given = env_options_overrides or {}
    is_quick = compiler._DISABLE_MOST_OPTIMIZATIONS.value and jax.default_backend() == "cpu"
    if is_quick and is_wanted and _NAME not in given and has_older_emitters():
        given = {_NAME: False} | given
    return _original(*args, env_options_overrides=given, **others)
