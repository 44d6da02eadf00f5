"""No image or mask is silently dropped or misread, or blocks, whatever a data folder or an archive contains."""

import gzip
import io
import itertools
import json
import os
import re
import socket
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segjax.data import builders, codec, prepared, sources
from tests.made_archives import write

if not hasattr(os, "mkfifo"):
    pytest.skip("prepared datasets need array_record, which has no version for Windows", allow_module_level=True)


def saved(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def image(seed: int, size=(6, 9)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def mask(values, seed: int = 0, size=(6, 9)) -> bytes:
    """A mask in which each of the values occurs."""
    found = np.resize(np.array(values, np.uint8), size[0] * size[1])
    return saved(np.random.default_rng(seed).permutation(found).reshape(size))


def folder(root: Path, *, names: int = 3, ignore: int = 255, values=None, size=(6, 9), **classes) -> Path:
    """Images a and b to train, a to test; `values` is what each mask holds, in the order train/a, train/b, test/a."""
    values = values or [range(names)] * 3
    for (split, stem), of in zip((("train", "a"), ("train", "b"), ("test", "a")), values, strict=True):
        write(root / f"images/{split}/{stem}.png", saved(image(ord(stem), size)))
        write(root / f"labels/{split}/{stem}.png", mask(of, ord(stem), size))
    known = {"names": [f"class{k}" for k in range(names)], "colors": [[k, 9, 7] for k in range(names)]}
    write(root / "classes.json", json.dumps({**known, "ignore": ignore, "name": "toy", **classes}).encode())
    return root


def prepare(root: Path, tmp_path: Path) -> builders.Prepared:
    return builders.prepare("folder", source=root, data_dir=tmp_path / "data")


def refused(root: Path, tmp_path: Path) -> str:
    with pytest.raises(builders.DataError) as error:
        prepare(root, tmp_path)
    assert not (tmp_path / "data").exists()
    return str(error.value)


# Masks that cannot be what classes.json says


@pytest.mark.parametrize("names, ignore", [(1, 255), (2, 255), (1, 2), (2, 254)])
def test_binary_masks_of_0_and_255_become_0_and_1_with_a_message(tmp_path, capsys, names, ignore):
    root = folder(tmp_path / "x", names=names, ignore=ignore, values=[(0, 255), (0,), (0, 0, 255)])
    found = prepare(root, tmp_path)
    assert "masks of 0 and 255 are read as 0" in capsys.readouterr().out
    for split in ("train", "test"):
        stored = found.load(split).labels
        expected = [np.array(Image.open(path)) // 255 for path in sorted((root / "labels" / split).iterdir())]
        np.testing.assert_array_equal(stored, expected)
        assert found.pixel_counts(split) == [np.sum(np.stack(expected) == k) for k in range(2)]


def test_binary_masks_that_use_the_ignore_value_stay_unchanged(tmp_path, capsys):
    found = prepare(folder(tmp_path / "x", names=2, values=[(0, 1, 255), (0, 255), (0, 1)]), tmp_path)
    assert np.unique(found.load("train").labels).tolist() == [0, 1, 255] and "0 and 255" not in capsys.readouterr().out


def test_masks_of_0_and_255_next_to_masks_of_0_and_1_are_refused_by_name(tmp_path):
    report = refused(folder(tmp_path / "x", names=2, values=[(0, 255), (0, 1), (0, 1)]), tmp_path)
    assert "labels/train/a.png" in report and "b.png" not in report and "write 1 instead" in report


@pytest.mark.parametrize(
    ("settings", "values", "said"),
    [
        ({}, (0, 1, 255), ["2, class2", "values 0, 1, 255", '"absent": ["class2"]']),
        ({}, (0, 255), ["1, class1", "2, class2"]),
        ({}, (255,), ["0, class0", "100.0%"]),
        ({"ignore": 3}, (1, 2, 3), ["0, class0", "subtract 1"]),
        ({"names": 5}, (0, 1, 2, 3, 255), ["4, class4"]),
        ({}, (1, 2, 3), ["neither a class", "3 (", "subtract 1"]),
        ({}, (0, 1, 2, 3), ["neither a class", "if 0 is not a class"]),
        ({}, (0, 128, 255), ["neither a class", "128 (", "128 to 1, 255 to 2"]),
        ({"names": 4}, (0, 85, 170, 255), ["85 to 1, 170 to 2, 255 to 3"]),
        ({}, (7, 8, 255), ["neither a class", "7 ("]),
        ({"names": 2}, (0, 254), ["neither a class", "254 ("]),
        ({"ignore": 0}, (0, 1, 2), ["also the id of class", "subtract 1"]),
        ({"absent": ["class9"]}, (0, 1, 2), ['"absent" is not a list of some of "names"']),
        ({"absent": 3}, (0, 1, 2), ['"absent" is not a list of some of "names"']),
    ],
)
def test_mask_values_that_contradict_classes_json_are_refused(tmp_path, settings, values, said):
    report = refused(folder(tmp_path / "x", values=[values] * 3, **settings), tmp_path)
    assert [part for part in said if part not in report] == [], report


def test_a_class_listed_as_absent_may_have_no_pixels(tmp_path):
    found = prepare(folder(tmp_path / "x", values=[(0, 1, 255)] * 3, absent=["class2"]), tmp_path)
    assert found.pixel_counts("train")[2] == 0


def test_a_class_without_pixels_is_accepted_if_nothing_is_ignored(tmp_path):
    assert prepare(folder(tmp_path / "x", values=[(0, 1)] * 3), tmp_path).pixel_counts("train")[2] == 0


# What lies in a folder


def test_files_are_recognised_by_content(tmp_path):
    root = folder(tmp_path / "x")
    (root / "images/train/a.png").unlink()
    write(root / "images/train/a.jfif", saved(image(1), "JPEG"))
    (root / "images/train/b.png").rename(root / "images/train/b.data")
    (root / "labels/train/b.png").rename(root / "labels/train/b.PNG.jpg")
    (root / "images/train/b.data").rename(root / "images/train/b.PNG.data")
    assert prepare(root, tmp_path).load("train").names == ("a", "b.PNG")


def test_a_gif_is_stored_as_png_and_an_animation_is_refused(tmp_path):
    root, grey = folder(tmp_path / "x"), image(4)[..., 0]
    write(root / "images/test/a.png", saved(grey, "GIF"))
    np.testing.assert_array_equal(prepare(root, tmp_path).load("test").images[0], np.stack([grey] * 3, axis=-1))
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "GIF", save_all=True, append_images=[Image.fromarray(255 - grey)])
    write(root / "images/test/a.png", buffer.getvalue())
    with pytest.raises(builders.DataError, match=r"animations, (.|\n)*images/test/a\.png"):
        prepare(root, tmp_path)


def test_names_in_two_unicode_forms_are_matched(tmp_path, capsys):
    root = folder(tmp_path / "x")
    for part, form in (("images", "NFD"), ("labels", "NFC")):
        (root / part / "train/a.png").rename(root / part / "train" / unicodedata.normalize(form, "é.png"))
    assert prepare(root, tmp_path).load("train").names == ("b", "\xe9")
    assert "Unicode form" in capsys.readouterr().out
    write(root / "images/train" / unicodedata.normalize("NFC", "é.jpg"), saved(image(3), "JPEG"))
    with pytest.raises(builders.DataError, match="differ only in the suffix"):
        prepare(root, tmp_path)


def test_skipped_files_are_printed(tmp_path, capsys):
    root = folder(tmp_path / "x")
    write(root / "images/train/.c.png", saved(image(3)))
    prepare(root, tmp_path)
    assert "hidden files, which are skipped: 1, such as images/train/.c.png" in capsys.readouterr().out


KINDS = ("FIFO", "socket", "device", "link to a device", "link to nothing", "folder")
PLACES = ("images/train/c.png", "labels/train/c.png", "classes.json", "images/c")


# A folder in images/ is a split.
@pytest.mark.parametrize("name, kind", sorted({*itertools.product(PLACES, KINDS)} - {("images/c", "folder")}))
def test_fifos_sockets_and_devices_are_refused_by_name_and_kind_at_once(tmp_path, name, kind):
    root = folder(tmp_path / "x")
    path = root / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("only root makes devices")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else "/nowhere")
    report = refused(root, tmp_path)
    assert name in report and (
        kind.removeprefix("link to a ") in report or "No such file" in report or "link" in report
    )


@pytest.mark.parametrize("deeper", [True, False])
def test_a_dataset_one_folder_up_or_down_is_named(tmp_path, deeper):
    root = folder(tmp_path / "x")
    report = refused(tmp_path if deeper else root / "images", tmp_path)
    assert f"{root} has images/ and labels/; give that folder" in report


def test_links_to_folders_are_followed_and_nested_folders_are_refused(tmp_path):
    real, root = folder(tmp_path / "real"), tmp_path / "x"
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
        for split in ("train", "test"):
            (root / part / split).symlink_to(real / part / split)
    (root / "classes.json").symlink_to(real / "classes.json")
    assert prepare(root, tmp_path).splits == {"test": 1, "train": 2}
    for part in ("images", "labels"):
        (real / part / "train/bern").symlink_to(real / part / "train")
    with pytest.raises(builders.DataError, match=r"folders in the folder of a split[^-]*images/train/bern"):
        prepare(root, tmp_path)


def test_circular_links_are_followed_once_and_listed(tmp_path):
    for name in ("a/x", "b/y"):
        write(tmp_path / "images" / name)
    for link, target in (("a/up", "images"), ("b/self", "images/b"), ("b/a", "images/a")):
        (tmp_path / "images" / link).symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / "images/b/pipe")
    problems, skipped = defaultdict(list), []
    found = [name for name, _ in sources.in_folder(tmp_path, ["images"], problems, skipped)]
    assert found == ["images/a/x", "images/b/y"] and sorted(skipped) == ["images/a/up", "images/b/a", "images/b/self"]
    assert "images/b/pipe: a FIFO" in str(problems)


