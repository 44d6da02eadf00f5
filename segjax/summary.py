"""Entry point of `python -m segjax.summary`: the command is segjax/commands/summary.py."""

import sys

from segjax.commands.summary import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
