"""Regions of masks that a model contradicts, ranked, as candidates for errors of the masks.

    segjax audit RUN NAME[:SPLIT] [--source DIR] [--mode slide --crop H W] ...

The model should not be trained on these images: it would have learnt their errors. Writes a report: index.html, and
regions.json and regions.csv next to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segjax.commands.arguments import (
    CHECKPOINT,
    EXPORTED,
    Parser,
    add_checkpoint,
    add_data,
    add_exported,
    add_protocol,
    add_temperature,
    as_path,
    data_problems,
    less_memory,
    problems_of_exported,
    protocol_of,
    summary_of,
    within,
)
from segjax.commands.ending import run_command
from segjax.inference.runtimes import exported_path
from segjax.runtime.console import cell, one_line, say
from segjax.train.constraints import BATCH

PRINTED = 10  # regions


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax audit", description=summary_of(__doc__))
    add_checkpoint(parser, arguments, takes=f"{CHECKPOINT}; {EXPORTED}")
    add_data(parser)
    parser.add_argument(
        "--output", type=as_path, default=Path("audit"), metavar="DIR", help="of the report; default audit/"
    )
    add_exported(parser, "that an exported file was made from: says what the file does not, normalisation and classes")
    add_protocol(parser)
    add_temperature(parser)
    parser.add_argument(
        "--batch", type=within(BATCH), metavar="N", help="images or crops at a time; default one for each device"
    )
    options = parser.parse_args(arguments)
    problems = data_problems(options) + problems_of_exported(options)
    if options.reference is not None and exported_path(options.checkpoint) is None:
        problems.append("--reference is for exported files: a checkpoint says all itself")
    if problems:
        parser.error("; ".join(problems))
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.prepare()
    return run_command(
        "segjax audit",
        lambda: _run(options),
        interrupted="no report was written",
        less_memory=less_memory(options),
    )


def _run(options: argparse.Namespace) -> None:
    from segjax.data.sources import NoSourceError
    from segjax.inference.audit import LISTED, audit_dataset

    settings: dict[str, Any] = protocol_of(options) | ({} if options.batch is None else {"batch": options.batch})
    say(f"looks for regions of {options.data} that {options.checkpoint} contradicts")
    try:
        regions = audit_dataset(
            options.checkpoint,
            options.data,
            reference=options.reference,
            mean=options.mean,
            std=options.std,
            temperature=options.temperature,
            data_source=options.source,
            data_dir=options.data_dir,
            output=options.output,
            progress=True,
            weights=options.weights,
            **settings,
        )
    except NoSourceError as error:
        raise ValueError(f"{error}: --source PATH") from error
    _print_table(regions)
    first = f"the first {LISTED:,}" if len(regions) == LISTED else f"all {len(regions):,}"
    say(f"report: {options.output / 'index.html'}, and {first} regions in regions.json and regions.csv next to it")


def _print_table(regions: Sequence[Mapping]) -> None:
    """The first regions, in 80 columns."""
    say("")
    if not regions:
        say("the model contradicts no pixel of the masks")
        return
    say(f"{'score':>6} {'class in the mask':<18} {'predicted':<18} {'pixels':>9}  image")
    for region in regions[:PRINTED]:
        given, predicted = cell(region["given"], 18), cell(region["predicted"], 18)
        say(f"{region['score']:>6.2f} {given} {predicted} {region['pixels']:>9,}  {one_line(region['image'], most=23)}")
    say("")
