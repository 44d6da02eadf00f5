"""Models by name: published sizes, settings, refusals, and the two modes."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import segjax
from segjax.weights import named_variables

# Values that the published checkpoints hold, without NVlabs' unused conv_seg; 19 and 150 classes.
PARAMETERS = {
    "segformer_b0": (3719027, 3752694),
    "segformer_b1": (13682131, 13715798),
    "segformer_b2": (27361235, 27461974),
    "segformer_b3": (47237075, 47337814),
    "segformer_b4": (64007635, 64108374),
    "segformer_b5": (84607955, 84708694),
}
# One program instead of a compilation per operation.
call = nnx.jit(lambda model, x: model(x)[0])
TINY = dict(dims=(4, 8, 10, 16), depths=(1, 2, 1, 1), decoder_dim=12)


def test_every_name_is_a_published_model():
    assert list(segjax.MODELS) == list(PARAMETERS)


@pytest.mark.parametrize("name", list(PARAMETERS))
@pytest.mark.parametrize("which", [0, 1])
def test_parameter_count_is_the_published_one(name, which):
    model = nnx.eval_shape(lambda: segjax.create(name, num_classes=(19, 150)[which]))
    params = [v.get_value().size for v in named_variables(model).values() if isinstance(v, nnx.Param)]
    assert sum(params) == PARAMETERS[name][which]


@pytest.mark.parametrize("size", [(29, 64), (65, 97), (96, 64)])
def test_logits_and_taps_have_the_documented_shapes_at_any_size(size):
    def run():
        return segjax.create("segformer_b0", num_classes=5, **TINY)(jnp.zeros((2, *size, 3)))

    logits, taps = jax.eval_shape(run)
    quarter = tuple(-(-side // 4) for side in size)
    assert logits.shape == (2, *quarter, 5) and logits.dtype == jnp.float32
    assert set(taps) == {f"feature{i}" for i in range(4)}
    for i, width in enumerate(TINY["dims"]):
        assert taps[f"feature{i}"].shape == (2, *(-(-side // 2**i) for side in quarter), width)


def test_bad_requests_say_what_is_there_instead():
    with pytest.raises(KeyError, match="segformer_b0"):
        segjax.create("segformer_bo", num_classes=5)
    with pytest.raises(TypeError, match="decoder_dim"):
        segjax.create("segformer_b0", num_classes=5, decoder_width=3)
    with pytest.raises(ValueError, match="at least 1"):
        segjax.create("segformer_b0", num_classes=0)
    with pytest.raises(ValueError, match="four numbers"):
        segjax.create("segformer_b0", num_classes=5, dims=(1, 2, 3))
    with pytest.raises(ValueError, match="does not divide"):
        segjax.create("segformer_b0", num_classes=5, dims=(4, 8, 11, 16))
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        segjax.create("segformer_b0", num_classes=5, dtype=jnp.float64)


def test_images_that_cannot_be_used_are_refused():
    model = segjax.create("segformer_b0", num_classes=5, **TINY)
    with pytest.raises(ValueError, match="29x29"):
        model(jnp.zeros((2, 28, 64, 3)))
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
        model(jnp.zeros((2, 3, 64, 64)))


def test_the_seed_decides_the_weights_and_nothing_else_does():
    weights = [
        jax.tree.leaves(nnx.state(segjax.create("segformer_b0", num_classes=5, seed=seed, **TINY, **rates), nnx.Param))
        for seed, rates in ((3, {}), (3, dict(drop_path_rate=0.0, dropout_rate=0.5)), (4, {}))
    ]
    assert all(np.array_equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_a_new_model_is_in_evaluation_mode_and_repeats_itself():
    model = segjax.create("segformer_b0", num_classes=5, **TINY)
    x = jax.random.normal(jax.random.key(0), (2, 64, 96, 3))
    before = np.asarray(model.decode_head.linear_fuse.bn.mean[...])
    assert np.array_equal(call(model, x), call(model, x))
    assert np.array_equal(before, model.decode_head.linear_fuse.bn.mean[...])


def test_training_mode_drops_anew_at_every_call_and_moves_the_statistics():
    model = segjax.create("segformer_b0", num_classes=5, drop_path_rate=0.5, dropout_rate=0.5, **TINY)
    x = jax.random.normal(jax.random.key(0), (4, 64, 96, 3))
    evaluated = call(model, x)
    model.train()
    first, second = call(model, x), call(model, x)
    assert not np.array_equal(first, second)
    assert np.abs(model.decode_head.linear_fuse.bn.mean[...]).max() > 0
    model.eval()
    assert not np.array_equal(evaluated, call(model, x))


def test_models_copy_and_pass_through_nnx_transforms():
    model = segjax.create("segformer_b0", num_classes=5, **TINY)
    x = jax.random.normal(jax.random.key(1), (2, 32, 64, 3))
    duplicate = copy.deepcopy(model)
    expected = np.asarray(call(model, x))
    assert np.array_equal(call(duplicate, x), expected)
    duplicate.decode_head.linear_pred.bias[...] += 1
    np.testing.assert_allclose(call(duplicate, x), expected + 1, rtol=1e-5, atol=1e-5)
    assert np.array_equal(call(model, x), expected)
    gradients = nnx.jit(nnx.grad(lambda m: jnp.sum(m(x)[0] ** 2)))(model)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    assert all(np.isfinite(leaf).all() for leaf in leaves) and sum(np.any(leaf) for leaf in leaves) > len(leaves) // 2


def test_float64_is_float64_throughout(float64):
    kinds = dict(dtype=jnp.float64, param_dtype=jnp.float64)
    model = nnx.eval_shape(lambda: segjax.create("segformer_b0", num_classes=5, **kinds, **TINY))
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float64)
    text = str(jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))
    assert "f64" in text and "f32" not in text


def test_logits_under_bfloat16_are_sums_of_float32_and_not_rounded_before():
    model = segjax.create("segformer_b0", num_classes=5, dtype=jnp.bfloat16, **TINY)
    logits = np.asarray(call(model, jax.random.normal(jax.random.key(2), (2, 64, 96, 3))))
    assert logits.dtype == np.float32
    rounded = logits.astype(jnp.bfloat16).astype(np.float32)
    assert (logits != rounded).mean() > 0.9


def test_storage_narrower_than_the_computation_loses_nothing_more(float64):
    x = jax.random.normal(jax.random.key(3), (2, 64, 96, 3), jnp.float64)
    narrow = segjax.create("segformer_b0", num_classes=5, dtype=jnp.float64, param_dtype=jnp.float32, **TINY)
    wide = segjax.create("segformer_b0", num_classes=5, dtype=jnp.float64, param_dtype=jnp.float64, **TINY)
    segjax.load_torch(wide, segjax.to_torch(narrow))
    np.testing.assert_allclose(call(narrow, x), call(wide, x), rtol=1e-12, atol=1e-14)


def test_under_bfloat16_norms_and_softmax_are_float32_and_weights_keep_their_type():
    model = nnx.eval_shape(lambda: segjax.create("segformer_b0", num_classes=5, dtype=jnp.bfloat16, **TINY))
    assert {v.get_value().dtype for v in named_variables(model).values()} == {jnp.dtype("float32")}
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, jnp.zeros((2, 64, 96, 3)))
    kinds = {}

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
                if hasattr(inner, "eqns"):
                    visit(inner)
                elif hasattr(inner, "jaxpr"):
                    visit(inner.jaxpr)
            kinds.setdefault(equation.primitive.name, set()).update(str(v.aval.dtype) for v in equation.outvars)

    visit(jaxpr.jaxpr)
    assert kinds["rsqrt"] == {"float32"} and kinds["exp"] == {"float32"}
    assert "bfloat16" in kinds["dot_general"] and "bfloat16" in kinds["conv_general_dilated"]
