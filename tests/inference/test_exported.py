"""Exported files in place of models: their inputs and outputs are detected, and their labels equal NumPy's.

The files are StableHLO, which jax runs. Other packages' files: parity/test_exported_files.py.
"""

import json
import logging
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

import segjax
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.checkpoint import CheckpointError
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import evaluate, export, predict
from segjax.data import specs
from segjax.inference import runtimes
from segjax.inference.open_exported import open_exported
from tests.inference.test_evaluate_dataset import split_of
from tests.pixels import SPEC, Pixels, scene
from tests.tiny import tiny_model

MEAN, STD = specs.IMAGENET_MEAN, specs.IMAGENET_STD
IMAGENET = {"mean": list(MEAN), "std": list(STD)}


def write(path, function, shape, dtype="float32", metadata=None):
    """Exports a function of images of this shape, in which letters are open sizes."""
    sides = jax_export.symbolic_shape(", ".join(map(str, shape)))
    program = jax_export.export(jax.jit(function))(jax.ShapeDtypeStruct(sides, dtype))
    path.write_bytes(program.serialize())
    if metadata is not None:
        runtimes.metadata_path(path).write_text(json.dumps(metadata))
    return path


def file_of(
    path, model, *, size=("h", "w"), batch="b", takes="BHWC", inside=False, gives="logits", last=True, factor=1, **more
):
    """A file of a `Pixels` model in any layout; `factor` is the stride of its output."""
    kernel, around = (np.asarray(part[...]) for part in (model.kernel, model.context))

    def run(images):
        images = images if takes == "BHWC" else jnp.moveaxis(images, 1, -1)
        if inside:
            images = (images.astype(jnp.float32) - np.float32(MEAN)) / np.float32(STD)
        seen = images[:, ::factor, ::factor]
        scores = seen @ kernel + (images.mean(axis=(1, 2), keepdims=True) @ around)
        if gives == "labels":
            labels = scores.argmax(-1) if scores.shape[-1] > 1 else scores[..., 0] > 0
            return labels.astype(jnp.int32)[..., None] if last is None else labels.astype(jnp.int32)
        if gives == "probabilities":
            scores = jax.nn.softmax(scores) if scores.shape[-1] > 1 else jax.nn.sigmoid(scores)
        return scores if last else jnp.moveaxis(scores, -1, 1)

    shape = (batch, *size, 3) if takes == "BHWC" else (batch, 3, *size)
    return write(path, run, shape, "uint8" if inside else "float32", **more)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"takes": "BCHW", "last": False},
        {"takes": "BCHW", "last": True, "gives": "probabilities"},
        {"last": False, "gives": "probabilities", "batch": 2},
        {"inside": True, "gives": "labels"},
        {"takes": "BCHW", "inside": True, "gives": "labels", "last": None, "batch": 3},
    ],
)
def test_labels_of_a_file_in_any_layout_equal_numpys(settings, seed, tmp_path):
    model = Pixels(5, seed)
    names = {"classes": list(SPEC.class_names)} if settings.get("gives") == "labels" else None
    path = file_of(tmp_path / "a.stablehlo", model, metadata=names, **settings)
    normalised = {} if settings.get("inside") else {"mean": MEAN, "std": STD}
    predictor = segjax.Predictor(open_exported(path, **normalised), batch=2)
    images = [scene(seed + number, 67, 130) for number in range(3)]
    for image, labels in zip(images, predictor.labels(images), strict=True):
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, model.labels(image))


@pytest.mark.parametrize("last", [True, False])
def test_class_names_identify_the_axis_of_the_scores(last, tmp_path):
    # For images of 20x24, scores of (5, 5, 6) may be 5 classes in maps of 5x6, or 6 classes in maps of 5x5.
    given = {"size": (20, 24), "batch": 1, "factor": 4, "last": last}
    names = {"classes": list(SPEC.class_names), "normalisation": IMAGENET}
    loaded = open_exported(file_of(tmp_path / "a.stablehlo", Pixels(5, 2), metadata=names, **given))
    assert loaded.model.spec.num_classes == 5 and loaded.model.scores_last is last


