"""The examples in docstrings run, and print the output that they show."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import segjax

# Models, a training run and an export are compiled.
pytestmark = pytest.mark.one_python

ROOT = Path(segjax.__file__).parents[1]
FILES = [
    path.relative_to(ROOT) for path in sorted((ROOT / "segjax").rglob("*.py")) if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_examples_in_a_file_print_the_shown_output(file, tmp_path, monkeypatch):
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    runner, report = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS), []
    finder = doctest.DocTestFinder()
    found = finder.find(module, name)
    # A function that another module has wrapped is not taken for one of this module.
    wrapped = {key: value for key, value in vars(module).items() if hasattr(value, "__wrapped__")}
    found += [
        test
        for key, value in wrapped.items()
        if value.__module__ == name
        for test in finder.find(inspect.unwrap(value), f"{name}.{key}", globs=vars(module))
    ]
    assert any(example.examples for example in found)
    for example in found:
        runner.run(example, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)
