"""An interrupted evaluation keeps its counts, and the next one with the same arguments continues from them."""

import dataclasses
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from segjax.inference import evaluate_dataset, evaluation, unfinished
from tests.inference.test_evaluate_dataset import split_of
from tests.pixels import Pixels


class StopError(Exception):
    pass


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(unfinished.Unfinished, "SECONDS", 0.0)


def stopped_after(number, monkeypatch, model, opened, **settings):
    """An evaluation that an error ends after some images."""
    original, count = evaluation.metrics.boundary_counts, []

    def counted(*arguments, **settings):
        count.append(1)
        if len(count) > number:
            raise StopError
        return original(*arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(evaluation.metrics, "boundary_counts", counted)
        evaluate_dataset.evaluate_dataset(model, opened, **settings)


def results(folder):
    content = json.loads((folder / "results.json").read_text())
    del content["duration_s"]
    return content


@pytest.mark.parametrize("seed, settings", [(0, {}), (1, {"mode": "slide", "crop": (24, 32), "flip": True})])
def test_a_stopped_evaluation_continues_where_it_stopped(seed, settings, tmp_path, monkeypatch, caplog, at_once):
    model, opened = Pixels(5, seed), split_of(seed, 6, (33, 50))
    expected = evaluate_dataset.evaluate_dataset(model, opened, output=tmp_path / "whole", **settings)
    stopped_after(3, monkeypatch, model, opened, output=tmp_path / "a", **settings)
    stopped_after(2, monkeypatch, model, opened, output=tmp_path / "a", **settings)
    assert not (tmp_path / "a" / "results.json").exists()
    with caplog.at_level(logging.INFO, "segjax"):
        found = evaluate_dataset.evaluate_dataset(model, opened, output=tmp_path / "a", **settings)
    assert "5 of 6 images were evaluated before" in [record.getMessage() for record in caplog.records]
    assert found == expected and results(tmp_path / "a") == results(tmp_path / "whole")
    assert not (tmp_path / "a" / unfinished.FOLDER).exists()


OTHERS = ["model", "data", "protocol", "damaged", "temperature", "align_corners", "dtype", "ignore_label"]


@pytest.mark.parametrize("other", OTHERS)
def test_counts_of_another_evaluation_are_not_used(other, tmp_path, monkeypatch, caplog, at_once):
    model, opened, settings = Pixels(5, 2), split_of(4, 4, (33, 50)), {}
    if other == "ignore_label":
        opened.data.labels[opened.data.labels == opened.spec.ignore_label] = 0
    stopped_after(3, monkeypatch, model, opened, output=tmp_path)
    (kept,) = (tmp_path / unfinished.FOLDER).iterdir()
    if other == "model":
        model = Pixels(5, 3)
    elif other == "data":
        opened = split_of(5, 4, (33, 50))
    elif other == "protocol":
        settings = {"scales": (0.5,)}
    elif other == "temperature":
        settings = {"temperature": 2.0}
    elif other == "align_corners":
        model.align_corners = True
    elif other == "dtype":
        model.dtype = jnp.dtype(jnp.bfloat16)
    elif other == "ignore_label":
        opened = opened._replace(spec=dataclasses.replace(opened.spec, ignore_label=7))
    else:
        kept.write_bytes(kept.read_bytes()[:-300])
    expected = evaluate_dataset.evaluate_dataset(model, opened, **settings)
    with caplog.at_level(logging.INFO, "segjax"):
        found = evaluate_dataset.evaluate_dataset(model, opened, output=tmp_path, **settings)
    assert not any("evaluated before" in record.getMessage() for record in caplog.records)
    assert found == expected and not kept.exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_counts_of_several_processes_are_collected_once(seed, tmp_path):
    rng = np.random.default_rng(seed)

    def counts(numbers):
        made = unfinished.Counts.of_nothing(3)
        for number in numbers:
            made.confusion += number
            made.pixels[number] += 1
            made.by_image[number] = rng.integers(0, 9, (3, 3)).astype(np.int32)
            made.sums[number] = rng.standard_normal(3)
            made.keep_worst(float(rng.random()), number, rng.integers(0, 3, (2, 3)).astype(np.uint8), shown=2)
        return made

    parts = [counts(numbers) for numbers in ([1, 4], [2], [0, 3, 5])]
    own = unfinished.Unfinished(tmp_path, {"a": 1})
    for number, part in enumerate(parts):
        np.savez(tmp_path / f"{number}.npz", **unfinished._arrays(part))
        own._own.parent.mkdir(exist_ok=True)
        (tmp_path / f"{number}.npz").rename(own._own.with_name(f"{own._name}-{number}.npz"))
    leftover = own._own.with_name(f"{own._name}-2.npz").read_bytes()
    found = own.collected(shown=2)
    assert [path.name for path in own._own.parent.iterdir()] == [own._own.name]
    # Killed before the others were removed.
    own._own.with_name(f"{own._name}-2.npz").write_bytes(leftover)
    for each in (found, own.collected(shown=2)):
        assert each.confusion.tolist() == [[15] * 3] * 3 and each.pixels[:7].tolist() == [1] * 6 + [0]
        assert sorted(each.by_image) == sorted(each.sums) == list(range(6))
        worst = sorted(pair for part in parts for pair in part.worst)[:2]
        assert each.worst == worst and sorted(each.predicted) == sorted(number for _, number in worst)
        for part in parts:
            for number, sums in part.sums.items():
                np.testing.assert_array_equal(each.sums[number], sums)
                np.testing.assert_array_equal(each.by_image[number], part.by_image[number])
    assert unfinished.Unfinished(tmp_path, {"a": 2}).collected(shown=2) is None
