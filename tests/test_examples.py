"""The examples in docstrings run, and print the output that they show."""

import doctest
import importlib
import inspect
import re
import types
from pathlib import Path

import pytest

import segjax

# Models, a training run and an export are compiled.
pytestmark = pytest.mark.one_python

ROOT = Path(segjax.__file__).parents[1]
FILES = [
    path.relative_to(ROOT) for path in sorted((ROOT / "segjax").rglob("*.py")) if ">>> " in path.read_text("utf-8")
]


PUBLIC = ["segjax", *(f"segjax.{name}" for name in ("data", "layers", "losses", "metrics", "models", "train"))]
# Tables, the version and namespaces have no docstring of their own; docs/api.md describes them.
WITHOUT_DOCSTRING = dict | str | types.ModuleType


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_example(module):
    namespace = importlib.import_module(module)
    objects = {name: getattr(namespace, name) for name in namespace.__all__}
    documented = {name: value for name, value in objects.items() if not isinstance(value, WITHOUT_DOCSTRING)}
    assert documented
    assert not [name for name, value in documented.items() if not re.search(r"Examples?:\n  >>> ", doc_of(value))]
    # `test_the_examples_in_a_file_print_the_shown_output` runs the file of each.
    files = {ROOT / file for file in FILES}
    assert {file_of(value) for value in documented.values()} <= files


@pytest.mark.parametrize("module", PUBLIC)
def test_arguments_and_results_of_public_functions_are_documented(module):
    namespace = importlib.import_module(module)
    for name in namespace.__all__:
        value = getattr(namespace, name)
        if not inspect.isfunction(value):
            continue
        signature = inspect.signature(value)
        doc = doc_of(value)
        described = doc.partition("Args:\n")[2].partition("\n\n")[0]
        assert [name for name in signature.parameters if not re.search(rf"\b{name}\b", described)] == [], name
        if signature.return_annotation not in (None, "None"):
            assert re.search(r"^(Returns|Yields):$", doc, re.MULTILINE), name


def doc_of(value):
    return inspect.cleandoc(value.__doc__ or "")


def file_of(value):
    module = getattr(inspect.unwrap(value), "__module__", None) or type(value).__module__
    return Path(importlib.import_module(module).__file__)


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
