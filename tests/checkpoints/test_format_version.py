"""Files of segjax have a format version: newer files are refused, and files without a version are read.

segjax 0.1.0 at bca60e4 wrote data_files/format_0, before versions existed, with random weights: `run`, six steps of a
SegFormer on streets; `converted`, a folder made from smp's names; `segnext.safetensors`, in mmsegmentation's names.
`labels.npz` has an image, and the labels that each of them predicted for it.
"""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import segjax
from segjax.checkpoints import format_version, orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.format_version import refuse_newer, stamped
from segjax.checkpoints.initialize import initialize
from segjax.commands import convert, inspect
from segjax.inference.predictor import Predictor
from segjax.train import run_checkpoints
from tests.runs import cheap_step, make_config, result_of, run
from tests.tiny import tiny_model

OLD = Path(__file__).parents[1] / "data_files" / "format_0"
FILES = ("run", "converted", "segnext.safetensors")
STAMP = {"format_version": 1, "segjax_version": segjax.__version__}


def metadata_in(path):
    """The metadata of a `.safetensors`, without segjax."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["segjax"])


def unchanged(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ written


def test_every_kind_of_checkpoint_is_written_with_the_version(tmp_path):
    model = tiny_model(1)
    segjax.save(model, tmp_path / "folder")
    segjax.save(model, tmp_path / "a.safetensors", dialect="smp")
    segjax.save(model, tmp_path / "hf", dialect="hf")
    (item,) = (tmp_path / "folder" / "about").glob("metadata*")
    for found in (
        json.loads(item.read_text()),
        orbax_folder.load_metadata(tmp_path / "folder"),
        metadata_in(tmp_path / "a.safetensors"),
        metadata_in(tmp_path / "hf" / "model.safetensors"),
    ):
        assert {key: found[key] for key in STAMP} == STAMP


def test_a_run_and_its_result_are_written_with_the_version(tmp_path, monkeypatch):
    cheap_step(monkeypatch)
    assert run(make_config(eval__every=3), tmp_path)[0] == 0
    for found in (
        result_of(tmp_path),
        orbax_folder.load_metadata(tmp_path),
        orbax_folder.load_metadata(tmp_path / "best"),
    ):
        assert {key: found[key] for key in STAMP} == STAMP


# ------------------------------------------------------------------------------------------------------------- newer


@pytest.mark.parametrize("version", [2, 17])
@pytest.mark.parametrize("writer", ["0.9.1", None])
def test_a_newer_version_is_refused_with_the_release_to_install(version, writer):
    metadata = {"format_version": version} | ({"segjax_version": writer} if writer else {})
    with pytest.raises(CheckpointError) as caught:
        refuse_newer(metadata, "some/file")
    message = str(caught.value)
    assert message.startswith(
        f"some/file: has format version {version}, and segjax {segjax.__version__} reads versions"
    )
    assert (f"segjax {writer} or newer" if writer else "a newer segjax") in message


@pytest.mark.parametrize("version", ["1.5", None, 1.5, [1], True, 0, -1, "x" * 10_000])
def test_an_impossible_version_is_damage(version):
    with pytest.raises(CheckpointError, match=r"^some/file: damaged, since format_version is .{,100}$"):
        refuse_newer({"format_version": version}, "some/file")


def test_this_version_and_files_without_one_are_not_refused():
    refuse_newer({}, "x")
    refuse_newer(stamped({"a": 1}), "x")
    assert stamped({"a": 1, "format_version": 0}) == {"a": 1, **STAMP}


@pytest.fixture
def newer(tmp_path, monkeypatch):
    """Files of a segjax to come."""
    with monkeypatch.context() as patch:
        patch.setattr(format_version, "FORMAT_VERSION", 2)
        patch.setattr(segjax, "__version__", "0.9.1")
        segjax.save(tiny_model(1), tmp_path / "folder")
        segjax.save(tiny_model(1), tmp_path / "a.safetensors")
        segjax.save(tiny_model(1), tmp_path / "hf", dialect="hf")
    return tmp_path


@pytest.mark.parametrize("name", ["folder", "a.safetensors", "hf"])
def test_a_newer_file_is_refused_by_every_command_and_function(newer, name, capsys):
    before = unchanged(newer)
    message = r"has format version 2, and segjax .* reads versions up to 1\. Install segjax 0\.9\.1 or newer"
    for use in (segjax.load, Predictor, read_checkpoint, lambda path: initialize(tiny_model(2), path)):
        with pytest.raises(CheckpointError, match=message):
            use(newer / name)
    for command in (
        lambda: convert.main([str(newer / name), str(newer / "out")]),
        lambda: inspect.main([str(newer / name)]),
    ):
        assert command() == 2
        assert "Install segjax 0.9.1 or newer" in " ".join(capsys.readouterr().err.split())
    assert unchanged(newer) == before


def test_a_newer_run_is_neither_resumed_nor_set_aside_as_damaged(tmp_path, monkeypatch):
    cheap_step(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(format_version, "FORMAT_VERSION", 2)
        assert run(make_config(train__steps=4), tmp_path)[0] == 0
    before = unchanged(tmp_path)
    with pytest.raises(CheckpointError, match=r"result\.json: has format version 2"):
        run(make_config(train__steps=6), tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/4: has format version 2"):
        run(make_config(train__steps=6), tmp_path)
    assert unchanged(tmp_path).items() == {k: v for k, v in before.items() if k.name != "result.json"}.items()


# -------------------------------------------------------------------------------------------- from before the version


def test_the_old_files_have_no_version():
    assert "format_version" not in metadata_in(OLD / "segnext.safetensors")
    for folder in (OLD / "converted", OLD / "run"):
        assert "format_version" not in orbax_folder.load_metadata(folder)
    assert "format_version" not in json.loads((OLD / "run" / "result.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_an_old_file_predicts_the_recorded_labels(name):
    kept = np.load(OLD / "labels.npz")
    labels = Predictor(OLD / name)(kept["image"])
    expected = kept[name.partition(".")[0]]
    assert len(np.unique(expected)) > 2
    # Other processors round differently, which may turn a label over.
    assert (labels == expected).mean() > 0.995


def test_an_old_file_keeps_its_classes_sizes_and_origin():
    of_run, converted, segnext = (segjax.load(OLD / name) for name in FILES)
    assert (of_run.classes.name, len(of_run.classes.class_names)) == ("streets", 19)
    assert of_run.metadata["step"] == 6 and of_run.metadata["provenance"] == {"initial_weights": None}
    assert of_run.metadata["input_size"] == [32, 48]
    assert converted.classes.name == "camvid" and converted.metadata["provenance"]["dialect"] == "smp"
    assert dict(converted.model.spec.overrides)["num_heads"] == (1, 2, 2, 2)
    assert segnext.model.spec.name == "segnext_t" and dict(segnext.model.spec.overrides)["ham_rank"] == 5
    assert segnext.metadata["provenance"]["made_from"]["source"] == "b.safetensors"


@pytest.mark.parametrize("name", FILES)
def test_an_old_file_is_converted_to_the_current_version(name, tmp_path, capsys):
    for destination in ("b.safetensors", "c"):
        assert convert.main([str(OLD / name), str(tmp_path / destination)]) == 0
        before, after = segjax.load(OLD / name), segjax.load(tmp_path / destination)
        assert after.metadata["format_version"] == 1 and after.classes == before.classes
        one, other = segjax.to_torch(before.model), segjax.to_torch(after.model)
        assert {key: value.tobytes() for key, value in one.items()} == {
            key: value.tobytes() for key, value in other.items()
        }
        assert after.metadata["provenance"].get("made_from") or after.metadata["provenance"]["source"] == name
    assert inspect.main([str(OLD / name)]) == 0
    capsys.readouterr()


def test_evaluating_an_old_run_gives_its_recorded_result():
    recorded = json.loads((OLD / "run" / "result.json").read_text())
    found = segjax.evaluate_dataset(OLD / "run", "streets")
    assert abs(found["pixel_accuracy"] - recorded["pixel_accuracy"]) < 2e-3
    for value, expected in zip(found["per_class_iou"], recorded["per_class_iou"], strict=True):
        assert (value is None) == (expected is None) and abs((value or 0) - (expected or 0)) < 5e-3


def test_an_old_run_is_resumed_from_its_checkpoint(tmp_path, monkeypatch):
    shutil.copytree(OLD / "run", tmp_path / "run")
    cheap_step(monkeypatch)
    restored = []
    original = run_checkpoints.RunCheckpoints.restore

    def restore(self, *arguments, **settings):
        restored.append(original(self, *arguments, **settings))
        return restored[-1]

    monkeypatch.setattr(run_checkpoints.RunCheckpoints, "restore", restore)
    config = make_config(checkpoint__keep=1, optim__frozen=("^backbone",), train__steps=8)
    config.model.update(dims=(2, 4, 4, 4), num_heads=(1, 2, 2, 2), decoder_dim=6)
    status, _ = run(config, tmp_path / "run")
    assert status == 0 and result_of(tmp_path / "run")["step"] == 8
    (found,) = restored
    saved, _ = orbax_folder.load_weights(OLD / "run")
    assert found.step == 6 and found.weights.keys() == saved.keys()
    assert all(np.array_equal(found.weights[name], saved[name]) for name in saved)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[:3] == [2, 4, 6] and 8 in steps
    # Finished, and written by this version now.
    assert (
        result_of(tmp_path / "run")["format_version"]
        == 1
        == orbax_folder.load_metadata(tmp_path / "run")["format_version"]
    )


def test_weights_of_an_old_file_are_loaded_unchanged():
    arrays = load_file(OLD / "segnext.safetensors")
    again = segjax.to_torch(segjax.load(OLD / "segnext.safetensors").model, dialect="mmseg")
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[key], arrays[key]) for key in arrays)
