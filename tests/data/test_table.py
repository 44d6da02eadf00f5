"""The table of datasets: its entries, and that a dataset needs only one entry and one reader."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

import segjax.data
from configs import hrnet, segformer
from segjax.checkpoints import metadata
from segjax.commands import data, evaluate
from segjax.data import archives, builders, specs, streets
from segjax.data.open import GENERATORS, open_splits, shared_splits
from segjax.data.records import records_of
from segjax.data.sources import Example
from segjax.recipes import common
from tests import runs
from tests.tiny import FAMILIES

REPO = Path(__file__).parents[2]
# Split that is evaluated, and training crop, as published or as the size of the images demands.
EXPECTED = {
    "streets": ("val", (128, 256)),
    "camvid": ("test", (360, 480)),
    "cityscapes": ("val", (1024, 1024)),
    "ade20k": ("val", None),
    "voc": ("val", None),
    "pet": ("test", None),
    "folder": ("test", None),
}


# ------------------------------------------------------------------------------------------------------- what it says


def test_every_dataset_has_its_evaluated_split_and_its_crop():
    assert list(specs.DATASETS) == list(EXPECTED)
    for name, expected in EXPECTED.items():
        dataset, config = specs.DATASETS[name], common.get_config(name)
        assert (dataset.evaluated_split, dataset.crop) == expected
        split, crop = expected
        # Where the table has none, published recipes set it and other runs choose it.
        assert (config.data.eval_split, tuple(config.augment.crop)) == (split, crop or (512, 512))
    config = common.get_config("streets")
    assert (config.data.train_images, config.data.eval_images, tuple(config.data.size)) == (400, 64, (128, 256))
    assert "size" not in common.get_config("camvid").data


def test_every_dataset_has_the_reader_of_its_kind():
    of_kind = {kind: {name for name, dataset in specs.DATASETS.items() if dataset.kind == kind} for kind in KINDS}
    assert of_kind == {"generated": set(GENERATORS), "archives": set(archives.READERS), "folder": {"camvid", "folder"}}
    assert specs.prepared_names() == tuple(name for name in specs.DATASETS if name != "streets")
    for name, dataset in specs.DATASETS.items():
        assert (dataset.scenes is not None) == (dataset.kind == "generated")
        assert dataset.spec is None or dataset.spec.name == name
        # The splits of a folder are its own.
        known = dict(dataset.spec.splits) if dataset.kind != "generated" and dataset.spec else {}
        assert not known or dataset.evaluated_split in known


KINDS = ("generated", "archives", "folder")


def test_class_weights_have_one_number_per_class_and_are_used_by_recipes():
    weights = {name: dataset.class_weights for name, dataset in specs.DATASETS.items() if dataset.class_weights}
    assert {name: len(numbers) for name, numbers in weights.items()} == {"cityscapes": 19}
    assert hrnet.get_config("w48_ocr,cityscapes").loss.class_weights == "cityscapes"


def test_a_number_of_classes_suggests_at_most_one_dataset():
    guessed = {specs.guess(number).name: number for number in range(1, 256) if specs.guess(number)}
    assert guessed == {"camvid": 11, "cityscapes": 19, "ade20k": 150, "voc": 21}
    flagged = [dataset.spec.num_classes for dataset in specs.DATASETS.values() if dataset.guessed]
    assert len(flagged) == len(set(flagged))


# ------------------------------------------------------------------------------------------------------------ opening


@pytest.mark.parametrize("seed", [0, 5])
def test_generated_splits_have_the_pixel_counts_of_their_generator(seed):
    said = []
    training, evaluation = open_splits(
        "streets", ("train", "val"), num_images=(3, 2), size=(40, 64), seed=seed, say=said.append
    )
    assert said == ["drawing 5 images of streets ..."]
    for opened, split, number in ((training, "train", 3), (evaluation, "val", 2)):
        expected = streets.load(split, num_images=number, size=(40, 64), seed=seed)
        np.testing.assert_array_equal(opened.data.images, expected.images)
        np.testing.assert_array_equal(opened.data.labels, expected.labels)
        assert opened.data.names == expected.names and opened.spec is specs.STREETS
        assert opened.pixel_counts().tolist() == [np.sum(expected.labels == k) for k in range(19)]


def test_a_split_can_be_opened_twice_with_different_numbers_of_images():
    both = open_splits("streets", ("train", "train"), num_images=(3, 2), size=(40, 64), seed=1)
    assert [len(opened.data.images) for opened in both] == [3, 2]
    np.testing.assert_array_equal(both[0].data.images[:2], both[1].data.images)


def test_a_sum_of_generated_splits_has_the_number_of_images_of_each():
    said = []
    training, evaluation = open_splits(
        "streets", ("train+val", "test"), num_images=(3, 2), size=(40, 64), seed=1, say=said.append
    )
    assert said == ["drawing 8 images of streets ..."]
    parts = [streets.load(split, num_images=3, size=(40, 64), seed=1) for split in ("train", "val")]
    for field in ("images", "labels", "sizes"):
        np.testing.assert_array_equal(
            getattr(training.data, field), np.concatenate([getattr(part, field) for part in parts])
        )
    assert training.data.names[2:4] == ("train_streets_train_000002", "val_streets_val_000000")
    assert training.pixel_counts().tolist() == [sum(np.sum(part.labels == k) for part in parts) for k in range(19)]
    assert len(evaluation.data.images) == 2


@pytest.mark.parametrize(
    "split, said", [("train+train", "contains train twice"), ("+val", "lacks a name"), ("train+dev", "no split 'dev'")]
)
def test_an_invalid_sum_of_generated_splits_is_refused(split, said):
    with pytest.raises(ValueError, match=said):
        open_splits("streets", [split], num_images=[1], size=(40, 64))


@pytest.mark.parametrize(
    "one, other, both",
    [("train", "val", ""), ("train+val", "val", "val"), ("a+b+c", "c + a", "a and c"), ("b", "b", "b")],
)
def test_splits_shared_by_two_sums_are_named(one, other, both):
    assert shared_splits(one, other) == both


def test_without_numbers_a_generator_uses_those_of_the_table(monkeypatch):
    asked = []
    monkeypatch.setitem(GENERATORS, "streets", lambda split, **how: asked.append((split, how)))
    open_splits("streets", ("train", "val", "test"))
    assert [split for split, _ in asked] == ["train", "val", "test"]
    assert [how for _, how in asked] == [dict(num_images=n, size=(128, 256), seed=0) for n in (400, 64, 64)]


def test_an_unknown_dataset_is_refused_with_the_names_of_all():
    with pytest.raises(
        segjax.data.DataError, match=re.escape(f"no dataset 'mars'; the datasets are {', '.join(EXPECTED)}")
    ):
        open_splits("mars", ["train"])


# ------------------------------------------------------------------------------- a dataset of one entry and one reader

TOY = specs.DatasetSpec(
    "toy", ("ground", "thing", "other"), ((0, 0, 0), (200, 0, 0), (0, 200, 0)), 255, (("train", 5), ("val", 3))
)


def _find(files, problems):
    """The reader: x.png in images/<split>, and its mask with 10, 20, 30 for the classes and 0 for ignored pixels."""
    examples = {}
    for path in sorted(files):
        if match := re.fullmatch(r"images/(train|val)/(\w+)\.png", path):
            split, name = match.groups()
            mask = files[f"masks/{split}/{name}.png"]
            examples.setdefault(split, []).append(Example(name, files[path], mask))
    return examples


def _train_ids():
    table = np.full(256, -1, np.int16)
    table[[0, 10, 20, 30]] = 255, 0, 1, 2
    return table


def images_of(split, number, seed=3):
    """-> uint8 (N, 36, 50, 3), RGB, and mask values uint8 (N, 36, 50)."""
    rng = np.random.default_rng([seed, number, len(split)])
    masks = np.kron(rng.choice(np.array([0, 10, 20, 30], np.uint8), (number, 6, 5)), np.ones((6, 10), np.uint8))
    return rng.integers(0, 256, (number, 36, 50, 3), dtype=np.uint8), masks


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Adds the dataset, and makes its archive."""
    entry = specs.Dataset(kind="archives", spec=TOY, evaluated_split="val", crop=(32, 48), guessed=True)
    reader = archives.Reader(
        parts={"images": "toy.zip", "masks": "toy.zip"},
        above=(),
        layout="images/<split>/*.png, masks/<split>/*.png",
        find=_find,
        train_ids=_train_ids(),
    )
    monkeypatch.setitem(specs.DATASETS, "toy", entry)
    monkeypatch.setitem(archives.READERS, "toy", reader)
    with zipfile.ZipFile(tmp_path / "toy.zip", "w") as file:
        for split, number in TOY.splits:
            for i, (image, mask) in enumerate(zip(*images_of(split, number), strict=True)):
                file.writestr(f"images/{split}/x{i}.png", cv2.imencode(".png", image[..., ::-1])[1].tobytes())
                file.writestr(f"masks/{split}/x{i}.png", cv2.imencode(".png", mask)[1].tobytes())
    return tmp_path / "toy.zip"


