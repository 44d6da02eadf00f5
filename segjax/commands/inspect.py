"""Shows the content and origin of a checkpoint.

    segjax inspect CHECKPOINT [--weights ema|raw|student|teacher]

reads all checkpoints that `segjax convert` reads, for example the folder of a run, a folder of transformers, and
hf:owner/name[@revision] on the Hub. For checkpoints of other packages, it shows the model that segjax would build.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from segjax.commands.arguments import Parser, add_checkpoint, summary_of
from segjax.commands.ending import run_command
from segjax.runtime.console import NO_BREAK, filled, log_to, printable, show

WIDTH, INDENT = 80, 15


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Formats rows in 80 columns, with texts next to their names."""
    lines = []
    for name, text in rows:
        # Escapes first, because they make a line longer.
        text = NO_BREAK.join(map(printable, text.split(NO_BREAK)))
        pieces = [piece for line in text.splitlines() for piece in filled(line, width=WIDTH - INDENT).splitlines()]
        lines += [f"{name if number == 0 else '':<{INDENT}}{piece}" for number, piece in enumerate(pieces)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax inspect", description=summary_of(__doc__))
    add_checkpoint(parser, arguments)
    options = parser.parse_args(arguments)
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.keep_compiled_programs()
    return run_command(
        "segjax inspect", lambda: _run(str(options.checkpoint), options.weights), interrupted="nothing was changed"
    )


def _run(source: str, weights: str | None) -> None:
    import jax

    from segjax.checkpoints.describe import describe

    notes = []
    try:
        # For float64 weights; others keep their dtype.
        with log_to(notes.append), jax.enable_x64(True):
            rows = describe(source, weights=weights)
    except (KeyError, TypeError, ValueError, OSError) as error:
        if source in str(error):
            raise
        raise ValueError(f"{source}: {error.args[0] if isinstance(error, KeyError) else error}") from error
    notes = [text for text in notes if not text.startswith(_IN_ROWS)]
    rows += [("" if number else "notes", text) for number, text in enumerate(notes)]
    show(table(rows))


# Log messages that repeat a row, or are about a decoder that was added to an encoder.
_IN_ROWS = (
    *("read as", "it names no classes", "the checkpoint does not name", "unlike"),
    *("encoder only", "the decoder is as wide", "left as initialised"),
)
