"""A run's warnings about its data: one line each, for any number of classes with any names."""

from types import SimpleNamespace

import numpy as np
import pytest

from segjax.data import specs
from segjax.runtime import console
from segjax.train import progress, setup
from tests.runs import make_config


def described(names, counts, capsys, *, padding=0.0):
    """The lines that a run prints of its warnings."""
    spec = specs.DatasetSpec("odd", tuple(names), tuple((k % 256, k // 256, 0) for k in range(len(names))), 255)
    training = SimpleNamespace(spec=spec, pixel_counts=lambda: np.array(counts))
    config = make_config()
    config.init.expected = ""
    progress.describe({}, setup.warnings_of(config, training, padding=padding), start=6, steps=6)
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("resuming")]


ODD = ["a\nb", "\x1b[2J", "$x$", "道路" * 30, "w" * 300, "plain", "\u202eright", "many words in a name " * 5]


@pytest.mark.parametrize("number", [1, 2, 7, 151])
@pytest.mark.parametrize("names", [ODD, ["thing"]])
def test_classes_without_pixels_are_reported_in_one_line_with_names(number, names, capsys):
    names = [f"{names[k % len(names)]}{k}" for k in range(number + 1)]
    (line,) = described(names, [0] * number + [5], capsys)
    assert line.startswith(f"warning: {number} of {number + 1} classes without a pixel in train: ")
    assert console.columns(line) <= 80 and line == console.printable(line)
    first = console.one_line(names[0], most=24)
    assert first in line and (number < 7 or "more" in line)


def test_padding_is_reported_in_one_line_and_only_if_large(capsys):
    (line,) = described(["a", "b"], [1, 1], capsys, padding=0.625)
    assert line.startswith("warning: 62% of the area") and len(line) <= 80
    assert described(["a", "b"], [1, 1], capsys, padding=0.2) == []
