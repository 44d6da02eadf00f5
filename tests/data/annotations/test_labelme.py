"""labelme's files, with their images next to them or inside, become a folder that can be prepared."""

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from segjax.data import builders, codec
from tests.made_annotations import drawn, imported, labels_of, names_of, picture, refused, turned, write_json
from tests.made_archives import write

CAT = {"label": "cat", "points": [[1, 1], [3, 3]], "shape_type": "rectangle"}
DOG = {"label": "dog", "points": [[0, 0], [6, 0], [6, 3], [0, 3]], "shape_type": "polygon", "group_id": None}


def file_of(*shapes, image="a.png", size=(4, 7), **more):
    return {"version": "5", "shapes": list(shapes), "imagePath": image, "imageData": None} | (
        {"imageHeight": size[0], "imageWidth": size[1]} | more
    )


def test_the_folder_is_written_with_counts_and_can_be_prepared(tmp_path, capsys):
    source = tmp_path / "x"
    ignored = {"label": "__ignore__", "points": [[5, 2], [7, 4]], "shape_type": "rectangle"}
    hole = {"label": "_background_", "points": [[4, 0], [5, 1]], "shape_type": "rectangle"}
    write_json(source / "train/a.json", file_of(CAT, DOG, ignored, hole))
    write(source / "train/a.png", picture(4, 7, seed=1))
    write_json(source / "val/deep/b.json", file_of(CAT, image="..\\b.jpg"))
    write(source / "val/b.jpg", picture(4, 7, seed=2, kind="JPEG"))
    write_json(source / "c.json", file_of())
    write(source / "c.png", picture(4, 7, seed=3))
    write(source / "d.bmp", picture(4, 7, seed=4, kind="BMP"))
    said = imported("labelme", source, tmp_path / "out", capsys)
    assert names_of(tmp_path / "out") == ["background", "cat", "dog"]
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), drawn("2222020 2112220 211222# 00000##"))
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "val", "b"), drawn("0000000 0110000 0110000 0000000"))
    rows = [line.split() for line in said.splitlines()]
    assert ["train", "3", "2", "3"] in rows and ["val", "1", "0", "1"] in rows and ["cat", "2", "7.1429"] in rows
    flat = " ".join(said.split())
    # c.json names an image that is not there, and c.png is next to it.
    assert "which are background; remove them if they are not annotated yet: 1 d.bmp" in flat
    assert "images converted to PNG because of their format or orientation: 1" in flat
    found = builders.prepare("folder", source=tmp_path / "out", data_dir=tmp_path / "data")
    assert found.splits == {"train": 3, "val": 1}


def test_the_embedded_image_is_used_if_there_is_no_other(tmp_path, capsys):
    data = picture(4, 7, seed=5)
    write_json(tmp_path / "x/a.json", file_of(CAT, imageData=base64.b64encode(data).decode()))
    write_json(tmp_path / "x/b.json", file_of(DOG, image="b.png", imageData="no base64"))
    said = imported("labelme", tmp_path / "x", tmp_path / "out", capsys)
    assert (tmp_path / "out/images/train/a.png").read_bytes() == data
    assert "b.json: imageData is not base64" in " ".join(said.split())


def test_images_that_were_moved_are_found_by_name_in_the_same_split(tmp_path, capsys):
    for seed, split in enumerate(("train", "val")):
        # Both splits have an image of this name; another name was written on Windows, and in another case.
        write(tmp_path / f"x/images/{split}/a.png", picture(4, 7, seed=seed))
        write(tmp_path / f"x/images/{split}/{split}.PNG", picture(4, 7, seed=seed + 2))
        inside = base64.b64encode(picture(4, 7)).decode()
        write_json(tmp_path / f"x/labels/{split}/a.json", file_of(CAT, imageData=inside))
        write_json(tmp_path / f"x/labels/{split}/b.json", file_of(DOG, image=f"C:\\me\\{split}.png"))
    said = imported("labelme", tmp_path / "x", tmp_path / "out", capsys)
    assert "nothing was skipped" in said
    for seed, split in enumerate(("train", "val")):
        assert labels_of(tmp_path / "out", split, "images_a").max() == 1
        assert labels_of(tmp_path / "out", split, f"images_{split}").max() == 2
        assert (tmp_path / f"out/images/{split}/images_a.png").read_bytes() == picture(4, 7, seed=seed)


def test_a_circle_covers_the_pixels_within_its_radius(tmp_path, capsys):
    circle = {"label": "ball", "points": [[20, 16], [20, 25.5]], "shape_type": "circle"}
    write_json(tmp_path / "x/a.json", file_of(circle, size=(32, 41)))
    write(tmp_path / "x/a.png", picture(32, 41))
    imported("labelme", tmp_path / "x", tmp_path / "out", capsys)
    labels = labels_of(tmp_path / "out", "train", "a")
    y, x = np.mgrid[:32, :41] + 0.5
    distance = np.hypot(x - 20, y - 16)
    # A fifth of a pixel is the grid of corners.
    assert labels[distance < 9.3].all() and not labels[distance > 9.7].any()
    assert abs(labels.sum() / (math.pi * 9.5**2) - 1) < 0.03


