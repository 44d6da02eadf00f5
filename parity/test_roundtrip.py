"""Files and the command line: `.pth`, `.safetensors` and orbax folders, in and out, and what is refused."""

import pickle
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import segjax
from parity import narrow
from segjax import convert, files
from segjax.weights import CheckpointError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def weights():
    model = segjax.create(narrow.MODEL, num_classes=3, seed=1, **narrow.SIZES)
    return segjax.to_torch(model)


def save_pth(path, weights):
    torch.save({key: torch.from_numpy(value.copy()) for key, value in weights.items()}, path)


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[key].tobytes() == other[key].tobytes() and one[key].shape == other[key].shape for key in one
    )


def test_pth_to_orbax_to_safetensors_to_pth_is_bitwise(weights, tmp_path):
    save_pth(tmp_path / "a.pth", weights)
    assert run(tmp_path / "a.pth", tmp_path / "b") == 0
    assert run(tmp_path / "b", tmp_path / "c.safetensors", "--to", "hf") == 0
    assert run(tmp_path / "c.safetensors", tmp_path / "d.pth", "--to", "smp") == 0
    assert run(tmp_path / "d.pth", tmp_path / "e.pth") == 0
    assert "segformer.encoder.layer_norm.0.weight" in load_file(tmp_path / "c.safetensors")
    assert equal(files.read_file(tmp_path / "e.pth"), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b", "c.safetensors", "d.pth", "e.pth"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_storage_types_survive_the_command_line(weights, dtype, tmp_path):
    tensors = {
        key: torch.from_numpy(value.copy()).to(dtype) if value.ndim else torch.tensor(0)
        for key, value in weights.items()
    }
    torch.save(tensors, tmp_path / "a.pth")
    # A process of its own, because float64 switches jax to 64 bits for good.
    for source, destination in (("a.pth", "b"), ("b", "c.pth")):
        command = [
            sys.executable,
            "-m",
            "segjax.convert",
            str(tmp_path / source),
            str(tmp_path / destination),
            "--verify",
        ]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    after = torch.load(tmp_path / "c.pth", weights_only=True)
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in tensors.items())


def test_an_orbax_folder_builds_its_model_again(weights, tmp_path):
    save_pth(tmp_path / "a.pth", weights)
    assert run(tmp_path / "a.pth", tmp_path / "b", "--overrides", "num_heads=(1,1,1,1)", "block_norm_eps=1e-5") == 0
    model = files.read_file(tmp_path / "b")
    assert model.spec.num_classes == 3
    assert dict(model.spec.overrides)["num_heads"] == (1, 1, 1, 1)
    assert model.backbone.block3[0].norm1.epsilon == 1e-5
    assert equal(segjax.to_torch(model), weights)


@pytest.mark.parametrize(
    ("dialect", "against"), [("native", "reference"), ("hf", "transformers"), ("smp", "reference")]
)
@pytest.mark.parametrize("num_classes", [1, 5])
def test_verify_compares_with_pytorch_and_says_by_how_much(dialect, against, num_classes, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "segjax")
    model = segjax.create(narrow.MODEL, num_classes=num_classes, seed=2, **narrow.SIZES)
    save_pth(tmp_path / "a.pth", segjax.to_torch(model, dialect=dialect))
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors", "--verify") == 0
    line = next(text for text in caplog.messages if text.startswith("verified against"))
    assert against in line and "worst relative error" in line and ": equal" in line
    assert ("masks at 0.5" in line and "positive" in line) if num_classes == 1 else "equal labels" in line


def test_verify_refuses_to_write_what_differs(weights, tmp_path, capsys, monkeypatch):
    save_pth(tmp_path / "a.pth", weights)
    from parity import compare

    monkeypatch.setattr(compare.reference_segformer.F, "gelu", lambda x, **_: torch.relu(x))
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--verify") == 1
    assert "not written" in capsys.readouterr().err
    assert not (tmp_path / "b.pth").exists()


