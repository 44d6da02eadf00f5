"""The weights that a training starts from: a converted or PyTorch checkpoint, an encoder alone, or parts of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from segjax.dialects import recognise
from segjax.families import FAMILIES, family_of, matches
from segjax.files import read_file
from segjax.weights import BATCH_COUNTER, CheckpointError, as_arrays, load_torch, named_variables, to_torch, torch_name


def load_pretrained(model: nnx.Module, source: Path, *, keep: Sequence[str] = ()) -> None:
    """Fills a model from whatever `segjax.convert` reads; what was loaded and what was not goes to the log.

    Args:
      source: a `.pth`, a `.safetensors`, an orbax folder, or the folder of a training.
      keep: patterns (`*` and `?`) of parameters that stay as initialised although the checkpoint may have them, for
        example "decode_head.linear_pred.*" for another number of classes. Beside an encoder alone, the decoder stays so
        anyway.

    Raises:
      CheckpointError: a file that cannot be read or does not fit, or a pattern that no parameter has; nothing is
        loaded.
    """
    source = Path(source).expanduser()
    found = read_file(source)
    foreign = to_torch(found) if isinstance(found, nnx.Module) else as_arrays(found)
    names = [torch_name(path) for path in named_variables(model)]
    if strangers := [pattern for pattern in keep if not any(matches(name, (pattern,)) for name in names)]:
        raise CheckpointError(
            f"init.keep: no parameter of {model.spec.name} is called {' or '.join(map(repr, strangers))}; they are "
            f"called {names[0]!r} to {names[-1]!r}"
        )
    try:
        _load(model, foreign, tuple(keep))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _load(model: nnx.Module, foreign: Mapping[str, np.ndarray], keep: tuple[str, ...]) -> None:
    family = family_of(model.spec.name)
    recognised = recognise(foreign, dialect="auto", family=family)
    names = [torch_name(path) for path in named_variables(model)]
    if recognised.form.encoder_only:
        keep = (*keep, *FAMILIES[family].head)
    kept = {name for name in names if matches(name, keep)}
    wanted = {
        foreign_name for name in names if name not in kept for foreign_name in recognised.renaming.foreign_names(name)
    }
    unused = {
        foreign_name for name in kept for foreign_name in recognised.renaming.foreign_names(name)
    } & foreign.keys()
    if all(name in kept for name in names if matches(name, FAMILIES[family].head)):
        # With a decoder that stays random, that of the checkpoint may be any.
        unused = {key for key in foreign if key not in wanted and not key.endswith(BATCH_COUNTER)}
    load_torch(model, foreign, drop=tuple(unused), keep=keep)
