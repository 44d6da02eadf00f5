"""Entry point of `python -m segjax.predict`: the command is segjax/commands/predict.py."""

import sys

from segjax.commands.predict import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
