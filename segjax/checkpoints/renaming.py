"""Renames whole state dicts by the key maps, in both directions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from segjax.checkpoints.key_maps import KeyFormat, Rule

# ------------------------------------------------------------------------------------------------------- one rule


@dataclasses.dataclass(frozen=True)
class Group:
    """Native and foreign keys of the same tensors, by one rule."""

    native: tuple[str, ...]
    foreign: tuple[str, ...]
    shares: tuple[int, ...]
    as_conv: bool

    def to_foreign(self, native: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        whole = _joined([native[key] for key in self.native])
        if self.as_conv and whole.ndim == 2:
            whole = whole[:, :, None, None]
        return dict(zip(self.foreign, _parts(whole, (1,) * len(self.foreign)), strict=True))

    def to_native(self, foreign: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        whole = _joined([foreign[key] for key in self.foreign])
        if self.as_conv and whole.shape[2:] == (1, 1):
            whole = whole[:, :, 0, 0]
        return dict(zip(self.native, _parts(whole, self.shares), strict=True))


def _joined(values: list[np.ndarray]) -> np.ndarray:
    # A counter is a scalar; all parts have an equal one.
    return values[0] if len(values) == 1 or not values[0].ndim else np.concatenate(values)


def _parts(whole: np.ndarray, shares: tuple[int, ...]) -> list[np.ndarray]:
    if len(shares) == 1:
        return [whole]
    if not whole.ndim:
        return [whole] * len(shares)
    ends = [len(whole) * end // sum(shares) for end in itertools.accumulate(shares)]
    return np.split(whole, ends[:-1])


_FIELDS = {"{b}": r"(?P<b>\d+)", "{t}": r"(?P<t>\w+)", "{rest}": r"(?P<rest>.+)"}
_STAGES = {"{s}": "[1-4]", "{z}": "[0-3]", "{r}": "[0-3]"}


def _pattern_of(template: str, expressions: Mapping[str, str]) -> str:
    pattern = re.escape(template)
    for field, expression in expressions.items():
        pattern = pattern.replace(re.escape(field), expression)
    return pattern


class _Template:
    """A key with fields `{b}`, `{t}`, `{rest}`; its pattern is compiled when a key with its prefix is first matched."""

    def __init__(self, text: str):
        self.text = text
        self._start = text.partition("{")[0]

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        return re.compile(_pattern_of(self.text, _FIELDS))

    def match(self, key: str) -> dict[str, str] | None:
        if not key.startswith(self._start):
            return None
        found = self._pattern.fullmatch(key)
        return None if found is None else found.groupdict()

    def fill(self, fields: Mapping[str, str]) -> str:
        return self.text.format(**fields)


def _at_each_stage(rule: Rule) -> Iterable[tuple[tuple[_Template, ...], tuple[_Template, ...], Rule]]:
    """Yields the native and foreign templates of a rule, for each stage if it has a field for the stage."""
    for stage in range(1, 5) if any("{s}" in name for name in rule.native) else (0,):
        fields = {"{s}": str(stage), "{z}": str(stage - 1), "{r}": str(4 - stage)}

        def filled(names, fields=fields):
            for field, value in fields.items():
                names = [name.replace(field, value) for name in names]
            return tuple(map(_Template, names))

        yield filled(rule.native), filled(rule.foreign), rule


# --------------------------------------------------------------------------------------------------- a whole key map


class Renaming:
    """A key map that renames whole state dicts in both directions."""

    def __init__(self, key_map: tuple[Rule, ...], without_bias: tuple[tuple[str, str], ...] = ()):
        self._key_map = key_map
        # (native key of the bias, native key of the running mean)
        self.folded = tuple((f"{layer}.bias", f"{norm}.running_mean") for layer, norm in without_bias)

    @functools.cached_property
    def _rules(self) -> list[tuple[tuple[_Template, ...], tuple[_Template, ...], Rule]]:
        return [templates for rule in self._key_map for templates in _at_each_stage(rule)]

    @functools.cached_property
    def _foreign(self) -> re.Pattern:
        # All foreign templates in one pattern, because recognition matches every key with every key map.
        anonymous = {field: pattern.replace(f"?P<{field[1:-1]}>", "?:") for field, pattern in _FIELDS.items()}
        names = dict.fromkeys(name for rule in self._key_map for name in rule.foreign)
        return re.compile("|".join(_pattern_of(name, anonymous | _STAGES) for name in names))

    def groups(self, keys: Iterable[str], *, foreign: bool = False) -> list[Group]:
        """Groups of native (or foreign) keys; keys that match no rule are skipped."""
        found = {}
        for key in keys:
            group = self._group(key, foreign)
            if group is not None:
                found[group.native] = group
        return list(found.values())

    def _group(self, key: str, foreign: bool) -> Group | None:
        for native_side, foreign_side, rule in self._rules:
            for template in foreign_side if foreign else native_side:
                if fields := template.match(key):
                    return Group(
                        tuple(name.fill(fields) for name in native_side),
                        tuple(name.fill(fields) for name in foreign_side),
                        rule.shares,
                        rule.as_conv,
                    )
        return None

    def fits(self, key: str) -> bool:
        """Whether a foreign key matches a rule."""
        return self._foreign.fullmatch(key) is not None

    def foreign_names(self, key: str) -> tuple[str, ...]:
        """Foreign keys of a native key; empty if no rule matches."""
        group = self._group(key, foreign=False)
        return () if group is None else group.foreign

    def to_foreign(self, native: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames, splits and merges arrays by native key.

        Raises:
          KeyError: A native key matches no rule, or another key of its group is missing.
        """
        native = dict(native)
        for bias, mean in self.folded:
            if bias in native and mean in native:
                # (x + bias - mean) is the norm's input.
                native[mean] = native[mean] - native.pop(bias)
        groups = self.groups(native)
        placed = {key for group in groups for key in group.native}
        for key in itertools.chain(native, placed):
            if key not in placed or key not in native:
                raise KeyError(key)
        foreign = {}
        for group in groups:
            foreign |= group.to_foreign(native)
        return foreign

    def to_native(self, foreign: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames, splits and merges arrays by foreign key.

        Keys that match no rule, incomplete groups, and groups whose arrays cannot be concatenated are skipped.
        """
        native = {}
        for group in self.groups(foreign, foreign=True):
            parts = [foreign[key] for key in group.foreign if key in foreign]
            if len(parts) == len(group.foreign) and len({(part.ndim, part.shape[1:]) for part in parts}) == 1:
                native |= group.to_native(foreign)
        for bias, mean in self.folded:
            if mean in native and bias not in native:
                native[bias] = np.zeros_like(native[mean])
        return native


@functools.cache
def renamings(key_format: KeyFormat) -> tuple[Renaming, ...]:
    """The key maps of a format; the first is for writing."""
    return tuple(Renaming(key_map, key_format.without_bias) for key_map in key_format.key_maps)
