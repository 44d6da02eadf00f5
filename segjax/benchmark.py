"""Times a model beside PyTorch's: the same weights, the same input, the same work, turn by turn.

    python -m segjax.benchmark --model segformer_b0 --size 512 512 --batch 1 --mode infer --against torch torch-compile
    python -m segjax.benchmark --table --json benchmarks/records/2026-11-20-cpu.json
    python -m segjax.benchmark --table gpu --minutes 9 --json benchmarks/records/2026-11-28-gpu.json

Every contender is a process of its own, so that neither allocator nor threads of one disturb another, and only one of
them works at a time. First their results are compared: nothing is timed that computes something else. Then each does a
few steps in turn, round after round; a ratio is the median over rounds of the ratios within a round. On a GPU one
follows the other instead, each alone on the card, whose memory they could not share.

Beside the times stands the floor: the larger of the time that the products would take at the rate of large matrix
products, and the time that the traffic would take at the rate of a copy, both measured on the machine, in the type that
is benchmarked. What is counted: `segjax.summary.least_work` for a forward pass; three times that for a training step,
since the gradients of a layer's input and weight are two products more, each of which reads two of the same three
arrays and writes the third; and AdamW's seven float32 numbers a parameter (parameter, gradient and two moments read,
all but the gradient written). It is a floor of layer by layer: a kernel that computes two layers at once can go below.
Rates are those of what must be done: who computes more, such as a decoder at full resolution, gets no credit for it.
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
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = "segjax"
# What float32 and bfloat16 may differ by, relative to the largest logit, or to the loss.
CLOSE = {"float32": 1e-3, "bfloat16": 0.1}
SPELLINGS = {"bf16": "bfloat16"}
ROUND_SECONDS, ROUNDS, QUIET_SECONDS = 0.5, 15, 0.5
# Of a card that nobody else works on; the minutes are what is scarce there.
ROUNDS_ON_A_GPU = 7


class Row(NamedTuple):
    """Of a table. batch: on a GPU, the largest that is tried. against: whom the row is for; all there are, if None."""

    model: str
    mode: str
    batch: int
    size: tuple[int, int]
    against: tuple[str, ...] | None = None


TABLE = (
    *(Row(model, "infer", 1, (512, 512)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *(Row(model, "infer", 1, (512, 512)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
    *(Row(model, "train", 2, (256, 256)) for model in ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t")),
    *(Row(model, "train", 2, (256, 256)) for model in ("segnext_s", "segformer_simple", "segformer_zuppichini")),
)


def _gpu_rows(models: Sequence[str], side: int, against: Sequence[str]) -> Iterator[Row]:
    """Training, inference of many images and of one, of squares: batches by pixels, half as large where models are."""
    for model in models:
        parts = (side // 512) ** 2 * (2 if model == "segformer_b5" else 1)
        for mode, batch in (("train", 64 // parts), ("infer", 32 // parts), ("infer", 1)):
            yield Row(model, mode, batch, (side, side), tuple(against))


_FIRST, _SECOND = ("segformer_b0", "segnext_t", "hrnet_w48"), ("segformer_b2", "segformer_b5", "segnext_b")
_RIVALS, _SLOW_RIVALS = ("torch", "torch-channels-last", "torch-compile"), ("torch-compile-max-autotune",)
# By importance: a family each, then its other sizes, then larger images; what takes minutes to compile comes last.
GPU_TABLE = (
    *_gpu_rows(_FIRST, 512, _RIVALS),
    *_gpu_rows(_SECOND, 512, _RIVALS),
    *_gpu_rows(_FIRST, 1024, _RIVALS),
    *_gpu_rows(_SECOND, 1024, _RIVALS),
    *_gpu_rows((*_FIRST, *_SECOND), 512, _SLOW_RIVALS),
)
TABLES = {"cpu": TABLE, "gpu": GPU_TABLE}


class BenchmarkError(ValueError):
    """What cannot be timed, and why."""


class OutOfMemoryError(BenchmarkError):
    """A contender whose step does not fit."""


class OutOfTimeError(BenchmarkError):
    """A contender that is not done when the minutes are over."""


# ------------------------------------------------------------------------------------------------------- one contender


def _serve(connection, name: str, work: tuple) -> None:
    """A process that makes a contender, tells what it computes, and then does as many steps as it is asked for."""
    sys.path.insert(0, str(REPOSITORY))
    try:
        from segjax import runtime

        # For torch as well: it gains from it as much.
        runtime.keep_freed_memory()
        import jax
        import torch

        from benchmarks.contenders import CONTENDERS, Work, same_precision

        work = Work(*work)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        if name != OURS:
            # It only makes the weights there: the card is torch's.
            jax.config.update("jax_platforms", "cpu")
        if not connection.recv():
            return
        same_precision(work)
        contender = CONTENDERS[name](work)
        before = _resident()
        contender.run()
        peak = contender.memory if contender.memory is not None else max(0, _peak() - before)
        connection.send((contender.outcome, contender.compile_seconds, peak))
        while steps := connection.recv():
            # The caches, and memory that the kernel took for idle, are its own again.
            contender.run()
            since = time.perf_counter()
            contender.run(steps)
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
    """A contender in its process, which comes up while others are made ready."""

    def __init__(self, name: str, work: tuple, *, until: float | None = None):
        """until: on the clock of `time.monotonic`; later answers are not waited for."""
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._until = until
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, work), daemon=True)
        self._process.start()
        theirs.close()

    def make(self) -> None:
        self.outcome, self.compile_seconds, self.memory = self._answer_to(True)

    def seconds(self, steps: int) -> float:
        """Of one step, when so many are done in a row."""
        return self._answer_to(steps)

    def _answer_to(self, message):
        try:
            self._connection.send(message)
            if self._until is not None and not self._connection.poll(max(0, self._until - time.monotonic())):
                raise OutOfTimeError(f"{self.name}: not done when the minutes were over")
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(10)
            raise BenchmarkError(f"{self.name}: its process died (exit status {self._process.exitcode})") from None
        if isinstance(answer, str):
            does_not_fit = re.search("RESOURCE_EXHAUSTED|out of memory", answer, re.IGNORECASE)
            raise (OutOfMemoryError if does_not_fit else BenchmarkError)(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(0)
        # One that compiles hears nothing for minutes.
        self._process.join(1 if self._until is not None and time.monotonic() > self._until else 10)
        self._process.kill()


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(
    names: Sequence[str],
    work: tuple,
    *,
    ceiling: Mapping,
    rounds: int,
    say,
    apart: bool = False,
    until: float | None = None,
    keep_going: bool = False,
) -> dict[str, object]:
    """Times contenders against each other; the first one is ours.

    Args:
      work: the fields of `benchmarks.contenders.Work`.
      ceiling: of `ceilings`, for the same dtype.
      apart: one contender after the other, each closed before the next is made, instead of turn by turn.
      until: on the clock of `time.monotonic`, when all must be over; contenders that are not are left out.
      keep_going: has a rival that cannot be timed stand in the result with the reason, "failed".

    Raises:
      BenchmarkError: one cannot be made, or computes something else. OutOfMemoryError, whatever `keep_going` says.
      OutOfTimeError: ours was not done in time.
    """
    model, size, batch, mode, dtype, num_classes = work
    times, made, failed, cut = {}, {}, {}, False
    with contextlib.ExitStack() as stack:
        runners = [Runner(name, work, until=until) for name in names]
        for runner in runners:
            stack.callback(runner.close)
        # While they come up.
        floor = floor_of(work, ceiling)
        for runner in runners:
            say(f"  {runner.name}: making it ready ...")
            try:
                runner.make()
                runner.error = _difference(runner.outcome, runners[0].outcome)
                if not runner.error <= CLOSE[dtype]:
                    raise BenchmarkError(
                        f"{runner.name} computes something else than {names[0]}: off by {runner.error:.1e}"
                    )
                made[runner.name] = runner
                if apart:
                    times |= _turns([runner], rounds)
                    runner.close()
            except OutOfMemoryError:
                raise
            except BenchmarkError as error:
                if not keep_going or runner is runners[0]:
                    raise
                runner.close()
                made.pop(runner.name, None)
                failed[runner.name] = str(error)
                cut |= isinstance(error, OutOfTimeError)
                say(f"  {error}")
        if not apart:
            times = _turns(list(made.values()), rounds)
    ours = np.array(times[names[0]])
    rows = []
    for name in names:
        if name in failed:
            rows.append({"name": name, "failed": failed[name]})
            continue
        middle = float(np.median(times[name]))
        rows.append(
            {
                "name": name,
                "milliseconds": quartiles(1e3 * np.array(times[name])),
                "ours_over_theirs": quartiles(ours / np.array(times[name])),
                "difference": made[name].error,
                "compile_seconds": made[name].compile_seconds,
                "memory_bytes": made[name].memory,
                "images_per_second": batch / middle,
                "flops_per_second": floor["flops"] / middle,
                "bytes_per_second": floor["bytes"] / middle,
                "share_of_floor": floor["milliseconds"] / (1e3 * middle),
            }
        )
    return {
        "model": model,
        "mode": mode,
        "batch": batch,
        "size": list(size),
        "dtype": dtype,
        "num_classes": num_classes,
        "rounds": rounds,
        "floor": floor,
        **({"cut_short": True} if cut else {}),
        "contenders": rows,
    }


def _turns(runners: Sequence[Runner], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each, one number a round."""
    times = {runner.name: [] for runner in runners}
    steps = {runner.name: max(1, round(ROUND_SECONDS / runner.seconds(2))) for runner in runners}
    for number in range(rounds):
        # Whoever comes after a heavy one may find a warmer machine: the order changes.
        start = number % len(runners)
        for runner in (*runners[start:], *runners[:start]):
            # Threads of the one before may go on looking for work for some tenths of a second.
            if len(runners) > 1:
                time.sleep(QUIET_SECONDS)
            times[runner.name].append(runner.seconds(steps[runner.name]))
    return times


