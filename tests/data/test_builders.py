"""Image folders are prepared and read back unchanged; folders with faults are refused as a whole."""

import dataclasses
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from segjax.data import builders, codec, contents, masks, specs
from segjax.data.sources import DataError

REPO = Path(__file__).parents[2]
CLASSES = {
    "name": "toy",
    "names": ["road", "tree", "car"],
    "colors": [[9, 8, 7], [0, 255, 0], [1, 2, 3]],
    "ignore": 255,
}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int, depth: int = 8, color_type: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))


def png(rows: np.ndarray, depth: int = 8, color_type: int = 0, extra: bytes = b"") -> bytes:
    """A PNG by the format's own rules, so that no library's conversion comes between; rows: (H, anything)."""
    height = rows.shape[0]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    width = rows.reshape(height, -1).view(np.uint8).shape[1] * 8 // (depth * channels)
    header = png_header(width, height, depth, color_type)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return codec.PNG + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def palette_png(mask: np.ndarray) -> bytes:
    return png(mask, color_type=3, extra=chunk(b"PLTE", bytes(range(30, 30 + 3 * 9))))


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


def turned_jpeg(image: np.ndarray, orientation: int) -> bytes:
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + tiff
    plain = jpeg(image)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


def random_image(seed: int, size: tuple[int, int] = (5, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def random_mask(seed: int, size: tuple[int, int] = (5, 7)) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), size)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_tree(root: Path, classes=CLASSES, **splits: int) -> Path:
    """PNG images a, b, c, ... of 5 x 7 pixels with their masks, by default two to train and one to validate."""
    write(root / "classes.json", json.dumps(classes).encode())
    for split, count in (splits or {"train": 2, "val": 1}).items():
        for i in range(count):
            stem = chr(97 + i) if count < 26 else f"{i:03d}"
            write(root / f"images/{split}/{stem}.png", png(random_image(i).reshape(5, -1), color_type=2))
            write(root / f"labels/{split}/{stem}.png", png(random_mask(i)))
    return root


def prepare(root: Path, data_dir: Path, name: str = "folder") -> builders.Prepared:
    return builders.prepare(name, source=str(root), data_dir=str(data_dir))


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def tiny_camvid(tmp_path, monkeypatch) -> Path:
    """A tree with CamVid's classes, and CamVid's published numbers of images cut to that tree's."""
    dataset = specs.DATASETS["camvid"]
    spec = dataclasses.replace(dataset.spec, splits=(("train", 2), ("val", 1)))
    monkeypatch.setitem(specs.DATASETS, "camvid", dataclasses.replace(dataset, spec=spec))
    classes = {"names": spec.class_names, "colors": spec.colors, "ignore": spec.ignore_label}
    root = make_tree(tmp_path / "camvid", classes)
    for path in root.glob("labels/*/*.png"):
        path.write_bytes(png(np.arange(35, dtype=np.uint8).reshape(5, 7) % 12))
    return root


def complete_datasets(data: Path) -> list[Path]:
    return sorted(path.parent for path in data.rglob("dataset_info.json") if "incomplete." not in str(path))


# What is read back


def test_png_images_and_masks_are_read_back_bit_for_bit_in_order(tree, data):
    split = prepare(tree, data).load("train")
    np.testing.assert_array_equal(split.images, np.stack([random_image(0), random_image(1)]))
    np.testing.assert_array_equal(split.labels, np.stack([random_mask(0), random_mask(1)]))
    assert split.names == ("a", "b") and split.sizes.tolist() == [[5, 7], [5, 7]]
    assert (split.images.dtype, split.labels.dtype, split.sizes.dtype) == (np.uint8, np.uint8, np.int32)


def test_files_are_stored_byte_for_byte(tree, data):
    import tensorflow_datasets as tfds

    write(tree / "images/val/a.jpg", jpeg(random_image(3)))
    (tree / "images/val/a.png").unlink()
    skip = tfds.decode.SkipDecoding()
    builder = tfds.builder_from_directory(prepare(tree, data).path)
    (record,) = builder.as_data_source("val", decoders={"image": skip, "label": skip})
    assert record["image"] == (tree / "images/val/a.jpg").read_bytes()
    assert record["label"] == (tree / "labels/val/a.png").read_bytes()
    assert record["name"] == b"a"


