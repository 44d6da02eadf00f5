"""Counts parameters, multiply-adds and memory of a model from its shapes.

    segjax summary NAME --size H W [--num-classes K] [--overrides KEY=VALUE ...] [--json]
                   [--convention true|modelsummary]

The counts are defined in segjax/models/summary.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from segjax.commands.arguments import Parser, overrides_at_fault, parse_overrides, summary_of, within
from segjax.commands.ending import run_command
from segjax.runtime.console import show
from segjax.train.constraints import CLASSES, SIDE

if TYPE_CHECKING:
    from segjax.models.summary import PublishedSummary, Summary

# ------------------------------------------------------------------------------------------------------------ command


def _title(summary: Summary | PublishedSummary) -> str:
    height, width = summary.size
    settings = "".join(f"\n  {key} = {value}" for key, value in summary.overrides.items())
    classes = "1 class" if summary.num_classes == 1 else f"{summary.num_classes} classes"
    return f"{summary.name}, {classes}, one image of {height}x{width}{settings}\n"


def _columns(counts: Mapping[str, int]) -> list[str]:
    """Names and counts in two columns, column by column."""
    cells = [f"{name:<26} {count:>9,}" for name, count in counts.items()]
    half = -(-len(cells) // 2)
    return [f"  {'    '.join(cells[row::half])}" for row in range(half)]


def _table(summary: Summary) -> str:
    from segjax.models.summary import KINDS, NOT_COUNTED

    h, w, _ = summary.logits
    lines = [
        _title(summary),
        f"{'parameters':<36} {summary.parameters:>19,}",
        f"{'output stride':<36} {summary.output_stride:>19}   logits {h}x{w}",
        f"{'activation memory, MiB':<36} {summary.activation_mib:>19,.1f}   {summary.dtype}",
        "",
        f"{'multiply-adds':<36} {summary.total_multiply_adds:>19,}",
    ]
    for kind, count in summary.multiply_adds.items():
        if count:
            lines.append(f"  {KINDS[kind]:<34} {count:>19,} {100 * count / summary.total_multiply_adds:>6.1f}%")
    if any(summary.not_counted.values()):
        lines += ["", "not counted, since they only move pixels"]
        lines += [f"  {NOT_COUNTED[kind]:<34} {count:>19,}" for kind, count in summary.not_counted.items() if count]
    return "\n".join([*lines, "", "layers (calls by class)", *_columns(summary.layers)])


def _published_table(summary: PublishedSummary) -> str:
    lines = [
        _title(summary),
        f"{'parameters':<36} {summary.parameters:>19,}",
        f"{'GFLOPs (multiply-adds / 1024^3)':<36} {summary.gflops:>19,.3f}",
        "Not a parameter count: calls are added up, wrappers once more, LayerNorm never.",
        "",
        "layers (calls by class)",
    ]
    return "\n".join([*lines, *_columns(summary.layers)])


def _json(summary: Summary | PublishedSummary) -> str:
    from segjax.models.summary import Summary

    fields = dataclasses.asdict(summary)
    if isinstance(summary, Summary):
        fields |= {"total_multiply_adds": summary.total_multiply_adds, "activation_mib": summary.activation_mib}
    else:
        fields |= {"convention": "modelsummary", "gflops": summary.gflops}
    return json.dumps(fields)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="segjax summary", description=summary_of(__doc__))
    parser.add_argument(
        "name", metavar="NAME", help="a name in segjax.MODELS, such as segformer_b2; any other word lists them"
    )
    parser.add_argument(
        "--size", type=within(SIDE), nargs=2, required=True, metavar=("H", "W"), help="size of the image in pixels"
    )
    parser.add_argument("--num-classes", type=within(CLASSES), default=19, metavar="K", help="default 19")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--convention",
        choices=["true", "modelsummary"],
        default="true",
        help="modelsummary: the figures of jo-jstrm/segmentation_pytorch, which are not parameter counts",
    )
    options = parser.parse_args(arguments)
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    # Nothing is computed.
    environment.prepare(cpu_only=True)
    return run_command("segjax summary", lambda: _run(options), interrupted="nothing was counted")


def _run(options: argparse.Namespace) -> None:
    from segjax.models.summary import Summary, modelsummary, summarise

    count = summarise if options.convention == "true" else modelsummary
    with overrides_at_fault(options.overrides):
        summary = count(options.name, tuple(options.size), options.num_classes, **parse_overrides(options.overrides))
    if options.json:
        print(_json(summary))
    else:
        show(_table(summary) if isinstance(summary, Summary) else _published_table(summary))
