"""Recipes by name and by file give the same configs; a mistake in a config file is one line with its position."""

import importlib
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from segjax import recipes
from segjax.data.specs import DATASETS
from segjax.recipes import common
from segjax.train import schema

REPO = Path(__file__).parents[2]
MODULES = {name: importlib.import_module(f"segjax.recipes.{name}") for name in recipes.RECIPES}
VARIANTS = [(name, variant) for name, module in MODULES.items() for variant in module.VARIANTS]

START = """from segjax.recipes import segformer

def get_config(argument=""):
    config = segformer.get_config(argument)
"""


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.chdir(REPO)


def refused(reference):
    """The message of what `load` refuses, which has to be one line."""
    with pytest.raises(recipes.ConfigError) as caught:
        recipes.load(str(reference))
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


# ------------------------------------------------------------------------------------------------------ names and files


def test_every_module_except_the_shared_one_is_a_recipe():
    stems = {path.stem for path in (REPO / "segjax" / "recipes").glob("*.py")} - {"__init__", "common"}
    assert stems == set(recipes.RECIPES)


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_a_recipe_is_the_same_by_name_and_by_file(name, variant):
    for dataset in DATASETS:
        argument = f"{variant},{dataset}"
        by_name = recipes.load(f"{name}:{argument}")
        assert by_name.to_dict() == MODULES[name].get_config(argument).to_dict()
        assert by_name.to_dict() == recipes.load(f"configs/{name}.py:{argument}").to_dict()
        assert by_name.to_dict() == recipes.load(f"{REPO}/configs/{name}.py:{argument}").to_dict()
        assert schema.problems(by_name) == {}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_without_an_argument_a_recipe_is_its_first_variant_on_streets(name):
    config = MODULES[name].get_config(f"{MODULES[name].VARIANTS[0]},streets").to_dict()
    for reference in (name, f"{name}:", f"configs/{name}.py", f"configs/{name}.py:"):
        assert recipes.load(reference).to_dict() == config


def test_configs_loaded_twice_share_nothing():
    first, second = recipes.load("segformer:b2"), recipes.load("segformer:b2")
    first.optim.lr = 1.0
    assert second.optim.lr != 1.0


@pytest.mark.parametrize("argument", ["b2,camvid", "camvid,b2", " camvid , b2 "])
def test_variant_and_dataset_come_in_any_order(argument):
    config = recipes.load(f"segformer:{argument}")
    assert (config.model.name, config.data.name) == ("segformer_b2", "camvid")


@pytest.mark.parametrize("reference", ["segformer:b9", "configs/segformer.py:b9", "segformer:b2,cityscape"])
def test_an_unknown_variant_or_dataset_is_refused_with_the_known_ones(reference):
    word = reference.replace(",", ":").split(":")[-1]
    message = refused(reference)
    assert message.startswith(f"{reference}: {word!r} is not a variant (b0, b1, b2, b3, b4, b5, plain_b0, ")
    assert message.endswith(f"or dataset ({', '.join(DATASETS)})")


@pytest.mark.parametrize(
    "reference, hint",
    [
        ("segfromer:b2", "segfromer: no such file or recipe; did you mean segformer? The recipes are segformer, "),
        ("configs/mine.py:b2", "configs/mine.py: no such file or recipe; the recipes are segformer, "),
        ("nothing", "nothing: no such file or recipe; the recipes are segformer, "),
        ("configs", "configs: is not a regular file"),
        ("/dev/null:b2", "/dev/null: is not a regular file"),
    ],
)
def test_a_name_that_is_neither_recipe_nor_file_is_refused(reference, hint):
    assert refused(reference).startswith(hint)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_dataset_has_its_published_split_and_crop(dataset):
    config = common.get_config(dataset)
    split = "test" if dataset in ("camvid", "pet", "folder") else "val"
    crop = {"streets": (128, 256), "camvid": (360, 480), "cityscapes": (1024, 1024)}.get(dataset, (512, 512))
    assert (config.data.name, config.data.eval_split, config.augment.crop) == (dataset, split, crop)
    changed = {"data.name", "data.eval_split", "augment.crop", "train.steps"}
    assert {key for key, value in schema.flattened(config).items() if value != schema.SETTINGS[key].default} <= changed


# --------------------------------------------------------------------------------------------------- files of one's own


def test_a_file_changes_a_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(START + "    config.optim.lr = 0.125\n    config.model.dims = (8, 16, 40, 64)\n    return config\n")
    config = recipes.load(f"{path}:b1,voc")
    assert (config.model.name, config.data.name, config.optim.lr) == ("segformer_b1", "voc", 0.125)
    assert config.model.dims == (8, 16, 40, 64)
    # A file rewritten immediately, with the same length, is read again.
    path.write_text(path.read_text().replace("0.125", "0.375"))
    assert recipes.load(f"{path}:b1,voc").optim.lr == 0.375


