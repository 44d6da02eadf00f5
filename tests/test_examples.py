"""The examples in docstrings run and show what they print."""

import doctest
import importlib
from pathlib import Path

import pytest

import segjax

ROOT = Path(segjax.__file__).parents[1]
FILES = [
    path.relative_to(ROOT) for path in sorted((ROOT / "segjax").rglob("*.py")) if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_examples_of_a_file_show_what_they_print(file, tmp_path, monkeypatch):
    name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    runner, report = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS), []
    found = [example for example in doctest.DocTestFinder().find(module, name) if example.examples]
    assert found
    for example in found:
        runner.run(example, out=report.append)
    assert not runner.summarize(verbose=False).failed, "".join(report)
