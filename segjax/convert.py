"""Entry point of `python -m segjax.convert`: the command is segjax/commands/convert.py."""

import sys

if __name__ == "__main__":
    from segjax.commands.convert import main

    sys.exit(main())
