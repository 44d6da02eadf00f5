"""`python train.py --config configs/segformer.py:b2,camvid`: the same as `segjax train` (segjax/commands/train.py)."""

import sys

from segjax.__main__ import run_process

if __name__ == "__main__":
    sys.exit(run_process("train"))
