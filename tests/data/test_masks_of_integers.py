"""Masks of integers, as TIFF with one band or as .npy: values are kept exactly, or an error states their position."""

import io
import json
import re

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from segjax.commands import evaluate
from segjax.data import builders
from segjax.data.sources import DataError
from tests.pixels import scene
from tests.tiny import tiny_model

SIZE = (34, 47)
NAMES = ("road", "tree", "car")


def mask(seed, values=(0, 1, 2, 255), dtype="uint8"):
    return np.random.default_rng(seed).choice(np.array(values, dtype), SIZE)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array, **settings):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack"} | settings)
    return file.getvalue()


def png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def folder(root, contents, **classes):
    """A folder with these masks, content of files by name, in train and again in val."""
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        for name, content in contents.items():
            (root / f"labels/{split}/{name}").write_bytes(content)
            (root / f"images/{split}/{name.partition('.')[0]}.png").write_bytes(png(scene(0, *SIZE)))
    (root / "classes.json").write_text(json.dumps({"names": NAMES} | classes))
    return root


def prepare(root, tmp_path):
    return builders.prepare("folder", source=root, data_dir=tmp_path / "data")


def refused(tmp_path, contents, **classes):
    with pytest.raises(DataError) as error:
        prepare(folder(tmp_path / "folder", contents, **classes), tmp_path)
    return " ".join(str(error.value).split())


def layouts(values):
    """Files with these values in every layout that people have, by name."""
    wide = values.astype(np.uint16)
    tiled = {"compression": "zlib", "tile": (16, 16), "predictor": 2}
    return {
        "a.npy": npy(values),
        "b.npy": npy(np.asfortranarray(values.astype(">i4"))),
        "c.npy": npy(values.astype(np.int64)[..., None]),
        "d.tif": tiff(values),
        "e.tiff": tiff(wide, byteorder=">", compression="lzw"),
        "f.tif": tiff(values.astype(np.int32), **tiled),
        # With an overview, as GDAL writes them.
        "g.tif": with_overview(values),
        "h.tif": tiff(np.rot90(values), extratags=[(274, "H", 1, 6, True)]),
        "i.png": png(values),
        # The content decides.
        "j.png": tiff(wide),
        "k.bin": npy(wide),
    }


def with_overview(values):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(values, photometric="minisblack")
        writer.write(values[::2, ::2], photometric="minisblack", subfiletype=1)
    return file.getvalue()


@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_kept_exactly_in_every_layout(tmp_path, seed):
    values = mask(seed)
    contents = layouts(values)
    prepared = prepare(folder(tmp_path / "folder", contents), tmp_path)
    records = prepared.records("train")
    assert len(records.names) == len(contents)
    for number in range(len(contents)):
        label = records[number][1]
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, values, err_msg=records.names[number])
    counted = np.bincount(values[values != 255], minlength=3)
    assert prepared.pixel_counts("val") == (len(contents) * counted).tolist()


def test_masks_of_many_classes_have_16_bits_in_every_layout(tmp_path):
    values = mask(2, (0, 256, 299, 65535), "uint16")
    contents = {name: content for name, content in layouts(values).items() if name not in ("h.tif", "g.tif")}
    records = prepare(folder(tmp_path / "folder", contents, names=[f"c{n}" for n in range(300)]), tmp_path).records(
        "val"
    )
    for number in range(len(contents)):
        np.testing.assert_array_equal(records[number][1], values, err_msg=records.names[number])


@pytest.mark.parametrize("ignore", [7, 300])
def test_the_ignore_value_comes_from_classes_json(tmp_path, ignore):
    values = mask(3, (0, 1, 2, ignore), "uint16")
    contents = {
        "a.tif": tiff(values),
        "b.npy": npy(values),
        "c.png": png(values if ignore > 255 else values.astype(np.uint8)),
    }
    prepared = prepare(folder(tmp_path / "folder", contents, ignore=ignore), tmp_path)
    assert prepared.spec.ignore_label == ignore
    for number in range(3):
        np.testing.assert_array_equal(prepared.records("train")[number][1], values)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16"])
def test_binary_masks_may_be_bits_or_0_and_255(tmp_path, dtype):
    values = mask(4, (0, 1))
    stored = values.astype(bool) if dtype == "bool" else (255 * values.astype(np.int16)).astype(dtype)
    contents = {"a.npy": npy(stored), "b.tif": tiff(stored)}
    records = prepare(folder(tmp_path / "folder", contents, names=["tree"]), tmp_path).records("train")
    for number in range(2):
        np.testing.assert_array_equal(records[number][1], values)


