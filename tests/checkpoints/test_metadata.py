"""The metadata of a checkpoint in every format, and the output of `segjax inspect`."""

import hashlib
import json
import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from segjax import layers, to_torch
from segjax.checkpoints import metadata, orbax_folder, state_dict
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.load import load
from segjax.checkpoints.save import save
from segjax.commands import conversion, convert, inspect
from segjax.data import specs
from segjax.data.augment import normalise
from segjax.inference.engine import Inference, Protocol
from segjax.train import setup
from segjax.train.config import plain
from segjax.train.start import origin_metadata
from tests.runs import cheap_step, make_config, run
from tests.tiny import FAMILIES, tiny_model

DATASET = {
    "name": "yard",
    "class_names": ["gate", "front door", "cat", "mud", "hen"],
    "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [255, 0, 128]],
    "ignore_label": 200,
}
ABOUT = {
    "dataset": DATASET,
    "normalisation": {"mean": [1.5, 2.5, 3.5], "std": [10.0, 20.0, 40.0]},
    "input_size": [96, 160],
    "licence": "for the yard alone",
    "provenance": {"initial_weights": None},
}


def converted(source, destination, *settings):
    assert convert.main([str(source), str(destination), *settings]) == 0
    return destination


def inspected(capsys, source):
    capsys.readouterr()
    assert inspect.main([str(source)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and max(map(len, printed.out.splitlines())) <= 80
    return printed.out


def refused(capsys, source):
    capsys.readouterr()
    assert inspect.main([str(source)]) == 2
    printed = capsys.readouterr()
    message = " ".join(printed.err.split())
    assert printed.out == "" and message.startswith("segjax inspect: ") and str(source) in message
    return message


# ------------------------------------------------------------------------------------------------- there and carried on


def test_metadata_of_a_folder_survive_every_format_that_can_hold_them(tmp_path, monkeypatch):
    # Measured in parity/, where transformers is.
    monkeypatch.setattr(conversion, "_measure_transformers", lambda model: None)
    model = tiny_model(1, num_heads=(2, 4, 5, 8))
    orbax_folder.save_model(tmp_path / "a", model, metadata=ABOUT)
    converted(tmp_path / "a", tmp_path / "b")
    converted(tmp_path / "b", tmp_path / "c.safetensors", "--to", "smp")
    converted(tmp_path / "c.safetensors", tmp_path / "d", "--to", "hf")
    converted(tmp_path / "d", tmp_path / "e")
    for name in ("a", "b", "c.safetensors", "d", "e"):
        loaded = load(tmp_path / name)
        # Heads and eps, which no state dict tells.
        assert loaded.model.spec == model.spec, name
        assert {key: loaded.metadata[key] for key in ABOUT if key != "provenance"} == {
            key: ABOUT[key] for key in ABOUT if key != "provenance"
        }
        assert (loaded.mean, loaded.std) == ((1.5, 2.5, 3.5), (10.0, 20.0, 40.0))
        assert loaded.classes.class_names == tuple(DATASET["class_names"]) and loaded.classes.ignore_label == 200
        assert loaded.classes.colors[-1] == (255, 0, 128)
        assert {key: value.tobytes() for key, value in to_torch(loaded.model).items()} == {
            key: value.tobytes() for key, value in to_torch(model).items()
        }
    provenance = load(tmp_path / "e").metadata["provenance"]
    sources = []
    while "source" in provenance:
        sources.append(provenance["source"])
        provenance = provenance["made_from"]
    assert sources == ["d", "c.safetensors", "b", "a"] and provenance == {"initial_weights": None}


def test_predictions_use_the_normalisation_of_the_checkpoint(tmp_path):
    orbax_folder.save_model(tmp_path / "a", tiny_model(1), metadata=ABOUT)
    loaded = load(tmp_path / "a")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
    predicted = np.stack(Inference(loaded.model, normalise=loaded.normalise).labels(images))
    logits, _ = nnx.jit(loaded.model)((images - np.float32([1.5, 2.5, 3.5])) / np.float32([10, 20, 40]))
    by_hand = np.asarray(layers.resize(logits, (32, 40)).argmax(axis=-1))
    np.testing.assert_array_equal(predicted, by_hand)
    assert (predicted != Inference(loaded.model).labels(images)).mean() > 0.01


def test_the_hash_of_the_source_file_is_kept_in_conversions(tmp_path):
    save_file(to_torch(tiny_model(1), dialect="hf"), tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "b")
    about = load(tmp_path / "b").metadata
    expected = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert about["provenance"] == {
        "source": "a.safetensors",
        "sha256": expected,
        "dialect": "hf",
        "package": "transformers",
    }
    assert about["sha256"] != expected and "non-commercial" in about["licence"]


@pytest.mark.parametrize("passed", [True, False])
def test_a_verification_is_recorded_with_its_error(tmp_path, passed):
    save_file(to_torch(tiny_model(1)), tmp_path / "a.safetensors")
    report = mock.Mock(passed=passed, against="a reference", error=np.float32(0.25))
    with mock.patch.object(conversion, "_verify", lambda model, foreign: report):
        status = convert.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b"), "--verify"])
    assert status == (0 if passed else 1) and (tmp_path / "b").exists() == passed
    if passed:
        verified = load(tmp_path / "b").metadata["provenance"]["verified"]
        assert verified == {"against": "a reference", "error": 0.25}


@pytest.mark.parametrize("spec", [specs.CITYSCAPES, specs.ADE20K, specs.VOC, specs.CAMVID], ids=lambda spec: spec.name)
def test_classes_are_guessed_from_their_number_and_marked_as_guessed(tmp_path, caplog, spec):
    caplog.set_level(logging.INFO, "segjax")
    save_file(to_torch(tiny_model(1, num_classes=spec.num_classes)), tmp_path / "a.safetensors")
    for name in ("a.safetensors", "b"):
        loaded = load(tmp_path / name)
        assert (loaded.classes.class_names, loaded.classes.colors) == (spec.class_names, spec.colors)
        assert loaded.classes.ignore_label == spec.ignore_label
        # Also where it was carried into a folder.
        assert loaded.metadata["dataset"]["guessed"] is True
        if name == "a.safetensors":
            line = f"it names no classes; {spec.num_classes} are assumed to be those of {spec.name}"
            assert line in caplog.messages
            converted(tmp_path / "a.safetensors", tmp_path / "b")


def test_other_numbers_of_classes_get_numbered_names(tmp_path):
    save_file(to_torch(tiny_model(1, num_classes=7)), tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.classes.class_names == tuple(f"class {k}" for k in range(7)) and "dataset" not in loaded.metadata
    assert len(set(loaded.classes.colors)) == 7
    assert (loaded.mean, loaded.std) == (specs.IMAGENET_MEAN, specs.IMAGENET_STD)
    save_file(to_torch(tiny_model(1, num_classes=300)), tmp_path / "b.safetensors")
    loaded = load(tmp_path / "b.safetensors")
    assert loaded.classes.class_names[-1] == "class 299" and loaded.classes.ignore_label == 65535
    assert len(set(loaded.classes.colors)) == 300
    converted(tmp_path / "b.safetensors", tmp_path / "c")


def test_an_encoder_is_converted_without_a_number_of_classes(tmp_path, capsys):
    model = tiny_model(1)
    encoder = to_torch(model, dialect="backbone")
    save_file(encoder | {"head.weight": np.ones((1000, 16), np.float32)}, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "backbone")
    written = load_file(tmp_path / "b.safetensors")
    assert {key: value.tobytes() for key, value in written.items()} == {
        key: value.tobytes() for key, value in encoder.items()
    }
    assert "segformer_b0, its encoder only, " in " ".join(capsys.readouterr().out.split())
    # Elsewhere its decoder is new, and its classes must be told.
    assert convert.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c")]) == 2
    assert "give the number of classes" in " ".join(capsys.readouterr().err.split())
    assert "segformer_b0, its encoder only" in inspected(capsys, tmp_path / "b.safetensors")


def test_a_folder_without_most_metadata_loads(tmp_path, capsys):
    orbax_folder.save_model(tmp_path / "a", tiny_model(1, num_classes=19), metadata={"source": "x.pth"})
    loaded = load(tmp_path / "a")
    assert loaded.classes == specs.DatasetSpec(**{**vars(specs.CITYSCAPES), "splits": ()})
    assert loaded.metadata["dataset"]["guessed"] and loaded.metadata["input_size"] is None
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), np.uint8)
    np.testing.assert_array_equal(loaded.normalise(images), normalise(images))
    assert "provenance     unknown" in inspected(capsys, tmp_path / "a")
    config = {"augment": {"crop": [64, 96]}}
    orbax_folder.save_model(tmp_path / "b", tiny_model(1), metadata={"config": config, "step": 7, "dataset": DATASET})
    # The crop is that of the training.
    assert load(tmp_path / "b").metadata["input_size"] is None


def test_invalid_and_contradictory_metadata_are_refused(tmp_path):
    arrays = to_torch(tiny_model(1))
    save_file(arrays, tmp_path / "a.safetensors", metadata={"segjax": "{"})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: its metadata 'segjax': (not JSON|should be)"):
        load(tmp_path / "a.safetensors")
    wrong = {"dataset": DATASET | {"ignore_label": 3}}
    save_file(arrays, tmp_path / "b.safetensors", metadata={"segjax": json.dumps(wrong)})
    with pytest.raises(CheckpointError, match="ignore label 3 is also the label of 'mud'"):
        load(tmp_path / "b.safetensors")


# ------------------------------------------------------------------------------------------------------------ trainings


def test_a_new_or_resumed_run_prints_normalisation_crop_and_start(tmp_path, monkeypatch):
    cheap_step(monkeypatch)
    start = tmp_path / "start.safetensors"
    save_file(to_torch(tiny_model(3, num_classes=19)), start)
    origin = {"source": "start.safetensors", "sha256": hashlib.sha256(start.read_bytes()).hexdigest()}
    run(make_config(train__steps=4, init__checkpoint=str(start)), tmp_path / "run")
    # What it started from may change, or go away but for a file of that name.
    save_file({"a": np.ones(1)}, start)
    run(make_config(train__steps=6, init__checkpoint=str(start)), tmp_path / "run")
    about = load(tmp_path / "run").metadata
    assert about["step"] == 6 and about["input_size"] == [40, 64]
    assert about["normalisation"] == {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    assert about["provenance"] == {"initial_weights": origin} and "non-commercial" in about["licence"]
    converted(tmp_path / "run", tmp_path / "b")
    carried = load(tmp_path / "b")
    assert carried.classes.name == "streets" and carried.metadata["provenance"]["step"] == 6
    assert carried.metadata["provenance"]["made_from"] == {"initial_weights": origin}
    assert carried.metadata.keys().isdisjoint({"config", "scores", "window", "step"})
    # transformers resizes to what the run was evaluated at, not to its crops of 32x48.
    save(carried, tmp_path / "hf", dialect="hf")
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["do_resize"] and processor["size"] == {"height": 40, "width": 64}


@pytest.mark.parametrize(
    ("settings", "sizes", "expected"),
    [
        ({}, [(40, 64)] * 3, [40, 64]),
        ({}, [(40, 64), (40, 65)], None),
        ({"scales": (0.5, 2.0), "flip": True, "mode": "slide", "crop": (16, 24)}, [(40, 64)], [40, 64]),
        ({"base_size": (128, 32)}, [(40, 80), (20, 40)], [32, 64]),
        ({"size_divisor": 32}, [(40, 64), (33, 50)], [64, 64]),
    ],
)
def test_the_size_in_metadata_of_a_run_is_that_of_its_evaluation(settings, sizes, expected):
    assert setup._evaluated_size(np.array(sizes), Protocol(**settings)) == expected


def test_metadata_of_a_run_state_that_it_started_from_random_weights():
    config = make_config()
    model = state_dict.model_metadata(setup.create_model(config.model, num_classes=19, seed=0))
    of_run = setup.run_metadata(plain(config), model, specs.STREETS, [64, 96])
    about = json.loads(json.dumps(of_run | origin_metadata(config.model.name, config.init)))
    assert metadata.classes_of(about, 19) == specs.STREETS and about.keys() >= ABOUT.keys()
    assert about["provenance"] == {"initial_weights": None} and "random weights" in about["licence"]


# ----------------------------------------------------------------------------------------------------------- inspecting


def test_all_metadata_of_a_folder_are_printed_in_80_columns(tmp_path, capsys):
    orbax_folder.save_model(tmp_path / "a", tiny_model(1, decoder_dim=24), metadata=ABOUT)
    printed = " ".join(inspected(capsys, tmp_path / "a").split())
    for expected in (
        "checkpoint a, a converted folder",
        "model segformer_b0",
        "float32",
        "decoder_dim=24",
        "5 of yard",
        "0 gate #010203, 1 front door #040506,",
        "4 hen #ff0080",
        "ignore label 200",
        "mean 1.5 2.5 3.5, deviation 10 20 40",
        "96x160",
        "for the yard alone",
        "trained from random weights",
    ):
        assert expected in printed
    # Of all 150 classes a name and its colour stay on one line.
    orbax_folder.save_model(tmp_path / "b", tiny_model(1, num_classes=150), metadata={})
    lines = inspected(capsys, tmp_path / "b").splitlines()
    assert any("chest of drawers #0633ff" in line for line in lines)
    assert any("probably those of ade20k, by their number" in line for line in lines)
    # And a setting of several numbers.
    orbax_folder.save_model(tmp_path / "c", tiny_model(1, "hrnet"), metadata={})
    lines = inspected(capsys, tmp_path / "c").splitlines()
    assert len([line for line in lines if "=(1, 1, 1, 1)" in line]) == 2


# One of each family, and a key that its package writes and does not read.
EXTRAS = {"segformer": "decode_head.conv_seg.bias", "hrnet": "loss.criterion.weight", "segnext": None, "simple": None}


@pytest.mark.parametrize("family", EXTRAS)
def test_a_foreign_file_is_described_as_from_torch_reads_it(tmp_path, capsys, family):
    arrays = to_torch(tiny_model(1, family))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    numbers = sum(value.size for key, value in arrays.items() if not key.endswith(statistics))
    half = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in arrays.items()}
    extra = EXTRAS[family]
    save_file(half | ({extra: np.ones(3, np.float16)} if extra else {}), tmp_path / "a.safetensors")
    printed = inspected(capsys, tmp_path / "a.safetensors")
    rows = {line[:15].strip(): line[15:] for line in printed.splitlines() if line[:15].strip()}
    assert rows["checkpoint"].startswith("a.safetensors, read as native (")
    assert rows["model"] == FAMILIES[family][0] and rows["parameters"] == f"{numbers:,}, float16"
    assert rows["classes"] == "5, without names" and "ImageNet's" in printed
    assert (f"not used from the checkpoint (1): {extra}" in " ".join(printed.split())) == bool(extra)
    assert ("assumed " in printed) and ("=" in rows["overrides"])


def test_a_float64_folder_is_reported_as_float64(tmp_path, capsys):
    with jax.enable_x64(True):
        orbax_folder.save_model(tmp_path / "a", tiny_model(1, dtype=jnp.float64), metadata={})
    assert ", float64\n" in inspected(capsys, tmp_path / "a") and not jax.config.jax_enable_x64


def test_sources_that_cannot_be_inspected_are_refused_with_status_2(tmp_path, capsys):
    assert "there is no such file" in refused(capsys, tmp_path / "nothing.pth")
    (tmp_path / "page.pth").write_text("<html>")
    assert "which is text" in refused(capsys, tmp_path / "page.pth")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint of segjax in this folder" in refused(capsys, tmp_path / "empty")
    arrays = to_torch(tiny_model(1))
    del arrays["backbone.norm1.weight"]
    save_file(arrays, tmp_path / "a.safetensors")
    message = refused(capsys, tmp_path / "a.safetensors")
    assert "1 missing from the checkpoint" in message and "backbone.norm1.weight" in message
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "b.safetensors")
    assert "fits no model of segjax" in refused(capsys, tmp_path / "b.safetensors")


