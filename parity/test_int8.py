"""INT8 files of onnxruntime and nncf, and float16 files: their graphs, by NumPy, and their labels."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import segjax
from segjax.checkpoints import orbax_folder
from segjax.commands import evaluate, export, predict
from segjax.data import specs, streets
from segjax.data.open import OpenSplit
from segjax.exports import float16, int8
from segjax.exports import onnx as onnx_export
from segjax.exports.format import ExportFormat
from segjax.inference import runtimes
from segjax.torch_reference import verify
from tests.tiny import tiny_model

REPOSITORY = Path(__file__).parents[1]
SIZE = (64, 96)
FAMILIES = ("segformer", "hrnet", "segnext")
MEAN, STD = np.array(specs.IMAGENET_MEAN), np.array(specs.IMAGENET_STD)
TOOLS = ("onnx", "openvino")


def scenes(numbers):
    return np.stack([streets.scene(seed=0, index=number, size=SIZE)[0] for number in numbers])


def inputs_of(images):
    """What files without preprocessing take, (1, 3, H, W) each."""
    normal = ((images - MEAN) / STD).astype(np.float32)
    return [np.ascontiguousarray(np.moveaxis(image, -1, 0)[None]) for image in normal]


RANGES, OTHERS = inputs_of(scenes(range(8))), inputs_of(scenes(range(8, 16)))


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """`file_of(family)`: an ONNX file in float32 of a tiny model; exporters take seconds."""
    folder, files = tmp_path_factory.mktemp("float32"), {}

    def made(family):
        if family not in files:
            files[family] = folder / f"{family}.onnx"
            onnx_export.write_onnx(files[family], tiny_model(1, family), ExportFormat("onnx", SIZE), {"classes": ["a"]})
        return files[family]

    return made


def quantised(file, tool, folder):
    """The float file of a tool, and its INT8 file."""
    source, target = file, folder / "int8.onnx"
    if tool == "openvino":
        openvino = runtimes.import_openvino()
        source, target = folder / "float32.xml", folder / "int8.xml"
        openvino.save_model(openvino.Core().read_model(file), source, compress_to_fp16=False)
    int8.quantise(source, target, RANGES)
    return source, target


def constants_of(graph):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_an_int8_onnx_file_are_rounded_channel_by_channel(family, file_of, tmp_path):
    source, target = quantised(file_of(family), "onnx", tmp_path)
    floats, graph = constants_of(onnx.load(source).graph), onnx.load(target).graph
    constants, makers = constants_of(graph), {name: node for node in graph.node for name in node.output}
    expected = [
        node.name
        for node in onnx.load(source).graph.node
        if node.op_type == "Conv" or (node.op_type == "MatMul" and np.ndim(floats.get(node.input[1], 0)) == 2)
    ]
    found = []
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul"):
            continue
        sources = [makers[name].op_type if name in makers else None for name in node.input[:2]]
        if node.name not in expected:
            # Products of two activations.
            assert "DequantizeLinear" not in sources
            continue
        found.append(node.name)
        assert sources == ["DequantizeLinear", "DequantizeLinear"]
        weights, scale, zero = (constants[name] for name in makers[node.input[1]].input)
        axis = 0 if node.op_type == "Conv" else 1
        wide = floats[makers[node.input[1]].input[0].removesuffix("_quantized")]
        largest = np.abs(wide).max(axis=tuple(k for k in range(wide.ndim) if k != axis))
        np.testing.assert_allclose(scale, largest / 127, rtol=1e-5)
        assert weights.dtype == np.int8 and not zero.any() and scale.shape == (wide.shape[axis],)
        steps = scale.reshape([-1 if k == axis else 1 for k in range(wide.ndim)])
        assert (np.abs(weights * steps - wide) <= 0.501 * steps).all()
    assert sorted(found) == sorted(expected) and len(found) > 10


def test_a_range_spans_the_smallest_to_the_largest_value(file_of, tmp_path):
    graph = onnx.load(quantised(file_of("hrnet"), "onnx", tmp_path)[1]).graph
    constants = constants_of(graph)
    (node,) = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "images"]
    low, high = np.min(RANGES), np.max(RANGES)
    assert constants[node.input[1]] == pytest.approx((high - low) / 255, rel=1e-5)
    assert (
        constants[node.input[2]] == np.round(-low * 255 / (high - low)) and constants[node.input[2]].dtype == np.uint8
    )


@pytest.mark.each_value_once
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("default")
def test_labels_of_int8_files_nearly_equal_those_of_float32(family, tool, file_of, tmp_path):
    source, target = quantised(file_of(family), tool, tmp_path)
    before, after = (runtimes.open_file(path) for path in (source, target))
    assert after.metadata == before.metadata == {"classes": ["a"]}
    wide, narrow = (np.concatenate([file.run(given) for given in OTHERS]) for file in (before, after))
    equal = (wide.argmax(axis=1) == narrow.argmax(axis=1)).mean()
    correlation = np.corrcoef(wide.ravel(), narrow.ravel())[0, 1]
    # Random weights have many scores that are nearly equal, and errors that training would have made smaller.
    assert 0.85 < equal < 1 and correlation > 0.97
    # Labels by chance would agree less.
    rolled = np.roll(wide, 1, axis=0)
    assert (wide.argmax(axis=1) == rolled.argmax(axis=1)).mean() < equal - 0.05


@pytest.mark.filterwarnings("default")
def test_openvino_quantises_only_convolutions_and_linear_layers(file_of, tmp_path):
    openvino = runtimes.import_openvino()
    counts = {}
    for family in FAMILIES:
        target = quantised(file_of(family), "openvino", tmp_path)[1]
        found = []
        for operation in openvino.Core().read_model(target).get_ordered_ops():
            sources = {entry.get_source_output().get_node().get_type_name() for entry in operation.inputs()}
            if "FakeQuantize" in sources:
                found.append(operation.get_type_name())
        assert set(found) - {"Multiply"} <= {"Convolution", "GroupConvolution", "MatMul", "FakeQuantize", "Reshape"}
        counts[family] = found.count("MatMul")
    # The products of SegNeXt are those of its matrix decomposition.
    assert counts["segnext"] == counts["hrnet"] == 0 < counts["segformer"]


def test_nncfs_telemetry_is_switched_off(tmp_path):
    # Telemetry goes through a forked process and a socket.
    kernel = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "kernel")
    shapes = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, height, 12])
        for name, channels, height in (("images", 3, 10), ("logits", 4, 8))
    ]
    shapes[1].type.tensor_type.shape.dim[3].dim_value = 10
    node = onnx.helper.make_node("Conv", ["images", "kernel"], ["logits"])
    graph = onnx.helper.make_graph([node], "one", shapes[:1], shapes[1:], [kernel])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "a.onnx")
    code = """if True:
        import os, pathlib, socket, time
        import numpy as np
        os.register_at_fork(before=lambda: os._exit(3))
        socket.socket.connect = lambda *_: os._exit(4)
        from segjax.exports import int8
        from segjax.inference.runtimes import import_openvino
        openvino, folder = import_openvino(), pathlib.Path.cwd()
        openvino.save_model(openvino.Core().read_model("a.onnx"), "a.xml")
        (folder / "int8").mkdir()
        int8.quantise(folder / "a.xml", folder / "int8/a.xml", [np.ones((1, 3, 10, 12), np.float32)])
        time.sleep(1)
        print("quiet")
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "quiet"), done.stderr


