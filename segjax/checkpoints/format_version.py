"""The version of the files that segjax writes: folders of checkpoints and runs, `.safetensors`, exports, results.

    1   current version; the metadata has `format_version` and `segjax_version`
    -   no `format_version`: early files of segjax 0.1.0; read as version 1

A change that an older segjax would misread gets the next number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import segjax
from segjax.checkpoints.checkpoint import CheckpointError

FORMAT_VERSION = 1


def stamped(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the format version, and the version of this segjax, to metadata."""
    return {**metadata, "format_version": FORMAT_VERSION, "segjax_version": segjax.__version__}


def refuse_newer(metadata: Mapping[str, Any], place: str | Path) -> None:
    """Raises CheckpointError for metadata of a newer format; the message names the version of segjax to install."""
    version = metadata.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{place}: damaged, since format_version is {version!r:.60}, not a number from 1")
    if version <= FORMAT_VERSION:
        return
    writer = metadata.get("segjax_version")
    needed = f"segjax {writer} or newer, which wrote it" if writer else "a newer segjax"
    raise CheckpointError(
        f"{place}: has format version {version}, and segjax {segjax.__version__} reads versions up to "
        f"{FORMAT_VERSION}. Install {needed}: pip install --upgrade segjax"
    )
