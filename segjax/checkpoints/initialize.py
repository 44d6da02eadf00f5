"""The weights that a training starts from: a converted or PyTorch checkpoint, an encoder alone, or parts of either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from segjax.checkpoints.architectures import FAMILIES, Family, family_of, matches
from segjax.checkpoints.files import read_file
from segjax.checkpoints.key_maps import FORMS
from segjax.checkpoints.renaming import Recognised, recognise
from segjax.checkpoints.state_dict import (
    CheckpointError,
    MisfitError,
    as_arrays,
    load_torch,
    logger,
    named_variables,
    shorten,
    to_torch,
    torch_name,
)


def load_pretrained(model: nnx.Module, source: str | Path, *, keep: Sequence[str] = ()) -> None:
    """Fills a model from whatever `segjax.convert` reads; what was loaded and what was not goes to the log.

    Args:
      source: a `.pth`, a `.safetensors`, an orbax folder, the folder of a training or of transformers, or the address
        hf:owner/name[@revision] of one. Of an encoder alone the decoder stays as initialised.
      keep: patterns (`*` and `?`) of parameters that stay as initialised although the checkpoint may have them, for
        example "decode_head.linear_pred.*" for another number of classes. With the whole decoder among them, that of
        the checkpoint may be any.

    Raises:
      CheckpointError: a file that cannot be read or does not fit, or a pattern that no parameter has; nothing is
        loaded.
    """
    names = {torch_name(path): path for path in named_variables(model)}
    if strangers := [pattern for pattern in keep if not any(matches(name, (pattern,)) for name in names)]:
        first, *_, last = names
        raise CheckpointError(
            f"init.keep: no parameter of {model.spec.name} is called {' or '.join(map(repr, strangers))}; they are "
            f"called {first!r} to {last!r}"
        )
    found = read_file(source)
    try:
        _load(model, to_torch(found) if isinstance(found, nnx.Module) else as_arrays(found), list(names), tuple(keep))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _load(model: nnx.Module, foreign: Mapping[str, np.ndarray], names: list[str], keep: tuple[str, ...]) -> None:
    family = FAMILIES[family_of(model.spec.name)]
    found = recognise(foreign, family=family_of(model.spec.name))
    logger.info("read as %s (%s)", found.form.dialect, found.form.package)
    if found.form.note:
        logger.info("note on %s: %s", found.form.package, found.form.note)
    if not foreign.keys() - _of_encoder(foreign, found, family) - _beside_encoders(foreign, found):
        logger.info("an encoder alone: the decoder stays as initialised")
        keep = (*keep, *family.head)
    unused = _unused(foreign, found, family, names, keep)
    if unused:
        logger.info("not used from the checkpoint (%d): %s", len(unused), shorten(unused))
    used = {key: value for key, value in foreign.items() if key not in unused}
    try:
        load_torch(model, used, dialect=found.form.dialect, keep=keep)
    except MisfitError as error:
        raise CheckpointError(error.problems + _advice(error, found, family)) from None
    logger.info("loaded %d arrays", len(used))


def _unused(
    foreign: Mapping[str, np.ndarray], found: Recognised, family: Family, names: list[str], keep: tuple[str, ...]
) -> list[str]:
    """Keys of the checkpoint that stand for parameters which stay as they are."""
    kept = {name for name in names if matches(name, keep)}
    unused = {key for name in kept for key in found.renaming.foreign_names(name)}
    unused -= {key for name in names if name not in kept for key in found.renaming.foreign_names(name)}
    if kept.issuperset(filter(family.in_head, names)):
        # Whatever is not the encoder's. Keys of an encoder that the model has no place for are those of another size.
        unused |= foreign.keys() - _of_encoder(foreign, found, family)
    return [key for key in foreign if key in unused]


def _of_encoder(keys: Iterable[str], found: Recognised, family: Family) -> set[str]:
    """Those keys of the checkpoint that stand for an encoder's parameters."""
    groups = found.renaming.groups(keys, foreign=True)
    return {key for group in groups if not any(map(family.in_head, group.native)) for key in group.foreign}


def _beside_encoders(keys: Iterable[str], found: Recognised) -> set[str]:
    """Those keys that come with an encoder alone, in whatever names, and mean nothing in a whole model."""
    forms = [form for form in FORMS if form.family == found.form.family]
    extras = [pattern for form in forms for pattern in (*form.backbone_extras, *form.unused)]
    return {key for key in keys if matches(key, extras) and not found.renaming.fits(key)}


def _advice(error: MisfitError, found: Recognised, family: Family) -> str:
    """What to set where the decoder alone does not fit."""
    if not all(map(family.in_head, error.parameters)) or _of_encoder(error.unexpected, found, family):
        return "\n  its encoder is another one: choose the model, and the sizes, that the checkpoint is of"
    if not error.parameters:
        return ""
    # With layers that the model has not, the decoder is of another kind; else some of it has another size.
    layers = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in error.parameters)
    patterns = family.head if error.unexpected else tuple(layers)
    return f'\n  to leave that part random: "--config.init.keep={patterns}"'