@pytest.mark.parametrize("gives", ["logits", "probabilities"])
@pytest.mark.parametrize("num_classes", [1, 5])
def test_probabilities_follow_from_the_scores(num_classes, gives, tmp_path):
    model, image = Pixels(num_classes, 2), scene(4, 37, 61)
    loaded = open_exported(file_of(tmp_path / "a.stablehlo", model, gives=gives), mean=MEAN, std=STD)
    assert loaded.model.output == gives and loaded.model.spec.num_classes == num_classes
    found = segjax.Predictor(loaded).probabilities(image)
    scores = model.scores(image)
    expected = 1 / (1 + np.exp(-scores)) if num_classes == 1 else np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_labels_at_a_quarter_of_the_size_are_repeated(tmp_path):
    model, image = Pixels(5, 1), scene(0, 40, 64)
    metadata = {"classes": list(SPEC.class_names), "normalisation": IMAGENET}
    path = file_of(tmp_path / "a.stablehlo", model, gives="labels", factor=4, metadata=metadata)
    expected = np.repeat(np.repeat(model.labels(image)[::4, ::4], 4, axis=0), 4, axis=1)
    np.testing.assert_array_equal(segjax.Predictor(path)(image), expected)


def test_a_file_of_fixed_size_slides_over_large_images_and_pads_small_ones(tmp_path):
    model = Pixels(5, 3)
    path = file_of(tmp_path / "a.stablehlo", model, size=(32, 48), batch=1)
    loaded = open_exported(path, mean=MEAN, std=STD)
    predictor = segjax.Predictor(loaded)
    assert predictor.protocol.window == ((32, 48), (24, 36))
    for size in ((32, 48), (75, 101), (20, 90), (20, 30)):
        np.testing.assert_array_equal(predictor(scene(1, *size)), model.labels(scene(1, *size)))
    whole = segjax.Predictor(loaded, mode="whole")
    np.testing.assert_array_equal(whole(scene(1, 30, 48)), model.labels(scene(1, 30, 48)))
    with pytest.raises(ValueError, match=r"takes images of 32x48 and smaller ones, not of 33x48; use mode 'slide'"):
        whole(scene(1, 33, 48))
    with pytest.raises(ValueError, match="takes crops of 32x48, not of 32x32; omit crop"):
        segjax.Predictor(loaded, mode="slide", crop=(32, 32))


@pytest.mark.parametrize("inside", [False, True])
def test_the_padding_has_the_mean_colour(inside, tmp_path):
    model, image = Pixels(5, 4, context=True), scene(2, 30, 40)
    path = file_of(
        tmp_path / "a.stablehlo",
        model,
        size=(32, 48),
        inside=inside,
        metadata={"normalisation": IMAGENET | {"inside": inside}},
    )
    padded = np.pad(image.astype(float), ((0, 2), (0, 8), (0, 0)), constant_values=np.nan)
    mean = np.rint(MEAN) if inside else np.array(MEAN)
    expected = model.scores(np.where(np.isnan(padded), mean, padded)).argmax(-1)[:30, :40]
    assert (expected != model.labels(image)).any()
    np.testing.assert_array_equal(segjax.Predictor(path, mode="whole")(image), expected)


def test_files_that_output_labels_take_only_whole_images(tmp_path):
    path = file_of(
        tmp_path / "a.stablehlo",
        Pixels(1, 0),
        size=(32, 48),
        gives="labels",
        metadata={"classes": ["background", "thing"], "threshold": 0.5, "normalisation": IMAGENET},
    )
    predictor = segjax.Predictor(path)
    assert predictor.classes.class_names == ("thing",) and predictor.protocol.mode == "whole"
    np.testing.assert_array_equal(predictor(scene(0, 32, 48)), Pixels(1, 0).labels(scene(0, 32, 48)))
    with pytest.raises(ValueError, match="not of 40x48; export it with dynamic sizes, or for this one"):
        predictor(scene(0, 40, 48))
    with pytest.raises(ValueError, match="gives labels; scores need a file without --with-argmax"):
        predictor.probabilities(scene(0, 32, 48))
    for settings in ({"mode": "slide"}, {"flip": True}, {"scales": (0.5, 1)}, {"base_size": (64, 32)}):
        with pytest.raises(ValueError, match="gives labels, and windows, scales, flips and resized images need scores"):
            segjax.Predictor(path, **settings)
    with pytest.raises(ValueError, match=r"gives labels above a probability of 0\.5; omit threshold"):
        segjax.Predictor(path, threshold=0.7)


