"""Set-up of the tutorials, in a cell of each that the site does not show."""

from __future__ import annotations

import os
import subprocess
import tempfile

from IPython.core.magic import register_cell_magic


def prepare() -> None:
    """Works in a new folder, offline, and lets `%%sh` print a command's output in one piece and fail as it does."""
    os.chdir(tempfile.mkdtemp())
    os.environ["TFDS_DATA_DIR"] = "datasets"
    os.environ["HF_HUB_OFFLINE"] = "1"
    register_cell_magic(sh)


def sh(_: str, cell: str) -> None:
    """The cell magic `%%sh`. IPython's own prints in pieces, each of which a page begins on a new line."""
    done = subprocess.run(["bash", "-ec", cell], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout.strip())
    done.check_returncode()
