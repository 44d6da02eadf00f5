"""Parity tests run at float32 precision "highest", and end with a table of all measured errors."""

import datetime
import importlib.metadata
import json
from pathlib import Path

import jax
import pytest

from parity import tolerances

# On an NVIDIA GPU float32 products default to TF32, 1e-2 away: that gap is no property of the models.
jax.config.update("jax_default_matmul_precision", "highest")

_rows: dict[tuple[str, str, str], float] = {}


def pytest_addoption(parser):
    parser.addoption("--record-errors", metavar="FILE", help="writes every measured error and its bound as JSON")


def pytest_collection_modifyitems(config, items):
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if needy and jax.default_backend() != "gpu":
        items[:] = [item for item in items if item not in needy]
        config.hook.pytest_deselected(items=needy)


@pytest.fixture(autouse=True)
def quick_compile_of_float64(request):
    """Compiles float64 programs with few optimizations, in a third of the time.

    float64 shows mistakes of the mathematics, which no optimization mends; float32 runs the programs that users get.
    """
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    long = request.node.get_closest_marker("long_running")
    quick = "float64" in request.fixturenames and dtype in (None, "float64") and not long
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_to_compile(quick_compile_of_float64):
    """Quick compilation of float32 too, for tests that compare weights and not programs."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def within(request):
    """Asserts an error against its one bound in `tolerances` and puts it into the closing table.

    Called as within("output", dtype, error, "what was compared").
    """

    def assert_within(kind: str, dtype, error: float, what: str) -> None:
        limit = tolerances.bound(kind, dtype)
        name = jax.numpy.dtype(dtype).name
        _keep_worst([(kind, name, what, error)])
        assert error <= limit, f"{what}: {kind} error {error:.1e} in {name} is above {limit:.0e}"

    return assert_within


def _keep_worst(rows) -> None:
    for kind, dtype, what, error in rows:
        _rows[kind, dtype, what] = max(error, _rows.get((kind, dtype, what), 0.0))


def pytest_sessionfinish(session):
    # Where pytest runs in several processes, each hands its part of the table to the first.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["errors"] = [[*key, float(error)] for key, error in _rows.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _keep_worst(getattr(node, "workeroutput", {}).get("errors", []))


def pytest_terminal_summary(terminalreporter):
    if not _rows:
        return
    terminalreporter.section("measured errors, JAX against PyTorch")
    terminalreporter.write_line(f"{'kind':<11} {'type':<8} {'error':>8} {'bound':>7}  what")
    for (kind, dtype, what), error in sorted(_rows.items()):
        limit = tolerances.bound(kind, dtype)
        terminalreporter.write_line(f"{kind:<11} {dtype:<8} {error:>8.1e} {limit:>7.0e}  {what}")
    if path := terminalreporter.config.getoption("record_errors"):
        Path(path).write_text(json.dumps(_record(), indent=1) + "\n")
        terminalreporter.write_line(f"wrote {path}")


def _record():
    """All measured errors, as the documentation shows them."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": "pytest parity/ --record-errors FILE",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")},
        "device": jax.default_backend(),
        "errors": [
            {"kind": kind, "dtype": dtype, "what": what, "error": error, "bound": tolerances.bound(kind, dtype)}
            for (kind, dtype, what), error in sorted(_rows.items())
        ],
    }
