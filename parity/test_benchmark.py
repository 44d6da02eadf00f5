"""The contenders of a benchmark do the same work, and one with other results is not timed."""

import json
import types
from typing import ClassVar

import jax
import numpy as np
import pytest

from benchmarks import gpu_forms
from segjax.benchmark import contenders, report
from segjax.benchmark import floor as benchmark_floor
from segjax.benchmark import runner as benchmark_runner
from segjax.benchmark.floor import floor_of, measured_ceilings
from segjax.benchmark.rows import TABLES, Row
from segjax.benchmark.runner import CLOSE, BenchmarkError, OutOfMemoryError, OutOfTimeError, Runner
from segjax.commands import benchmark
from segjax.models import summary

WORK = ("segformer_b0", (64, 96), 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_two_contenders_take_turns_and_compute_the_same(mode, tmp_path, capsys):
    model, size, batch = WORK
    height, width = map(str, size)
    options = ["--model", model, "--size", height, width, "--batch", str(batch), "--mode", mode]
    path = tmp_path / "record.json"
    assert benchmark.main([*options, "--against", "torch", "--rounds", "3", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    ours, theirs = result["contenders"]
    assert (ours["name"], theirs["name"], result["mode"]) == ("segjax", "torch", mode)
    assert 0 < theirs["difference"] < 1e-4 and ours["difference"] == 0
    for row in (ours, theirs):
        middle, low, high = row["milliseconds"]
        assert 0 < low <= middle <= high and row["compile_seconds"] > 0 and row["flops_per_second"] > 1e6
    assert ours["ours_over_theirs"] == [1, 1, 1] and theirs["ours_over_theirs"][0] > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == f"wrote {path}" and max(map(len, lines)) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in contenders.CONTENDERS if "compile" not in name])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_every_contender_computes_the_same_as_plain_pytorch(name, mode):
    model = "segformer_simple" if name == "segformer-pytorch" else "segformer_b0"
    assert name == "segjax" or name in contenders.rivals(model)
    work = contenders.Work(model, (64, 96), 2, mode)
    theirs, plain = (contenders.CONTENDERS[which](work).outcome for which in (name, "torch"))
    bound = 1e-4 if name == "transformers" else 1e-5
    np.testing.assert_allclose(theirs, plain, rtol=0, atol=bound * np.abs(plain).max())


@pytest.mark.slow
def test_a_training_step_changes_the_next_loss_of_segjax_and_pytorch():
    work = contenders.Work("segformer_b0", (64, 96), 2, "train")
    ours, theirs = (contenders.CONTENDERS[name](work) for name in ("segjax", "torch"))
    losses = [[float(side.outcome), float(side.run()), float(side.run())] for side in (ours, theirs)]
    assert min(np.abs(np.diff(losses[0]))) > 1e-5
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_a_contender_that_computes_something_else_is_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(CLOSE, "float32", 0.0)
    options = ["--size", "32", "64", "--against", "torch", "--rounds", "1"]
    assert benchmark.main(options) == 2
    assert "the results of torch differ from those of segjax by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", "segformer_b9"], "--model: segformer_b9 is none of segformer_b0"),
        (["--model", "hrnet_w18", "--against", "transformers"], "hrnet_w18 can be timed against torch, torch-channels"),
    ],
)
def test_impossible_requests_are_refused_before_a_model_is_built(options, said, capsys):
    assert benchmark.main(options) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_table_of_a_record_has_a_column_for_each_contender(tmp_path, capsys):
    def row(name, ratio):
        return {"name": name, "milliseconds": [20.0, 19.0, 21.0], "ours_over_theirs": [ratio, 0.1, 0.9]}

    common = dict(mode="infer", batch=1, size=[64, 96])
    results = [
        {"model": "segformer_b0", **common, "contenders": [row("segjax", 1.0), row("torch", 0.254), row("x", 0.5)]},
        {"model": "hrnet_w18", **common, "contenders": [row("segjax", 1.0), row("torch", 0.7)]},
    ]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"results": results}))
    assert benchmark.main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | work | segjax, ms | torch | x |",
        "|---|---|---|---|---|",
        "| `segformer_b0` | infer 1x64x96 | 20 | 0.25 | 0.50 |",
        "| `hrnet_w18` | infer 1x64x96 | 20 | 0.70 |  |",
    ]


# ---------------------------------------------------------------------------------------------------------- the floor

CEILING = {"flops_per_second": 1e4, "bytes_per_second": 1e3, "device": "a card", "platform": "gpu"}


