"""Times a model beside PyTorch's: the same weights, the same input, the same work, turn by turn.

    python -m segjax.benchmark --model segformer_b0 --size 512 512 --batch 1 --mode infer --against torch torch-compile
    python -m segjax.benchmark --table --json benchmarks/records/2026-11-20-cpu.json

Every contender is a process of its own, so that neither allocator nor threads of one disturb another, and only one of
them works at a time. First their results are compared: nothing is timed that computes something else. Then each does a
few steps in turn, round after round; a ratio is the median over rounds of the ratios within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = "segjax"
# What float32 and bfloat16 may differ by, relative to the largest logit, or to the loss.
CLOSE = {"float32": 1e-3, "bfloat16": 0.1}
ROUND_SECONDS, ROUNDS = 0.5, 15
TABLE = (
    *((model, "infer", 1, (512, 512)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *((model, "infer", 1, (512, 512)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
    *((model, "train", 2, (256, 256)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *((model, "train", 2, (256, 256)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
)


class BenchmarkError(ValueError):
    """What cannot be timed, and why."""


# ------------------------------------------------------------------------------------------------------- one contender


def _serve(connection, name: str, work: tuple) -> None:
    """A process that makes a contender, tells what it computes, and then does as many steps as it is asked for."""
    sys.path.insert(0, str(REPOSITORY))
    try:
        from segjax import runtime

        # For torch as well: it gains from it as much.
        runtime.keep_freed_memory()
        import torch

        from benchmarks.contenders import CONTENDERS, Work

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        contender = CONTENDERS[name](Work(*work))
        before = _resident()
        contender.run()
        peak = contender.memory if contender.memory is not None else max(0, _peak() - before)
        connection.send((contender.outcome, contender.compile_seconds, peak))
        while steps := connection.recv():
            since = time.perf_counter()
            for _ in range(steps):
                contender.run()
            connection.send((time.perf_counter() - since) / steps)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _resident() -> int:
    """Bytes that this process holds; the peak is counted anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Runner:
    """A contender in its process."""

    def __init__(self, name: str, work: tuple):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, work), daemon=True)
        self._process.start()
        theirs.close()
        try:
            answer = self._connection.recv()
        except EOFError:
            raise BenchmarkError(f"{name}: its process died (exit status {self._process.exitcode})") from None
        if isinstance(answer, str):
            raise BenchmarkError(f"{name}: {answer}")
        self.outcome, self.compile_seconds, self.memory = answer

    def seconds(self, steps: int) -> float:
        """Of one step, when so many are done in a row."""
        self._connection.send(steps)
        return self._connection.recv()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(0)
        self._process.join(10)
        self._process.kill()


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(names: Sequence[str], work: tuple, *, rounds: int, say) -> dict[str, object]:
    """Times contenders against each other; the first one is ours.

    Args:
      work: the fields of `benchmarks.contenders.Work`.

    Raises:
      BenchmarkError: one cannot be made, or computes something else.
    """
    model, size, batch, mode, dtype, num_classes = work
    with contextlib.ExitStack() as stack:
        runners = []
        for name in names:
            say(f"  {name}: making it ready ...")
            runner = Runner(name, work)
            stack.callback(runner.close)
            runners.append(runner)
            error = _difference(runner.outcome, runners[0].outcome)
            if not error <= CLOSE[dtype]:
                raise BenchmarkError(f"{name} computes something else than {names[0]}: off by {error:.1e}")
            runner.error = error
        times = {runner.name: [] for runner in runners}
        steps = {runner.name: max(1, round(ROUND_SECONDS / runner.seconds(2))) for runner in runners}
        for number in range(rounds):
            # Whoever comes after a heavy one may find a warmer machine: the order changes.
            for runner in runners[number % len(runners) :] + runners[: number % len(runners)]:
                times[runner.name].append(runner.seconds(steps[runner.name]))
    ours = np.array(times[names[0]])
    return {
        "model": model,
        "mode": mode,
        "batch": batch,
        "size": list(size),
        "dtype": dtype,
        "num_classes": num_classes,
        "rounds": rounds,
        "contenders": [
            {
                "name": runner.name,
                "milliseconds": _quartiles(1e3 * np.array(times[runner.name])),
                "ours_over_theirs": _quartiles(ours / np.array(times[runner.name])),
                "difference": runner.error,
                "compile_seconds": runner.compile_seconds,
                "memory_bytes": runner.memory,
                "flops_per_second": _flops(model, num_classes, size, batch, mode)
                / float(np.median(times[runner.name])),
            }
            for runner in runners
        ],
    }


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one - other).max() / np.abs(other).max())


def _quartiles(values: np.ndarray) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(np.percentile(values, share)) for share in (50, 25, 75)]


def _flops(model: str, num_classes: int, size: tuple[int, int], batch: int, mode: str) -> float:
    """Two for each multiply-add of the published architecture; a training step counts as three forward passes."""
    from segjax import summary

    return (
        2
        * summary.summarise(model, size, num_classes=num_classes).total_multiply_adds
        * batch
        * (3 if mode == "train" else 1)
    )


