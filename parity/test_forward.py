"""Outputs of segjax against the original code's goldens, the references and published packages, per layer and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import segjax
from parity import compare, golden, tolerances
from parity.subjects import FAMILIES, NUM_CLASSES, SUBJECTS, each
from segjax import layers
from segjax.checkpoints import architectures
from segjax.kernels import choice
from segjax.torch_reference import hrnet, segformer, segformer_mmseg, segformer_plain, segnext, verify

DTYPES = ("float64", "float32")
FAMILY, SUBJECT = each(FAMILIES), each(SUBJECTS)


def golden_model(file, **overrides):
    """A segjax model in float64 with the weights of a golden."""
    name, sizes = golden.MODELS[file]
    return segjax.from_torch(
        golden.weights(file), name=name, dtype=jnp.float64, param_dtype=jnp.float64, **sizes | overrides
    )


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.parametrize("file", golden.MODELS)
def test_outputs_features_and_loss_equal_the_original_code(file, float64, within):
    model = golden_model(file)
    run = verify.compiled(model)
    for case in golden.cases(file):
        bases = () if case.bases is None else (case.bases,)
        logits, taps = run(channels_last(case.images), *bases)
        if file == "hrnet_seed":
            # The original upsamples its output to its crop size.
            logits = layers.resize(logits, case.outputs[-1].shape[2:])
        pairs = {"logits": (logits, case.outputs[-1])}
        pairs |= {f"feature{i}": (taps[f"feature{i}"], feature) for i, feature in enumerate(case.features)}
        if len(case.outputs) == 2:
            pairs["auxiliary logits"] = taps["aux_logits"], case.outputs[0]
        assert len(pairs) == len(case.outputs) + 4
        for ours, theirs in pairs.values():
            within("output", "float64", verify.relative_error(ours, channels_last(theirs)), f"golden {file}")
        if file != "hrnet_seed":
            loss = compare.cross_entropy(logits, jnp.asarray(case.labels), ignore_label=golden.IGNORE)
            error = abs(float(loss) - case.loss) / case.loss
            within("output", "float64", error, f"golden {file}, loss")


@pytest.mark.parametrize("file", [file for file in golden.MODELS if golden.cases(file)[0].training_outputs])
def test_training_forward_equals_the_original_code(file, float64, within):
    still = {
        key: 0.0 for key in ("drop_path_rate", "dropout_rate") if key in segjax.models.settings(golden.MODELS[file][0])
    }
    model = golden_model(file, **still)
    model.train()
    case = golden.cases(file)[0]
    bases = () if case.bases is None else (case.bases,)
    logits, taps = verify.compiled(model)(channels_last(case.images), *bases)
    ours = [logits] if len(case.training_outputs) == 1 else [taps["aux_logits"], logits]
    for mine, theirs in zip(ours, case.training_outputs, strict=True):
        error = verify.relative_error(mine, channels_last(theirs))
        within("output", "float64", error, f"golden {file}, training")


@FAMILY
def test_every_layer_equals_the_reference_given_the_same_input(subject, float64, within):
    assert_layers_equal(subject, *subject.inputs[1], "float64", within)


@pytest.mark.slow
@pytest.mark.parametrize("subject", FAMILIES.values(), ids=list(FAMILIES))
def test_every_layer_equals_the_reference_in_float32(subject, within):
    assert_layers_equal(subject, *subject.inputs[2], "float32", within)


def assert_layers_equal(subject, batch, size, dtype, within):
    model, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=batch, dtype=dtype, **subject.sizes
    )
    rows = compare.layer_errors(model, reference, compare.images(batch, size, seed=7, dtype=dtype))
    # Every layer of the reference that holds parameters has its counterpart. A multi-head attention's own projection
    # is never called as a layer; the attention is.
    leaves = {name for name, layer in reference.named_modules() if not list(layer.children())}
    holding = {name for name in leaves if list(reference.get_submodule(name).parameters())}
    assert {name.removesuffix(".out_proj") for name in holding} <= {row.name for row in rows}
    family = architectures.family_of(subject.name)
    for row in rows:
        what = "whole" if row.name == "(whole model)" else "worst layer"
        within("output", dtype, row.error, f"{family}, narrow, {what}")


# float32, which takes longer to compile, runs only at the odd size: float64 shows errors that depend on the size.
@pytest.mark.parametrize(("dtype", "sizes"), [("float64", slice(None)), ("float32", slice(1, 2))])
@SUBJECT
def test_narrow_models_equal_the_reference_at_every_size(subject, dtype, sizes, float64, within):
    model, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=5, dtype=dtype, **subject.sizes
    )
    run = verify.compiled(model)
    for batch, size in subject.inputs[sizes]:
        assert_outputs_equal(run, model, reference, batch, size, dtype, within, "narrow")


@pytest.mark.parametrize("channels", [1, 4, pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.parametrize("subject", FAMILIES.values(), ids=list(FAMILIES))
def test_models_with_other_channels_equal_the_reference(subject, channels, float64, within):
    model, reference = compare.randomised_pair(
        subject.name, num_classes=NUM_CLASSES, seed=channels, dtype="float64", in_channels=channels, **subject.sizes
    )
    assert model.in_channels == channels
    batch, size = subject.inputs[1]
    assert_outputs_equal(
        verify.compiled(model), model, reference, batch, size, "float64", within, f"{channels} channels", channels
    )


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for subject in SUBJECTS.values() for name in subject.full])
def test_small_models_at_full_width_equal_the_reference(name, dtype, float64, within):
    assert_full_width_equal(name, dtype, within)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for subject in SUBJECTS.values() for name in subject.slow])
def test_large_models_at_full_width_equal_the_reference(name, dtype, float64, within):
    assert_full_width_equal(name, dtype, within)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_simple_model_as_large_as_b5_equals_the_reference(dtype, float64, within):
    sizes = dict(dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4), decoder_dim=768)
    assert_full_width_equal("segformer_simple", dtype, within, **sizes)


def assert_full_width_equal(name, dtype, within, **sizes):
    model, reference = compare.randomised_pair(name, num_classes=19, seed=2, dtype=dtype, **sizes)
    (inputs,) = {subject.inputs for subject in SUBJECTS.values() if name in (*subject.full, *subject.slow)}
    run = verify.compiled(model)
    assert_outputs_equal(run, model, reference, *inputs[1], dtype, within, name)


def assert_outputs_equal(run, model, reference, batch, size, dtype, within, what, channels=3):
    x = compare.images(batch, size, seed=11, dtype=dtype, channels=channels)
    bases = verify.bases_for(model, batch)
    with torch.no_grad():
        their_logits, their_taps = verify.run_reference(reference, x, *bases)
    logits, taps = run(x, *bases)
    assert logits.dtype == jnp.dtype(dtype)
    assert taps.keys() == their_taps.keys()
    what = f"{architectures.family_of(model.spec.name)}, {what}"
    within("output", dtype, verify.relative_error(logits, verify.to_nhwc(their_logits)), f"{what}, logits")
    for tap, theirs in their_taps.items():
        within("output", dtype, verify.relative_error(taps[tap], verify.to_nhwc(theirs)), f"{what}, taps")


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@FAMILY
def test_the_cheaper_order_of_products_gives_the_published_output(subject, dtype, float64, within):
    model, _ = compare.randomised_pair(subject.name, num_classes=NUM_CLASSES, seed=4, dtype=dtype, **subject.sizes)
    batch, size = subject.inputs[2]
    x, bases = compare.images(batch, size, seed=3, dtype=dtype), verify.bases_for(model, batch)
    graphdef, state = nnx.split(model)

    def is_published(state, x, *bases):
        with choice.published_implementations():
            return nnx.merge(graphdef, state)(x, *bases)

    plain, _ = jax.jit(is_published)(state, x, *bases)
    fast, _ = verify.compiled(model)(x, *bases)
    family = architectures.family_of(subject.name)
    within("output", dtype, verify.relative_error(fast, plain), f"{family}, fast implementations = published ones")


def transformers_network(name, *, num_classes, seed):
    """A transformers SegFormer with the sizes of a segjax model, random weights and statistics, in float64."""
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
def test_a_transformers_state_dict_loads_and_gives_its_output(variant, float64, within):
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
        theirs = verify.to_nhwc(network(verify.to_nchw(x)).logits)
    within("output", "float64", verify.relative_error(verify.compiled(model)(x)[0], theirs), f"transformers, {name}")


@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
def test_the_published_simple_packages_state_dict_gives_its_output(size, float64, within):
    from segformer_pytorch import Segformer

    torch.manual_seed(6)
    network = Segformer(num_classes=5).double().eval()
    model = segjax.from_torch(network.state_dict(), dtype=jnp.float64, param_dtype=jnp.float64)
    assert (model.spec.name, model.spec.num_classes, model.spec.overrides) == ("segformer_simple", 5, ())
    x = compare.images(2, size, seed=5, dtype="float64")
    with torch.no_grad():
        theirs = verify.to_nhwc(network(verify.to_nchw(x)))
    within("output", "float64", verify.relative_error(verify.compiled(model)(x)[0], theirs), "segformer-pytorch")


@each(FAMILIES, ("segformer", "segnext"))
def test_bfloat16_stays_near_float32_and_its_logits_are_float32(subject, quick_to_compile):
    model, _ = compare.randomised_pair(subject.name, num_classes=NUM_CLASSES, seed=0, dtype="float32", **subject.sizes)
    half = segjax.from_torch(segjax.to_torch(model), name=subject.name, dtype=jnp.bfloat16, **subject.sizes)
    x = compare.images(*subject.inputs[0], seed=1, dtype="float32")
    bases = verify.bases_for(model, len(x))
    exact, rounded = (np.asarray(verify.compiled(m)(x, *bases)[0]) for m in (model, half))
    assert rounded.dtype == np.float32
    # bfloat16 has 8 bits: half a percent per product, averaged over many.
    assert 1e-4 < verify.relative_error(rounded, exact) < 0.1


PUBLISHED_SIZES = {
    "segformer_{}": segformer.VARIANTS,
    "segformer_plain_{}": segformer_plain.VARIANTS,
    "segformer_mmseg_{}": segformer_mmseg.VARIANTS,
    "hrnet_{}": hrnet.VARIANTS,
    "hrnet_{}_ocr": hrnet.VARIANTS,
    "segnext_{}": segnext.VARIANTS,
}


@pytest.mark.parametrize("pattern", PUBLISHED_SIZES)
def test_variants_have_the_sizes_of_the_reference(pattern):
    for variant, sizes in PUBLISHED_SIZES[pattern].items():
        ours = segjax.models.settings(pattern.format(variant))
        assert {key: ours[key] for key in sizes} == sizes, variant


def test_no_bound_of_the_tolerances_is_too_wide_to_fail():
    assert all(0 < limit < 0.1 for limit in tolerances.BOUNDS.values())