@pytest.mark.parametrize(
    "mode, dtype, ceiling, flops, moved, milliseconds",
    [
        ("infer", "float32", CEILING, 2000, 4 * 50, 200),
        ("infer", "bfloat16", CEILING | {"flops_per_second": 1e3}, 2000, 2 * 50, 2000),
        # Three passes, and AdamW's seven numbers for each of ten parameters.
        ("train", "bfloat16", CEILING, 6000, 3 * 2 * 50 + 7 * 4 * 10, 600),
        ("train", "float32", CEILING, 6000, 3 * 4 * 50 + 7 * 4 * 10, 880),
    ],
)
def test_the_floor_is_the_larger_of_compute_time_and_memory_time(
    monkeypatch, mode, dtype, ceiling, flops, moved, milliseconds
):
    least = summary.LeastWork(multiply_adds=1000, values=50, parameters=10)
    monkeypatch.setattr(summary, "least_work", lambda name, size, *, batch, num_classes: least)
    floor = floor_of(("segformer_b0", (64, 96), 2, mode, dtype, 150), ceiling)
    assert floor == pytest.approx({"flops": flops, "bytes": moved, "milliseconds": milliseconds})


def test_ceilings_are_those_of_the_requested_dtype():
    found = measured_ceilings("bfloat16")
    assert found["dtype"] == "bfloat16" and found["platform"] == jax.default_backend()
    assert found["flops_per_second"] > 1e9 and found["bytes_per_second"] > 1e8


# ----------------------------------------------------------------------------------------------- contenders, and tables


class Fake:
    """A contender whose steps take two milliseconds, ours one. fails: which cannot be made, and why. log: of all."""

    fails: ClassVar[dict] = {}
    log: ClassVar[list] = []

    def __init__(self, name, work, *, until=None):
        self.name, self.batch = name, work[2]
        self.outcome, self.compile_seconds, self.memory = np.ones(2), 12.5, 3 * 2**20

    def make(self):
        self.log.append(f"{self.name} made")
        if self.name in self.fails:
            raise self.fails[self.name]
        if self.name == "torch-sdpa":
            self.outcome = 2 * self.outcome

    def seconds(self, steps):
        return 1e-3 if self.name == "segjax" else 2e-3

    def close(self):
        self.log.append(f"{self.name} closed")


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(benchmark_runner, "Runner", Fake)
    monkeypatch.setattr(benchmark_floor, "measured_ceilings", lambda dtype: CEILING | {"dtype": dtype})
    monkeypatch.setattr(benchmark_floor, "floor_of", lambda *_: {"flops": 1e9, "bytes": 1e9, "milliseconds": 0.5})
    monkeypatch.setattr(Fake, "fails", {})
    monkeypatch.setattr(Fake, "log", [])
    return Fake


def compared(names, **settings):
    work = ("segformer_b0", (64, 96), 4, "infer", "float32", 150)
    return benchmark_runner.compare(names, work, ceiling=CEILING, rounds=3, say=lambda _: None, **settings)


def test_with_apart_one_contender_is_closed_before_the_next_is_built(fakes):
    result = compared(["segjax", "torch"], apart=True)
    assert fakes.log[:4] == ["segjax made", "segjax closed", "torch made", "torch closed"]
    ours, theirs = result["contenders"]
    assert (ours["images_per_second"], theirs["images_per_second"]) == (4000, 2000)
    assert theirs["ours_over_theirs"] == [0.5, 0.5, 0.5]
    assert (ours["share_of_floor"], theirs["share_of_floor"]) == (0.5, 0.25)
    assert (ours["bytes_per_second"], theirs["flops_per_second"]) == (1e12, 5e11)


def test_the_table_states_why_a_contender_was_not_timed(fakes):
    fakes.fails["torch"] = BenchmarkError("torch: KeyError: 1")
    names = ["segjax", "torch", "torch-sdpa", "torch-compile"]
    result = compared(names, keep_going=True)
    assert [row["name"] for row in result["contenders"]] == names and "cut_short" not in result
    failed = [row.get("failed") for row in result["contenders"]]
    assert failed == [
        None,
        "torch: KeyError: 1",
        "the results of torch-sdpa differ from those of segjax by 1.0e+00",
        None,
    ]
    card = {"flops_per_second": 8e14, "bytes_per_second": 4e12}
    assert max(map(len, report.report(result, card))) <= 80
    with pytest.raises(BenchmarkError, match="KeyError"):
        compared(names)
    # Without ours there is nothing to compare with, and what does not fit is tried with a smaller batch.
    for name, error in (("segjax", BenchmarkError), ("torch", OutOfMemoryError)):
        fakes.fails = {name: error("x")}
        with pytest.raises(error):
            compared(names, keep_going=True)