def test_a_backbone_alone_converts_once_it_is_told_the_classes(weights, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "segjax")
    alone = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    alone["head.weight"], alone["head.bias"] = np.ones((10, 32), np.float32), np.ones(10, np.float32)
    save_pth(tmp_path / "mit.pth", alone)
    assert run(tmp_path / "mit.pth", tmp_path / "b") == 2
    assert "number of classes" in capsys.readouterr().err
    assert run(tmp_path / "mit.pth", tmp_path / "b", "--num-classes", 4, "--verify") == 0
    assert any("head.weight" in text for text in caplog.messages)
    assert any("left as initialised" in text for text in caplog.messages)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def broken_files(folder, weights):
    """name -> part of the message that a person gets."""
    save_pth(folder / "good.pth", weights)
    good = (folder / "good.pth").read_bytes()
    torch.save({"state_dict": weights["backbone.norm1.weight"], "x": Payload(folder / "trace")}, folder / "code.pth")
    (folder / "legacy.pth").write_bytes(pickle.dumps({"x": Payload(folder / "trace")}, protocol=2))
    (folder / "cut.pth").write_bytes(good[: len(good) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "page.pth").write_text("<html>404: not found, and so on</html>")
    (folder / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    segjax.files.write_file(folder / "good.safetensors", segjax.from_torch(weights), dialect="native", about={})
    good = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(good[: len(good) // 2])
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "nothing.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3), "fc.bias": torch.zeros(10)}, folder / "resnet.pth")
    (folder / "folder").mkdir()
    return {
        "code.pth": "run code",
        "legacy.pth": "run code",
        "cut.pth": "cut short",
        "empty.pth": "empty",
        "page.pth": "text",
        "pointer.safetensors": "git-lfs",
        "cut.safetensors": "cut short",
        "list.pth": "state dict",
        "nothing.pth": "state dict",
        "resnet.pth": "SegFormer",
        "folder": "no checkpoint",
        "absent.pth": "no such file",
    }


def test_every_bad_file_gets_a_message_and_leaves_nothing(weights, tmp_path, capsys):
    for name, expected in broken_files(tmp_path, weights).items():
        for destination in ("out.pth", "out.safetensors", "out"):
            assert run(tmp_path / name, tmp_path / destination) == 2, name
            message = capsys.readouterr().err
            assert expected in message, (name, message)
            assert "Traceback" not in message
            assert not (tmp_path / destination).exists(), name
    assert not (tmp_path / "trace").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(weights, tmp_path, capsys):
    save_pth(tmp_path / "a.pth", weights)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert run(tmp_path / "a.pth", tmp_path / "mine") == 2
    assert "thesis.txt" in [path.name for path in (tmp_path / "mine").iterdir()]
    assert run(tmp_path / "a.pth", tmp_path / "b") == run(tmp_path / "a.pth", tmp_path / "b") == 0


def test_a_failed_write_leaves_the_old_file(weights, tmp_path, monkeypatch):
    save_pth(tmp_path / "a.pth", weights)
    (tmp_path / "b.safetensors").write_bytes(b"old")

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors") == 2
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.safetensors"]


def test_without_torch_the_message_names_the_extra(weights, tmp_path, monkeypatch, capsys):
    save_pth(tmp_path / "a.pth", weights)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(tmp_path / "a.pth", tmp_path / "b") == 2
    assert "segjax[parity]" in capsys.readouterr().err


def test_a_damaged_orbax_folder_is_refused(weights, tmp_path, capsys):
    save_pth(tmp_path / "a.pth", weights)
    assert run(tmp_path / "a.pth", tmp_path / "b") == 0
    for path in (tmp_path / "b" / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(tmp_path / "b", tmp_path / "c.pth") == 2
    assert "damaged" in capsys.readouterr().err


def test_the_loaded_model_computes_in_the_type_asked_for(weights):
    model = segjax.from_torch(weights, dtype=jnp.bfloat16)
    logits, taps = model(jnp.zeros((2, 64, 96, 3)))
    assert logits.dtype == jnp.float32 and taps["feature0"].dtype == jnp.bfloat16
    assert equal(segjax.to_torch(model), weights)
    with pytest.raises(CheckpointError):
        segjax.load_torch(model, {})
