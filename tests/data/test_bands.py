"""Images with any number of channels are read, prepared, cached and streamed unscaled."""

import json
import pickle

import cv2
import jax
import numpy as np
import pytest
import tifffile
from PIL import Image

from segjax.commands import data as data_command
from segjax.data import bands, builders, specs
from segjax.data.augment import augment, normalise, step_keys
from segjax.data.codec import ImageError
from segjax.data.crops import draw_crops
from segjax.data.open import open_prepared_splits
from segjax.data.pipeline import StreamBatches, TrainBatches
from segjax.data.records import CachedRecords, RecordError, load, padded_gigabytes
from segjax.data.sources import DataError
from segjax.runtime.parallel import JitParallel
from segjax.train.schema import default_config
from tests.made_bands import KINDS, array, folder, save

# ------------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_a_file_is_read_as_the_array_that_it_contains(tmp_path, channels, dtype, suffix, seed):
    image = array(seed, (31, 45), channels, dtype)
    save(tmp_path / f"a{suffix}", image)
    found = bands.decode((tmp_path / f"a{suffix}").read_bytes())
    assert found.dtype == image.dtype
    np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_layout_of_a_file_does_not_matter(tmp_path, order):
    image = array(3, (20, 31), 5, "uint16")
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(image, 2, 0), photometric="minisblack", planarconfig="separate",
        byteorder=order, compression="zlib", tile=(16, 16),
    )  # fmt: skip
    np.save(tmp_path / "b.npy", np.asfortranarray(image.astype(f"{order}u2")))
    for name in ("a.tif", "b.npy"):
        found = bands.decode((tmp_path / name).read_bytes())
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, image)


def test_alpha_of_a_tiff_is_a_channel(tmp_path):
    image = array(4, (20, 31), 4, "uint8")
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(bands.decode((tmp_path / "a.tif").read_bytes()), image)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_grey_png_has_one_channel_and_rgb_three(tmp_path, dtype):
    grey = array(5, (20, 31), 1, dtype)
    cv2.imwrite(str(tmp_path / "a.png"), grey)
    np.testing.assert_array_equal(bands.decode((tmp_path / "a.png").read_bytes()), grey)
    cv2.imwrite(str(tmp_path / "b.png"), np.repeat(grey, 3, axis=2))
    assert bands.decode((tmp_path / "b.png").read_bytes()).shape == (20, 31, 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_the_header_determines_whether_an_image_is_grey(tmp_path, mode):
    image = Image.fromarray(array(6, (20, 31), 3, "uint8")).convert(mode)
    image.save(tmp_path / "a.png")
    assert bands.decode((tmp_path / "a.png").read_bytes()).shape[2] == (1 if mode[0] == "L" else 3)
    if mode in ("L", "RGB"):
        image.save(tmp_path / "a.jpg", progressive=True)
        assert bands.decode((tmp_path / "a.jpg").read_bytes()).shape[2] == len(mode)


def _npy(header: str, pixels: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + pixels


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (_npy("{'descr': '<u2', 'fortran_order': False, 'shape': (99999999, 99999999, 9), }"), "cannot be read"),
        (_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }", b"x" * 8), "cannot be read"),
        (_npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1, 2), }"), "cannot be read"),
        (_npy("__import__('os')"), "cannot be read"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1), }", b"x" * 8), "float64"),
        (_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }", b"xx"), r"shape \(2,\)"),
        (_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }", b"x" * 5), "5 bytes"),
        (b"\x93NUMPY", "cannot be read"),
        (b"\x93NUMPY\xff\x00\x01\x00{}", r"\(its header is damaged\)"),
        (_npy("{'descr': '|u1', 'fortran_order': False, 'shape': 62, }"), r"\(its header is damaged\)"),
        (_npy("{'descr': '|u1', 'fortran_order': False, 'shape': 'x', }"), r"\(its header is damaged\)"),
        (_npy("{'descr': '|u1', 'fortran_order': None, 'shape': (1, 1), }", b"x"), r"\(its header is damaged\)"),
        (_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1.0, 1), }", b"x"), r"\(its header is damaged\)"),
        (_npy("-" * 30_000 + "1"), r"\(its header is damaged\)"),
        (_npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {(1,) * 99}, }}", b"x"), "no array has the shape"),
        (_npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {(0, 2**62, 9)}, }}"), "no array has the shape"),
        (_npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1, 1), }"), "cannot be read"),
    ],
)
def test_a_npy_file_that_is_not_an_image_is_refused(data, words):
    with pytest.raises(ImageError, match=words):
        bands.decode(data)


