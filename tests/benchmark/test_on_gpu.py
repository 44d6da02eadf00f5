"""Code that runs only on a GPU, as far as it can be tested without one."""

import gzip
import importlib
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_determinism, gpu_profile, on_gpu
from segjax.benchmark import contenders


def part(code, what="a part"):
    words = (sys.executable, "-c", code)
    return on_gpu.Part(what, words, words)


@pytest.fixture
def three(monkeypatch):
    code = "import sys; open(sys.argv[1], 'a').write('once ')"
    found = {
        "good": on_gpu.Part("writes", (), (sys.executable, "-c", code, "{json}")),
        "bad": part("print('no such kernel'); raise SystemExit(3)"),
        "slow": part("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"),
    }
    monkeypatch.setattr(on_gpu, "parts", lambda camvid: found)


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(three, tmp_path, capsys):
    since = time.monotonic()
    assert on_gpu.main(["--output", str(tmp_path), "--rehearse", "--limit", "3"]) == 1
    assert time.monotonic() - since < 30
    record = json.loads((tmp_path / "on-gpu.json").read_text())
    ended = {name: found["ended"] for name, found in record["parts"].items()}
    assert ended == {"good": "ok", "bad": "failed (status 3)", "slow": "out of time"}
    assert "no such kernel" in (tmp_path / "bad.log").read_text()
    assert "bad.log" in capsys.readouterr().out
    # What has succeeded is run again only by its name.
    for words in (["--limit", "1"], ["--only", "good"]):
        on_gpu.main(["--output", str(tmp_path), "--rehearse", *words])
    assert (tmp_path / "good.json").read_text() == "once once "


def test_nothing_runs_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_gpu.recorded, "has_gpu", lambda: False)
    assert on_gpu.main(["--output", str(tmp_path / "new")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_every_part_uses_flags_that_its_command_accepts(monkeypatch, capsys):
    for name, found in on_gpu.parts(Path("camvid")).items():
        for words in (found.words, found.rehearsal):
            assert words[:2] == (sys.executable, "-m"), name
            if words[2] == "pytest":
                assert all(Path(word).exists() for word in words if word.startswith("parity"))
                continue
            command = "segjax.commands.benchmark" if words[2] == "segjax.benchmark" else words[2]
            monkeypatch.setattr(sys, "argv", [command, "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(command).main()
            taken = capsys.readouterr().out
            assert all(word in taken for word in words[3:] if word.startswith("--")), (name, words)


def test_measured_times_are_listed_next_to_the_roofline(tmp_path):
    def function(x, w):
        return jnp.sum(jnp.tanh(x @ w), axis=1)

    x, w = (jnp.asarray(np.random.default_rng(seed).standard_normal((300, 200)), jnp.float32) for seed in (0, 1))
    program = jax.jit(function).lower(x, w.T).compile()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            jax.block_until_ready(program(x, w.T))
    found = gpu_profile.joined(program.as_text(), gpu_profile.measured(tmp_path), 3)
    assert found["kernels"] and found["roofline_ms"] > 0
    matched = [row for row in found["kernels"] if row["milliseconds"] > 0]
    assert matched and found["milliseconds"] == pytest.approx(
        sum(row["milliseconds"] for row in matched) + found["unmatched_ms"]
    )
    assert max(map(len, gpu_profile.report(found))) <= 80


def test_only_the_streams_of_a_device_are_counted(tmp_path):
    def named(kind, name, **ids):
        return {"ph": "M", "name": kind, "args": {"name": name}, **ids}

    def ran(pid, tid, microseconds):
        return {"ph": "X", "pid": pid, "tid": tid, "dur": microseconds, "name": "k", "args": {"hlo_op": "fusion.1"}}

    events = [named("process_name", "/host:CPU", pid=1), named("process_name", "/device:GPU:0", pid=2)]
    events += [named("thread_name", "Stream #7(Compute)", pid=2, tid=5), named("thread_name", "XLA Ops", pid=2, tid=6)]
    events += [ran(1, 9, 1000), ran(2, 5, 30), ran(2, 5, 12), ran(2, 6, 500)]
    path = tmp_path / "plugins" / "vm.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    assert gpu_profile.measured(tmp_path) == {"fusion.1": pytest.approx(42e-6)}


def test_the_kernel_that_loses_most_comes_first():
    program = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(jnp.ones((40, 30)), jnp.ones((30, 20))).compile()
    names = [kernel.name for kernel in gpu_profile.gpu_static.Program(program.as_text()).kernels]
    assert names
    seconds = {name: 1e-3 * (1 + number) for number, name in enumerate(names)} | {"of another program": 4.0}
    found = gpu_profile.joined(program.as_text(), seconds, 2)
    assert [row["name"] for row in found["kernels"]] == names[::-1]
    assert found["kernels"][-1]["milliseconds"] == pytest.approx(0.5) and found["unmatched_ms"] == pytest.approx(2000)


def test_runs_are_deterministic_if_their_hashes_are_equal(monkeypatch):
    hashes = iter(["a", "b", "c", "c"])

    def run(function, name, size, batch, flag):
        return {"params_sha256": next(hashes), "milliseconds": 3.0 if flag else 2.0}

    monkeypatch.setattr(gpu_determinism.recorded, "in_a_process", run)
    found = gpu_determinism.compared("segformer_b0", (32, 64), 2)
    assert found["equal"] == {"default": False, gpu_determinism.FLAG: True} and found["cost"] == pytest.approx(1.5)
    line = gpu_determinism.line("segformer_zuppichini", found)
    assert "DIFFERENT" in line and "1.50" in line and len(line) <= 80


@pytest.mark.slow
def test_two_real_runs_are_hashed_and_a_real_step_is_profiled(tmp_path):
    paths = [tmp_path / name for name in ("determinism.json", "profile.json")]
    assert gpu_determinism.main(["segformer_b0", "--rehearse", "--json", str(paths[0])]) == 0
    assert gpu_profile.main(["segformer_b0", "--rehearse", "--json", str(paths[1])]) == 0
    determinism, profile = (json.loads(path.read_text())["models"]["segformer_b0"] for path in paths)
    assert set(determinism["equal"].values()) == {True} and profile["milliseconds"] > 0
    work = contenders.Work("segformer_b0", (32, 64), 2, "infer", "bfloat16")
    assert gpu_profile.profiled(work, calls=2)["kernels"]
