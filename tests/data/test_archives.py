"""Datasets in generated archives: every source makes the same dataset, and faults are refused."""

import errno
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from segjax.commands.data import main
from segjax.data import archives, builders, codec, masks, sources, specs
from segjax.data.open import open_splits
from segjax.data.records import JoinedRecords, records_of
from tests.made_archives import ARCHIVES, COUNTS, VALUES, Made, encoded, few_images, pack, saved, write

REPO = Path(__file__).parents[2]
NAMES = list(archives.READERS)
# Ids in the order of cityscapesScripts' labels.py, 0 to 33, and the train id of each.
CITYSCAPES_TRAIN_IDS = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10]
CITYSCAPES_TRAIN_IDS += [11, 12, 13, 14, 15, 255, 255, 16, 17, 18]
EXPECTED_LABEL = {
    "cityscapes": lambda mask: np.vectorize(CITYSCAPES_TRAIN_IDS.__getitem__)(mask),
    "ade20k": lambda mask: np.where(mask == 0, 255, mask.astype(int) - 1),
    "voc": lambda mask: mask,
    "pet": lambda mask: np.select([mask == 1, mask == 2, mask == 3], [1, 0, 255]),
}


@pytest.fixture
def few(monkeypatch):
    """The published numbers of images cut to those of `COUNTS`."""
    for name, dataset in few_images().items():
        monkeypatch.setitem(specs.DATASETS, name, dataset)


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


def prepare(name, data: Path, *source: Path) -> builders.Prepared:
    return builders.prepare(name, source=[str(path) for path in source], data_dir=str(data))


def files_in(path: Path) -> dict[str, bytes]:
    """All files, except the one that says which other sources contain the same dataset."""
    files = (file for file in path.rglob("*") if file.is_file() and file.name != "sources.json")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def records_in(prepared: builders.Prepared) -> dict[str, list[dict[str, bytes]]]:
    """What is stored, undecoded; the files' own bytes vary with the order that protobuf gives the parts of a record."""
    import tensorflow_datasets as tfds

    skip = tfds.decode.SkipDecoding()
    builder = tfds.builder_from_directory(prepared.path)
    return {
        split: list(builder.as_data_source(split, decoders={"image": skip, "label": skip})) for split in prepared.splits
    }


# What is read back


