"""Divides the only labelled split of a dataset into train and val, by a share; groups stay together."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from segjax.data.sources import DataError, Example, Examples, Problems, counted


@dataclasses.dataclass(frozen=True)
class Division:
    """Settings of a division. Equal names and equal settings give equal splits, on any machine.

    Attributes:
      val_share: Share of the images that go to val, between 0 and 1.
      seed: Seed of the choice of images.
      group_by: Regular expression that finds the group of an image in its name, as the first group of the match, or
        else the whole match. Images of one group stay together. None if every image is its own group.

    Example:
      >>> from segjax import data
      >>> str(data.Division(0.2, group_by="^[a-z]+"))
      'val 0.2 of the images, seed 0, groups by ^[a-z]+'
    """

    val_share: float
    seed: int = 0
    group_by: str | None = None

    def __post_init__(self):
        if not 0 < self.val_share < 1:
            raise DataError(f"the share of val must be between 0 and 1, not {self.val_share}")
        try:
            re.compile(self.group_by or "")
        except re.error as error:
            raise DataError(f"{self.group_by!r} is not a regular expression: {error}") from None

    def __str__(self) -> str:
        groups = "" if self.group_by is None else f", groups by {self.group_by}"
        return f"val {self.val_share:g} of the images, seed {self.seed}{groups}"

    @property
    def digest(self) -> str:
        """Identifier of the division, 8 hex digits, for the name of a folder."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Division | None:
        """The division of a prepared dataset with this metadata; None if it has the splits of its source."""
        return cls(**metadata["division"]) if metadata.get("division") else None


def divided(examples: Examples, division: Division, problems: Problems, notes: list[str]) -> Examples:
    """Divides the only split with labels into train and val; other splits do not change.

    Each group is numbered by a hash of its name and the seed. The groups with the lowest numbers go to val, until its
    size is closest to its share; at least one group goes to val, and at least one to train. If images are added later,
    few of the others change their split.

    Args:
      examples: Examples by split.
      division: Settings of the division.
      problems: Receives the reasons why the dataset cannot be divided.
      notes: Receives a line about the groups.
    """
    labelled = [split for split, found in examples.items() if found and all(example.label for example in found)]
    if len(labelled) != 1:
        problems["a share for val needs exactly one split with labels; omit it"].append(
            f"splits with labels: {counted({split: len(examples[split]) for split in labelled}) or 'none'}"
        )
        return examples
    (split,) = labelled
    if taken := {"train", "val"} & (examples.keys() - {split}):
        problems["splits without labels with the name of a new split; rename them"] += sorted(taken)
        return examples
    groups: dict[str, list[Example]] = {}
    for example in examples[split]:
        name = _group(example.name, division.group_by)
        if name is None:
            problems[f"images without a group: their name does not match {division.group_by!r}"].append(example.name)
        else:
            groups.setdefault(name, []).append(example)
    if problems:
        return examples
    if len(groups) < 2:
        problems["too few groups to divide; there must be two"].append(f"{len(groups)} in {split}: {', '.join(groups)}")
        return examples

    def number(group: str) -> bytes:
        text = f"{division.seed}\0{group}"
        return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()

    order = sorted(groups, key=number)
    wanted, sizes = division.val_share * len(examples[split]), []
    for group in order[:-1]:
        sizes.append((sizes[-1] if sizes else 0) + len(groups[group]))
    most = min(range(len(sizes)), key=lambda place: abs(sizes[place] - wanted)) + 1
    chosen = {example.name for group in order[:most] for example in groups[group]}
    parts = {
        "train": [example for example in examples[split] if example.name not in chosen],
        "val": [example for example in examples[split] if example.name in chosen],
    }
    if division.group_by is not None:
        notes.append(f"{len(groups)} groups by {division.group_by}: {len(groups) - most} in train, {most} in val")
    notes.append(f"{split} is divided: {division}")
    others = {name: found for name, found in examples.items() if name != split}
    return parts | others


def _group(name: str, group_by: str | None) -> str | None:
    """The group of an image; None if the expression does not match."""
    if group_by is None:
        return name
    if (match := re.search(group_by, name)) is None:
        return None
    return match.group(1) if match.re.groups and match.group(1) is not None else match.group()
