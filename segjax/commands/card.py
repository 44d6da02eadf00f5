"""Writes the model card of a run, README.md, with the metadata that the Hugging Face Hub reads.

    segjax card RUN [--licence apache-2.0]

The card has the figures of the finished run, their confidence interval if `segjax evaluate RUN` measured it, data,
protocol, licence, a picture, and code that loads the weights. `segjax push` uploads the card with all manual changes.
"""

from __future__ import annotations

import argparse
import sys

from segjax.commands.arguments import Parser, as_path, summary_of
from segjax.commands.ending import run_command
from segjax.runtime import console
from segjax.runtime.atomic import why_not_writable, write_text


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax card", description=summary_of(__doc__))
    parser.add_argument("workdir", type=as_path, metavar="RUN", help="folder of a run that has ended")
    add_licence(parser)
    options = parser.parse_args(arguments)
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.keep_compiled_programs()
    return run_command("segjax card", lambda: _run(options), interrupted="no card was written")


def add_licence(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--licence",
        metavar="ID",
        help="licence of the weights, by its id on the Hub, such as apache-2.0; default other",
    )


def _run(options: argparse.Namespace) -> None:
    from segjax.train.card import NAME, PLACEHOLDER, card_of

    if problem := why_not_writable(options.workdir):
        raise ValueError(f"nothing can be written to {options.workdir}: {problem}")
    path = options.workdir / NAME
    card = card_of(options.workdir, licence=options.licence)
    if path.exists():
        raise ValueError(f"{path} exists, and may have been changed by hand; remove it to write a new one")
    write_text(path, card.text)
    console.say(f"wrote {path}")
    if card.picture is None:
        console.say("without a picture: the run has no predictions/")
    console.say(f"segjax push {options.workdir} hf:{PLACEHOLDER} uploads it with the weights")