@pytest.mark.parametrize("by", ["index", "colour"])
def test_a_palette_in_a_tiff_is_read_as_in_a_png(tmp_path, by):
    values = mask(5, (0, 1, 2))
    colors = np.array([[90, 80, 70], [0, 255, 0], [10, 20, 30]], np.uint8)
    # By colour, the index of a class is another one than its id.
    table = np.zeros((3, 256), np.uint16)
    order = [2, 0, 1] if by == "colour" else [0, 1, 2]
    for number, index in enumerate(order):
        table[:, index] = colors[number].astype(np.uint16) * 257
    indices = np.array(order, np.uint8)[values]
    palette = Image.fromarray(indices)
    palette.putpalette((table.T // 257).astype(np.uint8).tobytes())
    file = io.BytesIO()
    palette.save(file, "PNG")
    contents = {"a.tif": tiff(indices, photometric="palette", colormap=table), "b.png": file.getvalue()}
    classes = {"colors": colors.tolist()} if by == "colour" else {}
    records = prepare(folder(tmp_path / "folder", contents, **classes), tmp_path).records("train")
    for number in range(2):
        np.testing.assert_array_equal(records[number][1], values)


VALUES = mask(6)
BANDS = np.stack([VALUES] * 3, axis=-1)


def with_one(value):
    """The values with another one at row 2, column 4."""
    changed = VALUES.astype(type(value))
    changed[2, 4] = value
    return changed


REFUSED = {
    "float": ({"a.npy": npy(VALUES.astype(np.float32))}, "a.npy: has numbers of float32, from 0 to 255"),
    "fractions": (
        {"a.tif": tiff(with_one(0.5))},
        "a.tif: has 1 values of float64 that are not whole numbers, the first at row 2, column 4: 0.5",
    ),
    "NaN": (
        {"a.npy": npy(with_one(np.nan))},
        "a.npy: has 1 values of float64 that are not whole numbers, the first at row 2, column 4: nan",
    ),
    "complex": ({"a.npy": npy(VALUES.astype(np.complex64))}, "a.npy: has numbers of complex64"),
    "large": (
        {"a.npy": npy(with_one(70_000))},
        "a.npy: has 1 values of int64 that are outside of 0..65535, the first at row 2, column 4: 70000",
    ),
    "negative": (
        {"a.tif": tiff(with_one(-1).astype(np.int16))},
        "a.tif: has 1 values of int16 that are outside of 0..65535, the first at row 2, column 4: -1",
    ),
    "bands": ({"a.tif": tiff(BANDS, photometric="rgb")}, "a.tif: has 3 bands"),
    "bands of an array": ({"a.npy": npy(BANDS)}, "a.npy: has the shape (34, 47, 3), which is not (H, W)"),
    "an axis in front": ({"a.npy": npy(VALUES[None])}, "the shape (1, 34, 47), which is not (H, W); array[0] would be"),
    "pages": ({"a.tif": tiff(np.stack([VALUES] * 2))}, "a.tif: has 2 pages"),
    "JPEG": ({"a.tif": tiff(VALUES, compression="jpeg")}, "a.tif: is compressed as JPEG, which blurs class ids"),
    "white": ({"a.tif": tiff(VALUES, photometric="miniswhite")}, "a.tif: has values of which 0 is white"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mask_without_an_integer_per_pixel_is_refused_with_a_remedy(tmp_path, case):
    contents, words = REFUSED[case]
    message = refused(tmp_path, contents)
    assert "TIFF or .npy masks that are not one integer from 0 to 65535 for each pixel; write the class ids" in message
    assert words in message and "labels/train/a." in message and "labels/val/a." in message


@pytest.mark.parametrize("encode", [npy, tiff])
def test_16_bit_values_without_a_class_are_named_and_counted(tmp_path, encode):
    values = mask(7, (0, 1, 2), "uint16")
    values[3, 5:9] = 1000
    message = refused(tmp_path, {"a.tif": encode(values), "b.tif": encode(mask(8))})
    assert "neither a class (0..2) nor the ignore value (255)" in message
    assert "labels/train/a.tif: 1000 (4 pixels)" in message and "b.tif" not in message


def test_damaged_and_transposed_masks_are_named(tmp_path):
    contents = {
        "cut.npy": npy(VALUES)[:-9],
        "part.tif": tiff(VALUES)[:-30],
        "turned.npy": npy(VALUES.T),
        "same.npy": npy(VALUES),
        "same.tif": tiff(VALUES),
    }
    message = refused(tmp_path, contents)
    assert "labels/train/cut.npy: is a .npy that cannot be read" in message
    assert re.search(r"labels/train/part\.tif: is (truncated|a TIFF that cannot be decoded)", message)
    assert "labels/train/turned.npy is 47 x 34, its image 34 x 47" in message
    assert "differ only in the suffix; rename them: labels/train/same.npy and same.tif" in message


def test_evaluation_gives_the_same_figures_as_with_png_masks(tmp_path, capsys):
    from segjax.checkpoints import orbax_folder

    orbax_folder.save_model(tmp_path / "model", tiny_model(3, "segformer", num_classes=3), metadata={})
    figures = []
    for suffix, encode in ((".png", png), (".tif", tiff), (".npy", npy)):
        root = folder(tmp_path / suffix[1:], {f"{name}{suffix}": encode(mask(9 + n)) for n, name in enumerate("ab")})
        flags = ["--data", "folder:val", "--source", str(root), "--data-dir", str(tmp_path / f"data{suffix}")]
        assert evaluate.main([str(tmp_path / "model"), *flags, "--output", str(tmp_path / f"to{suffix}")]) == 0
        found = json.loads((tmp_path / f"to{suffix}/results.json").read_text())
        figures.append((found["per_class_iou"], found["pixel_accuracy"], found["classes"]))
    capsys.readouterr()
    assert figures[0] == figures[1] == figures[2]
