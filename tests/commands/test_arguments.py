"""Arguments of commands: numbers beyond any memory are refused by name and range before anything is read."""

import contextlib
import re
import shutil

import cv2
import numpy as np
import pytest

from segjax import __main__ as entry
from segjax.checkpoints.save import save
from segjax.commands import evaluate, train
from segjax.runtime import console
from tests.tiny import tiny_model

PREDICT = ("predict", "a.safetensors", "a.png", "--output", "out")
EVALUATE = ("evaluate", "a.safetensors", "--data", "streets")
BENCHMARK, SHOW, SUMMARY = ("benchmark",), ("data", "show"), ("summary", "segformer_b0")
EXPORT = ("export", "a.safetensors", "b.onnx", "--format", "onnx")
SIZED = (*SUMMARY, "--size", "32", "64")

CASES = [
    *[(command, "--batch", value) for command in (PREDICT, EVALUATE, BENCHMARK) for value in ("0", "-3", "9" * 12)],
    *[(PREDICT, option, "100000000000") for option in ("--pad-multiple", "--size-divisor")],
    *[(command, "--crop", f"64 {value}") for command in (PREDICT, EVALUATE, SHOW) for value in ("0", "10000000")],
    *[(PREDICT, option, "1000000 64") for option in ("--stride", "--base-size")],
    *[(EVALUATE, "--scales", f"1 {value}") for value in ("nan", "inf", "-1", "1e9", "1e400")],
    *[(SHOW, "--scale", f"0.5 {value}") for value in ("nan", "1e9")],
    *[(SHOW, "--seed", value) for value in ("-1", "99999999999999999999", "9" * 6000)],
    *[(SHOW, "--num", value) for value in ("0", "1000000000")],
    *[(command, "--num-classes", value) for command in (BENCHMARK, SIZED) for value in ("0", "1000000000000")],
    (("convert", "a.pth", "b.pth"), "--num-classes", "1000000000000"),
    *[(command, "--size", "32 9999999999") for command in (BENCHMARK, SUMMARY, EXPORT)],
    (BENCHMARK, "--rounds", "1000000000"),
    (BENCHMARK, "--minutes", "nan"),
    (PREDICT, "--batch", "two"),
]


@pytest.mark.parametrize("command, option, value", CASES, ids=lambda value: " ".join(value)[:40])
def test_a_number_out_of_range_is_refused_with_its_name_and_range(command, option, value, capsys):
    with pytest.raises(SystemExit) as end:
        entry.main([*command, option, *value.split()])
    message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"argument {option}: " in message and len(message) < 160
    assert re.search(r"; must be (a (whole )?number, )?(at (least|most)|greater than|finite)", message)


IMPOSSIBLE = {
    "optim.power": "nan",
    "optim.weight_decay": "-1.0",
    "optim.eps": "-1.0",
    "optim.momentum": "2.0",
    "optim.beta2": "inf",
    "optim.lr": "nan",
    "augment.scale": "(1.0, 1e9)",
    "label": "../../evil",
    "seed": "99999999999999999999",
    "train.batch": "1000000000",
    "train.steps": "-5",
    "eval.pictures": "1000000000",
    "data.train_images": "1000000000000",
    "model.decoder_dim": "10000000000",
    "model.dropout_rate": "nan",
}


def test_all_invalid_settings_are_listed_in_one_error(tmp_path, capsys):
    settings = [f"--config.{key}={value}" for key, value in IMPOSSIBLE.items()]
    assert train.main([f"--workdir={tmp_path / 'run'}", *settings]) == 2
    listed = re.findall(r"^  config\.([\w.]+): .*must be ", capsys.readouterr().err, re.MULTILINE)
    assert sorted(listed) == sorted(IMPOSSIBLE) and list(tmp_path.iterdir()) == []


def test_scenes_larger_than_memory_are_refused_before_they_are_drawn(tmp_path, capsys):
    settings = ["--config.data.train_images=1000000", "--config.data.size=(16384, 4096)"]
    assert train.main([f"--workdir={tmp_path / 'run'}", *settings]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "config.data.train_images: 1000000; with data.eval_images=" in error and "GiB" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["-1", "99999999999999999999"])
def test_the_number_of_processes_is_checked(number, capsys):
    assert train.main([f"--num_processes={number}"]) == 2
    assert "num_processes" in capsys.readouterr().err


PROCESSES = {
    ("--num_processes=2",): "--num_processes: of several processes; give --coordinator=HOST:PORT too, or auto",
    ("--num_processes=2", "--process_id=0"): "--num_processes and --process_id: of several processes; give",
    ("--coordinator=localhost",): "--coordinator=localhost: must be HOST:PORT of the first process, or auto",
    ("--coordinator=localhost:1", "--num_processes=0"): "must be at least 1",
    ("--coordinator=localhost:1", "--num_processes=2", "--process_id=2"): (
        "--process_id=2: 2 processes have the numbers from 0 to 1"
    ),
    ("--coordinator=", "--num_processes=2"): "--coordinator: the value is empty",
    ("--num_processes=", "--coordinator=auto"): "--num_processes",
}


@pytest.mark.parametrize("command", [("train",), PREDICT, EVALUATE], ids=lambda command: command[0])
@pytest.mark.parametrize("given", PROCESSES, ids=" ".join)
def test_incompatible_flags_for_processes_are_named(given, command, capsys):
    try:
        status = entry.main([*command, *given])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert PROCESSES[given] in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------------------- remedies


