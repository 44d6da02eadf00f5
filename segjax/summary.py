"""Entry point of `python -m segjax.summary`: the command is segjax/commands/summary.py."""

import sys

if __name__ == "__main__":
    from segjax.commands.summary import main

    sys.exit(main())