@pytest.mark.slow
def test_an_int8_onnx_file_with_dynamic_sizes_takes_other_sizes(tmp_path):
    path = tmp_path / "a.onnx"
    onnx_export.write_onnx(path, tiny_model(1), ExportFormat("onnx", SIZE, dynamic=True), {})
    (tmp_path / "int8").mkdir()
    int8.quantise(path, tmp_path / "int8/a.onnx", [given[..., :64, : 64 + 8 * k] for k, given in enumerate(RANGES[:4])])
    rng = np.random.default_rng(0)
    images = np.repeat(np.repeat(rng.normal(size=(2, 3, 14, 20)), 7, axis=2), 7, axis=3).astype(np.float32)
    wide, narrow = (runtimes.open_onnx(file).run(images) for file in (path, tmp_path / "int8/a.onnx"))
    assert wide.shape == narrow.shape == (2, 5, 25, 35)
    assert np.corrcoef(wide.ravel(), narrow.ravel())[0, 1] > 0.95


# ------------------------------------------------------------------------------------------------------- as a command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model that names its classes, and a split with the labels that it gives."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    spec = specs.DatasetSpec("rooms", tuple("abcde"), tuple((k, 0, 0) for k in range(5)), 255)
    dataset = dict(name=spec.name, class_names=spec.class_names, colors=spec.colors, ignore_label=255)
    orbax_folder.save_model(folder, tiny_model(1), metadata={"dataset": dataset, "input_size": list(SIZE)})
    images = scenes(range(8))
    predictor = segjax.Predictor(folder)
    labels = np.stack([predictor(image) for image in images])
    data = specs.Split(images, labels, np.tile(np.int32(SIZE), (8, 1)), tuple(map(str, range(8))))
    return folder, OpenSplit(data, spec, lambda: np.bincount(labels.ravel(), minlength=5))


