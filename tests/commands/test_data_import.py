"""`segjax data import` writes nothing outside its folder, which appears atomically."""

import builtins
import contextlib
import sys

import pytest

from segjax.commands.data import main
from segjax.data.annotations import write as writing
from tests.made_annotations import picture, rectangle, write_json
from tests.made_archives import write


@pytest.fixture
def source(tmp_path):
    image = {"id": 1, "file_name": "a.png", "height": 4, "width": 6}
    annotation = {"image_id": 1, "category_id": 1, "segmentation": [rectangle(1, 1, 3, 3)]}
    categories = [{"id": 1, "name": "cat"}]
    write_json(tmp_path / "x/a.json", {"images": [image], "annotations": [annotation], "categories": categories})
    write(tmp_path / "x/a.png", picture(4, 6))
    return tmp_path / "x"


def test_a_folder_with_files_is_refused_and_an_empty_one_is_filled(source, tmp_path, capsys):
    write(tmp_path / "full/mine.txt", b"mine")
    assert main(["import", "coco", str(source), str(tmp_path / "full")]) == 2
    assert "is not empty" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert main(["import", "coco", str(source), str(tmp_path / "full/mine.txt")]) == 2
    assert "is not a folder" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "empty").mkdir()
    with contextlib.chdir(tmp_path / "empty"):
        assert main(["import", "coco", str(source), "."]) == 2
    assert "is the current folder" in " ".join(capsys.readouterr().err.split())
    assert main(["import", "coco", str(source), str(tmp_path / "empty")]) == 0
    assert f"segjax data prepare folder --source {tmp_path / 'empty'}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["classes.json", "images", "labels"]


def test_a_missing_source_is_named(tmp_path, capsys):
    assert main(["import", "voc", str(tmp_path / "x"), str(tmp_path / "out")]) == 2
    assert "does not exist" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_import_leaves_nothing(source, tmp_path, capsys, monkeypatch, error):
    def stop(*_):
        assert list(tmp_path.glob(".out*"))
        raise error

    monkeypatch.setattr(writing.codec, "encode_mask", stop)
    status = main(["import", "coco", str(source), str(tmp_path / "out")])
    assert status == (130 if error is KeyboardInterrupt else 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_if_pycocotools_is_missing_its_pip_command_is_printed(source, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "pycocotools":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "pycocotools", raising=False)
    assert main(["import", "coco", str(source), str(tmp_path / "out")]) == 2
    assert "pip install 'segjax[import]'" in " ".join(capsys.readouterr().err.split())


def test_help_names_the_formats(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["import", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("coco", "labelme", "yolo", "voc", "ignore value"))
    assert max(map(len, said.splitlines())) <= 80
