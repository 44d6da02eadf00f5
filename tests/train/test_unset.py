"""Settings that a recipe leaves unset: a run on a user's images chooses them, and a flag takes precedence."""

import json

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict

from segjax.commands import train
from segjax.recipes import segformer
from segjax.train import unset
from segjax.train.config import RunError, plain


def write_folder(root, splits, size=(70, 104), classes=3, labelled=None):
    """A dataset of kind folder: random images and labels of `classes` classes, of which `labelled` occur."""
    rng = np.random.default_rng(len(splits))
    names = [f"class {k}" for k in range(classes)]
    for split, count in splits.items():
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            cv2.imwrite(str(root / f"images/{split}/{i}.png"), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            label = rng.integers(0, labelled or classes, size, dtype=np.uint8)
            cv2.imwrite(str(root / f"labels/{split}/{i}.png"), label)
    description = {"names": names, "colors": [[40 * k, 90, 10] for k in range(classes)], "ignore": 255}
    (root / "classes.json").write_text(json.dumps(description))
    return root


def config_for(root, **changes):
    config = segformer.get_config("b0,folder")
    config.data.source, config.data.dir = str(root), str(root / "prepared")
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([(360, 480)] * 3, (352, 480)),
        ([(1024, 2048)] * 2, (512, 512)),
        ([(96, 200), (300, 400), (2100, 500)], (288, 384)),
        ([(40, 33)], (32, 32)),
        ([(20, 700)], (32, 512)),
    ],
)
def test_the_crop_is_the_median_size_in_multiples_of_32(sizes, expected):
    assert unset.crop(np.array(sizes)) == expected


@pytest.mark.parametrize(
    "images, batch, expected", [(367, 8, 9175), (12, 8, 2000), (100_000, 16, 80_000), (50, 2, 5000)]
)
def test_the_steps_are_200_epochs_within_bounds(images, batch, expected):
    assert unset.steps(images, batch) == expected


def data_of(train_split):
    return ConfigDict(dict(name="folder", train_split=train_split, source="here", dir=""))


@pytest.mark.parametrize(
    "labelled, train_split, expected",
    [
        (("train", "val", "test"), "train", "val"),
        (("train", "test"), "train", "test"),
        (("test", "train", "val"), "train+val", "test"),
    ],
)
def test_val_is_evaluated_or_otherwise_test(labelled, train_split, expected):
    assert unset.evaluated_split(labelled, data_of(train_split)) == expected


def test_data_without_a_split_to_evaluate_is_refused_with_its_splits():
    with pytest.raises(RunError, match=r"the splits with labels are extra, train\..*--config.data.eval_split=train"):
        unset.evaluated_split(("train", "extra"), data_of("train"))


def test_unset_settings_are_chosen_from_the_images_and_initial_weights(tmp_path):
    root = write_folder(tmp_path, {"train": 5, "test": 2})
    config, chosen = unset.filled(config_for(root))
    assert (config.augment.crop, config.train.steps, config.optim.warmup_steps) == ((64, 96), 2000, 200)
    assert (config.data.eval_split, config.optim.lr, config.optim.lr_multipliers) == ("test", 1e-3, ())
    assert {*chosen} == {*unset.KEYS}
    # From a checkpoint the head learns ten times as fast, at the published rate.
    config, chosen = unset.filled(config_for(root, **{"init.checkpoint": str(tmp_path)}))
    assert (config.optim.lr, config.optim.lr_multipliers) == (6e-5, (("head", 10.0),))
    assert {*chosen} == {*unset.KEYS}


def test_an_explicit_setting_is_not_changed(tmp_path):
    root = write_folder(tmp_path, {"train": 5, "val": 2})
    config = train.parse(
        [
            "--config=segformer:b0,folder",
            f"--config.data.source={root}",
            f"--config.data.dir={root / 'prepared'}",
            "--config.augment.crop=(32,64)",
            "--config.train.steps=30",
            "--config.optim.lr=2e-4",
            "--config.optim.lr_multipliers=(('head',3.0),)",
        ]
    ).config
    filled, chosen = unset.filled(config)
    assert (filled.augment.crop, filled.train.steps, filled.optim.lr) == ((32, 64), 30, 2e-4)
    assert filled.optim.lr_multipliers == (("head", 3.0),)
    assert {key: choice.value for key, choice in chosen.items()} == {
        "data.eval_split": "val",
        "optim.warmup_steps": 3,
    }


def test_a_resumed_run_keeps_its_chosen_settings_and_may_become_longer(tmp_path):
    root = write_folder(tmp_path, {"train": 5, "val": 2})
    began, _ = unset.filled(config_for(root, **{"init.checkpoint": str(tmp_path)}))
    assert (began.train.steps, began.optim.warmup_steps) == (2000, 200)
    given = config_for(root, **{"init.checkpoint": str(tmp_path), "train.steps": 9000})
    longer = unset.kept(given, plain(began))
    assert plain(longer) == plain(began) | {"train": plain(began)["train"] | {"steps": 9000}}
    assert unset.filled(longer) == (longer, {})


def test_a_sum_of_splits_may_have_spaces():
    assert unset.evaluated_split(("train", "val", "test"), data_of("train + val")) == "test"


def test_a_recipe_that_sets_everything_opens_no_data(tmp_path):
    config = segformer.get_config("b0,cityscapes")
    config.data.dir = str(tmp_path)
    assert unset.filled(config) == (config, {})
