"""Evaluation of whole images, windows, scales and mirror images: ours against mmsegmentation's way, in PyTorch."""

import dataclasses

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity import compare
from parity.reference import protocol as theirs
from parity.subjects import NUM_CLASSES, SUBJECTS
from segjax.data import specs
from segjax.evaluate import evaluate
from segjax.inference import Inference, Protocol, scaled

# Taller, wider and smaller than the windows; none a multiple of anything.
SIZE, SMALL = (67, 106), (41, 59)
SLIDE = dict(mode="slide", crop=(32, 64), stride=(20, 37))
PROTOCOLS = {
    "whole": dict(),
    "slide": SLIDE,
    "slide, windows larger than the image one way": dict(mode="slide", crop=(80, 64), stride=(50, 40)),
    "slide, windows side by side": dict(mode="slide", crop=(32, 64), stride=(32, 64)),
    "scales": dict(scales=(0.75, 1.0, 1.5)),
    "flip": dict(flip=True),
    "size divisor": dict(size_divisor=32),
    "slide at scales, mirrored and on multiples": SLIDE | dict(scales=(0.75, 1.25), flip=True, size_divisor=32),
}


def in_float64(images):
    return (images.astype(jnp.float64) - jnp.array(specs.IMAGENET_MEAN)) / jnp.array(specs.IMAGENET_STD)


def make_split(seed, num_classes):
    """Images with large shapes and fine noise, of two sizes, and labels of every value and the ignored one."""
    rng = np.random.default_rng(seed)
    sizes = np.array([SIZE, SMALL, SIZE], np.int32)
    images = np.zeros((3, *SIZE, 3), np.uint8)
    labels = np.full((3, *SIZE), 255, np.uint8)
    for number, (height, width) in enumerate(sizes):
        coarse = cv2.resize(rng.uniform(0, 255, (4, 6, 3)), (int(width), int(height)), interpolation=cv2.INTER_CUBIC)
        noisy = coarse + rng.normal(0, 25, coarse.shape)
        images[number, :height, :width] = noisy.clip(0, 255)
        values = [*range(max(num_classes, 2)), 255]
        labels[number, :height, :width] = rng.choice(values, (height, width))
    return specs.Split(images, labels, sizes, tuple("abc"))


def their_arguments(given, multiple):
    given = dict(given)
    if given.pop("mode", "whole") == "whole":
        given = {name: value for name, value in given.items() if name not in ("crop", "stride")}
    return {"divisor": given.pop("size_divisor", 1), "multiple": multiple} | given


def assert_protocols_equal(family, num_classes, names, seed, within):
    subject = SUBJECTS[family]
    model, network = compare.randomised_pair(
        subject.name, num_classes=num_classes, seed=seed, dtype="float64", **subject.sizes
    )
    split = make_split(seed, num_classes)
    spec = specs.DatasetSpec("noise", tuple(map(str, range(num_classes))), ((0, 0, 0),) * num_classes, 255)
    inference = Inference(model, batch=3, normalise=in_float64)
    for name in names:
        inference.protocol = Protocol(**PROTOCOLS[name])
        arguments = their_arguments(PROTOCOLS[name], model.size_multiple)
        counts = 0
        for image, truth, (height, width) in zip(*split[:3], strict=True):
            image, truth = image[:height, :width], truth[:height, :width]
            expected = theirs.merge(network, image, **arguments)
            counts += theirs.confusion_matrix(
                torch.from_numpy(truth).long(), theirs.labels(expected), max(num_classes, 2), 255
            ).numpy()
            ours = inference.probabilities(image[None])[0]
            assert ours.dtype == np.float64
            error = compare.relative_error(ours, np.moveaxis(expected.numpy(), 0, -1))
            within("output", "float64", error, f"protocol, {name}")
        # A model that says the same everywhere would prove nothing.
        assert np.count_nonzero(counts.sum(axis=0) > 20) >= 2
        batch_size = 2 if inference.protocol.mode == "whole" else 1
        confusion, _ = evaluate(inference.labels, split, spec, batch_size=batch_size)
        np.testing.assert_array_equal(confusion, counts, err_msg=name)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_protocol_gives_the_probabilities_and_the_confusion_of_pytorch(seed, float64, within):
    assert_protocols_equal("segformer", NUM_CLASSES, PROTOCOLS, seed, within)


@pytest.mark.parametrize("family", ["hrnet", "simple"])
def test_protocols_suit_every_kind_of_model(family, float64, within):
    names = ("whole", "slide", "slide at scales, mirrored and on multiples")
    assert_protocols_equal(family, NUM_CLASSES, names, 2, within)


def test_a_model_of_one_class_is_averaged_and_cut_at_one_half(float64, within):
    names = ("whole", "slide", "flip", "slide at scales, mirrored and on multiples")
    assert_protocols_equal("segformer", 1, names, 3, within)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inputs_are_resized_to_the_same_pixels(seed):
    rng = np.random.default_rng(seed)
    other_shapes = 0
    for _ in range(60):
        height, width = rng.integers(8, 400, 2).tolist()
        scale, divisor = rng.choice([0.5, 0.75, 1.0, 1.1, 1.25, 1.5, 1.75]), rng.choice([1, 1, 16, 32])
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = theirs.to_multiple(theirs.rescale(image, scale), int(divisor))
        np.testing.assert_array_equal(scaled(image, float(scale), int(divisor)), expected)
        rounded = tuple(int(side * scale + 0.5) for side in (height, width))
        other_shapes += divisor == 1 and expected.shape[:2] != rounded
    # Keeping the proportions is not the same as rounding each side.
    assert other_shapes > 0


def test_a_protocol_has_no_setting_that_is_not_compared():
    compared = {name for given in PROTOCOLS.values() for name in given}
    assert compared == {field.name for field in dataclasses.fields(Protocol)}
