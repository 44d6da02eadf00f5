"""Renames keys between formats by the key maps, both ways, and recognises the format of a state dict."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from segjax.checkpoints import key_maps
from segjax.checkpoints.key_maps import Form, Rule

# ---------------------------------------------------------------------------------------------------- applying a naming


@dataclasses.dataclass(frozen=True)
class Group:
    """Keys on both sides that hold the same numbers, and how those are cut."""

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
    # A counter is a scalar: each part has its own, all alike.
    return values[0] if len(values) == 1 or not values[0].ndim else np.concatenate(values)


def _parts(whole: np.ndarray, shares: tuple[int, ...]) -> list[np.ndarray]:
    if len(shares) == 1:
        return [whole]
    if not whole.ndim:
        return [whole] * len(shares)
    ends = [len(whole) * end // sum(shares) for end in itertools.accumulate(shares)]
    return np.split(whole, ends[:-1])


class Renaming:
    """One naming of a form, ready to be applied in both directions to whole state dicts."""

    def __init__(self, rules: tuple[Rule, ...], without_bias: tuple[tuple[str, str], ...] = ()):
        self._rules = [
            (tuple(map(_Template, native)), tuple(map(_Template, foreign)), rule)
            for rule in rules
            for native, foreign in _by_stage(rule)
        ]
        # All foreign templates in one pattern: `recognise` asks every naming about every key.
        self._foreign = re.compile("|".join(template.anonymous for _, side, _ in self._rules for template in side))
        # (bias, running mean) in native names.
        self.folded = tuple((f"{layer}.bias", f"{norm}.running_mean") for layer, norm in without_bias)

    def groups(self, keys: Iterable[str], *, foreign: bool = False) -> list[Group]:
        """The groups that native (or foreign) keys belong to, without those that no rule fits."""
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
        """Whether a foreign key has a place."""
        return self._foreign.fullmatch(key) is not None

    def foreign_names(self, key: str) -> tuple[str, ...]:
        """Foreign keys of a native one; empty where no rule fits."""
        group = self._group(key, foreign=False)
        return () if group is None else group.foreign

    def to_foreign(self, native: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames, splits and merges. Raises KeyError for a native key that the dialect has no place for."""
        native = dict(native)
        for bias, mean in self.folded:
            if bias in native and mean in native:
                # (x + bias - mean) is what the norm sees.
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
        """Renames, splits and merges; keys that no rule fits are left out, and groups that lack a part or whose parts
        are of shapes that cannot be stacked."""
        native = {}
        for group in self.groups(foreign, foreign=True):
            parts = [foreign[key] for key in group.foreign if key in foreign]
            if len(parts) == len(group.foreign) and len({(part.ndim, part.shape[1:]) for part in parts}) == 1:
                native |= group.to_native(foreign)
        for bias, mean in self.folded:
            if mean in native and bias not in native:
                native[bias] = np.zeros_like(native[mean])
        return native


def _by_stage(rule: Rule) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Native and foreign templates with the stage filled in, once for each stage where there is one."""
    stages = range(1, 5) if any("{s}" in name for name in rule.native) else (0,)
    for stage in stages:
        fields = {"{s}": stage, "{z}": stage - 1, "{r}": 4 - stage}

        def at_stage(names, fields=fields):
            for field, value in fields.items():
                names = tuple(name.replace(field, str(value)) for name in names)
            return names

        yield at_stage(rule.native), at_stage(rule.foreign)


_FIELDS = {"{b}": r"(?P<b>\d+)", "{t}": r"(?P<t>\w+)", "{rest}": r"(?P<rest>.+)"}


class _Template:
    """A name with fields `{b}`, `{t}`, `{rest}`."""

    def __init__(self, text: str):
        self.text = text
        pattern = re.escape(text)
        for field, expression in _FIELDS.items():
            pattern = pattern.replace(re.escape(field), expression)
        self._start = re.split(r"[{]", text)[0]
        self._pattern = re.compile(pattern)
        self.anonymous = re.sub(r"\(\?P<\w+>", "(?:", pattern)

    def match(self, key: str) -> dict[str, str] | None:
        if not key.startswith(self._start):
            return None
        found = self._pattern.fullmatch(key)
        return None if found is None else found.groupdict()

    def fill(self, fields: Mapping[str, str]) -> str:
        return self.text.format(**fields)


RENAMINGS = {
    (form.dialect, form.family): tuple(Renaming(rules, form.without_bias) for rules in form.namings)
    for form in key_maps.FORMS
}


@dataclasses.dataclass(frozen=True)
class Recognised:
    """The form and naming that fit most keys of a file.

    Attributes:
      fitting: how many of the keys have a place in it.
    """

    form: Form
    renaming: Renaming
    fitting: int


def recognise(keys: Iterable[str], *, dialect: str = "auto", family: str | None = None) -> Recognised:
    """What a file with these keys is most likely to be.

    Args:
      dialect: "auto", or one of `DIALECTS` to insist on one. family: to insist on one.

    Raises:
      KeyError: an unknown dialect, or one without a form for `family`; lists those that there are.
    """
    if dialect != "auto" and dialect not in key_maps.DIALECTS:
        raise KeyError(f"no dialect {dialect!r}; the dialects are auto, {', '.join(key_maps.DIALECTS)}")
    forms = [form for form in key_maps.FORMS if dialect in ("auto", form.dialect) and family in (None, form.family)]
    if not forms:
        raise KeyError(f"the dialect {dialect!r} has no form for {family}; those with one are {dialects_of(family)}")
    keys = list(keys)
    candidates = [
        Recognised(form, renaming, sum(map(renaming.fits, keys)))
        for form in forms
        for renaming in RENAMINGS[form.dialect, form.family]
    ]
    return max(candidates, key=lambda candidate: candidate.fitting)


def dialects_of(family: str) -> str:
    """The dialects that a family can be written in, as text."""
    return ", ".join(form.dialect for form in key_maps.FORMS if form.family == family)
