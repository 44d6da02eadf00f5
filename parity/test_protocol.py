"""Evaluation of whole images, windows, scales and mirror images: ours against mmsegmentation's way, in PyTorch."""

import dataclasses

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity import compare, protocol
from parity.subjects import NUM_CLASSES, SUBJECTS
from segjax.data import specs
from segjax.inference.engine import Inference, Protocol, scaled
from segjax.inference.evaluation import evaluate
from segjax.torch_reference import verify

# Every size of input is a program to compile: windows are alike wherever they can be, and 1.25 times this size is the
# size that a divisor of 32 makes of it.
SIZE = (51, 77)
SLIDE = dict(mode="slide", crop=(32, 48), stride=(20, 37))
PROTOCOLS = {
    "whole": dict(),
    "slide": SLIDE,
    "slide, windows side by side": dict(mode="slide", crop=(32, 48), stride=(32, 48)),
    "slide, windows higher than the image": dict(mode="slide", crop=(80, 48), stride=(50, 40)),
    "scales": dict(scales=(1.0, 1.25)),
    "flip": dict(flip=True),
    "size divisor": dict(size_divisor=32),
    "slide at scales, mirrored and on multiples": SLIDE | dict(scales=(0.75, 1.5), flip=True, size_divisor=32),
}
# As small as the families come.
SIZES = {
    "segformer": dict(dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), decoder_dim=24),
    "hrnet": dict(width=4, stage1_channels=4, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1)),
    "simple": dict(dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), mlp_ratios=(2, 3, 4, 5), decoder_dim=24),
}


def in_float64(images):
    return (images.astype(jnp.float64) - jnp.array(specs.IMAGENET_MEAN)) / jnp.array(specs.IMAGENET_STD)


def make_split(seed, num_classes):
    """Two images with large shapes and fine noise, and labels of every value and the ignored one."""
    rng = np.random.default_rng(seed)
    coarse = [cv2.resize(rng.uniform(0, 255, (4, 6, 3)), SIZE[::-1], interpolation=cv2.INTER_CUBIC) for _ in "ab"]
    images = (coarse + rng.normal(0, 25, (2, *SIZE, 3))).clip(0, 255).astype(np.uint8)
    labels = rng.choice([*range(max(num_classes, 2)), 255], (2, *SIZE)).astype(np.uint8)
    return specs.Split(images, labels, np.tile(np.int32(SIZE), (2, 1)), ("a", "b"))


def their_arguments(given, multiple):
    given = dict(given)
    if given.pop("mode", "whole") == "whole":
        given = {name: value for name, value in given.items() if name not in ("crop", "stride")}
    return {"divisor": given.pop("size_divisor", 1), "multiple": multiple} | given


def assert_protocols_equal(family, num_classes, names, seed, within):
    model, network = compare.randomised_pair(
        SUBJECTS[family].name, num_classes=num_classes, seed=seed, dtype="float64", **SIZES[family]
    )
    split = make_split(seed, num_classes)
    spec = specs.DatasetSpec("noise", tuple(map(str, range(num_classes))), ((0, 0, 0),) * num_classes, 255)
    inference = Inference(model, batch=2, normalise=in_float64)
    for name in names:
        inference.protocol = Protocol(**PROTOCOLS[name])
        arguments = their_arguments(PROTOCOLS[name], model.size_multiple)
        expected = torch.stack([protocol.merge(network, image, **arguments) for image in split.images])
        ours = inference.probabilities(split.images)
        assert ours.dtype == np.float64
        within("output", "float64", verify.relative_error(ours, verify.to_nhwc(expected)), f"protocol, {name}")
        predicted = torch.stack([protocol.labels(probabilities) for probabilities in expected])
        truth = torch.from_numpy(split.labels).long()
        counts = protocol.confusion_matrix(truth, predicted, max(num_classes, 2), 255).numpy()
        # A model that says the same everywhere would prove nothing.
        assert np.count_nonzero(counts.sum(axis=0) > 20) >= 2, name
        confusion, _ = evaluate(inference.labels, split, spec, batch_size=2)
        np.testing.assert_array_equal(confusion, counts, err_msg=name)


def test_every_protocol_gives_the_probabilities_and_the_confusion_of_pytorch(float64, within):
    assert_protocols_equal("segformer", NUM_CLASSES, PROTOCOLS, 0, within)


@pytest.mark.parametrize("family", ["hrnet", pytest.param("simple", marks=pytest.mark.slow)])
def test_protocols_suit_every_kind_of_model(family, float64, within):
    names = ("whole", "slide at scales, mirrored and on multiples")
    assert_protocols_equal(family, NUM_CLASSES, names, 0, within)


def test_a_model_of_one_class_is_averaged_and_cut_at_one_half(float64, within):
    assert_protocols_equal("segformer", 1, ("slide", "flip"), 2, within)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inputs_are_resized_to_the_same_pixels(seed):
    rng = np.random.default_rng(seed)
    other_shapes = 0
    for _ in range(60):
        height, width = rng.integers(8, 400, 2).tolist()
        scale, divisor = rng.choice([0.5, 0.75, 1.0, 1.1, 1.25, 1.5, 1.75]), rng.choice([1, 1, 16, 32])
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = protocol.to_multiple(protocol.rescale(image, scale), int(divisor))
        np.testing.assert_array_equal(scaled(image, float(scale), int(divisor)), expected)
        rounded = tuple(int(side * scale + 0.5) for side in (height, width))
        other_shapes += divisor == 1 and expected.shape[:2] != rounded
    # Keeping the proportions is not the same as rounding each side.
    assert other_shapes > 0


def test_a_protocol_has_no_setting_that_is_not_compared():
    compared = {name for given in PROTOCOLS.values() for name in given}
    assert compared == {field.name for field in dataclasses.fields(Protocol)}
