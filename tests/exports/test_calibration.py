"""Images for the ranges of INT8 files, and what is measured, printed, kept and refused; NumPy computes the same.

A StableHLO file stands in for an INT8 file, whose making parity/test_int8.py tests.
"""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image

import segjax
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import export as command
from segjax.data import specs
from segjax.data.open import OpenSplit
from segjax.exports import calibration, int8
from segjax.exports.format import ExportFormat
from segjax.inference import runtimes
from segjax.inference.engine import Protocol
from segjax.inference.open_exported import open_exported
from tests.pixels import SPEC, Pixels, scene

MEAN, STD = np.array(specs.IMAGENET_MEAN), np.array(specs.IMAGENET_STD)
ABOUT = {
    "classes": list(SPEC.class_names),
    "normalisation": {"mean": list(MEAN), "std": list(STD)},
    "output": "logits",
    "align_corners": False,
    "format_version": 1,
    "segjax_version": "0",
}
DYNAMIC = ("b", "h", "w", 3)


def write(path, model, shape=DYNAMIC):
    sides = jax_export.symbolic_shape(", ".join(map(str, shape)))
    images = jax.ShapeDtypeStruct(sides, "float32")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(jax_export.export(jax.jit(lambda images: model(images)[0]))(images).serialize())
    runtimes.write_metadata(path, ABOUT)
    return path


def loaded(model):
    dataset = dict(name=SPEC.name, class_names=SPEC.class_names, colors=SPEC.colors, ignore_label=255)
    return LoadedCheckpoint(model, SPEC, {"dataset": dataset}, tuple(MEAN), tuple(STD))


def split(labels_of, number, size=(30, 44)):
    """Images with the labels of a model, a few of which are ignored."""
    images = np.stack([scene(seed, *size) for seed in range(number)])
    labels = np.stack([labels_of(image) for image in images])
    labels[:, :3] = 255
    data = specs.Split(images, labels, np.tile(np.int32(size), (number, 1)), tuple(map(str, range(number))))
    return OpenSplit(data, SPEC, lambda: np.bincount(labels[labels != 255], minlength=5))


