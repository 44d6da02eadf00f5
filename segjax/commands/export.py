"""None"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from segjax.checkpoints.state_dict import logger
from segjax.exports.export import export
from segjax.exports.format import BOUNDS, SUFFIXES, ExportFormat
from segjax.runtime import environment


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m segjax.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, metavar="CHECKPOINT", help="what segjax.convert reads, or a workdir")
    parser.add_argument("destination", type=Path, metavar="OUT", help="*.stablehlo, *.onnx or *.pt2")
    parser.add_argument("--format", required=True, choices=list(SUFFIXES))
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"), help="of the images, in pixels")
    parser.add_argument(
        "--dynamic", action="store_true", help="leave batch, height and width open; else the batch is 1"
    )
    parser.add_argument("--with-preprocessing", action="store_true", help="takes uint8 RGB (B, H, W, 3)")
    parser.add_argument("--with-argmax", action="store_true", help="gives labels of the images' size, not logits")
    parser.add_argument("--dtype", default="float32", choices=list(BOUNDS), help="of the weights")
    options = parser.parse_args(arguments)
    form = ExportFormat(
        options.format,
        tuple(options.size),
        dynamic=options.dynamic,
        preprocessing=options.with_preprocessing,
        argmax=options.with_argmax,
        dtype=options.dtype,
    )
    environment.prepare()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        if export(options.source.expanduser(), options.destination, form):
            return 0
    except (KeyError, TypeError, ValueError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"segjax.export: {message}", file=sys.stderr)
        return 2
    print("segjax.export: not written, because the outputs differ", file=sys.stderr)
    return 1
