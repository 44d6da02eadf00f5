"""Exports a trained model as one file that runs without segjax.

    segjax export CHECKPOINT OUT [--size H W] [--dynamic] [--with-preprocessing] [--with-argmax]
                  [--dtype float32|bfloat16|float16] [--opset N] [--threshold P] [--temperature T]
    segjax export CHECKPOINT OUT.onnx|OUT.xml --int8 --calibrate DATA [--accept-loss] ...

CHECKPOINT is anything that `segjax convert` reads, or the folder of a run. Input and output of the file are described
in segjax/exports/export.py. The second form quantises the file, and prints mIoU, agreement, size and time before and
after.
"""

from __future__ import annotations

import argparse
import sys

from segjax.commands.arguments import (
    Parser,
    add_checkpoint,
    add_place_of_data,
    add_temperature,
    as_path,
    summary_of,
    within,
)
from segjax.commands.ending import CheckError, run_command
from segjax.data import specs
from segjax.exports.format import BOUNDS, OPSETS, SUFFIXES, ExportFormat
from segjax.runtime.reading import user_path
from segjax.train.constraints import SIDE, Integer, Real


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax export", description=summary_of(__doc__))
    add_checkpoint(parser, arguments)
    parser.add_argument("destination", type=as_path, metavar="OUT", help=f"*{', *'.join(SUFFIXES.values())}")
    parser.add_argument("--format", choices=list(SUFFIXES), help="by default, the suffix of OUT selects it")
    parser.add_argument(
        "--size",
        type=within(SIDE),
        nargs=2,
        metavar=("H", "W"),
        help="of the images, in pixels; by default the one at which CHECKPOINT was evaluated, or the crop of its run",
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
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=list(BOUNDS),
        help="of the weights; StableHLO files, and ONNX files in float16, also compute in it",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="quantise convolutions and products of an ONNX file (by onnxruntime) or an OpenVINO file (by nncf)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="for --int8: NAME or NAME:SPLIT as --data of segjax evaluate, or a folder of images. 32 of them, at most "
        "half, set the ranges of activations; the others are measured on",
    )
    add_place_of_data(parser)
    parser.add_argument(
        "--accept-loss", action="store_true", help="keep an INT8 file that loses more than a point of mIoU"
    )
    parser.add_argument(
        "--opset",
        type=within(Integer(OPSETS[0], OPSETS[-1])),
        metavar="N",
        help=f"of an ONNX file, from {OPSETS[0]} to {OPSETS[-1]}; older TensorRT and Jetsons need 17",
    )
    options = parser.parse_args(arguments)
    if problems := _problems(options):
        parser.error("; ".join(problems))
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    # Files are compared on the CPU, whose float32 products are not rounded.
    environment.prepare(cpu_only=True)
    return run_command("segjax export", lambda: _run(options), less_memory=_less_memory(options))


def _problems(options: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the options together."""
    formats = {suffix: name for name, suffix in SUFFIXES.items()}
    options.format = options.format or formats.get(options.destination.suffix)
    name = (options.calibrate or "").partition(":")[0]
    has_source = bool(options.source or options.data_dir)
    wrong = {
        f"{options.destination}: the suffix selects the format: {', '.join(formats)}": options.format is None,
        "--int8 needs --calibrate DATA, images for the ranges of activations": options.int8 and not options.calibrate,
        "--calibrate and --accept-loss go with --int8": (
            not options.int8 and (options.calibrate is not None or options.accept_loss)
        ),
        "--source and --data-dir go with --calibrate NAME, a dataset": (
            has_source and (name not in specs.DATASETS or specs.is_generated(name))
        ),
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]


def _less_memory(options: argparse.Namespace) -> str:
    return "give a smaller --size" + (" (with --dynamic the file takes larger images too)" if options.dynamic else "")


def _run(options: argparse.Namespace) -> None:
    from segjax.checkpoints.load import as_loaded
    from segjax.data.sources import NoSourceError
    from segjax.exports.calibration import LossError
    from segjax.exports.export import UnequalError, default_size, export

    source = user_path(options.checkpoint)
    loaded = as_loaded(source, weights=options.weights)
    height, width = options.size or default_size(loaded)
    export_format = ExportFormat(
        options.format,
        (height, width),
        dynamic=options.dynamic,
        preprocessing=options.with_preprocessing,
        argmax=options.with_argmax,
        dtype=options.dtype,
        int8=options.int8,
        opset=options.opset,
        threshold=options.threshold,
    )
    try:
        export(
            source,
            options.destination,
            export_format,
            loaded=loaded,
            temperature=options.temperature,
            calibration=options.calibrate,
            data_source=options.source,
            data_dir=options.data_dir,
            accept_loss=options.accept_loss,
        )
    except (UnequalError, LossError) as error:
        raise CheckError(error) from error
    except NoSourceError as error:
        raise ValueError(f"{error}: --source PATH") from error
