"""Runs on images with any number of channels, normalised by statistics of the training split, resident or streamed."""

import json

import numpy as np
import pytest

import segjax
from configs import segformer
from segjax.checkpoints import orbax_folder
from segjax.checkpoints.state_dict import named_variables, to_torch
from segjax.data import specs
from segjax.train import loop, setup, unset
from segjax.train.config import RunError, check
from tests.made_bands import folder
from tests.runs import run
from tests.tiny import SIZES, tiny_model


def make_config(tmp_path, **changes):
    """Four steps on the folder in `tmp_path`."""
    config = segformer.get_config("b0,folder")
    config.model.update(SIZES)
    config.data.update(source=str(tmp_path / "given"), dir=str(tmp_path / "data"), eval_split="val")
    config.augment.crop = (32, 48)
    config.train.update(steps=4, batch=4, log_every=2)
    config.eval.update(batch=4, pictures=2, every=2)
    config.checkpoint.every = 2
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def metadata_of(workdir):
    return orbax_folder.load_metadata(workdir)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(1, "uint16"), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((4, "uint8"), (13, "float32")))],
)
def test_a_run_keeps_channels_and_statistics_for_later_commands(tmp_path, channels, dtype):
    made = folder(tmp_path / "given", channels, dtype, suffix=".tif")
    status, printed = run(make_config(tmp_path), tmp_path / "run")
    text = " ".join(printed.split())
    assert status == 0 and f"images of {'1 channel' if channels == 1 else f'{channels} channels'} of {dtype}" in text
    about = metadata_of(tmp_path / "run")
    pixels = np.concatenate([image.reshape(-1, channels) for image in made["train"]]).astype(np.float64)
    np.testing.assert_allclose(about["normalisation"]["mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(about["normalisation"]["std"], pixels.std(axis=0), rtol=1e-9)
    assert about["image_dtype"] == dtype
    assert about["model"]["overrides"].get("in_channels", 3) == channels
    loaded = segjax.load(tmp_path / "run")
    assert loaded.image_kind == specs.ImageKind(channels, dtype)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    again = segjax.evaluate_dataset(tmp_path / "run", output=tmp_path / "report")
    assert {key: again[key] for key in ("mean_iou", "pixel_accuracy")} == {
        key: result[key] for key in ("mean_iou", "pixel_accuracy")
    }
    assert segjax.Predictor(tmp_path / "run")(made["val"][0]).shape == made["val"][0].shape[:2]
    assert sorted(path.suffix for path in (tmp_path / "run" / "predictions").iterdir()) == [".png", ".png"]


@pytest.mark.parametrize(("channels", "dtype"), [(2, "uint16")])
@pytest.mark.slow
def test_streamed_runs_end_with_the_weights_of_resident_ones(tmp_path, channels, dtype):
    folder(tmp_path / "given", channels, dtype)
    for name, changes in (("memory", {}), ("streamed", {"data__resident_gb": 0.0})):
        assert run(make_config(tmp_path, eval__every=0, **changes), tmp_path / name)[0] == 0
    ends = [metadata_of(tmp_path / name)["sha256"] for name in ("memory", "streamed")]
    assert ends[0] == ends[1]


def built(config, workdir):
    """A run that has not begun, and its first state."""
    config, _ = unset.filled(config)
    return setup.build(config, workdir, None)


def test_8_bit_rgb_is_normalised_with_imagenets_statistics_by_default(tmp_path):
    made = folder(tmp_path / "given", 3, "uint8", suffix=".png")
    about = built(make_config(tmp_path), tmp_path / "auto")[0].metadata
    assert about["normalisation"]["mean"] == list(specs.IMAGENET_MEAN) and "image_dtype" not in about
    assert "in_channels" not in about["model"]["overrides"]
    about = built(make_config(tmp_path, data__normalisation="measured"), tmp_path / "measured")[0].metadata
    pixels = np.concatenate([image.reshape(-1, 3) for image in made["train"]]).astype(np.float64)
    np.testing.assert_allclose(about["normalisation"]["mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(about["normalisation"]["std"], pixels.std(axis=0), rtol=1e-9)


def test_a_run_adapts_rgb_weights_and_prints_how(tmp_path, capsys):
    folder(tmp_path / "given", 4, "uint8")
    np.savez(tmp_path / "rgb.npz", **to_torch(tiny_model(3, num_classes=3)))
    run, state = built(make_config(tmp_path, init__checkpoint=str(tmp_path / "rgb.npz")), tmp_path / "run")
    assert "those of red, green and blue in turn, times 3/4" in " ".join(capsys.readouterr().out.split())
    assert run.summary["start"].endswith("all weights; first convolution adapted from 3 channels to 4")
    started = np.asarray(state.params["backbone.patch_embed1.proj.kernel"])
    rgb = named_variables(tiny_model(3, num_classes=3))["backbone.patch_embed1.proj.kernel"][...]
    np.testing.assert_allclose(started[:, :, 3], rgb[:, :, 0] * 0.75, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__in_channels": 3}, "in_channels=3, but the images have 4 channels of uint16"),
        ({"data__normalisation": "imagenet"}, "normalisation=imagenet is for RGB"),
        ({"augment__on_device": "FILE:three"}, "on_device: .*three"),
    ],
)
def test_settings_for_other_kinds_of_images_are_refused(tmp_path, changes, words):
    folder(tmp_path / "given", 4, "uint16")
    (tmp_path / "hooks.py").write_text(
        "def three(key, image, label):\n    red, green, blue = image[..., 0], image[..., 1], image.T[2]\n"
        "    assert image.shape[-1] == 3\n    return image, label\n"
    )
    changes = {
        key: value.replace("FILE", str(tmp_path / "hooks.py")) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    config = make_config(tmp_path)
    if "model__in_channels" in changes:
        config.model.in_channels = changes.pop("model__in_channels")
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    with pytest.raises(RunError, match=words):
        loop.train(config, tmp_path / "run")


def test_a_hook_for_four_channels_is_not_tried_with_three(tmp_path):
    folder(tmp_path / "given", 4, "uint16")
    (tmp_path / "hooks.py").write_text(
        "def four(key, image, label):\n    assert image.shape[-1] == 4\n    return image, label\n"
    )
    config = make_config(tmp_path, augment__on_device=f"{tmp_path / 'hooks.py'}:four")
    check(config, tmp_path / "run")
    built(config, tmp_path / "run")
    streets = segformer.get_config("b0,streets")
    streets.augment.on_device = config.augment.on_device
    with pytest.raises(RunError, match="on_device"):
        check(streets, tmp_path / "other")


def test_measured_statistics_need_prepared_data(tmp_path):
    config = segformer.get_config("b0,streets")
    config.model.update(SIZES)
    config.data.update(train_images=2, eval_images=1, size=(40, 64), normalisation="measured")
    with pytest.raises(RunError, match="normalisation=measured is for"):
        loop.train(config, tmp_path / "run")
