"""Adapters in peft's format: one that peft wrote, and ours for every family, with bases of several kinds."""

import json
import logging
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import segjax
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.load import load
from segjax.checkpoints.save import save, save_adapter
from segjax.checkpoints.state_dict import from_torch, model_metadata, named_variables, to_torch
from segjax.models import lora
from tests.tiny import FAMILIES, abstract_family, tiny_model

# What parity/record_adapter.py recorded: an adapter of peft, and peft's logits.
RECORDED = Path(__file__).parent / "peft"
SHAPE = (2, 32, 64, 3)


def base_weights(shapes):
    """Weights drawn by name, in the order of the names; variances are positive."""
    rng, drawn = np.random.default_rng(11), {}
    for key in sorted(shapes):
        noise = rng.standard_normal(shapes[key]).astype(np.float32)
        if key.endswith(BATCHES):
            drawn[key] = np.zeros((), np.int64)
        else:
            drawn[key] = np.abs(noise) + 0.5 if key.endswith("running_var") else 0.3 * noise
    return drawn


BATCHES = "num_batches_tracked"


def recorded_images():
    return np.random.default_rng(12).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "base"
    shapes = {key: value.shape for key, value in to_torch(tiny_model(0), dialect="hf").items()}
    save(from_torch(base_weights(shapes)), folder, dialect="hf")
    return folder


