"""Entry point of `python -m segjax.export`: the command is segjax/commands/export.py."""

import sys

from segjax.commands.export import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
