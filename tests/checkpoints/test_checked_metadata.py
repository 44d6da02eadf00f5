"""Metadata from files: errors name file and key of an invalid value; damaged parts that are not needed are omitted."""

import copy
import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file

from segjax import to_torch
from segjax.checkpoints import metadata
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.load import load
from segjax.runtime.reading import UnreadableError, parse_json
from tests.tiny import SIZES, tiny_model

ABOUT = {
    "model": {
        "name": "segformer_b0",
        "num_classes": 3,
        "overrides": {"dims": [4, 8, 10, 16]},
        "param_dtype": "float32",
    },
    "dataset": {
        "name": "yard",
        "class_names": ["gate", "door", "cat"],
        "colors": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "ignore_label": 255,
    },
    "normalisation": {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]},
    "input_size": [64, 96],
    "licence": "free",
    "provenance": {"source": "a test", "made_from": {"source": "another", "step": 3}},
}
IMPOSSIBLE = {
    "std": ([0, 0, 0], [float("inf")] * 3, [-1.0, 58, 57], [float("nan")] * 3, [58.0], 58.0, ["a", "b", "c"], None),
    "mean": ([0.0], [float("nan")] * 3, [float("-inf")] * 3, [1, 2, 3, 4], "x", [None] * 3),
}
NORMALISATIONS = [(key, value) for key, values in IMPOSSIBLE.items() for value in values]


def changed(place, value):
    about = copy.deepcopy(ABOUT)
    *outer, key = place.split(".")
    part = about
    for name in outer:
        part = part[name]
    part[key] = value
    return about


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        ("model", "x", "model"),
        ("model.name", -1, "model.name"),
        ("model.name", [[]], "model.name"),
        ("model.name", "segformer_b9", "segformer_b9"),
        ("model.num_classes", 0, "model.num_classes"),
        ("model.num_classes", 10**12, "model.num_classes"),
        ("model.overrides", 5, "model.overrides"),
        ("model.overrides.dims", "x", "model.overrides.dims"),
        ("model.overrides.depths", [1, 1, 1], "model.overrides.depths"),
        ("model.overrides.depths", [10**9] * 4, "model.overrides.depths"),
        ("model.overrides.num_heads", [0, 1, 1, 1], "model.overrides.num_heads"),
        ("model.overrides.colour", 1, "colour"),
        ("model.param_dtype", "int8", "model.param_dtype"),
        ("dataset", [1], "dataset"),
        ("dataset.class_names", "abc", "dataset.class_names"),
        ("dataset.class_names", ["a", "b"], "2 class names but 3 colours"),
        ("dataset.class_names", ["a", None, "c"], "dataset.class_names.1"),
        ("dataset.ignore_label", "x", "dataset.ignore_label"),
        ("dataset.ignore_label", 1, "ignore label"),
        ("dataset.colors", 5, "dataset.colors"),
        ("dataset.colors", [[1, 2, 300]] * 3, "dataset.colors.0.2"),
        ("normalisation", 5, "normalisation"),
        ("input_size", "x", "input_size"),
        ("input_size", True, "input_size"),
        ("input_size", [0, 3], "input_size.0"),
        ("config", [], "config"),
        *((f"normalisation.{key}", value, f"normalisation.{key}") for key, value in NORMALISATIONS),
    ],
)
def test_invalid_metadata_are_refused_with_their_key(place, value, word):
    with pytest.raises(UnreadableError, match="FILE") as caught:
        metadata.checked_metadata(changed(place, value), name="FILE")
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [("provenance.source", None), ("provenance", 5), ("provenance.made_from.step", "x"), ("licence", 3)],
)
def test_invalid_entries_that_nothing_depends_on_are_omitted_and_named(caplog, place, value):
    caplog.set_level(logging.INFO, logger="segjax")
    found = metadata.checked_metadata(changed(place, value), name="FILE")
    assert place.partition(".")[0] not in found and f"FILE: {place}" in caplog.text
    assert found["normalisation"] == ABOUT["normalisation"]


def test_valid_metadata_stay_unchanged():
    about = {**ABOUT, "config": {"augment": {"crop": [3, 4]}, "more": 1}, "step": 3, "mean_iou": 0.5}
    assert metadata.checked_metadata(about, name="FILE") == about
    assert "input_size" not in metadata.checked_metadata(about | {"input_size": None}, name="FILE")


def test_only_unencodable_text_is_replaced():
    names = ["line\nbreak", "\x1b[31mred", "lone \udc80"]
    read = parse_json(json.dumps(changed("dataset.class_names", names)), name="FILE")
    found = metadata.checked_metadata(read, name="FILE")["dataset"]["class_names"]
    assert found == [*names[:2], "lone ?"] and all(name.encode() for name in found)
    with pytest.raises(UnreadableError, match="FILE"):
        parse_json('["\\udc80", ' + "[" * 100_000, list, name="FILE")