def largest_that_fits(measure, row: Row, *, say) -> dict[str, object]:
    """`measure(row)`, with half the batch as long as one of the contenders has too little memory.

    All have the same batch: the largest that fits everybody, to within a factor of two.

    Returns:
      The result, with "did_not_fit", names and batches, and "seconds", how long all of it took.

    Raises:
      OutOfMemoryError: not even one image fits.
    """
    did_not_fit, since = [], time.monotonic()
    while True:
        try:
            result = measure(row)
        except OutOfMemoryError as error:
            name = str(error).partition(":")[0]
            if row.batch == 1:
                raise
            say(f"  a batch of {row.batch} does not fit {name}; half of it ...")
            did_not_fit.append({"name": name, "batch": row.batch})
            row = row._replace(batch=row.batch // 2)
        else:
            return result | {"did_not_fit": did_not_fit, "seconds": time.monotonic() - since}


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one - other).max() / np.abs(other).max())


def quartiles(values: np.ndarray) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(np.percentile(values, share)) for share in (50, 25, 75)]


ADAMW_BYTES = 7 * 4


def floor_of(work: tuple, ceiling: Mapping) -> dict[str, float]:
    """The least that a step must do, and how long this machine takes for it; see the module's docstring."""
    import jax.numpy as jnp

    from segjax import summary

    model, size, batch, mode, dtype, num_classes = work
    least = summary.least_work(model, size, batch=batch, num_classes=num_classes)
    passes, updates = (3, ADAMW_BYTES * least.parameters) if mode == "train" else (1, 0)
    flops = 2 * passes * least.multiply_adds
    moved = passes * least.values * jnp.dtype(dtype).itemsize + updates
    seconds = max(flops / ceiling["flops_per_second"], moved / ceiling["bytes_per_second"])
    return {"flops": flops, "bytes": moved, "milliseconds": 1e3 * seconds}


