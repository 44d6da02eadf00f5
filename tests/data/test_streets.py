"""The procedural streets are reproducible; every class is large enough to be learned, and labels match the pixels."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from segjax.data import specs, streets

SIZE = (128, 256)
K = specs.STREETS.num_classes
IGNORE = specs.STREETS.ignore_label


@pytest.fixture(scope="module")
def train():
    return streets.load("train", num_images=60, size=SIZE, seed=0)


def digest(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def as_size(label, size):
    """A label map resized to the nearest pixel, sampled at pixel centres."""
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]


def agreement(a, b):
    counted = (a != IGNORE) & (b != IGNORE)
    return (a == b)[counted].mean()


def test_a_split_has_the_requested_images_in_the_documented_dtypes():
    split = streets.load("val", num_images=3, size=(40, 72), seed=1)
    assert split.images.shape == (3, 40, 72, 3) and split.images.dtype == np.uint8
    assert split.labels.shape == (3, 40, 72) and split.labels.dtype == np.uint8
    assert split.sizes.dtype == np.int32 and split.sizes.tolist() == [[40, 72]] * 3
    assert split.names == ("streets_val_000000", "streets_val_000001", "streets_val_000002")


def test_a_scene_is_bitwise_the_same_in_another_process():
    code = """if True:
        import hashlib
        from segjax.data import streets
        for i in (0, 5, 11):
            print(hashlib.sha256(b"".join(a.tobytes() for a in streets.scene(3, i, (65, 97)))).hexdigest())
    """
    there = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split() == [digest(*streets.scene(3, i, (65, 97))) for i in (0, 5, 11)]


def test_a_scene_does_not_depend_on_the_other_scenes():
    few = streets.load("test", num_images=2, size=SIZE, seed=0)
    many = streets.load("test", num_images=5, size=SIZE, seed=0)
    np.testing.assert_array_equal(few.images, many.images[:2])
    np.testing.assert_array_equal(few.labels, many.labels[:2])


def test_different_splits_and_seeds_share_no_scene():
    loads = [streets.load(split, num_images=12, size=(48, 96), seed=0) for split in streets.SPLITS]
    loads.append(streets.load("train", num_images=12, size=(48, 96), seed=1))
    images = [digest(image) for split in loads for image in split.images]
    layouts = [digest(label) for split in loads for label in split.labels]
    assert len(set(images)) == len(set(layouts)) == 48


def test_labels_are_train_ids_and_few_pixels_are_ignored(train):
    assert set(np.unique(train.labels)) == {*range(K), IGNORE}
    ignored = (train.labels == IGNORE).mean((1, 2))
    assert ignored.min() > 0.01 and ignored.max() < 0.06


def test_every_class_covers_enough_pixels_in_a_fifth_of_the_scenes(train):
    shares = np.stack([(train.labels == k).mean((1, 2)) for k in range(K)])  # (K, N)
    often = (shares >= 0.002).mean(1)  # 66 pixels: a pedestrian of 6 × 17, say, less his gaps
    rare = {specs.STREETS.class_names[k]: round(float(often[k]), 2) for k in range(K) if often[k] < 0.2}
    assert not rare


@pytest.mark.parametrize("size, least", [((65, 97), 0.90), ((200, 150), 0.93), ((256, 512), 0.97), ((33, 32), 0.80)])
def test_the_layout_is_the_same_at_every_size(size, least):
    for index in range(4):
        image, label = streets.scene(0, index, size)
        assert image.shape == (*size, 3) and label.shape == size
        usual, other = (as_size(streets.scene(0, i, SIZE)[1], size) for i in (index, index + 4))
        assert agreement(label, usual) > least
        assert agreement(label, other) < 0.7  # unrelated streets share their sky and road


def test_the_image_changes_where_the_label_does(train):
    step = np.abs(np.diff(train.images.astype(int), axis=2)).sum(3)[:, :, 8:-8]
    edge = (np.diff(train.labels.astype(int), axis=2) != 0)[:, :, 8:-8]
    here = step[edge].mean()
    for shift in (-3, 3):
        assert here > 2 * np.roll(step, shift, 2)[edge].mean()


def test_the_label_does_not_follow_from_the_colour_only(train):
    colors = train.images.reshape(-1, 3).astype(np.float32)
    label = train.labels.reshape(-1)
    half = len(label) // 2
    means = np.stack([colors[:half][label[:half] == k].mean(0) for k in range(K)])
    some = np.flatnonzero(label[half:] != IGNORE)[::50] + half
    guess = ((colors[some, None] - means) ** 2).sum(2).argmin(1)
    confusion = np.bincount(label[some].astype(int) * K + guess, minlength=K * K).reshape(K, K)
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert iou.mean() < 0.15


def test_brightness_varies_between_scenes(train):
    means = train.images.mean((1, 2, 3))
    assert means.std() > 10 and means.min() > 40 and means.max() < 200


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no split 'valid'; use one of train, val, test"):
        streets.load("valid", num_images=1, size=SIZE, seed=0)


def test_a_size_that_is_too_small_is_refused_with_the_smallest():
    with pytest.raises(ValueError, match=r"31 × 64 pixels are too few.*at least 32"):
        streets.scene(0, 0, (31, 64))


def test_zero_images_and_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="num_images is 0"):
        streets.load("train", num_images=0, size=SIZE, seed=0)
    with pytest.raises(ValueError, match="seed -1 and index 0 must not be negative"):
        streets.load("train", num_images=1, size=SIZE, seed=-1)
