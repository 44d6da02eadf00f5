"""A run continues with the images and masks that it began with, wherever they are; others are listed and refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from segjax.data import builders, contents, open_splits
from segjax.inference.evaluate_dataset import evaluate_dataset
from segjax.runtime.reading import UnreadableError
from segjax.train import loop, resume, unset
from segjax.train.config import RunError
from tests.data.test_refusals import folder, image, mask, saved
from tests.made_archives import write
from tests.runs import cheap_step, make_config


def opened(root: Path, tmp_path: Path, *splits: str):
    return open_splits("folder", splits or ("train", "test"), source=root, data_dir=tmp_path / "data")


def config_of(root: Path | None, tmp_path: Path, **changes):
    config = make_config(**changes)
    config.data.update(name="folder", source=root and str(root), dir=str(tmp_path / "data"), eval_split="test")
    return config


def kept(root: Path, tmp_path: Path, *, is_new=False, accept=False) -> None:
    config = config_of(root, tmp_path)
    now = resume.data_of(config, *opened(root, tmp_path))
    resume.keep_data(tmp_path / "run", now, is_new=is_new, accept=accept)


def change_mask(root):
    write(root / "labels/train/a.png", mask((0, 1, 2), seed=99))


def change_image(root):
    write(root / "images/test/a.png", saved(image(77)))


def add(root):
    write(root / "images/train/c.png", saved(image(5)))
    write(root / "labels/train/c.png", mask((0, 1, 2)))


def remove(root):
    for part in ("images", "labels"):
        (root / part / "train/b.png").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_mask, "train/a: mask changed"),
        (change_image, "test/a: image changed"),
        (add, "train/c: added"),
        (remove, "train/b: removed"),
    ],
)
def test_changed_data_are_listed_and_refused_unless_accepted(tmp_path, capsys, change, said):
    root = folder(tmp_path / "x")
    kept(root, tmp_path, is_new=True)
    kept(root, tmp_path)
    change(root)
    with pytest.raises(RunError) as error:
        kept(root, tmp_path)
    assert said in str(error.value) and "--config.data.changed=accept" in str(error.value)
    kept(root, tmp_path, accept=True)
    assert said in capsys.readouterr().out
    # These are now the data of the run.
    kept(root, tmp_path)


@pytest.mark.parametrize(
    "move",
    [
        lambda old, new: old.rename(new),
        shutil.copytree,
        lambda old, new: shutil.copytree(old, new, copy_function=shutil.copyfile),
    ],
)
def test_moved_or_copied_data_count_as_unchanged(tmp_path, move):
    kept(folder(tmp_path / "x"), tmp_path, is_new=True)
    move(tmp_path / "x", tmp_path / "elsewhere")
    kept(tmp_path / "elsewhere", tmp_path)
    # Also where they are prepared anew.
    shutil.rmtree(tmp_path / "data")
    kept(tmp_path / "elsewhere", tmp_path)


def test_a_moved_folder_is_not_prepared_again(tmp_path):
    root = folder(tmp_path / "x")
    first = opened(root, tmp_path)[0].prepared
    root.rename(tmp_path / "y")
    assert opened(tmp_path / "y", tmp_path)[0].prepared.path == first.path


def test_splits_other_than_those_of_the_run_may_change(tmp_path):
    root = folder(tmp_path / "x")
    kept(root, tmp_path, is_new=True)
    for part in ("images", "labels"):
        shutil.copytree(root / part / "test", root / part / "more")
    kept(root, tmp_path)


def test_runs_and_data_without_hashes_are_resumed(tmp_path, monkeypatch):
    root = folder(tmp_path / "x")
    (path,) = {split.prepared.path for split in opened(root, tmp_path)}
    metadata = json.loads((path / "metadata.json").read_text())
    del metadata["hashes"]
    (path / "metadata.json").write_text(json.dumps(metadata))
    kept(root, tmp_path, is_new=True)
    kept(root, tmp_path)
    assert not (tmp_path / "run/data.json").exists()
    shutil.rmtree(path.parent)
    kept(root, tmp_path)
    assert (tmp_path / "run/data.json").exists()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "{}", '{"path": "x", "source": "y", "contents": {"train": 3}}'])
def test_a_damaged_data_json_is_named(tmp_path, text):
    write(tmp_path / "data.json", text.encode())
    with pytest.raises(UnreadableError, match=r"data\.json"):
        contents.read_run_data(tmp_path / "data.json")


def test_a_published_dataset_with_other_content_is_refused(tmp_path, monkeypatch):
    from segjax.data import specs

    root = folder(tmp_path / "x")
    classes = json.loads((root / "classes.json").read_text())
    colors = tuple(map(tuple, classes["colors"]))
    spec = specs.DatasetSpec("camvid", tuple(classes["names"]), colors, 255, (("train", 2), ("test", 1)))
    monkeypatch.setitem(specs.DATASETS, "camvid", specs.Dataset(kind="folder", spec=spec, evaluated_split="test"))
    first = builders.prepare("camvid", source=root, data_dir=tmp_path / "data")
    path = root / "images/train/a.png"
    before = path.read_bytes()
    # Another image whose file has the same size.
    other = next(
        each for each in (saved(image(seed)) for seed in range(999)) if len(each) == len(before) and each != before
    )
    path.write_bytes(other)
    with pytest.raises(builders.DataError, match=r"train/a: image changed"):
        builders.prepare("camvid", source=root, data_dir=tmp_path / "data")
    path.write_bytes(before)
    assert builders.prepare("camvid", source=root, data_dir=tmp_path / "data") == first


def test_settings_that_a_run_chose_for_its_images_are_kept(tmp_path):
    config = config_of(None, tmp_path)
    config.update_from_flattened_dict({"train.steps": 7, "augment.crop": (64, 96)})
    recorded = json.loads(json.dumps(config.to_dict()))
    with config.ignore_type():
        config.train.steps = config.augment.crop = None
    found = unset.kept(config, recorded)
    assert (found.train.steps, found.augment.crop) == (7, (64, 96)) and config.train.steps is None


def test_a_run_finds_and_evaluates_its_moved_data(tmp_path, monkeypatch, capsys):
    cheap_step(monkeypatch)
    root, run = folder(tmp_path / "before", name=None, size=(40, 56)), tmp_path / "run"
    classes = json.loads((root / "classes.json").read_text())
    del classes["name"]
    (root / "classes.json").write_text(json.dumps(classes))
    short = dict(train__steps=1, train__batch=4, eval__batch=4, augment__crop=(32, 32))
    monkeypatch.chdir(tmp_path)
    config = config_of(Path("before"), tmp_path, **short)
    assert loop.train(config, run) == 0
    root.rename(tmp_path / "after")
    monkeypatch.chdir(run)
    figures = json.loads((run / "result.json").read_text())
    assert evaluate_dataset(run)["mean_iou"] == figures["mean_iou"]
    write(tmp_path / "after/images/test/a.png", saved(image(77, (40, 56))))
    with pytest.raises(ValueError, match=r"test/a: image changed"):
        evaluate_dataset(run, data_source=str(tmp_path / "after"))
    longest = config_of(tmp_path / "after", tmp_path, **(short | {"train__steps": 3}))
    with pytest.raises(RunError, match=r"test/a: image changed"):
        loop.train(longest, run)
    classes["names"][1] = "another"
    (tmp_path / "after/classes.json").write_text(json.dumps(classes))
    longest.data.changed = "accept"
    capsys.readouterr()
    assert loop.train(longest, run) == 0
    assert "test/a: image changed" in capsys.readouterr().out and np.isfinite(figures["pixel_accuracy"])