def help_of(command, capsys):
    with contextlib.suppress(SystemExit):
        entry.main([*command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "command, arguments, flag",
    [
        (("data",), ("prepare", "camvid"), "--source"),
        (("data", "show"), ("folder",), "--source"),
        (("evaluate",), ("CHECKPOINT", "--data", "camvid"), "--source"),
        (("compare",), ("CHECKPOINT", "CHECKPOINT", "camvid"), "--source"),
        (("audit",), ("CHECKPOINT", "camvid"), "--source"),
        (("train",), ("--config=segformer:b0,camvid", "--workdir=RUN"), "--config.data.source"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_for_unprepared_data_the_error_names_a_flag_of_the_command(
    command, arguments, flag, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    save(tiny_model(0, num_classes=11), tmp_path / "weights.safetensors")
    places = {"CHECKPOINT": str(tmp_path / "weights.safetensors"), "--workdir=RUN": f"--workdir={tmp_path / 'run'}"}
    assert entry.main([*command, *(places.get(word, word) for word in arguments)]) == 2
    error = capsys.readouterr().err
    named = set(re.findall(r"--[a-z][\w.-]+", error))
    text = help_of(command, capsys)
    assert flag in named and all(f"{name}" in text for name in named)


# --------------------------------------------------------------------------------------------------- names from outside


def test_columns_of_tables_stay_aligned_for_any_class_name(capsys):
    names = ["道路" * 30, "a\nb", "\x1b[2J", "\u202eevil", "x" * 500, "é", ""]
    entry_of = {"iou": 0.5, "accuracy": None, "precision": 0.25, "dice": 1.0, "pixels": 1234}
    means = {"mean_iou": 0.5, "pixel_accuracy": 0.5, "mean_accuracy": 0.5, "step": None}
    means |= {"mean_boundary_iou": 0.25, "image_iou": None, "worst_image_iou": 0.125, "mean_iou_interval": (0.4, 0.6)}
    evaluate._print_table(means | {"classes": [{"class": name, **entry_of} for name in names]})
    _, head, *rows = capsys.readouterr().out.splitlines()[: len(names) + 2]
    assert {console.columns(line) for line in (head, *rows)} == {79}
    assert all(console.printable(row) == row and row.endswith("1,234") for row in rows)


# --------------------------------------------------------------------------------------------------------------- paths

ODD = "a\nb\x1b[2J"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "c.safetensors"
    save(tiny_model(0), path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", f"{ODD}.pth"),
        ("convert", f"{ODD}.pth", "o.safetensors"),
        ("export", f"{ODD}.pth", "o.stablehlo", "--format", "stablehlo", "--size", "32", "64"),
        ("evaluate", f"{ODD}.pth", "--data", "streets"),
        ("predict", "c.pth", f"{ODD}.png", "--output", "out"),
        ("predict", f"{ODD}.pth", "x.png", "--output", "out"),
        ("data", "prepare", "folder", "--source", f"{ODD}"),
        ("train", f"--config={ODD}.py"),
        ("train", f"--config.init.checkpoint={ODD}.pth", "--workdir=out"),
        ("inspect", "c.pth", f"--{ODD}"),
        ("summary", f"{ODD}", "--size", "32", "64"),
    ],
    ids=lambda arguments: " ".join(arguments[:2])[:20].partition("\n")[0],
)
def test_names_from_the_command_line_cannot_break_lines_of_messages(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("x.png", np.zeros((20, 30, 3), np.uint8))
    try:
        status = entry.main([*arguments])
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr().err
    assert status == 2 and "\x1b" not in told
    assert "a\\nb\\x1b[2J" in told and not re.search(r"^b", told, re.MULTILINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, files",
    [
        (("convert", "--checkpoint=~/c.safetensors", "~/d.safetensors"), ["d.safetensors"]),
        (("predict", "~/c.safetensors", "~/x.png", "--output=~/out"), ["out"]),
        (("inspect", "~/c.safetensors"), []),
        (("train", "--config=~/mine.py", "--workdir=~/run"), ["run"]),
    ],
)
def test_a_tilde_is_expanded_in_every_path_argument(arguments, files, checkpoint, tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    shutil.copy(checkpoint, home / "c.safetensors")
    cv2.imwrite(str(home / "x.png"), np.zeros((32, 64, 3), np.uint8))
    (home / "mine.py").write_text("from segjax.recipes.segformer import get_config\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    before = set(home.iterdir())

    def trained(config, workdir, **_):
        workdir.mkdir()
        return 0

    monkeypatch.setattr("segjax.train.loop.train", trained)
    # Without a compilation.
    monkeypatch.setattr("segjax.inference.batch_run.Run.__call__", lambda *_: (home / "out").mkdir())
    assert entry.main([*arguments]) == 0, capsys.readouterr().err
    assert {path.name for path in set(home.iterdir()) - before} - {".cache"} == set(files)
    assert list(here.iterdir()) == []


def test_the_home_folder_of_an_unknown_user_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        entry.main(["predict", "c.pth", "x.png", "--output=~nobody-of-this-name/out"])
    assert end.value.code == 2 and "there is no user 'nobody-of-this-name'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["predict", "a", "b", "--output", ""], "--output"),
        (["predict", "a", "b", "--output="], "--output"),
        (["predict", "a", "", "--output", "c"], "the argument after a"),
        (["data", "prepare", "folder", "--source", "a", "--data-dir", ""], "--data-dir"),
        (["evaluate", ""], "the argument after it"),
    ],
)
def test_an_empty_argument_is_refused_by_name(arguments, name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        entry.main(arguments)
    assert caught.value.code == 2
    assert f"error: {name}: the value is empty; a shell variable may be unset" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
