"""Exports a trained model as one file that runs without segjax.

    segjax export CHECKPOINT OUT --format stablehlo|onnx|torch --size H W [--dynamic]
                  [--with-preprocessing] [--with-argmax] [--dtype float32|bfloat16|float16]
                  [--opset N] [--threshold P] [--temperature T]

CHECKPOINT is anything that `segjax convert` reads, or the folder of a run. Input and output of the file are described
in segjax/exports/export.py.
"""

from __future__ import annotations

import argparse
import sys

from segjax.commands.arguments import Parser, add_checkpoint, add_temperature, as_path, summary_of, within
from segjax.commands.ending import CheckError, run_command
from segjax.exports.format import BOUNDS, OPSETS, SUFFIXES, ExportFormat
from segjax.runtime.reading import user_path
from segjax.train.constraints import SIDE, Integer, Real


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax export", description=summary_of(__doc__))
    add_checkpoint(parser, arguments)
    parser.add_argument("destination", type=as_path, metavar="OUT", help="*.stablehlo, *.onnx or *.pt2")
    parser.add_argument("--format", required=True, choices=list(SUFFIXES))
    parser.add_argument(
        "--size", type=within(SIDE), nargs=2, required=True, metavar=("H", "W"), help="of the images, in pixels"
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="dynamic batch, height and width; without, the batch is 1"
    )
    parser.add_argument("--with-preprocessing", action="store_true", help="input is (B, H, W, C), RGB of uint8")
    parser.add_argument("--with-argmax", action="store_true", help="labels of the images' size instead of logits")
    parser.add_argument(
        "--threshold",
        type=within(Real(above=0, below=1)),
        default=0.5,
        metavar="P",
        help="probability above which a pixel is of the class, in labels of a model of one class; default 0.5",
    )
    add_temperature(parser)
    parser.add_argument("--dtype", default="float32", choices=list(BOUNDS), help="of the weights")
    parser.add_argument(
        "--opset",
        type=within(Integer(OPSETS[0], OPSETS[-1])),
        metavar="N",
        help=f"of an ONNX file, from {OPSETS[0]} to {OPSETS[-1]}; older TensorRT and Jetsons need 17",
    )
    options = parser.parse_args(arguments)
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    # Files are compared on the CPU, whose float32 products are not rounded.
    environment.prepare(cpu_only=True)
    return run_command("segjax export", lambda: _run(options), less_memory=_less_memory(options))


def _less_memory(options: argparse.Namespace) -> str:
    return "give a smaller --size" + (" (with --dynamic the file takes larger images too)" if options.dynamic else "")


def _run(options: argparse.Namespace) -> None:
    from segjax.exports.export import UnequalError, export

    export_format = ExportFormat(
        options.format,
        tuple(options.size),
        dynamic=options.dynamic,
        preprocessing=options.with_preprocessing,
        argmax=options.with_argmax,
        dtype=options.dtype,
        opset=options.opset,
        threshold=options.threshold,
    )
    try:
        export(
            user_path(options.checkpoint),
            options.destination,
            export_format,
            weights=options.weights,
            temperature=options.temperature,
        )
    except UnequalError as error:
        raise CheckError(error) from error
