"""Pictures: colours stand for classes, and every dataset and every shape can be drawn."""

import cv2
import numpy as np
import pytest

from segjax.data import bands, specs
from segjax.viz import overlay, pictures
from tests.made_bands import array


def make_spec(num_classes):
    colors = tuple((10 + 20 * k, 250 - 20 * k, 5 * k) for k in range(num_classes))
    return specs.DatasetSpec("noise", tuple(f"class {k}" for k in range(num_classes)), colors, 255)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_class_has_its_colour_and_ignored_pixels_are_black(seed):
    spec = make_spec(11)
    labels = np.random.default_rng(seed).choice([*range(11), 255], (13, 7)).astype(np.uint8)
    colours = pictures.colourise(labels, spec)
    assert colours.dtype == np.uint8 and colours.shape == (13, 7, 3)
    for position, label in np.ndenumerate(labels):
        assert tuple(colours[position]) == ((0, 0, 0) if label == 255 else spec.colors[label])


def test_the_background_of_a_binary_model_keeps_its_own_colour():
    spec = make_spec(1)
    colours = pictures.colourise(np.array([[0, 1, 255]], np.uint8), spec)
    assert tuple(colours[0, 1]) == spec.colors[0]
    assert tuple(colours[0, 0]) != spec.colors[0]


@pytest.mark.each_value_once
@pytest.mark.parametrize("num_classes", [1, 2, 19])
@pytest.mark.parametrize("size", [(40, 64), (128, 32), (32, 512)])
def test_a_prediction_is_drawn_with_all_its_colours(num_classes, size, tmp_path):
    spec = make_spec(num_classes) if num_classes < 19 else specs.STREETS
    rng = np.random.default_rng(num_classes)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    # Broad stripes, so that their colours survive being drawn at another size.
    stripes = np.arange(size[1]) * max(num_classes, 2) // size[1]
    truth = np.broadcast_to(stripes.astype(np.uint8), size).copy()
    truth[-size[0] // 4 :] = 255
    path = tmp_path / "new folder" / "picture.png"
    pictures.save_prediction(path, image, truth, truth[:, ::-1], spec, title="a scene   mIoU of this image 0.1234")
    drawn = cv2.imread(str(path))
    assert drawn.shape[1] == 1260
    shown = {tuple(color) for color in np.unique(drawn[..., ::-1].reshape(-1, 3), axis=0).tolist()}
    assert set(spec.colors) <= shown
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_a_curve_is_drawn_from_any_part_of_a_log(tmp_path):
    losses = [{"step": 10 * i, "loss": 3.0 / i, "lr": 1e-3, "images_per_second": None} for i in range(1, 5)]
    scores = [{"step": 20, "mean_iou": 0.3, "pixel_accuracy": 0.5}, {"step": 40, "mean_iou": None}]
    sizes = set()
    for number, records in enumerate(([], losses[:1], losses, losses + scores, scores)):
        path = tmp_path / f"{number}.png"
        pictures.save_curves(path, records)
        sizes.add(cv2.imread(str(path)).shape)
    assert len(sizes) == 1


def test_a_curve_labels_its_axes_and_shows_the_score(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    records = [{"step": s, "loss": 2.0, "lr": 1e-3 * s, "images_per_second": 1.0} for s in (1, 2)]
    pictures.save_curves(tmp_path / "curve.png", [*records, {"step": 2, "mean_iou": 0.25, "pixel_accuracy": 0.5}])
    left, right = figures[0].axes
    assert left.get_xlabel() == "step" and "loss" in left.get_ylabel() and "IoU" in right.get_ylabel()
    np.testing.assert_array_equal(left.get_lines()[0].get_xydata(), [[1, 2.0], [2, 2.0]])
    np.testing.assert_array_equal(right.get_lines()[0].get_xydata(), [[2, 0.25]])
    assert right.get_ylim() == (0, 1)


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint16"), (2, "float32"), (13, "uint8")])
def test_images_with_other_channels_are_drawn(channels, dtype, tmp_path):
    image, labels = array(1, (40, 56), channels, dtype), np.random.default_rng(2).integers(0, 3, (40, 56))
    pictures.save_prediction(tmp_path / "a.png", image, labels, labels, make_spec(3), title="bands")
    assert cv2.imread(str(tmp_path / "a.png")).shape[2] == 3
    drawn = overlay.over(image, labels.astype(np.uint8), make_spec(3))
    assert (drawn[:40, :56].std(axis=(0, 1)) > 5).all()
    np.testing.assert_array_equal(overlay.side_by_side(image, labels, make_spec(3))[:40, :56], bands.as_picture(image))
