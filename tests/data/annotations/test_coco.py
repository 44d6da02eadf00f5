"""COCO's instances, as several tools write them, become a folder that can be prepared; damaged files are refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from segjax.data import builders, codec
from tests.made_annotations import (
    drawn,
    imported,
    labels_of,
    names_of,
    picture,
    rectangle,
    refused,
    turned,
    write_json,
)
from tests.made_archives import write


def instances(**changes):
    """Two images of 4 x 6: a dog with a cat on it and a crowd beside them, and nothing."""
    content = {
        "images": [
            {"id": 5, "file_name": "a.png", "height": 4, "width": 6},
            {"id": 6, "file_name": "b.png", "height": 4, "width": 6},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "segmentation": [rectangle(1, 1, 2, 3)], "iscrowd": 0},
            {"id": 2, "image_id": 5, "category_id": 3, "segmentation": [rectangle(0, 0, 3, 4)]},
            {
                "id": 3,
                "image_id": 5,
                "category_id": 7,
                "segmentation": {"counts": [16, 8], "size": [4, 6]},
                "iscrowd": 1,
            },
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "unused"}],
    }
    return content | changes


EXPECTED = drawn("1110## 1210## 1210## 1110##")


def source_of(root, content=None, *, images=("a", "b"), split="train2017"):
    write_json(root / f"annotations/instances_{split}.json", instances() if content is None else content)
    for number, name in enumerate(images):
        write(root / f"{split}/{name}.png", picture(4, 6, seed=number))
    return root


def changed(key, index, **entries):
    """The instances with entries of one image or annotation replaced."""
    content = instances()
    content[key][index] |= entries
    return content


def test_the_folder_is_written_with_counts_and_can_be_prepared(tmp_path, capsys):
    source = source_of(tmp_path / "coco")
    source_of(source, split="val2017")
    folder = tmp_path / "out"
    said = imported("coco", source, folder, capsys)
    assert names_of(folder) == ["background", "dog", "cat", "unused"]
    classes = json.loads((folder / "classes.json").read_text())
    assert classes["ignore"] == 255 and classes["absent"] == ["unused"]
    for split in ("train", "val"):
        np.testing.assert_array_equal(labels_of(folder, split, "a"), EXPECTED)
        assert not labels_of(folder, split, "b").any()
        for name in ("a.png", "b.png"):
            original = source / f"{split}2017" / name
            copy = folder / "images" / split / name
            assert copy.read_bytes() == original.read_bytes() and not copy.is_symlink()
    rows = [line.split() for line in said.splitlines()]
    assert ["train", "2", "1", "2"] in rows and ["val", "2", "1", "2"] in rows
    # 2 splits of 2 images of 24 pixels.
    assert ["dog", "2", f"{100 * 2 * 10 / 96:.4f}"] in rows and ["cat", "2", f"{100 * 2 * 2 / 96:.4f}"] in rows
    assert ["(ignored)", f"{100 * 2 * 8 / 96:.4f}"] in rows and "nothing was skipped" in said
    prepared = builders.prepare("folder", source=folder, data_dir=tmp_path / "data")
    assert prepared.splits == {"train": 2, "val": 2}
    np.testing.assert_array_equal(prepared.load("train").labels[0], EXPECTED)


def test_more_than_254_categories_give_16_bit_masks(tmp_path, capsys):
    content = instances(categories=[{"id": k, "name": f"c{k}"} for k in range(400)])
    for annotation, category in zip(content["annotations"], (398, 141, 398), strict=True):
        annotation["category_id"] = category
    imported("coco", source_of(tmp_path / "coco", content), tmp_path / "out", capsys)
    # The background is class 0.
    expected = np.array([0, 142, 399], np.uint16)[np.where(EXPECTED == 255, 0, EXPECTED)]
    expected[EXPECTED == 255] = 65535
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), expected)
    prepared = builders.prepare("folder", source=tmp_path / "out", data_dir=tmp_path / "data")
    np.testing.assert_array_equal(prepared.load("train").labels[0], expected)
    assert prepared.spec.ignore_label == 65535 and len(set(prepared.spec.colors)) == 401


def test_a_single_category_of_crowds_does_not_give_masks_of_0_and_255(tmp_path, capsys):
    content = instances(categories=[{"id": 1, "name": "cat"}])
    for annotation in content["annotations"]:
        annotation |= {"category_id": 1, "iscrowd": 1}
    imported("coco", source_of(tmp_path / "coco", content), tmp_path / "out", capsys)
    assert np.unique(labels_of(tmp_path / "out", "train", "a")).tolist() == [0, 254]
    prepared = builders.prepare("folder", source=tmp_path / "out", data_dir=tmp_path / "data")
    assert prepared.spec.class_names == ("background", "cat")
    assert prepared.pixel_counts("train") == [48 - 12 - 8, 0]


@pytest.mark.parametrize(
    ("annotations", "images", "splits"),
    [
        # Roboflow, FiftyOne, CVAT, Label Studio, labelme2coco; names with folders.
        (["train/_annotations.coco.json", "valid/_annotations.coco.json"], "{split}/{name}", {"train", "val"}),
        (["labels.json"], "data/{name}", {"train"}),
        (["annotations/instances_default.json"], "images/default/{name}", {"train"}),
        (["result.json"], "images/{name}", {"train"}),
        (["annotations.json"], "JPEGImages/{name}", {"train"}),
        (["day.json", "night.json"], "images/{name}", {"day", "night"}),
        (["train_labels.json"], "pictures of june/training/{name}", {"train"}),
        (["labels.json"], "pictures of june/{name}", {"train"}),
    ],
)
def test_layouts_of_several_tools_are_found(tmp_path, capsys, annotations, images, splits):
    for name in annotations:
        write_json(tmp_path / "x" / name, instances())
        for stem in ("a.png", "b.png"):
            write(tmp_path / "x" / images.format(split=name.partition("/")[0], name=stem), picture(4, 6))
    imported("coco", tmp_path / "x", tmp_path / "out", capsys)
    assert {path.name for path in (tmp_path / "out/images").iterdir()} == splits
    for split in splits:
        np.testing.assert_array_equal(labels_of(tmp_path / "out", split, "a"), EXPECTED)


def test_crowds_are_counted_and_masks_of_only_crowds_give_a_hint(tmp_path, capsys):
    said = imported("coco", source_of(tmp_path / "x"), tmp_path / "out", capsys)
    assert "crowds, which get the ignore value: 1\n" in said and "CVAT" not in said
    content = instances()
    for annotation in content["annotations"][1:]:
        annotation["iscrowd"] = 1
    said = imported("coco", source_of(tmp_path / "y", content), tmp_path / "out y", capsys)
    assert "crowds, which get the ignore value: 2\n" in said and "set iscrowd to 0" in said


def test_classes_are_matched_by_name_regardless_of_ids(tmp_path, capsys):
    source = source_of(tmp_path / "x")
    # Cat is 3 and dog is 7 here, and there is a second cat, as Roboflow has it.
    others = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}, {"id": 1, "name": "cow"}]
    content = instances(categories=others)
    for annotation, category in zip(content["annotations"], (8, 7, 3), strict=True):
        annotation["category_id"] = category
    source_of(source, content, split="val2017")
    said = imported("coco", source, tmp_path / "out", capsys)
    assert "categories with the same name, which are one class: cat\n" in said
    assert names_of(tmp_path / "out") == ["background", "cow", "dog", "cat", "unused"]
    expected = np.where(EXPECTED == 255, 255, np.array([0, 2, 3], np.uint8)[np.where(EXPECTED == 255, 0, EXPECTED)])
    for split in ("train", "val"):
        np.testing.assert_array_equal(labels_of(tmp_path / "out", split, "a"), expected)


@pytest.mark.parametrize("kind", [str, float])
def test_ids_are_compared_as_numbers_regardless_of_type(tmp_path, capsys, kind):
    content = instances()
    for annotation in content["annotations"]:
        annotation |= {"image_id": kind(annotation["image_id"]), "category_id": kind(annotation["category_id"])}
    if kind is float:
        content["images"] = [image | {"height": 4.0, "width": 6.0} for image in content["images"]]
        content["annotations"][2]["iscrowd"] = 1.0
        # A polygon as pairs of coordinates, too.
        content["annotations"][0]["segmentation"] = [[1, 1], [2, 1], [2, 3], [1, 3]]
    imported("coco", source_of(tmp_path / "x", content), tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), EXPECTED)


def test_images_of_lvis_are_found_by_the_last_part_of_their_url(tmp_path, capsys):
    content = instances()
    for split in ("train2017", "val2017"):
        for image, name in zip(content["images"], ("a", "b"), strict=True):
            image.pop("file_name", None)
            image["coco_url"] = f"http://images.cocodataset.org/{split}/{name}.png"
            write(tmp_path / f"x/{split}/{name}.png", picture(4, 6, seed=len(split)))
        write_json(tmp_path / f"x/lvis_v1_{split[:-4]}.json", content)
    said = imported("coco", tmp_path / "x", tmp_path / "out", capsys)
    assert "nothing was skipped" in said and "names were changed" not in said
    for split in ("train", "val"):
        np.testing.assert_array_equal(labels_of(tmp_path / "out", split, "a"), EXPECTED)
        copy = (tmp_path / f"out/images/{split}/a.png").read_bytes()
        assert copy == (tmp_path / f"x/{split}2017/a.png").read_bytes()


@pytest.mark.parametrize("given", [[], [[]], [[1, 1, 2, 2]], None])
def test_the_box_of_an_object_without_a_valid_outline_is_ignored(tmp_path, capsys, given):
    content = changed("annotations", 0, segmentation=given, bbox=[1, 1, 1, 2])
    said = imported("coco", source_of(tmp_path / "x", content), tmp_path / "out", capsys)
    assert "their boxes get the ignore value: 1" in " ".join(said.split())
    # Objects lie above what is ignored.
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), drawn("1110## 1110## 1110## 1110##"))


def test_annotations_that_mark_no_pixel_are_refused(tmp_path, capsys):
    for number, segmentation in enumerate([[[1, 2, 3, 4]], [rectangle(9, 9, 12, 14)]]):
        content = instances(annotations=[{"image_id": 5, "category_id": 7, "segmentation": segmentation}])
        report = refused("coco", source_of(tmp_path / f"{number}", content), tmp_path / "out", capsys)
        assert ("objects outside their image", "fewer than three corners")[number == 0] in report


def panoptic_of(root, segments, *, category=7):
    """A source of one image; segments: 4 x 6 ids, of which 0 is unlabelled and 70,000 a crowd."""
    ids = np.array(segments)
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(colors).save(file, "PNG")
    write(root / "annotations/panoptic_val2017/a.png", file.getvalue())
    write(root / "val2017/a.png", picture(4, 6))
    content = instances()
    infos = [
        {"id": 300, "category_id": category, "iscrowd": 0},
        {"id": 7_000_001, "category_id": 3},
        {"id": 70_000, "category_id": 3, "iscrowd": 1},
    ]
    content |= {
        "images": content["images"][:1],
        "annotations": [{"image_id": 5, "file_name": "a.png", "segments_info": infos}],
    }
    write_json(root / "annotations/panoptic_val2017.json", content)
    return root


SEGMENTS = [[300] * 3 + [7_000_001] * 3, [0] * 2 + [70_000] * 4, [300] * 6, [7_000_001] * 6]


def test_panoptic_segments_are_read_from_the_colours_of_their_png(tmp_path, capsys):
    source = panoptic_of(tmp_path / "x", SEGMENTS)
    said = imported("coco", source, tmp_path / "out", capsys)
    # Unlabelled pixels are not background.
    expected = drawn("222111 ###### 222222 111111")
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "val", "a"), expected)
    assert (tmp_path / "out/images/val/a.png").read_bytes() == (source / "val2017/a.png").read_bytes()
    rows = [line.split() for line in said.splitlines()]
    assert ["val", "1", "0", "2"] in rows and ["cat", "1", f"{100 * 9 / 24:.4f}"] in rows
    assert "crowds, which get the ignore value: 1\n" in said and "nothing was skipped" in said
    json_file = source / "annotations/panoptic_val2017.json"
    imported("coco", json_file, tmp_path / "of a file", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "of a file", "val", "a"), expected)


def test_errors_in_panoptic_annotations_are_named(tmp_path, capsys):
    unknown = panoptic_of(tmp_path / "unknown", np.where(np.eye(4, 6), 301, SEGMENTS))
    assert "has the segment 301, which" in refused("coco", unknown, tmp_path / "out", capsys)
    category = panoptic_of(tmp_path / "category", SEGMENTS, category=99)
    assert "a category that is not listed: annotations/panoptic_val2017.json: annotations.0: 99" in refused(
        "coco", category, tmp_path / "out", capsys
    )
    for words in ("images with two panoptic annotations", "segments of one image with the same id"):
        twice = panoptic_of(tmp_path / words, SEGMENTS)
        content = json.loads((twice / "annotations/panoptic_val2017.json").read_text())
        listed = content["annotations"] if "annotations" in words else content["annotations"][0]["segments_info"]
        listed.append(listed[0] | {"category_id": 3})
        write_json(twice / "annotations/panoptic_val2017.json", content)
        assert words in refused("coco", twice, tmp_path / "out", capsys)
    size = panoptic_of(tmp_path / "size", SEGMENTS[:3])
    assert "has another size than its image" in refused("coco", size, tmp_path / "out", capsys)
    lacking = panoptic_of(tmp_path / "lacking", SEGMENTS)
    (lacking / "annotations/panoptic_val2017/a.png").unlink()
    assert "no image can be used" in refused("coco", lacking, tmp_path / "out", capsys)
    absent = panoptic_of(tmp_path / "absent", np.where(np.array(SEGMENTS) == 300, 0, SEGMENTS))
    said = imported("coco", absent, tmp_path / "out", capsys)
    assert "objects that cover no pixel: 1 annotations/panoptic_val2017.json: annotations.0: segment 300" in " ".join(
        said.split()
    )


def test_images_with_the_same_name_are_matched_by_split(tmp_path, capsys):
    write_json(tmp_path / "x/train_labels.json", instances())
    write_json(tmp_path / "x/val_labels.json", instances())
    data = {split: picture(4, 6, seed=seed) for seed, split in enumerate(("training", "validation", "more"))}
    for split, content in data.items():
        for name in ("a.png", "b.png"):
            write(tmp_path / "x" / split / name, content)
    said = imported("coco", tmp_path / "x", tmp_path / "out", capsys)
    assert (tmp_path / "out/images/train/a.png").read_bytes() == data["training"]
    assert (tmp_path / "out/images/val/a.png").read_bytes() == data["validation"]
    assert "images that no JSON file lists: 2 more/a.png more/b.png" in " ".join(said.split())


def test_absolute_paths_are_found_only_inside_the_source(tmp_path, capsys):
    content = instances()
    content["images"][0]["file_name"] = str(tmp_path / "x/train2017/a.png")
    content["images"][1]["file_name"] = str(tmp_path / "b.png")
    write(tmp_path / "b.png", picture(4, 6))
    said = imported("coco", source_of(tmp_path / "x", content, images=["a"]), tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), EXPECTED)
    assert "names lead out of the source" in " ".join(said.split())
    assert [path.name for path in (tmp_path / "out/images/train").iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["my%20image.png", "deep%2Fer/my%20image.png", "my%20im%C3%A4ge.png"])
def test_percent_encoded_names_are_decoded_to_find_files(tmp_path, capsys, name):
    plain = name.replace("%20", " ").replace("%2F", "/").replace("%C3%A4", "ä")
    content = changed("images", 0, file_name=name)
    source = source_of(tmp_path / "x", content, images=["b"])
    write(source / "train2017" / plain, picture(4, 6))
    imported("coco", source, tmp_path / "out", capsys)
    stem = plain.removesuffix(".png").replace("/", "_")
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", stem), EXPECTED)
    # A file of the name as it is written is that file.
    data = picture(4, 6, seed=9)
    write(source / "train2017" / name, data)
    said = imported("coco", source, tmp_path / "literal", capsys)
    stem = name.removesuffix(".png").replace("/", "_")
    assert (tmp_path / f"literal/images/train/{stem}.png").read_bytes() == data
    assert f"images that no JSON file lists: 1 train2017/{plain}" in " ".join(said.split())


def test_percent_encoding_cannot_leave_the_source_or_repeat_an_image(tmp_path, capsys):
    content = changed("images", 0, file_name="%2e%2e/secret.png")
    write(tmp_path / "secret.png", picture(4, 6))
    said = imported("coco", source_of(tmp_path / "x", content, images=["b"]), tmp_path / "out", capsys)
    assert [path.name for path in (tmp_path / "out/images/train").iterdir()] == ["b.png"] and "secret.png" in said
    content = changed("images", 0, file_name="%62.png")
    assert "lists twice" in refused("coco", source_of(tmp_path / "y", content), tmp_path / "out y", capsys)


def test_a_json_file_can_be_the_source(tmp_path, capsys):
    source = source_of(tmp_path / "x")
    imported("coco", source / "annotations/instances_train2017.json", tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), EXPECTED)


def test_colliding_hidden_and_odd_names_are_changed_and_reported(tmp_path, capsys):
    names = ["x/1.png", "y/1.png", "x_1.png", "X_1.PNG", ".a.png", "ä\nb.png", "t" * 230 + ".png", "..\\windows.png"]
    images = [{"id": k, "file_name": name, "height": 4, "width": 6} for k, name in enumerate(names)]
    source = source_of(tmp_path / "x", instances(images=images, annotations=[]), images=())
    for name in names[:-1]:
        write(source / "train2017" / name, picture(4, 6))
    said = imported("coco", source, tmp_path / "out", capsys)
    found = sorted(path.name for path in (tmp_path / "out/images/train").iterdir())
    (long,) = (name for name in found if name.startswith("ttt"))
    assert len(long) < 200
    # The hidden file is not read, as nowhere.
    assert found == sorted(["x_1.png", "y_1.png", "x_1_2.png", "X_1_3.png", "ä\\nb.png", long])
    assert sorted(path.name for path in (tmp_path / "out/labels/train").iterdir()) == found
    assert "images whose names were changed: 6" in said and "images that are missing: 1" in said
    assert "names lead out of the source; put them inside it, and correct the names: 1" in " ".join(said.split())


def test_skipped_annotations_are_counted_with_their_reason(tmp_path, capsys):
    content = instances()
    content["images"] += [
        {"id": 7, "file_name": "gone.png", "height": 4, "width": 6},
        {"id": 8, "file_name": "../secret.png", "height": 4, "width": 6},
        {"id": 9, "file_name": "damaged.png", "height": 4, "width": 6},
        {"id": 10, "file_name": "large.png", "height": 4, "width": 6},
        {"id": 11, "file_name": "deep.png"},
    ]
    content["annotations"] += [
        {"image_id": 99, "category_id": 7, "segmentation": [rectangle(1, 1, 2, 3)]},
        {"image_id": 6, "category_id": 7, "segmentation": [], "bbox": [1, 1, 2, 3]},
        {"image_id": 6, "category_id": 7},
        {"image_id": 6, "category_id": 7, "segmentation": [[1, 1, 2, 3]]},
        {"image_id": 6, "category_id": 7, "segmentation": [rectangle(8, 1, 9, 3)]},
        {"image_id": 6, "category_id": 7, "segmentation": [rectangle(4, 0, 6, 4), [1, 2]]},
        {"image_id": 6, "category_id": 3, "segmentation": rectangle(0, 3, 1, 4)},
        {"image_id": 6, "category_id": 3, "segmentation": {"counts": "zz", "size": [4, 6]}},
    ]
    source = source_of(tmp_path / "x", content)
    write(tmp_path / "secret.png", picture(4, 6))
    write(source / "train2017/damaged.png", picture(4, 6)[:-30])
    write(source / "train2017/large.png", picture(8, 12))
    write(source / "train2017/deep.png", b"II*\0" + bytes(50))
    write_json(source / "annotations/captions_train2017.json", {})
    said = imported("coco", source, tmp_path / "out", capsys)
    lines = said.replace("\n  ", " ").splitlines()
    flat = " ".join(said.split())
    for reason in (
        "annotations of images that the same file does not list: 1",
        "objects with a box but no outline; their boxes get the ignore value: 1",
        "objects with neither an outline nor a box: 1",
        "outlines with fewer than three corners, or an incomplete one: 1",
        "an incomplete one, of objects that have others: 1",
        "objects outside their image: 1",
        "run-length encodings that are damaged, or of another size than their image: 1",
        "images that are missing: 1",
        "images whose names lead out of the source; put them inside it, and correct the names: 1",
        "images of another size (height x width) than their annotations state: 1",
        "images that cannot be used: 2",
        "JSON files next to those of the instances: 1",
    ):
        assert reason in flat, lines
    assert "large.png: 8 x 12, annotated 4 x 6" in flat and "deep.png: is not PNG" in flat
    assert sorted(path.name for path in (tmp_path / "out/images/train").iterdir()) == ["a.png", "b.png"]
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "b"), drawn("000022 0##022 0##022 1##022"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (changed("annotations", 1, category_id=4), ["a category that is not listed", "annotations.1: 4"]),
        (changed("annotations", 2, category_id=4), ["a category that is not listed", "annotations.2: 4"]),
        (instances(images=[{"id": 5, "coco_url": "http://[a"}, {"id": 6}]), ["images.1: no file_name"]),
        (changed("annotations", 1, segmentation=[[1, "x"]]), ["annotations.1: segmentation"]),
        (changed("annotations", 1, segmentation=[[1, 2, float("nan")] * 2]), ["annotations.1: segmentation"]),
        (changed("annotations", 1, image_id=None), ["annotations.1: image_id"]),
        (changed("images", 1, file_name=3), ["images.1: file_name"]),
        (changed("images", 1, id=5), ["images with the same id", "5"]),
        (changed("images", 1, file_name="a.png"), ["lists twice", "a.png"]),
        (changed("categories", 1, id=7), ["one id and two names", "7 is 'cat' and 'dog'"]),
        (changed("categories", 1, name=" "), ["classes without a name"]),
        (instances(categories=[{"id": k, "name": f"c{k}"} for k in range(70_000)]), ["70000 classes", "65534"]),
        (instances(annotations=[{"image_id": 5, "category_id": 7, "bbox": [0, 0, 3, 3]}]), ["only boxes"]),
        (instances(annotations=[{"image_id": 5, "segments_info": []}]), ["annotations.0: file_name is missing"]),
        (instances(annotations=[{"image_id": 5, "caption": "x"}]), ["captions"]),
        ({"images": []}, ["without annotations, categories"]),
        ({"shapes": []}, ["segjax data import labelme"]),
        (instances(images=[]), ["no image can be used"]),
        ([], ["not a JSON object"]),
    ],
)
def test_contradictory_annotations_are_refused_and_named(tmp_path, capsys, content, said):
    report = refused("coco", source_of(tmp_path / "x", content), tmp_path / "out", capsys)
    assert [part for part in said if part not in report] == [], report


@pytest.mark.parametrize("data", [b"", b'{"images": [', b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_damaged_json_is_refused_and_named(tmp_path, capsys, data):
    source = source_of(tmp_path / "x")
    write(source / "annotations/instances_val2017.json", data)
    if data == b"{}":
        # The other split is there.
        assert "instances_val2017.json: without images" in imported("coco", source, tmp_path / "out", capsys)
    else:
        assert "instances_val2017.json" in refused("coco", source, tmp_path / "out", capsys)


def test_a_file_that_is_not_json_is_refused(tmp_path, capsys):
    for name in ("x.zip", ".hidden.json"):
        write(tmp_path / "x" / name, b"PK")
        assert "unpack an archive first" in refused("coco", tmp_path / "x" / name, tmp_path / "out", capsys)
    assert "no .json" in refused("coco", tmp_path / "x", tmp_path / "out", capsys)


def test_two_files_of_one_split_are_refused(tmp_path, capsys):
    source = source_of(tmp_path / "x")
    write_json(source / "annotations/instances_train2014.json", instances())
    report = refused("coco", source, tmp_path / "out", capsys)
    assert "several JSON files of one split" in report and "instances_train2014.json" in report


@pytest.mark.parametrize(("height", "width", "expected"), [(6, 4, 4), (4, 6, 6)])
def test_an_image_rotated_by_exif_is_written_as_its_annotations_expect(tmp_path, capsys, height, width, expected):
    # Stored as 6 x 4, shown as 4 x 6.
    content = instances(images=[{"id": 5, "file_name": "a.jpg", "height": height, "width": width}])
    content["annotations"] = [content["annotations"][0] | {"segmentation": [rectangle(0, 0, 2, 1)]}]
    source = source_of(tmp_path / "x", content, images=())
    write(source / "train2017/a.jpg", turned(6, 4))
    imported("coco", source, tmp_path / "out", capsys)
    labels = labels_of(tmp_path / "out", "train", "a")
    assert labels.shape == (height, width) and labels.sum() == 2 * 2 and labels.shape[1] == expected
    stored = codec.decode_image((source / "train2017/a.jpg").read_bytes())
    written = codec.decode_image((tmp_path / "out/images/train/a.png").read_bytes())
    np.testing.assert_array_equal(written, stored if height == 6 else np.rot90(stored, -1))


def test_an_image_rotated_by_180_degrees_by_exif_is_skipped(tmp_path, capsys):
    source = source_of(tmp_path / "x")
    write(source / "train2017/a.png", turned(4, 6, orientation=3))
    said = imported("coco", source, tmp_path / "out", capsys)
    assert "with annotations that fit either way" in said and "train2017/a.png" in said
    assert [path.name for path in (tmp_path / "out/images/train").iterdir()] == ["b.png"]