@pytest.mark.parametrize("name", NAMES)
def test_images_and_train_ids_are_read_back_in_order_of_their_names(name, few, tmp_path, data):
    made = Made(tmp_path / "made", name)
    prepared = prepare(name, data, made.root)
    assert prepared.splits == COUNTS[name] and prepared.path == data / f"segjax_{name}/1.1.0"
    assert prepared.labelled == tuple(made.masks) and prepared.spec.splits == tuple(COUNTS[name].items())
    for split in made.masks:
        loaded = prepared.load(split)
        assert loaded.names == tuple(sorted(made.masks[split]))
        for i, stem in enumerate(loaded.names):
            mask, (height, width) = made.masks[split][stem], loaded.sizes[i]
            image = cv2.imdecode(np.frombuffer(made.images[split][stem], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            assert (height, width) == mask.shape
            np.testing.assert_array_equal(loaded.images[i, :height, :width], image)
            np.testing.assert_array_equal(loaded.labels[i, :height, :width], EXPECTED_LABEL[name](mask))
            assert (loaded.labels[i, height:] == 255).all() and (loaded.labels[i, :, width:] == 255).all()


@pytest.mark.parametrize("name", NAMES)
def test_images_keep_their_own_bytes_and_masks_are_grey_png(name, few, tmp_path, data):
    made = Made(tmp_path / "made", name)
    for split, records in records_in(prepare(name, data, made.root)).items():
        for record in records:
            assert record["image"] == made.images[split][record["name"].decode()]
            assert record["label"].startswith(codec.PNG) and tuple(record["label"][24:26]) == (8, 0)


def forms(name, tmp_path) -> dict[str, list[Path]]:
    """Every way in which the same dataset may be given."""
    made = Made(tmp_path / "made", name)
    archives = made.packed(tmp_path / "archives")
    found = {
        "tree": [made.root],
        "archives": archives,
        "archives in another order": archives[::-1],
        "folder of archives": [tmp_path / "archives"],
        "parts": [made.root / part for part in ARCHIVES[name].values()],
    }
    if name == "ade20k":
        (tmp_path / "renamed").symlink_to(made.root / "ADEChallengeData2016")
        found |= {"inner folder": [tmp_path / "renamed"]}
    if name == "voc":
        found |= {"inner folder": [made.root / "VOCdevkit/VOC2012"]}
    if name in ("cityscapes", "pet"):
        mixed = Path(shutil.copytree(tmp_path / "archives", tmp_path / "mixed"))
        first = next(iter(ARCHIVES[name].values()))
        shutil.copytree(made.root / first, mixed / first)
        found |= {"folder with an archive and what was in the other": [mixed]}
        found |= {"an archive and a folder": [archives[1], made.root / first]}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_source_gives_the_same_dataset(name, few, tmp_path):
    results = {}
    for form, source in forms(name, tmp_path).items():
        prepared = prepare(name, tmp_path / form, *source)
        results[form] = (records_in(prepared), prepared.metadata["fingerprint"])
        assert prepared.metadata["source"] == " ".join(map(str, source))
    assert len(results) >= 5
    assert [form for form, result in results.items() if result != results["tree"]] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_dataset_needs_no_source_and_accepts_any_kind_of_it(name, few, tmp_path, data, monkeypatch):
    sources = forms(name, tmp_path)
    first = prepare(name, data, *sources["archives"])
    before = files_in(data)
    monkeypatch.setattr(masks, "convert", lambda *_: pytest.fail("prepared again"))
    assert builders.prepare(name, source=None, data_dir=str(data)) == first
    for source in sources.values():
        assert prepare(name, data, *source) == first
    assert files_in(data) == before and not list(data.rglob(".converting*"))


def test_unchanged_archives_are_not_opened(few, tmp_path, data, monkeypatch):
    packed = Made(tmp_path / "made", "pet").packed(tmp_path)
    first = prepare("pet", data, *packed)
    monkeypatch.setattr(archives, "in_archive", lambda *_: pytest.fail("opened again"))
    assert prepare("pet", data, *packed) == first


def test_the_source_of_a_config_is_one_path(few, tmp_path, data):
    Made(tmp_path / "made", "cityscapes").packed(tmp_path / "archives")
    prepared = builders.prepare("cityscapes", source=str(tmp_path / "archives"), data_dir=str(data))
    assert prepared.splits == COUNTS["cityscapes"]


def test_a_cmyk_jpeg_is_read_as_rgb(few, tmp_path, data):
    made = Made(tmp_path / "made", "pet")
    colour = Image.new("RGB", (50, 30), (200, 60, 20))
    write(made.root / "images/Abyssinian_1.jpg", saved(colour.convert("CMYK"), "JPEG"))
    image, _ = prepare("pet", data, made.root).records("train")[0]
    assert np.abs(image.astype(int) - (200, 60, 20)).max() < 20


def test_published_images_are_not_rotated_by_exif(few, tmp_path, data):
    made = Made(tmp_path / "made", "pet")
    path = made.root / "images/Abyssinian_1.jpg"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    content = io.BytesIO()
    image.save(content, "JPEG", exif=exif)
    stored = np.array(Image.open(content))
    write(path, content.getvalue())
    np.testing.assert_allclose(prepare("pet", data, made.root).records("train")[0][0], stored, atol=3)


# Classes and colours


def test_names_and_colours_of_the_classes_are_the_published_ones():
    ade, voc = specs.ADE20K, specs.VOC
    assert ade.num_classes == 150 and len(set(ade.class_names)) == 150
    for train_id, name, color in (
        *((0, "wall", (120, 120, 120)), (1, "building", (180, 120, 120)), (2, "sky", (6, 230, 230))),
        *((12, "person", (150, 5, 61)), (20, "car", (0, 102, 200)), (44, "chest of drawers", (6, 51, 255))),
        *((80, "bus", (255, 0, 245)), (136, "traffic light", (41, 0, 255)), (149, "flag", (92, 0, 255))),
    ):
        assert (ade.class_names[train_id], ade.colors[train_id]) == (name, color)
    # As the development kit's documentation shows them.
    assert voc.num_classes == 21 and voc.class_names[0] == "background" and voc.class_names[15] == "person"
    assert voc.colors[:6] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128))
    assert voc.colors[15] == (192, 128, 128) and voc.colors[20] == (0, 64, 128)
    assert specs.voc_color(255) == (224, 224, 192)
    assert specs.CITYSCAPES.class_names == specs.STREETS.class_names
    assert specs.PET.label_names == ("background", "pet") and specs.PET.num_classes == 1


