"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import ast
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


def summary_of(docstring: str | None) -> str:
    """The first paragraph of a module's docstring, which is the first line of its command's --help."""
    return (docstring or "").partition("\n\n")[0]


CHECKPOINT = "a .pth or .safetensors, a folder of segjax or transformers, the folder of a run, or hf:owner/name"


def add_checkpoint(
    parser: argparse.ArgumentParser, arguments: Sequence[str], *, names: Sequence[str] = ("--checkpoint",)
) -> None:
    """Adds the checkpoint as the next positional argument, or as an option if `arguments` contain one of its names."""
    by_name = any(argument.partition("=")[0] in names for argument in arguments)
    means = "means" if len(names) == 1 else "mean"
    help = f"{CHECKPOINT}; {' and '.join(f'{name} CHECKPOINT' for name in names)} {means} the same"
    if by_name:
        parser.add_argument(*names, dest="checkpoint", required=True, type=Path, metavar="CHECKPOINT", help=help)
    else:
        parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=help)


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `segjax.inference.engine.Protocol`."""
    parser.add_argument("--mode", choices=("whole", "slide"), help="slide: a sliding window; default whole images")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="of the sliding window; default 512 512")
    parser.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="of it; default 3/4 of the crop")
    parser.add_argument("--scales", type=float, nargs="+", metavar="S", help="average probabilities; default 1")
    parser.add_argument("--flip", action="store_true", default=None, help="score each scale mirrored too")


def protocol_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `add_protocol` that were given."""
    names = ("mode", "crop", "stride", "scales", "flip")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def parse_overrides(pairs: Iterable[str]) -> dict[str, object]:
    """Python literals from KEY=VALUE; ValueError for anything else."""
    overrides = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--overrides takes KEY=VALUE, for example 'num_heads=(1,2,5,8)'; got {pair!r}")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"--overrides {key}: {value!r} is not a Python literal; quote text as '\"text\"'"
            ) from None
    return overrides


@contextlib.contextmanager
def overrides_at_fault(overrides: Sequence[str]) -> Iterator[None]:
    """Turns Python's errors about settings of a wrong type into ValueErrors, if there are `overrides`."""
    try:
        yield
    except (TypeError, ArithmeticError) as error:
        if not overrides:
            raise
        raise ValueError(f"--overrides {' '.join(overrides)}: {error}") from error
