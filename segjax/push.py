"""Entry point of `python -m segjax.push`: the command is segjax/commands/push.py."""

import sys

from segjax import __main__ as entry


def main(arguments: list[str]) -> int:
    """Runs the command with these arguments and returns its exit status."""
    return entry.main(["push", *arguments])


if __name__ == "__main__":
    sys.exit(entry.run_process("push"))
