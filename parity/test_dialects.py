"""Other packages' checkpoints: recognised by themselves, loaded whole or not at all, and written back."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import segjax
from parity import compare, narrow
from parity.test_forward import transformers_network
from segjax.dialects import DIALECTS
from segjax.weights import CheckpointError

WIDTHS = dict(dims=(8, 16, 20, 32), depths=(2, 1, 1, 1), decoder_dim=24)


@pytest.fixture(scope="module")
def network():
    """A transformers model of sizes that no variant has."""
    import transformers

    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=5,
        hidden_sizes=list(WIDTHS["dims"]),
        depths=list(WIDTHS["depths"]),
        decoder_hidden_size=WIDTHS["decoder_dim"],
        num_attention_heads=[1, 2, 5, 8],
    )
    return transformers.SegformerForSemanticSegmentation(config).eval()


def output(network, x):
    with torch.no_grad():
        return compare.to_nhwc(network(compare.to_nchw(x)).logits)


def saved_keys(network, folder):
    """What transformers writes to disk."""
    from safetensors.numpy import load_file

    network.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_both_transformers_namings_give_the_same_model_and_its_output(network, tmp_path, within):
    x = compare.images(2, (65, 97), seed=0, dtype="float32")
    on_disk = saved_keys(network, tmp_path)
    in_memory = network.state_dict()
    assert on_disk.keys() != in_memory.keys()
    models = [segjax.from_torch(weights) for weights in (on_disk, in_memory)]
    assert models[0].spec == models[1].spec
    for model in models:
        within(
            "output", "float32", compare.relative_error(compare.compiled(model)(x)[0], output(network, x)), "hf, narrow"
        )
    one, other = map(segjax.to_torch, models)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_what_we_write_for_transformers_is_what_transformers_writes_and_loads(network, tmp_path, within):
    on_disk = saved_keys(network, tmp_path)
    written = segjax.to_torch(segjax.from_torch(on_disk), dialect="hf")
    assert written.keys() - on_disk.keys() == set()
    counters = {key for key in on_disk if key.endswith("num_batches_tracked")}
    assert on_disk.keys() - written.keys() <= counters
    assert all(np.array_equal(written[key], on_disk[key]) for key in written if key not in counters)
    model = segjax.from_torch(on_disk)
    x = compare.images(2, (40, 136), seed=1, dtype="float32")
    loaded = compare._transformers_model(model, written).eval()
    within(
        "output", "float32", compare.relative_error(output(loaded, x), output(network, x)), "hf, written and reloaded"
    )


def smp_names(native):
    """The published names of segmentation-models-pytorch, written out here apart from the tables under test."""
    renamed = {}
    for key, value in native.items():
        key = key.replace("backbone.", "encoder.")
        for level, position in (("c4", 0), ("c3", 1), ("c2", 2), ("c1", 3)):
            key = key.replace(f"decode_head.linear_{level}.proj", f"decoder.mlp_stage.{position}.linear")
        key = key.replace("decode_head.linear_fuse.conv", "decoder.fuse_stage.0")
        key = key.replace("decode_head.linear_fuse.bn", "decoder.fuse_stage.1")
        renamed[key.replace("decode_head.linear_pred", "segmentation_head.0")] = value
    return renamed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_round_trip_through_every_dialect_is_bitwise(dialect, dtype):
    model = segjax.create(narrow.MODEL, num_classes=3, seed=4, param_dtype=dtype, **narrow.SIZES)
    there = segjax.to_torch(model, dialect=dialect)
    again = segjax.from_torch(there, param_dtype=dtype)
    back, before = segjax.to_torch(again), segjax.to_torch(model)
    assert back.keys() == before.keys()
    assert all(back[key].tobytes() == before[key].tobytes() and back[key].dtype == before[key].dtype for key in before)
    assert segjax.to_torch(again, dialect=dialect).keys() == there.keys()


def test_our_smp_names_are_the_published_ones():
    model = segjax.create(narrow.MODEL, num_classes=3, **narrow.SIZES)
    expected = smp_names(segjax.to_torch(model))
    written = segjax.to_torch(model, dialect="smp")
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dialect", list(DIALECTS))
@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "model_state_dict", "module.", "both"])
def test_wrapped_checkpoints_load(dialect, wrap):
    model = segjax.create(narrow.MODEL, num_classes=3, seed=5, **narrow.SIZES)
    weights = segjax.to_torch(model, dialect=dialect)
    if wrap in ("module.", "both"):
        weights = {f"module.{key}": value for key, value in weights.items()}
    if wrap == "both":
        weights = {"epoch": 3, "state_dict": weights}
    elif wrap not in ("plain", "module."):
        weights = {wrap: weights, "optimizer": {"lr": 0.1}}
    again = segjax.to_torch(segjax.from_torch(weights))
    assert all(np.array_equal(value, again[key]) for key, value in segjax.to_torch(model).items())


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", "b4", "b5"])
def test_variants_are_recognised_by_their_sizes(variant, caplog):
    caplog.set_level(logging.INFO, "segjax")
    import flax.nnx as nnx

    from segjax.weights import named_variables, to_torch_layout, torch_name

    name = f"segformer_{variant}"
    model = nnx.eval_shape(lambda: segjax.create(name, num_classes=150))
    weights = {
        torch_name(path): to_torch_layout(path, np.zeros(variable.get_value().shape, np.float32))
        for path, variable in named_variables(model).items()
    }
    found = segjax.from_torch(weights)
    assert (found.spec.name, found.spec.num_classes, found.spec.overrides) == (name, 150, ())
    lines = [record.getMessage() for record in caplog.records]
    for setting in ("num_heads", "block_norm_eps", "patch_norm_eps"):
        assert sum(f"assumed {setting}=" in line for line in lines) == 1


def test_a_variant_with_another_decoder_keeps_its_name():
    # segmentation-models-pytorch gives every backbone a decoder of 256.
    sizes = dict(depths=(3, 4, 6, 3), dims=(64, 128, 320, 512))
    model = segjax.create("segformer_b2", num_classes=3, decoder_dim=256)
    again = segjax.from_torch(segjax.to_torch(model, dialect="smp"))
    assert (again.spec.name, again.spec.overrides) == ("segformer_b2", (("decoder_dim", 256),))
    assert all(segjax.models.settings("segformer_b2")[key] == value for key, value in sizes.items())


def test_an_unused_classifier_of_the_original_is_dropped_by_itself_and_said(caplog):
    caplog.set_level(logging.INFO, "segjax")
    model = segjax.create(narrow.MODEL, num_classes=3, **narrow.SIZES)
    weights = segjax.to_torch(model)
    weights["decode_head.conv_seg.weight"] = np.ones((3, 128, 1, 1), np.float32)
    weights["decode_head.conv_seg.bias"] = np.ones(3, np.float32)
    segjax.load_torch(model, weights)
    assert any(
        "not used" in record.getMessage() and "conv_seg.weight" in record.getMessage() for record in caplog.records
    )


def test_counters_may_be_absent():
    model = segjax.create(narrow.MODEL, num_classes=3, **narrow.SIZES)
    weights = {key: value for key, value in segjax.to_torch(model).items() if "num_batches" not in key}
    segjax.load_torch(model, weights)


def test_one_error_lists_everything_and_nothing_is_loaded():
    model = segjax.create(narrow.MODEL, num_classes=3, seed=6, **narrow.SIZES)
    before = segjax.to_torch(model)
    weights = {key: value + 1 if value.ndim else value for key, value in before.items()}
    del weights["backbone.norm2.weight"]
    del weights["decode_head.linear_c3.proj.bias"]
    weights["decode_head.linear_pred.weight"] = np.zeros((9, 24, 1, 1), np.float32)
    weights["neck.weight"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError) as raised:
        segjax.load_torch(model, weights)
    message = str(raised.value)
    for part in (
        "backbone.norm2.weight",
        "decode_head.linear_c3.proj.bias",
        "neck.weight",
        "(9, 24, 1, 1)",
        "(3, 24, 1, 1)",
    ):
        assert part in message
    after = segjax.to_torch(model)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_errors_name_keys_as_the_checkpoint_does():
    model = segjax.create(narrow.MODEL, num_classes=3, **narrow.SIZES)
    weights = segjax.to_torch(model, dialect="hf")
    key = "segformer.encoder.block.0.1.attention.self.value.weight"
    del weights[key]
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        segjax.load_torch(model, weights)


def backbone_alone(weights):
    """As ImageNet-pretrained MiT files are: no prefix, and a classifier of a thousand classes."""
    alone = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    rng = np.random.default_rng(0)
    return alone | {
        "head.weight": rng.normal(size=(1000, 32)).astype(np.float32),
        "head.bias": rng.normal(size=1000).astype(np.float32),
    }


def test_a_backbone_alone_loads_with_drop_and_keep_said_out_loud(caplog):
    caplog.set_level(logging.INFO, "segjax")
    source = segjax.to_torch(segjax.create(narrow.MODEL, num_classes=3, seed=7, **narrow.SIZES))
    model = segjax.create(narrow.MODEL, num_classes=9, seed=8, **narrow.SIZES)
    before = segjax.to_torch(model)
    with pytest.raises(CheckpointError) as raised:
        segjax.load_torch(model, backbone_alone(source))
    assert "head.weight" in str(raised.value) and "decode_head.linear_pred.weight" in str(raised.value)
    segjax.load_torch(model, backbone_alone(source), drop=("head.*",), keep=("decode_head.*",))
    after = segjax.to_torch(model)
    for key, value in after.items():
        assert np.array_equal(value, source[key] if key.startswith("backbone.") else before[key]), key
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "head.weight" in said and "decode_head.linear_pred" in said


def test_a_lone_pattern_is_one_pattern_and_foreign_names_can_be_kept():
    source = segjax.create(narrow.MODEL, num_classes=3, seed=7, **narrow.SIZES)
    model = segjax.create(narrow.MODEL, num_classes=3, seed=8, **narrow.SIZES)
    weights = segjax.to_torch(source, dialect="hf")
    del weights["decode_head.classifier.weight"]
    segjax.load_torch(model, weights | {"head.weight": np.ones(3)}, drop="head.*", keep="decode_head.classifier.*")
    loaded, expected = segjax.to_torch(model), segjax.to_torch(source)
    differing = [key for key in expected if not np.array_equal(loaded[key], expected[key])]
    assert differing == ["decode_head.linear_pred.weight"]
    with pytest.raises(CheckpointError, match="nothing"):
        segjax.load_torch(model, weights, drop="*", keep="*")


@pytest.mark.parametrize(("dims", "hidden"), [((11, 22, 55, 88), 15), ((26, 44, 60, 96), 120)])
def test_any_width_is_read_back_from_the_shapes(dims, hidden):
    ratios = tuple(hidden / dim for dim in dims)
    model = segjax.create(narrow.MODEL, num_classes=3, dims=dims, mlp_ratios=ratios, depths=(1, 1, 1, 1), decoder_dim=8)
    again = segjax.to_torch(segjax.from_torch(segjax.to_torch(model)))
    assert again["backbone.block2.0.mlp.fc1.weight"].shape == (hidden, dims[1])


def test_from_torch_takes_a_backbone_alone_once_it_knows_the_number_of_classes():
    source = segjax.to_torch(segjax.create(narrow.MODEL, num_classes=3, seed=7, **narrow.SIZES))
    with pytest.raises(CheckpointError, match="number of classes"):
        segjax.from_torch(backbone_alone(source))
    model = segjax.from_torch(backbone_alone(source), num_classes=9)
    assert model.spec.num_classes == 9
    loaded = segjax.to_torch(model)
    assert all(np.array_equal(loaded[key], source[key]) for key in source if key.startswith("backbone."))
    assert loaded["decode_head.linear_pred.weight"].std() > 0


def test_a_transformers_classifier_is_a_backbone_alone():
    import transformers

    config = transformers.SegformerConfig(hidden_sizes=[8, 16, 20, 32], depths=[1, 1, 1, 1], num_labels=11)
    network = transformers.SegformerForImageClassification(config)
    model = segjax.from_torch(network.state_dict(), num_classes=4)
    ours = segjax.to_torch(model, dialect="hf")
    theirs = network.state_dict()["segformer.stages.2.layer_norm.weight"].numpy()
    assert np.array_equal(ours["segformer.encoder.layer_norm.2.weight"], theirs)


def test_one_class_checkpoints_load_in_every_dialect():
    model = segjax.create(narrow.MODEL, num_classes=1, seed=9, **narrow.SIZES)
    for dialect in DIALECTS:
        again = segjax.from_torch(segjax.to_torch(model, dialect=dialect))
        assert again.spec.num_classes == 1
        assert again(jnp.zeros((2, 64, 96, 3)))[0].shape == (2, 16, 24, 1)


@pytest.mark.parametrize(
    "weights",
    [
        {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32), "fc.weight": np.zeros((10, 512), np.float32)},
        {"a.b": np.zeros(3, np.float32)},
    ],
)
def test_another_family_is_refused_by_naming_the_nearest(weights):
    with pytest.raises(CheckpointError, match="SegFormer"):
        segjax.from_torch(weights)


def test_a_name_insisted_on_must_fit():
    weights = segjax.to_torch(segjax.create("segformer_b0", num_classes=3))
    with pytest.raises(CheckpointError, match="segformer_b0"):
        segjax.from_torch(weights, name="segformer_b2")
    with pytest.raises(CheckpointError, match="3 classes, not 4"):
        segjax.from_torch(weights, num_classes=4)
    with pytest.raises(KeyError, match="segformer_b0"):
        segjax.from_torch(weights, name="segformer_b9")


def test_settings_that_a_checkpoint_cannot_tell_can_be_given():
    weights = segjax.to_torch(segjax.create(narrow.MODEL, num_classes=3, **narrow.SIZES), dialect="hf")
    model = segjax.from_torch(weights, block_norm_eps=1e-6, num_heads=(1, 1, 1, 1))
    assert dict(model.spec.overrides)["num_heads"] == (1, 1, 1, 1)
    assert model.backbone.norm1.epsilon == 1e-6
    assert segjax.from_torch(weights).backbone.norm1.epsilon == 1e-5


@pytest.mark.slow
def test_a_full_transformers_b5_converts_and_verifies():
    network = transformers_network("segformer_b5", num_classes=150, seed=1).float()
    weights = network.state_dict()
    report = compare.verify(segjax.from_torch(weights), weights)
    assert report.passed and "transformers" in report.against