@pytest.mark.parametrize(
    "name",
    ["m.onnx", pytest.param("m.xml", marks=[pytest.mark.slow, pytest.mark.filterwarnings("default")])],
)
def test_an_int8_file_evaluates_and_predicts_like_any_other(name, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, split = checkpoint
    for number, image in enumerate(split.data.images):
        (tmp_path / "photos").mkdir(exist_ok=True)
        np.save(tmp_path / f"photos/{number}.npy", image)
    # At the size that the checkpoint states, in the format of the suffix.
    assert export.main([str(folder), name, "--int8", "--calibrate", "photos"]) == 0
    printed = capsys.readouterr().out
    (share,) = re.findall(r"agreement +([\d.]+)%", printed)
    about = json.loads((tmp_path / f"{name}.json").read_text())
    assert about["quantisation"]["agreement"] == pytest.approx(float(share) / 100, abs=1e-4)
    assert about["weights"] == "int8" and about["quantisation"]["calibration_images"] == 4
    assert max(map(len, printed.splitlines())) <= 80
    model = segjax.open_exported(name)
    labels = segjax.Predictor(model).labels(list(split.data.images))
    measured = [number for number in range(8) if number not in (0, 2, 5, 7)]
    equal = [(labels[number] == split.data.labels[number]).mean() for number in measured]
    assert np.mean(equal) == pytest.approx(float(share) / 100, abs=2e-3)
    # The commands take it too, and the reference shows the loss.
    assert predict.main(["photos", "--checkpoint", name, "--output", "out"]) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8
    found = segjax.evaluate_dataset(name, split, reference=folder)
    assert found["reference"]["mean_iou"] == 1 and 0.2 < found["mean_iou"] < 1
    assert evaluate.main([name, "--data", "streets"]) == 2
    assert "the model has 5 classes of rooms" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m.onnx", pytest.param("m.xml", marks=pytest.mark.filterwarnings("default"))])
def test_a_refused_loss_of_miou_leaves_the_previous_file(name, checkpoint, tmp_path):
    folder, split = checkpoint
    for file in (name, f"{name}.json"):
        (tmp_path / file).write_text("the one before")
    (tmp_path / "m.bin").write_text("the one before")
    with pytest.raises(segjax.exports.calibration.LossError, match="points of mIoU on rooms"):
        segjax.export_model(folder, tmp_path / name, int8=True, calibration=split)
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}.json", "m.bin"}
    assert {path.read_text() for path in tmp_path.iterdir()} == {"the one before"}


