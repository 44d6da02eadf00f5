"""A page on this computer that shows what a model predicts for your images.

    segjax demo CHECKPOINT

The address that it prints opens in a browser: drop or choose an image, or take a picture with the camera. The page
shows the predicted classes or the confidence over the image, the share of each class, and the time. Nothing leaves the
computer. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys

from segjax.commands.arguments import (
    CHECKPOINT,
    EXPORTED,
    Parser,
    add_checkpoint,
    add_exported,
    add_protocol,
    add_temperature,
    less_memory,
    problems_of_prediction,
    protocol_of,
    summary_of,
    within,
)
from segjax.commands.ending import run_command
from segjax.runtime.console import say
from segjax.train.constraints import Integer

PORT = 8642


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax demo", description=summary_of(__doc__))
    add_checkpoint(parser, arguments, takes=f"{CHECKPOINT}; {EXPORTED}")
    parser.add_argument(
        "--port",
        type=within(Integer(0, 65535)),
        default=PORT,
        metavar="N",
        help=f"port of the page; 0 takes any free one; default {PORT}",
    )
    add_exported(parser, "that an exported file was made from: says what the file does not, normalisation and classes")
    add_protocol(parser)
    add_temperature(parser)
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of black and white, for images of more than 8 bits; reflectances: 0 3000, say",
    )
    parser.set_defaults(batch=None)
    options = parser.parse_args(arguments)
    if problems := problems_of_prediction(options):
        parser.error("; ".join(problems))
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.prepare()
    return run_command(
        "segjax demo",
        lambda: _run(options),
        interrupted="the page is closed",
        less_memory=less_memory(options),
    )


def _run(options: argparse.Namespace) -> None:
    import jax

    from segjax.checkpoints.load import load
    from segjax.inference.demo_server import Demonstration, Server
    from segjax.inference.open_exported import opened
    from segjax.inference.predictor import Predictor
    from segjax.viz import demo

    # The port first, because models take time to load.
    with Server(options.port) as server:
        reference = None if options.reference is None else load(options.reference)
        checkpoint = opened(
            options.checkpoint, weights=options.weights, mean=options.mean, std=options.std, reference=reference
        )
        scale = None if options.scale is None else tuple(options.scale)
        predictor = Predictor(checkpoint, **protocol_of(options), temperature=options.temperature, scale=scale)
        demonstration = Demonstration(predictor, checkpoint.model)
        if size := checkpoint.metadata.get("input_size"):
            say(f"compiling for {size[0]}x{size[1]} ...")
            demonstration.compile(tuple(size))
        classes = predictor.classes
        is_guess = checkpoint.dataset is None
        facts = {
            "checkpoint": str(options.checkpoint),
            "classes": f"{classes.num_classes}{'' if is_guess else f' of {classes.name}'}",
            "images": demonstration.takes,
            "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        }
        for name, fact in facts.items():
            say(f"{name:<12}{fact}")
        server.serve(
            demonstration,
            demo.page(checkpoint.model.spec.name, facts),
            announce=lambda: say(f"{'page':<12}{server.address}   Ctrl-C ends it"),
        )
