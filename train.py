"""`python train.py --config configs/segformer.py:b2,camvid`: the same as `segjax train` (segjax/commands/train.py)."""

import sys

from segjax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
