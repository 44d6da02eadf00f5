"""Ultralytics' segmentation data become a folder that can be prepared; errors name boxes and other tasks."""

import os
import time
import unicodedata

import numpy as np
import pytest

from segjax.data import builders
from tests.made_annotations import drawn, imported, labels_of, names_of, picture, rectangle, refused, turned
from tests.made_archives import write

NAMES = "names:\n  0: cat\n  1: no\n"


def line(kind, corners, size=(4, 8)) -> str:
    """An object with corners in pixels."""
    return f"{kind} {' '.join(str(number / size[(k + 1) % 2]) for k, number in enumerate(corners))}\n"


CAT, DOG = line(0, rectangle(1, 1, 3, 3)), line(1, rectangle(0, 0, 6, 3))


def source_of(root, yaml=f"train: images/train\nval: images/val\n{NAMES}", text=CAT + DOG):
    write(root / "data.yaml", yaml.encode())
    for split in ("train", "val"):
        for number, name in enumerate("ab"):
            write(root / f"images/{split}/{name}.png", picture(4, 8, seed=number))
        write(root / f"labels/{split}/a.txt", text.encode())
    return root


EXPECTED = drawn("22222200 21122200 21122200 00000000")


def test_the_folder_is_written_with_counts_and_can_be_prepared(tmp_path, capsys):
    said = imported("yolo", source_of(tmp_path / "x"), tmp_path / "out", capsys)
    # "no" is a name, not false.
    assert names_of(tmp_path / "out") == ["background", "cat", "no"]
    for split in ("train", "val"):
        np.testing.assert_array_equal(labels_of(tmp_path / "out", split, "a"), EXPECTED)
        assert not labels_of(tmp_path / "out", split, "b").any()
    rows = [row.split() for row in said.splitlines()]
    assert ["train", "2", "1", "2"] in rows and ["no", "2", f"{100 * 14 / 64:.4f}"] in rows
    found = builders.prepare("folder", source=tmp_path / "out", data_dir=tmp_path / "data")
    assert found.splits == {"train": 2, "val": 2}


@pytest.mark.parametrize(
    ("yaml", "images", "labels"),
    [
        # Roboflow; Ultralytics; another machine's; a list of folders; a list of images.
        ("train: ../train/images\nnames: [cat, no]", "train/images", "train/labels"),
        ("path: ../datasets/x\ntrain: images/train\nnames: [cat, no]", "images/train", "labels/train"),
        ("path: /home/me/x\ntrain: images/train\nnames: [cat, no]", "images/train", "labels/train"),
        ("train: C:\\data\\x\\images\\train\nnames: [cat, no]", "images/train", "labels/train"),
        ("train: [images/one, images/two]\nnames: [cat, no]", "images/one", "labels/one"),
        ("train: train.txt\nnames: [cat, no]", "images", "labels"),
        ("train: pictures\nnames: [cat, no]", "pictures", "pictures"),
    ],
)
def test_layouts_of_several_tools_are_found(tmp_path, capsys, yaml, images, labels):
    write(tmp_path / "x/data.yaml", yaml.encode())
    write(tmp_path / f"x/{images}/a.png", picture(4, 8))
    write(tmp_path / f"x/{labels}/a.txt", (CAT + DOG).encode())
    write(tmp_path / "x/images/two/b.png", picture(4, 8))
    write(tmp_path / "x/train.txt", b"./images/a.png\n/elsewhere/images/a2.png\n")
    imported("yolo", tmp_path / "x", tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), EXPECTED)
    assert {path.name for path in (tmp_path / "out/images").iterdir()} == {"train"}
    assert (tmp_path / "out/images/train/b.png").exists() == ("two" in yaml)


def test_relative_coordinates_refer_to_the_image_after_exif_rotation(tmp_path, capsys):
    source = source_of(tmp_path / "x")
    write(source / "other.yaml", b"names: [x]")
    (source / "images/train/a.png").unlink()
    write(source / "images/train/a.jpg", turned(8, 4))
    imported("yolo", source / "data.yaml", tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), EXPECTED)
    assert "several YAML files" in refused("yolo", source, tmp_path / "out2", capsys)


def test_skipped_annotations_are_counted_with_their_reason(tmp_path, capsys):
    source = source_of(tmp_path / "x", text=f"{DOG}0 0.9375 0.5 0.125 1\n0 0.1 0.1 0.2 0.2 0.3\n\n")
    write(source / "labels/val/gone.txt", DOG.encode())
    write(source / "images/val/broken.png", b"")
    write(source / "images/val/phone.heic", b"\0\0\0\x18ftypheic")
    write(source / "more/c.png", picture(4, 8))
    said = imported("yolo", source, tmp_path / "out", capsys)
    flat = " ".join(said.split())
    for reason in (
        "their boxes get the ignore value: 2 labels/train/a.txt: line 2 labels/val/a.txt: line 2",
        "or an incomplete one: 2 labels/train/a.txt: line 3",
        "images of no split of data.yaml: 1 more/c.png",
        "text files without an image: 1 labels/val/gone.txt",
        "images that cannot be used: 2 images/val/broken.png: is empty images/val/phone.heic: is not PNG, JPEG",
    ):
        assert reason in flat
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "val", "a"), drawn("2222220# 2222220# 2222220# 0000000#"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n", ["only boxes", "labels/train/a.txt: line 1"]),
        (CAT + "2 0 0 1 0 1 1\n", ["that data.yaml does not name", "line 2: 2"]),
        (CAT + "-1 0 0 1 0 1 1\n", ["that data.yaml does not name", "line 2: -1"]),
        (CAT + "0 10 10 60 10 60 30\n", ["numbers far from 0..1", "line 2"]),
        (CAT + "0 0 0 nan 0 1 1\n", ["not a class and numbers", "line 2"]),
        (CAT + "0.5 0 0 1 0 1 1\n", ["not a class and numbers", "line 2"]),
        (CAT + "cat 0 0 1 0 1 1\n", ["not a class and numbers", "line 2: 'cat 0"]),
        ("\x89PNG\n", ["not a class and numbers", "line 1"]),
    ],
)
def test_lines_that_are_not_outlines_are_refused_and_named(tmp_path, capsys, text, said):
    report = refused("yolo", source_of(tmp_path / "x", text=text), tmp_path / "out", capsys)
    assert [part for part in said if part not in report] == [], report


