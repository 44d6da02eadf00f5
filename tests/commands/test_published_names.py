"""Names of published weights in every command, with narrow weights in the cache; and the published figure next to the
measured one."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
from PIL import Image

import segjax
from segjax import to_torch
from segjax.checkpoints import published
from segjax.commands import convert, evaluate, export, inspect, predict
from segjax.data import specs, streets
from segjax.data.class_lists import CLASS_LISTS
from segjax.data.open import GENERATORS, OpenSplit
from segjax.inference import published_figure
from segjax.inference.engine import Protocol
from tests.checkpoints.test_huggingface import write
from tests.tiny import tiny_model

CITY = "segformer_b0.cityscapes"
ROW = published.table()[CITY]


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Weights by hand, so that nothing is fetched; a sliding window that small images have."""
    monkeypatch.setenv("SEGJAX_CACHE", str(tmp_path / "cache"))
    window = {"mode": "slide", "crop": (32, 64), "stride": (24, 48)}
    rows = published.table() | {CITY: dataclasses.replace(ROW, protocol=window)}
    monkeypatch.setattr(published, "table", lambda: rows)
    model = tiny_model(1, num_classes=19)
    write(tmp_path / "cache" / "weights" / CITY, to_torch(model, dialect="smp"), config={})
    monkeypatch.chdir(tmp_path)
    return model


def test_every_command_accepts_a_published_name(cached, tmp_path, capsys):
    assert inspect.main([CITY]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "19 of cityscapes" in shown and "non-commercial" in shown and f"{CITY} ({ROW.source})" in shown
    assert convert.main([CITY, "b.safetensors"]) == 0
    written = segjax.load("b.safetensors")
    assert written.metadata["licence"] == ROW.licence and written.classes.name == "cityscapes"
    expected = to_torch(cached)
    assert all(np.array_equal(value, expected[key]) for key, value in to_torch(written.model).items())
    assert export.main([CITY, "b.stablehlo", "--format", "stablehlo", "--size", "32", "64"]) == 0
    cv2.imwrite("image.png", np.random.default_rng(0).integers(0, 256, (33, 50, 3), np.uint8))
    assert predict.main([CITY, "image.png", "--output", "out", "--write", "labels"]) == 0
    with Image.open("out/labels/image.png") as file:
        assert np.array_equal(np.asarray(file), segjax.Predictor(cached)("image.png"))


def test_an_encoder_is_refused_by_commands_that_need_a_whole_model(tmp_path, capsys):
    assert predict.main(["hrnet_w18.imagenet", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert evaluate.main(["hrnet_w18.imagenet", "--data", "streets"]) == 2
    errors = capsys.readouterr().err
    assert " ".join(errors.split()).count("an encoder that was trained on ImageNet") == 1


def test_evaluation_uses_the_published_protocol_and_prints_the_figure(cached, tmp_path, monkeypatch, capsys):
    # Scenes in place of Cityscapes, whose images nobody hands out.
    scenes = specs.Scenes(train_images=1, eval_images=6, size=(48, 80))
    drawn = dataclasses.replace(specs.DATASETS["streets"], spec=specs.CITYSCAPES, scenes=scenes)
    monkeypatch.setitem(specs.DATASETS, "cityscapes", drawn)
    monkeypatch.setitem(GENERATORS, "cityscapes", streets.load)
    split = streets.load("val", num_images=6, size=(48, 80), seed=0)
    opened = OpenSplit(split, specs.CITYSCAPES, lambda: None)
    expected = segjax.evaluate_dataset(cached, opened, mode="slide", crop=(32, 64), stride=(24, 48))["mean_iou"]
    assert evaluate.main([CITY, "--data", "cityscapes", "--output", "report"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    text = f"mIoU 0.7620 published ({ROW.figure_source}), {expected:.4f} here: {expected - 0.762:+.4f}"
    assert "sliding window of 32x64 every 24x48" in printed and text in printed
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["mean_iou"] == expected and results["published"]["mean_iou"] == 0.762
    assert text in (tmp_path / "report" / "index.html").read_text()


def figure(name, split="", **settings):
    row = published.table()[name]
    return published_figure.figure_of(row, published_figure.protocol_of(row, settings), split)


def test_each_protocol_is_compared_with_the_right_figure():
    assert figure(CITY) == dict(mean_iou=0.762, source=ROW.figure_source, is_multi_scale=False, is_same_protocol=True)
    assert figure(CITY, "val")["is_same_protocol"] and not figure(CITY, "train")["is_same_protocol"]
    several = figure(CITY, scales=(0.75, 1, 1.25), flip=True)
    assert (several["mean_iou"], several["is_multi_scale"], several["is_same_protocol"]) == (0.781, True, True)
    assert not figure(CITY, scales=(0.75, 1, 1.25))["is_same_protocol"]
    assert not figure(CITY, flip=True)["is_same_protocol"] and not figure(CITY, mode="whole")["is_same_protocol"]
    assert not figure(CITY, scales=(0.5,))["is_same_protocol"]
    assert figure(CITY, temperature=1.7)["is_same_protocol"]
    assert not figure(CITY, scales=(0.75, 1, 1.25), flip=True, temperature=1.7)["is_same_protocol"]
    assert figure("hrnet_w48_ocr.pascal_context_59")["mean_iou"] == 0.562
    assert not figure("hrnet_w48_ocr.pascal_context_59")["is_same_protocol"]
    assert not figure("hrnet_w48.lip")["is_same_protocol"]
    unknown = figure("segformer_b0.cityscapes-768x768")
    assert published_figure.compared(unknown, 0.5) == "no figure is published"
    said = published_figure.compared(figure(CITY, mode="whole"), 0.5)
    assert said.endswith("0.5000 here, with another protocol or split")


def test_explicit_settings_replace_the_published_ones():
    def protocol(name, **settings):
        return published_figure.protocol_of(published.table()[name], settings)

    assert protocol(CITY) == Protocol("slide", (1024, 1024), (768, 768))
    assert protocol(CITY, mode="whole") == Protocol()
    assert protocol(CITY, mode="slide", crop=(64, 96)) == Protocol("slide", (64, 96))
    assert protocol("segformer_b0.ade20k", flip=True) == Protocol(flip=True, size_divisor=32, base_size=(2048, 512))
    assert published_figure.protocol_of(None, {"flip": True}) == Protocol(flip=True)


def test_a_figure_belongs_to_the_dataset_of_its_weights():
    row = published_figure.row_of
    assert row(CITY, "cityscapes:val") is ROW and row(CITY, "streets") is None and row(CITY, "folder") is None
    assert row("hrnet_w18.loveda", "folder:test").name == "hrnet_w18.loveda"
    assert row("hrnet_w18.loveda", "cityscapes") is None and row("nothing", "cityscapes") is None
    assert row(CITY, None) is None
    split = specs.Split(np.zeros((1, 4, 6, 3), np.uint8), np.zeros((1, 4, 6), np.uint8), np.int32([[4, 6]]), ("a",))
    opened = OpenSplit(split, CLASS_LISTS["loveda"], lambda: None)
    assert row("hrnet_w18.loveda", opened).name == "hrnet_w18.loveda" and row(CITY, opened) is None
