"""Coloured masks, RGB or with a palette: every colour becomes its label, or an error names it."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from segjax.data import builders, masks, palettes, specs
from segjax.data.codec import StoredMask
from segjax.data.sources import DataError
from tests.pixels import scene

SIZE = (14, 23)
NAMES, COLORS = ("road", "tree", "car"), ((90, 80, 70), (0, 255, 0), (10, 20, 30))
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def png(image, kind="PNG"):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


def labels_of(seed, values):
    return np.random.default_rng(seed).choice(np.array(values), SIZE)


def rgb_of(labels, colors):
    """uint8 (H, W, 3) of labels, which are keys of `colors`."""
    image = np.zeros((*labels.shape, 3), np.uint8)
    for label, color in colors.items():
        image[labels == label] = color
    return image


def indexed(indices, colors):
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette([part for color in colors for part in color])
    return image


def folder(root, contents, classes):
    """A folder with these masks, content of files by name, to train on."""
    for part in ("images", "labels"):
        (root / part / "train").mkdir(parents=True)
    (root / "classes.json").write_text(json.dumps(classes))
    for name, content in contents.items():
        (root / f"images/train/{name}.png").write_bytes(png(scene(0, *SIZE)))
        (root / f"labels/train/{name}.png").write_bytes(content)
    return root


def prepare(tmp_path, contents, **classes):
    root = folder(tmp_path / "folder", contents, {"names": NAMES} | classes)
    return builders.prepare("folder", source=root, data_dir=tmp_path / "data")


def refused(tmp_path, contents, **classes):
    with pytest.raises(DataError) as error:
        prepare(tmp_path, contents, **classes)
    assert not (tmp_path / "data").exists()
    return str(error.value)


def expect(prepared, labels, ignore=255):
    records = prepared.records("train")
    assert list(records.names) == sorted(labels)
    for number, name in enumerate(records.names):
        np.testing.assert_array_equal(records[number][1], labels[name], err_msg=name)
    counted = np.concatenate([each[each != ignore] for each in labels.values()])
    assert prepared.pixel_counts("train") == np.bincount(counted, minlength=len(prepared.spec.label_names)).tolist()


@pytest.mark.parametrize("seed", [0, 4])
def test_every_kind_of_mask_is_read_with_the_colours_of_classes_json(seed, tmp_path, capsys):
    colors = dict(enumerate(COLORS)) | {255: WHITE}
    labels = {name: labels_of(seed + i, [0, 1, 2, 255]) for i, name in enumerate("abcde")}
    alpha = np.full((*SIZE, 1), 255, np.uint8)
    # The order of the palette is not that of the classes.
    order = np.zeros(256, np.uint8)
    order[[0, 1, 2, 255]] = 3, 2, 0, 1
    by_index = [colors[label] for label in (2, 255, 1, 0)]
    prepared = prepare(
        tmp_path,
        {
            "a": png(rgb_of(labels["a"], colors)),
            "b": png(np.concatenate([rgb_of(labels["b"], colors), alpha], axis=2)),
            "c": png(indexed(order[labels["c"]], by_index)),
            "d": png(rgb_of(labels["d"], colors), "BMP"),
            "e": png(labels["e"].astype(np.uint8)),
        },
        colors=COLORS,
        ignore_colors=[WHITE],
    )
    expect(prepared, labels)
    said = " ".join(capsys.readouterr().out.split())
    assert '3 RGB masks are read by their colours, by "colors" in classes.json' in said
    assert "1 palette masks are read by their colours" in said


# Names of classes, and the label of some colours, as published.
PUBLISHED = {
    "Cityscapes": (
        ("car", "road", "traffic light"),
        {0: (0, 0, 142), 1: (128, 64, 128), 2: (250, 170, 30), 255: BLACK, 254: (250, 170, 160), 253: (111, 74, 0)},
    ),
    "VOC": (
        ("background", "person", "tv monitor"),
        {0: BLACK, 1: (192, 128, 128), 2: (0, 64, 128), 255: (224, 224, 192)},
    ),
    "ADE20K": (("bed", "wall", "flag"), {0: (204, 5, 255), 1: (120, 120, 120), 2: (92, 0, 255), 255: BLACK}),
    "CamVid": (
        ("sky", "building", "bicyclist"),
        {0: (128, 128, 128), 1: (128, 0, 0), 2: (0, 128, 192), 254: (192, 0, 128), 253: (192, 0, 192), 255: BLACK},
    ),
}
# Labels above that count as others: what is not evaluated, and groups.
MEANS = {"Cityscapes": {254: 255, 253: 255}, "CamVid": {254: 1, 253: 2}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_colours_masks_are_read_with_a_published_palette(name, tmp_path, capsys):
    names, colors = PUBLISHED[name]
    drawn = {stem: labels_of(seed, list(colors)) for seed, stem in enumerate("ab")}
    prepared = prepare(tmp_path, {stem: png(rgb_of(each, colors)) for stem, each in drawn.items()}, names=names)
    means = MEANS.get(name, {})
    labels = {stem: np.vectorize(lambda label: means.get(label, label))(each) for stem, each in drawn.items()}
    expect(prepared, labels)
    assert f"by the palette of {name}" in " ".join(capsys.readouterr().out.split())
    assert prepared.spec.colors == tuple(colors[label] for label in range(3)) and prepared.spec.ignore_label == 255


def test_all_classes_of_published_palettes_are_known_by_name():
    for spec in (specs.CITYSCAPES, specs.VOC, specs.CAMVID):
        assert palettes.known_colors(spec.class_names) == list(spec.colors)
        (found, *_) = palettes.palettes_for(spec, has_colors=True, ignored=[])
        mask = np.arange(spec.num_classes)[None]
        np.testing.assert_array_equal(found.of(palettes.packed(np.array(spec.colors, np.uint8)[mask])), mask)
    assert palettes.known_colors(specs.ADE20K.class_names) == list(specs.ADE20K.colors)


# As in labels.py and label_colors.txt.
OTHERS = {
    "Cityscapes": [
        *("dynamic 111 74 0", "ground 81 0 81", "parking 250 170 160", "rail track 230 150 140", "tunnel 150 120 90"),
        *("guard rail 180 165 180", "bridge 150 100 100", "caravan 0 0 90", "trailer 0 0 110", "unlabeled 0 0 0"),
    ],
    "CamVid": [
        *("Animal 64 128 64", "Archway 192 0 128", "Bicyclist 0 128 192", "Bridge 0 128 64", "Building 128 0 0"),
        *("Car 64 0 128", "CartLuggagePram 64 0 192", "Child 192 128 64", "Column_Pole 192 192 128", "Fence 64 64 128"),
        *("LaneMkgsDriv 128 0 192", "LaneMkgsNonDriv 192 0 64", "Misc_Text 128 128 64", "Road 128 64 128"),
        *("MotorcycleScooter 192 0 192", "OtherMoving 128 64 64", "ParkingBlock 64 192 128", "Pedestrian 64 64 0"),
        *(
            "RoadShoulder 128 128 192",
            "Sidewalk 0 0 192",
            "SignSymbol 192 128 128",
            "Sky 128 128 128",
            "Tree 128 128 0",
        ),
        *("SUVPickupTruck 64 128 192", "TrafficCone 0 0 64", "TrafficLight 0 64 64", "Train 192 64 128"),
        *("Truck_Bus 192 128 192", "Tunnel 64 0 64", "VegetationMisc 192 192 0", "Void 0 0 0", "Wall 64 192 0"),
    ],
}


@pytest.mark.parametrize("name", OTHERS)
def test_colours_that_a_benchmark_does_not_evaluate_are_also_known(name):
    entries = [text.rsplit(" ", 3) for text in OTHERS[name]]
    names = [entry[0] for entry in entries]
    colors = [tuple(map(int, entry[1:])) for entry in entries]
    own = dict(zip(names, colors, strict=True))
    spec = specs.DatasetSpec("own", tuple(names), tuple(colors), 255)
    (found,) = (each for each in palettes.palettes_for(spec, has_colors=False, ignored=[]) if name in each.name)
    for label, each in enumerate(names):
        assert found.of(palettes.packed(np.array(own[each], np.uint8))) == label


def test_a_colour_of_two_classes_is_refused_where_it_occurs(tmp_path):
    labels = labels_of(0, [0, 1])
    colors = {0: (140, 140, 140), 1: (120, 120, 120)}
    message = refused(tmp_path, {"a": png(rgb_of(labels, colors))}, names=["road", "skyscraper", "wall"])
    assert f"[140, 140, 140]: {np.sum(labels == 0)} pixels in 1 masks" in message
    assert "it is the colour of several classes" in message


@pytest.mark.parametrize("seed", [1, 2])
def test_unknown_colours_are_listed_with_their_pixels_and_places(seed, tmp_path):
    image = rgb_of(labels_of(seed, [0, 1]), dict(enumerate(COLORS)))
    image[3, 5:9] = image[9, 2] = (1, 2, 3)
    image[12, 22] = WHITE
    other = np.full_like(image, 255)
    message = refused(tmp_path, {"b": png(other), "a": png(image)}, colors=COLORS)
    assert '"ignore_colors"' in message
    number = 1 + SIZE[0] * SIZE[1]
    white = f"[255, 255, 255]: {number} pixels in 2 masks, first in labels/train/a.png, row 12, column 22"
    assert f"{white}\n    [1, 2, 3]: 5 pixels in 1 masks, first in labels/train/a.png, row 3, column 5" in message


def test_for_a_mask_of_many_colours_the_most_frequent_ones_are_named(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    image[0, :4] = (7, 7, 9)
    message = refused(tmp_path, {"a": png(image)}, colors=COLORS)
    assert "\n    [7, 7, 9]: 4 pixels in 1 masks, first in labels/train/a.png, row 0, column 0\n" in message
    assert message.count(" pixels in 1 masks") == 10 and "and 1 more" in message


def test_grey_that_was_saved_as_rgb_is_refused_with_advice(tmp_path):
    grey = np.repeat(labels_of(0, [0, 1, 2]).astype(np.uint8)[..., None], 3, axis=2)
    message = refused(tmp_path, {"a": png(grey)}, colors=COLORS)
    assert "all colours are grey: if they are ids, save one channel as 8-bit grey" in message


def test_palette_masks_without_class_colours_are_read_by_their_indices(tmp_path, capsys):
    labels = {name: labels_of(seed, [0, 1, 2, 255]) for seed, name in enumerate("ab")}
    colors = [BLACK, (128, 0, 0), (0, 128, 0), *[(9, 9, 9)] * 252, WHITE]
    expect(prepare(tmp_path, {name: png(indexed(each, colors)) for name, each in labels.items()}), labels)
    assert "2 palette masks are read by their indices, which are class ids" in " ".join(capsys.readouterr().out.split())


def test_ambiguous_palette_masks_are_refused(tmp_path):
    # By the indices 0 is a road, by the colours of Cityscapes a car.
    colors = [(0, 0, 142), (107, 142, 35), (128, 64, 128)]
    mask = png(indexed(labels_of(0, [0, 1, 2]), colors))
    message = refused(tmp_path, {"a": mask}, names=["road", "vegetation", "car"])
    assert "palette masks whose indices mean other classes than their colours" in message
    names = {"names": ["road", "vegetation", "car"], "colors": [colors[2], colors[1], colors[0]]}
    prepared = builders.prepare("folder", source=folder(tmp_path / "b", {"a": mask}, names), data_dir=tmp_path / "data")
    expect(prepared, {"a": 2 - labels_of(0, [0, 1, 2])})


def test_class_colours_at_other_indices_rule_out_the_indices(tmp_path):
    mask = png(indexed(labels_of(0, [0, 1, 2]), [COLORS[1], COLORS[0], (50, 60, 70)]))
    message = refused(tmp_path, {"a": mask}, colors=COLORS)
    assert "[50, 60, 70]: " in message


@pytest.mark.parametrize("names, colors", [(["polyp"], [(255, 0, 0)]), (["tissue", "polyp"], None)])
def test_binary_masks_are_black_and_white_in_every_kind_of_file(names, colors, tmp_path):
    labels = {name: labels_of(seed, [0, 1]) for seed, name in enumerate("abcd")}
    made = {
        "a": png(rgb_of(labels["a"], {0: BLACK, 1: WHITE})),
        "b": png(Image.fromarray(labels["b"].astype(bool))),
        "c": png(indexed(labels["c"], [BLACK, WHITE])),
        "d": png(Image.fromarray(labels["d"].astype(bool)), "BMP"),
    }
    expect(prepare(tmp_path, made, names=names, **({"colors": colors} if colors else {})), labels)


def test_a_single_class_has_its_colour_on_black(tmp_path):
    labels = labels_of(3, [0, 1])
    made = {"a": png(rgb_of(labels, {0: BLACK, 1: (255, 0, 0)}))}
    expect(prepare(tmp_path, made, names=["polyp"], colors=[(255, 0, 0)]), {"a": labels})


def test_black_may_be_ignored_next_to_a_single_class(tmp_path):
    labels = labels_of(3, [1, 255])
    made = {"a": png(rgb_of(labels, {255: BLACK, 1: (255, 0, 0)}))}
    prepared = prepare(tmp_path, made, names=["polyp"], colors=[(255, 0, 0)], ignore_colors=[BLACK])
    expect(prepared, {"a": labels})


def test_names_are_enough_for_masks_of_ids(tmp_path):
    labels = {"a": labels_of(0, [0, 1, 2, 255])}
    prepared = prepare(tmp_path, {"a": png(labels["a"].astype(np.uint8))})
    expect(prepared, labels)
    assert prepared.spec.ignore_label == 255 and len(set(prepared.spec.colors)) == 3
    assert len(set(specs.distinct_colors(5000))) == 5000


def test_an_interrupted_preparation_keeps_its_measured_colours(tmp_path):
    mask = StoredMask(rgb_of(labels_of(0, [0, 1]), dict(enumerate(COLORS))), None)
    colors = palettes.colors_of(mask, [])
    measured = masks.Measured(SIZE, ((3, 4), (5, 6)), ("x", None), colors, is_stored=True, rotation="either")
    scratch = masks.Scratch(tmp_path / "scratch")
    with scratch.journal() as write:
        write("train", "a", measured)
        write("train", "b", masks.Measured(SIZE, (), ("x", "y")))
    assert scratch.checked() == {
        ("train", "a"): measured,
        ("train", "b"): masks.Measured(SIZE, (), ("x", "y")),
    }