def test_missing_quantisation_packages_are_named_with_their_extra(checkpoint, tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    np.save(photos / "a.npy", scenes([0])[0])
    monkeypatch.setitem(sys.modules, "nncf", None)
    arguments = [str(checkpoint[0]), str(tmp_path / "m.xml"), "--int8", "--calibrate", str(photos)]
    assert export.main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the format openvino with INT8 needs nncf: pip install 'segjax[export,openvino]'" in said
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert export.main(arguments[:2]) == 2
    assert "the format openvino needs openvino: pip install" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.pt2", {"int8": True}, "INT8 is for files of onnx and openvino, not of torch"),
        ("a.onnx", {"int8": True, "dtype": "float16"}, "INT8 is made from weights in float32; omit the dtype float16"),
        ("a.xml", {"dtype": "bfloat16"}, "OpenVINO files have weights of float32 or float16, not of bfloat16"),
        ("a.onnx", {"int8": True}, "INT8 needs images for the ranges of its activations"),
        ("a.onnx", {"calibration": "photos"}, "calibration data are for INT8"),
    ],
)
def test_impossible_combinations_of_options_are_refused(name, options, words, checkpoint, tmp_path):
    with pytest.raises(segjax.checkpoints.checkpoint.CheckpointError, match=words):
        segjax.export_model(checkpoint[0], tmp_path / name, size=SIZE, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_bin_file_without_its_openvino_model_is_not_overwritten(checkpoint, tmp_path):
    (tmp_path / "a.bin").write_text("a checkpoint, perhaps")
    with pytest.raises(ValueError, match=r"a\.bin would be overwritten, and belongs to no a\.xml: choose another name"):
        segjax.export_model(checkpoint[0], tmp_path / "a.xml")
    assert (tmp_path / "a.bin").read_text() == "a checkpoint, perhaps"


# ------------------------------------------------------------------------------------------------------------- float16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float16_graph_has_float32_inputs_and_outputs(family, file_of, tmp_path):
    proto = onnx.load(file_of(family))
    float16.convert(proto)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, tmp_path / "a.onnx")
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    wide = set()
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul", "Softmax", "LayerNormalization", "Resize"):
            assert kinds[node.input[0]] == kinds[node.output[0]] or node.op_type == "Cast"
            if kinds[node.input[0]] == onnx.TensorProto.FLOAT:
                wide.add(float16.scopes_of(node)[-1])
    assert wide == ({"reference.decode_head.hamburger"} if family == "segnext" else set())
    before, after = (runtimes.open_onnx(path) for path in (file_of(family), tmp_path / "a.onnx"))
    assert after.dtype == np.float32 and after.metadata == before.metadata
    for given in OTHERS[:3]:
        found, expected = after.run(given), before.run(given)
        assert found.dtype == np.float32
        assert 0 < verify.relative_error(found, expected) < 1e-2
    sizes = [path.stat().st_size for path in (file_of(family), tmp_path / "a.onnx")]
    values = sum(tensor.size for tensor in constants_of(onnx.load(file_of(family)).graph).values() if tensor.size > 64)
    assert sizes[0] - sizes[1] > 1.5 * values


def test_labels_and_numbers_beyond_float16_stay_right(tmp_path):
    # 16-bit images reach 65535, and the largest float16 is 65504.
    model = tiny_model(2)
    mean, std = (40_000.0, 41_000.0, 42_000.0), (9_000.0, 8_000.0, 7_000.0)
    kind = specs.ImageKind(3, "uint16")
    form = ExportFormat(
        "onnx", SIZE, preprocessing=True, argmax=True, dtype="float16", mean=mean, std=std, image_kind=kind
    )
    onnx_export.write_onnx(tmp_path / "a.onnx", model, form, {})
    images = (scenes([3]).astype(np.float64) * 257).astype(np.uint16)
    images[:, :20, :20] = 65535
    labels = runtimes.open_onnx(tmp_path / "a.onnx").run(images)
    normal = ((images - np.array(mean)) / np.array(std)).astype(np.float32)
    logits = np.asarray(verify.compiled(model)(normal)[0])
    expected = segjax.exports.export.upsampled(logits, SIZE, align_corners=False).argmax(axis=-1)
    assert labels.dtype == np.uint8 and labels.shape == (1, *SIZE)
    assert len(np.unique(expected)) > 1 and (labels == expected).mean() > 0.99
