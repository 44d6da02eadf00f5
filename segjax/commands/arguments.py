"""Arguments that several commands share."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from segjax.checkpoints.state_dict import CheckpointError


def parse_overrides(pairs: Iterable[str]) -> dict[str, object]:
    """Python literals from KEY=VALUE; CheckpointError for what is none."""
    overrides = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise CheckpointError(f"--overrides takes KEY=VALUE, for example 'num_heads=(1,2,5,8)'; got {pair!r}")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise CheckpointError(
                f"--overrides {key}: {value!r} is not a Python literal; quote text as '\"text\"'"
            ) from None
    return overrides
