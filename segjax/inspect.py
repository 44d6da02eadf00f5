"""Entry point of `python -m segjax.inspect`: the command is segjax/commands/inspect.py."""

import sys

if __name__ == "__main__":
    from segjax.commands.inspect import main

    sys.exit(main())