def test_a_tiff_with_bands_as_pages_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 20, 31), np.uint16), photometric="minisblack")
    with pytest.raises(ImageError, match="has 4 pages"):
        bands.decode((tmp_path / "a.tif").read_bytes())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_counted_and_located(value):
    image = array(7, (20, 31), 2, "float32")
    assert bands.strange_values(image) is None
    image[11, 4, 1] = image[3, 30, 0] = value
    assert bands.strange_values(image) == "2 of 1,240, the first at row 3, column 30, channel 0"


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint16"), (2, "uint8"), (4, "float32"), (13, "uint16")])
def test_pictures_show_the_first_three_bands_or_the_first(channels, dtype):
    image = array(8, (40, 50), channels, dtype)
    picture = bands.as_picture(image)
    assert (picture.shape, picture.dtype) == ((40, 50, 3), np.uint8)
    for drawn in range(3):
        band = image[..., drawn if channels >= 3 else 0].astype(float)
        low, high = np.percentile(band, (2, 98))
        expected = ((band - low) / (high - low) * 255).clip(0, 255)
        np.testing.assert_allclose(picture[..., drawn], expected, atol=1)


def test_8_bit_rgb_is_drawn_unchanged_and_a_constant_band_is_drawn():
    image = array(9, (20, 30), 3, "uint8")
    assert bands.as_picture(image) is image
    assert bands.as_picture(np.full((8, 9, 4), 7, np.uint16)).std() == 0


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_moments_are_those_of_all_pixels_together(channels, dtype, seed):
    images = [array(seed + number, size, channels, dtype) for number, size in enumerate([(31, 45), (7, 5), (64, 3)])]
    together = bands.Moments(31 * 45, bands.moments(images[0]))
    for image in images[1:]:
        together = bands.merged(together, bands.Moments(image.shape[0] * image.shape[1], bands.moments(image)))
    pixels = np.concatenate([image.reshape(-1, channels) for image in images]).astype(np.longdouble)
    np.testing.assert_allclose(together.mean, pixels.mean(axis=0).astype(float), rtol=1e-14)
    np.testing.assert_allclose(together.std, pixels.std(axis=0).astype(float), rtol=1e-11)


def test_moments_of_large_values_are_exact_and_a_zero_deviation_is_one():
    image = np.full((30, 40, 2), 65_535, np.uint16)
    image[0, 0, 0] -= 1
    found = bands.Moments(1200, bands.moments(image))
    assert found.std == (pytest.approx(np.sqrt(1199) / 1200, rel=1e-12), 1.0)


# -------------------------------------------------------------------------------------------------------------- folders


def prepared(tmp_path, *given, **how):
    made = folder(tmp_path / "given", *given, **how)
    return made, builders.prepare("folder", source=tmp_path / "given", data_dir=tmp_path / "data")


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_a_folder_keeps_the_stored_values_of_its_images(tmp_path, channels, dtype, suffix):
    made, found = prepared(tmp_path, channels, dtype, suffix=suffix)
    assert (found.kind.channels, found.kind.dtype) == (channels, dtype)
    again = builders.prepare("folder", source=tmp_path / "given", data_dir=tmp_path / "data")
    for split, images in made.items():
        records = pickle.loads(pickle.dumps(again.records(split)))
        loaded = found.load(split)
        assert loaded.images.dtype == dtype and loaded.images.shape[-1] == channels
        for number, image in enumerate(images):
            read, _ = records[number]
            assert read.dtype == dtype
            np.testing.assert_array_equal(read, image)
            np.testing.assert_array_equal(records.image(number), image)
            height, width = image.shape[:2]
            np.testing.assert_array_equal(loaded.images[number, :height, :width], image)
            assert not loaded.images[number, height:].any()
        pixels = np.concatenate([image.reshape(-1, channels) for image in images]).astype(np.float64)
        np.testing.assert_allclose(found.moments(split).mean, pixels.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.moments(split).std, pixels.std(axis=0), rtol=1e-9)
    both = np.concatenate([image.reshape(-1, channels) for images in made.values() for image in images])
    np.testing.assert_allclose(found.moments("train+val").mean, both.astype(np.float64).mean(axis=0), rtol=1e-12)
    size = channels * np.dtype(dtype).itemsize + 1
    records = found.records("train")
    assert padded_gigabytes(records, ignore_label=255, kind=found.kind) == pytest.approx(3 * 48 * 61 * size / 1e9)


def test_8_bit_rgb_keeps_its_values_in_every_file_format(tmp_path):
    made, found = prepared(tmp_path, 3, "uint8", suffix=".tif")
    assert found.kind.is_rgb
    for number, image in enumerate(made["train"]):
        np.testing.assert_array_equal(found.records("train")[number][0], image)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_grey_png_becomes_rgb_unless_classes_json_has_one_channel(tmp_path, capsys, dtype):
    made, found = prepared(tmp_path, 1, dtype, suffix=".png", channels=1)
    assert (found.kind.channels, found.kind.dtype) == (1, dtype)
    np.testing.assert_array_equal(found.records("val")[2][0], made["val"][2])
    assert "images of 1 channel" in " ".join(capsys.readouterr().out.split())
    if dtype == "uint8":
        made, found = prepared(tmp_path / "rgb", 1, dtype, suffix=".png")
        assert found.kind.is_rgb
        np.testing.assert_array_equal(found.records("val")[2][0], np.repeat(made["val"][2], 3, axis=2))
        assert '"channels": 1 in classes.json keeps' in " ".join(capsys.readouterr().out.split())


