"""`segjax.evaluate_dataset(corruptions=True)` against NumPy, for any batch size and any order of the images."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

import segjax
from segjax.checkpoints.load import as_loaded
from segjax.data import specs
from segjax.data.corruptions import KINDS, CorruptedRecords
from segjax.data.open import OpenSplit
from segjax.data.records import SplitRecords
from segjax.inference import corrupted
from segjax.inference.unfinished import FOLDER
from tests.pixels import BINARY, SPEC, Pixels, scene


def split_of(seed, model, number, size, spec):
    images = np.stack([scene(seed + i, *size) for i in range(number)])
    labels = np.stack([model.labels(image) for image in images])
    labels[:, :3, 5:] = 255
    split = specs.Split(images, labels, np.tile(np.int32(size), (number, 1)), tuple(f"{i}" for i in range(number)))
    return OpenSplit(split, spec, lambda: np.bincount(labels[labels != 255], minlength=5))


@pytest.mark.parametrize("seed, spec", [(0, SPEC), (1, BINARY)])
def test_figures_match_the_corrupted_images(seed, spec, tmp_path):
    model = Pixels(spec.num_classes, seed)
    opened = split_of(seed, model, 3, (24, 37), spec)
    found = segjax.evaluate_dataset(model, opened, corruptions=True, batch=2, output=tmp_path)
    assert found["mean_iou"] == 1 and "corruptions" not in segjax.evaluate_dataset(model, opened)
    summary, every = found["corruptions"], []
    assert list(summary["kinds"]) == list(KINDS)
    for kind, figures in summary["kinds"].items():
        for severity, mean_iou in enumerate(figures["severities"], start=1):
            both, either = np.zeros((2, max(spec.num_classes, 2)))
            for image, truth in map(CorruptedRecords(SplitRecords(opened.data), kind, severity).__getitem__, range(3)):
                predicted, valid = model.labels(image), truth != 255
                for k in range(len(both)):
                    both[k] += ((truth == k) & (predicted == k) & valid).sum()
                    either[k] += (((truth == k) | (predicted == k)) & valid).sum()
            present = either > 0
            assert mean_iou == pytest.approx((both[present] / either[present]).mean(), rel=1e-9)
            every.append(mean_iou)
        assert figures["mean_iou"] == pytest.approx(np.mean(figures["severities"]))
    assert len(every) == 25 and 0 < np.mean(every) < 1
    assert summary["mean_iou"] == summary["relative"] == pytest.approx(np.mean(every))
    assert json.loads((tmp_path / "results.json").read_text())["corruptions"] == summary
    turned = OpenSplit(specs.Split(*(part[::-1] for part in opened.data)), spec, opened.pixel_counts)
    assert segjax.evaluate_dataset(model, turned, corruptions=True, batch=1)["corruptions"] == summary


@pytest.mark.parametrize("ended, damaged", [(8, False), (17, False), (8, True)])
def test_a_stopped_evaluation_keeps_finished_kinds_and_severities(ended, damaged, tmp_path, monkeypatch):
    model = Pixels(SPEC.num_classes, 2)
    opened = split_of(5, model, 3, (24, 37), SPEC)
    expected = segjax.evaluate_dataset(model, opened, corruptions=True, batch=2)
    begun = []

    def counted(records, kind, severity):
        begun.append((kind, severity))
        if len(begun) > ended:
            raise KeyboardInterrupt
        return CorruptedRecords(records, kind, severity)

    monkeypatch.setattr(corrupted.corruptions, "CorruptedRecords", counted)
    with pytest.raises(KeyboardInterrupt):
        segjax.evaluate_dataset(model, opened, corruptions=True, batch=2, output=tmp_path)
    stopped_at, ended = begun.pop(), 99
    begun.clear()
    if damaged:
        (kept,) = (tmp_path / FOLDER).glob("*.json")
        kept.write_text(kept.read_text()[:-1])
    assert segjax.evaluate_dataset(model, opened, corruptions=True, batch=2, output=tmp_path) == expected
    every = list(itertools.product(KINDS, range(1, 6)))
    assert begun == (every if damaged else every[every.index(stopped_at) :])
    assert not (tmp_path / FOLDER).exists()


def test_images_other_than_8_bit_rgb_are_refused(tmp_path):
    images = np.zeros((2, 8, 9, 3), np.uint16)
    split = specs.Split(images, images[..., 0].astype(np.uint8), np.full((2, 2), (8, 9), np.int32), ("a", "b"))
    opened = OpenSplit(split, SPEC, lambda: np.zeros(5, int))
    checkpoint = dataclasses.replace(as_loaded(Pixels(5)), metadata={"image_dtype": "uint16"})
    with pytest.raises(ValueError, match=r"corruptions are those of RGB images of 8 bits, and .* 3 channels of uint16"):
        segjax.evaluate_dataset(checkpoint, opened, corruptions=True, output=tmp_path / "report")
    assert not (tmp_path / "report").exists()
