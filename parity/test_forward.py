"""Outputs: ours against the original code's golden, the reference and transformers, per layer and whole."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import segjax
from parity import compare, narrow, tolerances
from segjax.losses import cross_entropy

DTYPES = ("float64", "float32")


def golden_weights(golden):
    return {key.removeprefix("sd/"): value for key, value in golden.items() if key.startswith("sd/")}


@pytest.mark.parametrize("case", [0, 1])
def test_output_features_and_loss_equal_the_original_code(golden, case, float64, within):
    model = segjax.from_torch(golden_weights(golden), dtype=jnp.float64, param_dtype=jnp.float64)
    x = np.moveaxis(golden[f"case{case}/input_nchw"], 1, -1).astype(np.float64)
    logits, taps = compare.compiled(model)(x)
    pairs = {"logits": (logits, golden[f"case{case}/eval/output0"])}
    pairs |= {f"feature{i}": (taps[f"feature{i}"], golden[f"case{case}/eval/feature{i}"]) for i in range(4)}
    for name, (ours, theirs) in pairs.items():
        within("output", "float64", compare.relative_error(ours, np.moveaxis(theirs, 1, -1)), f"golden NVlabs, {name}")
    total, count = cross_entropy(logits, jnp.asarray(golden[f"case{case}/label"]), ignore_label=255)
    loss = golden[f"case{case}/eval/loss"]
    within("output", "float64", abs(float(total / count) - loss) / loss, "golden NVlabs, loss")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "size"), narrow.INPUTS)
def test_every_layer_equals_the_reference_given_the_same_input(batch, size, dtype, float64, within):
    model, reference = compare.randomised_pair(
        narrow.MODEL, num_classes=narrow.NUM_CLASSES, seed=batch, dtype=dtype, **narrow.SIZES
    )
    rows = compare.layer_errors(model, reference, compare.images(batch, size, seed=7, dtype=dtype))
    # Every layer of the reference that holds parameters has its counterpart.
    leaves = {name for name, layer in reference.named_modules() if not list(layer.children())}
    holding = {name for name in leaves if list(reference.get_submodule(name).parameters())}
    assert holding <= {row.name for row in rows}
    for row in rows:
        within("output", dtype, row.error, "narrow, worst layer" if row.name != "(whole model)" else "narrow, whole")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "size"), narrow.INPUTS)
def test_b0_at_full_width_equals_the_reference(batch, size, dtype, float64, within):
    assert_outputs_equal("segformer_b0", batch, size, dtype, within)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["b2", "b5"])
def test_large_variants_at_full_width_equal_the_reference(variant, dtype, float64, within):
    assert_outputs_equal(f"segformer_{variant}", 2, (65, 97), dtype, within)


def assert_outputs_equal(name, batch, size, dtype, within):
    model, reference = compare.randomised_pair(name, num_classes=19, seed=batch, dtype=dtype)
    x = compare.images(batch, size, seed=11, dtype=dtype)
    with torch.no_grad():
        their_logits, their_taps = reference(compare.to_nchw(x))
    logits, taps = compare.compiled(model)(x)
    assert logits.dtype == jnp.dtype(dtype)
    within("output", dtype, compare.relative_error(logits, compare.to_nhwc(their_logits)), f"{name}, logits")
    for tap, theirs in their_taps.items():
        within("output", dtype, compare.relative_error(taps[tap], compare.to_nhwc(theirs)), f"{name}, features")


def transformers_network(name, *, num_classes, seed):
    """A transformers SegFormer of our name's sizes with random weights and statistics, in float64."""
    import transformers

    sizes = segjax.models.settings(name)
    config = transformers.SegformerConfig(
        num_labels=num_classes,
        hidden_sizes=list(sizes["dims"]),
        depths=list(sizes["depths"]),
        decoder_hidden_size=sizes["decoder_dim"],
        num_attention_heads=[1, 2, 5, 8],
    )
    torch.manual_seed(seed)
    network = transformers.SegformerForSemanticSegmentation(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if key.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
            elif tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return network


@pytest.mark.parametrize("variant", ["b0", "b1"])
def test_a_transformers_model_loads_from_its_state_dict_and_gives_its_output(variant, float64, within):
    assert_equals_transformers(f"segformer_{variant}", within)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["b2", "b3", "b4", "b5"])
def test_large_transformers_models_load_and_give_their_output(variant, float64, within):
    assert_equals_transformers(f"segformer_{variant}", within)


def assert_equals_transformers(name, within):
    network = transformers_network(name, num_classes=5, seed=3)
    model = segjax.from_torch(network.state_dict(), dtype=jnp.float64, param_dtype=jnp.float64)
    assert model.spec.name == name
    assert dict(model.spec.overrides) == {"block_norm_eps": 1e-5}
    x = compare.images(2, (40, 136), seed=5, dtype="float64")
    with torch.no_grad():
        theirs = compare.to_nhwc(network(compare.to_nchw(x)).logits)
    within("output", "float64", compare.relative_error(compare.compiled(model)(x)[0], theirs), f"transformers, {name}")


def test_bfloat16_stays_near_float32_and_keeps_logits_wide():
    model, _ = compare.randomised_pair("segformer_b0", num_classes=19, seed=0, dtype="float32")
    half = segjax.create("segformer_b0", num_classes=19, dtype=jnp.bfloat16)
    segjax.load_torch(half, segjax.to_torch(model))
    x = compare.images(2, (64, 96), seed=1, dtype="float32")
    exact, rounded = (np.asarray(compare.compiled(m)(x)[0]) for m in (model, half))
    assert rounded.dtype == np.float32
    # bfloat16 has 8 bits: half a percent per product, averaged over many.
    assert 1e-4 < compare.relative_error(rounded, exact) < 0.1


def test_a_tolerance_table_has_no_bound_that_cannot_fail():
    assert all(0 < limit < 0.1 for limit in tolerances.BOUNDS.values())
