"""Times a model next to PyTorch's: the same weights, the same input, the same work, in turn.

    segjax benchmark --model segformer_b0 --size 512 512 --batch 1 --mode infer --against torch torch-compile
    segjax benchmark --table --json benchmarks/records/2026-11-20-cpu.json
    segjax benchmark --table sizes --json sizes.json && segjax benchmark --chart sizes.json
    segjax benchmark --table gpu --minutes 9 --json benchmarks/records/2026-11-28-gpu.json

Every contender runs in its own process, so that its allocator and threads do not disturb the others, and only one works
at a time. First, the results are compared; a contender that computes something else is not timed. Then each does a few
steps in turn, round after round; a ratio is the median over rounds of the ratios within a round. On a GPU, the
contenders run one after the other instead, because they cannot share its memory.

The floor is printed next to the times. It is the larger of two times: that of the matrix products at the rate of large
matrix products, and that of the memory traffic at the rate of a copy. Both rates are measured on the machine in the
dtype of the benchmark. A forward pass counts as `segjax.models.summary.least_work`, and a training step as three times
that, since the gradients of a layer's input and weight are two more products, each of which reads two of the same three
arrays and writes the third. AdamW adds seven float32 numbers per parameter: it reads parameter, gradient and two
moments, and writes all except the gradient. The floor assumes one layer after the other: a kernel that computes two
layers
at once can be faster. Rates count only the necessary work: a contender that computes more, for example a decoder at
full resolution, has a lower rate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from segjax.benchmark import floor, runner
from segjax.benchmark.chart import save_chart
from segjax.benchmark.machine import cores, described
from segjax.benchmark.report import markdown, read_record, report
from segjax.benchmark.rows import ROUNDS_ON_A_GPU, TABLES, Row
from segjax.benchmark.runner import OURS, ROUNDS, SPELLINGS, BenchmarkError, OutOfTimeError, largest_that_fits
from segjax.commands.arguments import Parser, as_path, summary_of, within
from segjax.commands.ending import run_command
from segjax.runtime import atomic, console
from segjax.train.constraints import BATCH, CLASSES, SIDE, Integer, Real


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="segjax benchmark", description=summary_of(__doc__))
    parser.add_argument("--model", default="segformer_b0", help="a name of segjax.MODELS")
    parser.add_argument("--size", type=within(SIDE), nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--batch", type=within(BATCH), default=1)
    parser.add_argument("--mode", choices=["infer", "train"], default="infer")
    parser.add_argument(
        "--dtype",
        type=lambda name: SPELLINGS.get(name, name),
        choices=["float32", "bfloat16"],
        help="bf16 for short; default float32, or bfloat16 with --table gpu",
    )
    parser.add_argument(
        "--num-classes", type=within(CLASSES), default=150, metavar="K", help="default 150, as in ADE20K"
    )
    parser.add_argument(
        "--against", nargs="+", metavar="NAME", help="other contenders; default all that exist for the model"
    )
    parser.add_argument(
        "--rounds",
        type=within(Integer(1, 10_000)),
        help=f"of about half a second each; default {ROUNDS}, or {ROUNDS_ON_A_GPU} for gpu",
    )
    parser.add_argument(
        "--table",
        nargs="?",
        const="cpu",
        choices=list(TABLES),
        help="cpu, as in the README; gpu; or sizes, with common image sizes",
    )
    parser.add_argument(
        "--minutes",
        type=within(Real(above=0, most=100_000)),
        help="for --table gpu: begin no row that takes longer than the time left",
    )
    parser.add_argument("--json", type=as_path, metavar="FILE", help="file for the record; --table gpu continues it")
    parser.add_argument("--markdown", type=as_path, metavar="FILE", help="print the README's table of a record")
    parser.add_argument(
        "--chart", type=as_path, metavar="FILE", help="draw time per megapixel over size, from a record, as FILE.png"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    # This process only counts and prints; the contenders use the GPU.
    environment.prepare(cpu_only=True)

    def run() -> None:
        if options.markdown:
            console.show("\n".join(markdown(read_record(options.markdown))))
        elif options.chart:
            _draw(options.chart)
        else:
            _run(options, arguments)

    kept = "rows that were finished are in the --json file" if options.json else "nothing was written"
    return run_command("segjax benchmark", run, interrupted=kept)


def _draw(record: Path) -> None:
    path, found = record.with_suffix(".png"), read_record(record)
    try:
        save_chart(path, found)
    except ValueError as error:
        raise BenchmarkError(f"--chart: {record}: {error}") from None
    console.say(f"wrote {path}")


def _run(options: argparse.Namespace, command: list[str]) -> None:
    if not sys.platform.startswith("linux"):
        raise BenchmarkError("segjax benchmark reads memory from /proc and needs Linux")
    since = time.monotonic()
    try:
        from segjax import models
        from segjax.benchmark.contenders import FLOAT32_PRODUCTS, chosen, rivals
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"this needs {error.name}: pip install 'segjax[parity]'") from None
    if options.model not in models.MODELS:
        raise BenchmarkError(f"--model: {options.model} is none of {', '.join(models.MODELS)}")
    of_gpus = options.table == "gpu"
    if options.minutes is not None and not of_gpus:
        raise BenchmarkError("--minutes needs --table gpu")
    one = Row(options.model, options.mode, options.batch, tuple(options.size))
    rows = TABLES[options.table] if options.table else (one,)
    known = dict.fromkeys(name for row in rows for name in rivals(row.model))
    if strangers := [name for name in options.against or () if name not in known]:
        timed = "the table" if options.table else options.model
        raise BenchmarkError(f"--against: {', '.join(strangers)}: {timed} can be timed against {', '.join(known)}")
    dtype = options.dtype or ("bfloat16" if of_gpus else "float32")
    rounds = options.rounds or (ROUNDS_ON_A_GPU if of_gpus else ROUNDS)
    until = None if options.minutes is None else since + 60 * options.minutes
    # Only one contender works at a time, which may use nearly all of the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

    say = console.say
    say("measuring the rates of the machine ...")
    if loaded := _load_of_others():
        say(loaded)
    ceiling = floor.measured_ceilings(dtype)
    on_gpu = ceiling["platform"] != "cpu"
    say(
        f"{ceiling['flops_per_second'] / 1e9:.0f} GFLOP/s in products of matrices, "
        f"{ceiling['bytes_per_second'] / 1e9:.1f} GB/s in copies, {dtype}"
    )

    def measure(row: Row) -> dict[str, object]:
        return runner.compare(
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
            # `show`, because the lines of a table are not wrapped.
            console.show("\n".join(report(results[-1], ceiling)))
        if options.json:
            record = {
                "date": datetime.date.today().isoformat(),
                "command": "segjax benchmark " + " ".join(command),
                **described(),
                "device": ceiling["device"],
                "float32_products": FLOAT32_PRODUCTS,
                "ceilings": ceiling,
                "results": results,
            }
            atomic.write_text(options.json, json.dumps(record, indent=1) + "\n")
    if options.json:
        say(f"\nwrote {options.json}")


def _load_of_others() -> str | None:
    """A warning if other programs keep half of the cores or more busy; this process has just begun."""
    load, own = os.getloadavg()[0], cores()
    if load < own / 2:
        return None
    return f"warning: other programs load {load:.1f} of {own} cores, and times will be uneven"


def _title(row: Row) -> str:
    return f"\n{row.model}, {row.mode} {row.batch}x{row.size[0]}x{row.size[1]}"


def _one_after_the_other(rows: Sequence[Row], measure, *, say) -> Iterator[list[dict]]:
    """Yields all results so far, after every row."""
    results = []
    for row in rows:
        say(f"{_title(row)} ...")
        results = [*results, measure(row)]
        yield results


def _going_on(rows: Sequence[Row], measure, earlier: list[dict], *, until: float | None, say) -> Iterator[list[dict]]:
    """Like `_one_after_the_other`, with batches that fit, until the time ends; complete rows of `earlier` are kept.

    If a row cannot be measured, its result has the reason as "failed", and the next row follows.

    Args:
      rows: Rows of the table.
      measure: Function that measures a row.
      earlier: Results of an earlier command.
      until: End of the time, on the clock of `time.monotonic`. A row that would take longer is not begun.
      say: Function that prints a line.
    """
    results = earlier
    for row in rows:
        asked = {"model": row.model, "mode": row.mode, "largest_batch": row.batch, "size": list(row.size)}
        asked["against"] = list(row.against)
        same = [result for result in results if all(result.get(key) == value for key, value in asked.items())]
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
    """Results of an earlier command, which this command continues.

    Raises:
      BenchmarkError: The results are for another dtype, number of classes or device.
    """
    if path is None or not path.exists():
        return []
    record = read_record(path)
    # A failed row has no dtype.
    work = {(dtype, num_classes), *((r["dtype"], r.get("num_classes")) for r in record["results"] if "dtype" in r)}
    if record.get("device") != device or len(work) > 1:
        raise BenchmarkError(
            f"--json: {path} has other work than {dtype} of {num_classes} classes on {device}; name another file"
        )
    return record["results"]


def _expected(results: Sequence[Mapping], row: Row) -> float:
    """Estimated seconds of a row: the longest of its model and mode, else of its mode, else of all; 0 without any."""
    for keys in (("model", "mode"), ("mode",), ()):
        alike = [r for r in results if "seconds" in r and all(r[key] == getattr(row, key) for key in keys)]
        if alike:
            return max(result["seconds"] for result in alike)
    return 0.0