def ceilings(dtype: str) -> dict[str, object]:
    """What this machine reaches in a type: products of large matrices, FLOP/s, and a copy, bytes/s; and its name.

    Sizes that fill it: matrices of 2048 and 64 Mi numbers on a CPU, 8192 and 512 Mi on a GPU, of random numbers, since
    zeros are multiplied faster. The best of ten. For a process of its own, which keeps freed memory as contenders do:
    with results in fresh pages, which the kernel zeroes, two cores copy 10 GB a second instead of 40 to 65.
    """
    from segjax import runtime

    runtime.keep_freed_memory()
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    if dtype == "float32" and not on_cpu:
        jax.config.update("jax_default_matmul_precision", "highest")

    def best(function, *arrays):
        program = jax.jit(function).lower(*arrays).compile()
        program(*arrays).block_until_ready()
        # The start of a kernel is nothing that a GPU waits for when others are queued before it.
        queued = 1 if on_cpu else 5
        seconds = []
        for _ in range(10):
            since = time.perf_counter()
            for _ in range(queued):
                done = program(*arrays)
            done.block_until_ready()
            seconds.append((time.perf_counter() - since) / queued)
        return min(seconds)

    side, length = (2048, 2**26) if on_cpu else (8192, 2**29)
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    long = jnp.ones((length,), dtype)
    return {
        "flops_per_second": 2 * side**3 / best(jnp.matmul, matrix, matrix),
        "bytes_per_second": 2 * long.nbytes / best(lambda x: x + 1, long),
        "dtype": dtype,
        "device": device.device_kind,
        "platform": device.platform,
    }