def test_a_file_without_suffix_and_one_with_a_colon_in_its_path_are_read(tmp_path):
    text = START + "    return config\n"
    (tmp_path / "plain").write_text(text)
    (tmp_path / "a:b.py").write_text(text)
    for name in ("plain", "a:b.py"):
        assert recipes.load(f"{tmp_path / name}:b3").model.name == "segformer_b3"
        assert recipes.load(str(tmp_path / name)).model.name == "segformer_b0"


def test_a_file_may_define_dataclasses(tmp_path):
    lines = ("from __future__ import annotations", "import dataclasses", "@dataclasses.dataclass", "class Rate:")
    (tmp_path / "x.py").write_text("\n".join((*lines, "    value: float = 0.5", START)) + "    return config\n")
    assert recipes.load(str(tmp_path / "x.py")).to_dict() == recipes.load("segformer").to_dict()


FAULTS = {
    "does not compile": ("def get_config(:\n", ":1: invalid syntax"),
    "does not compile later": (START + "    return config\n  x = 1\n", ":6: unindent does not match"),
    "is not UTF-8": (b"x = 1\ny = '\xff'\n", "codec can't decode byte 0xff"),
    "holds a zero": (b"x = 1\n\0\n", "null bytes"),
    "imports what is not there": ("import os\nimport nothing_like_this\n", ":2: ModuleNotFoundError: No module named "),
    "raises when it is read": ("x = 1\n\n\nx / 0\n", ":4: ZeroDivisionError: division by zero"),
    "has no get_config": ("def config():\n    pass\n", ": defines no function get_config(argument)"),
    "has a get_config that is none": ("get_config = 3\n", ": defines no function get_config(argument)"),
    "returns nothing": (START, ": get_config() returned None, not an ml_collections.ConfigDict; start from"),
    "returns a dict": (START + "    return {'model': {}}\n", ": get_config() returned dict, not an ml_collections."),
    "returns half a config": (
        START + "    del config.optim\n    del config.train.steps\n    return config\n",
        ": the config has no train.steps, optim; start from",
    ),
    "raises": (START + "    x = 1\n    raise RuntimeError('too\\nbad')\n", ":6: RuntimeError: too bad"),
    "raises a ValueError": (START + "    raise ValueError('no such crop')\n", ":5: no such crop"),
    "gives a recipe a wrong word": (START + "    segformer.get_config('b9')\n", ":5: 'b9' is not a variant (b0"),
    "asks for a setting that is not there": (
        START + "    config.optmi.lr = 3\n",
        ':5: AttributeError: \'optmi\' Did you mean "optim" instead of "optmi"?',
    ),
    "forgets to call a function": (
        "from segjax.recipes import segformer\n\n\ndef get_config(_=''):\n    segformer.get_config.train = 3\n"
        "    return segformer.get_config.optim.lr\n",
        ":6: AttributeError: 'function' object has no attribute 'optim'",
    ),
    "gives a setting another type": (
        START + "    config.train.steps = 1e5\n",
        ":5: TypeError: Could not override field",
    ),
    "ends the process when it is read": ("import sys\nsys.exit(3)\n", ":2: SystemExit: 3"),
    "ends the process": (START + "    raise SystemExit\n", ":5: SystemExit"),
    "fails deeper": (START + "    import json\n    json.loads('{')\n", ":6: Expecting property name"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_an_error_is_refused_in_one_line_with_its_position(fault, tmp_path):
    text, expected = FAULTS[fault]
    path = tmp_path / "mine.py"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    message = refused(path)
    assert message.startswith(f"{path}:") and expected in message


def test_an_error_in_a_module_that_a_file_imports_is_located(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helper_with_fault.py").write_text("x = 1\nx = = 2\n")
    (tmp_path / "mine.py").write_text("import helper_with_fault\n")
    assert refused(tmp_path / "mine.py") == f"{tmp_path / 'helper_with_fault.py'}:2: invalid syntax"


def test_a_get_config_without_parameters_is_called_without_arguments(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(START.replace('argument=""', "").replace("(argument)", "('b4')") + "    return config\n")
    assert recipes.load(str(path)).model.name == "segformer_b4"
    assert refused(f"{path}:b1").startswith(f"{path}:b1: TypeError: get_config() takes 0 positional arguments")


def test_a_config_of_a_file_is_an_independent_config_dict(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(START + "    return config\n")
    before = set(sys.modules)
    config = recipes.load(str(path))
    assert isinstance(config, ConfigDict) and not config.is_locked
    assert set(sys.modules) - before <= {"segjax_config_file"}
