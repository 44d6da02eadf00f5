"""Files and the command line: `.pth`, `.safetensors` and orbax folders, in and out, and what is refused."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import segjax
from parity.subjects import SUBJECTS
from parity.test_dialects import FOLDED, differing, original, renamed
from segjax.checkpoints import checkpoint
from segjax.checkpoints.architectures import FAMILIES, family_of
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.key_maps import KEY_FORMATS
from segjax.checkpoints.load import load
from segjax.checkpoints.recognition import recognise
from segjax.checkpoints.save import write_checkpoint
from segjax.commands import convert
from segjax.torch_reference import segformer

REPOSITORY = Path(__file__).resolve().parent.parent


# One subject of each family.
FAMILY = pytest.mark.parametrize(
    "label", ["segformer", "plain, conv_bn", "mmseg", "simple", "zuppichini", "hrnet", "ocr", "segnext"]
)


@pytest.fixture(scope="module")
def weights():
    return original("segformer", 3, seed=1)


def key_format(dialect, family):
    (found,) = (each for each in KEY_FORMATS if (each.dialect, each.family) == (dialect, family))
    return found


def save_pth(path, weights):
    torch.save({key: torch.from_numpy(value.copy()) for key, value in weights.items()}, path)


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def printed(capsys):
    """What the command has printed, without its line breaks."""
    return " ".join(capsys.readouterr().out.split())


def refused(capsys):
    """Its error, without line breaks."""
    return " ".join(capsys.readouterr().err.split())


def equal(one, other):
    return differing(one, other) == []


@FAMILY
def test_pth_to_orbax_to_safetensors_to_pth_is_bitwise(label, tmp_path):
    weights = original(label)
    save_pth(tmp_path / "a.pth", weights)
    assert run(tmp_path / "a.pth", tmp_path / "b") == 0
    assert run(tmp_path / "b", tmp_path / "c.safetensors") == 0
    assert run(tmp_path / "c.safetensors", tmp_path / "d.pth") == 0
    assert equal(load_file(tmp_path / "c.safetensors"), weights)
    assert equal(read_checkpoint(tmp_path / "d.pth").weights, weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b", "c.safetensors", "d.pth"]


def dialects_for(label, *, whole):
    forms = [form for form in KEY_FORMATS if form.family == family_of(SUBJECTS[label].name)]
    return [form.dialect for form in forms if not (whole and form.encoder_only)]


@FAMILY
def test_any_checkpoint_passes_through_all_dialects_that_can_express_it(label, tmp_path, capsys):
    weights = original(label)
    save_pth(tmp_path / "native.pth", weights)
    source = tmp_path / "native.pth"
    # From each to the next and back to the first: every dialect is read and written once.
    for number, dialect in enumerate([*dialects_for(label, whole=True)[1:], "native"]):
        destination = tmp_path / f"{number}{('.safetensors', '.pth')[number % 2]}"
        assert run(source, destination, "--to", dialect) == 0
        assert f"wrote {destination} ({dialect} names)" in printed(capsys)
        written = read_checkpoint(destination).weights
        form = key_format(dialect, family_of(SUBJECTS[label].name))
        # A bias that mmsegmentation does not have is zero from there on.
        expected = dict(weights)
        if label in FOLDED and (dialect == "mmseg" or number > 0):
            for bias, mean in FOLDED[label].items():
                expected[mean], expected[bias] = weights[mean] - weights[bias], np.zeros_like(weights[bias])
        assert equal(written, renamed(expected, form)), dialect
        source = destination
    for encoder in set(dialects_for(label, whole=False)) - set(dialects_for(label, whole=True)):
        assert run(tmp_path / "native.pth", tmp_path / "encoder.pth", "--to", encoder) == 0
        assert "omitted, no place for them in" in printed(capsys)
        left = read_checkpoint(tmp_path / "encoder.pth").weights.values()
        native = [value for key, value in weights.items() if not FAMILIES[family_of(SUBJECTS[label].name)].in_head(key)]
        assert sorted(value.tobytes() for value in left) == sorted(value.tobytes() for value in native)


@pytest.mark.parametrize(
    ("label", "dialect", "possible"),
    [
        ("segformer", "mmseg", "native, hf, smp, backbone"),
        ("plain, conv", "hf", "native, segmentation_pytorch, backbone"),
        ("plain, conv_bn", "smp", "native, segmentation_pytorch, backbone"),
        ("mmseg", "hf", "native, mmseg, backbone"),
        ("simple", "smp", "native, segmentation_pytorch"),
        ("zuppichini", "hf", "native"),
        ("hrnet", "hf", "native, segmentation_pytorch, timm, backbone, mmseg"),
        ("ocr", "segmentation_pytorch", "native, timm, backbone, mmseg"),
        ("segnext", "timm", "native, mmseg, cvpytorch, backbone"),
    ],
)
def test_a_dialect_that_cannot_express_a_checkpoint_is_refused(label, dialect, possible, tmp_path, capsys):
    save_pth(tmp_path / "a.pth", original(label))
    for destination in ("b.pth", "b.safetensors"):
        assert run(tmp_path / "a.pth", tmp_path / destination, "--to", dialect) == 2
        message = refused(capsys)
        assert f"cannot be written as {dialect}" in message and "no equivalent network" in message
        (listed,) = re.findall(r"can be written as (.*)$", message)
        assert sorted(listed.split(", ")) == sorted(possible.split(", "))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_assumptions_and_differences_of_the_target_are_printed(weights, tmp_path, capsys):
    save_pth(tmp_path / "a.pth", weights)
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--to", "hf") == 0
    said = printed(capsys)
    assert "assumed block_norm_eps=1e-06" in said and said.count("note: ") == 1
    assert "note: transformers computes with block_norm_eps=1e-05, this model with 1e-06" in said
    overrides = ("--overrides", "block_norm_eps=1e-5", "num_heads=(1,2,5,8)")
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--to", "hf", *overrides) == 0
    assert not re.search("note: |assumed num_heads|assumed block", printed(capsys))


def of_type(weights, dtype):
    return {
        key: torch.from_numpy(value.copy()).to(dtype) if value.ndim else torch.tensor(0)
        for key, value in weights.items()
    }


def same_tensors(path, tensors):
    after = torch.load(path, weights_only=True)
    return after.keys() == tensors.keys() and all(
        after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in tensors.items()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_conversion(weights, dtype, tmp_path, quick_to_compile):
    tensors = of_type(weights, dtype)
    torch.save(tensors, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b", "--verify") == 0
    assert run(tmp_path / "b", tmp_path / "c.safetensors", "--to", "hf") == 0
    assert run(tmp_path / "c.safetensors", tmp_path / "d.pth") == 0
    assert same_tensors(tmp_path / "d.pth", tensors)


@pytest.mark.slow
def test_float64_survives_conversion(weights, tmp_path):
    tensors = of_type(weights, torch.float64)
    torch.save(tensors, tmp_path / "a.pth")
    # A process of its own, because float64 switches jax to 64 bits for good.
    for source, destination, *options in (("a.pth", "b", "--verify"), ("b", "c.pth")):
        command = [
            sys.executable,
            "-m",
            "segjax.convert",
            str(tmp_path / source),
            str(tmp_path / destination),
            *options,
        ]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert same_tensors(tmp_path / "c.pth", tensors)


def test_an_orbax_folder_rebuilds_its_model(weights, tmp_path):
    save_pth(tmp_path / "a.pth", weights)
    assert run(tmp_path / "a.pth", tmp_path / "b", "--overrides", "num_heads=(1,1,1,1)", "block_norm_eps=1e-5") == 0
    model = load(tmp_path / "b").model
    assert model.spec.num_classes == 3
    assert dict(model.spec.overrides)["num_heads"] == (1, 1, 1, 1)
    assert model.backbone.block3[0].norm1.epsilon == 1e-5
    assert equal(segjax.to_torch(model), weights)


@pytest.mark.parametrize(
    ("label", "dialect", "num_classes", "against"),
    [
        ("segformer", "native", 1, "reference"),
        ("segformer", "hf", 5, "transformers"),
        ("segformer", "smp", 5, "reference"),
        ("plain, conv_bn", "segmentation_pytorch", 5, "reference"),
        ("mmseg", "mmseg", 5, "reference"),
        ("simple", "native", 5, "reference"),
        ("zuppichini", "native", 5, "reference"),
        ("hrnet", "mmseg", 5, "reference"),
        ("ocr", "native", 5, "reference"),
        ("segnext", "cvpytorch", 5, "reference"),
    ],
)
def test_verify_compares_with_pytorch_and_prints_the_error(
    label, dialect, num_classes, against, tmp_path, capsys, quick_to_compile
):
    form = key_format(dialect, family_of(SUBJECTS[label].name))
    save_pth(tmp_path / "a.pth", renamed(original(label, num_classes), form))
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors", "--verify") == 0
    _, found, line = printed(capsys).partition("verified against")
    assert found and against in line and "worst relative error" in line and ": equal" in line
    assert ("masks at 0.5" in line and "positive" in line) if num_classes == 1 else "equal labels" in line
    assert (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(("dialect", "suffix"), [("native", ".pth"), ("hf", ".safetensors"), ("smp", ".pth")])
def test_a_conversion_with_verify_recognises_the_keys_once(
    dialect, suffix, weights, tmp_path, monkeypatch, quick_to_compile
):
    calls = []

    def counted(shapes, **insisted):
        calls.append(insisted)
        return recognise(shapes, **insisted)

    monkeypatch.setattr(checkpoint, "recognise", counted)
    save_pth(tmp_path / "a.pth", renamed(weights, key_format(dialect, "segformer")))
    assert run(tmp_path / "a.pth", tmp_path / f"b{suffix}", "--verify") == 0
    assert calls == [{"dialect": "auto", "family": None}]


def test_verify_refuses_to_write_a_model_that_differs(weights, tmp_path, capsys, monkeypatch, quick_to_compile):
    save_pth(tmp_path / "a.pth", weights)
    monkeypatch.setattr(segformer.F, "gelu", lambda x, **_: torch.relu(x))
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--verify") == 1
    assert "not written" in refused(capsys)
    assert not (tmp_path / "b.pth").exists()


def test_an_encoder_converts_if_the_number_of_classes_is_given(weights, tmp_path, capsys, quick_to_compile):
    alone = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    alone["head.weight"], alone["head.bias"] = np.ones((10, 32), np.float32), np.ones(10, np.float32)
    save_pth(tmp_path / "mit.pth", alone)
    assert run(tmp_path / "mit.pth", tmp_path / "b") == 2
    assert "number of classes" in refused(capsys)
    options = ("--num-classes", 4, "--verify", "--overrides", "decoder_dim=24")
    assert run(tmp_path / "mit.pth", tmp_path / "b", *options) == 0
    said = printed(capsys)
    assert "head.weight" in said and "left as initialised" in said


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
    write_checkpoint(folder / "good.safetensors", segjax.from_torch(weights), dialect="native", metadata={})
    good = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(good[: len(good) // 2])
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "nothing.pth")
    torch.save({"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3), "fc.bias": torch.zeros(10)}, folder / "resnet.pth")
    (folder / "folder").mkdir()
    return {
        "code.pth": "fits no model",
        "legacy.pth": "run code",
        "cut.pth": "cut short",
        "empty.pth": "empty",
        "page.pth": "text",
        "pointer.safetensors": "git-lfs",
        "cut.safetensors": "cut short",
        "list.pth": "state dict",
        "nothing.pth": "state dict",
        "resnet.pth": "nearest family is HRNet",
        "folder": "no checkpoint",
        "absent.pth": "no such file",
    }


def test_every_bad_file_gives_a_message_and_leaves_nothing(weights, tmp_path, capsys):
    for name, expected in broken_files(tmp_path, weights).items():
        for destination in ("out.pth", "out.safetensors", "out"):
            assert run(tmp_path / name, tmp_path / destination) == 2, name
            message = refused(capsys)
            assert expected in message, (name, message)
            assert "Traceback" not in message
            assert not (tmp_path / destination).exists(), name
    assert not (tmp_path / "trace").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_not_a_checkpoint_is_not_overwritten(weights, tmp_path, capsys):
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
    assert run(tmp_path / "a.pth", tmp_path / "b.pth") == 2
    assert "segjax[parity]" in refused(capsys)


def test_a_damaged_orbax_folder_is_refused(weights, tmp_path, capsys):
    save_pth(tmp_path / "a.pth", weights)
    assert run(tmp_path / "a.pth", tmp_path / "b") == 0
    for path in (tmp_path / "b" / "weights").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(tmp_path / "b", tmp_path / "c.pth") == 2
    assert "damaged" in refused(capsys)


def test_the_loaded_model_computes_in_the_requested_dtype(weights):
    model = segjax.from_torch(weights, dtype=jnp.bfloat16)
    logits, taps = nnx.eval_shape(lambda model: model(jnp.zeros((2, 64, 96, 3))), model)
    assert logits.dtype == jnp.float32 and taps["feature0"].dtype == jnp.bfloat16
    assert equal(segjax.to_torch(model), weights)
    with pytest.raises(CheckpointError):
        segjax.load_torch(model, {})
