"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import ast
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

CHECKPOINT = "a .pth or .safetensors, a folder of segjax or transformers, the folder of a run, or hf:owner/name"


def add_checkpoint(
    parser: argparse.ArgumentParser, arguments: Sequence[str], *, names: Sequence[str] = ("--checkpoint",)
) -> None:
    """Adds the checkpoint: the next positional argument, or an option where `arguments` have one of its names."""
    by_name = any(argument.partition("=")[0] in names for argument in arguments)
    help = f"{CHECKPOINT}; {' and '.join(f'{name} CHECKPOINT' for name in names)} mean the same"
    if by_name:
        parser.add_argument(*names, dest="checkpoint", required=True, type=Path, metavar="CHECKPOINT", help=help)
    else:
        parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=help)


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
    """Turns Python's errors about settings of a wrong kind into ValueErrors; without `overrides` they stay."""
    try:
        yield
    except (TypeError, ArithmeticError) as error:
        if not overrides:
            raise
        raise ValueError(f"--overrides {' '.join(overrides)}: {error}") from error