def test_jpeg_is_read_back_as_rgb(tree, data):
    red = np.zeros((5, 7, 3), np.uint8)
    red[..., 2] = 255  # OpenCV's order is BGR
    (tree / "images/val/a.png").unlink()
    write(tree / "images/val/a.JPG", jpeg(red))
    split = prepare(tree, data).load("val")
    assert split.images[..., 0].min() > 240 and split.images[..., 1:].max() < 15


def test_images_of_unequal_size_are_padded_at_the_bottom_and_right(tree, data):
    image, mask = random_image(9, (6, 3)), random_mask(9, (6, 3))
    write(tree / "images/train/b.png", png(image.reshape(6, -1), color_type=2))
    write(tree / "labels/train/b.png", png(mask))
    split = prepare(tree, data).load("train")
    assert split.images.shape == (2, 6, 7, 3) and split.labels.shape == (2, 6, 7)
    assert split.sizes.tolist() == [[5, 7], [6, 3]]
    np.testing.assert_array_equal(split.images[1, :6, :3], image)
    np.testing.assert_array_equal(split.labels[1, :6, :3], mask)
    np.testing.assert_array_equal(split.images[0, :5, :7], random_image(0))
    assert not split.images[0, 5:].any() and not split.images[1, :, 3:].any()
    assert (split.labels[0, 5:] == 255).all() and (split.labels[1, :, 3:] == 255).all()


def test_labels_are_padded_with_the_ignore_value_of_the_folder(tmp_path, data):
    root = make_tree(tmp_path / "tree", CLASSES | {"ignore": 7}, train=2)
    write(root / "labels/train/a.png", png(np.zeros((5, 7), np.uint8)))
    write(root / "images/train/b.png", png(random_image(1, (2, 9)).reshape(2, -1), color_type=2))
    write(root / "labels/train/b.png", png(np.full((2, 9), 2, np.uint8)))
    split = prepare(root, data).load("train")
    assert (split.labels[0, :, 7:] == 7).all() and (split.labels[1, 2:] == 7).all()


@pytest.mark.parametrize("color_type, channels", [(0, 1), (4, 2), (6, 4)])
def test_grey_and_alpha_images_are_read_as_rgb(tree, data, color_type, channels):
    stored = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    stored[..., -1] = 255 if channels in (2, 4) else stored[..., -1]
    write(tree / "images/val/a.png", png(stored.reshape(5, -1), color_type=color_type))
    expected = stored[..., :3] if channels == 4 else np.repeat(stored[..., :1], 3, -1)
    np.testing.assert_array_equal(prepare(tree, data).load("val").images[0], expected)


def test_png_chunks_that_change_the_display_do_not_change_a_mask(tree, data):
    exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 3, 0, 0)
    extra = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"tRNS", b"\0\1") + chunk(b"eXIf", exif)
    write(tree / "labels/val/a.png", png(random_mask(0), extra=extra))
    np.testing.assert_array_equal(prepare(tree, data).load("val").labels[0], random_mask(0))


def test_the_spec_is_stored_with_the_data_and_read_back(tree, data):
    prepared = prepare(tree, data)
    expected = specs.DatasetSpec("toy", ("road", "tree", "car"), ((9, 8, 7), (0, 255, 0), (1, 2, 3)), 255)
    assert prepared.spec == expected and prepared.splits == {"train": 2, "val": 1}
    assert prepare(tree, data) == prepared
    assert json.loads((prepared.path / "metadata.json").read_text())["spec"]["class_names"] == ["road", "tree", "car"]


@pytest.mark.parametrize("names, ignore", [(["road", "tree", "car"], 255), (["car"], 2)])
def test_pixels_are_counted_by_class_except_ignored_ones(tmp_path, data, names, ignore):
    classes = CLASSES | {"names": names, "colors": CLASSES["colors"][: len(names)], "ignore": ignore}
    root = make_tree(tmp_path / "tree", classes)
    values = np.array([*range(max(len(names), 2)), ignore], np.uint8)
    masks = [np.random.default_rng(seed).choice(values, (5, 7)) for seed in range(2)]
    for name, mask in zip("ab", masks, strict=True):
        write(root / f"labels/train/{name}.png", png(mask))
    write(root / "labels/val/a.png", png(np.full((5, 7), ignore, np.uint8)))
    prepared = prepare(root, data)
    assert prepared.pixel_counts("train") == [np.sum(np.stack(masks) == value) for value in values[:-1]]
    assert prepared.pixel_counts("val") == [0] * (len(values) - 1) and prepared.labelled == ("train", "val")


