"""Rules for imports between folders and for names of tests, checked in the sources; the cost of importing segjax."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# What each room of segjax/ may import besides itself; rooms further up come later.
ALLOWED = {
    "runtime": (),
    "kernels": (),
    "metrics": (),
    "layers": ("kernels",),
    "models": ("kernels", "layers"),
    "data": ("runtime",),
    "losses": ("kernels", "layers", "data"),
    "viz": ("data", "metrics", "runtime"),
    "checkpoints": ("runtime", "models", "data"),
    "inference": ("runtime", "kernels", "layers", "models", "data", "metrics", "viz", "checkpoints"),
    "torch_reference": ("runtime", "layers", "models", "data", "checkpoints", "inference"),
    "exports": ("runtime", "kernels", "layers", "models", "data", "checkpoints", "inference", "torch_reference"),
    "train": ("runtime", "kernels", "layers", "models", "data", "losses", "metrics", "viz", "checkpoints", "inference"),
    "recipes": ("data", "train"),
    "benchmark": ("runtime", "layers", "models", "losses", "checkpoints", "torch_reference", "train", "recipes"),
}
# The commands and their entry points use everything, and nothing uses them.
ON_TOP = (
    "commands",
    "audit",
    "card",
    "compare",
    "convert",
    "demo",
    "evaluate",
    "export",
    "inspect",
    "predict",
    "push",
    "summary",
    "weights",
    "__main__",
)
# Slow to import or not installed everywhere: inside the function that needs it, or not at all.
LATE = (
    "av",
    "pycocotools",
    "rasterio",
    "torch",
    "tensorflow",
    "tensorflow_datasets",
    "cv2",
    "orbax",
    "matplotlib",
    "safetensors",
    "huggingface_hub",
    "pooch",
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
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
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


def room(name):
    """The folder or file of segjax/ that a module belongs to; "" for the package itself."""
    parts = name.split(".")
    if parts[-1] == "__main__":
        return "__main__"
    return parts[1] if len(parts) > 1 else ""


def test_the_sources_are_found():
    assert {"segjax", "segjax.train.loop", "segjax.models", "segjax.layers.functional"} <= set(MODULES)
    assert "segjax.models.segformer" in imports_of("segjax.models")
    assert "segjax.data.streets" in imports_of("segjax.torch_reference.verify")
    assert "segjax.data.streets" not in imports_of("segjax.torch_reference.verify", only_module_level=True)


def test_every_module_is_in_a_package_with_import_rules():
    assert {room(name) for name in MODULES} - {""} == {*ALLOWED, *ON_TOP}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ALLOWED])
def test_a_module_imports_only_packages_below_its_own(name):
    above = {
        other
        for other in inside(imports_of(name), "segjax")
        if room(other) not in ("", room(name), *ALLOWED[room(name)])
    }
    assert above == set()


def test_the_packages_are_in_a_topological_order():
    done = set()
    for name, allowed in ALLOWED.items():
        assert set(allowed) <= done, name
        done.add(name)


def test_no_module_imports_a_command():
    for name in MODULES:
        if room(name) == "commands" or room(name) in ON_TOP:
            continue
        assert inside(imports_of(name), "segjax.commands", *(f"segjax.{entry}" for entry in ON_TOP)) == set(), name


def test_there_are_no_circular_imports():
    graph = {name: inside(imports_of(name), "segjax") & set(MODULES) for name in MODULES}
    # The package itself only hands on what its modules define.
    graph["segjax"] = set()
    circles, state = [], {}

    def visit(name, path):
        if state.get(name) == "open":
            circles.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in state:
            state[name] = "open"
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            state[name] = "done"

    for name in graph:
        visit(name, [])
    assert circles == []


@pytest.mark.parametrize("name", MODULES)
def test_the_library_imports_nothing_from_outside_the_package(name):
    assert inside(imports_of(name), "parity", "benchmarks", "configs", "tests", "train") == set()


def test_no_module_changes_sys_path():
    for folder in ("segjax", "parity", "benchmarks", "configs"):
        for path in (REPO / folder).rglob("*.py"):
            assert "sys.path" not in path.read_text(), path


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "models"])
def test_a_model_imports_only_layers_and_models(name):
    if name != "segjax.models.summary":
        assert {room(other) for other in inside(imports_of(name), "segjax")} <= {"", "models", "layers"}
        assert inside(imports_of(name), "segjax.kernels") == set()


# What changes the process, which no library call may do.
def test_only_commands_and_benchmarks_set_up_the_process():
    for name in MODULES:
        if room(name) not in ("commands", "benchmark", "__main__"):
            assert "segjax.runtime.environment" not in imports_of(name), name


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_slow_or_optional_packages_at_the_top(name):
    needs_torch = room(name) == "torch_reference" or name in ("segjax.exports.onnx", "segjax.exports.torch_program")
    late = [package for package in LATE if not (needs_torch and package == "torch")]
    assert inside(imports_of(name, only_module_level=True), *late) == set()


def test_configs_import_only_recipes():
    paths = sorted((REPO / "configs").glob("*.py"))
    assert len(paths) >= 5
    for path in paths:
        found = imported(path, ast.walk(ast.parse(path.read_text())))
        assert found - inside(found, "segjax.recipes") == set(), path


def test_only_references_and_parity_import_torch_at_module_level():
    found = set()
    for path in REPO.rglob("*.py"):
        parts = path.relative_to(REPO).parts
        if any(part.startswith(".") or part in ("build", "venv") for part in parts):
            continue
        if inside(imported(path, module_level(ast.parse(path.read_text()))), "torch", "torchvision", "transformers"):
            found.add("/".join(parts[:2]) if parts[0] == "segjax" else parts[0])
    assert found == {"parity", "segjax/torch_reference", "segjax/exports"}


def test_no_test_in_this_folder_needs_torch():
    for path in (REPO / "tests").rglob("*.py"):
        assert inside(imported(path, ast.walk(ast.parse(path.read_text()))), "torch", "parity") == set(), path


@pytest.mark.parametrize("module", ["segjax", "segjax.train.loop", "segjax.data.streets", "segjax.checkpoints.files"])
def test_importing_segjax_imports_nothing_slow_or_optional(module):
    code = f"import sys, {module}; print(*sorted(set({LATE!r}) & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_importing_segjax_starts_no_backend_and_changes_no_setting_of_jax():
    code = """if True:
        import jax
        before = dict(jax.config.values)
        import segjax, segjax.train.loop, segjax.commands.conversion
        assert not jax._src.xla_bridge.backends_are_initialized()
        changed = {key for key, value in jax.config.values.items() if before.get(key) != value}
        print(*changed)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_names_of_tests_have_at_most_70_letters():
    sources = [path.read_text("utf-8") for name in ("tests", "parity") for path in (REPO / name).rglob("test_*.py")]
    names = [name for source in sources for name in re.findall(r"^ *def (test_\w+)", source, re.MULTILINE)]
    assert len(names) > 1000 and [name for name in names if len(name) > 70] == []
