"""Lists the published weights that can be loaded by their names.

    segjax weights [PATTERN]

Prints one line each: name, training crop (height x width), published mIoU in
percent (a star: at several scales), protocol of the evaluation, licence and
publisher. "slide 1024" is a sliding window of that side; "whole@512" resizes the
short side first. "ask": ask the authors about commercial use. A training can
start from an encoder. PATTERN is '*cityscapes*', or a part of a name.
"""

from __future__ import annotations

import argparse
import sys

from segjax.commands.arguments import Parser
from segjax.commands.ending import run_command


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="segjax weights",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="names to list; default all")
    options = parser.parse_args(arguments)
    return run_command("segjax weights", lambda: _run(options.pattern))


def _run(pattern: str) -> None:
    from segjax.checkpoints.published import list_weights
    from segjax.runtime.console import show

    show(str(list_weights(pattern)))
