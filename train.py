"""Trains a segmentation model.

    python train.py --config configs/segformer.py
    python train.py --config configs/segformer.py:b2,camvid --config.data.source=DIR --config.train.steps=20000

The word after the colon picks the variant and the dataset; every setting of configs/common.py is a flag.
The run is in --workdir; the same command takes it up again.
"""

import ast
import errno
import os
import re
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags


def renamed(argument):
    """`from` is a word of Python's, which ml_collections refuses as the name of a setting."""
    return re.sub(r"^(--?config\.init\.from)(?=$|=)", r"\1_", argument)


# Before the definition of the config below, which reads the flags by itself.
sys.argv[1:] = map(renamed, sys.argv[1:])


def explain(error):
    """What a person mistyped, in one line."""
    text = str(error.args[0] if error.args and not isinstance(error, OSError) else error).strip()
    if text[:1] in "\"'" and text[-1:] == text[:1]:
        # ml_collections hands on a message that Python has quoted.
        text = ast.literal_eval(text)
    lines = text.strip().splitlines()
    if "Traceback" in text:
        return lines[-1].strip()
    if re.fullmatch(r"\W?\w+\W?", lines[0]):
        # The name of a setting that is not there, and at most one that is like it.
        lines[0] = f"this config has no setting {lines[0]}"
    return ". ".join(line.strip() for line in lines)


try:
    _CONFIG = config_flags.DEFINE_config_file(
        "config", "configs/segformer.py", "Settings: FILE or FILE:VARIANT,DATASET."
    )
except (AttributeError, KeyError, OSError) as error:
    # The definition reads the flags by itself, and raises for a setting that is not there.
    sys.exit(f"train.py: {explain(error)}")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several processes: HOST:PORT of the first, or auto for what the cluster's environment says."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: which one this is, from 0.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept. Default: runs/<config>-<variant>-<dataset>.")


def main(arguments):
    if len(arguments) > 1:
        stray = " ".join(arguments[1:])
        print(f"train.py: what is {stray!r}? Settings are flags, as in --config.train.steps=100", file=sys.stderr)
        return 2
    # After the flags, so that a mistyped one is answered at once.
    from configs import common
    from segjax.runtime import console, distributed, environment
    from segjax.train import config as train_config
    from segjax.train import loop

    logging.set_verbosity(logging.WARNING)
    environment.prepare()
    try:
        if _COORDINATOR.value:
            address = None if _COORDINATOR.value == "auto" else _COORDINATOR.value
            distributed.initialize(address, _NUM_PROCESSES.value, _PROCESS_ID.value)
        # The first use of a config file that could not be loaded raises.
        config = _CONFIG.value
        workdir = Path(_WORKDIR.value or loop.default_workdir(config))
        changes = train_config.changes(config, common.get_config(config.data.name))
        return loop.train(config, workdir, changes=changes)
    except KeyboardInterrupt as error:
        print("train.py: stopped at once; what was saved is whole", file=sys.stderr, flush=True)
        # Threads that save or read would each report that the interpreter is going away.
        os._exit(error.args[0] if error.args else loop.INTERRUPTED)
    except (ValueError, OSError) as error:
        if distributed.is_lead():
            print(console.wrapped(f"train.py: {error}{advice(error)}"), file=sys.stderr, flush=True)
        return distributed.leave(2)
    except Exception:
        traceback.print_exc()
        return distributed.leave(1)


def advice(error):
    """For a disk that became full, of which Python says no more than that."""
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    return ".\n  What was saved before is whole: make room, and give the same command again"


def parse(argv):
    """absl's own parsing, with one line instead of a traceback for what a person mistyped."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, OSError) as error:
        sys.exit(f"train.py: {explain(error)}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
