"""Splits by a share, determined by the seed, that keep groups together; and subsets of published datasets."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import segjax
from segjax.commands.data import main
from segjax.data import Division, builders, open_splits, specs
from segjax.data.division import divided
from segjax.data.sources import DataError, Example, File
from segjax.train import unset
from segjax.train.config import RunError
from tests import runs
from tests.made_archives import Made
from tests.pixels import Pixels, scene

SIZE = (17, 24)


def make(root, names, *, splits=("all_images",)):
    """A folder with an image and a mask of three classes of each name; "" for one without folders of splits."""
    for split in splits:
        for number, name in enumerate(names):
            for part in ("images", "labels"):
                (root / part / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene(number, *SIZE)).save(root / "images" / split / f"{name}.png")
            mask = np.random.default_rng(number).integers(0, 3, SIZE).astype(np.uint8)
            Image.fromarray(mask).save(root / "labels" / split / f"{name}.png")
    (root / "classes.json").write_text(json.dumps({"name": "toy", "names": ["a", "b", "c"]}))
    return root


def examples_of(names, split="images"):
    file = File("x", 1, lambda: b"")
    return {split: [Example(name, file, file) for name in sorted(names)]}


def names_of(examples):
    return {split: {example.name for example in found} for split, found in examples.items()}


def divide(names, *how):
    problems, notes = {}, []
    result = divided(examples_of(names), Division(*how), problems, notes)
    assert not problems
    return names_of(result)


NAMES = [f"image{number:03d}" for number in range(200)]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_division_has_the_requested_share_and_depends_on_the_seed(share, seed):
    parts = divide(NAMES, share, seed)
    assert len(parts["val"]) == round(share * 200) and parts["train"] | parts["val"] == set(NAMES)
    assert not parts["train"] & parts["val"]
    assert divide(NAMES[::-1], share, seed) == parts
    assert divide(NAMES, share, seed + 1) != parts


def test_adding_images_hardly_changes_the_splits_of_the_others():
    before, after = divide(NAMES, 0.2), divide([*NAMES, *(f"new{number}" for number in range(40))], 0.2)
    assert len(before["val"] - after["val"]) <= 8


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", [r"^patient\d+", r"_(eye\d)"])
def test_groups_stay_together_and_the_share_is_as_close_as_possible(seed, pattern):
    rng = np.random.default_rng(seed)
    names = [f"patient{rng.integers(12)}_eye{rng.integers(5)}_{number}" for number in range(90)]
    parts = divide(names, 0.3, seed, pattern)
    groups = {split: {name.split("_")["patient" not in pattern] for name in found} for split, found in parts.items()}
    assert groups["train"] and groups["val"] and not groups["train"] & groups["val"]
    largest = max(sum(group in name.split("_") for name in names) for group in groups["train"] | groups["val"])
    assert abs(len(parts["val"]) - 27) <= largest


def test_two_groups_go_to_different_splits():
    parts = divide(["a1", "a2", "a3", "b1"], 0.01, 0, "^.")
    assert {frozenset(found) for found in parts.values()} == {frozenset({"a1", "a2", "a3"}), frozenset({"b1"})}


@pytest.mark.parametrize(
    "names, how, said",
    [
        (["a1", "b"], (0.5, 0, r"\d"), "images without a group: their name does not match '\\\\d': b"),
        (["a1", "a2"], (0.5, 0, "^a"), "too few groups to divide; there must be two: 1 in images: a"),
        (["a1"], (0.5,), "too few groups"),
    ],
)
def test_images_that_cannot_be_divided_are_named(names, how, said):
    from collections import defaultdict

    problems = defaultdict(list)
    divided(examples_of(names), Division(*how), problems, [])
    assert said in "; ".join(f"{kind}: {', '.join(entries)}" for kind, entries in problems.items())


@pytest.mark.parametrize(
    "how, said", [((0.0,), "between 0 and 1"), ((1.0,), "between"), ((0.5, 0, "("), "not a regular")]
)
def test_an_invalid_division_is_refused(how, said):
    with pytest.raises(DataError, match=said):
        Division(*how)


# --------------------------------------------------------------------------------------------------------- the command


def prepare(root, tmp_path, *more):
    return main(["prepare", "folder", "--source", str(root), "--data-dir", str(tmp_path / "data"), *more])


def splits_of(root, tmp_path):
    """Names by split of what a training from this source opens."""
    prepared = builders.prepare("folder", source=root, data_dir=tmp_path / "data")
    return {split: set(prepared.records(split).names) for split in prepared.splits}


@pytest.mark.parametrize("splits", [("all_images",), ("train",), ("",)])
def test_the_only_split_is_divided_and_kept(splits, tmp_path, capsys):
    names = [f"scene{number % 5}_{number}" for number in range(20)]
    root = make(tmp_path / "folder", names, splits=splits)
    how = ("--val-share", "0.25", "--seed", "3", "--group-by", r"scene\d")
    assert prepare(root, tmp_path, *how) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "images per split: train 16, val 4" in said and r"5 groups by scene\d: 4 in train, 1 in val" in said
    parts = splits_of(root, tmp_path)
    assert {split: len(found) for split, found in parts.items()} == {"train": 16, "val": 4}
    assert len({name[:6] for name in parts["val"]}) == 1
    # Again it only shows, and a copy elsewhere is divided in the same way.
    assert prepare(root, tmp_path, *how) == 0 and "Preparing" not in capsys.readouterr().out
    copy = shutil.copytree(root, tmp_path / "copy")
    assert prepare(copy, tmp_path, *how) == 0
    assert splits_of(copy, tmp_path) == parts
    # Files are as they were.
    training, evaluation = open_splits("folder", ["train", "val"], source=root, data_dir=tmp_path / "data")
    for opened in (training, evaluation):
        for number, name in enumerate(opened.data.names):
            np.testing.assert_array_equal(opened.data[number][0], scene(names.index(name), *SIZE))


def test_the_latest_division_is_used(tmp_path):
    root = make(tmp_path / "folder", NAMES[:12])
    assert prepare(root, tmp_path) == 0
    assert splits_of(root, tmp_path).keys() == {"all_images"}
    found = []
    for share in ("0.5", "0.25", "0.5"):
        assert prepare(root, tmp_path, "--val-share", share) == 0
        found.append(splits_of(root, tmp_path))
    assert [len(parts["val"]) for parts in found] == [6, 3, 6] and found[0] == found[2]


def test_a_folder_with_two_splits_is_not_divided(tmp_path, capsys):
    root = make(tmp_path / "folder", NAMES[:3], splits=("train", "val"))
    assert prepare(root, tmp_path, "--val-share", "0.5") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "needs exactly one split with labels" in said and "train 3, val 3" in said
    assert not (tmp_path / "data").exists()


def test_flags_for_a_division_need_a_share(tmp_path, capsys):
    for more in (("--group-by", "x"), ("--seed", "3"), ("--val-share", "1.5")):
        with pytest.raises(SystemExit):
            prepare(tmp_path, tmp_path, *more)
    assert "need --val-share" in " ".join(capsys.readouterr().err.split())


def test_a_run_without_a_split_to_evaluate_names_the_command(tmp_path):
    root = make(tmp_path / "folder", NAMES[:8], splits=("train",))
    config = runs.make_config()
    config.data.update(name="folder", source=str(root), dir=str(tmp_path / "data"))
    config.data.eval_split = None
    with pytest.raises(RunError, match="segjax data prepare folder --source") as error:
        unset.filled(config)
    command = str(error.value).partition("\n  segjax data ")[2]
    assert command == f"prepare folder --source {root} --data-dir {tmp_path / 'data'} --val-share 0.2"
    assert main(command.split()) == 0
    assert splits_of(root, tmp_path).keys() == {"train", "val"}
    config, chosen = unset.filled(config)
    assert chosen["data.eval_split"].value == "val"


def test_evaluation_of_a_divided_folder_uses_its_split(tmp_path):
    root = make(tmp_path / "folder", NAMES[:8])
    assert prepare(root, tmp_path, "--val-share", "0.25") == 0
    (opened,) = open_splits("folder", ["val"], source=root, data_dir=tmp_path / "data")
    model = Pixels(3, 1)
    found = segjax.evaluate_dataset(model, "folder", data_source=str(root), data_dir=tmp_path / "data")
    assert found["classes"] == segjax.evaluate_dataset(model, opened)["classes"]
    assert sum(entry["pixels"] for entry in found["classes"]) == 2 * SIZE[0] * SIZE[1]


# -------------------------------------------------------------------------------------------------------------- subsets


def prepare_subset(name, made, tmp_path, *more):
    return main(["prepare", name, "--source", str(made.root), "--data-dir", str(tmp_path / "data"), *more])


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "voc", "pet"])
def test_without_its_flag_a_subset_is_refused_and_the_flag_is_named(name, tmp_path, capsys):
    made = Made(tmp_path / "made", name)
    assert prepare_subset(name, made, tmp_path) == 2
    assert f"segjax data prepare {name} --subset" in " ".join(capsys.readouterr().err.split())
    assert prepare_subset(name, made, tmp_path, "--subset") == 0
    said = " ".join(capsys.readouterr().out.split())
    published = dict(specs.DATASETS[name].spec.splits)
    assert f"a subset of {name}: train 3 of {published['train']:,}" in said
    assert f"a subset of {published['train']:,}" in said.partition("labels")[2]
    # From then on it is what the name stands for, from this source or from none.
    for source in (made.root, None):
        prepared = builders.prepare(name, source=source, data_dir=tmp_path / "data")
        assert prepared.splits["train"] == 3
    records = prepared.records("train")
    assert set(records.names) == set(made.images["train"])


def test_files_without_a_partner_are_skipped_and_counted(tmp_path, capsys):
    made = Made(tmp_path / "made", "cityscapes")
    images = sorted((made.root / "leftImg8bit/train").rglob("[!.]*.png"))
    images[0].unlink()
    (made.root / "gtFine/val").rename(tmp_path / "away")
    assert prepare_subset("cityscapes", made, tmp_path, "--subset") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train 2 of 2,975, val 0 of 500, test 2 of 1,525" in said
    assert (
        "masks without an image, which are skipped: 1" in said and "images without a mask, which are skipped: 2" in said
    )
    assert builders.prepare("cityscapes", data_dir=tmp_path / "data").splits == {"train": 2, "test": 2}


def test_a_list_may_name_images_that_are_missing_from_a_subset(tmp_path, capsys):
    made = Made(tmp_path / "made", "voc")
    first = sorted(made.images["train"])[0]
    (made.root / f"VOCdevkit/VOC2012/JPEGImages/{first}.jpg").unlink()
    (made.root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    assert prepare_subset("voc", made, tmp_path, "--subset") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train 2 of 1,464, val 0 of 1,449" in said and "lists of images missing" in said


def test_a_subset_without_any_mask_is_refused(tmp_path, capsys):
    made = Made(tmp_path / "made", "ade20k")
    for mask in (made.root / "ADEChallengeData2016/annotations").rglob("[!.]*.png"):
        mask.unlink()
    (made.root / "ADEChallengeData2016/annotations/training/ADE_x.png").write_bytes(b"")
    assert prepare_subset("ade20k", made, tmp_path, "--subset") == 2
    assert "no image with its mask" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "data").exists()


def test_the_division_of_a_subset_cannot_be_changed(tmp_path, capsys):
    made = Made(tmp_path / "made", "cityscapes")
    for part in ("leftImg8bit", "gtFine"):
        shutil.rmtree(made.root / part / "val")
    how = ("--subset", "--val-share", "0.4", "--group-by", "^([a-z]+)_")
    assert prepare_subset("cityscapes", made, tmp_path, *how) == 0
    prepared = builders.prepare("cityscapes", source=made.root, data_dir=tmp_path / "data")
    cities = {split: {name.split("_")[0] for name in prepared.records(split).names} for split in ("train", "val")}
    assert sorted(map(sorted, cities.values())) == [["aachen"], ["bern"]] and prepared.labelled == ("train", "val")
    # The same files elsewhere are the same data set, divided in the same way.
    copy = shutil.copytree(made.root, tmp_path / "copy")
    again = builders.prepare("cityscapes", source=copy, data_dir=tmp_path / "data")
    assert again.metadata["names"] == prepared.metadata["names"]
    assert prepare_subset("cityscapes", made, tmp_path, "--subset", "--val-share", "0.5") == 2
    assert "divided differently: val 0.4 of the images" in " ".join(capsys.readouterr().err.split())


def test_a_subset_of_camvid_is_prepared(tmp_path):
    classes = specs.CAMVID
    root = make(tmp_path / "folder", NAMES[:3], splits=("train", "val"))
    about = {"names": classes.class_names, "colors": classes.colors, "ignore": classes.ignore_label}
    (root / "classes.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"segjax data prepare camvid --subset"):
        builders.prepare("camvid", source=root, data_dir=tmp_path / "data")
    prepared = builders.prepare("camvid", source=root, data_dir=tmp_path / "data", subset=True)
    assert prepared.spec == dataclasses.replace(classes, splits=())
    assert builders.prepare("camvid", source=root, data_dir=tmp_path / "data") == prepared
    with pytest.raises(DataError, match="no published number of images"):
        builders.prepare("folder", source=root, data_dir=tmp_path / "data", subset=True)