BOMB = "".join(f"k{n}: &k{n}\n  <<: [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        (f"train: images/train\n{NAMES}kpt_shape: [17, 3]\n", ["keypoints", "kpt_shape"]),
        (f"train: /elsewhere/pictures\n{NAMES}", ["not in the source", "data.yaml: train: /elsewhere/pictures"]),
        (f"train: ..\n{NAMES}", ["not in the source"]),
        ("train: images/train\nnames: {0: cat, 2: dog}", ["not 0, 1, 2", "0, 2"]),
        ("train: images/train\nnames: [cat, cat]", ["classes with the same name", "cat"]),
        ("train: images/train\nnames: 3", ["names", "data.yaml"]),
        ("train: {a: b}\nnames: [cat, dog]", ["train", "data.yaml"]),
        (NAMES, ["no images"]),
        ("train: [", ["not YAML", "data.yaml"]),
        ("[" * 5000, ["not YAML", "data.yaml"]),
        ("\0", ["not YAML", "data.yaml"]),
        ("&a [*a]", ["not YAML"]),
        ("[a, b]", ["without names"]),
        ("names: &a [*a]\ntrain: x", ["names", "data.yaml"]),
        ("train: !!python/object/apply:os.mkdir [x]\nnames: [a, b]", ["not in the source"]),
        (f"k0: &k0 {{a: b}}\n{BOMB}{NAMES}", ["no images"]),
    ],
)
def test_an_unusable_yaml_file_is_named(tmp_path, capsys, yaml, said):
    report = refused("yolo", source_of(tmp_path / "x", yaml), tmp_path / "out", capsys)
    assert [part for part in said if part not in report] == [], report
    assert not os.path.exists("x")


def test_a_source_without_data_yaml_is_refused(tmp_path, capsys):
    write(tmp_path / "x/images/a.png", picture(4, 8))
    assert "no data.yaml" in refused("yolo", tmp_path / "x", tmp_path / "out", capsys)


@pytest.mark.parametrize("splits", [("train", "val"), ()])
def test_classes_txt_replaces_data_yaml(tmp_path, capsys, splits):
    write(tmp_path / "x/classes.txt", "\ufeffcat\nno\n".encode())
    for split in splits or ("",):
        write(tmp_path / "x/images" / split / "a.png", picture(4, 8))
        write(tmp_path / "x/labels" / split / "a.txt", ("\ufeff" + CAT + DOG).encode())
    imported("yolo", tmp_path / "x", tmp_path / "out", capsys)
    assert names_of(tmp_path / "out") == ["background", "cat", "no"]
    for split in splits or ("train",):
        np.testing.assert_array_equal(labels_of(tmp_path / "out", split, "a"), EXPECTED)
    write(tmp_path / "x/labels" / (splits[0] if splits else "") / "a.txt", line(2, rectangle(1, 1, 3, 3)).encode())
    assert "classes that classes.txt does not name" in refused("yolo", tmp_path / "x", tmp_path / "out 2", capsys)


def test_lines_that_end_with_a_score_are_refused(tmp_path, capsys):
    report = refused("yolo", source_of(tmp_path / "x", text=CAT.strip() + " 0.93\n"), tmp_path / "out", capsys)
    assert "no annotation marks a pixel" in report and "or an incomplete one: 2 labels/train/a.txt: line 1" in report


def test_exponentially_nested_aliases_are_refused_quickly(tmp_path, capsys):
    aliases = "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 60))
    source = source_of(tmp_path / "x", f"a0: &a0 [x, x]\n{aliases}names: *a59\ntrain: images/train\n")
    begin = time.process_time()
    assert "data.yaml: names" in refused("yolo", source, tmp_path / "out", capsys)
    assert time.process_time() - begin < 20


def test_of_two_unicode_forms_of_a_name_one_is_used_and_the_other_named(tmp_path, capsys):
    source = source_of(tmp_path / "x")
    for number, form in enumerate(("NFC", "NFD")):
        name = unicodedata.normalize(form, "caf\u00e9.png")
        write(source / "images/train" / name, picture(4, 8, seed=number))
    said = " ".join(imported("yolo", source, tmp_path / "out", capsys).split())
    assert "only in the Unicode form of accents: 1 images/train/caf" in said
