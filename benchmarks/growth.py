"""Measures time and memory of inference per pixel for growing images, and compares growth with the architecture's.

    python -m benchmarks.growth --json FILE

Each model runs in its own process, in float32, on one image, with random weights, and returns logits at the model's own
stride. It is compiled once per size, and the sizes take turns. The measurements are printed next to the multiply-adds
per pixel, which grow with attention because each query meets the keys of the whole image. Time that grows as the
multiply-adds do is due to the architecture; time that grows more is due to the program. This takes about five minutes
on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import recorded
from segjax.benchmark.machine import quartiles

MODELS = ("segformer_b0", "segformer_b2", "hrnet_w18", "segnext_t", "segformer_simple", "segformer_zuppichini")
SIZES = ((256, 256), (512, 512), (512, 1024), (1024, 2048))
NUM_CLASSES = 19
# Turns of each size, and seconds for which a size is repeated in a turn.
ROUNDS, TURN = 5, 0.3
# Growth up to this factor counts as flat, because single runs of one program differ as much.
FLAT = 1.15


def measure(model: str, sizes: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, object]]:
    """Measures each size, in ascending order. Sets up its process, which should do nothing else.

    Returns:
      Rows of "size"; "milliseconds" per image, quartiles; "temporaries", bytes that XLA's program of the logits takes
      in addition to weights and image; "peak", the largest growth of the process in bytes, including the logits;
      "labels_temporaries", those of the evaluation program, from uint8 pixels to labels of every pixel;
      "compile_seconds"; "multiply_adds"; and "attention", the multiply-adds in products of attention.
    """
    from segjax.runtime import environment

    environment.keep_freed_memory()
    from functools import partial

    import jax
    import numpy as np

    import segjax
    from segjax.data.augment import normalise
    from segjax.inference import engine
    from segjax.models import summary
    from segjax.models.functional import FunctionalModel
    from segjax.runtime.parallel import compiler_options

    functional = FunctionalModel(segjax.create(model, num_classes=NUM_CLASSES))
    arrays = jax.device_put(functional.arrays())

    def logits(params, batch_stats, images):
        return functional.bind(params, batch_stats)(images)[0]

    def compiled(function, images):
        since = time.perf_counter()
        options = compiler_options(jax.default_backend())
        program = jax.jit(function, compiler_options=options).lower(*arrays, images).compile()
        return program, time.perf_counter() - since

    rows, calls = [], []
    for size in sizes:
        pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
        whole, _ = compiled(partial(engine.predict_labels, functional, normalise=normalise), pixels)
        images = jax.block_until_ready(normalise(pixels))
        program, seconds = compiled(logits, images)

        def call(program=program, images=images):
            return program(*arrays, images).block_until_ready()

        work = summary.summarise(model, size, num_classes=NUM_CLASSES)
        rows.append(
            {
                "size": list(size),
                "temporaries": program.memory_analysis().temp_size_in_bytes,
                "peak": recorded.peak_of(call),
                "labels_temporaries": whole.memory_analysis().temp_size_in_bytes,
                "compile_seconds": seconds,
                "multiply_adds": work.total_multiply_adds,
                "attention": work.multiply_adds["attention"],
            }
        )
        calls.append(call)
    for row, times in zip(rows, _turn_by_turn(calls, rounds), strict=True):
        row["milliseconds"] = quartiles([1e3 * seconds for seconds in times])
    return rows


def _turn_by_turn(calls: Sequence, rounds: int) -> list[list[float]]:
    """Returns the seconds per call and turn for each of the calls; a turn of a short call is a mean over several."""

    def timed(call, times):
        since = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - since) / times

    times = [max(1, math.ceil(TURN / timed(call, 1))) for call in calls]
    turns = [[timed(call, number) for call, number in zip(calls, times, strict=True)] for _ in range(rounds)]
    return [list(seconds) for seconds in zip(*turns, strict=True)]


def per_pixel(row: Mapping) -> dict[str, float]:
    """Divides a row by its pixels: nanoseconds, bytes, and thousands of multiply-adds."""
    pixels = math.prod(row["size"])
    return {
        "time, ns": 1e6 * row["milliseconds"][0] / pixels,
        "XLA temporaries, B": row["temporaries"] / pixels,
        "process at most, B": row["peak"] / pixels,
        "multiply-adds, k": row["multiply_adds"] / pixels / 1e3,
        "  of attention, k": row["attention"] / pixels / 1e3,
    }


def growth(rows: Sequence[Mapping]) -> dict[str, float | None]:
    """Returns each figure per pixel at the last size divided by that at the first; None if the first is 0."""
    first, last = per_pixel(rows[0]), per_pixel(rows[-1])
    return {name: last[name] / first[name] if first[name] else None for name in first}


def verdict(rows: Sequence[Mapping]) -> str:
    """States whether time per pixel is flat, and if not, whether the architecture's work grows as much."""
    grown = growth(rows)
    time_grown, work_grown = grown["time, ns"], grown["multiply-adds, k"]
    if time_grown <= FLAT:
        return "time per pixel is flat" if time_grown >= 1 / FLAT else "time per pixel falls"
    if time_grown <= FLAT * work_grown:
        return "time per pixel grows no more than the work that attention asks for"
    return f"time per pixel grows {time_grown / work_grown:.2f} times as much as the work"


def report(model: str, rows: Sequence[Mapping]) -> Iterator[str]:
    """Yields the lines of one model, at most 80 columns for four sizes."""
    names = [f"{height}x{width}" for height, width in (row["size"] for row in rows)]
    yield f"{model:<22}" + "".join(f"{name:>11}" for name in names) + f"{'growth':>9}"
    columns, grown = [per_pixel(row) for row in rows], growth(rows)
    for name in columns[0]:
        last = "-" if grown[name] is None else f"{grown[name]:.2f}"
        yield f"  {name:<20}" + "".join(f"{column[name]:>11.1f}" for column in columns) + f"{last:>9}"
    yield f"  {verdict(rows)}"
    biggest = rows[-1]
    height, width = biggest["size"]
    yield (
        f"  {height}x{width}: {biggest['milliseconds'][0]:.0f} ms, {biggest['temporaries'] / 2**20:.0f} MiB of "
        f"temporaries to logits, {biggest['labels_temporaries'] / 2**20:.0f} to labels"
    )


def size_of(text: str) -> tuple[int, int]:
    """ "512x1024" -> (512, 1024)."""
    height, separator, width = text.partition("x")
    if not (separator and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, as in 512x1024")
    return int(height), int(width)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="of segjax.MODELS")
    parser.add_argument("--sizes", nargs="+", type=size_of, default=SIZES, metavar="HxW", help="the smallest first")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written")
    options = parser.parse_args(arguments)
    record = recorded.about("benchmarks.growth", sys.argv[1:] if arguments is None else arguments) | {
        "dtype": "float32",
        "batch": 1,
        "num_classes": NUM_CLASSES,
        "rounds": options.rounds,
        "models": {},
    }
    for model in options.models:
        rows = recorded.in_a_process(measure, model, options.sizes, options.rounds)
        print("\n".join(report(model, rows)), flush=True)
        record["models"][model] = {"rows": rows, "growth": growth(rows), "verdict": verdict(rows)}
        recorded.write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
