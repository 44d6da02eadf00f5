"""Models of one class (one logit): from a folder of masks through training, evaluation, prediction and export."""

import json

import cv2
import jax
import numpy as np
import pytest

import segjax
from segjax.checkpoints.load import load
from segjax.commands import convert, evaluate, export, predict
from segjax.data.codec import decode_mask
from segjax.data.open import OpenSplit
from segjax.data.specs import DatasetSpec, Split
from segjax.inference import runtimes
from segjax.inference.engine import Protocol
from segjax.inference.predictor import Predictor
from segjax.train import loop, schema
from tests.runs import make_config
from tests.tiny import tiny_model

SIZE = (40, 56)


def picture(rng, size=SIZE):
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.each_value_once
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "slide", "crop": (32, 40), "batch": 2}, {"scales": (0.75, 1.25), "flip": True}, {"flip": True}],
)
def test_labels_are_one_where_the_probability_is_above_the_threshold(seed, settings):
    model, image = tiny_model(seed, num_classes=1), picture(np.random.default_rng(seed))
    probabilities = Predictor(model, **settings).probabilities(image)[..., 0]
    for share in (0.1, 0.8):
        threshold = float(np.quantile(probabilities, share))
        labels = Predictor(model, threshold=threshold, **settings)(image)
        # Logits and probabilities may round apart next to the threshold.
        clear = np.abs(probabilities - threshold) > 1e-5
        assert clear.mean() > 0.98
        np.testing.assert_array_equal(labels[clear], (probabilities > threshold)[clear])


def test_a_threshold_is_refused_for_several_classes_or_out_of_range():
    with pytest.raises(ValueError, match="a threshold needs a model of one class, but this one has 5"):
        Predictor(tiny_model(0), threshold=0.3)
    for wrong in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="threshold is a probability between 0 and 1"):
            Protocol(threshold=wrong)
    assert schema.SETTINGS["eval.threshold"].problem(1.0)
    assert "threshold" not in Protocol().record() and Protocol(threshold=0.3).record()["threshold"] == 0.3


@pytest.mark.parametrize("seed", range(2))
def test_figures_are_computed_from_labels_above_the_threshold(seed):
    rng = np.random.default_rng(seed)
    model = tiny_model(seed, num_classes=1)
    images = np.stack([picture(rng) for _ in range(3)])
    truth = rng.choice([0, 1, 255], (3, *SIZE)).astype(np.uint8)
    split = Split(images, truth, np.tile(np.int32(SIZE), (3, 1)), tuple("abc"))
    spec = DatasetSpec("thing", ("thing",), ((255, 0, 0),), 255)
    opened = OpenSplit(split, spec, lambda: np.bincount(truth[truth != 255], minlength=2))
    probabilities = Predictor(model).probabilities_of(list(images))
    for threshold in np.quantile(probabilities, (0.2, 0.7)).tolist():
        found = segjax.evaluate_dataset(model, opened, threshold=threshold)
        labels = np.stack(Predictor(model, threshold=threshold).labels(list(images)))
        counted = truth != 255
        expected = [
            ((labels == k) & (truth == k) & counted).sum() / (((labels == k) | (truth == k)) & counted).sum()
            for k in (0, 1)
        ]
        np.testing.assert_allclose(found["per_class_iou"], expected, rtol=1e-9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a binary model on masks of 0 and 255, and its folder of data."""
    folder = tmp_path_factory.mktemp("binary")
    for split, number in (("train", 4), ("val", 3)):
        for part in ("images", "labels"):
            (folder / "data" / part / split).mkdir(parents=True)
        for n in range(number):
            rng = np.random.default_rng(100 * number + n)
            mask = np.zeros(SIZE, np.uint8)
            top, left = rng.integers(0, 20, 2)
            mask[top : top + 18, left : left + 25] = 255
            image = picture(rng) // 3 + (mask // 2)[..., None]
            cv2.imwrite(str(folder / "data" / "images" / split / f"{n}.png"), image)
            cv2.imwrite(str(folder / "data" / "labels" / split / f"{n}.png"), mask)
    (folder / "data" / "classes.json").write_text(json.dumps({"names": ["thing"]}))
    config = make_config(loss__dice=1.0, eval__threshold=0.4)
    config.data.update(name="folder", source=str(folder / "data"), dir=str(folder / "tfds"), eval_split="val")
    assert loop.train(config, folder / "run") == 0
    return folder


def test_every_command_works_with_a_binary_model(trained, tmp_path, capsys):
    result = json.loads((trained / "run" / "result.json").read_text())
    assert result["classes"] == ["background", "thing"] and len(result["per_class_iou"]) == 2
    assert result["protocol"]["threshold"] == 0.4
    # Evaluated again, and converted, it has the same figures.
    assert evaluate.main(["--workdir", str(trained / "run"), "--output", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "results.json").read_text())
    assert report["mean_iou"] == result["mean_iou"]
    for name in ("m.safetensors", "m"):
        assert convert.main([str(trained / "run"), str(tmp_path / name)]) == 0
        assert load(tmp_path / name).classes.label_names == ("background", "thing")
    image = trained / "data" / "images" / "val" / "0.png"
    arguments = ["--checkpoint", str(tmp_path / "m.safetensors"), str(image), "--threshold", "0.4"]
    assert predict.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    labels = decode_mask((tmp_path / "out" / "labels" / "0.png").read_bytes())
    rgb = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(labels, Predictor(tmp_path / "m", threshold=0.4)(rgb))
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["threshold"] == 0.4
    # Folders of another threshold are not taken up.
    arguments[-1] = "0.6"
    assert predict.main([*arguments, "--output", str(tmp_path / "out"), "--resume"]) == 2
    assert "threshold" in capsys.readouterr().err


def test_labels_of_an_export_use_the_threshold(trained, tmp_path):
    path = tmp_path / "m.stablehlo"
    options = ["--size", "40", "56", "--with-preprocessing", "--with-argmax", "--threshold", "0.7"]
    assert export.main([str(trained / "run"), str(path), "--format", "stablehlo", *options]) == 0
    images = np.stack([picture(np.random.default_rng(3))])
    probabilities = Predictor(trained / "run").probabilities(images[0])[..., 0]
    clear = np.abs(probabilities - 0.7) > 1e-4
    np.testing.assert_array_equal(runtimes.open_stablehlo(path).run(images)[0][clear], (probabilities > 0.7)[clear])
    assert json.loads((tmp_path / "m.stablehlo.json").read_text())["threshold"] == 0.7
    assert (
        export.main(
            [str(trained / "run"), str(path), "--format", "stablehlo", "--size", "40", "56", "--threshold", "0.7"]
        )
        == 2
    )


def test_the_probability_of_a_model_with_one_class_is_its_sigmoid():
    model = tiny_model(4, num_classes=1)
    image = picture(np.random.default_rng(4))
    loaded = Predictor(model)
    logits = loaded._inference._run(loaded._inference._score, [image])
    np.testing.assert_allclose(loaded.probabilities(image), np.asarray(jax.nn.sigmoid(logits))[0], atol=1e-6)
