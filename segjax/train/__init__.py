"""Training: settings, the training loop, optimizers, checkpoints of runs.

For example:

    from segjax.recipes import segformer

    config = segformer.get_config("b2,camvid")
    segjax.train.train(config, segjax.train.default_workdir(config))
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segjax.train.config import RunError
    from segjax.train.loop import default_workdir, train

__all__ = ["RunError", "default_workdir", "train"]

# File of each name. It is imported on the first use of the name, because training imports everything else.
_FILES = {"RunError": "config", "default_workdir": "loop", "train": "loop"}


def __getattr__(name: str) -> object:
    if name in _FILES:
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