def measured_ceilings(dtype: str) -> dict[str, object]:
    """`ceilings` in a process of its own, which leaves nothing on a GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(ceilings, dtype).result()


# --------------------------------------------------------------------------------------------------------- what is said


def report(result: Mapping, ceiling: Mapping) -> Iterator[str]:
    """The lines of one comparison, at most 80 columns."""
    height, width = result["size"]
    what = {"infer": "inference", "train": "training step"}[result["mode"]]
    shape = f"{result['batch']}x{height}x{width}, {result['num_classes']} classes"
    timed = [row for row in result["contenders"] if "failed" not in row]
    yield f"{result['model']}, {what}, {shape}, {result['dtype']}"
    yield f"{'':<26} {'ms':>9} {'quartiles':>17} {'segjax/it':>9} {'start s':>7} {'MiB':>6}"
    for row in timed:
        middle, low, high = row["milliseconds"]
        digits = 1 if middle >= 10 else 3
        spread = f"{low:.{digits}f}..{high:.{digits}f}"
        yield (
            f"{row['name']:<26} {middle:>9.{digits}f} {spread:>17} {row['ours_over_theirs'][0]:>9.2f} "
            f"{row['compile_seconds']:>7.1f} {row['memory_bytes'] / 2**20:>6.0f}"
        )
    for row in result["contenders"]:
        if "failed" in row:
            yield row["failed"][:80]
    floor = result["floor"]
    yield (
        f"floor {floor['milliseconds']:.3g} ms: {floor['flops'] / 1e9:.3g} GFLOP and {floor['bytes'] / 1e9:.3g} GB "
        "must be done"
    )
    yield f"{'':<26} {'images/s':>9} {'GFLOP/s':>9} {'of peak':>7} {'GB/s':>8} {'of peak':>7} {'of floor':>8}"
    for row in timed:
        rates = row["flops_per_second"], row["bytes_per_second"]
        shares = rates[0] / ceiling["flops_per_second"], rates[1] / ceiling["bytes_per_second"]
        yield (
            f"{row['name']:<26} {row['images_per_second']:>9.1f} {rates[0] / 1e9:>9.0f} {shares[0]:>7.0%} "
            f"{rates[1] / 1e9:>8.1f} {shares[1]:>7.0%} {row['share_of_floor']:>8.0%}"
        )


def markdown(record: Mapping) -> Iterator[str]:
    """The table of the README: our time over theirs. Rows of the same work become one."""
    merged: dict[tuple, dict[str, Mapping]] = {}
    for result in record["results"]:
        rows = merged.setdefault((result["model"], result["mode"], result["batch"], *result["size"]), {})
        for row in result["contenders"]:
            if "failed" not in row:
                rows.setdefault(row["name"], row)
    names = list(dict.fromkeys(name for rows in merged.values() for name in rows if name != OURS))
    # Records of before have no floor.
    has_floor = any("share_of_floor" in row for rows in merged.values() for row in rows.values())
    extra = ["images/s", "of the floor"] if has_floor else []
    yield "| " + " | ".join(["model", "work", "segjax, ms", *extra, *names]) + " |"
    yield "|---" * (3 + len(extra) + len(names)) + "|"
    for (model, mode, batch, height, width), rows in merged.items():
        if OURS not in rows:
            continue
        ours = rows[OURS]
        time_of_ours = ours["milliseconds"][0]
        cells = [f"`{model}`", f"{mode} {batch}x{height}x{width}"]
        cells += [f"{time_of_ours:.0f}" if time_of_ours >= 10 else f"{time_of_ours:.2f}"]
        if has_floor:
            known = "share_of_floor" in ours
            cells += [f"{ours['images_per_second']:.0f}", f"{ours['share_of_floor']:.0%}"] if known else ["", ""]
        cells += [f"{rows[name]['ours_over_theirs'][0]:.2f}" if name in rows else "" for name in names]
        yield "| " + " | ".join(cells) + " |"


def machine(device: str) -> dict[str, object]:
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers", "segformer-pytorch"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "versions": {"python": platform.python_version()} | versions,
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m segjax.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="segformer_b0", help="a name of segjax.MODELS")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", choices=["infer", "train"], default="infer")
    parser.add_argument(
        "--dtype",
        type=lambda name: SPELLINGS.get(name, name),
        choices=["float32", "bfloat16"],
        help="bf16 for short; float32 unless given, bfloat16 in the table of GPUs",
    )
    parser.add_argument("--num-classes", type=int, default=150, metavar="K", help="150 unless given: ADE20K's")
    parser.add_argument("--against", nargs="+", metavar="NAME", help="who else; all that there are")
    parser.add_argument(
        "--rounds", type=int, help=f"of about half a second each; {ROUNDS}, or {ROUNDS_ON_A_GPU} of gpu"
    )
    parser.add_argument(
        "--table", nargs="?", const="cpu", choices=list(TABLES), help="models and sizes of the README's: cpu, or gpu"
    )
    parser.add_argument(
        "--minutes", type=float, help="of --table gpu: begin no row that takes longer than what is left"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the record is written; --table gpu goes on with it"
    )
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
    since = time.monotonic()
    if not (REPOSITORY / "benchmarks" / "contenders.py").exists():
        raise BenchmarkError("this needs the repository: clone it, pip install -e '.[parity]', and run it there")
    sys.path.insert(0, str(REPOSITORY))
    try:
        from benchmarks.contenders import FLOAT32_PRODUCTS, chosen, rivals
        from segjax import checkpoint, models
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"this needs {error.name}: pip install -e '.[parity]'") from None
    if options.model not in models.MODELS:
        raise BenchmarkError(f"--model: {options.model} is none of {', '.join(models.MODELS)}")
    of_gpus = options.table == "gpu"
    if options.minutes is not None and not of_gpus:
        raise BenchmarkError("--minutes goes with --table gpu alone")
    one = Row(options.model, options.mode, options.batch, tuple(options.size))
    rows = TABLES[options.table] if options.table else (one,)
    known = dict.fromkeys(name for row in rows for name in rivals(row.model))
    if strangers := [name for name in options.against or () if name not in known]:
        timed = "the table" if options.table else options.model
        raise BenchmarkError(f"--against: {', '.join(strangers)}: {timed} can be timed against {', '.join(known)}")
    dtype = options.dtype or ("bfloat16" if of_gpus else "float32")
    rounds = options.rounds or (ROUNDS_ON_A_GPU if of_gpus else ROUNDS)
    until = None if options.minutes is None else since + 60 * options.minutes
    # A contender's own process must be the only one that works, and may then have nearly all of a card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

    def say(text: str) -> None:
        print(text, flush=True)

    say("measuring what the machine can do ...")
    ceiling = measured_ceilings(dtype)
    on_gpu = ceiling["platform"] != "cpu"
    say(
        f"{ceiling['flops_per_second'] / 1e9:.0f} GFLOP/s in products of matrices, "
        f"{ceiling['bytes_per_second'] / 1e9:.1f} GB/s in copies, {dtype}"
    )

    def measure(row: Row) -> dict[str, object]:
        return compare(
            [OURS, *row.against],
            (row.model, row.size, row.batch, row.mode, dtype, options.num_classes),
            ceiling=ceiling,
            rounds=rounds,
            say=say,
            apart=on_gpu or of_gpus,
            until=until,
            keep_going=of_gpus,
        )

    rows = [
        row._replace(against=tuple(chosen(row.model, options.against or row.against, on_gpu=on_gpu))) for row in rows
    ]
    if of_gpus:
        earlier = _recorded(options.json, dtype, options.num_classes, ceiling["device"])
        measured = _going_on(rows, measure, earlier, until=until, say=say)
    else:
        measured = _one_after_the_other(rows, measure, say=say)
    for results in measured:
        if "failed" not in results[-1]:
            say("\n".join(report(results[-1], ceiling)))
        if options.json:
            record = {
                "date": datetime.date.today().isoformat(),
                "command": "python -m segjax.benchmark " + " ".join(command),
                **machine(ceiling["device"]),
                "float32_products": FLOAT32_PRODUCTS,
                "ceilings": ceiling,
                "results": results,
            }
            checkpoint.write_text(options.json, json.dumps(record, indent=1) + "\n")
    if options.json:
        print(f"\nwrote {options.json}")


def _title(row: Row) -> str:
    return f"\n{row.model}, {row.mode} {row.batch}x{row.size[0]}x{row.size[1]}"


def _one_after_the_other(rows: Sequence[Row], measure, *, say) -> Iterator[list[dict]]:
    """The results so far, after every row."""
    results = []
    for row in rows:
        say(f"{_title(row)} ...")
        results = [*results, measure(row)]
        yield results


def _going_on(rows: Sequence[Row], measure, earlier: list[dict], *, until: float | None, say) -> Iterator[list[dict]]:
    """The same, with those of `earlier` that are whole not measured again, at batches that fit, and in time.

    A row that cannot be measured stands in the results too, with the reason, "failed"; the others go on.

    Args:
      until: on the clock of `time.monotonic`. A row is not begun that would take longer than what is left.
    """
    results = earlier
    for row in rows:
        asked = {"model": row.model, "mode": row.mode, "largest_batch": row.batch, "size": list(row.size)}
        asked["against"] = list(row.against)
        same = [result for result in results if all(result[key] == value for key, value in asked.items())]
        if any("cut_short" not in result for result in same):
            say(f"{_title(row)}: recorded already")
            continue
        left, needed = float("inf") if until is None else until - time.monotonic(), _expected(results, row)
        if needed > left or left <= 0:
            say(f"{_title(row)}: not begun: such a row takes {needed:.0f} s, and {max(left, 0):.0f} s are left")
            continue
        say(f"{_title(row)} ...")
        try:
            result = largest_that_fits(measure, row, say=say)
        except OutOfTimeError as error:
            say(f"  {error}")
            continue
        except BenchmarkError as error:
            say(f"  {error}")
            result = {"batch": row.batch, "failed": str(error), "contenders": []}
        results = [*(result for result in results if result not in same), result | asked]
        yield results


def _recorded(path: Path | None, dtype: str, num_classes: int, device: str) -> list[dict]:
    """Results of an earlier command, which this one goes on with.

    Raises:
      BenchmarkError: they are of something else.
    """
    if path is None or not path.exists():
        return []
    record = json.loads(path.read_text())
    # A row that failed has no type.
    work = {(dtype, num_classes), *((r["dtype"], r["num_classes"]) for r in record["results"] if "dtype" in r)}
    if record["device"] != device or len(work) > 1:
        raise BenchmarkError(
            f"--json: {path} has other work than {dtype} of {num_classes} classes on {device}; name another file"
        )
    return record["results"]


def _expected(results: Sequence[Mapping], row: Row) -> float:
    """Seconds that a row will take: as long as the longest of the model and mode, of the mode, or of all; 0 of none."""
    for keys in (("model", "mode"), ("mode",), ()):
        alike = [r for r in results if "seconds" in r and all(r[key] == getattr(row, key) for key in keys)]
        if alike:
            return max(result["seconds"] for result in alike)
    return 0.0


if __name__ == "__main__":
    import jax

    # This process counts and prints; a GPU, and the memory that jax takes of it, is the contenders'.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
