"""Batches have every image once per epoch, in an order that depends only on (seed, step); so does an evaluation."""

from collections import Counter

import jax
import numpy as np
import pytest

from segjax.data import specs
from segjax.data.pipeline import TrainBatches, evaluation_batches
from segjax.runtime.parallel import parallel_for


def make_split(number, *, canvas=(6, 9), sizes=None, seed=0):
    """Images of noise, zeros outside `sizes`."""
    rng = np.random.default_rng(seed)
    sizes = np.array(sizes or [canvas] * number, np.int32)
    images = rng.integers(1, 256, (number, *canvas, 3), dtype=np.uint8)
    labels = rng.integers(0, 19, (number, *canvas), dtype=np.uint8)
    for image, label, (height, width) in zip(images, labels, sizes, strict=True):
        image[height:], image[:, width:] = 0, 0
        label[height:], label[:, width:] = 255, 255
    return specs.Split(images, labels, sizes, tuple(f"image{i}" for i in range(number)))


def batches_of(number, batch_size, *, seed=0, kind="jit", devices=1):
    parallel = parallel_for(kind, jax.devices()[:devices])
    return TrainBatches(make_split(number), batch_size=batch_size, seed=seed, parallel=parallel)


def row_of(batches, steps):
    return np.concatenate([batches.indices(step) for step in range(steps)])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("number, batch_size", [(12, 4), (7, 3), (5, 4), (10, 7), (3, 8)])
def test_every_epoch_is_a_permutation_for_any_batch_size(number, batch_size, seed):
    epochs = 6
    steps = -(-epochs * number // batch_size)
    batches = batches_of(number, batch_size, seed=seed)
    orders = row_of(batches, steps)[: epochs * number].reshape(epochs, number)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(number), (epochs, 1)))
    assert batches.indices(0).shape == (batch_size,)
    assert len({tuple(order) for order in orders}) > 1  # six orders of three images may repeat, but not all


@pytest.mark.parametrize("number", [20, 33])
def test_the_order_differs_between_epochs_and_seeds(number):
    rows = [row_of(batches_of(number, number, seed=seed), 3) for seed in (0, 1, 2)]
    orders = {tuple(order) for row in rows for order in row.reshape(3, number)}
    assert len(orders) == 9
    assert tuple(range(number)) not in orders


def test_the_indices_depend_only_on_seed_and_step():
    forwards, backwards = batches_of(11, 4, seed=5), batches_of(11, 4, seed=5)
    steps = range(40)
    ahead = [forwards.indices(step) for step in steps]
    back = [backwards.indices(step) for step in reversed(steps)][::-1]
    np.testing.assert_array_equal(ahead, back)
    np.testing.assert_array_equal(forwards.indices(17), ahead[17])
    # Far on, as a resumed run asks first.
    far = batches_of(11, 4, seed=5).indices(1_000_003)
    np.testing.assert_array_equal(far, backwards.indices(1_000_003))


def test_the_order_of_images_is_the_same_for_every_batch_size():
    by_two, by_five = row_of(batches_of(7, 2, seed=3), 35), row_of(batches_of(7, 5, seed=3), 14)
    np.testing.assert_array_equal(by_two, by_five)


