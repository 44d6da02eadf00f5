"""A file with several sets of weights: the set that is read, and the message about it."""

import logging
import time

import numpy as np
import pytest
import torch

from segjax import to_torch
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import provenance_at, read_checkpoint
from segjax.checkpoints.selection import as_arrays
from segjax.commands import inspect
from segjax.train.start import read_start
from tests.runs import make_config
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def raw():
    return to_torch(tiny_model(1))


@pytest.fixture(scope="module")
def averaged(raw):
    return {key: value + np.ones((), value.dtype) for key, value in raw.items()}


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


def without_statistics(weights):
    return {key: value for key, value in weights.items() if "running" not in key and "num_batches" not in key}


FILES = {
    "an entry": lambda raw, averaged: {"state_dict": raw, "state_dict_ema": averaged, "epoch": 3},
    "model and model_ema": lambda raw, averaged: {"model": raw, "model_ema": averaged, "ema_decay": 0.99},
    "nested": lambda raw, averaged: {"model": {"state_dict": raw, "ema": {"module": averaged, "decay": np.ones(())}}},
    "prefixes": lambda raw, averaged: {"state_dict": prefixed("model.", raw) | prefixed("ema_model.", averaged)},
    "names without dots": lambda raw, averaged: {
        "state_dict": raw | {f"ema_{key.replace('.', '_')}": value for key, value in averaged.items()}
    },
    "mmengine exchanges them": lambda raw, averaged: {
        "state_dict": averaged,
        "ema_state_dict": prefixed("module.", raw) | {"steps": np.ones((), np.int64)},
        "meta": {"mmengine_version": "0.10.4"},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_averaged_weights_are_named_and_read_on_request(raw, averaged, caplog, name):
    caplog.set_level(logging.INFO, logger="segjax")
    given = FILES[name](raw, averaged)
    default = averaged if name.startswith("mmengine") else raw
    assert same(as_arrays(given), default) and "averaged" in caplog.text
    assert same(as_arrays(given, weights="ema"), averaged)
    assert same(as_arrays(given, weights="raw"), raw)
    with pytest.raises(CheckpointError, match=r"no teacher's weights.*--weights teacher"):
        as_arrays(given, weights="teacher")


def test_averages_without_running_statistics_take_those_of_the_raw_weights(raw, averaged, caplog):
    caplog.set_level(logging.INFO, logger="segjax")
    some = {f"model_ema.{key.replace('.', '')}": value for key, value in without_statistics(averaged).items()}
    counters = {"model_ema.decay": np.ones(()), "model_ema.num_updates": np.ones((), np.int64)}
    found = as_arrays({"state_dict": prefixed("model.", raw) | some | counters}, weights="ema")
    assert same(without_statistics(found), without_statistics(averaged)) and found.keys() == raw.keys()
    assert all(np.array_equal(found[key], raw[key]) for key in raw.keys() - without_statistics(raw).keys())
    assert "3 are those of the raw weights" in caplog.text


def test_averaged_weights_are_read_if_there_are_no_raw_ones(averaged, caplog):
    caplog.set_level(logging.INFO, logger="segjax")
    for given in ({"state_dict_ema": averaged}, prefixed("ema.", averaged)):
        assert same(as_arrays(given), averaged) and "averaged" in caplog.text
        with pytest.raises(CheckpointError, match="no raw weights"):
            as_arrays(given, weights="raw")


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_choice_between_student_and_teacher_is_required(tmp_path, raw, averaged, prefix, capsys):
    both = prefixed(f"{prefix}student.", raw) | prefixed(f"{prefix}teacher.", averaged)
    for given in ({"state_dict": both}, {"student": raw, "teacher": averaged, "epoch": 1}):
        for weights in (None, "ema", "raw"):
            with pytest.raises(CheckpointError, match="--weights student or --weights teacher"):
                as_arrays(given, weights=weights)
        assert same(as_arrays(given, weights="student"), raw)
        assert same(as_arrays(given, weights="teacher"), averaged)
    path = tmp_path / "both.pth"
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in both.items()}, path)
    assert inspect.main([str(path)]) == 2 and "--weights student" in " ".join(capsys.readouterr().err.split())
    settings = make_config().init
    with settings.unlocked():
        settings.update({"checkpoint": str(path), "weights": "auto"})
    with pytest.raises(CheckpointError, match=r"--config\.init\.weights=student"):
        read_start(settings)
    settings.weights = "teacher"
    assert same(read_start(settings).weights, averaged)
    assert read_checkpoint(path, weights="teacher").provenance == provenance_at(path, weights="teacher")
    assert provenance_at(path, weights="teacher")["weights"] == "teacher"


@pytest.mark.parametrize("name", ["model_momentum", "target_network", "shadow"])
def test_other_names_of_averaged_weights_are_known(raw, averaged, name, caplog):
    caplog.set_level(logging.INFO, logger="segjax")
    for given in ({"model": raw, name: averaged}, prefixed("online.", raw) | prefixed(f"{name}.", averaged)):
        caplog.clear()
        assert same(as_arrays(given), raw) and "averaged weights" in caplog.text and name in caplog.text
        assert same(as_arrays(given, weights="ema"), averaged)


def test_skipped_entries_are_named(raw, averaged, caplog):
    caplog.set_level(logging.INFO, logger="segjax")
    others = {"second": averaged, "numbers": list(averaged.values())}
    passed = {"epoch": 3, "rng": np.zeros(9, np.uint8), "optimizer": {"state": averaged}, "meta": {"mean": np.ones(3)}}
    assert same(as_arrays({"state_dict": raw} | others | passed), raw)
    assert caplog.messages == ["tensors that are not read: the entries second, numbers"]
    caplog.clear()
    # torch_ema keeps a list, which has no names.
    assert same(as_arrays({"state_dict": raw, "ema": {"shadow_params": list(averaged.values()), "decay": 0.9}}), raw)
    assert "its averaged weights (ema) are the set 'ema'" in caplog.text


@pytest.mark.parametrize("key", ["ema", "net", "state_dict"])
def test_containers_referred_to_many_times_are_searched_once(key):
    nested = {"w": 1}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    began = time.monotonic()
    with pytest.raises(CheckpointError):
        as_arrays({key: nested, "x": nested})
    assert time.monotonic() - began < 20


def test_a_layer_named_like_a_set_of_weights_is_a_layer(raw):
    given = raw | {"ema.weight": np.ones(3)}
    assert as_arrays(given).keys() == given.keys()


def test_a_state_dict_that_contains_itself_is_refused():
    given = {}
    given["model"] = given
    with pytest.raises(CheckpointError, match="contains itself"):
        as_arrays(given)
