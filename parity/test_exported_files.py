"""Files of other exporters, run by onnxruntime, OpenVINO, PyTorch and LiteRT: their labels equal NumPy's."""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import flatbuffers
import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

import segjax
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.commands import export
from segjax.data import specs
from segjax.inference.open_exported import open_exported
from segjax.inference.runtimes import import_openvino, write_metadata
from tests.pixels import Pixels, scene
from tests.tiny import tiny_model

REPO = Path(__file__).parents[1]
MEAN, STD = specs.IMAGENET_MEAN, specs.IMAGENET_STD


def kernel_of(model):
    """(3, K)."""
    return np.asarray(model.kernel[...])


def write_onnx(path, model, size=("height", "width"), metadata=None):
    """As optimum writes it: all sides open, also that of the channels."""
    kernel = onnx.numpy_helper.from_array(np.ascontiguousarray(kernel_of(model).T[:, :, None, None]), "kernel")
    kinds = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", channels, *size])
        for name, channels in (("pixel_values", "num_channels"), ("logits", "num_labels"))
    ]
    node = onnx.helper.make_node("Conv", ["pixel_values", "kernel"], ["logits"])
    graph = onnx.helper.make_graph([node], "pixels", kinds[:1], kinds[1:], [kernel])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(proto, metadata or {})
    onnx.save(proto, path)
    return path


def write_openvino(path, model):
    return convert(write_onnx(path.with_suffix(".onnx"), model), path)


def convert(source, path):
    openvino = import_openvino()
    openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=False)
    return path


class Scores(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.from_numpy(kernel_of(model).copy()))

    def forward(self, images):
        return {"features": images, "logits": torch.einsum("bchw,ck->bkhw", images, self.kernel)}


def write_torch(path, model):
    sides = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(Scores(model), (torch.zeros(2, 3, 8, 12),), dynamic_shapes=(sides,))
    torch.export.save(program, path)
    return path


def tensor(name, shape, dtype, buffer=0, quantisation=None):
    made = schema.TensorT()
    made.name, made.shape, made.type, made.buffer = name, list(shape), getattr(schema.TensorType, dtype), buffer
    if quantisation:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = [quantisation[0]], [quantisation[1]]
    return made


