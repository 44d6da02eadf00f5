"""Constraints on the values of settings. Each one states the allowed values in words, and checks a value.

`kind` is the type in a config. `words` completes the phrase "must be". `problem(value)` is None for an allowed value,
and otherwise completes "must be". A bool is not a number. Real numbers must also meet their bounds in float32, the
precision of runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Collection, Mapping
from typing import ClassVar, TypeGuard

from ml_collections import ConfigDict

from segjax.data import class_weights, specs

# Steps and counts are int32 on devices.
INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number from `least` to `most`, inclusive."""

    least: int = 0
    most: int = INT32_MAX
    kind: ClassVar[type] = int

    @property
    def words(self) -> str:
        return f"at least {self.least}" + (f" and at most {self.most}" if self.most != INT32_MAX else "")

    def problem(self, value: object) -> str | None:
        if not _is_integer(value):
            return f"a whole number, {self.words}"
        if value > self.most:
            return f"at most {self.most}"
        return None if value >= self.least else self.words


@dataclasses.dataclass(frozen=True)
class Real:
    """A finite number, at least `least` or greater than `above`, and at most `most` or less than `below`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    kind: ClassVar[type] = float

    @property
    def words(self) -> str:
        bounds = (
            ("at least", self.least),
            ("greater than", self.above),
            ("at most", self.most),
            ("less than", self.below),
        )
        parts = [f"{name} {bound:g}" for name, bound in bounds if bound is not None]
        has_end = self.most is not None or self.below is not None
        return " and ".join(parts if has_end else ["finite", *parts])

    def problem(self, value: object) -> str | None:
        if not _is_number(value):
            return f"a number, {self.words}"
        if not self._holds(_as_float(value)):
            return self.words
        return None if self._holds(_as_float32(value)) else f"{self.words} in float32"

    def _holds(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


@dataclasses.dataclass(frozen=True)
class Boolean:
    """True or False."""

    kind: ClassVar[type] = bool
    words: ClassVar[str] = "True or False"

    def problem(self, value: object) -> str | None:
        return None if isinstance(value, bool) else self.words


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few words."""

    options: Collection[str]
    kind: ClassVar[type] = str

    @property
    def words(self) -> str:
        *others, last = map(repr, self.options)
        return f"{', '.join(others)} or {last}"

    def problem(self, value: object) -> str | None:
        return None if isinstance(value, str) and value in self.options else self.words


@dataclasses.dataclass(frozen=True)
class Text:
    """A string that the regular expression `pattern` matches completely."""

    words: str = "text"
    pattern: str = r"(?s).*"
    kind: ClassVar[type] = str

    def problem(self, value: object) -> str | None:
        return None if isinstance(value, str) and re.fullmatch(self.pattern, value) else self.words


@dataclasses.dataclass(frozen=True)
class RegularExpression:
    """A regular expression in Python's syntax; empty for none."""

    kind: ClassVar[type] = str
    words: ClassVar[str] = "a regular expression"

    def problem(self, value: object) -> str | None:
        if not isinstance(value, str):
            return self.words
        try:
            re.compile(value)
        except re.error as error:
            return f"{self.words} ({error})"
        return None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two numbers, for example (height, width). With `ascending`, the first is at most the second."""

    names: tuple[str, str]
    of: Integer | Real
    ascending: bool = False
    kind: ClassVar[type] = tuple

    @property
    def words(self) -> str:
        return f"({self.names[0]}, {self.names[1]}), each {self.of.words}"

    def problem(self, value: object) -> str | None:
        if not isinstance(value, tuple) or len(value) != 2 or any(self.of.problem(number) for number in value):
            return self.words
        if self.ascending and value[0] > value[1]:
            return f"({self.names[0]}, {self.names[1]}) in this order"
        return None


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple of at least `least` entries that meet the same constraint."""

    of: Text | RegularExpression | Real | Choice
    words: str
    least: int = 0
    kind: ClassVar[type] = tuple

    def problem(self, value: object) -> str | None:
        if not isinstance(value, tuple) or len(value) < self.least:
            return self.words
        return self.words if any(map(self.of.problem, value)) else None


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Pairs of a regular expression and a factor that is not negative."""

    kind: ClassVar[type] = tuple
    words: ClassVar[str] = "(regular expression, factor) pairs, as in (('head', 10.0),)"

    def problem(self, value: object) -> str | None:
        return None if isinstance(value, tuple) and all(map(self._is_pair, value)) else self.words

    def _is_pair(self, pair: object) -> bool:
        if not isinstance(pair, tuple) or len(pair) != 2:
            return False
        return RegularExpression().problem(pair[0]) is None and Real(least=0).problem(pair[1]) is None


@dataclasses.dataclass(frozen=True)
class OptimizerName:
    """The name of an optimizer. Whether optax has it is only known where optax is imported."""

    kind: ClassVar[type] = str
    words: ClassVar[str] = "'adamw', 'sgd' or the dotted name of an optimizer of optax, as in 'optax.lion'"

    def problem(self, value: object) -> str | None:
        is_name = isinstance(value, str) and re.fullmatch(r"adamw|sgd|optax(\.[A-Za-z]\w*)+", value)
        return None if is_name else self.words


@dataclasses.dataclass(frozen=True)
class Options:
    """A dict from names of arguments to numbers, words, bools or None."""

    kind: ClassVar[type] = ConfigDict
    words: ClassVar[str] = "a dict from names of arguments to numbers or words, as in {'b1': 0.95}"

    def problem(self, value: object) -> str | None:
        if not isinstance(value, Mapping | ConfigDict):
            return self.words
        is_right = all(isinstance(key, str) and key.isidentifier() and _is_plain(value[key]) for key in value)
        return None if is_right else self.words


@dataclasses.dataclass(frozen=True)
class ClassWeights:
    """The name of a published scheme, or a number for each class. The number of classes is known only with the data."""

    kind: ClassVar[type] = object
    names: ClassVar[tuple[str, ...]] = ("", *class_weights.BALANCED, *specs.CLASS_WEIGHTS)
    words: ClassVar[str] = f"{', '.join(map(repr, names))} or one number for each class, as in (1.0, 2.5)"

    def problem(self, value: object) -> str | None:
        if isinstance(value, str):
            return None if value in self.names else self.words
        if not isinstance(value, tuple | list) or not value:
            return self.words
        is_wrong = any(map(Real(least=0).problem, value)) or not any(value)
        return "finite, not negative and not all 0" if is_wrong else None


Constraint = (
    Integer
    | Real
    | Boolean
    | Choice
    | Text
    | RegularExpression
    | Pair
    | Several
    | Multipliers
    | OptimizerName
    | Options
    | ClassWeights
)


# Ranges of settings and of command arguments. Their upper ends are far beyond any need, and close to what the memory of
# large machines allows.
SIDE = Integer(1, 16_384)  # pixels
BATCH = Integer(1, 4096)  # images or crops
CLASSES = Integer(1, 10_000)
SEED = Integer(0, 2**32 - 1)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | bool | int) or (_is_number(value) and math.isfinite(value))


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _as_float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