def test_a_new_dataset_is_prepared_shown_trained_on_and_evaluated_by_name(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.main(["prepare", "toy", "--source", str(toy), "--data-dir", "prepared"]) == 0
    printed = capsys.readouterr().out
    assert "train                        5" in printed and printed.endswith(f"{tmp_path}/prepared/segjax_toy/1.1.0\n")

    (opened,) = open_splits("toy", ["val"], data_dir="prepared")
    _, masks = images_of("val", 3)
    expected = np.select([masks == 10, masks == 20, masks == 30], [0, 1, 2], 255)
    np.testing.assert_array_equal([label for _, label in records_of(opened.data)], expected)
    assert opened.pixel_counts().tolist() == [np.sum(expected == k) for k in range(3)]

    assert data.main(["show", "toy", "--data-dir", "prepared", "--num", "2"]) == 0
    assert "show-toy.png: 2 samples of 36x50 from toy train" in capsys.readouterr().out

    config = segformer.get_config("toy")
    assert (config.data.eval_split, tuple(config.augment.crop)) == ("val", (32, 48))
    config.data.dir = "prepared"
    config.model.update(FAMILIES["segformer"][1])
    config.train.update(steps=2, batch=4, log_every=1)
    config.optim.warmup_steps = 1
    config.eval.update(batch=4, pictures=0)
    status, printed = runs.run(config, tmp_path / "run")
    assert status == 0 and "5 to train on (train), 3 to evaluate (val)" in printed
    result = runs.result_of(tmp_path / "run")
    assert result["step"] == 2

    arguments = ["--checkpoint", "run", "--data", "toy", "--data-dir", "prepared", "--output", "report", "--batch", "4"]
    assert evaluate.main(arguments) == 0
    report = json.loads((tmp_path / "report/results.json").read_text())
    assert report["data"] == {"name": "toy", "split": "val", "images": 3}
    assert [entry["pixels"] for entry in report["classes"]] == [np.sum(expected == k) for k in range(3)]
    assert report["per_class_iou"] == result["per_class_iou"]
    assert metadata.guessed(3)["dataset"]["name"] == "toy"


def test_a_new_generated_dataset_is_opened_by_name(monkeypatch):
    def generate(split, *, num_images, size, seed):
        images = np.full((num_images, *size, 3), seed, np.uint8)
        names = tuple(f"{split}{i}" for i in range(num_images))
        return specs.Split(images, images[..., 0] % 3, np.tile(np.int32(size), (num_images, 1)), names)

    entry = specs.Dataset("generated", TOY, evaluated_split="val", scenes=specs.Scenes(5, 2, (33, 47)))
    monkeypatch.setitem(specs.DATASETS, "toy", entry)
    monkeypatch.setitem(GENERATORS, "toy", generate)
    config = segformer.get_config("b1,toy")
    assert (config.data.train_images, config.data.eval_images, tuple(config.data.size)) == (5, 2, (33, 47))
    (opened,) = open_splits("toy", ["val"], seed=4)
    assert opened.data.images.shape == (2, 33, 47, 3) and opened.pixel_counts().tolist() == [0, 2 * 33 * 47, 0]


@pytest.mark.parametrize("splits", [(), (("train", 2), ("val", 1))])
def test_a_new_folder_dataset_needs_no_reader(splits, monkeypatch, tmp_path):
    spec = specs.DatasetSpec("toy", TOY.class_names, TOY.colors, 255, splits)
    monkeypatch.setitem(specs.DATASETS, "toy", specs.Dataset("folder", spec, evaluated_split="val"))
    for split, number in (("train", 2), ("val", 1)):
        for i, (image, mask) in enumerate(zip(*images_of(split, number), strict=True)):
            for part, array in (("images", image), ("labels", np.where(mask, mask // 10 - 1, 255))):
                (tmp_path / part / split).mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(tmp_path / part / split / f"{i}.png"), array)
    classes = {"names": TOY.class_names, "colors": TOY.colors, "ignore": 255}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    prepared = builders.prepare("toy", source=tmp_path, data_dir=tmp_path / "data")
    assert prepared.spec == spec and prepared.splits == {"train": 2, "val": 1}
    (tmp_path / "classes.json").write_text(json.dumps(classes | {"names": ["a", "b", "c"]}))
    with pytest.raises(builders.DataError, match=r"does not have the 3 classes of toy; correct it") as error:
        builders.prepare("toy", source=str(tmp_path), data_dir=str(tmp_path / "other"))
    assert "class_names ('a', 'b', 'c') instead of ('ground', 'thing', 'other')" in str(error.value)


# -------------------------------------------------------------------------------------------------------- public names


def test_every_public_name_of_segjax_data_exists():
    assert set(segjax.data.__all__) == {name for names in segjax.data._FILES.values() for name in names}
    for name in segjax.data.__all__:
        assert getattr(segjax.data, name) is not None
    with pytest.raises(AttributeError, match=r"module 'segjax\.data' has no attribute 'absent'"):
        _ = segjax.data.absent


@pytest.mark.parametrize(
    "name, slow",
    [("DATASETS", ("jax", "absl", "cv2")), ("open_splits", ("tensorflow_datasets", "cv2", "grain", "flax"))],
)
def test_datasets_are_found_and_opened_without_slow_imports(name, slow):
    # The package itself, which may import more, is replaced by an empty one with the same path.
    code = f"""if True:
        import sys, types
        sys.modules["segjax"] = types.ModuleType("segjax")
        sys.modules["segjax"].__path__ = ["segjax"]
        import segjax.data
        assert not set(sys.modules) & {{"jax", "numpy", "segjax.data.specs"}}
        segjax.data.{name}
        print(*set(sys.modules) & set({slow!r}))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
