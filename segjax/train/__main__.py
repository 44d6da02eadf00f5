"""Entry point of `python -m segjax.train`: the command is segjax/commands/train.py."""

import sys

from segjax import __main__ as entry


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    return entry.main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(entry.run_process("train"))
