"""A loaded checkpoint is one object, whose keys are recognised once for all users."""

import hashlib
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

import segjax
from segjax.checkpoints import checkpoint as checkpoint_module
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError
from segjax.checkpoints.files import provenance_at, read_checkpoint
from segjax.checkpoints.initialize import initialize
from segjax.checkpoints.key_maps import KEY_FORMATS
from segjax.checkpoints.load import load, model_of
from segjax.checkpoints.recognition import recognise
from segjax.checkpoints.renaming import renamings
from segjax.checkpoints.state_dict import named_variables
from segjax.commands import convert, inspect
from tests.tiny import tiny_model


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by (dialect, family) whenever keys are recognised."""
    found = []

    def counted(shapes, *, dialect="auto", family=None):
        found.append((dialect, family))
        return recognise(shapes, dialect=dialect, family=family)

    monkeypatch.setattr(checkpoint_module, "recognise", counted)
    return found


def arrays_of(seed, family="segformer", dialect="native"):
    return segjax.to_torch(tiny_model(seed, family), dialect=dialect)


def encoder_of(seed):
    return segjax.to_torch(tiny_model(seed), dialect="backbone")


def same(one, other):
    return {key: value.tobytes() for key, value in one.items()} == {
        key: value.tobytes() for key, value in other.items()
    }


USES = {
    "convert": lambda path: convert.main([str(path), str(path.with_name("out.safetensors")), "--to", "native"]),
    "convert to a folder": lambda path: convert.main([str(path), str(path.with_name("out"))]),
    "inspect": lambda path: inspect.main([str(path)]),
    "load": load,
    "initialize": lambda path: initialize(tiny_model(7), path),
    "from_torch": lambda path: segjax.from_torch(read_checkpoint(path).weights),
    "load_torch": lambda path: segjax.load_torch(tiny_model(7), read_checkpoint(path).weights),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dialect", ["native", "hf", "smp"])
def test_every_use_of_a_file_recognises_its_keys_once(use, dialect, tmp_path, calls):
    save_file(arrays_of(3, dialect=dialect), tmp_path / "a.safetensors")
    assert USES[use](tmp_path / "a.safetensors") in (None, 0, [], "all weights") or use in ("load", "from_torch")
    assert len(calls) == 1


def test_converting_an_encoder_with_explicit_options_recognises_once(tmp_path, calls):
    save_file(encoder_of(2), tmp_path / "a.safetensors")
    source, options = str(tmp_path / "a.safetensors"), ["--dialect", "backbone", "--model", "segformer_b0"]
    assert convert.main([source, str(tmp_path / "b.safetensors"), "--to", "backbone", *options]) == 0
    assert calls == [("backbone", None)]


def test_an_orbax_folder_is_converted_without_recognition(tmp_path, calls):
    orbax_folder.save_model(tmp_path / "a", tiny_model(1), metadata={})
    assert convert.main([str(tmp_path / "a"), str(tmp_path / "b.safetensors")]) == 0
    assert calls == []


def test_one_checkpoint_serves_several_uses(tmp_path, calls):
    arrays = arrays_of(4, dialect="hf")
    save_file(arrays, tmp_path / "a.safetensors")
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    found = checkpoint.recognised
    assert (found.key_format.dialect, found.key_format.family, found.has_head) == ("hf", "segformer", True)
    assert found.sizes[0]["dims"] == (4, 8, 10, 16) and found.sizes[1] == 5 and found.fitting == len(arrays)
    first, (second, _) = segjax.from_torch(checkpoint), model_of(checkpoint)
    third, fourth = tiny_model(8), tiny_model(9)
    segjax.load_torch(third, checkpoint)
    initialize(fourth, checkpoint)
    expected = arrays_of(4)
    assert all(same(segjax.to_torch(model), expected) for model in (first, second, third, fourth))
    assert calls == [("auto", None)]


def test_read_as_returns_the_checkpoint_itself_if_it_matches(calls):
    checkpoint = Checkpoint.of(arrays_of(1))
    assert checkpoint.recognised.key_format.dialect == "native"
    assert checkpoint.read_as(family="segformer") is checkpoint
    assert checkpoint.read_as(dialect="native") is checkpoint
    other = checkpoint.read_as(dialect="hf")
    assert other is not checkpoint and other.recognised.key_format.dialect == "hf"
    assert other.read_as(family="segformer") is other
    with pytest.raises(KeyError, match="'hf' has no keys for hrnet"):
        other.read_as(family="hrnet").recognised.key_format  # noqa: B018
    assert len(calls) == 3


def test_reading_a_file_as_another_model_is_refused_with_a_guess(tmp_path):
    save_file(arrays_of(1), tmp_path / "a.safetensors")
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="It looks like SegFormer as native"):
        segjax.from_torch(checkpoint, dialect="hf")
    with pytest.raises(CheckpointError, match="It looks like SegFormer as native"):
        segjax.from_torch(checkpoint, name="hrnet_w18")


def test_an_orbax_folder_is_a_state_dict_in_native_keys(tmp_path):
    model = tiny_model(6, "hrnet")
    orbax_folder.save_model(tmp_path / "a", model, metadata={"step": 3})
    checkpoint = read_checkpoint(tmp_path / "a")
    assert checkpoint.is_orbax and checkpoint.weights.keys() == named_variables(model).keys()
    expected = {key: value for key, value in segjax.to_torch(model).items() if "num_batches" not in key}
    assert same(checkpoint.state_dict, expected)
    start = tiny_model(7, "hrnet")
    initialize(start, checkpoint)
    assert same(segjax.to_torch(start), segjax.to_torch(model))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_dtype_of_a_checkpoint_is_that_of_its_floats(dtype):
    arrays = {"a": np.zeros(2, dtype), "b": np.ones(3, dtype), "n": np.zeros((), np.int64)}
    assert Checkpoint(arrays).param_dtype == dtype
    assert Checkpoint(arrays | {"c": np.zeros(1, np.float16)}).param_dtype == (
        np.float16 if dtype == np.float16 else np.float32
    )


def test_provenance_names_and_hashes_a_file_without_reading_its_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": np.ones(3)}, path)
    expected = {"source": "a.safetensors", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert provenance_at(path) == expected == dict(read_checkpoint(path).provenance)
    orbax_folder.save_model(tmp_path / "b", tiny_model(1), metadata={"step": 9, "provenance": expected})
    kept = orbax_folder.load_metadata(tmp_path / "b")
    assert (
        provenance_at(tmp_path / "b")
        == {
            "source": "b",
            "sha256": kept["sha256"],
            "step": 9,
            "made_from": expected,
        }
        == dict(read_checkpoint(tmp_path / "b").provenance)
    )
    assert json.loads(json.dumps(provenance_at(tmp_path / "b"))) == provenance_at(tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------ key maps


def test_no_foreign_key_has_two_stage_fields():
    # One pattern with any stage in its place would otherwise match keys that no rule has.
    for key_format in KEY_FORMATS:
        for key_map in key_format.key_maps:
            for rule in key_map:
                assert all(sum(name.count(field) for field in ("{s}", "{z}", "{r}")) <= 1 for name in rule.foreign)


def variants(key):
    """Keys like this one, of which most exist in no model."""
    yield key
    yield f"x{key}"
    yield f"{key}.x"
    for digit in "01234567":
        for at, letter in enumerate(key):
            if letter.isdigit():
                yield f"{key[:at]}{digit}{key[at + 1 :]}"


@pytest.mark.parametrize("family", ["segformer", "mmseg", "plain", "hrnet", "ocr", "segnext", "simple", "zuppichini"])
def test_a_key_maps_pattern_matches_exactly_the_keys_it_renames(family):
    model = tiny_model(0, family)
    dialects = {each.dialect for each in KEY_FORMATS}
    matched = 0
    for dialect in sorted(dialects):
        try:
            keys = segjax.to_torch(model, dialect=dialect)
        except CheckpointError:
            continue
        asked = list(dict.fromkeys(name for key in list(keys)[::7] for name in variants(key)))
        for key_format in KEY_FORMATS:
            for renaming in renamings(key_format)[:2]:
                for key in asked:
                    fits = renaming.fits(key)
                    assert fits == bool(renaming.groups([key], foreign=True)), (key_format.dialect, key)
                    matched += fits
    assert matched > 100


def test_log_lines_of_a_load_are_in_order(caplog):
    caplog.set_level(logging.INFO, "segjax")
    segjax.from_torch(arrays_of(1, dialect="hf"))
    words = [
        "read as hf",
        "assumed num_heads",
        "assumed block_norm_eps",
        "assumed patch_norm_eps",
        "unlike segformer_b0",
    ]
    assert [line.startswith(word) for line, word in zip(caplog.messages, words, strict=True)] == [True] * 5
