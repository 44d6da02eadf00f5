"""Entry point of `python -m segjax.predict`: the command is segjax/commands/predict.py."""

import sys

if __name__ == "__main__":
    from segjax.commands.predict import main

    sys.exit(main())