def two_inputs(path):
    program = jax_export.export(jax.jit(lambda a, b: a + b))(*[jax.ShapeDtypeStruct((1, 3, 8, 8), "float32")] * 2)
    path.write_bytes(program.serialize())


def numbers(value, dtype):
    return lambda images: jnp.full(value, images.ravel()[0] * 0, dtype)


@pytest.mark.parametrize(
    "make, settings, words",
    [
        (lambda path: file_of(path, Pixels()), {}, "does not say how its images are normalised. Give --mean and --std"),
        (lambda path: file_of(path, Pixels()), {"mean": [1, 2, 3]}, "mean and std belong together"),
        (lambda path: file_of(path, Pixels()), {"mean": [0], "std": [1]}, "--mean and --std with a number for each"),
        (lambda path: file_of(path, Pixels()), {"mean": [0] * 3, "std": [0] * 3}, "normalisation that was given: std"),
        (
            lambda path: file_of(path, Pixels(), inside=True, gives="labels"),
            {},
            "gives labels, and does not say of how many classes. Give --reference CHECKPOINT, from which it was made, "
            'or write their names to a.stablehlo.json: {"classes": ["road", ...]}',
        ),
        (
            lambda path: file_of(path, Pixels(), metadata={"classes": ["a", "b"], "normalisation": IMAGENET}),
            {},
            "its metadata name 2 classes, and its output has 5",
        ),
        (
            lambda path: file_of(path, Pixels(), metadata={"normalisation": {"mean": [1.0] * 3, "std": [1.0] * 2}}),
            {},
            "a.stablehlo.json: normalisation: mean has 3 numbers and std 2",
        ),
        (
            lambda path: file_of(path, Pixels(), metadata={"classes": "abc"}),
            {},
            "a.stablehlo.json: classes should be a valid list",
        ),
        (lambda path: path.write_bytes(b"no program"), {}, "cannot read it as StableHLO"),
        (lambda path: None, {}, "there is no such file"),
        (lambda path: path.mkdir(), {}, "a folder, not a file"),
        (two_inputs, {}, "takes 2 inputs, and images are one"),
        (lambda path: write(path, jnp.sin, (3, 8)), {"mean": MEAN, "std": STD}, "(3, 8), which is no batch of images"),
        (
            lambda path: write(path, numbers((1, 10), "float32"), (1, 3, 8, 12)),
            {"mean": MEAN, "std": STD},
            "gives float32 (1, 10) for images of 8x12: neither scores",
        ),
        (
            lambda path: write(path, numbers((1, 7, 7, 512), "float32"), (1, 3, 64, 120)),
            {"mean": MEAN, "std": STD},
            "gives (1, 7, 7, 512) for images of 64x120: no map of scores",
        ),
        (
            lambda path: write(path, lambda images: (images, images), (1, 3, 8, 12)),
            {"mean": MEAN, "std": STD},
            "gives 2 outputs (output 0 (1, 3, 8, 12), output 1 (1, 3, 8, 12)); export one, or one called `logits`",
        ),
    ],
)  # fmt: skip
def test_unknown_properties_are_refused_with_the_option_that_sets_them(make, settings, words, tmp_path):
    path = tmp_path / "a.stablehlo"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        open_exported(path, **settings)
    assert words in str(caught.value) and str(caught.value).startswith((str(path), "the normalisation"))