# --------------------------------------------------------------------------------------------------- mmsegmentation


@pytest.mark.parametrize("kind", ["0.x", "1.x"])
def test_classes_and_palette_of_mmsegmentation_are_read_from_either_place(kind):
    names, palette = tuple(DATASET["class_names"]), np.array(DATASET["colors"])
    meta = {"CLASSES": names, "PALETTE": palette.tolist(), "config": "..."}
    if kind == "1.x":
        meta = {"dataset_meta": {"classes": names, "palette": palette}, "cfg": "..."}
    arrays = {"data_preprocessor.mean": np.full((3, 1, 1), 2.5), "data_preprocessor.std": np.full((3, 1, 1), 4.0)}
    about = metadata.of_mmseg({"meta": meta, "state_dict": {}}, arrays)
    assert about["dataset"] == DATASET | {"name": "unknown", "ignore_label": 255}
    assert about["normalisation"] == {"mean": [2.5] * 3, "std": [4.0] * 3}
    assert json.loads(json.dumps(about)) == about


@pytest.mark.parametrize("meta", [None, 3, {}, {"CLASSES": None}, {"CLASSES": 5}, {"CLASSES": [1, 2]}, {"epoch": 3}])
def test_a_meta_entry_without_names_is_ignored(meta):
    assert metadata.of_mmseg({"meta": meta}, {}) == {}
    about = metadata.of_mmseg({"meta": {"CLASSES": ["a", "b"], "PALETTE": [[1, 2]]}}, {})
    assert about["dataset"]["class_names"] == ["a", "b"] and np.shape(about["dataset"]["colors"]) == (2, 3)
