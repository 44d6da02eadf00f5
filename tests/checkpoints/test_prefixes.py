"""The network in a training script's file is found below any prefix, next to other tensors."""

import logging

import numpy as np
import pytest

from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.key_maps import KEY_FORMATS
from segjax.checkpoints.selection import as_arrays
from segjax.checkpoints.state_dict import from_torch, load_torch, to_torch
from segjax.commands import convert, inspect
from tests.tiny import tiny_model

PREFIXES = (
    *("_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "net.", "_forward_module."),
    *("segmentor.", "module.model.network.", "a.b.c.d.e.", "_fsdp_wrapped_module.", "_forward_module.module.model."),
)
DIALECTS = tuple(form.dialect for form in KEY_FORMATS if form.family == "segformer" and not form.encoder_only)


@pytest.fixture(scope="module")
def model():
    return tiny_model(5)


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_prefix_is_recognised(model, dialect):
    weights = to_torch(model, dialect=dialect)
    for prefix in (*PREFIXES, "segformer."):
        found = as_arrays(prefixed(prefix, weights))
        assert found.keys() == weights.keys(), prefix
        assert all(found[key] is not None and (found[key] == weights[key]).all() for key in weights)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tensors_of_other_networks_do_not_hide_the_prefix(model, dialect, caplog):
    caplog.set_level(logging.INFO, "segjax")
    weights = to_torch(model, dialect=dialect)
    beside = {f"discriminator.{n}.weight": np.ones(3) for n in range(2 * len(weights))}
    assert as_arrays(prefixed("generator.", weights) | beside).keys() == weights.keys()
    assert f"not used from the checkpoint ({len(beside)}): discriminator.0.weight" in caplog.text


def test_wrapper_modules_are_removed_at_any_depth(model):
    weights = to_torch(model)
    wrapped = {
        key.replace("backbone.", "backbone._orig_mod.").replace(
            "block1.0.", "block1.0._checkpoint_wrapped_module."
        ): value
        for key, value in weights.items()
    }
    assert as_arrays(prefixed("_fsdp_wrapped_module.", wrapped)).keys() == weights.keys()


def test_a_file_with_separate_parts_is_joined(model):
    weights = to_torch(model)
    parts = {"backbone": {}, "decode_head": {}}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    assert as_arrays({"epoch": 3, **parts}).keys() == weights.keys()


@pytest.mark.parametrize(
    "name",
    [
        *("criterion.weight", "loss.weight", "loss_fn.weight", "aux_loss.pos_weight", "mean", "std", "pixel_mean"),
        *("normalize.std", "auxiliary_head.convs.0.conv.weight", "auxiliary_head.1.conv_seg.bias", "train_iou.confmat"),
        *("data_preprocessor.mean", "class_weights", "val_metrics.accuracy.tp"),
    ],
)
def test_tensors_outside_the_network_are_omitted_and_named(model, name, caplog):
    caplog.set_level(logging.INFO, "segjax")
    weights = to_torch(model)
    for prefix in ("", "model."):
        caplog.clear()
        loaded = to_torch(from_torch(prefixed(prefix, weights) | {prefix + name: np.ones(5, np.float32)}))
        assert all((loaded[key] == weights[key]).all() for key in weights)
        assert f"not used from the checkpoint (1): {name}" in caplog.messages


@pytest.mark.parametrize("name", ["neck.conv.weight", "backbone.extra", "decode_head.loss.weight", "head.weight", "fc"])
def test_other_tensors_are_refused_until_they_are_dropped(model, name, tmp_path, capsys):
    weights = to_torch(model) | {name: np.ones(5, np.float32)}
    np.savez(tmp_path / "w.npz", **weights)
    with pytest.raises(CheckpointError, match=f"1 unexpected in the checkpoint:\n    {name}(?s:.*)convert --drop"):
        from_torch(weights)
    assert convert.main([str(tmp_path / "w.npz"), str(tmp_path / "o.safetensors")]) == 2
    assert "--drop" in capsys.readouterr().err and not (tmp_path / "o.safetensors").exists()
    assert convert.main([str(tmp_path / "w.npz"), str(tmp_path / "o.safetensors"), "--drop", name]) == 0
    assert name in capsys.readouterr().out
    assert inspect.main([str(tmp_path / "o.safetensors")]) == 0


def test_missing_parameters_stay_as_initialised(model, tmp_path, capsys):
    weights = to_torch(model)
    del weights["decode_head.linear_fuse.conv.weight"], weights["decode_head.linear_c2.proj.bias"]
    np.savez(tmp_path / "w.npz", **weights)
    arguments = [str(tmp_path / "w.npz"), str(tmp_path / "o.safetensors")]
    assert convert.main(arguments) == 2
    assert "2 missing from the checkpoint" in (said := capsys.readouterr().err) and "--keep" in said
    for keep in (["decode_head.linear_fuse.*"], ["nothing"]):
        assert convert.main([*arguments, "--keep", *keep]) == 2
    capsys.readouterr()
    assert convert.main([*arguments, "--keep", "decode_head.linear_fuse.*", "*.linear_c2.*"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "left as initialised (2): decode_head.linear_c2.proj, decode_head.linear_fuse.conv" in said
    # As load_torch has it.
    other = tiny_model(6)
    load_torch(other, weights, keep="decode_head.*")


def test_two_copies_of_the_network_are_refused(model):
    weights = to_torch(model)
    key = next(iter(weights))
    with pytest.raises(CheckpointError, match=f"two tensors are called {key}"):
        as_arrays(prefixed("module.", weights) | {key: weights[key]})


def test_the_contents_of_a_file_without_weights_are_named():
    with pytest.raises(CheckpointError) as caught:
        as_arrays({"weights": None, "epoch": 3})
    assert str(caught.value).endswith("it holds weights: None, epoch: int")