@pytest.mark.parametrize(
    "suffix, module, words",
    [
        (".onnx", "onnxruntime", 'to run ONNX needs the package onnxruntime: pip install "segjax[export]"'),
        (".xml", "openvino", 'to run OpenVINO needs the package openvino: pip install "segjax[openvino]"'),
        (".pt2", "torch", 'to run torch.export needs the package torch: pip install "segjax[export]"'),
        (".tflite", "ai_edge_litert.interpreter", 'needs the package ai-edge-litert: pip install "segjax[tflite]"'),
    ],
)
def test_a_missing_package_is_named_with_its_extra(suffix, module, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "tflite_runtime", None)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"")
    assert evaluate.main([str(path), "--data", "streets", "--output", str(tmp_path / "report")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_names_and_normalisation_of_transformers_next_to_a_file_are_read(tmp_path):
    model = Pixels(5, 1)
    path = file_of(tmp_path / "model.stablehlo", model, takes="BCHW", last=False)
    names = {str(number): name for number, name in enumerate(SPEC.class_names)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "upernet", "id2label": names}))
    preprocessor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    loaded = segjax.open_exported(path)
    assert loaded.classes.class_names == SPEC.class_names and loaded.dataset
    np.testing.assert_allclose([loaded.mean, loaded.std], [[127.5, 102, 76.5], [51, 76.5, 102]], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("seed", [0, 5])
def test_a_file_has_its_models_figures_and_a_broken_one_differs(seed, tmp_path, caplog):
    model, split = Pixels(5, seed), split_of(seed, 4, (33, 50))
    reference = LoadedCheckpoint(model, SPEC, {})
    metadata = {"classes": list(SPEC.class_names), "dataset": SPEC.name, "normalisation": IMAGENET}
    path = file_of(tmp_path / "a.stablehlo", model, takes="BCHW", last=False, metadata=metadata)
    own = segjax.evaluate_dataset(reference, split)
    with caplog.at_level(logging.INFO, "segjax"):
        found = segjax.evaluate_dataset(path, split, reference=reference, output=tmp_path / "report")
    compared = found.pop("reference")
    assert found == own and "run by   jax " + jax.__version__ in caplog.messages
    assert compared == {
        "source": "pixels",
        "mean_iou": own["mean_iou"],
        "difference": 0.0,
        "per_class_iou": own["per_class_iou"],
        "is_same_protocol": True,
    }
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert written["reference"] == compared and written["checkpoint"] == str(path)
    assert written["model"] == {"name": "a", "num_classes": 5, "run_by": f"jax {jax.__version__}"}
    other = Pixels(5, seed + 1)
    broken = segjax.evaluate_dataset(file_of(tmp_path / "b.stablehlo", other), split, reference=reference)
    difference = segjax.evaluate_dataset(LoadedCheckpoint(other, SPEC, {}), split)["mean_iou"] - own["mean_iou"]
    assert broken["reference"]["difference"] == difference != 0


def test_a_sliding_window_is_used_unless_all_images_fit_as_a_whole(tmp_path):
    model = Pixels(5, 2)
    loaded = open_exported(file_of(tmp_path / "a.stablehlo", model, size=(33, 50), batch=1), mean=MEAN, std=STD)
    for number, (size, mode) in enumerate([((33, 50), "whole"), ((30, 41), "whole"), ((34, 50), "slide")]):
        report = tmp_path / str(number)
        found = segjax.evaluate_dataset(loaded, split_of(1, 3, size), output=report)
        assert found["mean_iou"] == segjax.evaluate_dataset(model, split_of(1, 3, size))["mean_iou"]
        assert json.loads((report / "results.json").read_text())["protocol"]["mode"] == mode
    with pytest.raises(ValueError, match=r"not of 34x50; use mode 'slide', whose window is 33x50"):
        segjax.evaluate_dataset(loaded, split_of(1, 3, (34, 50)), mode="whole")


def test_the_recorded_figure_of_an_export_is_compared(tmp_path):
    split, protocol = split_of(0, 3, (20, 28)), {"mode": "whole", "scales": [1.0], "flip": False}
    metadata = {"normalisation": IMAGENET, "evaluated": {"mean_iou": 0.75, "data": "noise:", "protocol": protocol}}
    path = file_of(tmp_path / "a.stablehlo", Pixels(5), metadata=metadata)
    found = segjax.evaluate_dataset(path, split)
    assert found["reference"]["difference"] == pytest.approx(found["mean_iou"] - 0.75)
    assert found["reference"]["is_same_protocol"]
    assert not segjax.evaluate_dataset(path, split, flip=True)["reference"]["is_same_protocol"]
    runtimes.metadata_path(path).write_text(
        json.dumps(metadata | {"evaluated": metadata["evaluated"] | {"data": "x:"}})
    )
    assert "reference" not in segjax.evaluate_dataset(path, split)


def test_another_number_of_classes_is_refused(tmp_path):
    path = file_of(tmp_path / "a.stablehlo", Pixels(4), metadata={"normalisation": IMAGENET})
    with pytest.raises(ValueError, match="the model has 4 classes, but noise has 5"):
        segjax.evaluate_dataset(path, split_of(0, 2, (20, 28)))
    with pytest.raises(CheckpointError, match="has 4 classes, and its reference has 5"):
        segjax.evaluate_dataset(path, split_of(0, 2, (20, 28)), reference=LoadedCheckpoint(Pixels(5), SPEC, {}))
    own = {"normalisation": IMAGENET, "classes": list(SPEC.class_names[:3])}
    path = file_of(tmp_path / "b.stablehlo", Pixels(5), gives="labels", metadata=own)
    with pytest.raises(
        ValueError, match=r"b\.stablehlo gives labels from \d to 4, and those of its 3 classes are 0 to 2"
    ):
        segjax.Predictor(path)(scene(0, 20, 28))


def test_a_file_with_one_class_takes_a_threshold(tmp_path):
    model, image = Pixels(1, 0), scene(3, 24, 40)
    loaded = open_exported(file_of(tmp_path / "a.stablehlo", model), mean=MEAN, std=STD)
    probabilities = 1 / (1 + np.exp(-model.scores(image)[..., 0]))
    np.testing.assert_array_equal(segjax.Predictor(loaded, threshold=0.7)(image), probabilities > 0.7)
    assert 0 < (probabilities > 0.7).sum() < (probabilities > 0.5).sum()


# ------------------------------------------------------------------------------------------------------------ commands


def call(command, *arguments):
    return command.main([str(argument) for argument in arguments])


def test_an_exported_file_evaluates_and_predicts_like_its_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segjax.exports.export.checked_sizes", lambda form, multiple: [(1, form.size)])
    model = tiny_model(3, num_classes=19)
    orbax_folder.save_model(
        tmp_path / "model", model, metadata={"normalisation": {"mean": [90.0] * 3, "std": [50.0] * 3}}
    )
    assert call(export, "model", "a.stablehlo", "--format", "stablehlo", "--size", 64, 96, "--dynamic") == 0
    data = ("--data", "streets:test", "--output", "report")
    monkeypatch.setattr("segjax.inference.evaluate_dataset._opened", lambda *_, **__: streets_split())
    assert call(evaluate, "a.stablehlo", *data, "--reference", "model") == 0
    printed = " ".join(capsys.readouterr().out.split())
    figure = json.loads((tmp_path / "report" / "results.json").read_text())["mean_iou"]
    assert f"mIoU {figure:.4f} of model, {figure:.4f} here: +0.0000" in printed
    image = scene(0, 70, 90)
    cv2.imwrite("image.png", image)
    for source, output in (("a.stablehlo", "of_file"), ("model", "of_model")):
        assert call(predict, source, "image.png", "--output", output, "--write", "labels") == 0
    assert "a.stablehlo: segformer_b0, run by jax" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "of_file/labels/image.png").read_bytes() == (tmp_path / "of_model/labels/image.png").read_bytes()
    assert call(evaluate, "a.stablehlo") == 2
    words = "is an exported file, which has no data; name the data: --data NAME, or --reference RUN to take its"
    assert words in " ".join(capsys.readouterr().err.split())


def streets_split():
    (split,) = segjax.data.open_splits("streets", ["test"], num_images=[2], size=(64, 96), seed=0)
    return split


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        (evaluate, ["a.pth", "--data", "streets", "--mean", "1"], "--mean and --std are for exported files"),
        (evaluate, ["a.onnx", "--data", "streets", "--mean", "1"], "--mean and --std belong together; give both"),
        (evaluate, ["a.onnx", "--data", "streets", "--weights", "ema"], "an exported file holds one set of weights"),
        (predict, ["a.pth", "x.png", "--output", "out", "--reference", "b"], "--reference is for exported files"),
    ],
)
def test_options_that_do_not_apply_are_refused(command, arguments, words, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert words in " ".join(capsys.readouterr().err.split())
