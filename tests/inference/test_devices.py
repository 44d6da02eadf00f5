"""All devices of a process share images and crops, and the results equal those of one device."""

import jax
import numpy as np
import pytest

from segjax.inference import evaluation
from segjax.inference.engine import Inference, Protocol
from segjax.inference.evaluate_dataset import evaluate_dataset
from tests.inference.test_evaluate_dataset import split_of
from tests.pixels import PROGRAMS, Pixels, scene
from tests.tiny import tiny_model

SLIDE = dict(mode="slide", crop=(32, 32), stride=(20, 24))


@pytest.mark.parametrize("seed, settings", [(0, {}), (1, SLIDE), (2, {"flip": True, "scales": (1.0, 1.5)})])
def test_evaluation_on_four_devices_equals_that_on_one(seed, settings):
    model, opened, protocol = tiny_model(seed), split_of(seed, 6, (40, 72)), Protocol(**settings)
    found = evaluate_dataset(model, opened, **settings)
    one = Inference(model, protocol, devices=jax.devices()[:1])

    def counted(images, truths):
        return one.begin_counted(images, truths, ignore_label=255)

    expected = evaluation.measure(one.begin, opened.data, opened.spec, batch_size=1, counted=counted)
    assert len(jax.devices()) == 4
    assert [entry["pixels"] for entry in found["classes"]] == expected.confusion.sum(axis=1).tolist()
    intersection, of_either = np.diag(expected.confusion), expected.confusion.sum(0) + expected.confusion.sum(1)
    assert found["per_class_iou"] == (intersection / (of_either - intersection)).tolist()
    details = expected.details()
    assert {key: found[key] for key in details if key != "calibration"} == {
        key: value for key, value in details.items() if key != "calibration"
    }
    for key, value in details["calibration"].items():
        if key != "reliability":
            assert found["calibration"][key] == pytest.approx(value, rel=1e-6), key


def test_a_row_of_fewer_crops_than_a_batch_is_divided_among_the_devices():
    model, image = Pixels(5, 3, context=True), scene(1, 50, 70)
    own = Inference(model, Protocol(**SLIDE), batch=8)
    # Three crops in a row.
    one = Inference(model, Protocol(**SLIDE), batch=8, devices=jax.devices()[:1])
    PROGRAMS.clear()
    (labels,) = own.labels([image])
    assert {shape[0] for shape in PROGRAMS} == {4}
    PROGRAMS.clear()
    np.testing.assert_array_equal(labels, one.labels([image])[0])
    assert {shape[0] for shape in PROGRAMS} == {3}
