"""Entry point of `python -m segjax.benchmark`: the command is segjax/commands/benchmark.py."""

import sys

from segjax.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