def test_the_numbers_of_images_are_the_published_ones():
    assert {name: dict(specs.DATASETS[name].spec.splits) for name in NAMES} == {
        "cityscapes": {"train": 2975, "val": 500, "test": 1525},
        "ade20k": {"train": 20210, "val": 2000},
        "voc": {"train": 1464, "val": 1449},
        "pet": {"train": 3680, "test": 3669},
    }


# A split without labels


def test_unpublished_labels_are_an_error_where_they_are_needed(few, tmp_path, data):
    made = Made(tmp_path / "made", "cityscapes")
    prepared = prepare("cityscapes", data, made.root)
    records = prepared.records("test")
    for needs_labels in (prepared.load, prepared.pixel_counts, lambda _: records[0]):
        with pytest.raises(builders.DataError, match=r"cityscapes test has no published labels; use train or val"):
            needs_labels("test")
    assert prepared.labelled == ("train", "val") and len(records) == 2
    for i, name in enumerate(records.names):
        image = cv2.imdecode(np.frombuffer(made.images["test"][name], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(records.image(i), image)


def test_tfds_reads_a_split_without_labels_as_ignored(few, tmp_path, data):
    import tensorflow_datasets as tfds

    prepare("cityscapes", data, Made(tmp_path / "made", "cityscapes").root)
    for example in tfds.data_source("segjax_cityscapes", split="test", data_dir=str(data)):
        assert example["label"].shape == (*example["image"].shape[:2], 1) and (example["label"] == 255).all()


# Records and counts


@pytest.mark.parametrize("name", NAMES)
def test_pixel_counts_match_the_labels(name, few, tmp_path, data):
    prepared = prepare(name, data, Made(tmp_path / "made", name, seed=1).root)
    for split in prepared.labelled:
        labels = prepared.load(split).labels
        counts = prepared.pixel_counts(split)
        assert counts == [np.sum(labels == value) for value in range(len(prepared.spec.label_names))]
        assert all(type(count) is int for count in counts)


@pytest.mark.parametrize("name", ["cityscapes", "pet"])
def test_records_are_read_in_any_order_from_any_thread_and_after_pickling(name, few, tmp_path, data):
    prepared = prepare(name, data, Made(tmp_path / "made", name).root)
    loaded, records = prepared.load("train"), prepared.records("train")
    assert records.names == loaded.names and len(records) == 3
    np.testing.assert_array_equal(records.sizes, loaded.sizes)
    assert records.sizes.dtype == np.int32 and records.sizes.shape == (3, 2)
    order = np.random.default_rng(0).integers(0, 3, 60)
    with ThreadPoolExecutor(8) as pool:
        for copy in (records, pickle.loads(pickle.dumps(records))):
            for i, (image, label) in zip(order, pool.map(copy.__getitem__, order), strict=True):
                height, width = records.sizes[i]
                assert image.shape == (height, width, 3) and image.dtype == label.dtype == np.uint8
                np.testing.assert_array_equal(image, loaded.images[i, :height, :width])
                np.testing.assert_array_equal(label, loaded.labels[i, :height, :width])
    assert len(list(records)) == 3 and repr(records) == f"PreparedRecords({name} train, 3 images)"
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"{name} train has 3 images, and no number {index}"):
            records[index]


@pytest.mark.parametrize("name, split", [("voc", "train+val"), ("voc", "val + train"), ("pet", "test+train")])
def test_a_sum_of_splits_has_the_images_of_each_split_in_order(name, split, few, tmp_path, data):
    prepared = prepare(name, data, Made(tmp_path / "made", name).root)
    parts = [part.strip() for part in split.split("+")]
    loaded, records = [prepared.load(part) for part in parts], prepared.records(split)
    names = [f"{part}_{stem}" for part, each in zip(parts, loaded, strict=True) for stem in each.names]
    assert list(records.names) == names and len(set(names)) == len(records) == 5
    np.testing.assert_array_equal(records.sizes, np.concatenate([each.sizes for each in loaded]))
    whole = prepared.load(split)
    assert list(whole.names) == names
    expected = [
        (each.images[i, :height, :width], each.labels[i, :height, :width])
        for each in loaded
        for i, (height, width) in enumerate(each.sizes)
    ]
    for copy in (records, pickle.loads(pickle.dumps(records)), records_of(whole)):
        for i, pair in enumerate(expected):
            for found, array in zip(copy[i], pair, strict=True):
                np.testing.assert_array_equal(found, array)
    assert repr(records) == " + ".join(
        f"PreparedRecords({name} {part}, {len(prepared.records(part))} images)" for part in parts
    )
    # In memory and on disk, with the pixels of both.
    counts = [sum(np.sum(label == k) for _, label in expected) for k in range(len(prepared.spec.label_names))]
    for gigabytes, kind in ((1.0, specs.Split), (0.0, JoinedRecords)):
        (opened,) = open_splits(name, [split], data_dir=data, resident_gb=gigabytes)
        assert isinstance(opened.data, kind) and opened.pixel_counts().tolist() == counts


@pytest.mark.parametrize(
    "split, said",
    [
        (
            "train+train",
            "split 'train+train' contains train twice; name each split once; there are train 3, val 2, test 2",
        ),
        ("train+vla", "cityscapes has no split 'vla'; there are train 3, val 2, test 2"),
        (
            "train+",
            "split 'train+' lacks a name next to a +; a sum of splits is written as in train+val; there are train 3",
        ),
        ("train+test", "cityscapes test has no published labels; use train or val"),
    ],
)
def test_an_invalid_sum_of_splits_is_refused_with_the_existing_splits(split, said, few, tmp_path, data):
    prepare("cityscapes", data, Made(tmp_path / "made", "cityscapes").root)
    for gigabytes in (0.0, 1.0):
        with pytest.raises(builders.DataError) as error:
            open_splits("cityscapes", [split, "val"], data_dir=data, resident_gb=gigabytes)
        assert str(error.value).startswith(said)


def test_sizes_and_names_need_no_decoding(few, tmp_path, data, monkeypatch):
    prepared = prepare("voc", data, Made(tmp_path / "made", "voc").root)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    records = prepared.records("val")
    assert records.sizes.tolist() == [[30, 50], [31, 47]] and len(records.names) == 2
    assert sum(prepared.pixel_counts("val")) > 0


def test_a_damaged_record_is_named(few, tmp_path, data):
    prepared = prepare("pet", data, Made(tmp_path / "made", "pet").root)
    (path,) = prepared.path.glob("*test.array_record*")
    content = bytearray(path.read_bytes())
    at = content.index(codec.PNG) + 200
    content[at : at + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(builders.DataError) as error:
        prepared.load("test")
    message = str(error.value)
    assert (
        f"{prepared.path}: test record 0 ('yorkshire_terrier_1')" in message and "prepare the dataset again" in message
    )


def test_large_splits_are_written_to_several_files_in_order(few, tmp_path, data, monkeypatch):
    made = Made(tmp_path / "made", "cityscapes")
    whole = prepare("cityscapes", tmp_path / "whole", made.root).load("train")
    monkeypatch.setattr(builders, "_SHARD_BYTES", 10_000)
    prepared = prepare("cityscapes", data, made.root)
    assert len(list(prepared.path.glob("*train.array_record*"))) == 2
    split = prepared.load("train")
    assert split.names == whole.names
    np.testing.assert_array_equal(split.images, whole.images)


def test_too_little_space_is_reported_before_anything_is_written(few, tmp_path, data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(builders.DataError, match=r"needs at least 0\.0 GB, and 0\.0 GB are free there; make room"):
        prepare("pet", data, *Made(tmp_path / "made", "pet").packed(tmp_path))
    assert not data.exists()


def test_a_full_disk_is_not_taken_for_a_damaged_archive(few, tmp_path, data, monkeypatch):
    archives = Made(tmp_path / "made", "pet").packed(tmp_path)

    def write_to_a_full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources, "_unpacked", write_to_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        prepare("pet", data, *archives)


# Interrupted and taken up again


def start_and_kill(name: str, data: Path, source: list[Path], *, after: int) -> None:
    """Starts a preparation in a process of its own and kills it once it has noted `after` images."""
    code = f"""
import dataclasses, time
from segjax.data import builders, codec, masks, specs

dataset = specs.DATASETS[{name!r}]
spec = dataclasses.replace(dataset.spec, splits=tuple({COUNTS[name]!r}.items()))
specs.DATASETS[{name!r}] = dataclasses.replace(dataset, spec=spec)
masks.THREADS = 1
encode = codec.encode_mask
codec.encode_mask = lambda labels: (time.sleep(0.2), encode(labels))[1]
builders.prepare({name!r}, source={list(map(str, source))!r}, data_dir={str(data)!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        noted = 0
        while noted < after and process.poll() is None and time.monotonic() < deadline:
            noted = sum(path.read_bytes().count(b"\n") for path in data.rglob("checked.jsonl"))
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and noted >= after


@pytest.mark.parametrize("name, form", [("cityscapes", "archives"), ("pet", "archives"), ("voc", "tree")])
def test_a_killed_preparation_continues_after_the_checked_images(name, form, few, tmp_path, data, capsys):
    source = forms(name, tmp_path)[form]
    start_and_kill(name, data, source, after=2)
    assert not list(data.rglob("dataset_info.json")) and list(data.rglob(".converting-*/train/*.png"))
    # What a process may leave half-done: a line, and a mask.
    (journal,) = data.rglob("checked.jsonl")
    noted = journal.read_text().count("\n")
    journal.write_text(journal.read_text() + '["train", "some')
    half = next(iter(sorted(data.rglob(".converting-*/train/*.png"))))
    half.write_bytes(half.read_bytes()[:-20])
    prepared = prepare(name, data, *source)
    total = sum(COUNTS[name].values())
    assert f"Taking over {noted} of {total} images that an interrupted preparation" in capsys.readouterr().out
    assert [path.name for path in (data / f"segjax_{name}").iterdir()] == ["1.1.0"]
    whole = prepare(name, tmp_path / "at once", *source)
    assert records_in(prepared) == records_in(whole)
    assert prepared.metadata == whole.metadata and prepared.splits == whole.splits


def test_checked_images_are_not_decoded_again(few, tmp_path, data, monkeypatch):
    made = Made(tmp_path / "made", "ade20k")
    with monkeypatch.context() as patch:
        patch.setattr(builders, "_metadata", lambda *_: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            prepare("ade20k", data, made.root)
    monkeypatch.setattr(codec, "decode_image", lambda _: pytest.fail("decoded again"))
    assert prepare("ade20k", data, made.root).splits == COUNTS["ade20k"]


def test_a_source_that_may_have_changed_is_checked_from_the_start(few, tmp_path, data, capsys):
    made = Made(tmp_path / "made", "ade20k")
    start_and_kill("ade20k", data, [made.root], after=2)
    os.utime(made.root / FIRST_MASK["ade20k"], ns=(0, 1))
    assert prepare("ade20k", data, made.root).splits == COUNTS["ade20k"]
    assert "Taking over" not in capsys.readouterr().out
    assert [path.name for path in (data / "segjax_ade20k").iterdir()] == ["1.1.0"]


def test_a_truncated_line_of_the_journal_does_not_damage_later_ones(tmp_path):
    first, second = (masks.Measured((i, 2), ((3, 4), (255, 1)), ("hash", None)) for i in range(2))
    for name, measured in (("a", first), ("b", second)):
        scratch = masks.Scratch(tmp_path / "scratch")
        with scratch.journal() as note:
            note("train", name, measured)
        with (tmp_path / "scratch/checked.jsonl").open("a") as file:
            file.write('{"split": "train", "name": "c", "size": [1')
    with (tmp_path / "scratch/checked.jsonl").open("a") as file:
        # Of another version, of other types, of another length, too deep.
        file.writelines(f"\n{line}" for line in ('["train", "d", [1, 2], [3]]', "{}", "7", "[" * 100_000))
        file.write('\n{"split": "train", "name": "e", "size": [1, "2"], "values": [], "hashes": ["hash", null]}')
        file.write('\n{"split": "train", "name": "f", "size": [1, 2, 3], "values": [], "hashes": ["hash", null]}')
    assert scratch.checked() == {("train", "a"): first, ("train", "b"): second}


# What is refused


def refused(name, data: Path, *source: Path) -> str:
    """The report on a source that must be refused, with nothing written."""
    with pytest.raises(builders.DataError) as error:
        prepare(name, data, *source)
    assert not data.exists(), sorted(data.rglob("*"))
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_images_other_than_the_published_ones_are_refused(name, tmp_path, data):
    made = Made(tmp_path / "made", name)
    published_numbers = ", ".join(f"{split} {count}" for split, count in specs.DATASETS[name].spec.splits)
    made_numbers = ", ".join(f"{split} {count}" for split, count in COUNTS[name].items())
    for source in ([made.root], made.packed(tmp_path / "archives")):
        report = refused(name, data, *source)
        assert f"{made_numbers} instead of {published_numbers}" in report and f"differ from those of {name}" in report
        assert all(str(path) in report for path in source)


FIRST_MASK = {
    "cityscapes": "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
    "ade20k": "ADEChallengeData2016/annotations/training/ADE_train_00000001.png",
    "voc": "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png",
    "pet": "annotations/trimaps/Abyssinian_1.png",
}
FIRST_IMAGE = {
    "cityscapes": "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
    "ade20k": "ADEChallengeData2016/images/training/ADE_train_00000001.jpg",
    "voc": "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg",
    "pet": "images/Abyssinian_1.jpg",
}
STRAY = {"cityscapes": 34, "ade20k": 151, "voc": 21, "pet": 0}
RANGE = {"cityscapes": "0..33", "ade20k": "0..150", "voc": "0..20 and 255", "pet": "1..3"}


@pytest.mark.parametrize("name", NAMES)
def test_an_unexpected_mask_value_is_refused_with_file_and_value(name, few, tmp_path, data):
    made = Made(tmp_path / "made", name)
    mask = np.full((30, 50), min(VALUES[name], key=lambda value: value != 1), np.uint8)
    mask[:2, :3] = STRAY[name]
    mask[5, 5] = 200
    write(made.root / FIRST_MASK[name], encoded(".png", mask))
    report = refused(name, data, made.root)
    assert f"{FIRST_MASK[name]}: {STRAY[name]} (6 pixels), 200 (1 pixels)" in report
    assert f"mask values that {name} does not have (it has {RANGE[name]})" in report


def test_train_ids_instead_of_cityscapes_label_ids_are_refused(few, tmp_path, data):
    made = Made(tmp_path / "made", "cityscapes")
    write(made.root / FIRST_MASK["cityscapes"], encoded(".png", np.full((30, 50), 255, np.uint8)))
    assert "255 (1500 pixels)" in refused("cityscapes", data, made.root)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_files_are_refused_by_name(name, packed, few, tmp_path, data):
    made = Made(tmp_path / "made", name)
    image, mask = (made.root / path[name] for path in (FIRST_IMAGE, FIRST_MASK))
    image.write_bytes(image.read_bytes()[:-30])
    mask.write_bytes(b"\0" + mask.read_bytes())
    report = refused(name, data, *(made.packed(tmp_path / "archives") if packed else [made.root]))
    assert f"{FIRST_IMAGE[name]}: is truncated" in report
    assert f"{FIRST_MASK[name]}: begins with b'\\x00\\x89PNG" in report
    assert ("images.tar.gz: " in report) == (packed and name == "pet")


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_another_kind_or_size_are_refused(name, few, tmp_path, data):
    made = Made(tmp_path / "made", name)
    mask = made.root / FIRST_MASK[name]
    write(mask, encoded(".png", np.zeros((30, 50, 3), np.uint8)))
    assert "not 8-bit grey or palette PNG, as published" in refused(name, data, made.root)
    write(mask, encoded(".png", np.full((50, 30), 1, np.uint8)))
    assert f"{FIRST_MASK[name]} is 50 x 30, its image 30 x 50" in refused(name, data, made.root)


@pytest.mark.parametrize("name", NAMES)
def test_unpaired_images_and_masks_are_refused(name, few, tmp_path, data):
    for missing, other in ((FIRST_MASK[name], FIRST_IMAGE[name]), (FIRST_IMAGE[name], FIRST_MASK[name])):
        made = Made(tmp_path / "made", name)
        (made.root / missing).unlink()
        report = refused(name, data, made.root)
        if name in ("cityscapes", "ade20k"):
            kind = "images without a mask" if missing == FIRST_MASK[name] else "masks without an image"
            assert kind in report and other in report
        else:
            # What is listed by name is missed by name.
            assert "missing files that" in report and Path(missing).name in report
        assert "train 2" in report and "instead of train 3" in report


@pytest.mark.parametrize("name, path", [
    ("voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"),
    ("pet", "annotations/test.txt"),
])  # fmt: skip
def test_a_missing_list_of_images_is_refused(name, path, few, tmp_path, data):
    made = Made(tmp_path / "made", name)
    (made.root / path).unlink()
    report = refused(name, data, made.root)
    assert "lists of images missing" in report and path.removeprefix("VOCdevkit/VOC2012/") in report


@pytest.mark.parametrize("name", ["cityscapes", "pet"])
def test_one_of_two_archives_is_refused_with_the_name_of_the_other(name, few, tmp_path, data):
    archives = Made(tmp_path / "made", name).packed(tmp_path / "archives")
    for given, missing in (archives, archives[::-1]):
        part = ARCHIVES[name][missing.name]
        report = refused(name, data, given)
        assert f"{part}/, which comes in {missing.name}; found: " in report
        assert ARCHIVES[name][given.name] in report.partition("found: ")[2]


@pytest.mark.parametrize("name", NAMES)
def test_other_sources_are_refused_with_their_contents(name, few, tmp_path, data):
    write(tmp_path / "other/photos/a.jpg")
    write(tmp_path / "other/.hidden/b")
    pack(tmp_path / "other", tmp_path / "other.zip", "photos")
    (tmp_path / "empty").mkdir()
    needs = next(iter(ARCHIVES[name]))
    for source, found in (("other", "other holds .hidden, photos"), ("empty", "empty holds nothing")):
        report = refused(name, data, tmp_path / source)
        assert found in report and needs in report and archives.READERS[name].layout in report
    report = refused(name, data, tmp_path / "other.zip")
    assert f"which comes in {needs}; found: README, photos" in report


def test_a_file_that_is_not_an_archive_is_refused(few, tmp_path, data):
    page = write(tmp_path / "leftImg8bit_trainvaltest.zip", b"<html>Please log in</html>" * 100)
    cut = Made(tmp_path / "made", "cityscapes").packed(tmp_path / "archives")[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    report = refused("cityscapes", data, page, cut)
    assert "no complete .zip, .tar or .tar.gz; fetch them again" in report
    assert f"{page}: begins with b'<htm'" in report and f"{cut}: a .zip that is cut short" in report
    report = refused("cityscapes", data, tmp_path / "nowhere.zip", tmp_path / "made")
    assert "neither a file nor a folder" in report and "nowhere.zip" in report and "made\n" not in report


@pytest.mark.parametrize("keep", [100, 0.5, 0.99])
def test_a_truncated_tar_gz_is_refused(keep, few, tmp_path, data):
    images, annotations = Made(tmp_path / "made", "pet").packed(tmp_path / "archives")
    content = images.read_bytes()
    images.write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    assert f"{images}: damaged or cut short" in refused("pet", data, images, annotations)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.8])
def test_a_truncated_tar_is_refused(keep, few, tmp_path, data):
    (archive,) = Made(tmp_path / "made", "voc").packed(tmp_path / "archives")
    archive.write_bytes(archive.read_bytes()[: int(keep * archive.stat().st_size)])
    refused("voc", data, archive)


def test_a_damaged_file_inside_a_zip_is_refused_by_name(few, tmp_path, data):
    (archive,) = Made(tmp_path / "made", "ade20k").packed(tmp_path / "archives")
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo(FIRST_IMAGE["ade20k"])
    start = info.header_offset + 30 + len(info.filename) + info.compress_size // 2
    content[start : start + 20] = bytes(20)
    archive.write_bytes(content)
    report = refused("ade20k", data, archive)
    assert f"ADEChallengeData2016.zip: {FIRST_IMAGE['ade20k']}: cannot be read" in report


def test_files_that_are_given_twice_are_refused(few, tmp_path, data):
    made = Made(tmp_path / "made", "cityscapes")
    report = refused("cityscapes", data, made.root, *made.packed(tmp_path / "archives"))
    assert "files that were given twice" in report and "gtFine_trainvaltest.zip" in report


def test_a_source_other_than_that_of_the_prepared_dataset_is_refused(few, tmp_path, data):
    prepare("voc", data, Made(tmp_path / "made", "voc").root)
    other = Made(tmp_path / "other", "voc", seed=5)
    with pytest.raises(builders.DataError, match=r"was prepared from .*made.*delete that directory"):
        prepare("voc", data, other.root)
    assert not list(data.rglob(".converting*"))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_source_the_error_names_what_is_needed(name, data):
    with pytest.raises(builders.DataError) as error:
        builders.prepare(name, source=None, data_dir=str(data))
    # Each command adds its own flag.
    for part in (f"{name} is not prepared yet", *ARCHIVES[name], "with the splits train"):
        assert part in str(error.value)


# The command


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "segjax.data", *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_command_prints_splits_classes_and_location(name, few, tmp_path, data, capsys):
    made = Made(tmp_path / "made", name)
    assert main(["prepare", name, "--source", *map(str, made.packed(tmp_path)), "--data-dir", str(data)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Preparing {name}, images per split: train 3")
    assert lines[0].startswith("  from ") and lines[1] == f"  to {data}/segjax_{name}/1.1.0"
    lines = lines[2:]
    assert lines[-1] == f"{name}: {data}/segjax_{name}/1.1.0"
    assert max(map(len, lines[:-1])) <= 80 and len(lines) <= 90
    text = "\n".join(lines)
    for split, count in COUNTS[name].items():
        assert f"{split:<20} {count:>9}" in text
    assert ("not published" in text) == (name == "cityscapes")
    spec = specs.DATASETS[name].spec
    assert all(label[:18] in text for label in spec.label_names)
    labels = builders.prepare(name, source=None, data_dir=str(data)).load("train").labels
    counts = np.array([np.sum(labels == value) for value in range(len(spec.label_names))])
    chosen = spec.label_names[1]
    share, weight = 100 * counts[1] / counts.sum(), np.median(counts[counts > 0]) / counts[1]
    assert f"{chosen:<18.18} {share:8.4f} {weight:9.4f}" in text
    # Again it only shows.
    assert main(["prepare", name, "--data-dir", str(data)]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_the_command_ends_with_2_and_one_error(tmp_path):
    done = run("prepare", "cityscapes", "--source", tmp_path / "none.zip", "--data-dir", tmp_path / "data")
    assert done.returncode == 2 and done.stdout == ""
    # Prose is wrapped, the list below it is not.
    assert done.stderr.startswith("segjax data: cityscapes:") and done.stderr.count("\n    ") == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "data").exists()
    done = run("prepare", "kitti")
    assert done.returncode == 2 and "invalid choice: 'kitti'" in done.stderr and "ade20k" in done.stderr


def test_ctrl_c_keeps_finished_work(few, tmp_path, data, monkeypatch, capsys):
    made = Made(tmp_path / "made", "pet")
    encode, calls = codec.encode_mask, []

    def encode_some(labels):
        calls.append(labels)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return encode(labels)

    with monkeypatch.context() as patch:
        patch.setattr(masks, "THREADS", 1)
        patch.setattr(codec, "encode_mask", encode_some)
        assert main(["prepare", "pet", "--source", str(made.root), "--data-dir", str(data)]) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert main(["prepare", "pet", "--source", str(made.root), "--data-dir", str(data)]) == 0
    assert "Taking over 2 of 5 images" in capsys.readouterr().out


def test_the_first_run_prepares_the_dataset_of_its_config(few, tmp_path, data):
    from configs import segformer
    from segjax.train import setup

    made = Made(tmp_path / "made", "cityscapes")
    config = segformer.get_config("b0,cityscapes")
    config.data.source, config.data.dir = str(made.root), str(data)
    training, evaluation = setup.load_data(config.data, seed=config.seed)
    assert (len(training.data.images), len(evaluation.data.images), training.spec.name) == (3, 2, "cityscapes")