def test_a_row_with_a_late_contender_is_measured_again(fakes):
    fakes.fails["torch"] = OutOfTimeError("torch: not done")
    assert compared(["segjax", "torch"], keep_going=True)["cut_short"]


@pytest.mark.parametrize(
    "answer, error",
    [
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Failed to allocate 3.2GiB", OutOfMemoryError),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB", OutOfMemoryError),
        ("ValueError: no", BenchmarkError),
        (None, OutOfTimeError),
    ],
)
def test_each_answer_of_a_contender_raises_its_own_kind_of_error(answer, error):
    runner = Runner.__new__(Runner)
    runner.name, runner._until = "torch", 0.0
    connection = dict(send=lambda _: None, poll=lambda _: answer is not None, recv=lambda: answer)
    runner._connection = types.SimpleNamespace(**connection)
    with pytest.raises(BenchmarkError) as raised:
        runner.make()
    assert type(raised.value) is error and str(raised.value).startswith("torch: ")


def test_contenders_for_gpus_are_timed_on_a_cpu_only_on_request():
    slow = "torch-compile-max-autotune"
    assert slow in contenders.chosen("segnext_t", None, on_gpu=True)
    assert slow not in contenders.chosen("segnext_t", None, on_gpu=False)
    assert contenders.chosen("segnext_t", [slow], on_gpu=False) == [slow]
    assert "transformers" not in contenders.chosen("segnext_t", None, on_gpu=True)


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_a_dtype_has_one_name_in_a_record(fakes, tmp_path, spelling):
    path = tmp_path / "record.json"
    options = ["--dtype", spelling, "--against", "torch", "--rounds", "2", "--json", str(path)]
    assert benchmark.main(options) == 0
    record = json.loads(path.read_text())
    assert record["results"][0]["dtype"] == record["ceilings"]["dtype"] == "bfloat16"
    assert record["float32_products"] == "float32, never TF32"


@pytest.fixture
def table(fakes, monkeypatch):
    """Three rows, each of which takes a hundred seconds; calls it with options and gives what was begun."""
    clock = [0.0]
    for module in (benchmark, benchmark_runner):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    rows = [Row(name, "train", 8, (64, 96), ("torch",)) for name in ("segformer_b0", "segnext_t", "hrnet_w48")]
    monkeypatch.setitem(TABLES, "gpu", rows)
    begun, compare = [], benchmark_runner.compare

    def noting(names, work, **settings):
        begun.append((work[0], work[2]))
        clock[0] += 100
        return compare(names, work, **settings)

    monkeypatch.setattr(benchmark_runner, "compare", noting)

    def run(*options):
        begun.clear()
        clock[0] = 0.0
        status = benchmark.main(["--table", "gpu", "--rounds", "2", *map(str, options)])
        return status, list(begun)

    return run


def test_a_table_ends_in_time_and_a_second_command_continues_it(table, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert table("--minutes", 4, "--json", path) == (0, [("segformer_b0", 8), ("segnext_t", 8)])
    assert "hrnet_w48, train 8x64x96: not begun: such a row takes 100 s, and 40 s are left" in " ".join(
        capsys.readouterr().out.split()
    )
    first = json.loads(path.read_text())["results"]
    assert [result["model"] for result in first] == ["segformer_b0", "segnext_t"]
    assert table("--minutes", 4, "--json", path) == (0, [("hrnet_w48", 8)])
    assert "segnext_t, train 8x64x96: recorded already" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["results"][:2] == first and record["results"][2]["model"] == "hrnet_w48"
    assert {result["dtype"] for result in record["results"]} == {"bfloat16"}
    assert benchmark.main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "| model | work | segjax, ms | images/s | of the floor | torch |",
        "|---|---|---|---|---|---|",
        "| `segformer_b0` | train 8x64x96 | 1.00 | 8000 | 50% | 0.50 |",
    ]