def test_errors_name_the_file_and_the_key(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = to_torch(tiny_model(1, num_classes=3))
    for about, word in (
        (json.dumps(changed("normalisation.std", [0, 0, 0])), "normalisation.std.0"),
        (json.dumps([1]), "dictionary"),
        ("{", "not JSON"),
    ):
        save_file(weights, path, metadata={"segjax": about})
        with pytest.raises(CheckpointError, match=r"w\.safetensors.*'segjax'") as caught:
            load(path)
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------------------- other packages


def folder_of(path, weights, *, config=None, preprocessor=None):
    path.mkdir(exist_ok=True)
    save_file(weights, path / "model.safetensors")
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


def config_with(**changes):
    sizes = {"hidden_sizes": list(SIZES["dims"]), "depths": list(SIZES["depths"]), "num_attention_heads": [1, 2, 5, 4]}
    return {"model_type": "segformer", **sizes, "decoder_hidden_size": SIZES["decoder_dim"], **changes}


@pytest.mark.parametrize(
    ("numbers", "classes", "names", "line"),
    [
        ((0, 1, 2), 3, ["n0", "n1", "n2"], None),
        ((1, 2, 3), 3, ["n1", "n2", "n3"], "counts from 1"),
        ((0, 2), 3, ["n0", "class 1", "n2"], "names 2 of 3"),
        ((1, 2), 3, ["class 0", "n1", "n2"], "names 2 of 3"),
        ((0, 7, 11), 3, None, "0, 7, 11"),
        ((0, 1, 2, 3, 5), 3, None, "0, 1, 2, 3, 5"),
        ((-1, 0), 3, None, "-1, 0"),
    ],
)
def test_numbered_names_are_matched_or_the_mismatch_is_reported(caplog, numbers, classes, names, line):
    caplog.set_level(logging.INFO, logger="segjax")
    assert metadata.matched({number: f"n{number}" for number in numbers}, classes) == names
    assert line in caplog.text if line else not caplog.text


def test_names_of_a_config_that_counts_from_1_are_read(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="segjax")
    weights = to_torch(tiny_model(1, num_classes=3), dialect="hf")
    names = {str(number): f"n{number}" for number in (1, 2, 3)}
    loaded = load(folder_of(tmp_path / "hf", weights, config=config_with(id2label=names)))
    assert loaded.classes.class_names == ("n1", "n2", "n3") and "counts from 1" in caplog.text
    assert metadata.NUMBERED_NAMES not in loaded.metadata


def test_names_come_from_label2id_if_id2label_is_missing(tmp_path):
    weights = to_torch(tiny_model(1, num_classes=3), dialect="hf")
    config = {key: value for key, value in config_with(label2id={"b": 1, "c": 2, "a": 0}).items() if key != "id2label"}
    assert load(folder_of(tmp_path / "hf", weights, config=config)).classes.class_names == ("a", "b", "c")


@pytest.mark.parametrize("names", [5, ["a"], {"0": None}, {"x": "a"}])
def test_names_of_another_type_are_omitted_and_named(tmp_path, caplog, names):
    caplog.set_level(logging.INFO, logger="segjax")
    read = read_checkpoint(folder_of(tmp_path / "hf", {"a": np.ones(2)}, config=config_with(id2label=names)))
    assert "dataset" not in read.metadata and "config.json: id2label" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", [0, 1, 2, 3]),
        ("num_attention_heads", "x"),
        ("decoder_hidden_size", 10**12),
        ("drop_path_rate", 2.0),
        ("layer_norm_eps", "x"),
        ("model_type", 5),
    ],
)
def test_invalid_settings_in_a_config_are_refused(tmp_path, key, value):
    with pytest.raises(CheckpointError, match=f"config.json: {key}"):
        read_checkpoint(folder_of(tmp_path / "hf", {"a": np.ones(2)}, config=config_with(**{key: value})))


@pytest.mark.parametrize(
    "preprocessor",
    [
        *({"image_mean": [0.5] * 3, "image_std": [0.2] * 3} | {f"image_{key}": v} for key, v in NORMALISATIONS if v),
        {"image_mean": [0.5] * 3},
        {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "rescale_factor": 0},
        {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "rescale_factor": "x"},
        {"do_normalize": "yes"},
    ],
)
def test_an_invalid_normalisation_of_a_preprocessor_is_refused(tmp_path, preprocessor):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        read_checkpoint(folder_of(tmp_path / "hf", {"a": np.ones(2)}, preprocessor=preprocessor))


@pytest.mark.parametrize(
    ("mean", "std"), [([1.0], [2.0, 3, 4]), ([1, 2, 3], [0, 1, 1]), ([1, 2, 3], [-1, 1, 1]), ([1, 2, 3], None)]
)
def test_an_invalid_normalisation_of_mmsegmentation_is_refused(mean, std):
    weights = {"data_preprocessor.mean": np.array(mean, np.float32)[:, None, None]}
    weights |= {} if std is None else {"data_preprocessor.std": np.array(std, np.float32)[:, None, None]}
    with pytest.raises(CheckpointError, match="data_preprocessor"):
        metadata.of_mmseg(None, weights)
