"""Files of ONNX, `torch.export` and OpenVINO, run by their packages, against segjax's model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import segjax
from parity import compare
from parity.subjects import SUBJECTS
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.commands import export
from segjax.data import specs
from segjax.exports import onnx as onnx_export
from segjax.exports import openvino, torch_program
from segjax.exports.export import export_model
from segjax.exports.format import SUFFIXES, ExportFormat
from segjax.inference import runtimes
from segjax.torch_reference import verify

REPOSITORY = Path(__file__).resolve().parent.parent
FORMATS = {
    "onnx": (onnx_export.write_onnx, lambda path: runtimes.open_onnx(path).run),
    "torch": (torch_program.write_torch, lambda path: runtimes.open_torch(path).run),
}
OPENVINO = {"openvino": (openvino.write_openvino, lambda path: runtimes.open_openvino(path).run)}
ONNX_OR_SLOW = ["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "openvino"))]


def tiny(label, num_classes=5, seed=0, **settings):
    subject = SUBJECTS[label]
    model, _ = compare.randomised_pair(
        subject.name, num_classes=num_classes, seed=seed, dtype=np.float32, **subject.sizes | settings
    )
    return model


def run(*arguments):
    return export.main([str(argument) for argument in arguments])


def noise(batch, size, seed):
    """Normalised images (B, 3, H, W)."""
    return np.random.default_rng(seed).normal(size=(batch, 3, *size)).astype(np.float32)


def logits_of(model, images):
    """Ours, of images (B, 3, H, W): (B, K, h, w)."""
    return np.moveaxis(np.asarray(verify.compiled(model)(np.moveaxis(images, 1, -1))[0]), -1, 1)


# The exporters take half a minute.
@pytest.mark.slow
@pytest.mark.parametrize("label", SUBJECTS)
def test_files_with_dynamic_sizes_equal_our_model_at_other_sizes(label, tmp_path, within, quick_to_compile):
    model = tiny(label)
    programs = {}
    for format, (write, opened) in (FORMATS | OPENVINO).items():
        path = tmp_path / f"a{SUFFIXES[format]}"
        write(path, model, ExportFormat(format, (64, 96), dynamic=True), {})
        programs[format] = opened(path)
    for seed, batch in enumerate((1, 3)):
        images = noise(batch, (97, 65) if model.size_multiple == 1 else (96, 64), seed)
        ours = logits_of(model, images)
        for format, program in programs.items():
            error = verify.relative_error(program(images), ours)
            within("output", np.float32, error, f"{format} file of {label}")
            # Told to compute in float32, OpenVINO is as near as the others.
            assert error < 5e-6 or format != "openvino"


@pytest.mark.parametrize("label", ["segformer", "hrnet", "segnext"])
def test_openvino_gives_the_logits_of_our_model(label, tmp_path):
    model, path = tiny(label, seed=2), tmp_path / "a.xml"
    openvino.write_openvino(path, model, ExportFormat("openvino", (72, 100)), {"classes": ["a"]})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.xml", "a.xml.json"]
    opened, images = runtimes.open_openvino(path), noise(1, (72, 100), 0)
    assert opened.metadata == {"classes": ["a"]}
    assert verify.relative_error(opened.run(images), logits_of(model, images)) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_runs_without_segjax_as_documented(format, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    orbax_folder.save_model(tmp_path / "b0", tiny("segformer", num_classes=19), metadata={})
    name = f"b0{SUFFIXES[format]}"
    options = ("--dynamic", "--with-preprocessing", "--with-argmax")
    assert run("b0", name, "--format", format, "--size", 64, 80, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  in   images  uint8 RGB (batch, height, width, 3)" in lines
    assert max(map(len, lines)) <= 80
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/export.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if f'"{name}"' in block]
    code = "import sys\nsys.modules.update(segjax=None, flax=None, parity=None)\n" + example
    code += "\nprint(tuple(labels.shape), str(labels.dtype).removeprefix('torch.'), names[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(1, 512, 1024) uint8 road"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("label", "num_classes", "align_corners"),
    [pytest.param("hrnet", 1, False, marks=pytest.mark.slow), ("hrnet, corners", 5, True)],
)
def test_logits_are_upsampled_with_the_models_align_corners(format, label, num_classes, align_corners, tmp_path):
    model, path = tiny(label, num_classes), tmp_path / f"a{SUFFIXES[format]}"
    write, opened = FORMATS[format]
    write(path, model, ExportFormat(format, (72, 100), preprocessing=True, argmax=True), {})
    images = np.random.default_rng(1).integers(0, 256, (1, 72, 100, 3), dtype=np.uint8)
    labels = opened(path)(images)
    normal = (images - np.array(specs.IMAGENET_MEAN)) / np.array(specs.IMAGENET_STD)
    logits = torch.tensor(logits_of(model, np.moveaxis(normal, -1, 1).astype(np.float32)))

    def upsampled(align_corners):
        settings = dict(size=(72, 100), mode="bilinear", align_corners=align_corners)
        scores = torch.nn.functional.interpolate(logits, **settings).numpy()
        return scores[:, 0] > 0 if num_classes == 1 else scores.argmax(axis=1)

    expected = upsampled(align_corners)
    assert labels.dtype == np.uint8 and labels.shape == (1, 72, 100)
    assert len(np.unique(expected)) > 1 and (labels == expected).mean() > 0.999
    assert (labels == upsampled(not align_corners)).mean() < 0.995


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("channels", "dtype"), [(2, "uint16"), pytest.param(5, "float32", marks=pytest.mark.slow)])
def test_files_take_images_with_other_channels_and_dtypes(format, channels, dtype, tmp_path):
    model = tiny("segformer", in_channels=channels)
    mean, std = [700.0 + 9 * number for number in range(channels)], [40.0 + number for number in range(channels)]
    about = {"normalisation": {"mean": mean, "std": std}, "image_dtype": dtype}
    orbax_folder.save_model(tmp_path / "a", model, metadata=about)
    path = tmp_path / f"a{SUFFIXES[format]}"
    assert run(tmp_path / "a", path, "--format", format, "--size", 64, 96, "--with-preprocessing") == 0
    rng = np.random.default_rng(2)
    images = (np.array(mean) + np.array(std) * rng.normal(size=(1, 64, 96, channels))).astype(dtype)
    normal = np.moveaxis((images - np.array(mean)) / np.array(std), -1, 1).astype(np.float32)
    found = FORMATS[format][1](path)(images)
    assert verify.relative_error(found, logits_of(model, normal)) < 1e-4


@pytest.mark.parametrize(
    ("format", "dtype"),
    [pytest.param("torch", "bfloat16", marks=pytest.mark.slow), ("torch", "float16"), ("onnx", "bfloat16")],
)
@pytest.mark.parametrize("label", ["segformer", pytest.param("segnext", marks=pytest.mark.slow)])
def test_weights_are_stored_in_16_bits_and_computed_with_in_float32(label, format, dtype, tmp_path, capsys):
    orbax_folder.save_model(tmp_path / "a", tiny(label), metadata={})
    path = tmp_path / f"a{SUFFIXES[format]}"
    assert run(tmp_path / "a", path, "--format", format, "--size", 64, 96, "--dtype", dtype) == 0
    printed = capsys.readouterr().out
    (error,) = re.findall(r"worst relative error of logits (\S+): equal", printed)
    assert float(error) < 5e-5
    (share,) = re.findall(r"([\d.]+)% of the labels equal those in float32", printed)
    assert 80 < float(share) <= 100
    if format == "torch":
        kinds = {parameter.dtype for parameter in torch.export.load(path).parameters()}
        assert kinds == {getattr(torch, dtype)}
    else:
        wanted = getattr(onnx.TensorProto, dtype.upper())
        large = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.raw_data) > 8192}
        assert large == {wanted}


@pytest.mark.parametrize("name", ["a.onnx", pytest.param("a.xml", marks=pytest.mark.slow)])
@pytest.mark.parametrize("label", ["segformer", pytest.param("segnext", marks=pytest.mark.slow)])
def test_a_float16_file_is_half_as_large_and_takes_float32(label, name, tmp_path, capsys):
    orbax_folder.save_model(tmp_path / "a", tiny(label), metadata={})
    assert run(tmp_path / "a", tmp_path / name, "--size", 64, 96, "--dtype", "float16") == 0
    (error,) = re.findall(r"worst relative error of logits (\S+): equal", capsys.readouterr().out)
    assert float(error) < 1e-2
    opened = runtimes.open_file(tmp_path / name)
    assert opened.dtype == np.float32 and opened.metadata["weights"] == "float16"
    assert opened.run(noise(1, (64, 96), 0)).dtype == np.float32
    if name == "a.onnx":
        kinds = {
            tensor.data_type for tensor in onnx.load(tmp_path / name).graph.initializer if len(tensor.raw_data) > 8192
        }
        assert kinds == {onnx.TensorProto.FLOAT16}
    else:
        # SegNeXt's bases too.
        count = sum(value.size for value in segjax.to_torch(tiny(label)).values())
        assert (tmp_path / "a.bin").stat().st_size < 2.6 * count


# Older onnxruntimes refuse files of a newer ir_version than they have.
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


@pytest.mark.parametrize(
    ("label", "opset", "is_dynamic"),
    [
        ("segformer", 17, True),
        ("simple", 18, False),
        pytest.param("segnext", 17, False, marks=pytest.mark.slow),
        *(
            pytest.param("segformer", opset, False, marks=pytest.mark.slow)
            for opset in (17, 18, 19, 21, 22, 23, 24, 25)
        ),
        *(pytest.param(label, 17, True, marks=pytest.mark.slow) for label in SUBJECTS),
    ],
)
def test_an_onnx_file_has_the_requested_opset(label, opset, is_dynamic, tmp_path, capsys):
    orbax_folder.save_model(tmp_path / "a", tiny(label), metadata={})
    options = ["--format", "onnx", "--size", 64, 96, "--opset", opset, *["--dynamic"] * is_dynamic]
    assert run(tmp_path / "a", tmp_path / "a.onnx", *options) == 0
    assert "NOT equal" not in capsys.readouterr().out
    proto = onnx.load(tmp_path / "a.onnx")
    assert (onnx_export.opset_of(proto), proto.ir_version) == (opset, IR_VERSIONS[opset])
    onnx.checker.check_model(proto, full_check=True)


def test_an_unsupported_opset_is_refused_with_the_supported_ones(tmp_path, capsys):
    orbax_folder.save_model(tmp_path / "a", tiny("segformer"), metadata={})
    for opset in (16, 99, "x"):
        with pytest.raises(SystemExit):
            run(tmp_path / "a", tmp_path / "a.onnx", "--format", "onnx", "--size", 64, 96, "--opset", opset)
        assert "at most 25" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(CheckpointError, match="must be from 17 to 25"):
        export_model(tmp_path / "a", tmp_path / "a.onnx", size=(64, 96), opset=16)
    with pytest.raises(CheckpointError, match="opset applies only to ONNX files, not to torch"):
        export_model(tmp_path / "a", tmp_path / "a.pt2", size=(64, 96), opset=17)


def test_an_onnx_file_contains_class_names_and_colours(tmp_path):
    orbax_folder.save_model(tmp_path / "a", tiny("segformer", num_classes=19), metadata={})
    assert run(tmp_path / "a", tmp_path / "a.onnx", "--format", "onnx", "--size", 64, 96) == 0
    session = runtimes.import_onnxruntime().InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    said = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert said["classes"] == list(specs.CITYSCAPES.class_names)
    assert said["colors"][0] == [128, 64, 128] and said["ignore_label"] == 255
    assert said["normalisation"]["std"] == [58.395, 57.12, 57.375] and not said["normalisation"]["inside"]
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("images", [1, 3, 64, 96], "tensor(float)")
    assert (made.name, made.shape, made.type) == ("logits", [1, 19, 16, 24], "tensor(float)")


@pytest.mark.slow
def test_dynamic_axes_have_names_in_onnx(tmp_path):
    onnx_export.write_onnx(tmp_path / "a.onnx", tiny("segformer"), ExportFormat("onnx", (64, 96), dynamic=True), {})
    session = runtimes.import_onnxruntime().InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]


@pytest.mark.slow
def test_a_torch_program_has_only_inference_operations(tmp_path):
    # Core ML's converter takes no others.
    export_model(tiny("segnext"), tmp_path / "a.pt2", size=(64, 96))
    program = torch.export.load(tmp_path / "a.pt2")
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert program.dialect == "ATEN"
    assert "aten.batch_norm.default" not in operations and "aten.feature_dropout.default" not in operations
    assert "aten._native_batch_norm_legit_no_training.default" in operations


@pytest.mark.slow
def test_a_torch_program_refuses_sizes_that_its_model_does_not_take(tmp_path):
    torch_program.write_torch(tmp_path / "a.pt2", tiny("simple"), ExportFormat("torch", (64, 96), dynamic=True), {})
    program = torch.export.load(tmp_path / "a.pt2").module()
    with pytest.raises(Exception, match="32"):
        program(torch.zeros(1, 3, 64, 80))


@pytest.mark.parametrize("format", ONNX_OR_SLOW)
def test_a_file_that_differs_from_our_model_is_not_kept(format, tmp_path, capsys, monkeypatch):
    orbax_folder.save_model(tmp_path / "a", tiny("segformer"), metadata={})
    other = verify.reference_for(tiny("segformer", seed=1))
    monkeypatch.setattr(torch_program, "reference_for", lambda model: other)
    out = tmp_path / f"a{SUFFIXES[format]}"
    assert run(tmp_path / "a", out, "--format", format, "--size", 64, 96) == 1
    assert "NOT equal" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    orbax_folder.save_model(tmp_path / "a", tiny("segformer"), metadata={})
    assert run(tmp_path / "a", tmp_path / "a.onnx", "--format", "onnx", "--size", 64, 96) == 2
    assert "the format onnx needs onnxscript: pip install 'segjax[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS | OPENVINO)
def test_an_export_is_reproducible_and_contains_no_local_paths(format, tmp_path):
    write, files = (FORMATS | OPENVINO)[format][0], []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / f"m{SUFFIXES[format]}")
        write(files[-1], tiny("segformer", seed=3), ExportFormat(format, (64, 96), preprocessing=True), {"a": [1]})
    first, second = (path.read_bytes() for path in files)
    if format == "openvino":
        # It counts unnamed operations on from one model to the next.
        weights = [path.with_suffix(".bin").read_bytes() for path in files]
        assert weights[0] == weights[1] and len(first.splitlines()) == len(second.splitlines())
    else:
        assert first == second
    for folder in (tmp_path, REPOSITORY, sys.prefix, Path(torch.__file__).parent):
        assert str(folder).encode() not in first
