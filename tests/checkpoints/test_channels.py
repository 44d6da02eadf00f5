"""Checkpoints with any number of channels are recognised, kept and written, and adapted if a run starts from three."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

import segjax
from segjax.checkpoints import load as loading
from segjax.checkpoints import metadata
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError
from segjax.checkpoints.describe import describe
from segjax.checkpoints.initialize import adapted_stem, initialize, read_settings
from segjax.checkpoints.key_maps import KEY_FORMATS
from segjax.checkpoints.save import write_checkpoint
from segjax.checkpoints.state_dict import named_variables, to_torch
from tests.tiny import FAMILIES, tiny_model

FAMILY_OF_TINY = {
    "segformer": "segformer",
    "segformer_plain": "plain",
    "segformer_mmseg": "mmseg",
    "segformer_simple": "simple",
    "segformer_zuppichini": "zuppichini",
    "hrnet": "hrnet",
    "hrnet_ocr": "ocr",
    "segnext": "segnext",
}


@pytest.mark.parametrize("channels", [13])
@pytest.mark.parametrize("key_format", KEY_FORMATS, ids=lambda each: f"{each.dialect}, {each.family}")
def test_channels_are_inferred_in_every_key_format(key_format, channels):
    model = tiny_model(1, FAMILY_OF_TINY[key_format.family], in_channels=channels)
    weights = to_torch(model, dialect=key_format.dialect)
    # What no weights contain.
    heads = {key: value for key, value in model.spec.overrides if key == "num_heads"}
    classes = 5 if key_format.encoder_only else None
    back = segjax.from_torch(weights, num_classes=classes, dialect=key_format.dialect, **heads)
    assert back.in_channels == dict(back.spec.overrides)["in_channels"] == channels
    again = to_torch(back, dialect=key_format.dialect)
    assert all(np.array_equal(again[key], weights[key]) for key in weights)


def test_three_channels_are_not_stored_as_an_override():
    model = segjax.from_torch(to_torch(tiny_model(1)))
    assert "in_channels" not in dict(model.spec.overrides)


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_channels_and_normalisation_are_stored_in_the_metadata(tmp_path, suffix):
    model = tiny_model(2, in_channels=4)
    about = {"normalisation": {"mean": [1.0, 2.0, 3.0, 4.0], "std": [5.0, 6.0, 7.0, 8.0]}, "image_dtype": "uint16"}
    write_checkpoint(tmp_path / f"m{suffix}", model, dialect="native", metadata=about)
    loaded = segjax.load(tmp_path / f"m{suffix}")
    assert (loaded.mean, loaded.std) == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert str(loaded.image_kind) == "4 channels of uint16"
    segjax.save(loaded, tmp_path / "copy.safetensors")
    assert segjax.load(tmp_path / "copy.safetensors").image_kind == loaded.image_kind
    rows = dict(describe(str(tmp_path / f"m{suffix}")))
    assert rows["images"] == "4 channels of uint16"
    assert rows["normalisation"] == "mean 1 2 3 4, deviation 5 6 7 8"


def test_other_channels_without_normalisation_keep_their_values(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="segjax")
    np.savez(tmp_path / "w.npz", **to_torch(tiny_model(2, in_channels=2)))
    loaded = segjax.load(tmp_path / "w.npz")
    assert (loaded.mean, loaded.std) == ((0, 0), (1, 1))
    assert loaded.image_kind.dtype is None
    assert "does not state how images of 2 channels are normalised" in caplog.text
    assert "(unknown: not applied)" in dict(describe(str(tmp_path / "w.npz")))["normalisation"]
    bare = loading.as_loaded(tiny_model(2, in_channels=2))
    assert (bare.mean, bare.std) == ((0, 0), (1, 1))


def test_a_normalisation_for_another_number_of_channels_is_refused(tmp_path):
    about = {"normalisation": {"mean": [1.0] * 3, "std": [2.0] * 3}}
    write_checkpoint(tmp_path / "m.safetensors", tiny_model(2, in_channels=4), dialect="native", metadata=about)
    with pytest.raises(CheckpointError, match=r"normalisation has 3 numbers .* images of 4 channels"):
        segjax.load(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"normalisation\.mean has 2 numbers and normalisation\.std 3"):
        metadata.checked_metadata({"normalisation": {"mean": [1.0] * 2, "std": [2.0] * 3}}, name="FILE")


@pytest.mark.parametrize("channels", [1, 4])
def test_folders_of_transformers_have_num_channels(tmp_path, channels):
    model = tiny_model(4, in_channels=channels, block_norm_eps=1e-5)
    mean, std = [0.25 * number for number in range(channels)], [1e-4 * (1 + number) for number in range(channels)]
    about = {"normalisation": {"mean": mean, "std": std}, "image_dtype": "float32"}
    write_checkpoint(tmp_path / "hf", model, dialect="hf", metadata=about)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert config["num_channels"] == channels
    assert (processor["do_rescale"], processor["image_mean"], processor["image_std"]) == (False, mean, std)
    loaded = segjax.load(tmp_path / "hf")
    assert loaded.model.in_channels == channels
    assert (list(loaded.mean), list(loaded.std)) == (mean, std)
    # Without the metadata of segjax, as transformers writes it, config.json counts.
    save_file(to_torch(model, dialect="hf"), tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert segjax.load(tmp_path / "hf").model.in_channels == channels
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_channels": 7}))
    with pytest.raises(CheckpointError, match=r"of another shape:\n.*patch_embed"):
        segjax.load(tmp_path / "hf")


# ----------------------------------------------------------------------------------------------------- adapted weights


@pytest.mark.parametrize("seed", [0, 1])
def test_filters_are_summed_for_one_channel_and_otherwise_repeated(seed):
    weight = np.random.default_rng(seed).normal(size=(6, 3, 7, 5)).astype(np.float32)
    red, green, blue = np.moveaxis(weight, 1, 0)
    np.testing.assert_allclose(adapted_stem(weight, 1)[:, 0], red + green + blue, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(adapted_stem(weight, 2), np.stack([red, green], 1) * 1.5, rtol=1e-6)
    np.testing.assert_allclose(adapted_stem(weight, 4), np.stack([red, green, blue, red], 1) * 0.75, rtol=1e-6)
    thirteen = adapted_stem(weight, 13)
    assert thirteen.shape == (6, 13, 7, 5) and thirteen.dtype == np.float32
    np.testing.assert_allclose(thirteen[:, 11], blue * 3 / 13, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_starts_from_rgb_weights_whose_first_convolution_is_adapted(family, channels, caplog):
    caplog.set_level(logging.INFO, logger="segjax")
    rgb, model = tiny_model(1, family), tiny_model(2, family, in_channels=channels)
    said = initialize(model, Checkpoint.of(to_torch(rgb)))
    assert said == f"all weights; first convolution adapted from 3 channels to {channels}"
    assert "the checkpoint has 3 channels, the images" in caplog.text
    before, after = named_variables(rgb), named_variables(model)
    other = [path for path in before if before[path].get_value().shape != after[path].get_value().shape]
    assert len(other) == 1
    assert all(np.array_equal(before[path][...], after[path][...]) for path in before if path not in other)
    # HWIO, or of patches (1, 1, C * pixels, O): in both the input channel is the slowest of the third axis.
    old, new = (np.asarray(named[other[0]][...]) for named in (before, after))
    old, new = (kernel.reshape(*kernel.shape[:2], number, -1) for kernel, number in ((old, 3), (new, channels)))
    for channel in range(channels):
        expected = old.sum(axis=2) if channels == 1 else old[:, :, channel % 3] * (3 / channels)
        np.testing.assert_allclose(new[:, :, channel], expected, rtol=1e-4, atol=1e-6)


def test_settings_of_a_run_do_not_take_the_channels_of_a_checkpoint():
    found = read_settings(Checkpoint.of(to_torch(tiny_model(1, in_channels=4))), "segformer_b0")
    assert "dims" in found.known and "in_channels" not in found.known | found.assumed


def test_non_rgb_weights_are_not_adapted_but_may_stay_random():
    weights, model = to_torch(tiny_model(1, in_channels=13)), tiny_model(2, in_channels=4)
    with pytest.raises(CheckpointError, match="takes 13 channels, and the images have 4") as caught:
        initialize(model, Checkpoint.of(weights))
    pattern = "backbone.patch_embed1.proj.*"
    assert f"--config.init.keep=('{pattern}',)" in str(caught.value)
    before = np.array(named_variables(model)["backbone.patch_embed1.proj.kernel"][...])
    initialize(model, Checkpoint.of(weights), keep=(pattern,))
    assert np.array_equal(named_variables(model)["backbone.patch_embed1.proj.kernel"][...], before)
    assert np.array_equal(to_torch(model)["backbone.block1.0.norm1.bias"], weights["backbone.block1.0.norm1.bias"])


def test_load_torch_never_adapts_weights():
    with pytest.raises(CheckpointError, match=r"checkpoint \(4, 3, 7, 7\), model \(4, 4, 7, 7\)"):
        segjax.load_torch(tiny_model(2, in_channels=4), to_torch(tiny_model(1)))
