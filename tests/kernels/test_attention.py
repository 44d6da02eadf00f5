"""Attention with a custom backward pass, and the choice of cuDNN's attention."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.kernels import attention, choice


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
# Rows of 256 scores are 2 KiB long.
@pytest.mark.parametrize("keys", [12, 256])
@pytest.mark.parametrize("seed", [0, 1])
def test_recomputed_attention_gives_the_plain_output_and_gradients(seed, keys, platform, float64):
    rng = np.random.default_rng(seed)
    query, key, value, gradient = (rng.standard_normal((2, 3, number, 8)) for number in (20, keys, keys, 20))
    outputs, gradients = [], []
    with choice.meant_for(platform):
        for function in (attention.attention_plain, attention.attention_recomputed):
            output, back = jax.vjp(function, query, key, value)
            outputs.append(output)
            gradients.append(back(gradient))
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-14)
    for found, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("score", [-1000.0, 1000.0])
def test_gradients_are_finite_if_all_scores_are_far_from_0(score, dtype):
    rng = np.random.default_rng(0)
    value, gradient = (rng.standard_normal((1, 2, number, 4)).astype(jnp.dtype(dtype)) for number in (256, 3))
    query, key = np.ones((1, 2, 3, 4), dtype=gradient.dtype), np.full((1, 2, 256, 4), score / 2, value.dtype)
    with choice.meant_for("cpu"):
        _, plain = jax.vjp(attention.attention_plain, query, key, value)
        _, recomputed = jax.vjp(attention.attention_recomputed, query, key, value)
        for found, expected in zip(recomputed(gradient), plain(gradient), strict=True):
            assert np.isfinite(np.asarray(found, np.float64)).all()
            # In bfloat16, differences of rounded scores are multiplied by keys of 500.
            if dtype == "float32":
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    "dtype, width, has",
    [("bfloat16", 32, True), ("float16", 64, True), ("float32", 32, False), ("bfloat16", 20, False)],
)
def test_cudnn_takes_16_bit_dtypes_and_widths_that_are_multiples_of_8(dtype, width, has):
    assert attention.cudnn_has(jnp.zeros((1, 1, 4, width), dtype)) == has


def test_a_failing_cudnn_is_logged_once_and_not_used(monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nand more")

    caplog.set_level(logging.WARNING, "segjax")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "attention_by_cudnn", refuse)
    attention._cudnn_works.cache_clear()
    try:
        query = jnp.zeros((1, 1, 4, 32), jnp.bfloat16)
        assert not attention.cudnn_has(query) and not attention.cudnn_has(query)
    finally:
        attention._cudnn_works.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CUDNN_STATUS_NOT_SUPPORTED" in caplog.text and "and more" not in caplog.text
