"""The temperature of a checkpoint: fitted as by scipy, stored with the weights, and used by every command."""

import json

import numpy as np
import pytest
from scipy import optimize

import segjax
from segjax.checkpoints import orbax_folder
from segjax.commands import convert, export, inspect, predict
from segjax.data import specs
from segjax.data.open import OpenSplit
from segjax.inference import evaluate_dataset as evaluation
from segjax.inference import temperature_scaling
from segjax.inference.predictor import Predictor
from segjax.inference.runtimes import open_stablehlo
from tests.pixels import BINARY, SPEC, Pixels, scene
from tests.tiny import tiny_model

SIZE = (40, 56)


def split_of(model, seed, spec=SPEC, *, temperature=2.5):
    """Labels drawn from the model's own probabilities at a temperature, which a fit has to find again."""
    rng = np.random.default_rng(seed)
    images = np.stack([scene(seed + number, *SIZE) for number in range(3)])
    logits = np.stack([logits_of(model, image) for image in images]) / temperature
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    sums = np.cumsum(powers / powers.sum(axis=-1, keepdims=True), axis=-1)
    labels = (rng.random(sums.shape[:-1])[..., None] > sums).sum(axis=-1).clip(0, sums.shape[-1] - 1)
    labels = np.where(rng.random(labels.shape) < 0.1, 255, labels).astype(np.uint8)
    split = specs.Split(images, labels, np.tile(np.int32(SIZE), (3, 1)), tuple("abc"))
    return OpenSplit(split, spec, lambda: np.bincount(labels[labels != 255]))


def logits_of(model, image):
    """float64 (H, W, K) up to a constant, of two classes for one."""
    probabilities = Predictor(model).probabilities(image).astype(np.float64)
    if probabilities.shape[-1] == 1:
        probabilities = np.concatenate([1 - probabilities, probabilities], axis=-1)
    return np.log(np.maximum(probabilities, 1e-30))


