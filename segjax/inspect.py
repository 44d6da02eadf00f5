"""Entry point of `python -m segjax.inspect`: the command is segjax/commands/inspect.py."""

import sys

from segjax.commands.inspect import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
