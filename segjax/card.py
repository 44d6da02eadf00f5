"""Entry point of `python -m segjax.card`: the command is segjax/commands/card.py."""

import sys

from segjax import __main__ as entry


def main(arguments: list[str]) -> int:
    """Runs the command with these arguments and returns its exit status."""
    return entry.main(["card", *arguments])


if __name__ == "__main__":
    sys.exit(entry.run_process("card"))