def ceilings() -> dict[str, float]:
    """What this machine reaches: float32 products of large matrices, FLOP/s, and a copy of 256 MB, bytes/s."""
    import jax
    import jax.numpy as jnp

    def best(function, *arrays):
        program = jax.jit(function).lower(*arrays).compile()
        program(*arrays).block_until_ready()
        seconds = []
        for _ in range(10):
            since = time.perf_counter()
            program(*arrays).block_until_ready()
            seconds.append(time.perf_counter() - since)
        return min(seconds)

    side = 2048
    matrix, long = jnp.ones((side, side)), jnp.ones((2**26,))
    return {
        "flops_per_second": 2 * side**3 / best(jnp.matmul, matrix, matrix),
        "bytes_per_second": 2 * 4 * long.size / best(lambda x: x + 1, long),
    }


# --------------------------------------------------------------------------------------------------------- what is said


def report(result: Mapping, ceiling: Mapping) -> Iterator[str]:
    """The lines of one comparison, at most 80 columns."""
    height, width = result["size"]
    what = {"infer": "inference", "train": "training step"}[result["mode"]]
    shape = f"{result['batch']}x{height}x{width}, {result['num_classes']} classes"
    yield f"{result['model']}, {what}, {shape}, {result['dtype']}"
    yield f"{'':<20} {'ms':>8} {'quartiles':>15} {'segjax/it':>9} {'start s':>7} {'MiB':>6} {'peak':>5}"
    for row in result["contenders"]:
        middle, low, high = row["milliseconds"]
        memory = row["memory_bytes"] / 2**20
        share = row["flops_per_second"] / ceiling["flops_per_second"]
        spread = f"{low:.1f}..{high:.1f}"
        yield (
            f"{row['name']:<20} {middle:>8.1f} {spread:>15} {row['ours_over_theirs'][0]:>9.2f} "
            f"{row['compile_seconds']:>7.1f} {memory:>6.0f} {share:>5.0%}"
        )


def markdown(record: Mapping) -> Iterator[str]:
    """The table of the README: our time over theirs."""
    names = list(dict.fromkeys(row["name"] for result in record["results"] for row in result["contenders"]))[1:]
    yield "| model | work | segjax, ms | " + " | ".join(names) + " |"
    yield "|---" * (3 + len(names)) + "|"
    for result in record["results"]:
        rows = {row["name"]: row for row in result["contenders"]}
        height, width = result["size"]
        cells = [f"{rows[name]['ours_over_theirs'][0]:.2f}" if name in rows else "" for name in names]
        work = f"{result['mode']} {result['batch']}x{height}x{width}"
        yield f"| `{result['model']}` | {work} | {rows[OURS]['milliseconds'][0]:.0f} | " + " | ".join(cells) + " |"


def _machine() -> dict[str, object]:
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers", "segformer-pytorch"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    import jax

    return {
        "versions": {"python": platform.python_version()} | versions,
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": jax.devices()[0].device_kind,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m segjax.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="segformer_b0", help="a name of segjax.MODELS")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", choices=["infer", "train"], default="infer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num-classes", type=int, default=150, metavar="K", help="150 unless given: ADE20K's")
    parser.add_argument("--against", nargs="+", metavar="NAME", help="who else; all that there are")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each; about half a second each")
    parser.add_argument("--table", action="store_true", help="the models and sizes of the README's table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="prints the README's table of a record")
    options = parser.parse_args(arguments)
    if options.markdown:
        print("\n".join(markdown(json.loads(options.markdown.read_text()))))
        return 0
    try:
        _run(options, sys.argv[1:] if arguments is None else arguments)
    except (BenchmarkError, OSError) as error:
        print(f"segjax.benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, command: list[str]) -> None:
    if not (REPOSITORY / "benchmarks" / "contenders.py").exists():
        raise BenchmarkError("this needs the repository: clone it, pip install -e '.[parity]', and run it there")
    sys.path.insert(0, str(REPOSITORY))
    try:
        from benchmarks.contenders import rivals
        from segjax import checkpoint, models
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"this needs {error.name}: pip install -e '.[parity]'") from None
    if options.model not in models.MODELS:
        raise BenchmarkError(f"--model: {options.model} is none of {', '.join(models.MODELS)}")
    rows = TABLE if options.table else ((options.model, options.mode, options.batch, tuple(options.size)),)
    known = dict.fromkeys(name for model, *_ in rows for name in rivals(model))
    if strangers := [name for name in options.against or () if name not in known]:
        timed = "the table" if options.table else options.model
        raise BenchmarkError(f"--against: {', '.join(strangers)}: {timed} can be timed against {', '.join(known)}")
    # A contender's own process must be the only one that works.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print("measuring what the machine can do ...", flush=True)
    ceiling = ceilings()
    print(
        f"{ceiling['flops_per_second'] / 1e9:.0f} GFLOP/s in products of matrices, "
        f"{ceiling['bytes_per_second'] / 1e9:.1f} GB/s in copies",
        flush=True,
    )
    results = []
    for model, mode, batch, size in rows:
        print(f"\n{model}, {mode} ...", flush=True)
        result = compare(
            [OURS, *(name for name in rivals(model) if not options.against or name in options.against)],
            (model, size, batch, mode, options.dtype, options.num_classes),
            rounds=options.rounds,
            say=lambda text: print(text, flush=True),
        )
        print("\n".join(report(result, ceiling)), flush=True)
        results.append(result)
        if options.json:
            record = {
                "date": datetime.date.today().isoformat(),
                "command": "python -m segjax.benchmark " + " ".join(command),
                **_machine(),
                "ceilings": ceiling,
                "results": results,
            }
            checkpoint.write_text(options.json, json.dumps(record, indent=1) + "\n")
    if options.json:
        print(f"\nwrote {options.json}")


if __name__ == "__main__":
    sys.exit(main())
