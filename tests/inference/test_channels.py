"""Models with other channels than RGB predict and evaluate such images, and refuse all others."""

import json

import av
import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image

import segjax
from segjax.checkpoints import metadata
from segjax.checkpoints.load import LoadedCheckpoint
from segjax.checkpoints.save import write_checkpoint
from segjax.commands import evaluate as evaluate_command
from segjax.commands import predict as predict_command
from segjax.data import builders, specs
from segjax.data.open import open_prepared_splits
from segjax.inference import geotiff
from segjax.inference.engine import scaled
from segjax.inference.images import of_kind
from tests.made_bands import array, folder, save
from tests.tiny import tiny_model

SPEC = specs.DatasetSpec("bands", ("a", "b", "c"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), 255)


def loaded(channels, dtype, seed=0):
    images = array(seed, (64, 64), channels, dtype).reshape(-1, channels).astype(float)
    about = {"image_dtype": dtype} if (channels, dtype) != (3, "uint8") else {}
    mean, std = tuple(images.mean(axis=0).tolist()), tuple(images.std(axis=0).tolist())
    return LoadedCheckpoint(tiny_model(seed, num_classes=3, in_channels=channels), SPEC, about, mean, std)


def saved(path, channels, dtype, seed=0):
    of = loaded(channels, dtype, seed)
    about = {
        "normalisation": {"mean": list(of.mean), "std": list(of.std)},
        "dataset": metadata.dataset_metadata(SPEC),
        **of.metadata,
    }
    write_checkpoint(path, of.model, dialect="native", metadata=about)
    return of


def expected_labels(of, image):
    """By the definition: normalised in float64, the model's logits upsampled bilinearly, the largest."""
    x = ((image.astype(np.float64) - of.mean) / of.std).astype(np.float32)
    logits = np.asarray(of.model(x[None])[0][0])
    channels = [np.asarray(Image.fromarray(plane).resize(image.shape[1::-1], Image.Resampling.BILINEAR)) for plane in
                np.moveaxis(logits, -1, 0)]  # fmt: skip
    return np.stack(channels, axis=-1).argmax(axis=-1)


@pytest.mark.each_value_once
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, "uint8"), (2, "uint16"), (4, "float32"), (13, "uint8"), (3, "uint16")]
)
def test_arrays_and_files_are_predicted_in_their_stored_values(tmp_path, channels, dtype, seed):
    of, image = loaded(channels, dtype, seed), array(seed + 5, (64, 96), channels, dtype)
    predictor = segjax.Predictor(of)
    labels = predictor(image)
    assert (labels == expected_labels(of, image)).mean() > 0.999
    for suffix in (".tif", ".npy"):
        save(tmp_path / f"a{suffix}", image)
        np.testing.assert_array_equal(predictor(tmp_path / f"a{suffix}"), labels)
    if channels == 1:
        save(tmp_path / "a.png", image)
        np.testing.assert_array_equal(predictor(str(tmp_path / "a.png")), labels)
        np.testing.assert_array_equal(predictor(image[..., 0]), labels)
        np.testing.assert_array_equal(predictor(Image.fromarray(image[..., 0])), labels)
    assert predictor.probabilities(image).shape == (64, 96, 3)


def test_protocols_resize_any_number_of_channels_and_keep_the_dtype():
    for channels, dtype in ((1, "uint8"), (13, "uint16"), (5, "float32")):
        image = array(1, (40, 56), channels, dtype)
        found = scaled(image, 1.5, 1)
        assert found.shape == (60, 84, channels) and found.dtype == dtype
        for channel in range(channels):
            plane = Image.fromarray(image[..., channel].astype(np.float32)).resize((84, 60), Image.Resampling.BILINEAR)
            difference = np.abs(np.asarray(plane) - found[..., channel].astype(np.float32))
            # Rounded to whole numbers; OpenCV's weights have 11 bits for 8.
            assert difference.max() <= (1 if dtype != "float32" else 1e-2)
        predictor = segjax.Predictor(loaded(channels, dtype), scales=(0.75, 1.0), flip=True)
        assert predictor(image).shape == (40, 56)
        slide = segjax.Predictor(loaded(channels, dtype), mode="slide", crop=(32, 32), stride=(16, 16))
        assert slide(image).shape == (40, 56)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((40, 56, 3), np.uint16), "has 3 channels of uint16, and the model takes 4 channels of uint16"),
        (np.zeros((40, 56, 4), np.uint8), "has 4 channels of uint8, and the model takes 4 channels of uint16"),
        (np.zeros((40, 56), np.uint16), "has 1 channel of uint16"),
        (np.zeros((40, 56, 4), np.int16), "has numbers of int16"),
        (np.zeros((4,), np.uint16), r"has the shape \(4,\)"),
    ],
)
def test_other_images_are_refused_with_found_and_expected_channels(image, words):
    with pytest.raises(ValueError, match=words):
        segjax.Predictor(loaded(4, "uint16"))(image)