@pytest.mark.parametrize("kind, devices", [("jit", 1), ("jit", 4), ("pmap", 4)])
def test_a_batch_holds_the_images_labels_and_sizes_of_its_indices(kind, devices):
    split = make_split(7, sizes=[(6, 9), (4, 9), (6, 5), (3, 3), (6, 9), (5, 8), (6, 7)])
    batches = TrainBatches(split, batch_size=8, seed=1, parallel=parallel_for(kind, jax.devices()[:devices]))
    for step in (0, 1, 4):
        batch, rows = batches.at(step), batches.indices(step)
        assert {name: array.dtype for name, array in batch.items()} == {
            "image": np.uint8,
            "label": np.uint8,
            "size": np.int32,
            "position": np.int32,
        }
        # Every device holds its own part of the batch and nothing else.
        assert all(len(array.addressable_shards) == devices for array in batch.values())
        lead = (8,) if kind == "jit" else (devices, 8 // devices)
        assert all(array.shape[: len(lead)] == lead for array in batch.values())
        flat = {name: np.asarray(array).reshape(8, *array.shape[len(lead) :]) for name, array in batch.items()}
        np.testing.assert_array_equal(flat["image"], split.images[rows])
        np.testing.assert_array_equal(flat["label"], split.labels[rows])
        np.testing.assert_array_equal(flat["size"], split.sizes[rows])
        np.testing.assert_array_equal(flat["position"], np.arange(8))


def test_a_batch_is_divided_among_the_devices_in_order():
    batch = batches_of(9, 8, devices=4).at(0)["position"]
    by_device = {shard.device.id: np.asarray(shard.data).tolist() for shard in batch.addressable_shards}
    assert [by_device[device.id] for device in jax.devices()] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_a_batch_that_does_not_divide_among_the_devices_is_refused(kind):
    with pytest.raises(ValueError, match="a batch of 6 does not divide among 4 devices"):
        batches_of(9, 6, kind=kind, devices=4)


def test_an_unknown_kind_of_parallelism_is_refused():
    with pytest.raises(ValueError, match="'jit' or 'pmap'; got 'vmap'"):
        parallel_for("vmap")


# --------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("number, batch_size", [(8, 4), (7, 4), (3, 5), (1, 1), (5, 1)])
def test_evaluation_reads_every_image_once_and_fills_the_last_batch(number, batch_size):
    split = make_split(number)
    seen = []
    for images, labels, numbers in evaluation_batches(split, batch_size=batch_size):
        images, labels = np.stack(images), np.stack(labels)
        assert images.shape == (batch_size, 6, 9, 3) and labels.shape == (batch_size, 6, 9)
        assert 0 < len(numbers) <= batch_size
        np.testing.assert_array_equal(images[: len(numbers)], split.images[numbers])
        np.testing.assert_array_equal(labels[: len(numbers)], split.labels[numbers])
        # What fills the batch up is an image too, so that nothing is divided by zero.
        assert (images[len(numbers) :] == images[len(numbers) - 1]).all()
        seen += numbers.tolist()
    assert seen == list(range(number))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_evaluation_reads_images_unpadded_and_groups_equal_sizes(batch_size):
    sizes = [(6, 9), (4, 9), (6, 9), (6, 5), (4, 9), (6, 9), (6, 9), (6, 9)]
    split = make_split(8, sizes=sizes)
    seen, shapes = [], Counter()
    for images, labels, numbers in evaluation_batches(split, batch_size=batch_size):
        images, labels = np.stack(images), np.stack(labels)
        shapes[images.shape[1:3]] += 1
        assert images.shape == (batch_size, *labels.shape[1:], 3)
        assert (images > 0).all() and (labels != 255).all()  # not a pixel of the storage's padding
        for image, label, number in zip(images, labels, numbers, strict=False):
            height, width = sizes[number]
            np.testing.assert_array_equal(image, split.images[number, :height, :width])
            np.testing.assert_array_equal(label, split.labels[number, :height, :width])
        seen += numbers.tolist()
    assert sorted(seen) == list(range(8))
    assert shapes == {size: -(-count // batch_size) for size, count in Counter(sizes).items()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_batches_hold_images_of_one_key_and_size(batch_size):
    sizes = [(6, 9), (4, 9), (6, 9), (6, 5), (4, 7), (6, 9), (4, 9), (5, 9)]
    split, seen = make_split(8, sizes=sizes), []
    for images, labels, numbers in evaluation_batches(split, batch_size=batch_size, key=lambda size: size[1] > 5):
        assert len(images) == len(labels) == batch_size
        assert len({size[1] > 5 for size in map(np.shape, labels)}) == 1
        for image, label, number in zip(images, labels, numbers, strict=False):
            assert image.shape == (*sizes[number], 3) and label.shape == sizes[number]
        seen.append(numbers)
    # Two keys of 1 and 7 images; those of one size follow each other.
    assert len(seen) == {1: 8, 3: 4}[batch_size]
    order = np.concatenate(seen).tolist()
    assert sorted(order) == list(range(8))
    in_order = [sizes[number] for number in order if sizes[number] != (6, 5)]
    assert in_order == sorted(in_order)
