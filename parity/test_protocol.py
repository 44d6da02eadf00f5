"""Evaluation of whole images, sliding windows, scales and flips, against mmsegmentation's protocol in PyTorch."""

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
    "base size": dict(base_size=(96, 64)),
}
# Of images of many sizes, whose inputs have few: as on ADE20K, but smaller.
OF_MANY_SIZES = {
    "base size and multiples": dict(base_size=(96, 64), size_divisor=32),
    "base size at scales, mirrored": dict(base_size=(96, 64), size_divisor=32, scales=(0.6, 1.0), flip=True),
    "base size in slide": dict(mode="slide", crop=(32, 48), stride=(20, 37), base_size=(64, 96), size_divisor=32),
}
# As small as the families come.
SIZES = {
    "segformer": dict(dims=(8, 16, 20, 32), depths=(1, 1, 1, 1), decoder_dim=24),
    "hrnet": dict(width=4, stage1_channels=4, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1)),
    "hrnet, corners": dict(
        width=4, stage1_channels=4, stage_modules=(1, 1, 1, 1), stage_blocks=(1, 1, 1, 1), align_corners=True
    ),
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


class ManySizes:
    """Images and labels like those of `make_split`, of sizes from an eighth of the base size to twice that and more."""

    def __init__(self, seed, num_classes):
        rng = np.random.default_rng(seed)
        drawn = np.exp(rng.uniform(np.log(12), np.log(160), (18, 2))).astype(int)
        # Tiny, square, very wide, upright, and as large as the input is.
        self.sizes = np.int32([(12, 12), (9, 16), (96, 96), (40, 240), (240, 90), (64, 96), *drawn])
        assert len(np.unique(self.sizes, axis=0)) >= 20
        self.names = tuple(map(str, range(len(self.sizes))))
        self.pairs = []
        for height, width in self.sizes.tolist():
            coarse = cv2.resize(rng.uniform(0, 255, (4, 6, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
            image = (coarse + rng.normal(0, 25, (height, width, 3))).clip(0, 255).astype(np.uint8)
            label = rng.choice([*range(max(num_classes, 2)), 255], (height, width)).astype(np.uint8)
            self.pairs.append((image, label))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, number):
        return self.pairs[number]


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
        arguments["align_corners"] = SIZES[family].get("align_corners", False)
        expected = torch.stack([protocol.merge(network, image, **arguments) for image in split.images])
        ours = np.stack(inference.probabilities(split.images))
        assert ours.dtype == np.float64
        within("output", "float64", verify.relative_error(ours, verify.to_nhwc(expected)), f"protocol, {name}")
        if arguments["align_corners"]:
            halves = protocol.merge(network, split.images[0], **arguments | {"align_corners": False})
            assert verify.relative_error(ours[:1], verify.to_nhwc(halves[None])) > 1e-3, name
        predicted = torch.stack([protocol.labels(probabilities) for probabilities in expected])
        truth = torch.from_numpy(split.labels).long()
        counts = protocol.confusion_matrix(truth, predicted, max(num_classes, 2), 255).numpy()
        # A model that says the same everywhere would prove nothing.
        assert np.count_nonzero(counts.sum(axis=0) > 20) >= 2, name
        confusion, _ = evaluate(inference.begin, split, spec, batch_size=2)
        np.testing.assert_array_equal(confusion, counts, err_msg=name)


@pytest.mark.each_value_once
@pytest.mark.parametrize("name", OF_MANY_SIZES)
@pytest.mark.parametrize("num_classes, seed", [(NUM_CLASSES, 3), (NUM_CLASSES, 4), (1, 5)])
def test_images_of_many_sizes_give_pytorchs_confusion_matrix(name, num_classes, seed, float64):
    model, network = compare.randomised_pair(
        "segformer_b0", num_classes=num_classes, seed=seed, dtype="float64", **SIZES["segformer"]
    )
    records, given = ManySizes(seed, num_classes), OF_MANY_SIZES[name]
    spec = specs.DatasetSpec("noise", tuple(map(str, range(num_classes))), ((0, 0, 0),) * num_classes, 255)
    arguments, classes = their_arguments(given, model.size_multiple), max(num_classes, 2)
    expected = np.zeros((classes, classes), np.int64)
    for image, label in records.pairs:
        predicted = protocol.labels(protocol.merge(network, image, align_corners=False, **arguments))
        expected += protocol.confusion_matrix(torch.from_numpy(label).long(), predicted, classes, 255).numpy()
    assert np.count_nonzero(expected.sum(axis=0) > 500) >= 2
    ours = Protocol(**given)
    inference = Inference(model, ours, batch=4, normalise=in_float64)
    inputs = {ours.input_sizes(tuple(size)) for size in records.sizes.tolist()}
    assert len(inputs) < len(records) / 2
    batch_size = ours.images_at_a_time(4)
    found, _ = evaluate(inference.begin, records, spec, batch_size=batch_size, key=ours.input_sizes)
    np.testing.assert_array_equal(found, expected)


def test_every_protocol_gives_pytorchs_probabilities_and_confusion_matrix(float64, within):
    assert_protocols_equal("segformer", NUM_CLASSES, PROTOCOLS, 0, within)


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("hrnet", "simple")]


@pytest.mark.parametrize("family", ["hrnet, corners", *SLOW])
def test_protocols_work_with_every_kind_of_model(family, float64, within):
    names = ("whole", "slide at scales, mirrored and on multiples")
    assert_protocols_equal(family, NUM_CLASSES, names, 0, within)


def test_a_model_with_one_class_is_averaged_and_has_a_threshold_of_half(float64, within):
    assert_protocols_equal("segformer", 1, ("slide", "flip"), 2, within)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inputs_are_resized_to_pytorchs_pixels(seed):
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


@pytest.mark.parametrize("base", [(2048, 512), (2048, 640), (512, 2048), (520, 520), (333, 99)])
@pytest.mark.parametrize("seed", [0, 1])
def test_images_are_resized_to_pytorchs_pixels_within_a_base_size(base, seed):
    rng = np.random.default_rng(seed)
    sizes = [(96, 96), (512, 683), (683, 512), (2100, 1500), (600, 2400), (97, 800)]
    sizes += np.exp(rng.uniform(np.log(96), np.log(1500), (6, 2))).astype(int).tolist()
    for size in sizes:
        # 512 * 1.1 is 563.2, and 2048 * 0.875 is 1792: what is cut off differs.
        scale, divisor = float(rng.choice([0.5, 0.75, 0.875, 1.0, 1.1, 1.25])), int(rng.choice([1, 32]))
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        expected = protocol.to_multiple(protocol.rescale_base(image, base, scale), divisor)
        found = scaled(image, scale, divisor, base)
        np.testing.assert_array_equal(found, expected)
        ours = Protocol(base_size=base, scales=(scale,), size_divisor=divisor)
        assert ours.input_sizes(tuple(size)) == (found.shape[:2],)


def test_every_setting_of_a_protocol_is_compared():
    compared = {name for given in PROTOCOLS.values() for name in given}
    # Thresholds and temperatures are compared with NumPy: tests/inference/test_binary.py, test_certainty.py.
    assert compared | {"threshold", "temperature"} == {field.name for field in dataclasses.fields(Protocol)}