def test_non_finite_values_are_refused():
    image = array(1, (40, 56), 4, "float32")
    image[3, 4, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 8,960, the first at row 3, column 4, channel 2"):
        segjax.Predictor(loaded(4, "float32"))(image)


def test_a_model_of_unknown_image_dtype_takes_every_dtype():
    predictor = segjax.Predictor(tiny_model(0, num_classes=3, in_channels=4))
    for dtype in specs.IMAGE_DTYPES:
        assert predictor(array(1, (40, 56), 4, dtype)).shape == (40, 56)
    with pytest.raises(ValueError, match="has 3 channels of uint8, and the model takes 4 channels"):
        predictor(array(1, (40, 56), 3, "uint8"))
    assert of_kind(np.zeros((2, 3, 4), np.uint8), specs.ImageKind(4, None)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="scale is for 8-bit RGB, but the model takes"):
        segjax.Predictor(tiny_model(0, in_channels=4), scale=(0, 1))


def predict(tmp_path, capsys, *arguments):
    status = predict_command.main([str(tmp_path / "model"), *map(str, arguments), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr()
    return status, " ".join(printed.out.split()), " ".join(printed.err.split())


def test_the_command_predicts_bands_and_names_files_that_do_not_fit(tmp_path, capsys):
    of, image = saved(tmp_path / "model", 4, "uint16"), array(3, (40, 56), 4, "uint16")
    inputs = tmp_path / "in"
    save(inputs / "a.tif", image)
    save(inputs / "b.npy", image)
    save(inputs / "c.tif", image[..., :2])
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(inputs / "d.jpg")
    (inputs / "e.npy").write_bytes(b"\x93NUMPY")
    status, out, err = predict(tmp_path, capsys, inputs)
    assert status == 1 and "takes images of 4 channels of uint16 (overlays: the first three)" in out
    assert "c.tif: has 2 channels of uint16, and the model takes 4 channels of uint16" in err
    assert "d.jpg: has 3 channels of uint8, and the model takes 4 channels of uint16" in err
    assert "e.npy: is a .npy that cannot be read" in err
    labels = segjax.Predictor(of)(image)
    for name in ("a", "b"):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "labels" / f"{name}.png")), labels)
        overlay = cv2.imread(str(tmp_path / "out" / "overlay" / f"{name}.jpg"))
        assert overlay.shape[1] >= 56


def test_an_rgb_model_refuses_files_with_other_bands(tmp_path, capsys):
    saved(tmp_path / "model", 3, "uint8")
    save(tmp_path / "in" / "a.tif", array(3, (40, 56), 4, "uint8"))
    save(tmp_path / "in" / "b.npy", array(3, (40, 56), 4, "uint8"))
    save(tmp_path / "in" / "c.npy", array(3, (40, 56), 3, "uint8"))
    status, _, err = predict(tmp_path, capsys, tmp_path / "in")
    assert status == 1 and "2 of 3 inputs failed" in err
    assert "a.tif: has 4 bands" in err and "3 channels that the model takes" in err
    assert "b.npy: has 4 channels, and the model takes 3, RGB" in err


def test_a_video_is_refused_by_a_model_that_does_not_take_rgb(tmp_path, capsys):
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        file.mux(stream.encode())
    saved(tmp_path / "model", 4, "uint8")
    status, _, err = predict(tmp_path, capsys, tmp_path / "v.mp4")
    assert status == 1 and "videos are 8-bit RGB, but the model takes 4 channels of uint8" in err


# ------------------------------------------------------------------------------------------------------------- GeoTIFF


PLACE = dict(crs="EPSG:32633", transform=rasterio.Affine(2, 0, 399960, 0, -2, 5800020))


def put(path, image, **profile):
    size = dict(height=image.shape[0], width=image.shape[1], count=image.shape[2], dtype=image.dtype.name)
    with rasterio.open(path, "w", driver="GTiff", **size, **PLACE, **profile) as file:
        file.write(np.moveaxis(image, -1, 0))
    return path