# Bombs


def bomb(width: int, height: int) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return codec.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    data = bytearray(saved(image(0), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 50_000)
    return bytes(data)


@pytest.mark.parametrize("content", [bomb(30_000, 20_000), jpeg_bomb()], ids=["PNG", "JPEG"])
def test_the_size_in_the_header_is_checked_before_decoding(tmp_path, monkeypatch, content):
    root = folder(tmp_path / "x")
    write(root / "images/train/a.png", content)
    decode = codec._decode
    monkeypatch.setattr(
        codec, "_decode", lambda data, _: pytest.fail("decoded") if data == content else decode(data, _)
    )
    assert "images of more than 178,956,970 pixels" in (report := refused(root, tmp_path))
    assert "images/train/a.png" in report


def in_archive(path: Path, tmp_path: Path):
    problems = defaultdict(list)
    with ExitStack() as opened:
        found = sources.in_archive(path, lambda: tmp_path / "scratch", opened, problems)
        return {name: file.read() for name, file in found.items()}, dict(problems)


def test_zip_members_too_large_or_dense_for_images_are_refused_by_name(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", bytes(20 << 20))
    with pytest.raises(ValueError, match=r"x\.zip: images/a\.jpg: unpacks from"):
        in_archive(path, tmp_path)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    # A declared size that is not the real one, which is smaller or larger.
    for size in (3 << 30, 5):
        data[at : at + 4] = struct.pack("<I", size)
        path.write_bytes(data)
        with pytest.raises((ValueError, OSError), match=r"x\.zip"):
            in_archive(path, tmp_path)


def test_a_gz_bomb_is_stopped_before_it_fills_the_disk(tmp_path):
    path = tmp_path / "images.tar.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(100):
            file.write(bytes(1 << 20))
    with pytest.raises(sources.ArchiveError, match="unpacks from"):
        in_archive(path, tmp_path)
    assert not [file for file in (tmp_path / "scratch").rglob("*") if file.is_file()]


# Members of archives


def test_duplicate_zip_members_are_refused_and_the_last_of_a_tar_is_used(tmp_path, capsys):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for content in (b"one", b"two"):
            archive.writestr("images/a.jpg", content)
    assert ["x.zip: images/a.jpg"] in in_archive(tmp_path / "x.zip", tmp_path)[1].values()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (b"one", b"two"):
            archive.addfile(member("images/a.jpg", len(content)), io.BytesIO(content))
    assert in_archive(tmp_path / "x.tar", tmp_path) == ({"images/a.jpg": b"two"}, {})
    assert "x.tar: 1 files occur twice" in capsys.readouterr().out


def member(name: str, size: int = 0, **settings) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size = size
    for key, value in settings.items():
        setattr(found, key, value)
    return found


UNSAFE = ["/etc/passwd", "../x.jpg", "images/../../x.jpg", "C:\\x.jpg", "images\\..\\x.jpg", "\\\\host\\x", "", "./"]


@pytest.mark.parametrize("name", UNSAFE)
def test_archive_members_with_unsafe_paths_are_refused_by_name(tmp_path, name):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member(name))
    files, problems = in_archive(tmp_path / "x.tar", tmp_path)
    (entry,) = next(iter(problems.values()))
    assert not files and entry.startswith(f"x.tar: {name!r} has a")
    if name not in ("", "./"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr(name, b"x")
        files, problems = in_archive(tmp_path / "x.zip", tmp_path)
        assert not files and "x.zip" in str(problems)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_archives_are_refused_by_name(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member("images/a.jpg", type=kind, linkname="/etc/passwd"))
    files, problems = in_archive(tmp_path / "x.tar", tmp_path)
    assert not files and "images/a.jpg" in str(problems)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("images/a.jpg")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    files, problems = in_archive(tmp_path / "x.zip", tmp_path)
    assert not files and "images/a.jpg' is a link" in str(problems)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["x.zip", "x.tar", "x.tar.gz"])
def test_a_damaged_archive_is_refused_with_a_message(tmp_path, kind, seed):
    whole = tmp_path / kind
    if kind == "x.zip":
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in "abc":
                archive.writestr(f"images/{name}", os.urandom(900))
    else:
        with tarfile.open(whole, "w:gz" if kind.endswith("gz") else "w") as archive:
            for name in "abc":
                archive.addfile(member(f"images/{name}", 900), io.BytesIO(os.urandom(900)))
    data, rng = whole.read_bytes(), np.random.default_rng(seed)
    for number in range(40):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            changed[at] = rng.integers(256)
        path = write(
            tmp_path / f"{number}" / kind, bytes(changed[: rng.integers(1, len(data))] if number % 2 else changed)
        )
        # Every other exception than these would end a command with a traceback.
        try:
            in_archive(path, path.parent)
        except (ValueError, OSError) as error:
            assert str(error)


def test_an_archive_dataset_in_a_subfolder_is_named(tmp_path):
    (tmp_path / "inside/ADEChallengeData2016/images").mkdir(parents=True)
    with pytest.raises(builders.DataError, match=f"give {tmp_path / 'inside'}, which holds some"):
        builders.prepare("ade20k", source=tmp_path, data_dir=tmp_path / "data")


# Damaged prepared datasets


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("metadata.json", lambda text: "[" * 100_000, "metadata.json"),
        ("metadata.json", lambda text: text[:-30], "metadata.json"),
        ("metadata.json", lambda text: "{}", "metadata.json: spec is missing"),
        ("metadata.json", lambda text: text.replace('"ignore_label": 255', '"ignore_label": "x"'), "spec.ignore_label"),
        ("metadata.json", lambda text: text.replace('["a", "b"]', '["a"]'), "names.train"),
        ("metadata.json", lambda text: text.replace('"pixels": {"test": [', '"pixels": {"test": [1, '), "pixels.test"),
        (
            "metadata.json",
            lambda text: text.replace('"ignore_label": 255', '"ignore_label": 1'),
            "metadata.json: spec: ",
        ),
        ("metadata.json", lambda text: text.replace('"ignore_label": 255', '"ignore_label": 99999'), "spec: "),
        (
            "metadata.json",
            lambda text: re.sub(r'(?<="sizes": {"test": \[\[)\d+', "1099511627776", text),
            "sizes",
        ),
        ("metadata.json", lambda text: re.sub(r'"colors": \[\[\d+', '"colors": [[999', text), "spec.colors.0.0"),
        ("metadata.json", lambda text: text.replace('"splits": []', '"splits": [[1, "a"]]'), "spec.splits"),
        ("features.json", lambda text: "[1]", "1.1.0"),
        ("dataset_info.json", lambda text: text[:40], "dataset_info.json"),
        ("dataset_info.json", lambda text: text.replace('"name": "train"', '"name": "tram"'), "tram"),
        ("dataset_info.json", lambda text: text.replace("{SPLIT}", "x{SPLIT}"), "dataset_info.json: it names the file"),
    ],
)
def test_a_damaged_prepared_dataset_is_refused_with_file_and_key(tmp_path, name, change, said):
    path = prepare(folder(tmp_path / "x"), tmp_path).path
    text = (path / name).read_text()
    if name == "metadata.json":
        text = json.dumps(json.loads(text))
    (path / name).write_text(changed := change(text))
    assert changed != text
    with pytest.raises(builders.DataError) as error:
        prepared.open_prepared(path)
    assert said in str(error.value) and "delete that directory and prepare the dataset again" in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_in_place_of_records_is_refused_at_once(tmp_path):
    path = prepare(folder(tmp_path / "x"), tmp_path).path
    records = next(path.glob("*train.array_record*"))
    records.unlink()
    os.mkfifo(records)
    with pytest.raises(builders.DataError, match=rf"{records.name}: a FIFO, not a file; delete that directory"):
        prepared.open_prepared(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
    ],
)
def test_a_damaged_file_of_records_is_named(tmp_path, damage):
    found = prepare(folder(tmp_path / "x"), tmp_path)
    damage(records := next(found.path.glob("*train.array_record*")))
    with pytest.raises(builders.DataError, match="delete that directory and prepare the dataset again"):
        found.load("train")
    if not records.exists():
        with pytest.raises(builders.DataError, match=rf"{records.name}, which is missing; delete that directory"):
            prepared.open_prepared(found.path)
