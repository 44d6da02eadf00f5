"""Entry point of `python -m segjax.train`: the command is segjax/commands/train.py."""

import sys

from segjax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