def test_a_folder_without_a_name_is_named_after_its_directory(tmp_path, data):
    root = make_tree(tmp_path / "my street views", {key: CLASSES[key] for key in ("names", "colors", "ignore")})
    prepared = prepare(root, data)
    assert prepared.spec.name == "my street views" and prepared.path.parent.name.startswith("my_street_views-")


def test_hidden_files_are_skipped(tree, data):
    for name in (".DS_Store", "images/.DS_Store", "images/train/._a.png", "labels/train/.x"):
        write(tree / name, b"of no concern")
    assert prepare(tree, data).splits == {"train": 2, "val": 1}


def test_names_need_not_be_ascii(tree, data):
    for part in ("images", "labels"):
        (tree / part / "val/a.png").rename(tree / part / "val/straße 1.x.png")
    assert prepare(tree, data).load("val").names == ("straße 1.x",)


def test_loading_an_unknown_split_names_the_existing_ones(tree, data):
    with pytest.raises(builders.DataError, match=r"toy has no split 'test'; there are train 2, val 1"):
        prepare(tree, data).load("test")


# TensorFlow, network and console


def test_importing_loads_neither_tfds_nor_opencv():
    code = (
        "import sys, segjax; before = set(sys.modules); import segjax.data.builders; new = set(sys.modules) - before;"
        "assert 'segjax.data.builders' in new; assert not new & {'tensorflow_datasets', 'cv2', 'tensorflow'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


def test_preparing_and_loading_need_no_tensorflow_and_no_network(tree, data, monkeypatch):
    class NoTensorFlow:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "tensorflow":
                raise ModuleNotFoundError(f"tensorflow imported as {name}", name=name)

    def refuse(*args):
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(sys, "meta_path", [NoTensorFlow(), *sys.meta_path])
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert prepare(tree, data).load("val").images.shape == (1, 5, 7, 3)


def test_a_split_beyond_tfds_memory_buffer_needs_no_tensorflow(tree, data, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.shuffle.MAX_MEM_BUFFER_SIZE", 0)
    assert prepare(tree, data).load("train").names == ("a", "b")


@pytest.mark.parametrize("verbosity", ["warning", "info"])
def test_preparation_prints_one_line_at_first_use_and_none_later(tree, data, verbosity):
    code = f"""
from absl import logging
from segjax.data import builders

logging.use_absl_handler()
logging.set_verbosity("{verbosity}")
for _ in range(2):
    prepared = builders.prepare("folder", source={str(tree)!r}, data_dir={str(data)!r})
    prepared.load("train")
assert logging.get_verbosity() == logging.{verbosity.upper()}
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True, text=True)
    (path,) = complete_datasets(data)
    assert shown.stdout == f"Preparing toy, images per split: train 2, val 1\n  from {tree}\n  to {path}\n"
    assert shown.stderr == ""


def test_nothing_but_the_dataset_is_left_on_the_disk(tree, data, monkeypatch):
    temporary = data.with_name("temporary")
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = prepare(tree, data).path
    assert path == data / "segjax_folder" / path.parent.name / "1.1.0"
    kinds = {p.suffix or p.name.split(".")[1].split("-")[0] for p in data.rglob("*") if p.is_file()}
    assert kinds == {".json", ".array_record-00000-of-00001"} and not (data / "downloads").exists()
    assert not list(temporary.iterdir())


def test_the_data_directory_defaults_to_that_of_tfds(tree, data, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(data))
    assert data in builders.prepare("folder", source=str(tree), data_dir=None).path.parents


# Which data are which


def test_an_unchanged_folder_is_prepared_once(tree, data, monkeypatch):
    first = prepare(tree, data)
    monkeypatch.setattr(masks, "convert", lambda *_: pytest.fail("checked again"))
    assert prepare(tree, data) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda root: os.utime(root / "labels/val/a.png", ns=(0, 1)),
        lambda root: write(root / "labels/val/a.png", png(random_mask(5))),
        lambda root: write(root / "classes.json", json.dumps(CLASSES | {"names": ["road", "tree", "cat"]}).encode()),
        lambda root: make_tree(root, train=3, val=1),
        lambda root: [(root / part / "val/a.png").rename(root / part / "val/z.png") for part in ("images", "labels")],
        lambda root: [(root / part / "val").rename(root / part / "test") for part in ("images", "labels")],
    ],
    ids=["time", "mask", "classes", "added", "renamed", "split renamed"],
)
def test_a_changed_folder_is_prepared_again(tree, data, change):
    first = prepare(tree, data)
    change(tree)
    second = prepare(tree, data)
    assert second.path != first.path and first.path.is_dir()


def test_after_a_change_the_current_files_are_read(tree, data):
    prepare(tree, data)
    write(tree / "labels/val/a.png", png(np.full((5, 7), 2, np.uint8)))
    assert (prepare(tree, data).load("val").labels == 2).all()


def test_folders_with_equal_names_sizes_and_times_are_distinguished(tmp_path, data):
    masks = {name: np.full((5, 7), value, np.uint8) for name, value in (("one", 1), ("two", 2))}
    for name, mask in masks.items():
        root = make_tree(tmp_path / name)
        write(root / "labels/val/a.png", png(mask))
        for path in root.rglob("*"):
            os.utime(path, ns=(0, 0))
    sizes = {(tmp_path / name / "labels/val/a.png").stat().st_size for name in masks}
    assert len(sizes) == 1, "the two trees were to be alike"
    for name, mask in masks.items():
        np.testing.assert_array_equal(prepare(tmp_path / name, data).load("val").labels[0], mask)


# CamVid, with published numbers cut to a tiny tree


@pytest.mark.parametrize("source", [None, "", ()])
def test_prepared_camvid_needs_no_source(source, tiny_camvid, data):
    prepared = prepare(tiny_camvid, data, "camvid")
    assert prepared.spec == specs.DATASETS["camvid"].spec and prepared.path == data / "segjax_camvid/1.1.0"
    shutil.rmtree(tiny_camvid)
    again = builders.prepare("camvid", source=source, data_dir=str(data))
    assert again == prepared and again.load("train").labels.max() == 11


def test_tfds_itself_reads_camvid_by_its_name(tiny_camvid, data):
    import tensorflow_datasets as tfds

    ours = prepare(tiny_camvid, data, "camvid").load("train")
    theirs = tfds.data_source("segjax_camvid", split="train", data_dir=str(data))
    assert [example["name"].decode() for example in theirs] == list(ours.names)
    for i, example in enumerate(theirs):
        np.testing.assert_array_equal(example["image"], ours.images[i])
        np.testing.assert_array_equal(example["label"][..., 0], ours.labels[i])


def test_for_unprepared_camvid_the_error_says_what_to_pass(data):
    with pytest.raises(builders.DataError) as error:
        builders.prepare("camvid", source=None, data_dir=str(data))
    # Each command adds its own flag.
    for part in (
        "images/<split>",
        "labels/<split>",
        "classes.json",
        "train 367",
        "test 233",
    ):
        assert part in str(error.value)
    assert not data.exists()


def test_a_copy_of_camvid_with_other_times_is_the_same_dataset(tiny_camvid, tmp_path, data):
    first = prepare(tiny_camvid, data, "camvid")
    shutil.copytree(tiny_camvid, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy/images/val/a.png", ns=(0, 0))
    assert prepare(tmp_path / "copy", data, "camvid") == first


def test_a_source_other_than_that_of_the_prepared_camvid_is_refused(tiny_camvid, tmp_path, data):
    path = prepare(tiny_camvid, data, "camvid").path
    other = Path(shutil.copytree(tiny_camvid, tmp_path / "other"))
    write(other / "labels/val/a.png", png(np.zeros((5, 7), np.uint8)))
    with pytest.raises(builders.DataError, match=r"was prepared from .*delete that directory") as error:
        prepare(other, data, "camvid")
    assert str(path) in str(error.value) and str(tiny_camvid) in str(error.value)


def test_camvid_with_wrong_numbers_of_images_or_classes_is_refused(tmp_path, data):
    with pytest.raises(builders.DataError) as error:
        prepare(make_tree(tmp_path / "tree"), data, "camvid")
    assert "train 2, val 1 instead of train 367, val 101, test 233" in str(error.value)
    assert "class_names ('road', 'tree', 'car') instead of ('sky', 'building'" in str(error.value)
    assert "ignore_label 255 instead of 11" in str(error.value) and not data.exists()


# What is refused


def refused(root: Path, data: Path) -> str:
    """The report of a folder that must be refused, with nothing written."""
    with pytest.raises(builders.DataError) as error:
        prepare(root, data)
    assert not data.exists(), sorted(data.rglob("*"))
    return str(error.value)


def bad_mask(content: bytes):
    return lambda root: write(root / "labels/train/b.png", content)


def bad_image(content: bytes):
    return lambda root: write(root / "images/train/b.png", content)


def bad_classes(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda root: write(root / "classes.json", text)


def with_classes(**changes):
    return bad_classes(CLASSES | changes)


def remove(*names):
    def change(root):
        for name in names:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return change


def empty_directory(name):
    return lambda root: (remove(name)(root), (root / name).mkdir())


MASK, IMAGE = random_mask(1), random_image(1).reshape(5, -1)
REFUSED = {
    "mask of another size": (bad_mask(png(MASK[:, :6])), ["labels/train/b.png is 5 x 6, its image 5 x 7"]),
    "transposed mask": (bad_mask(png(MASK.T.copy())), ["labels/train/b.png is 7 x 5, its image 5 x 7"]),
    "image without mask": (remove("labels/train/b.png"), ["images without a mask", "images/train/b.png"]),
    "mask without image": (remove("images/train/b.png"), ["masks without an image", "labels/train/b.png"]),
    "label values": (
        bad_mask(png(np.array([[0, 3, 3, 254, 255, 2, 1]] * 5, np.uint8))),
        ["neither a class (0..2) nor the ignore value (255)", "labels/train/b.png: 3 (10 pixels), 254 (5 pixels)"],
    ),
    "palette mask": (
        bad_mask(palette_png(np.full((5, 7), 5, np.uint8))),
        ["RGB or palette masks", "[45, 46, 47]: 35 pixels in 1 masks, first in labels/train/b.png, row 0, column 0"],
    ),
    "RGB mask": (bad_mask(png(IMAGE, color_type=2)), ["RGB or palette masks", "labels/train/b.png", '"colors"']),
    "RGBA mask": (
        bad_mask(png(np.zeros((5, 28), np.uint8), color_type=6)),
        ["[0, 0, 0]: 35 pixels in 1 masks, first in labels/train/b.png"],
    ),
    "16-bit mask": (bad_mask(png(np.zeros((5, 7), ">u2"), depth=16)), ["16-bit masks", "8 bits", "train/b.png"]),
    "16-bit RGB mask": (bad_mask(png(np.zeros((5, 21), ">u2"), 16, 2)), ["16 bits per channel", "train/b.png"]),
    "1-bit mask": (bad_mask(png(np.zeros((5, 1), np.uint8), depth=1)), ["fewer than 8 bits", "train/b.png"]),
    "4-bit mask": (bad_mask(png(np.zeros((5, 4), np.uint8), depth=4)), ["fewer than 8 bits", "train/b.png"]),
    "JPEG as mask": (bad_mask(jpeg(random_image(0))), ["JPEG inside", "labels/train/b.png"]),
    "16-bit image that is dark": (
        bad_image(png(np.full((5, 21), 4000, ">u2"), 16, 2)),
        ["16-bit images", "images/train/b.png: its brightest value is 4000 of 65535"],
    ),
    "empty image": (bad_image(b""), ["images/train/b.png: is empty"]),
    "empty mask": (bad_mask(b""), ["labels/train/b.png: is empty"]),
    "truncated PNG": (bad_image(png(IMAGE, color_type=2)[:-20]), ["images/train/b.png: is truncated"]),
    "truncated JPEG": (bad_image(jpeg(random_image(0, (50, 70)))[:-100]), ["images/train/b.png: is truncated"]),
    "damaged PNG": (bad_image(png(IMAGE, color_type=2).replace(b"IDATx", b"IDATy")), ["train/b.png: is damaged at"]),
    "PNG without header": (bad_image(codec.PNG + chunk(b"IEND", b"")), ["images/train/b.png: has no PNG header"]),
    "PNG without pixels": (
        bad_mask(codec.PNG + png_header(7, 5) + chunk(b"IEND", b"")),
        ["labels/train/b.png: does not decode"],
    ),
    "PNG of more pixels than are decoded": (
        bad_mask(codec.PNG + png_header(1 << 16, 1 << 16) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")),
        ["masks of more than 178,956,970 pixels", "labels/train/b.png"],
    ),
    "no picture": (bad_image(b"<html>, or so"), ["images/train/b.png: begins with b'<html>, '"]),
    "no whole GIF": (bad_image(b"GIF89a\5\0\7\0, or so"), ["images/train/b.png: is a damaged GIF"]),
    "EXIF and a mask of another size": (
        bad_image(turned_jpeg(random_image(1, (7, 9)), 6)),
        ["labels/train/b.png is 5 x 7, its image 9 x 7"],
    ),
    "EXIF that the sizes of masks contradict": (
        lambda root: (
            bad_image(turned_jpeg(random_image(1), 3))(root),
            write(root / "images/train/a.png", turned_jpeg(random_image(0), 6)),
        ),
        ["while other masks fit only images as they are stored", "\n    images/train/b.png"],
    ),
    "one stem twice": (
        lambda root: write(root / "images/train/b.jpg", jpeg(random_image(0))),
        ["only in the suffix", "images/train/b.jpg and b.png"],
    ),
    "other suffix": (lambda root: write(root / "images/train/c.bmp", b"BM"), ["images/train/c.bmp"]),
    "no picture by suffix or content": (
        lambda root: (remove("labels/train/b.png")(root), write(root / "labels/train/b.txt", b"0 1 2")),
        ["by suffix or by content", "labels/train/b.txt", "images without a mask", "images/train/b.png"],
    ),
    "directory in a split": (lambda root: (root / "images/train/city").mkdir(), ["images/train/city"]),
    "dangling link": (
        lambda root: (remove("images/train/b.png")(root), (root / "images/train/b.png").symlink_to(root / "gone.png")),
        ["images/train/b.png"],
    ),
    "file next to splits": (
        lambda root: write(root / "images/a.png", b""),
        ["files next to the directories of the splits", "images/a.png"],
    ),
    "no images/": (remove("images"), ["directories missing", "\n    images\n", "labels/train without images/train"]),
    "no labels/": (remove("labels"), ["directories missing", "\n    labels\n", "images/val without labels/val"]),
    "empty images/": (empty_directory("images"), ["without a split in them", "\n    images\n"]),
    "empty labels/": (empty_directory("labels"), ["without a split in them", "\n    labels\n"]),
    "empty split": (empty_directory("labels/val"), ["without a usable file", "\n    labels/val"]),
    "split without masks": (remove("labels/val"), ["splits with only images", "images/val without labels/val"]),
    "split without images": (remove("images/val"), ["splits with only images", "labels/val without images/val"]),
    "split called all": (
        lambda root: [(root / part / "val").rename(root / part / "all") for part in ("images", "labels")],
        ["TFDS cannot name", "images/all", "labels/all"],
    ),
    "no classes.json": (remove("classes.json"), ["classes.json", "cannot be read: No such file"]),
    "invalid JSON": (bad_classes(b'{"names": '), ["not JSON", "line 1 column 10"]),
    "JSON in no UTF-8": (bad_classes(b'{"names": ["\xff"]}'), ["not JSON", "unicode"]),
    "JSON of another kind": (bad_classes([1, 2]), ["should be a valid dictionary, not [1, 2]"]),
    "no keys": (bad_classes({}), ['"names" is missing']),
    "colours no list": (with_classes(colors="red"), ["\"colors\" is not a list: 'red'"]),
    "ignored colours no colours": (with_classes(ignore_colors=[5]), ['"ignore_colors" has entries that are not [r,']),
    "an ignored colour of a class": (with_classes(ignore_colors=[[9, 8, 7]]), ["has colours of classes: [9, 8, 7]"]),
    "names no list": (with_classes(names="road"), ["\"names\" is missing or not a list of strings: 'road'"]),
    "names no strings": (with_classes(names=["a", 1, "c"]), ['"names" is missing or not a list of strings']),
    "no names": (with_classes(names=[], colors=[]), ['"names" is missing or not a list of strings: []']),
    "names twice": (with_classes(names=["car", "tree", "car"]), ['"names" repeats car']),
    "fewer colours": (with_classes(colors=[[0, 0, 0]]), ['3 "names" but 1 "colors"']),
    "a colour of two": (with_classes(colors=[[1, 2], [1, 2, 3], [1, 2, 3]]), ["in 0..255: [1, 2]"]),
    "a colour too bright": (with_classes(colors=[[1, 2, 3], [0, 0, 256], [0.5, 0, 0]]), ["[0, 0, 256], [0.5, 0, 0]"]),
    "ignore no number": (with_classes(ignore="255"), ["\"ignore\" is not an integer in 0..65535: '255'"]),
    "ignore true": (with_classes(ignore=True), ['"ignore" is not an integer in 0..65535: True']),
    "ignore beyond 16 bits": (with_classes(ignore=65536), ['"ignore" is not an integer in 0..65535: 65536']),
    "ignore is a class": (with_classes(ignore=2), ["\"ignore\" is 2, which is also the id of class 'car'"]),
    "dataset name no string": (with_classes(name=5), ['"name" is not a string: 5']),
}  # fmt: skip


@pytest.mark.parametrize("change, expected", REFUSED.values(), ids=REFUSED.keys())
def test_bad_data_are_refused_with_file_and_value_and_nothing_is_written(tree, data, change, expected):
    prepare(tree, data.with_name("before the change"))  # the tree is in order until `change`
    change(tree)
    report = refused(tree, data)
    for part in expected:
        assert part in report, report


def test_all_problems_are_in_one_report_which_names_only_bad_files(tmp_path, data):
    root = make_tree(tmp_path / "tree", train=6, val=2)
    bad_classes(CLASSES | {"ignore": -1})(root)
    write(root / "labels/train/b.png", jpeg(random_image(0)))
    write(root / "labels/train/c.png", png(random_mask(0, (4, 7))))
    write(root / "images/train/d.png", b"")
    (root / "labels/train/e.png").unlink()
    shutil.rmtree(root / "labels/val")
    report = refused(root, data)
    for part in (
        "classes.json",
        "JPEG inside",
        "c.png is 4 x 7",
        "d.png: is empty",
        "images/train/e.png",
        "images/val without",
    ):
        assert part in report, report
    assert "a.png" not in report and "f.png" not in report


def test_a_report_shows_ten_of_a_kind_and_counts_the_rest(tmp_path, data):
    root = make_tree(tmp_path / "tree", train=30)
    for i in range(13):
        write(root / f"labels/train/{i:03d}.png", png(np.arange(3, 38, dtype=np.uint8).reshape(5, 7)))
    report = refused(root, data)
    assert report.count("labels/train/") == 10 and "\n    and 3 more" in report
    assert "12 (1 pixels), and 25 more" in report  # of the 35 values of one mask


def test_a_truncated_png_or_jpeg_is_never_accepted():
    thumbnail = b"\xff\xe1\0\x06\xff\xd8\xff\xd9"  # a segment that holds an end marker of its own
    plain = jpeg(random_image(0, (20, 30)))
    for whole in (
        png(IMAGE, color_type=2),
        plain[:2] + thumbnail + plain[2:],
        plain[:2] + b"\xff\xff" + thumbnail[1:] + plain[2:],
    ):
        assert codec.damage(whole) is None and codec.damage(whole + b"trailing bytes") is None
        assert all(codec.damage(whole[:length]) for length in range(len(whole)))


def test_exif_without_rotation_is_accepted(tree, data):
    write(tree / "images/train/b.png", turned_jpeg(random_image(1), 1))
    assert prepare(tree, data).splits["train"] == 2


@pytest.mark.parametrize("name, source, message", [
    ("folder", None, "folder needs a source with images/<split>/x.jpg"),
    ("folder", "not/there", "folder: not/there is not a directory"),
    ("camvid", "not/there", "camvid: not/there is not a directory"),
    ("kitti", None, "no dataset 'kitti' to prepare; choose from camvid, cityscapes, ade20k, voc, pet, folder"),
])  # fmt: skip
def test_a_missing_source_or_an_unknown_name_is_refused(data, name, source, message):
    with pytest.raises(builders.DataError) as error:
        builders.prepare(name, source=source, data_dir=str(data))
    assert message in str(error.value) and not data.exists()


# Nothing half-prepared


def test_a_failure_midway_leaves_no_dataset_and_the_next_run_continues(tree, data, monkeypatch, capsys):
    convert = masks.convert

    def convert_then_lose_a_file(*args):
        result = convert(*args)
        (tree / "labels/val/a.png").rename(tree / "elsewhere.png")  # train will have been written by then
        return result

    with monkeypatch.context() as patch:
        patch.setattr(masks, "convert", convert_then_lose_a_file)
        with pytest.raises(FileNotFoundError, match=r"a\.png"):
            prepare(tree, data)
    left = [path for path in data.rglob("*") if path.is_file() or path.name == "1.1.0" or "incomplete" in path.name]
    assert [path.name for path in left] == ["checked.jsonl"]
    (tree / "elsewhere.png").rename(tree / "labels/val/a.png")
    assert prepare(tree, data).load("val").names == ("a",)
    assert "Taking over 3 of 3 images" in capsys.readouterr().out and not list(data.rglob("*converting*"))


def test_a_killed_preparation_leaves_no_seemingly_complete_dataset(tree, data):
    code = f"""
import os
from segjax.data import builders

def records(examples, what, original=builders._records):
    if what == "writing val":
        os._exit(9)
    return original(examples, what)

builders._records = records
builders.prepare("folder", source={str(tree)!r}, data_dir={str(data)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.DEVNULL).returncode == 9
    assert any("incomplete." in str(path) for path in data.rglob("*train*")), "killed before anything was written"
    assert not complete_datasets(data)
    prepared = prepare(tree, data)
    assert complete_datasets(data) == [prepared.path] and prepared.load("val").names == ("a",)
    assert not list(data.rglob("*incomplete*")) and not list(data.rglob("*converting*"))


def test_a_second_process_waits_for_the_first_and_names_it(tree, data):
    """The first stops while it writes, the second must wait; killed, the first frees the lock by its death."""
    code = f"""
import sys, time
from segjax.data import builders

def records(examples, what, original=builders._records):
    if sys.argv[1] == "first":
        print("writes", file=sys.__stdout__, flush=True)
        time.sleep(60)
    return original(examples, what)

builders._records = records
print(builders.prepare("folder", source={str(tree)!r}, data_dir={str(data)!r}).splits, flush=True)
"""

    def start(which):
        command = [sys.executable, "-c", code, which]
        return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with start("first") as first, start_after(first, start, "second") as second:
        said = ""
        while "this process waits" not in " ".join(said.split()):
            line = second.stdout.readline()
            assert line, said
            said += line
        assert f"process {first.pid} on {socket.gethostname()}" in " ".join(said.split())
        assert not complete_datasets(data) and second.poll() is None
        first.kill()
        said += second.stdout.read()
    assert "{'train': 2, 'val': 1}" in said, said
    assert ": this process waits until it ends" in " ".join(said.split()) and "stop it" not in said
    assert [path.name for path in data.rglob("*lock*")] == [] and len(complete_datasets(data)) == 1


def start_after(first, start, which):
    """A process that starts once the first has begun to write."""
    while "writes" not in (line := first.stdout.readline()):
        assert line, "ended before it wrote anything"
    return start(which)


def test_an_incomplete_dataset_directory_is_refused(tree, data):
    path = prepare(tree, data).path
    (path / "dataset_info.json").unlink()
    with pytest.raises(builders.DataError, match=r"holds no complete dataset; delete it"):
        prepare(tree, data)


# The real CamVid


@pytest.fixture(scope="module")
def camvid_source() -> Path:
    given = os.environ.get("SEGJAX_CAMVID")
    if not given:
        # The dataset's licence is unclear, so that it cannot come with the repository.
        pytest.skip("set SEGJAX_CAMVID to CamVid's folder, with images/, labels/ and classes.json")
    if not Path(given).is_dir():
        pytest.fail(f"SEGJAX_CAMVID names {given}, where there is no folder")
    return Path(given)


def test_camvid_is_prepared_and_read_back_as_published(camvid_source, data):
    prepared = prepare(camvid_source, data, "camvid")
    assert prepared.spec == specs.CAMVID and prepared.splits == dict(specs.CAMVID.splits)
    assert builders.prepare("camvid", source=None, data_dir=str(data)) == prepared
    split = prepared.load("val")
    assert split.images.shape == (101, 360, 480, 3) and split.labels.shape == (101, 360, 480)
    assert (split.sizes == (360, 480)).all() and list(split.names) == sorted(split.names)
    assert np.unique(split.labels).tolist() == list(range(12))
    for i in (0, 50, 100):
        name = split.names[i]
        image = cv2.imread(str(camvid_source / f"images/val/{name}.jpg"))[..., ::-1]
        mask = cv2.imread(str(camvid_source / f"labels/val/{name}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(split.images[i], image)
        np.testing.assert_array_equal(split.labels[i], mask)


@pytest.mark.parametrize("name", ["images/train/b.png", "labels/val/a.png"])
def test_a_file_that_changes_after_its_check_is_named_and_read_again(name, tree, data, monkeypatch):
    convert = masks.convert
    new = png(random_mask(9)) if "labels" in name else png(random_image(9).reshape(5, -1), color_type=2)

    def and_change(*arguments):
        converted = convert(*arguments)
        (tree / name).write_bytes(new)
        return converted

    with monkeypatch.context() as patch:
        patch.setattr(masks, "convert", and_change)
        with pytest.raises(DataError) as error:
            prepare(tree, data)
    assert str(error.value) == f"{name} was changed while the dataset was prepared; run the same command again"
    assert complete_datasets(data) == []
    prepared = prepare(tree, data)
    _, split, stem = Path(name).with_suffix("").parts
    number = prepared.metadata["names"][split].index(stem)
    assert contents.hash_of(new) in prepared.metadata["hashes"][split][number]