def best_of(model, opened):
    """The temperature with the lowest NLL, by scipy."""
    images, labels = opened.data.images, opened.data.labels
    logits = np.stack([logits_of(model, image) for image in images])[labels != 255]
    truth = labels[labels != 255]

    def nll(temperature):
        scaled = logits / temperature
        scaled -= scaled.max(axis=-1, keepdims=True)
        return (np.log(np.exp(scaled).sum(axis=-1)) - scaled[np.arange(len(truth)), truth]).mean()

    found = optimize.minimize_scalar(nll, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-6})
    return found.x, found.fun, nll(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted folder, with classes of its own."""
    place = tmp_path_factory.mktemp("models")
    for classes in (5, 1):
        orbax_folder.save_model(place / str(classes), tiny_model(classes, num_classes=classes), metadata={})
    return place


@pytest.mark.parametrize("settings", [{}, {"mode": "slide", "crop": (24, 32)}, {"base_size": (56, 40), "batch": 2}])
@pytest.mark.parametrize("classes, temperature", [(5, 2.5), (1, 0.4)])
def test_the_fitted_temperature_equals_scipys(classes, temperature, settings, monkeypatch, tmp_path):
    model, spec = Pixels(classes, 3), SPEC if classes == 5 else BINARY
    opened = split_of(model, classes, spec, temperature=temperature)
    # A model of pixels is in no file.
    monkeypatch.setattr("segjax.checkpoints.temperature.place_for", lambda _: tmp_path / "temperature.json")
    found = segjax.evaluate_dataset(model, opened, fit_temperature=True, **settings)
    best, nll, before = best_of(model, opened)
    assert found["temperature"]["value"] == pytest.approx(best, rel=1e-3)
    assert found["temperature"]["nll"] == pytest.approx(nll, abs=1e-5)
    assert found["temperature"]["nll_before"] == pytest.approx(before, abs=1e-5)
    assert found["calibration"]["nll"] == pytest.approx(before, abs=1e-5)
    again = segjax.evaluate_dataset(model, opened, temperature=found["temperature"]["value"], **settings)
    assert again["calibration"]["nll"] == pytest.approx(nll, abs=1e-5)
    assert again["calibration"]["ece"] < found["calibration"]["ece"]
    # At one scale labels stay the same.
    assert again["per_class_iou"] == found["per_class_iou"]


def test_a_fitted_temperature_is_stored_with_its_weights(folder, tmp_path, caplog):
    model = segjax.load(folder / "5").model
    orbax_folder.save_model(tmp_path / "m", model, metadata={})
    with pytest.raises(ValueError, match="no temperature was fitted for the weights of"):
        Predictor(tmp_path / "m", temperature="fitted")
    opened = split_of(model, 1)
    found = segjax.evaluate_dataset(tmp_path / "m", opened, fit_temperature=True)["temperature"]
    kept = json.loads((tmp_path / "m" / "temperature.json").read_text())
    assert kept["temperature"] == found == segjax.load(tmp_path / "m").metadata["temperature"]
    assert Predictor(tmp_path / "m", temperature="fitted").protocol.temperature == found["value"]
    used = segjax.evaluate_dataset(tmp_path / "m", opened, temperature="fitted")
    assert used["calibration"]["nll"] == pytest.approx(found["nll"], abs=1e-5)
    # Conversions carry it, and have it in the file itself.
    for name in ("c.safetensors", "c"):
        assert convert.main([str(tmp_path / "m"), str(tmp_path / name)]) == 0
        assert segjax.load(tmp_path / name).metadata["temperature"] == found
    segjax.save(segjax.load(tmp_path / "c.safetensors"), tmp_path / "d.safetensors")
    assert segjax.load(tmp_path / "d.safetensors").metadata["temperature"] == found
    # Next to a file.
    segjax.evaluate_dataset(tmp_path / "d.safetensors", opened, fit_temperature=True)
    assert (tmp_path / "d.safetensors.temperature.json").is_file()
    # Other weights at that place.
    (tmp_path / "other").mkdir()
    orbax_folder.save_model(tmp_path / "o", tiny_model(9), metadata={})
    (tmp_path / "o" / "temperature.json").write_text((tmp_path / "m" / "temperature.json").read_text())
    caplog.set_level("INFO", "segjax")
    assert "temperature" not in segjax.load(tmp_path / "o").metadata
    assert any("is not used: it was fitted for other weights" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": {"value": 0}}, "temperature.value"),
        ({"temperature": None}, "temperature"),
        ({"weights_sha256": 3}, "weights_sha256"),
        ({"format_version": 99}, "format version 99"),
        (None, "not JSON"),
    ],
)
def test_a_damaged_temperature_file_is_refused_with_advice(change, words, folder, tmp_path):
    orbax_folder.save_model(tmp_path / "m", segjax.load(folder / "5").model, metadata={})
    content = {"weights_sha256": "0", "temperature": {"value": 1.5}, "format_version": 1} | (change or {})
    (tmp_path / "m" / "temperature.json").write_text("{" if change is None else json.dumps(content))
    with pytest.raises(segjax.checkpoints.checkpoint.CheckpointError, match=words) as caught:
        segjax.load(tmp_path / "m")
    assert "temperature.json" in str(caught.value)


def test_impossible_fits_are_refused_before_anything_is_computed(folder, monkeypatch):
    opened = split_of(Pixels(5), 0)
    monkeypatch.setattr(evaluation, "measure", None)
    for source in (Pixels(5), "segformer_b2.cityscapes", "hf:somebody/something"):
        with pytest.raises(ValueError, match="no file or folder of this machine"):
            segjax.evaluate_dataset(source, opened, fit_temperature=True)
    for settings in ({"flip": True}, {"scales": (1.0, 1.5)}):
        with pytest.raises(ValueError, match="a temperature is fitted at one scale"):
            segjax.evaluate_dataset(folder / "5", opened, fit_temperature=True, **settings)
    with pytest.raises(ValueError, match="either fitted or given"):
        segjax.evaluate_dataset(folder / "5", opened, fit_temperature=True, temperature=2.0)
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a temperature is a positive number"):
            segjax.evaluate_dataset(folder / "5", opened, temperature=wrong)
    with pytest.raises(ValueError, match="positive number or 'fitted', not 'fited'"):
        Predictor(folder / "5", temperature="fited")


def test_fits_without_a_minimum_or_without_pixels_are_handled():
    grid = np.array(temperature_scaling.GRID)
    assert temperature_scaling.fit(grid, 1) == (1 / 16, 1 / 16, 1.0, False)
    assert temperature_scaling.fit(1 / grid, 2)[0::3] == (16.0, False)
    for minimum in (0.07, 0.9, 1.0, 3.3, 13.0):
        found = temperature_scaling.fit(7 * (np.log(grid / minimum) ** 2 + 1), 7)
        assert found.temperature == pytest.approx(minimum, rel=1e-6) and found.nll == pytest.approx(1)
    with pytest.raises(ValueError, match="no labelled pixel"):
        temperature_scaling.fit(np.zeros(33), 0)
    with pytest.raises(ValueError, match="not finite"):
        temperature_scaling.fit(np.full(33, np.nan), 5)


@pytest.mark.parametrize("settings", [{}, {"scales": (0.75, 1.25), "flip": True}])
def test_probabilities_follow_from_divided_logits(settings, folder):
    image = scene(3, *SIZE)
    plain, other = (Predictor(Pixels(5, 4), temperature=t, **settings) for t in (None, 3.0))
    if not settings:
        logits = np.log(plain.probabilities(image).astype(np.float64)) / 3
        expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(other.probabilities(image), expected, atol=1e-5)
        np.testing.assert_array_equal(other(image), plain(image))
    assert other.probabilities(image).max() < plain.probabilities(image).max()
    assert other.protocol.record()["temperature"] == 3.0 and "temperature" not in plain.protocol.record()


def test_an_export_divides_its_logits(folder, tmp_path, capsys):
    arguments = [str(folder / "5"), "--format", "stablehlo", "--size", "64", "96"]
    images = np.random.default_rng(0).standard_normal((1, 64, 96, 3)).astype(np.float32)
    for name, more in (("a", []), ("b", ["--temperature", "2.5"])):
        assert export.main([arguments[0], str(tmp_path / f"{name}.stablehlo"), *arguments[1:], *more]) == 0
    plain, divided = (open_stablehlo(tmp_path / f"{name}.stablehlo").run(images) for name in "ab")
    np.testing.assert_allclose(divided, plain / 2.5, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "b.stablehlo.json").read_text())["temperature"] == 2.5
    assert "temperature" not in json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert export.main([arguments[0], str(tmp_path / "c.stablehlo"), *arguments[1:], "--temperature", "fitted"]) == 2
    assert "no temperature was fitted for the weights" in " ".join(capsys.readouterr().err.split())


def test_the_temperature_option_takes_a_positive_number(folder, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(scene(0, *SIZE)).save(tmp_path / "x.png")
    given = [str(folder / "5"), str(tmp_path / "x.png"), "--output", str(tmp_path / "out"), "--write", "probabilities"]
    for wrong in ("0", "-1", "nan", "hot"):
        with pytest.raises(SystemExit) as caught:
            predict.main([*given, "--temperature", wrong])
        assert caught.value.code == 2
        assert f"argument --temperature: {wrong}; must be" in " ".join(capsys.readouterr().err.split())
    assert predict.main([*given, "--temperature", "4"]) == 0
    written = np.load(tmp_path / "out" / "probabilities" / "x.npz")["probabilities"]
    expected = Predictor(folder / "5", temperature=4).probabilities(scene(0, *SIZE))
    np.testing.assert_allclose(written, expected, atol=1e-6)
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["temperature"] == 4.0
    capsys.readouterr()
    assert predict.main([*given, "--resume"]) == 2
    assert "other temperature" in " ".join(capsys.readouterr().err.split())


def test_inspect_prints_the_temperature(folder, tmp_path, capsys):
    orbax_folder.save_model(tmp_path / "m", segjax.load(folder / "5").model, metadata={"temperature": {"value": 1.25}})
    assert inspect.main([str(tmp_path / "m")]) == 0
    assert "temperature 1.25" in " ".join(capsys.readouterr().out.split())
