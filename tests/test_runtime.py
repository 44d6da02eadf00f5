"""How a command sets up its process."""

from types import SimpleNamespace

import pytest

from segjax import runtime


@pytest.mark.parametrize(
    "platforms, kept", [(None, None), ("", ""), ("cpu", "cpu"), ("cuda", "cuda,cpu"), ("cuda,cpu", "cuda,cpu")]
)
def test_the_cpu_stays_beside_whatever_platform_is_asked_for(platforms, kept, monkeypatch):
    config = SimpleNamespace(jax_platforms=platforms)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(runtime, "jax", SimpleNamespace(config=config))
    runtime.keep_the_cpu()
    assert config.jax_platforms == kept