def test_grey_tiff_becomes_rgb_if_classes_json_has_three_channels(tmp_path):
    made, found = prepared(tmp_path, 1, "uint16", suffix=".tif", channels=3)
    assert (found.kind.channels, found.kind.dtype) == (3, "uint16")
    np.testing.assert_array_equal(found.records("train")[1][0], np.repeat(made["train"][1], 3, axis=2))


def refusal(tmp_path):
    with pytest.raises(DataError) as caught:
        builders.prepare("folder", source=tmp_path / "given", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()
    return str(caught.value)


def test_mixed_kinds_of_images_are_refused_with_a_file_of_each(tmp_path):
    folder(tmp_path / "given", 4, "uint16")
    save(tmp_path / "given" / "images" / "val" / "b.npy", array(0, (33, 61), 4, "uint8"))
    (tmp_path / "given" / "images" / "train" / "c.npy").unlink()
    save(tmp_path / "given" / "images" / "train" / "c.png", array(0, (48, 40), 3, "uint8"))
    message = refusal(tmp_path)
    for line in (
        "4 channels of uint16: 4, such as images/train/a.npy",
        "4 channels of uint8: 1, such as images/val/b.npy",
        "3 channels of uint8: 1, such as images/train/c.png",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("given", "words"), [(3, "4 channels of uint16: 6"), (0, "not a number from 1"), (True, "not a number")]
)
def test_channels_in_classes_json_are_checked(tmp_path, given, words):
    folder(tmp_path / "given", 4, "uint16", channels=given)
    assert words in refusal(tmp_path)


def test_unsupported_kinds_of_images_are_refused_by_name(tmp_path):
    folder(tmp_path / "given", 2, "float32")
    place = tmp_path / "given" / "images" / "train"
    image = np.load(place / "a.npy")
    image[3, 5, 1] = np.nan
    np.save(place / "a.npy", image)
    np.save(place / "b.npy", np.load(place / "b.npy").astype(np.float64))
    np.save(place / "c.npy", np.moveaxis(np.load(place / "c.npy"), 2, 0).copy())
    message = refusal(tmp_path)
    assert "a.npy: 1 of 4,480, the first at row 3, column 5, channel 1" in message
    assert "b.npy: has numbers of float64" in message
    assert "its image 2 x 48; the array seems to be (C, H, W)" in message


def test_data_prepared_by_older_versions_have_no_moments_and_are_rgb(tmp_path):
    _, found = prepared(tmp_path, 3, "uint8")
    path = found.path / "metadata.json"
    about = json.loads(path.read_text())
    del about["images"]
    path.write_text(json.dumps(about))
    old = builders.prepare("folder", source=tmp_path / "given", data_dir=tmp_path / "data")
    assert old.kind.is_rgb and len(old.load("train").images) == 3
    with pytest.raises(DataError, match="prepare the dataset again"):
        old.moments("train")


@pytest.mark.parametrize("change", [{"channels": 3}, {"dtype": "int8"}, {"moments": {}}, {"channels": "x"}])
def test_damaged_metadata_of_images_are_refused(tmp_path, change):
    _, found = prepared(tmp_path, 4, "uint8")
    path = found.path / "metadata.json"
    about = json.loads(path.read_text())
    about["images"] |= change
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"metadata\.json.*images"):
        builders.prepare("folder", source=tmp_path / "given", data_dir=tmp_path / "data")


