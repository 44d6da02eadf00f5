"""Entry point of `python -m segjax.convert`: the command is segjax/commands/convert.py."""

import sys

from segjax.commands.convert import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
