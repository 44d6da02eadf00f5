"""Entry point of `python -m segjax.export`: the command is segjax/commands/export.py."""

import sys

if __name__ == "__main__":
    from segjax.commands.export import main

    sys.exit(main())