def test_a_mask_is_placed_in_its_box(tmp_path, capsys):
    mask = np.array([[1, 0, 1], [0, 1, 1]], np.uint8)
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    points = [[2.0, 1.0], [4.0, 2.0]]
    shape = {"label": "m", "points": points, "shape_type": "mask", "mask": base64.b64encode(file.getvalue()).decode()}
    write_json(tmp_path / "x/a.json", file_of(shape))
    write(tmp_path / "x/a.png", picture(4, 7))
    imported("labelme", tmp_path / "x", tmp_path / "out", capsys)
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "train", "a"), drawn("0000000 0010100 0001100 0000000"))


def test_annotations_refer_to_the_image_after_exif_rotation(tmp_path, capsys):
    write_json(tmp_path / "x/a.json", file_of(CAT, image="a.jpg", size=(4, 7)))
    write(tmp_path / "x/a.jpg", turned(7, 4))
    imported("labelme", tmp_path / "x", tmp_path / "out", capsys)
    assert labels_of(tmp_path / "out", "train", "a").shape == (4, 7)
    assert codec.size_of((tmp_path / "out/images/train/a.png").read_bytes()) == (4, 7)


def test_skipped_annotations_are_counted_with_their_reason(tmp_path, capsys):
    shapes = [
        CAT,
        {"label": "dog", "points": [[0, 0], [6, 0]], "shape_type": "line"},
        {"label": "dog", "points": [[0, 0]], "shape_type": "point"},
        {"label": "dog", "points": [[0, 0], [6, 0]], "shape_type": "polygon"},
        {"label": "dog", "points": [[0, 0], [6, 0], [1, 1]], "shape_type": "spline"},
        {"label": "dog", "points": [[0, 0], [1, 1]], "shape_type": "mask", "mask": "??"},
        {"label": "dog", "points": [[9, 0], [11, 1]], "shape_type": "rectangle"},
    ]
    write_json(tmp_path / "x/a.json", file_of(*shapes))
    write(tmp_path / "x/a.png", picture(4, 7))
    write_json(tmp_path / "x/b.json", file_of(DOG, image="../b.png"))
    write_json(tmp_path / "x/c.json", file_of(DOG, image="sub/c.png"))
    write_json(tmp_path / "x/d.json", file_of(DOG, image="d.png", size=(9, 9)))
    write(tmp_path / "x/d.png", picture(4, 7))
    write_json(tmp_path / "x/project.json", {"name": "mine"})
    write(tmp_path / "b.png", picture(4, 7))
    flat = " ".join(imported("labelme", tmp_path / "x", tmp_path / "out", capsys).split())
    for reason in (
        "lines and points, which have no area: 2 a.png: shape 1, dog: line a.png: shape 2, dog: point",
        "or an incomplete one: 1 a.png: shape 3, dog: polygon",
        "shapes of an unknown type: 1 a.png: shape 4, dog: spline",
        "masks inside annotations that are damaged, or do not fit their image: 1 a.png: shape 5",
        "objects outside their image: 1 a.png: shape 6",
        "names lead out of the source; put them inside it, and correct the names: 1 b.json",
        "images that are missing: 1 c.json: sub/c.png",
        "annotations state: 1 d.png: 4 x 7, annotated 9 x 9",
        "JSON files without shapes, which are not labelme's: 1 project.json",
    ):
        assert reason in flat
    assert [path.name for path in (tmp_path / "out/images/train").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", ["JSON files that are damaged", "b.json"]),
        ({"shapes": [{"label": "cat"}]}, ["b.json: shapes.0.points is missing"]),
        ({"shapes": [{"label": "cat", "points": [[1, 2, 3]]}]}, ["b.json: shapes.0.points.0"]),
        (file_of(CAT), ["several JSON files of one image", "b.json: a.png"]),
        (file_of(DOG, {**CAT, "label": " "}), ["shapes without a label", "b.json: shape 1"]),
        (
            file_of({**CAT, "label": None}, DOG, {**CAT, "label": ""}),
            ['"__ignore__"', "b.json: shape 0 b.json: shape 2"],
        ),
        (file_of({"points": CAT["points"]}), ["b.json: shapes.0.label is missing"]),
    ],
)
def test_a_damaged_file_stops_the_import(tmp_path, capsys, content, said):
    write_json(tmp_path / "x/a.json", file_of(CAT))
    for name in ("a.png", "b.png"):
        write(tmp_path / "x" / name, picture(4, 7))
    if isinstance(content, bytes):
        write(tmp_path / "x/b.json", content)
    else:
        write_json(tmp_path / "x/b.json", content)
    report = refused("labelme", tmp_path / "x", tmp_path / "out", capsys)
    assert [part for part in said if part not in report] == [], report


def test_a_source_without_labelme_files_is_refused(tmp_path, capsys):
    write(tmp_path / "x/a.png", picture(4, 7))
    assert "no JSON file of labelme" in refused("labelme", tmp_path / "x", tmp_path / "out", capsys)
    assert "no folder" in refused("labelme", tmp_path / "x/a.png", tmp_path / "out", capsys)
