"""Entry point of `python -m segjax.evaluate`: the command is segjax/commands/evaluate.py."""

import sys

from segjax.commands.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