@pytest.fixture
def recorded(base, tmp_path):
    """The recorded adapter with its base."""
    (tmp_path / "lora").mkdir()
    with np.load(RECORDED / "recorded.npz") as found:
        (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(found["adapter_model"].tobytes())
    config = json.loads((RECORDED / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return tmp_path / "lora"


def test_an_adapter_that_peft_wrote_gives_its_outputs(recorded, base):
    with np.load(RECORDED / "recorded.npz") as found:
        expected = found["logits"]
    logits = np.asarray(load(recorded).model(recorded_images())[0])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
    unlike = np.asarray(load(base).model(recorded_images())[0])
    assert np.abs(unlike - expected).max() > 0.1 * scale


# ------------------------------------------------------------------------------------------------------------ our files


def adapted(model, targets, *, rank=2, alpha=3.0, seed=4, full=()):
    """Adapters with B unlike zero; all arrays of the model with theirs; and those of the merged model."""
    adapters = lora.Adapters.of(model, targets, rank=rank, alpha=alpha, seed=seed)
    rng = np.random.default_rng(seed)
    arrays = {name: np.asarray(variable[...]) for name, variable in named_variables(model).items()}
    for name, array in arrays.items():
        if name.rpartition(".")[0] in full:
            arrays[name] = array + 0.3 * np.abs(rng.standard_normal(array.shape)).astype(array.dtype)
    arrays |= {
        name: 0.3 * rng.standard_normal(array.shape).astype(array.dtype) for name, array in adapters.initial.items()
    }
    return adapters, arrays, adapters.merged(arrays)


def write(folder, model, adapters, arrays, full, base, **metadata):
    save_adapter(
        folder,
        model.spec.name,
        arrays,
        adapters,
        full,
        base=str(base),
        revision=None,
        metadata={"model": model_metadata(model), **metadata},
    )


def assert_holds(model, expected):
    found = {name: np.asarray(variable[...]) for name, variable in named_variables(model).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


def test_our_file_has_the_names_and_shapes_that_peft_gives(recorded, base, tmp_path):
    model = load(base).model
    targets = [f"backbone.block{s}.0.{part}" for s in (1, 4) for part in ("attn.q", "attn.kv", "attn.proj", "mlp.fc1")]
    targets.append("backbone.patch_embed2.proj")
    full = ("decode_head.linear_pred", "decode_head.linear_fuse.bn")
    adapters, arrays, merged = adapted(model, targets, full=full)
    write(tmp_path / "ours", model, adapters, arrays, full, base)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (recorded, tmp_path / "ours"))
    # Its lora_only biases, which we leave frozen.
    names = {key for key in theirs if not key.endswith(".base_layer.bias")}
    assert names == ours.keys() and len(names) < len(theirs)
    for key in names:
        rank = {"A": 0, "B": 1}.get(key.rpartition(".lora_")[2][:1])
        one, other = (list(arrays[key].shape) for arrays in (theirs, ours))
        if rank is not None:
            # The recorded adapter has several ranks.
            one[rank] = other[rank] = 0
        assert one == other and theirs[key].dtype == ours[key].dtype, key
    config, ours = (json.loads((place / "adapter_config.json").read_text()) for place in (recorded, tmp_path / "ours"))
    assert ours.keys() <= config.keys()
    assert {*ours["modules_to_save"]} == {"decode_head.classifier", "decode_head.batch_norm"}
    assert_holds(load(tmp_path / "ours").model, merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_family_are_read_back(family, tmp_path):
    model = tiny_model(1, family)
    layers = [name for name, may in lora.adaptable(model).items() if may]
    head = layers[-1]
    # All convolutions and linear layers, with kernels of every size, but the last in full.
    adapters, arrays, merged = adapted(model, layers[:-1], full=(head,))
    segjax.save(model, tmp_path / "base.safetensors")
    write(tmp_path / "lora", model, adapters, arrays, (head,), tmp_path / "base.safetensors", step=7)
    found = load(tmp_path / "lora")
    assert found.model.spec == model.spec and found.metadata["step"] == 7
    assert_holds(found.model, merged)


def test_the_base_may_have_any_format(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "segjax")
    model = tiny_model(1, block_norm_eps=1e-4)
    decoder = {name.rpartition(".")[0] for name in named_variables(model) if name.startswith("decode_head")}
    adapters, arrays, merged = adapted(model, ["backbone.block1.0.attn.kv"], full=decoder)
    segjax.save(model, tmp_path / "native.safetensors")
    segjax.save(model, tmp_path / "orbax")
    segjax.save(model, tmp_path / "smp.safetensors", dialect="smp")
    segjax.save(model, tmp_path / "encoder.safetensors", dialect="backbone")
    save(model, tmp_path / "hf", dialect="hf")
    # As published: with a classifier of ImageNet, or of a loss.
    encoder = load_file(tmp_path / "encoder.safetensors") | {"head.weight": np.ones((9, 16), np.float32)}
    np.savez(tmp_path / "extra.npz", **encoder)
    unused = {"decode_head.conv_seg.weight": np.ones((5, 12, 1, 1), np.float32)}
    np.savez(tmp_path / "unused.npz", **to_torch(model), **unused)
    for name in (
        "native.safetensors",
        "orbax",
        "smp.safetensors",
        "encoder.safetensors",
        "hf",
        "extra.npz",
        "unused.npz",
    ):
        write(tmp_path / f"lora-{name}", model, adapters, arrays, decoder, tmp_path / name)
        found = load(tmp_path / f"lora-{name}").model
        # The eps is in no other package's file.
        assert found.spec == model.spec, name
        assert_holds(found, merged)
    assert not caplog.messages


def test_a_base_other_than_that_of_the_adapter_is_reported(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "segjax")
    model = tiny_model(1)
    adapters, arrays, _ = adapted(model, ["backbone.block1.0.attn.q"])
    segjax.save(model, tmp_path / "base.safetensors")
    origin = {"provenance": {"initial_weights": read_checkpoint(tmp_path / "base.safetensors").provenance}}
    write(tmp_path / "lora", model, adapters, arrays, (), tmp_path / "base.safetensors", **origin)
    read_checkpoint(tmp_path / "lora")
    assert not caplog.messages
    segjax.save(tiny_model(2), tmp_path / "base.safetensors")
    read_checkpoint(tmp_path / "lora")
    assert "base.safetensors is not the file that the adapter lora was trained on" in caplog.text


def test_a_half_precision_base_is_not_rounded_again(tmp_path):
    weights = {key: value.astype(np.float16) for key, value in to_torch(tiny_model(1)).items() if value.ndim}
    np.savez(tmp_path / "half.npz", **weights)
    model = load(tmp_path / "half.npz").model
    adapters, arrays, merged = adapted(model, ["backbone.block4.0.mlp.fc2"])
    write(tmp_path / "lora", model, adapters, arrays, (), tmp_path / "half.npz")
    assert merged["backbone.block4.0.mlp.fc2.kernel"].dtype == jnp.float32
    assert_holds(load(tmp_path / "lora").model, merged)


OTHERS = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [1, 2],
    "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2]],
    "target_parameters": ["q_proj.weight"],
    "trainable_token_indices": {"embed": [3]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_unsupported_kinds_of_adapters_are_refused_by_name(recorded, name):
    path = recorded / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: OTHERS[name]}))
    with pytest.raises(CheckpointError, match=rf"an adapter with {name}, .*merge_and_unload"):
        read_checkpoint(recorded)


def test_an_adapter_replaces_only_an_adapter(tmp_path):
    model = tiny_model(1)
    adapters, arrays, _ = adapted(model, ["backbone.block1.0.attn.q"])
    write(tmp_path / "lora", model, adapters, arrays, (), "base")
    write(tmp_path / "lora", model, adapters, arrays, (), "another")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["base_model_name_or_path"] == "another"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(CheckpointError, match="mine exists and is not an adapter"):
        write(tmp_path / "mine", model, adapters, arrays, (), "base")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_layers_are_found_in_models_of_shapes_only():
    found = lora.adaptable(abstract_family("segformer"))
    assert found["backbone.block1.0.attn.kv"] and not found["backbone.block1.0.mlp.dwconv.dwconv"]
