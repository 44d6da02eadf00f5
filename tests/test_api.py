"""The public names of segjax are imported on first use, and remain functions once every module is imported."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import segjax
from segjax.data import specs, streets
from segjax.data.open import OpenSplit
from tests.tiny import SIZES, tiny_model

ROOT = Path(__file__).parents[1]
FUNCTIONS = (
    "audit_dataset",
    "compare_models",
    "create",
    "evaluate_dataset",
    "export_model",
    "from_torch",
    "initialize",
    "list_weights",
    "load",
    "load_torch",
    "save",
)
FUNCTIONS += ("open_exported", "to_torch")
NAMESPACES = ("data", "layers", "losses", "metrics", "models", "train")
# Of extras, which are not installed everywhere.
OPTIONAL = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers")


def import_everything():
    for module in pkgutil.walk_packages(segjax.__path__, "segjax."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name.partition(".")[0] in OPTIONAL, module.name


def test_import_segjax_imports_neither_jax_nor_numpy():
    code = "import sys, segjax; print(*sorted({'jax', 'flax', 'numpy'} & set(sys.modules)), segjax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [segjax.__version__]


def test_type_checkers_see_exactly_the_existing_names():
    tree = ast.parse((ROOT / "segjax" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    found = {alias.name: node.module for node in checked.body for alias in node.names}
    assert {*found, "__version__"} == set(segjax.__all__) <= set(dir(segjax))
    for name, module in found.items():
        if name not in NAMESPACES:
            assert getattr(segjax, name) is getattr(importlib.import_module(module), name)


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'segjax' has no attribute 'lod'"):
        segjax.lod  # noqa: B018


def test_public_names_stay_the_same_after_every_module_is_imported():
    import_everything()
    assert all(inspect.isfunction(getattr(segjax, name)) for name in FUNCTIONS)
    assert inspect.isclass(segjax.Predictor) and inspect.isclass(segjax.LoadedCheckpoint)
    assert all(isinstance(getattr(segjax, name), types.ModuleType) for name in NAMESPACES)
    # `python -m segjax.evaluate` and `segjax.export` stay modules.
    assert isinstance(sys.modules["segjax.evaluate"], types.ModuleType)
    assert isinstance(sys.modules["segjax.export"], types.ModuleType)
    assert "segformer_b0" in segjax.MODELS


@pytest.mark.parametrize("name", ["a.safetensors", "folder", "hf"])
def test_every_function_works_after_every_module_is_imported(name, tmp_path):
    import_everything()
    model = tiny_model(3, num_classes=19)
    segjax.save(model, tmp_path / name, dialect="hf" if name == "hf" else None)
    loaded = segjax.load(str(tmp_path / name))
    assert loaded.classes.class_names == specs.CITYSCAPES.class_names and loaded.metadata["dataset"]["guessed"]
    again = segjax.from_torch(segjax.to_torch(loaded.model, dialect="smp"))
    segjax.load_torch(again, segjax.to_torch(model))
    assert {key: value.tobytes() for key, value in segjax.to_torch(again).items()} == {
        key: value.tobytes() for key, value in segjax.to_torch(model).items()
    }
    split = streets.load("val", num_images=3, size=(40, 64), seed=2)
    found = segjax.evaluate_dataset(loaded, OpenSplit(split, specs.DATASETS["streets"].spec, lambda: None))
    predictor = segjax.Predictor(loaded)
    labels = np.stack([predictor(image) for image in split.images])
    counted = split.labels != 255
    assert found["pixel_accuracy"] == pytest.approx((labels == split.labels)[counted].mean())
    created = segjax.create("segformer_b0", num_classes=2, **SIZES)
    assert (created.spec.num_classes, created.spec.name) == (2, "segformer_b0")


def test_a_model_can_be_exported_after_every_module_is_imported(tmp_path):
    import_everything()
    segjax.export_model(tiny_model(3), tmp_path / "a.stablehlo", size=(32, 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.stablehlo", "a.stablehlo.json"]


def test_a_loaded_checkpoint_is_saved_with_its_metadata(tmp_path):
    known = {"dataset": {"name": "yard", "class_names": list("abcde"), "colors": [[9 * k] * 3 for k in range(5)]}}
    known["dataset"]["ignore_label"] = 200
    known |= {"normalisation": {"mean": [1.5, 2.5, 3.5], "std": [10.0, 20.0, 40.0]}, "licence": "mine"}
    model = tiny_model(2)
    classes = specs.DatasetSpec("yard", tuple("abcde"), tuple((9 * k,) * 3 for k in range(5)), 200)
    made = segjax.LoadedCheckpoint(model, classes, known, provenance={"source": "a"})
    for name in ("b.safetensors", "c"):
        segjax.save(made, tmp_path / name)
        found = segjax.load(tmp_path / name)
        assert found.classes == classes and found.metadata["licence"] == "mine"
        assert (found.mean, found.std) == ((1.5, 2.5, 3.5), (10.0, 20.0, 40.0))
        assert "'source': 'a'" in str(found.metadata["provenance"])


@pytest.mark.parametrize("name", ["b.safetensors", "c", "d"])
def test_class_names_are_saved(name, tmp_path):
    names, model = ["sky", "Straße", "a tree", "b", "c"], tiny_model(2)
    segjax.save(model, tmp_path / name, class_names=names, dialect="hf" if name == "d" else None)
    found = segjax.load(tmp_path / name)
    assert list(found.classes.class_names) == names
    segjax.save(found, tmp_path / "other.safetensors", class_names=names[::-1])
    again = segjax.load(tmp_path / "other.safetensors").classes
    assert list(again.class_names) == names[::-1] and len(set(again.colors)) == 5


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        ("a.safetensors", list("abcd"), "must be 5 texts, one for each class; got"),
        ("a.safetensors", "abcde", "must be 5 texts"),
        ("a", [1, 2, 3, 4, 5], "must be 5 texts"),
        ("a.pth", list("abcde"), r"a\.pth: a \.pth has no place for class names; write \*\.safetensors or a folder"),
    ],
)
def test_class_names_that_cannot_be_saved_are_refused(name, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        segjax.save(tiny_model(1), tmp_path / name, class_names=names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "dialect", "message"),
    [
        ("a.onnx", None, r"write \*\.pth or \*\.safetensors"),
        ("folder", "smp", "selects the keys of a .pth or .safetensors"),
        ("a.safetensors", "mmseg", "cannot be written as mmseg"),
    ],
)
def test_a_failed_save_leaves_nothing(name, dialect, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        segjax.save(tiny_model(1), tmp_path / name, dialect=dialect)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_selects_the_export_format(tmp_path):
    segjax.export_model(tiny_model(1), tmp_path / "a.stablehlo", size=(32, 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.stablehlo", "a.stablehlo.json"]
    with pytest.raises(ValueError, match="the suffix selects the format"):
        segjax.export_model(tiny_model(1), tmp_path / "a.tflite", size=(32, 64))
