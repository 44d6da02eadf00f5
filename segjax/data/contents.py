"""Hashes of a dataset's files, by which a run notices that its data have changed.

They are computed and stored when a dataset is prepared, because every file is read then. A run keeps the hashes of its
splits in data.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from segjax.data.sources import shorten
from segjax.runtime import reading

if TYPE_CHECKING:
    from segjax.data.prepared import Prepared

# Name of the file in the folder of a run.
RUN_DATA = "data.json"
# split -> name of an example -> hash of its image, and of its mask; None for a mask that is not published
Contents = dict[str, dict[str, Annotated[list[str | None], Field(min_length=2, max_length=2)]]]


class RunData(TypedDict):
    """data.json of a run.

    Attributes:
      path: Folder of the prepared dataset.
      source: Source from which the dataset was prepared.
      contents: Hashes of the splits of the run.
    """

    path: str
    source: str
    contents: Contents


def hash_of(data: bytes) -> str:
    """Hash of the content of a file, 32 hex digits (128 bits)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def contents_of(prepared: Prepared, splits: Iterable[str]) -> Contents | None:
    """Hashes of some splits of a prepared dataset; None if it was prepared by a version that stored none."""
    hashes, names = prepared.metadata.get("hashes"), prepared.metadata["names"]
    if hashes is None:
        return None
    return {split: dict(zip(map(json_name, names[split]), hashes[split], strict=True)) for split in splits}


def json_name(name: str) -> str:
    """The name of an example for JSON, with bytes that are not UTF-8 escaped."""
    return name.encode(errors="backslashreplace").decode()


def differences(before: Contents, now: Contents) -> list[str]:
    """A line for each image that was changed, added or removed."""
    lines = []
    for split in dict.fromkeys((*before, *now)):
        old, new = before.get(split, {}), now.get(split, {})
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                lines.append(f"{split}/{name}: removed")
            elif name not in old:
                lines.append(f"{split}/{name}: added")
            elif old[name] != new[name]:
                pairs = zip(("image", "mask"), old[name], new[name], strict=True)
                lines.append(f"{split}/{name}: {' and '.join(part for part, a, b in pairs if a != b)} changed")
    return lines


def listed_differences(lines: list[str]) -> str:
    """The first lines of `differences`, indented, and the number of the others."""
    return "\n".join(f"  {line}" for line in shorten(lines))


def read_run_data(path: Path) -> RunData | None:
    """Reads the data.json of a run; None if the run has none, because an older version began it.

    Raises:
      UnreadableError: The file is damaged; the message names the key.
    """
    if not path.exists():
        return None
    content: Any = reading.read_json(path, RunData)
    return content