def crop_of(image, top, left, size):
    """Normalised pixels, in float64."""
    return ((image - MEAN) / STD)[top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize(("number", "first", "rest"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (11, 5, 6), (100, 32, 68)])
def test_at_most_half_of_the_images_calibrate_and_the_rest_are_evaluated(number, first, rest):
    model = Pixels(5)
    data = calibration.open_data(loaded(model), split(model.labels, number, (8, 9)))
    assert (len(data.calibrating), len(data.measured)) == (first, rest)
    assert number == 1 or sorted([*data.calibrating, *data.measured]) == list(range(number))
    # Evenly spaced.
    assert number < 11 or np.ptp(np.diff(data.calibrating)) <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_inputs_are_evaluation_windows_that_vary_between_images(seed, tmp_path):
    model, size = Pixels(5, seed), (24, 40)
    file = open_exported(write(tmp_path / "a.stablehlo", model, (1, *size, 3)))
    data = calibration.open_data(loaded(model), split(model.labels, 12, (30, 44)))
    # Larger images by a window, whose last steps are shifted inside.
    protocol = Protocol(mode="slide", crop=size)
    places = [(top, left) for top in (0, 6) for left in (0, 4)]
    for number, given in enumerate(calibration.calibration_inputs(file, protocol, data)):
        image = scene(data.calibrating[number], 30, 44)
        assert given.shape == (1, *size, 3) and given.dtype == np.float32
        (found,) = [place for place in places if np.allclose(given[0], crop_of(image, *place, size), rtol=0, atol=1e-5)]
        assert found == places[number % 4]


def test_smaller_images_are_padded_with_their_mean_as_in_evaluation(tmp_path):
    model = Pixels(5)
    file = open_exported(write(tmp_path / "a.stablehlo", model, (1, 24, 40, 3)))
    data = calibration.open_data(loaded(model), split(model.labels, 4, (20, 33)))
    for number, given in zip(data.calibrating, calibration.calibration_inputs(file, Protocol(), data), strict=True):
        np.testing.assert_allclose(given[0, :20, :33], crop_of(scene(number, 20, 33), 0, 0, (20, 33)), atol=1e-5)
        assert not given[0, 20:].any() and not given[0, :, 33:].any()


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """`stand_in(model)`: quantising writes the file of this model."""

    def quantised_as(model):
        other = write(tmp_path / "other" / "a.stablehlo", model)

        def quantise(source, target, inputs):
            assert source != target and len(inputs) >= 1
            shutil.copy(other, target)
            shutil.copy(runtimes.metadata_path(other), runtimes.metadata_path(target))
            return "nothing 1.0"

        monkeypatch.setattr(int8, "quantise", quantise)

    return quantised_as


def quantised(tmp_path, model, data, **settings):
    """What is kept next to the file."""
    source, target = write(tmp_path / "float32" / "a.stablehlo", model), tmp_path / "a.stablehlo"
    opened = calibration.open_data(loaded(model), data)
    calibration.quantise(source, target, opened, settings={}, metadata=ABOUT, **settings)
    return json.loads(runtimes.metadata_path(target).read_text())


def altered(seed, error):
    model, noise = Pixels(5, seed), np.random.default_rng(seed + 9).standard_normal((3, 5))
    model.kernel[...] += error * noise
    return model


@pytest.mark.parametrize("seed", [0, 3])
def test_figures_before_and_after_equal_numpys(seed, tmp_path, stand_in, caplog):
    model, other = Pixels(5, seed), altered(seed, 0.3)
    stand_in(other)
    data = split(altered(seed, 0.5).labels, 9)
    with caplog.at_level(logging.INFO, "segjax"):
        kept = quantised(tmp_path, model, data, accept_loss=True)
    record, rest = kept["quantisation"], [number for number in range(9) if number not in (0, 3, 5, 8)]
    truths = np.stack([data.data.labels[number] for number in rest])
    labels = {
        name: np.stack([each.labels(data.data.images[number]) for number in rest])
        for name, each in (("float32", model), ("int8", other))
    }
    valid = truths != 255
    for name, predicted in labels.items():
        ious = []
        for value in range(5):
            one, another = (truths == value) & valid, (predicted == value) & valid
            if (one | another).any():
                ious.append((one & another).sum() / (one | another).sum())
        assert record[name]["mean_iou"] == pytest.approx(np.mean(ious), abs=1e-9)
    equal = (labels["float32"] == labels["int8"])[valid].mean()
    assert 0.2 < equal < 0.999 and record["agreement"] == pytest.approx(equal, abs=1e-9)
    assert record["int8"]["bytes"] == (tmp_path / "a.stablehlo").stat().st_size
    assert record["calibration_images"] == 4 and record["measured_images"] == 5
    assert record["timed_size"] == [30, 44] and record["float32"]["ms_per_image"] > 0
    # The table has the same figures.
    lines = caplog.messages
    (line,) = [line for line in lines if line.startswith("  mIoU")]
    figures = [record[name]["mean_iou"] for name in ("float32", "int8")]
    assert line.split()[1:] == [*(f"{figure:.4f}" for figure in figures), f"{figures[1] - figures[0]:+.4f}"]
    assert any(line.split()[:2] == ["agreement", f"{equal:.2%}"] for line in lines)
    assert max(map(len, lines)) <= 80
    # What describes the file is still with it.
    assert kept["classes"] == ABOUT["classes"] and segjax.open_exported(tmp_path / "a.stablehlo").model.size is None


def test_a_loss_of_more_than_one_point_of_miou_is_refused_unless_accepted(tmp_path, stand_in):
    model = Pixels(5, 1)
    data = split(model.labels, 6)
    stand_in(altered(1, 0.3))
    with pytest.raises(calibration.LossError, match=r"INT8 loses \d+\.\d points of mIoU .* --accept-loss writes it"):
        quantised(tmp_path, model, data)
    record = quantised(tmp_path, model, data, accept_loss=True)["quantisation"]
    assert record["float32"]["mean_iou"] == 1 and record["int8"]["mean_iou"] < 0.98
    stand_in(altered(1, 1e-4))
    record = quantised(tmp_path, model, data)["quantisation"]
    assert 0.99 < record["int8"]["mean_iou"] <= 1


def test_images_without_labels_give_the_agreement_of_all_pixels(tmp_path, stand_in, caplog):
    model, other = Pixels(5, 2), altered(2, 0.3)
    stand_in(other)
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    images = [scene(seed, 20 + seed, 31) for seed in range(5)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(photos / ("deep" if number > 2 else "") / f"{number}.png")
    (photos / "notes.txt").write_text("no image")
    with caplog.at_level(logging.INFO, "segjax"):
        record = quantised(tmp_path, model, photos)["quantisation"]
    # In the order of their paths 0, 1 and 2 come before deep/; the first and the last set the ranges.
    equal, pixels = 0, 0
    for image in images[1:4]:
        equal += (model.labels(image) == other.labels(image)).sum()
        pixels += image.shape[0] * image.shape[1]
    assert record["agreement"] == pytest.approx(equal / pixels, abs=1e-9) and 0.2 < equal / pixels < 0.999
    assert "mean_iou" not in record["int8"] and not any(line.startswith("  mIoU") for line in caplog.messages)
    assert any("without labels there is no mIoU" in line for line in caplog.messages)


def test_data_that_cannot_calibrate_are_refused(tmp_path):
    model = Pixels(5)
    with pytest.raises(ValueError, match=r"nowhere: no dataset and no folder of images; the datasets are .*camvid"):
        calibration.open_data(loaded(model), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: there is no image to calibrate with"):
        calibration.open_data(loaded(model), tmp_path / "empty")
    with pytest.raises(ValueError, match="the model has 3 classes"):
        calibration.open_data(LoadedCheckpoint(Pixels(3), SPEC), split(model.labels, 3))
    (tmp_path / "a.png").write_bytes(b"no image")
    data = calibration.open_data(loaded(model), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: "):
        data.read(0)


def test_the_protocol_is_that_of_the_run_with_the_files_window():
    config = {"eval": {"mode": "slide", "crop": [32, 48], "stride": [16, 24], "scales": [0.5, 1.0], "flip": True}}
    run = LoadedCheckpoint(Pixels(5), SPEC, {"config": config})
    found = {size: calibration.settings_of(run, ExportFormat("onnx", size, int8=True)) for size in ((32, 48), (24, 40))}
    kept = {"mode": "slide", "scales": (0.5, 1.0), "flip": True}
    assert found == {(32, 48): kept | {"crop": (32, 48), "stride": (16, 24)}, (24, 40): kept}
    assert calibration.settings_of(run, ExportFormat("onnx", (24, 40), argmax=True)) == {}
    open_sizes = ExportFormat("onnx", (24, 40), dynamic=True)
    assert calibration.settings_of(run, open_sizes) == found[32, 48]


def test_a_file_of_labels_must_be_as_large_as_the_images():
    model = Pixels(5)
    data = calibration.open_data(loaded(model), split(model.labels, 3, (30, 44)))
    form = ExportFormat("onnx", (30, 40), argmax=True, int8=True)
    with pytest.raises(CheckpointError, match=r"has images of 30x44, and a file that gives labels .* larger --size"):
        calibration.refuse_larger(data, form)
    calibration.refuse_larger(data, ExportFormat("onnx", (30, 44), argmax=True, int8=True))
    calibration.refuse_larger(data, ExportFormat("onnx", (24, 40), int8=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a.onnx", "--int8"), "--int8 needs --calibrate DATA, images for the ranges of activations"),
        (("a.onnx", "--calibrate", "camvid"), "--calibrate and --accept-loss go with --int8"),
        (("a.onnx", "--accept-loss"), "--calibrate and --accept-loss go with --int8"),
        (("a.onnx", "--source", "x"), "--source and --data-dir go with --calibrate NAME, a dataset"),
        (("a.onnx", "--int8", "--calibrate", "photos", "--source", "x"), "go with --calibrate NAME, a dataset"),
        (("a.bin",), "a.bin: the suffix selects the format: .stablehlo, .onnx, .xml, .pt2"),
    ],
)
def test_contradictory_options_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        command.main(["model.safetensors", *arguments])
    assert words in " ".join(capsys.readouterr().err.split())
