"""Who may import whom, read off the sources; and that importing segjax costs nothing it does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# What only commands and the loop may lean on. `runtime` changes the process, which no library call may do.
ABOVE = (
    *(
        "segjax.loop",
        "segjax.console",
        "segjax.parts",
        "segjax.runtime",
        "segjax.commands.train",
        "segjax.train.__main__",
    ),
    *("configs", "train"),
)
# Slow to import or not installed everywhere: inside the function that needs it, or not at all.
LATE = (
    "av",
    "torch",
    "tensorflow",
    "tensorflow_datasets",
    "cv2",
    "orbax",
    "matplotlib",
    "safetensors",
    "huggingface_hub",
    "array_record",
    "grain",
)


def module_name(path):
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((REPO / "segjax").rglob("*.py"))}


def module_level(tree):
    """Every node that runs on import: not what lies inside functions, but what lies in ifs, tries and classes."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def imported(path, nodes):
    """Dotted names of the modules that import statements among `nodes` bring in."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            of_segjax = {name for name in submodules if name in MODULES}
            names |= of_segjax or {node.module}
    return names


def imports_of(name, *, only_module_level=False):
    tree = ast.parse(MODULES[name].read_text())
    return imported(name, module_level(tree) if only_module_level else ast.walk(tree))


def inside(names, *packages):
    return {name for name in names if any(name == package or name.startswith(f"{package}.") for package in packages)}


def reached(name):
    """Modules of segjax that a module imports, directly or not, functions included."""
    seen, pending = set(), [name]
    while pending:
        for found in inside(imports_of(pending.pop()), "segjax") & set(MODULES):
            if found not in seen:
                seen.add(found)
                pending.append(found)
    return seen


def test_the_sources_are_found():
    assert {"segjax", "segjax.loop", "segjax.models", "segjax.models.layers", "segjax.data.streets"} <= set(MODULES)
    assert "segjax.models.segformer" in imports_of("segjax.models")
    assert "segjax.data.builders" in imports_of("segjax.parts")
    assert "segjax.data.builders" not in imports_of("segjax.parts", only_module_level=True)


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("segjax.models.")])
def test_a_model_imports_the_shared_layers_and_models_alone(name):
    # One family may be built from another, as OCR is from HRNet; `layers` is built from none.
    models = {other for other in MODULES if other.startswith("segjax.models.")}
    allowed = set() if name == "segjax.models.layers" else models
    assert inside(reached(name), "segjax") <= allowed
    if allowed:
        assert "segjax.models.layers" in imports_of(name)


def test_the_table_of_models_imports_models_alone():
    assert all(name.startswith("segjax.models.") for name in inside(imports_of("segjax.models"), "segjax"))


WITHOUT_TRAINING = (
    *("losses", "metrics", "weights", "dialects", "families", "record", "huggingface", "files", "convert", "summary"),
    "optim",
)


@pytest.mark.parametrize("name", [f"segjax.{name}" for name in WITHOUT_TRAINING])
def test_what_is_used_without_training_imports_no_training(name):
    training = ("segjax.loop", "segjax.step", "segjax.data.pipeline", "segjax.data.augment", "segjax.evaluate")
    assert inside(reached(name), *training) == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ABOVE])
def test_nothing_below_the_loop_imports_the_loop_or_the_configs(name):
    # A module that is a command of its own sets its process up.
    is_command = "__main__" in MODULES[name].read_text()
    allowed = {"segjax.runtime", "segjax.console", "segjax.parts"} if is_command else set()
    assert inside(imports_of(name), *ABOVE) <= allowed


@pytest.mark.parametrize("name", MODULES)
def test_nothing_slow_or_optional_is_imported_with_a_module(name):
    assert inside(imports_of(name, only_module_level=True), *LATE) == set()


def test_configs_import_recipes_only():
    paths = sorted((REPO / "configs").glob("*.py"))
    assert len(paths) >= 7
    for path in paths:
        names = imported(path, ast.walk(ast.parse(path.read_text())))
        assert names == inside(names, "segjax.recipes"), path


def test_only_parity_imports_torch_at_module_level():
    found = set()
    for path in REPO.rglob("*.py"):
        parts = path.relative_to(REPO).parts
        if any(part.startswith(".") or part in ("build", "venv") for part in parts):
            continue
        if inside(imported(path, module_level(ast.parse(path.read_text()))), "torch", "torchvision", "transformers"):
            found.add(parts[0])
    assert found == {"parity"}


def test_no_test_in_this_folder_needs_torch():
    for path in (REPO / "tests").rglob("*.py"):
        assert inside(imported(path, ast.walk(ast.parse(path.read_text()))), "torch", "parity") == set(), path


def test_the_library_needs_neither_parity_nor_the_tests_to_be_imported():
    for name in MODULES:
        assert inside(imports_of(name, only_module_level=True), "parity", "tests") == set(), name


@pytest.mark.parametrize("module", ["segjax", "segjax.loop", "segjax.data.streets", "segjax.checkpoint"])
def test_importing_segjax_brings_in_nothing_slow_or_optional(module):
    code = f"import sys, {module}; print(*sorted(set({LATE!r}) & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_importing_segjax_starts_no_backend_and_changes_no_setting_of_jax():
    code = """if True:
        import jax
        before = dict(jax.config.values)
        import segjax, segjax.loop, segjax.convert
        assert not jax._src.xla_bridge.backends_are_initialized()
        changed = {key for key, value in jax.config.values.items() if before.get(key) != value}
        print(*changed)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
