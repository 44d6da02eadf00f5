"""Entry point of `python -m segjax.benchmark`: the command is segjax/commands/benchmark.py."""

import sys

from segjax import __main__ as entry


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit status."""
    return entry.main(["benchmark", *arguments])


if __name__ == "__main__":
    sys.exit(entry.run_process("benchmark"))
