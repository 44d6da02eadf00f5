"""Difference of two models on the same images, with an interval, by class and by image.

    segjax compare RUN_A RUN_B NAME[:SPLIT] [--source DIR] [--mode slide --crop H W] ...

Both models are evaluated as by `segjax evaluate RUN --data NAME[:SPLIT]`, in one pass over the images. The differences
are B minus A. Writes a report: index.html, and results.json next to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segjax.checkpoints.key_maps import WEIGHT_SETS
from segjax.commands.arguments import (
    CHECKPOINT,
    EXPORTED,
    Parser,
    add_data,
    add_exported,
    add_protocol,
    add_temperature,
    as_path,
    data_problems,
    less_memory,
    problems_of_normalisation,
    protocol_of,
    summary_of,
    within,
)
from segjax.commands.ending import run_command
from segjax.inference.runtimes import exported_path
from segjax.runtime.console import cell, say, score
from segjax.train.constraints import BATCH


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax compare", description=summary_of(__doc__))
    parser.add_argument("run_a", type=as_path, metavar="RUN_A", help=f"{CHECKPOINT}; {EXPORTED}")
    parser.add_argument("run_b", type=as_path, metavar="RUN_B", help="the same; a model of the same classes")
    add_data(parser)
    parser.add_argument(
        "--output", type=as_path, default=Path("comparison"), metavar="DIR", help="of the report; default comparison/"
    )
    for letter in "ab":
        parser.add_argument(
            f"--weights-{letter}",
            choices=WEIGHT_SETS,
            help=f"the set to read, where RUN_{letter.upper()} holds averaged and raw weights, or a student and a "
            "teacher",
        )
    add_exported(parser, "that exported files were made from: says what they do not, normalisation and classes")
    add_protocol(parser)
    add_temperature(parser)
    parser.add_argument(
        "--batch", type=within(BATCH), metavar="N", help="images or crops at a time; default one for each device"
    )
    options = parser.parse_args(arguments)
    if problems := data_problems(options) + _problems(options):
        parser.error("; ".join(problems))
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.prepare()
    return run_command(
        "segjax compare",
        lambda: _run(options),
        interrupted="no report was written",
        less_memory=less_memory(options),
    )


def _problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the options for exported files."""
    given = {"a": options.weights_a, "b": options.weights_b}
    is_exported = {letter: exported_path(getattr(options, f"run_{letter}")) is not None for letter in given}
    wrong = {
        f"--weights-{letter}: an exported file holds one set of weights; omit it": weights and is_exported[letter]
        for letter, weights in given.items()
    }
    wrong["--reference is for exported files: a checkpoint says all itself"] = (
        options.reference is not None and not any(is_exported.values())
    )
    problems = problems_of_normalisation(options, is_exported=any(is_exported.values()))
    return problems + [message for message, is_wrong in wrong.items() if is_wrong]


def _run(options: argparse.Namespace) -> None:
    from segjax.data.sources import NoSourceError
    from segjax.inference.comparison import compare_models
    from segjax.viz.comparison import verdict

    settings: dict[str, Any] = protocol_of(options) | ({} if options.batch is None else {"batch": options.batch})
    say(f"compares A, {options.run_a}, with B, {options.run_b}, on {options.data}; differences are B minus A")
    try:
        summary = compare_models(
            options.run_a,
            options.run_b,
            options.data,
            reference=options.reference,
            mean=options.mean,
            std=options.std,
            temperature=options.temperature,
            data_source=options.source,
            data_dir=options.data_dir,
            output=options.output,
            progress=True,
            weights_a=options.weights_a,
            weights_b=options.weights_b,
            **settings,
        )
    except NoSourceError as error:
        raise ValueError(f"{error}: --source PATH") from error
    _print_table(summary)
    if summary["difference_interval"]:
        say(verdict(summary))
    say(f"report: {options.output / 'index.html'}, and results.json next to it")


def _print_table(summary: Mapping) -> None:
    """Figures by class, and the means, in 80 columns."""
    say("")
    say(f"{'class':<24} {'IoU of A':>9} {'of B':>8} {'B - A':>9}   95% interval of B - A")
    for entry in summary["classes"]:
        a, b, difference = score(entry["iou_a"]), score(entry["iou_b"]), _signed(entry["difference"])
        say(f"{cell(entry['class'], 24)} {a:>9} {b:>8} {difference:>9}   {_range(entry['interval'])}")
    say("")
    line = f"mIoU A {score(summary['mean_iou_a'])}   B {score(summary['mean_iou_b'])}"
    say(f"{line}   B - A {_signed(summary['difference'])}   95% interval {_range(summary['difference_interval'])}")
    if summary["differing_pixels"] is not None:
        say(f"predictions differ in {100 * summary['differing_pixels']:.2f}% of the labelled pixels")


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _range(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{_signed(interval[0])} to {_signed(interval[1])}"