def test_an_interrupted_row_is_measured_again_but_a_failed_one_is_not(table, fakes, tmp_path):
    path = tmp_path / "gpu.json"
    fakes.fails = {"torch": OutOfTimeError("torch: not done")}
    assert table("--minutes", 1, "--json", path) == (0, [("segformer_b0", 8)])
    fakes.fails = {"segjax": BenchmarkError("segjax: KeyError: 1")}
    every = [("segformer_b0", 8), ("segnext_t", 8), ("hrnet_w48", 8)]
    assert table("--json", path) == (0, every)
    results = json.loads(path.read_text())["results"]
    assert [result["failed"] for result in results] == ["segjax: KeyError: 1"] * 3
    fakes.fails = {}
    assert table("--json", path) == (0, [])
    # Another set of rivals is other work.
    assert table("--json", path, "--against", "torch-compile") == (0, every)
    assert len(json.loads(path.read_text())["results"]) == 6


def test_a_batch_is_halved_until_it_fits_all_contenders(table, monkeypatch, tmp_path):
    def make(self):
        if self.name == "torch" and self.batch > 2:
            raise OutOfMemoryError(f"{self.name}: OutOfMemoryError: CUDA out of memory")

    monkeypatch.setattr(Fake, "make", make)
    path = tmp_path / "gpu.json"
    status, begun = table("--json", path)
    assert status == 0 and begun[:3] == [("segformer_b0", 8), ("segformer_b0", 4), ("segformer_b0", 2)]
    result = json.loads(path.read_text())["results"][0]
    assert (result["batch"], result["largest_batch"], result["seconds"]) == (2, 8, 300)
    assert result["did_not_fit"] == [{"name": "torch", "batch": 8}, {"name": "torch", "batch": 4}]


def test_a_record_of_another_machine_is_not_continued(table, monkeypatch, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert table("--json", path)[0] == 0
    monkeypatch.setattr(benchmark_floor, "measured_ceilings", lambda dtype: CEILING | {"device": "another card"})
    assert table("--json", path) == (2, [])
    assert "other work than bfloat16 of 150 classes on another card; name another file" in " ".join(
        capsys.readouterr().err.split()
    )


def test_results_of_the_same_work_become_one_row_of_the_readme(tmp_path, capsys):
    def result(*rows):
        work = dict(model="segformer_b0", mode="train", batch=2, size=[64, 96])
        return work | {"contenders": [{"name": name, **row} for name, row in rows]}

    def timed(ratio):
        return {"milliseconds": [4.0] * 3, "ours_over_theirs": [ratio] * 3}

    results = [
        result(("segjax", timed(1.0)), ("torch", timed(0.5)), ("torch-compile", {"failed": "torch-compile: no"})),
        result(("segjax", timed(1.0)), ("torch-compile", timed(0.75))),
    ]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"results": results}))
    assert benchmark.main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | work | segjax, ms | torch | torch-compile |",
        "|---|---|---|---|---|",
        "| `segformer_b0` | train 2x64x96 | 4.00 | 0.50 | 0.75 |",
    ]


# ------------------------------------------------------------------------------------------------------ forms of layers


@pytest.mark.parametrize("group", list(gpu_forms.CASES))
def test_all_implementations_of_a_layer_compute_the_same(group):
    (case, *_) = gpu_forms.CASES[group](True)
    for row in gpu_forms.measured(case, rehearse=True, bytes_per_second=1e9):
        assert "failed" not in row and row["error"] < 2e-2 and len(gpu_forms.line(row)) <= 80
        assert min(row["forward"] + row["both"]) > 0


def test_an_implementation_that_computes_something_else_is_not_timed(monkeypatch, tmp_path, capsys):
    (case,) = gpu_forms.norms(True)

    def wrong_gradient(x, scale, bias):
        return gpu_forms.own_norm(x, jax.lax.stop_gradient(scale), bias)

    def missing(x, scale, bias):
        raise RuntimeError("no such kernel")

    forms = {"plain": case.forms["own rule"], "wrong": gpu_forms.Form(wrong_gradient), "x": gpu_forms.Form(missing)}
    monkeypatch.setitem(gpu_forms.CASES, "norms", lambda rehearse: [case._replace(forms=forms)])
    path = tmp_path / "forms.json"
    assert gpu_forms.main(["--rehearse", "--only", "norms", "--json", str(path)]) == 0
    plain, wrong, gone = json.loads(path.read_text())["forms"]
    assert plain["error"] < 1e-2 and len(plain["both"]) == 3
    assert wrong["failed"] == "computes something else: off by 1.0e+00" and "both" not in wrong
    assert gone["failed"] == "RuntimeError: no such kernel"
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
