"""Every kind of image, in data folders and in prediction, against Pillow."""

import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from segjax.data import builders
from segjax.data.sources import DataError
from segjax.inference.images import as_rgb, read_image, upright_size
from tests.pixels import scene

SIZE = (21, 30)
CLASSES = {"names": ["road", "tree", "car"]}


def encoded(image, kind, **more):
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[274] = orientation
    return found


def kinds(seed):
    """Content of files by name, of a scene of `SIZE`."""
    image = Image.fromarray(scene(seed, *SIZE))
    wide = np.asarray(image).astype(np.uint16) * 257
    return {
        "progressive": encoded(image, "JPEG", progressive=True, quality=90),
        "cmyk": encoded(image.convert("CMYK"), "JPEG", quality=90),
        "grey jpeg": encoded(image.convert("L"), "JPEG"),
        "1 bit": encoded(image.convert("1"), "PNG"),
        "16 bits": encoded(Image.fromarray(wide[..., 0]), "PNG"),
        "16 bits of RGB": cv2.imencode(".png", wide[..., ::-1])[1].tobytes(),
        "palette": encoded(image.quantize(40), "PNG"),
        "grey and alpha": encoded(image.convert("LA"), "PNG"),
        "WebP": encoded(image, "WEBP", quality=70),
        "lossless WebP": encoded(image, "WEBP", lossless=True),
        "BMP": encoded(image, "BMP"),
        "BMP with a palette": encoded(image.quantize(200), "BMP"),
        "BMP of 1 bit": encoded(image.convert("1"), "BMP"),
        "GIF": encoded(image.quantize(64), "GIF"),
    }


def by_pillow(data):
    """uint8 (H, W, 3), upright."""
    image = opened(data)
    if image.mode == "I;16":
        # Pillow would cut 16 bits; every value is a multiple of 257.
        return np.repeat((np.asarray(image) // 257).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB"))


def opened(data):
    return Image.open(io.BytesIO(data))


def folder(root, files, *, size=SIZE, seed=0):
    """A folder with these images, all of which are named .jpg, and masks of the same size."""
    rng = np.random.default_rng(seed)
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    (root / "classes.json").write_text(json.dumps(CLASSES))
    for name, data in files.items():
        (root / f"images/train/{name}.jpg").write_bytes(data)
        mask = rng.integers(0, 3, size).astype(np.uint8)
        (root / f"labels/train/{name}.png").write_bytes(encoded(Image.fromarray(mask), "PNG"))
    return root


def prepare(root, tmp_path):
    return builders.prepare("folder", source=root, data_dir=tmp_path / "data")


@pytest.mark.parametrize("seed", [0, 3])
def test_every_kind_of_image_has_the_same_pixels_for_all_readers(seed, tmp_path):
    files = kinds(seed)
    records = prepare(folder(tmp_path / "folder", files), tmp_path).records("train")
    assert sorted(records.names) == sorted(files)
    for number, name in enumerate(records.names):
        expected, stored = by_pillow(files[name]), records[number][0]
        predicted = read_image(tmp_path / f"folder/images/train/{name}.jpg")
        # Inks are rounded in another way.
        most = 1 if name == "cmyk" else 0
        for found in (stored, predicted):
            assert found.shape == (*SIZE, 3) and found.dtype == np.uint8, name
            assert np.abs(found.astype(int) - expected).max() <= most, name
        assert upright_size(tmp_path / f"folder/images/train/{name}.jpg") == SIZE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_rotated_by_exif_is_upright_if_its_mask_is(kind, orientation, tmp_path, capsys):
    data = encoded(Image.fromarray(scene(1, *SIZE)), kind, exif=exif(orientation))
    upright = by_pillow(data)
    records = prepare(folder(tmp_path / "folder", {"a": data}, size=upright.shape[:2]), tmp_path).records("train")
    np.testing.assert_array_equal(records[0][0], upright)
    assert records.sizes.tolist() == [list(upright.shape[:2])]
    np.testing.assert_array_equal(read_image(tmp_path / "folder/images/train/a.jpg"), upright)
    assert upright_size(tmp_path / "folder/images/train/a.jpg") == upright.shape[:2]
    said = " ".join(capsys.readouterr().out.split())
    either = int(orientation in (2, 3, 4))
    assert ("EXIF rotates" in said) == (orientation > 1)
    assert orientation == 1 or f"1 are used upright, of which {either} have masks that would fit either way" in said


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_rotated_by_exif_stays_as_stored_if_its_mask_does(orientation, tmp_path):
    image = scene(2, *SIZE)
    data = encoded(Image.fromarray(image), "PNG", exif=exif(orientation))
    records = prepare(folder(tmp_path / "folder", {"a": data}), tmp_path).records("train")
    np.testing.assert_array_equal(records[0][0], image)


def test_damaged_exif_rotates_nothing(tmp_path):
    image = scene(2, *SIZE)
    data = encoded(Image.fromarray(image), "WEBP", exif=exif(6), lossless=True)
    data = data.replace(b"MM\0*", b"MM\0-").replace(b"II*\0", b"II-\0")
    records = prepare(folder(tmp_path / "folder", {"a": data}), tmp_path).records("train")
    np.testing.assert_array_equal(records[0][0], image)
    np.testing.assert_array_equal(read_image(tmp_path / "folder/images/train/a.jpg"), image)


def test_an_animation_is_refused_and_a_truncated_webp_is_named(tmp_path):
    frames = [Image.fromarray(scene(seed, *SIZE)) for seed in range(2)]
    files = {
        "moving": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "cut": encoded(frames[0], "WEBP")[:-40],
        "cut too": encoded(frames[0], "BMP")[:-40],
    }
    with pytest.raises(DataError) as error:
        prepare(folder(tmp_path / "folder", files), tmp_path)
    message = str(error.value)
    assert "GIF or WebP animations" in message and "images/train/moving.jpg" in message
    assert "images/train/cut.jpg: is a damaged WebP" in message and "cut too.jpg: is a damaged BMP" in message


@pytest.mark.parametrize("seed", [0, 1])
def test_prediction_reads_the_same_pixels_as_pillow(seed):
    for name, data in kinds(seed).items():
        if not name.startswith("16 bits"):
            image = opened(data)
            assert np.abs(as_rgb(image).astype(int) - by_pillow(data)).max() <= (1 if name == "cmyk" else 0), name
