"""The set-up of a command's process."""

from types import SimpleNamespace

import pytest

from segjax.runtime import environment


@pytest.mark.parametrize(
    "platforms, kept", [(None, None), ("", ""), ("cpu", "cpu"), ("cuda", "cuda,cpu"), ("cuda,cpu", "cuda,cpu")]
)
def test_the_cpu_platform_stays_available_next_to_any_requested_one(platforms, kept, monkeypatch):
    config = SimpleNamespace(jax_platforms=platforms)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(environment, "jax", SimpleNamespace(config=config))
    environment.keep_the_cpu()
    assert config.jax_platforms == kept


@pytest.mark.parametrize("given, kept", [(None, 0.1), ("3", 1.0)])
def test_programs_that_compile_in_a_tenth_of_a_second_are_cached(given, kept, monkeypatch):
    name = "jax_persistent_cache_min_compile_time_secs"
    settings = {name: 1.0}
    monkeypatch.setattr(environment, "jax", SimpleNamespace(config=SimpleNamespace(update=settings.__setitem__)))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    monkeypatch.delenv(name.upper(), raising=False)
    if given:
        monkeypatch.setenv(name.upper(), given)
    environment.keep_compiled_programs()
    # What jax itself has read is left alone.
    assert settings == {name: kept}
