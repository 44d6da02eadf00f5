"""Trains a segmentation model.

    python train.py --config configs/segformer.py
    python train.py --config configs/segformer.py:b2,camvid --config.data.source=DIR --config.train.steps=20000

The word after the colon picks the variant and the dataset; every setting of configs/common.py is a flag.
The run is in --workdir; the same command takes it up again.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", "configs/segformer.py", "Settings: FILE or FILE:VARIANT,DATASET.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept. Default: runs/<config>-<variant>-<dataset>.")


def main(arguments):
    if len(arguments) > 1:
        stray = " ".join(arguments[1:])
        print(f"train.py: what is {stray!r}? Settings are flags, as in --config.train.steps=100", file=sys.stderr)
        return 2
    # After the flags, so that a mistyped one is answered at once.
    from segjax import loop, runtime

    logging.set_verbosity(logging.WARNING)
    runtime.prepare()
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or loop.default_workdir(config))
    try:
        return loop.train(config, workdir)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    app.run(main)
