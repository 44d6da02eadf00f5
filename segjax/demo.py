"""Entry point of `python -m segjax.demo`: the command is segjax/commands/demo.py."""

import sys

from segjax import __main__ as entry


def main(arguments: list[str]) -> int:
    """Runs the command with these arguments and returns its exit status."""
    return entry.main(["demo", *arguments])


if __name__ == "__main__":
    sys.exit(entry.run_process("demo"))
