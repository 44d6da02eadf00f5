"""Recognises a state dict: whose keys it has, and the family and sizes of its model."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from segjax.checkpoints.architectures import FAMILIES, Family
from segjax.checkpoints.key_maps import DIALECTS, KEY_FORMATS, KeyFormat
from segjax.checkpoints.layout import blank
from segjax.checkpoints.renaming import Renaming, renamings


@dataclasses.dataclass(frozen=True, eq=False)
class Recognised:
    """A state dict in the key format and key map that match most of its keys.

    Attributes:
      key_format, renaming: These two.
      fitting: Number of keys that match.
      shapes: Of all arrays, by the key in the state dict.
    """

    key_format: KeyFormat
    renaming: Renaming
    fitting: int
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def family(self) -> Family:
        return FAMILIES[self.key_format.family]

    @functools.cached_property
    def native_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by native key, as `Renaming.to_native` renames arrays."""
        blanks = {key: blank(shape) for key, shape in self.shapes.items()}
        return {key: value.shape for key, value in self.renaming.to_native(blanks).items()}

    @functools.cached_property
    def has_head(self) -> bool:
        """Whether there is more than an encoder."""
        groups = self.renaming.groups(self.shapes, foreign=True)
        return any(self.family.in_head(key) for group in groups for key in group.native)

    @functools.cached_property
    def sizes(self) -> tuple[dict[str, Any], int | None]:
        """Settings of the model that shapes contain, and the number of classes; None without a head.

        Raises:
          MissingKeyError, UnreadableShapeError: A native key that is needed.
        """
        return self.family.read(self.native_shapes)

    def renamed_like(self, keys: Iterable[str], arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The arrays of the state dict under the names of another key map of its package, where `keys` have these: in
        memory, transformers has other names than in files."""
        keys = list(keys)
        best = max((self.renaming, *renamings(self.key_format)), key=lambda one: sum(map(one.fits, keys)))
        if best is self.renaming:
            return arrays
        others = {key: value for key, value in arrays.items() if not self.renaming.fits(key)}
        return others | best.to_foreign(self.renaming.to_native(arrays))

    def of_encoder(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys`, of a state dict, that are parameters of the encoder."""
        groups = self.renaming.groups(keys, foreign=True)
        return {key for group in groups if not any(map(self.family.in_head, group.native)) for key in group.foreign}


def recognise(shapes: Mapping[str, tuple[int, ...]], *, dialect: str = "auto", family: str | None = None) -> Recognised:
    """The most likely key format of a state dict with these keys.

    Args:
      dialect: "auto", or one of `DIALECTS` to insist on it. family: a key of `FAMILIES` to insist on it.

    Raises:
      KeyError: An unknown dialect, or one without a key format for `family`; lists those with one.
    """
    if dialect != "auto" and dialect not in DIALECTS:
        raise KeyError(f"no dialect {dialect!r}; the dialects are auto, {', '.join(DIALECTS)}")
    candidates = [
        Recognised(key_format, renaming, sum(map(renaming.fits, shapes)), shapes)
        for key_format in KEY_FORMATS
        if dialect in ("auto", key_format.dialect) and family in (None, key_format.family)
        for renaming in renamings(key_format)
    ]
    if family and not candidates:
        raise KeyError(f"the dialect {dialect!r} has no keys for {family}; those that have are {dialects_of(family)}")
    return max(candidates, key=lambda candidate: candidate.fitting)


def dialects_of(family: str) -> str:
    """The dialects that a family can be written in, as text."""
    return ", ".join(key_format.dialect for key_format in KEY_FORMATS if key_format.family == family)


def network_prefix(keys: Iterable[str]) -> str:
    """The prefix below which the most keys fit a key map: the shortest of several, "" where none fits better."""
    keys = list(keys)
    best, fitting = "", _most_fitting(keys)
    below: dict[str, list[str]] = {}
    for key in keys:
        for dot in re.finditer(r"\.", key):
            below.setdefault(key[: dot.end()], []).append(key[dot.end() :])
    # By their number, since no more keys can fit than there are.
    for prefix, names in sorted(below.items(), key=lambda item: (-len(item[1]), len(item[0]))):
        if len(names) <= fitting:
            break
        if (found := _most_fitting(names)) > fitting:
            best, fitting = prefix, found
    return best


def _most_fitting(keys: list[str]) -> int:
    return max(sum(map(renaming.fits, keys)) for key_format in KEY_FORMATS for renaming in renamings(key_format))