@pytest.mark.each_value_once
@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint8"), (4, "uint16"), (13, "float32"), (1, "uint16")])
def test_scenes_with_any_bands_are_predicted_in_parts_as_in_one_piece(tmp_path, capsys, channels, dtype):
    of, image = saved(tmp_path / "model", channels, dtype), array(3, (93, 131), channels, dtype)
    path = put(tmp_path / "a.tif", image, tiled=True, blockxsize=64, blockysize=32, compress="deflate")
    assert geotiff.kind(path, 10**6) == "scene"
    with geotiff.opened(path, scale=None, images=of.image_kind) as scene:
        assert scene.shape == image.shape and scene.dtype == dtype
        np.testing.assert_array_equal(scene[5:50, 7:99], image[5:50, 7:99])
        # GDAL calls the fourth of four bands of 8 bits alpha; here it is a channel.
        assert not scene.nodata(np.s_[0:93, 0:131]).any()
    status, _, _ = predict(tmp_path, capsys, path, "--mode", "slide", "--crop", "48", "64", "--stride", "40", "48")
    assert status == 0
    expected = segjax.Predictor(of, mode="slide", crop=(48, 64), stride=(40, 48))(image)
    with rasterio.open(tmp_path / "out" / "labels" / "a.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected)
        assert file.crs == PLACE["crs"] and file.transform == PLACE["transform"]
    status, _, _ = predict(tmp_path, capsys, path)
    with rasterio.open(tmp_path / "out" / "labels" / "a.tif") as file:
        np.testing.assert_array_equal(file.read(1), segjax.Predictor(of)(image))
    assert status == 0 and (tmp_path / "out" / "overlay" / "a.jpg").exists()


def test_nodata_pixels_are_ignored_and_their_nan_becomes_the_mean(tmp_path, capsys):
    of, image = saved(tmp_path / "model", 2, "float32"), array(3, (64, 96), 2, "float32")
    image[:20, :30] = np.nan
    path = put(tmp_path / "a.tif", image, nodata=np.nan)
    status, _, err = predict(tmp_path, capsys, path)
    assert status == 0, err
    filled = np.where(np.isnan(image), np.float32(of.mean), image)
    expected = segjax.Predictor(of)(filled)
    expected[:20, :30] = 255
    with rasterio.open(tmp_path / "out" / "labels" / "a.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected)


def test_scenes_with_other_bands_are_refused(tmp_path, capsys):
    saved(tmp_path / "model", 4, "uint16")
    put(tmp_path / "a.tif", array(3, (64, 96), 5, "uint16"))
    put(tmp_path / "b.tif", array(3, (64, 96), 4, "uint8"))
    for mode in ([], ["--mode", "slide", "--crop", "48", "64"]):
        status, _, err = predict(tmp_path, capsys, tmp_path / "a.tif", tmp_path / "b.tif", *mode)
        assert status == 1
        assert "a.tif: has 5 channels of uint16, and the model takes 4 channels of uint16" in err
        assert "b.tif: has 4 channels of uint8, and the model takes 4 channels of uint16" in err


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("resident", [0, 1])
def test_an_evaluation_counts_the_labels_of_the_predictor(tmp_path, resident):
    made = folder(tmp_path / "given", 4, "uint16")
    prepared = builders.prepare("folder", source=tmp_path / "given", data_dir=tmp_path / "data")
    (opened,) = open_prepared_splits(prepared, ["val"], resident)
    of = loaded(4, "uint16")
    found = segjax.evaluate_dataset(of, opened, output=tmp_path / "report")
    predictor, right, total = segjax.Predictor(of), 0, 0
    for image, (_, label) in zip(made["val"], map(prepared.records("val").__getitem__, range(3)), strict=True):
        counted = label != 255
        right += int((predictor(image) == label)[counted].sum())
        total += int(counted.sum())
    assert found["pixel_accuracy"] == pytest.approx(right / total, abs=1e-12)
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/jpeg") >= 3 and (tmp_path / "report" / "worst" / "01.png").exists()
    assert json.loads((tmp_path / "report" / "results.json").read_text())["pixel_accuracy"] == found["pixel_accuracy"]


def test_a_dataset_with_other_kinds_of_images_is_refused(tmp_path, capsys):
    folder(tmp_path / "given", 2, "uint16")
    saved(tmp_path / "model", 4, "uint16")
    status = evaluate_command.main(
        [str(tmp_path / "model"), "--data", "folder:val", "--source", str(tmp_path / "given"), "--data-dir",
         str(tmp_path / "data"), "--output", str(tmp_path / "report")]
    )  # fmt: skip
    error = " ".join(capsys.readouterr().err.split())
    assert status == 2 and "takes images of 4 channels of uint16, and those of bands have 2 channels of uint16" in error
    assert not (tmp_path / "report").exists()
