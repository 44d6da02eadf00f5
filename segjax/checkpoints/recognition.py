"""Recognises a state dict: its key format, and the family and sizes of its model."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from segjax.checkpoints.architectures import FAMILIES, Family, matches
from segjax.checkpoints.key_maps import DIALECTS, KEY_FORMATS, KeyFormat
from segjax.checkpoints.layout import blank
from segjax.checkpoints.renaming import Renaming, renamings


@dataclasses.dataclass(frozen=True, eq=False)
class Recognised:
    """A state dict with the key format and key map that match most of its keys.

    Attributes:
      key_format: The key format.
      renaming: The key map.
      fitting: Number of keys that match.
      shapes: Shapes of all arrays, by key in the state dict.
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
        """Shapes by native key, renamed by `Renaming.to_native`."""
        blanks = {key: blank(shape) for key, shape in self.shapes.items()}
        return {key: value.shape for key, value in self.renaming.to_native(blanks).items()}

    @functools.cached_property
    def has_head(self) -> bool:
        """Whether the state dict has more than an encoder."""
        groups = self.renaming.groups(self.shapes, foreign=True)
        return any(self.family.in_head(key) for group in groups for key in group.native)

    @functools.cached_property
    def sizes(self) -> tuple[dict[str, Any], int | None]:
        """Settings of the model that are read from shapes, and the number of classes (None without a head).

        Raises:
          MissingKeyError: A needed native key is missing.
          UnreadableShapeError: The array of a needed native key lacks an axis, or has an empty one.
        """
        return self.family.read(self.native_shapes)

    def renamed_like(self, keys: Iterable[str], arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The arrays of the state dict, renamed to that key map of its family which fits most of `keys`.

        Transformers, for example, has other names in memory than in files, and the official SegFormer others again.
        """
        keys = list(keys)
        formats = [one for one in KEY_FORMATS if one.family == self.key_format.family]
        maps = [renaming for one in (self.key_format, *formats) for renaming in renamings(one)]
        best = max((self.renaming, *maps), key=lambda one: sum(map(one.fits, keys)))
        if best is self.renaming:
            return arrays
        skipped = ()
        if best not in renamings(self.key_format):
            # Another package has no place for them.
            skipped = (*self.key_format.unused, *self.key_format.backbone_extras)
        others = {
            key: value for key, value in arrays.items() if not self.renaming.fits(key) and not matches(key, skipped)
        }
        return others | best.to_foreign(self.renaming.to_native(arrays))

    def of_encoder(self, keys: Iterable[str]) -> set[str]:
        """The `keys` of a state dict that belong to the encoder."""
        groups = self.renaming.groups(keys, foreign=True)
        return {key for group in groups if not any(map(self.family.in_head, group.native)) for key in group.foreign}


def recognise(shapes: Mapping[str, tuple[int, ...]], *, dialect: str = "auto", family: str | None = None) -> Recognised:
    """The most likely key format of a state dict with these keys.

    Args:
      shapes: Shapes of the arrays by key.
      dialect: One of `DIALECTS` to allow only this one; "auto" for any.
      family: Key of `FAMILIES` to allow only this one; None for any.

    Raises:
      KeyError: The dialect is unknown, or has no key format for `family`; the message lists the possible ones.
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
        raise KeyError(f"the dialect {dialect!r} has no keys for {family}; use one of {dialects_of(family)}")
    return max(candidates, key=lambda candidate: candidate.fitting)


def dialects_of(family: str) -> str:
    """The dialects in which a family can be written, as text."""
    return ", ".join(key_format.dialect for key_format in KEY_FORMATS if key_format.family == family)


def network_prefix(keys: Iterable[str]) -> str:
    """The prefix below which most keys fit a key map; the shortest of several, "" if no prefix fits better."""
    keys = list(keys)
    best, fitting = "", _most_fitting(keys)
    below: dict[str, list[str]] = {}
    for key in keys:
        for dot in re.finditer(r"\.", key):
            below.setdefault(key[: dot.end()], []).append(key[dot.end() :])
    # By descending number of keys, which limits the number of fitting keys.
    for prefix, names in sorted(below.items(), key=lambda item: (-len(item[1]), len(item[0]))):
        if len(names) <= fitting:
            break
        if (found := _most_fitting(names)) > fitting:
            best, fitting = prefix, found
    return best


def _most_fitting(keys: list[str]) -> int:
    return max(sum(map(renaming.fits, keys)) for key_format in KEY_FORMATS for renaming in renamings(key_format))