def test_the_command_prints_kind_and_statistics(tmp_path, capsys):
    made = folder(tmp_path / "given", 2, "uint16")
    pixels = np.concatenate([image.reshape(-1, 2) for image in made["train"]]).astype(np.float64)
    status = data_command.main(
        ["prepare", "folder", "--source", str(tmp_path / "given"), "--data-dir", str(tmp_path / "data")]
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert status == 0 and "images of 2 channels of uint16" in printed
    for channel in range(2):
        assert f"{channel} {pixels.mean(axis=0)[channel]:.6g} {pixels.std(axis=0)[channel]:.6g}" in printed


# --------------------------------------------------------------------------------------------------------- augmentation


def settings(**changes):
    config = default_config("streets").augment
    config.update(crop=(32, 48), scale=(0.75, 1.5), **changes)
    return config


@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint16"), (2, "float32"), (1, "uint8"), (13, "uint8")])
def test_streamed_batches_equal_resident_ones_in_the_same_dtype(tmp_path, channels, dtype):
    _, found = prepared(tmp_path, channels, dtype)
    (opened,) = open_prepared_splits(found, ["train"], resident_gb=1)
    (streamed,) = open_prepared_splits(found, ["train"], resident_gb=0)
    assert opened.image_kind == streamed.image_kind == found.kind
    parallel, key, given = JitParallel(jax.local_devices()[:1]), jax.random.key(3), settings(rotation=10.0)
    moments = found.moments("train")
    run = jax.jit(
        lambda keys, batch: augment(
            keys, batch, given, ignore_label=255, normalise=lambda x: normalise(x, moments.mean, moments.std)
        )
    )
    with StreamBatches(
        streamed.data, batch_size=4, seed=0, parallel=parallel, settings=given, ignore_label=255, key=key, threads=1
    ) as streams:
        batches = TrainBatches(opened.data, batch_size=4, seed=0, parallel=parallel)
        for step in (0, 1):
            results = []
            for batch in (batches.at(step), streams.at(step)):
                assert (batch["image"].dtype, batch["image"].shape[-1]) == (dtype, channels)
                keys, _ = step_keys(key, step, batch["position"])
                results.append(jax.tree.map(np.asarray, run(keys, batch)))
            np.testing.assert_array_equal(results[0][0], results[1][0])
            np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_contrast_of_values_without_a_range_changes_about_their_mean(dtype):
    image = array(2, (40, 30), 4, dtype)
    mean, std = (image.reshape(-1, 4).astype(float).mean(axis=0), image.reshape(-1, 4).astype(float).std(axis=0))
    batch = {
        "image": np.stack([image] * 64),
        "label": np.zeros((64, 40, 30), np.uint8),
        "size": np.tile(np.int32([40, 30]), (64, 1)),
    }
    keys = jax.random.split(jax.random.key(0), 64)

    def run(**changes):
        given = settings(flip=0.0, **changes)
        given.update(scale=(1.0, 1.0))
        return given, np.asarray(
            augment(keys, batch, given, ignore_label=255, normalise=lambda x: normalise(x, mean, std))[0], np.float64
        )

    given, plain = run(photometric=False)
    _, changed = run(photometric=True)
    crops = draw_crops(keys, batch["size"], given)
    top = np.asarray(crops.offset)[:, 0]
    for number in range(64):
        window = image[top[number] : top[number] + 32].astype(np.float64)
        np.testing.assert_allclose(plain[number, :, :30], (window - mean) / std, atol=2e-3)
        assert not plain[number, :, 30:].any() and not changed[number, :, 30:].any()
        # One contrast and one brightness for all channels.
        slope, offset = np.polyfit(plain[number, :, :30].ravel(), changed[number, :, :30].ravel(), 1)
        np.testing.assert_allclose(changed[number, :, :30], slope * plain[number, :, :30] + offset, atol=1e-4)
        assert 0.5 <= slope <= 1.5 and abs(offset) <= 32 / np.mean(specs.IMAGENET_STD) + 1e-6
    assert len(np.unique(changed.round(3).max(axis=(1, 2, 3)))) > 10


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_brightness_and_contrast_of_8_bits_stay_in_their_range(channels):
    image = array(2, (32, 48), channels, "uint8")
    batch = {
        "image": np.stack([image] * 8),
        "label": np.zeros((8, 32, 48), np.uint8),
        "size": np.tile(np.int32([32, 48]), (8, 1)),
    }
    given = settings(flip=0.0, photometric=True)
    given.update(scale=(1.0, 1.0))
    keys = jax.random.split(jax.random.key(1), 8)
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    found = np.asarray(augment(keys, batch, given, ignore_label=255, normalise=lambda x: normalise(x, zeros, ones))[0])
    assert found.min() >= 0 and found.max() <= 255
    for changed in found:
        inside = (changed > 0) & (changed < 255)
        slope, offset = np.polyfit(image[inside], changed[inside], 1)
        np.testing.assert_allclose(changed[inside], slope * image[inside] + offset, atol=1e-2)


def test_a_split_of_mixed_kinds_is_refused_by_name():
    class Mixed:
        sizes, names = np.array([[4, 5], [4, 5]], np.int32), ("one", "two")

        def __len__(self):
            return 2

        def __getitem__(self, number):
            return np.zeros((4, 5, 2 + number), np.uint16), np.zeros((4, 5), np.uint8)

    with pytest.raises(RecordError, match="two has 3 channels of uint16, and one 2 of uint16"):
        load(Mixed(), ignore_label=255)
    cached = CachedRecords(Mixed(), 1e9)
    assert cached[1][0] is cached[1][0] and cached[1][0].dtype == np.uint16
