"""`python -m segjax.train`: the same as `segjax train`."""

import sys

from segjax.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