def write_tflite(path, model, size=(24, 40), quantised=False):
    """A convolution of images (1, H, W, 3), between conversions from and to int8 if it is quantised."""
    kernel, classes = kernel_of(model), model.spec.num_classes
    made = schema.ModelT()
    made.version, made.description = 3, "pixels"
    made.buffers = [schema.BufferT() for _ in range(3)]
    values = np.ascontiguousarray(kernel.T[:, None, None, :]), np.zeros(classes, np.float32)
    for buffer, array in zip(made.buffers[1:], values, strict=True):
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
    graph = schema.SubGraphT()
    graph.tensors = [
        tensor("images", (1, *size, 3), "FLOAT32"),
        tensor("kernel", values[0].shape, "FLOAT32", 1),
        tensor("bias", values[1].shape, "FLOAT32", 2),
        tensor("scores", (1, *size, classes), "FLOAT32"),
    ]
    steps = [("CONV_2D", [0, 1, 2], [3])]
    graph.inputs, graph.outputs = [0], [3]
    if quantised:
        graph.tensors += [
            tensor("images8", (1, *size, 3), "INT8", 0, (0.02, -3)),
            tensor("scores8", (1, *size, classes), "INT8", 0, (0.08, 5)),
        ]
        steps = [("DEQUANTIZE", [4], [0]), *steps, ("QUANTIZE", [3], [5])]
        graph.inputs, graph.outputs = [4], [5]
    made.operatorCodes, graph.operators = [], []
    for number, (name, inputs, outputs) in enumerate(steps):
        code, operator = schema.OperatorCodeT(), schema.OperatorT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = code.builtinCode, 1 if name == "CONV_2D" else 2
        operator.opcodeIndex, operator.inputs, operator.outputs = number, inputs, outputs
        if name == "CONV_2D":
            operator.builtinOptionsType = schema.BuiltinOptions.Conv2DOptions
            operator.builtinOptions = schema.Conv2DOptionsT()
            operator.builtinOptions.strideH = operator.builtinOptions.strideW = 1
            operator.builtinOptions.dilationHFactor = operator.builtinOptions.dilationWFactor = 1
        made.operatorCodes.append(code)
        graph.operators.append(operator)
    made.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(made.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


WRITERS = {"a.onnx": write_onnx, "a.xml": write_openvino, "a.pt2": write_torch, "a.tflite": write_tflite}
PACKAGES = {"a.onnx": "onnxruntime", "a.xml": "openvino", "a.pt2": "torch", "a.tflite": "ai-edge-litert"}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_files_of_other_exporters_give_the_labels_of_their_scores(name, seed, tmp_path):
    model = Pixels(4, seed)
    path = WRITERS[name](tmp_path / name, model)
    with pytest.raises(CheckpointError, match=r"does not say how its images are normalised\. Give --mean and --std"):
        open_exported(path)
    loaded = open_exported(path, mean=MEAN, std=STD)
    assert loaded.model.runnable.package.startswith(f"{PACKAGES[name]} ") and loaded.model.spec.num_classes == 4
    predictor = segjax.Predictor(loaded)
    for size in ((24, 40), (70, 53)):
        image = scene(seed, *size)
        expected = np.exp(model.scores(image))
        np.testing.assert_array_equal(predictor(image), model.labels(image))
        probabilities = expected / expected.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(predictor.probabilities(image), probabilities, rtol=0, atol=1e-5)
    if name == "a.xml":
        assert segjax.Predictor(open_exported(path, mean=MEAN, std=STD))(image).shape == image.shape[:2]


def test_quantised_inputs_and_outputs_are_scaled(tmp_path):
    model, image = Pixels(4, 2), scene(0, 24, 40)
    loaded = open_exported(write_tflite(tmp_path / "a.tflite", model, quantised=True), mean=MEAN, std=STD)
    assert not loaded.model.normalises and loaded.model.output == "logits"
    normalised = (image - np.array(MEAN)) / np.array(STD)
    rounded = 0.02 * (np.clip(np.rint(normalised / 0.02) - 3, -128, 127) + 3)
    scores = 0.08 * (np.clip(np.rint(rounded @ kernel_of(model) / 0.08) + 5, -128, 127) - 5)
    found, size = loaded.model(image[None])
    assert size == (24, 40)
    # Rounding of halves may go either way.
    assert np.abs(found[0] - scores).max() < 0.081 and np.abs(found[0] - scores).mean() < 0.002
    assert np.abs(scores).max() > 1


def test_onnxruntimes_telemetry_is_switched_off(tmp_path):
    code = """
        import os, sys
        from segjax.inference.runtimes import open_onnx
        open_onnx(sys.argv[1])
        print(os.environ["ORT_DISABLE_TELEMETRY"])
    """
    path, scratch = write_onnx(tmp_path / "a.onnx", Pixels(4)), tmp_path / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", textwrap.dedent(code), path]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    # Its telemetry keeps the file .ses there.
    assert printed == "1\n" and list(scratch.iterdir()) == []


def test_a_damaged_pt2_is_named_without_pytorchs_log(tmp_path, capfd):
    path = write_torch(tmp_path / "a.pt2", Pixels(4))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    for at in (member.header_offset + 200, len(content) // 2):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"a\.pt2: is damaged: the CRC of .* differs"):
            open_exported(path, mean=MEAN, std=STD)
    middle = len(content) // 2
    path.write_bytes(content[: middle - 50] + content[middle:])
    with pytest.raises(CheckpointError, match=r"a\.pt2: torch cannot read it as torch\.export"):
        open_exported(path, mean=MEAN, std=STD)
    path.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"a\.pt2: torch cannot read it as torch\.export \(File is not a zip file\)"
    ):
        open_exported(path, mean=MEAN, std=STD)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seed", [0, 1])
def test_a_damaged_onnx_file_is_named_and_nothing_else_is_printed(seed, tmp_path, capfd):
    path = write_onnx(tmp_path / "a.onnx", Pixels(4))
    content, rng = path.read_bytes(), np.random.default_rng(seed)
    refused = []
    for at in rng.integers(0, len(content), 30).tolist():
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        try:
            open_exported(path, mean=MEAN, std=STD)
        except CheckpointError as error:
            refused.append(str(error))
    assert refused and all(message.startswith(f"{path}: ") for message in refused)
    assert "codec can't" not in "".join(refused) and capfd.readouterr().out == ""


def test_foreign_metadata_in_an_onnx_file_are_ignored(tmp_path):
    path = write_onnx(tmp_path / "a.onnx", Pixels(4), metadata={"classes": "7", "names": "{0: 'a'}"})
    assert open_exported(path, mean=MEAN, std=STD).dataset is None


# The exporter takes half a minute.
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--with-preprocessing", "--with-argmax"]])
def test_our_files_need_no_options_even_if_openvino_converts_them(options, tmp_path, monkeypatch):
    monkeypatch.setattr("segjax.exports.export.checked_sizes", lambda form, multiple: [(1, form.size)])
    model = tiny_model(4, num_classes=3)
    segjax.save(model, tmp_path / "a.safetensors")
    command = [
        tmp_path / "a.safetensors",
        tmp_path / "a.onnx",
        "--format",
        "onnx",
        "--size",
        64,
        96,
        "--dynamic",
        *options,
    ]
    assert export.main([str(argument) for argument in command]) == 0
    convert(tmp_path / "a.onnx", tmp_path / "b.xml")
    images = [scene(seed, 70, 93) for seed in (0, 1)]
    expected = segjax.Predictor(tmp_path / "a.safetensors").labels(images)
    for name in ("a.onnx", "b.xml", "b.bin"):
        predictor = segjax.Predictor(tmp_path / name)
        assert predictor.classes.num_classes == 3
        found = predictor.labels(images)
        assert np.mean(np.stack(found) == np.stack(expected)) > 0.999, name


def test_mismatched_openvino_weights_are_detected_before_running(tmp_path):
    about = {"normalisation": {"mean": list(MEAN), "std": list(STD)}, "segjax_version": "0"}
    openvino = import_openvino()
    for name, seed in (("a", 0), ("b", 1)):
        path = tmp_path / f"{name}.xml"
        model = openvino.Core().read_model(write_onnx(tmp_path / "a.onnx", Pixels(4, seed)))
        model.reshape([1, 3, 24, 40])
        openvino.save_model(model, path, compress_to_fp16=False)
        write_metadata(path, about)
        assert open_exported(path).model.spec.num_classes == 4
    (tmp_path / "b.bin").replace(tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.xml: is not the file with the weights in a\.bin that a\.xml\.json"):
        open_exported(tmp_path / "a.xml")
    with pytest.raises(CheckpointError, match=r"b\.xml: b\.bin, its weights, is not next to it; copy it too"):
        open_exported(tmp_path / "b.xml")


def test_a_broken_file_is_named(tmp_path):
    for name, package in PACKAGES.items():
        (tmp_path / name).write_bytes(b"nothing that could be run")
        with pytest.raises(CheckpointError, match=f"{name}: {package} cannot read it as"):
            open_exported(tmp_path / name)


def test_openvinos_telemetry_is_switched_off():
    code = "import os; os.register_at_fork(before=lambda: os._exit(3)); import segjax.inference.runtimes as runtimes; "
    code += "runtimes.import_openvino().convert_model; import time; time.sleep(1); print('quiet')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "quiet"), done.stderr
