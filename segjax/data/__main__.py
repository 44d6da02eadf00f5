"""Entry point of `python -m segjax.data`: the command is segjax/commands/data.py."""

import sys

from segjax.commands.data import main

if __name__ == "__main__":
    sys.exit(main())
