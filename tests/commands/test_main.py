"""The command `segjax`: its list of commands, its imports, and the module of each word."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import segjax
from segjax import __main__ as entry

REPO = Path(__file__).parents[2]
# The command of trainings prints its help by itself, without ending the process.
NAMES = [name for name in entry.COMMANDS if name != "train"]


def run(*arguments, **settings):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        **settings,
    )


def test_help_describes_every_command_in_one_line(capsys):
    assert entry.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in entry.COMMANDS.items():
        assert sum(line.split() == [name, *text.split()] for line in lines) == 1
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("argument", ["--help", "--version", "evalaute"])
def test_help_and_errors_are_printed_without_importing_jax(argument):
    done = run("-X", "importtime", "-m", "segjax", argument)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"segjax", "difflib"} <= imported
    assert not imported & {"jax", "numpy", "flax", "absl"}


@pytest.mark.parametrize(
    "arguments", [*([name, "--help"] for name in entry.COMMANDS), ["data", "show", "--help"]], ids=" ".join
)
def test_help_of_a_command_is_printed_without_importing_jax(arguments):
    done = run("-X", "importtime", "-m", "segjax", *arguments)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and done.stdout.startswith(f"usage: segjax {arguments[0]}")
    assert "segjax.data.specs" in imported or "argparse" in imported
    assert not imported & {"jax", "flax", "torch", "matplotlib", "tensorflow_datasets"}


def test_the_version_is_that_of_the_package(capsys):
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"segjax {segjax.__version__}\n"
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"] == {"path": "segjax/__init__.py"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["evalaute", "x"], "segjax: no command 'evalaute'; did you mean 'evaluate'?"),
        (["qqq"], "segjax: no command 'qqq'; there are train, evaluate,"),
        ([], "segjax: no command; there are train, evaluate,"),
    ],
)
def test_an_unknown_command_ends_with_status_2(arguments, words, capsys):
    assert entry.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_a_command_gets_the_arguments_after_its_name(name, monkeypatch):
    given = []

    class Module:
        @staticmethod
        def main(arguments):
            given.append(arguments)
            return 7

    monkeypatch.setitem(sys.modules, entry.COMMANDS[name][0], Module)
    assert entry.main([name, "a", "--b"]) == 7
    assert given == [["a", "--b"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_names_itself_in_its_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(entry.COMMANDS[name][0]).main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: segjax {name} ")


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_each_command_can_be_run_as_a_module_of_the_package(name):
    done = run("-m", f"segjax.{name}", "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: segjax {name} "), done.stderr


CPU_ONLY = """if True:
    import jax, sys
    from segjax import __main__
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        __main__.main(sys.argv[1:])
    except SystemExit:
        pass
    print("platforms", jax.config.jax_platforms)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("summary", "segformer_b0", "--size", "32", "32", "--overrides", "nonsense"),
        ("export", "nowhere", "o.onnx", "--format", "onnx", "--size", "32", "32"),
        ("benchmark", "--model", "nonsense"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_do_not_compute_do_not_use_a_gpu(arguments, tmp_path):
    assert run("-c", CPU_ONLY, *arguments, cwd=tmp_path).stdout.splitlines()[-1] == "platforms cpu"


def test_names_of_the_package_are_imported_on_first_use():
    for name in segjax.__all__:
        assert getattr(segjax, name) is not None and name in dir(segjax)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = segjax.nonsense
