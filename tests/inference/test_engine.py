"""Sliding windows, scales and flips against loops over single pixels and images; parity/ compares with PyTorch."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import layers
from segjax.inference import sliding_window
from segjax.inference.engine import Inference, Protocol, scaled, scaled_size
from segjax.inference.sliding_window import window_starts
from segjax.runtime import memory
from tests.tiny import tiny_model


class Blurred(nnx.Module):
    """Logits that depend on the neighbourhood and on where the edge is: (B, H, W, 3) -> (B, H/4, W/4, K)."""

    def __init__(self, num_classes, size_multiple=1, align_corners=False):
        settings = dict(kernel_init=layers.fan_in_init, dtype=jnp.float32, param_dtype=jnp.float32)
        self.head = layers.Conv(3, num_classes, 7, stride=4, padding=3, rngs=nnx.Rngs(num_classes), **settings)
        self.spec, self.size_multiple, self.align_corners = Spec(num_classes), size_multiple, align_corners
        self.in_channels = 3

    def __call__(self, images):
        return 4 * self.head(images), {}


class Spec:
    def __init__(self, num_classes):
        self.num_classes = num_classes


def draw(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def logits_of(inference, image):
    """Of one image as a whole, at its size, by the model that is under test."""
    return np.asarray(inference._run(inference._score, [image]))[0]


@pytest.mark.parametrize("length", [1, 5, 8, 9, 16, 17, 23, 40])
@pytest.mark.parametrize("crop, stride", [(8, 5), (8, 8), (8, 1), (40, 7)])
def test_windows_cover_every_pixel_and_stay_inside(length, crop, stride):
    starts = window_starts(length, crop, stride)
    side = min(crop, length)
    assert starts[0] == 0 and starts[-1] + side == length
    assert starts == sorted(set(starts))
    assert starts[:-1] == list(range(0, length - side, stride))
    assert set(range(length)) == {place for start in starts for place in range(start, start + side)}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("size, crop, stride", [((37, 50), (16, 24), (10, 13)), ((20, 90), (32, 16), (32, 11))])
def test_scores_of_overlapping_windows_are_averaged_pixel_by_pixel(size, crop, stride, batch):
    inference = Inference(Blurred(3), Protocol("slide", crop, stride), batch=batch)
    image = draw(0, *size)
    total, seen = np.zeros((*size, 3)), np.zeros((*size, 1))
    for top in window_starts(size[0], crop[0], stride[0]):
        for left in window_starts(size[1], crop[1], stride[1]):
            part = np.s_[top : top + crop[0], left : left + crop[1]]
            total[part] += logits_of(inference, np.ascontiguousarray(image[part]))
            seen[part] += 1
    tiles = [np.asarray(tile.logits) for tile in inference.row_tiles(image)]
    np.testing.assert_allclose(np.concatenate(tiles), total / seen, rtol=1e-4, atol=1e-4)
    (labels,) = inference.labels([image])
    assert labels.dtype == np.uint8 and labels.shape == size
    assert (labels == (total / seen).argmax(axis=-1)).mean() > 0.999


def test_one_row_of_windows_is_kept_in_memory_at_a_time():
    inference = Inference(Blurred(2), Protocol("slide", (16, 16), (8, 16)))
    assert [tile.logits.shape for tile in inference.row_tiles(draw(1, 37, 21))] == [
        (8, 21, 2),
        (8, 21, 2),
        (5, 21, 2),
        (16, 21, 2),
    ]


@pytest.mark.parametrize(
    "width, crop, stride, widest", [(200, 16, 11, 64), (97, 16, 5, 1), (64, 16, 16, 64), (9, 9, 4, 40)]
)
def test_panels_cover_each_column_once_and_have_every_crop_they_need(width, crop, stride, widest, monkeypatch):
    monkeypatch.setattr(sliding_window, "WIDEST", widest)
    starts, found = window_starts(width, crop, stride), sliding_window.panels(width, crop, stride)
    assert [column for panel in found for column in range(panel.left, panel.right)] == list(range(width))
    for panel in found:
        assert panel.lefts == [start for start in starts if start < panel.right and start + crop > panel.left]
        assert panel.lefts[-1] + crop - panel.lefts[0] <= max(widest, 4 * crop)
    assert len(found) == 1 or len(found) < len(starts)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "seed, size, crop, stride", [(0, (37, 90), (16, 12), (10, 9)), (1, (20, 71), (32, 8), (32, 3))]
)
def test_wide_images_scored_in_panels_have_the_labels_of_a_single_panel(seed, size, crop, stride, batch, monkeypatch):
    inference, image = Inference(Blurred(3), Protocol("slide", crop, stride), batch=batch), draw(seed, *size)
    (expected,), (scores,) = inference.labels([image]), inference.probabilities([image])
    monkeypatch.setattr(sliding_window, "WIDEST", 1)
    assert len({tile.left for tile in inference.row_tiles(image)}) >= 2
    assert max(tile.logits.shape[1] for tile in inference.row_tiles(image)) <= 4 * crop[1]
    np.testing.assert_array_equal(inference.labels([image])[0], expected)
    np.testing.assert_array_equal(inference.probabilities([image])[0], scores)


def test_a_window_as_large_as_the_image_equals_mode_whole():
    images = draw(2, 2, 33, 45)
    whole = Inference(Blurred(4), Protocol())
    slide = Inference(Blurred(4), Protocol("slide", (64, 64), (48, 48)))
    np.testing.assert_array_equal(slide.labels(images), whole.labels(images))
    np.testing.assert_allclose(slide.probabilities(images), whole.probabilities(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 5])
def test_probabilities_are_averaged_over_scales_and_flips(num_classes):
    model, images = Blurred(num_classes), draw(3, 2, 40, 52)
    scales = (0.5, 1.75)
    parts = []
    for scale in scales:
        single = Inference(model, Protocol(scales=(scale,)))
        mirrored = np.stack(single.probabilities(images[:, :, ::-1]))
        parts += [np.stack(single.probabilities(images)), mirrored[:, :, ::-1]]
    both = Inference(model, Protocol(scales=scales, flip=True))
    probabilities = np.stack(both.probabilities(images))
    # The mirror image of a scaled image is the scaled mirror image, but for the rounding of 8 bits.
    np.testing.assert_allclose(probabilities, np.mean(parts, axis=0), atol=0.02)
    assert probabilities.dtype == np.float32 and probabilities.shape == (2, 40, 52, num_classes)
    labels = np.stack(both.labels(images))
    if num_classes == 1:
        np.testing.assert_array_equal(labels, probabilities[..., 0] > 0.5)
        assert 0.05 < labels.mean() < 0.95
    else:
        np.testing.assert_array_equal(labels, probabilities.argmax(axis=-1))
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


def test_a_symmetric_image_has_symmetric_probabilities_with_flip():
    half = draw(4, 1, 40, 30)
    image = np.concatenate([half, half[:, :, ::-1]], axis=2)
    (probabilities,) = Inference(Blurred(3), Protocol(flip=True)).probabilities(image)
    np.testing.assert_allclose(probabilities, probabilities[:, ::-1], rtol=1e-5)


def test_images_are_padded_to_multiples_with_the_mean_colour():
    image = draw(5, 37, 50)
    inference = Inference(Blurred(3, size_multiple=32), Protocol())
    given = []
    as_given = Inference(Blurred(3), Protocol(), normalise=lambda images: given.append(images.shape) or images)
    pixels = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    padded = np.pad(pixels, ((0, 27), (0, 14), (0, 0))).astype(np.float32)
    expected = np.asarray(as_given._run(as_given._score, [padded]))[0, :37, :50]
    np.testing.assert_allclose(logits_of(inference, image), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_scales_keep_the_aspect_ratio_and_divisors_round_up(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        size, scale = rng.integers(20, 3000, 2).tolist(), rng.choice([0.5, 0.75, 1.25, 1.5, 1.75])
        height, width = scaled_size(size, scale)
        largest = tuple(int(side * scale + 0.5) for side in size)
        assert height <= largest[0] and width <= largest[1] and (height == largest[0] or width == largest[1])
        # Half a pixel of one side is this much of the other one's.
        assert abs(height * size[1] - width * size[0]) <= max(size) / 2 + 1
    assert scaled_size((375, 1242), 0.75) == (281, 931) and scaled_size((1024, 2048), 1.75) == (1792, 3584)
    assert scaled(draw(6, 33, 70), 1.0, 32).shape == (64, 96, 3)
    image = draw(7, 64, 96)
    assert scaled(image, 1.0, 32) is image


def test_a_scale_that_leaves_no_pixels_is_refused():
    with pytest.raises(ValueError, match=r"an image of 4x300 has no pixels at scale 0\.1"):
        scaled_size((4, 300), 0.1)


def test_all_problems_of_a_protocol_are_in_one_error():
    with pytest.raises(ValueError) as caught:
        Protocol("slide", (0, 3), (4, 4), scales=(0.5, -1.0), size_divisor=0)
    message = str(caught.value)
    assert all(word in message for word in ("crop is (height, width), not (0, 3)", "(0.5, -1.0)", "size_divisor"))
    with pytest.raises(ValueError, match=r"'windows'.*not \(0, 3\)"):
        Protocol("windows", (0, 3))
    for given in (dict(crop=(8, 8)), dict(stride=(8, 8))):
        with pytest.raises(ValueError, match=r"needs mode 'slide'; add it, or omit (crop|stride)$"):
            Protocol(**given)
    with pytest.raises(ValueError, match=r"a stride of \(17, 4\) leaves gaps between crops of \(16, 16\)"):
        Protocol("slide", (16, 16), (17, 4))
    with pytest.raises(ValueError, match="scales"):
        Protocol(scales=())
    with pytest.raises(ValueError, match="scales"):
        Protocol(scales=(float("nan"),))


def test_a_sliding_window_steps_by_three_quarters_of_its_crop_by_default():
    assert (Protocol("slide").crop, Protocol("slide").stride) == ((512, 512), (384, 384))
    assert Protocol("slide", [1024, 1]).stride == (768, 1)
    assert Protocol("slide", (100, 60), [50, 60]).stride == (50, 60)
    assert (Protocol().crop, Protocol().stride) == (None, None)
    assert Protocol("slide", [64, 32], scales=[1.0]) == Protocol("slide", (64, 32), (48, 24))


def test_a_protocol_describes_itself():
    assert str(Protocol()) == "whole images"
    text = str(Protocol("slide", (512, 1024), (384, 768), (0.5, 1.0), flip=True, size_divisor=32))
    assert text == "sliding window of 512x1024 every 384x768, at scales 0.5 1, and mirrored, resized to multiples of 32"
    assert Protocol().record() == {"mode": "whole", "scales": [1.0], "flip": False, "size_divisor": 1}


def test_every_part_of_the_engine_works_with_a_real_model():
    model = tiny_model(0, "simple")
    images = draw(8, 2, 40, 70)
    protocol = Protocol("slide", (32, 48), (24, 40), scales=(1.0,), flip=True)
    probabilities = np.stack(Inference(model, protocol, batch=4).probabilities(images))
    one_by_one = Inference(model, protocol).probabilities(images[1:])
    np.testing.assert_allclose(probabilities[1:], one_by_one, rtol=1e-3, atol=1e-5)
    assert np.isfinite(probabilities).all() and len(jax.devices()) == 4


@pytest.mark.parametrize("mode", [{}, {"mode": "slide", "crop": (16, 20)}])
def test_an_image_that_resizing_makes_too_large_is_refused_before_resizing(mode, monkeypatch):
    inference = Inference(Blurred(3), Protocol(scales=(1.0, 100.0), **mode))
    monkeypatch.setattr(memory, "host", lambda: 2**24)
    words = "an image of 37x50 that is resized to 3700x5000 needs 52.9 MiB, and the machine has 16.0 MiB"
    for refuse in (lambda: inference.refuse_too_large([(37, 50)]), lambda: inference.labels([draw(0, 37, 50)])):
        with pytest.raises(memory.TooLittleMemoryError, match=words):
            refuse()


def test_memory_of_sliding_window_logits_of_a_resized_image_is_counted(monkeypatch):
    sizes, protocol = dict(scales=(2.0,)), dict(mode="slide", crop=(16, 20))
    # 74x100 pixels: 8 bytes for each of 3 classes.
    monkeypatch.setattr(memory, "limit", lambda *_, **__: 74 * 100 * 24 - 1)
    Inference(Blurred(3), Protocol(**protocol)).labels([draw(0, 37, 50)])
    with pytest.raises(memory.TooLittleMemoryError, match="37x50 that is resized to 74x100"):
        Inference(Blurred(3), Protocol(**protocol, **sizes)).labels([draw(0, 37, 50)])


def test_memory_of_the_logits_that_calibration_reads_is_counted(monkeypatch):
    monkeypatch.setattr(memory, "needed", lambda _: 0)
    monkeypatch.setattr(memory, "limit", lambda *_, **__: 4 * 3 * 410 * 600 - 1)
    inference = Inference(Blurred(3))
    inference.refuse_too_large([(410, 600), (37, 50)])
    inference.refuse_too_large([(409, 600)], counted=True)
    # Four devices share a batch.
    for batch, what in ((1, "an image of 410x600 needs 2.8 MiB"), (4, "a batch of 4 images of 410x600 needs 2.8 MiB")):
        with pytest.raises(memory.TooLittleMemoryError, match=f"calibration of {what}"):
            inference.refuse_too_large([(410, 600), (37, 50)], batch=batch, counted=True)


def test_a_failed_allocation_of_opencv_is_a_memory_error(monkeypatch):
    def refuse(*_, **__):
        error = cv2.error("Insufficient memory")
        error.code = cv2.Error.StsNoMem
        raise error

    monkeypatch.setattr(cv2, "resize", refuse)
    with pytest.raises(MemoryError):
        scaled(draw(0, 20, 30), 2.0, 1)
