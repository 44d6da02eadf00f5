"""Masks in the layout of VOC, also from labelme and CVAT, become a folder that can be prepared."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segjax.data import builders, codec, specs
from tests.made_annotations import imported, labels_of, names_of, picture, refused, turned
from tests.made_archives import palette_png, write

SIZE = (5, 8)


def mask_of(values, seed=0) -> np.ndarray:
    """A mask in which each of the values occurs."""
    return (
        np.random.default_rng(seed).permutation(np.resize(np.array(values, np.uint8), SIZE[0] * SIZE[1])).reshape(SIZE)
    )


def png(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def source_of(root, masks, lists=None, encode=palette_png):
    for number, (stem, mask) in enumerate(masks.items()):
        write(root / f"JPEGImages/{stem}.jpg", picture(*SIZE, seed=number, kind="JPEG"))
        write(root / f"SegmentationClass/{stem}.png", encode(mask))
    for split, stems in (lists or {}).items():
        write(root / f"ImageSets/Segmentation/{split}.txt", "\n".join(stems).encode() + b"\n")
    return root


def test_the_folder_is_written_with_counts_and_can_be_prepared(tmp_path, capsys):
    masks = {stem: mask_of([*range(21), 255], seed) for seed, stem in enumerate("abcd")}
    lists = {"train": ["a", "b"], "val": ["c"], "trainval": ["a", "b", "c"], "test": ["x"]}
    source = source_of(tmp_path / "VOCdevkit/VOC2012", masks, lists)
    write(source / "JPEGImages/more.jpg", picture(*SIZE))
    write(source / "JPEGImages/a.png", picture(*SIZE))
    said = imported("voc", tmp_path / "VOCdevkit", tmp_path / "out", capsys)
    assert names_of(tmp_path / "out") == list(specs.VOC.class_names)
    for split, stems in (("train", "ab"), ("val", "c")):
        for stem in stems:
            np.testing.assert_array_equal(labels_of(tmp_path / "out", split, stem), masks[stem])
            copied = (tmp_path / f"out/images/{split}/{stem}.jpg").read_bytes()
            assert copied == (source / f"JPEGImages/{stem}.jpg").read_bytes()
    flat = " ".join(said.split())
    assert "listed images that have no mask: 1 test: x" in flat and "masks that are in no list: 1 d" in flat
    assert "only in the suffix: 1 JPEGImages/a.png" in flat.replace("VOC2012/", "")
    assert "images that have no mask, which are not imported: 1" in flat
    found = builders.prepare("folder", source=tmp_path / "out", data_dir=tmp_path / "data")
    assert found.splits == {"train": 2, "val": 1}


@pytest.mark.parametrize("encode", [palette_png, png])
def test_class_names_of_labelme_apply_to_palette_and_grey_masks(tmp_path, capsys, encode):
    mask = mask_of([0, 1, 2, 255])
    source = source_of(tmp_path / "x", {"a": mask}, encode=encode)
    write(source / "class_names.txt", b"_background_\nKatze\nHund\n")
    said = imported("voc", source, tmp_path / "out", capsys)
    assert names_of(tmp_path / "out") == ["background", "Katze", "Hund"]
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), mask)
    assert "there are no lists of splits: all masks are train" in said


@pytest.mark.parametrize("background", ["background:0,0,0::\n", ""])
@pytest.mark.parametrize("as_palette", [False, True])
def test_colours_in_labelmap_override_palette_indices(tmp_path, capsys, as_palette, background):
    mask = mask_of([0, 1, 2, 3], seed=3)
    colors = np.array([[10, 20, 30], [0, 0, 0], [200, 0, 1], [224, 224, 192]], np.uint8)
    image = Image.fromarray(mask)
    image.putpalette(np.resize(colors, (256, 3)).tobytes())
    file = io.BytesIO()
    (image if as_palette else image.convert("RGB")).save(file, "PNG")
    source = source_of(tmp_path / "x", {"a": mask}, encode=lambda _: file.getvalue())
    write(
        source / "labelmap.txt", b"# label:color_rgb:parts:actions\ncat:10,20,30::\nbackground:0,0,0::\ndog:200,0,1::\n"
    )
    imported("voc", source, tmp_path / "out", capsys)
    assert names_of(tmp_path / "out") == ["background", "cat", "dog"]
    # cat is 1 and background 0, whatever their order; VOC's colour of outlines is ignored.
    expected = np.array([1, 0, 2, 255], np.uint8)[mask]
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), expected)


def test_masks_of_old_labelme_are_found_next_to_npy_files(tmp_path, capsys):
    mask = mask_of([0, 1, 2, 255])
    source = source_of(tmp_path / "x", {"a": mask})
    (source / "SegmentationClass").rename(source / "SegmentationClassPNG")
    write(source / "SegmentationClass/a.npy", b"\x93NUMPY")
    write(source / "class_names.txt", b"_background_\ncat\ndog\n")
    imported("voc", source, tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), mask)


@pytest.mark.parametrize(
    "lists, splits",
    [
        (["default"], {"train"}),
        (["trainval"], {"trainval"}),
        (["Train", "Validation"], {"train", "val"}),
        (["train", "Train", "test"], {"train", "Train", "test"}),
        (["a-b", "default"], {"a_b", "default"}),
    ],
)
def test_lists_become_splits_by_the_names_that_tools_use(tmp_path, capsys, lists, splits):
    masks = {name: mask_of([0, 1, 2], seed) for seed, name in enumerate(lists)}
    imported("voc", source_of(tmp_path / "x", masks, {name: [name] for name in lists}), tmp_path / "out", capsys)
    assert {path.name for path in (tmp_path / "out/images").iterdir()} == splits


def test_names_with_spaces_are_found_with_and_without_quotation_marks(tmp_path, capsys):
    masks = {name: mask_of([0, 1, 2], seed) for seed, name in enumerate(("my image", "other one", "b"))}
    lists = {"train": ["my image", '"other one"'], "val": ["b 1"], "test": ['"b"', "gone 1"]}
    said = " ".join(imported("voc", source_of(tmp_path / "x", masks, lists), tmp_path / "out", capsys).split())
    for split, name in (("train", "my image"), ("train", "other one"), ("val", "b"), ("test", "b")):
        np.testing.assert_array_equal(labels_of(tmp_path / "out", split, name), masks[name])
    assert "listed images that have no mask: 1 test: gone" in said


def test_lists_that_would_become_the_same_split_are_refused(tmp_path, capsys):
    masks = {name: mask_of([0, 1, 2]) for name in "abc"}
    lists = {"part-1": ["a"], "part_1": ["b"], "other": ["c"]}
    report = refused("voc", source_of(tmp_path / "x", masks, lists), tmp_path / "out", capsys)
    assert "part-1.txt and part_1.txt would be one split, part_1; rename one" in report


def grey_of_bits(values, depth) -> bytes:
    """A grey PNG of fewer bits than 8, which Pillow cannot write."""
    bits = np.unpackbits(values[..., None], axis=-1)[..., -depth:].reshape(len(values), -1)
    return made_png(np.packbits(bits, axis=1), values.shape[1], depth)


def made_png(rows, width, depth) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return codec.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_masks_of_few_bits_are_refused_if_ambiguous(tmp_path, capsys, depth):
    mask = mask_of([0, 2**depth - 1])
    source = source_of(tmp_path / "x", {"a": mask}, encode=lambda mask: grey_of_bits(mask, depth))
    assert "of fewer than 8 bits" in refused("voc", source, tmp_path / "out", capsys)
    if depth == 1:
        # Of two classes there is no doubt.
        write(source / "class_names.txt", b"_background_\ncat\n")
        imported("voc", source, tmp_path / "out", capsys)
        np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), mask)


def roboflow_of(
    root, folders=("train", "valid"), table="Pixel Value, Class\r\n0, background\r\n1, a cat\r\n2, dog\r\n"
):
    for seed, folder in enumerate(folders):
        write(root / folder / "_classes.csv", table.encode())
        write(root / folder / "a_jpg.rf.7.jpg", picture(*SIZE, seed=seed, kind="JPEG"))
        write(root / folder / "a_jpg.rf.7_mask.png", png(mask_of([0, 1, 2], seed)))
    return root


def test_masks_of_roboflow_are_found_next_to_their_images(tmp_path, capsys):
    source = roboflow_of(tmp_path / "x")
    write(source / "valid/b.jpg", picture(*SIZE, kind="JPEG"))
    write(source / "valid/c_mask.png", png(mask_of([0, 1])))
    said = " ".join(imported("voc", source, tmp_path / "out", capsys).split())
    assert names_of(tmp_path / "out") == ["background", "a cat", "dog"]
    for seed, split in enumerate(("train", "val")):
        np.testing.assert_array_equal(labels_of(tmp_path / "out", split, "a_jpg.rf.7"), mask_of([0, 1, 2], seed))
        copied = (tmp_path / f"out/images/{split}/a_jpg.rf.7.jpg").read_bytes()
        assert copied == picture(*SIZE, seed=seed, kind="JPEG")
    assert "have no mask: 1 val: b" in said and "images that are missing: 1 val: c" in said


def test_wrong_tables_of_roboflow_are_named(tmp_path, capsys):
    for number, table in enumerate(["Pixel Value, Class\n1, cat\n", "", "a;b\n0;x\n"]):
        report = refused("voc", roboflow_of(tmp_path / f"{number}", table=table), tmp_path / "out", capsys)
        assert "train/_classes.csv: its lines are not 0, NAME" in report
    source = roboflow_of(tmp_path / "x")
    write(source / "valid/_classes.csv", b"Pixel Value, Class\n0, background\n1, dog\n2, a cat\n")
    assert "have different classes" in refused("voc", source, tmp_path / "out", capsys)
    twice = roboflow_of(tmp_path / "y", ("one/train", "two/train"))
    assert "several folders of train" in refused("voc", twice, tmp_path / "out", capsys)


def test_two_classes_get_an_ignore_value_other_than_255(tmp_path, capsys):
    mask = mask_of([0, 255])
    source = source_of(tmp_path / "x", {"a": mask})
    write(source / "class_names.txt", b"_background_\ncat\n")
    imported("voc", source, tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), np.where(mask == 255, 254, 0))


def test_an_image_rotated_by_exif_gets_the_orientation_of_its_mask(tmp_path, capsys):
    source = source_of(tmp_path / "x", {"a": mask_of([0, 1])})
    write(source / "JPEGImages/a.jpg", turned(8, 5))
    imported("voc", source, tmp_path / "out", capsys)
    assert codec.size_of((tmp_path / "out/images/train/a.png").read_bytes()) == SIZE


def test_unusable_masks_are_counted(tmp_path, capsys):
    masks = {stem: mask_of([0, 1]) for stem in "abcd"}
    source = source_of(tmp_path / "x", masks)
    write(source / "SegmentationClass/b.png", palette_png(masks["b"])[:-20])
    write(source / "SegmentationClass/c.png", png(np.zeros((9, 9), np.uint8)))
    write(source / "SegmentationClass/d.png", picture(*SIZE, kind="JPEG"))
    flat = " ".join(imported("voc", source, tmp_path / "out", capsys).split())
    assert "its mask SegmentationClass/b.png: is truncated" in flat and "d.png: is not a PNG" in flat
    assert "JPEGImages/c.jpg: 5 x 8, annotated 9 x 9" in flat
    assert [path.name for path in (tmp_path / "out/images/train").iterdir()] == ["a.jpg"]


def test_a_value_or_colour_without_a_class_is_refused_with_its_position(tmp_path, capsys):
    mask = np.zeros(SIZE, np.uint8)
    mask[3, 4:7] = 21
    report = refused("voc", source_of(tmp_path / "x", {"a": mask}), tmp_path / "out", capsys)
    assert "SegmentationClass/a.png has 3 pixels of no class, the first at row 3, column 4: 21" in report
    colored = np.zeros((*SIZE, 3), np.uint8)
    colored[1, 2] = 1, 2, 3
    report = refused("voc", source_of(tmp_path / "y", {"a": colored}, encode=png), tmp_path / "out", capsys)
    assert "has 1 pixels of no class, the first at row 1, column 2: [1, 2, 3]" in report


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat\n", "'cat' is not name:r,g,b::"),
        ("cat:1,2,300::\n", "is not name"),
        ("a:1,2,3::\nb:1,2,3::\n", "(1, 2, 3)"),
    ],
)
def test_a_wrong_labelmap_is_named(tmp_path, capsys, text, said):
    source = source_of(tmp_path / "x", {"a": mask_of([0, 1])})
    write(source / "labelmap.txt", text.encode())
    assert said in refused("voc", source, tmp_path / "out", capsys)


def test_sources_of_only_boxes_and_other_folders_are_refused_by_name(tmp_path, capsys):
    write(tmp_path / "x/Annotations/a.xml", b"<annotation/>")
    write(tmp_path / "x/JPEGImages/a.jpg", picture(4, 4, kind="JPEG"))
    assert "only boxes (Annotations/*.xml)" in refused("voc", tmp_path / "x", tmp_path / "out", capsys)
    (tmp_path / "x/Annotations/a.xml").unlink()
    assert "no folder SegmentationClass" in refused("voc", tmp_path / "x", tmp_path / "out", capsys)
    assert "is not a folder" in refused("voc", tmp_path / "x/JPEGImages/a.jpg", tmp_path / "out", capsys)
    for year in ("VOC2007", "VOC2012"):
        source_of(tmp_path / "y" / year, {"a": mask_of([0, 1])})
    assert "y has several folders" in refused("voc", tmp_path / "y", tmp_path / "out", capsys)
