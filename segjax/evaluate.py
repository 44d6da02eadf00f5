"""Entry point of `python -m segjax.evaluate`: the command is segjax/commands/evaluate.py."""

import sys

if __name__ == "__main__":
    from segjax.commands.evaluate import main

    sys.exit(main())
