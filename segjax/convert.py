"""Entry point of `python -m segjax.convert`: the command is segjax/commands/convert.py."""

import sys

from segjax import __main__ as entry


def main(arguments: list[str]) -> int:
    """Runs the command with these arguments and returns its exit status."""
    return entry.main(["convert", *arguments])


if __name__ == "__main__":
    sys.exit(entry.run_process("convert"))
