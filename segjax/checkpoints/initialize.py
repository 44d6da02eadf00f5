"""Initial weights of a run: from a converted or PyTorch checkpoint, from an encoder only, or from parts of either."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from segjax.checkpoints.architectures import family_of, matches
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.key_maps import KEY_FORMATS
from segjax.checkpoints.recognition import Recognised
from segjax.checkpoints.state_dict import (
    MisfitError,
    load_torch,
    log_recognised,
    logger,
    named_variables,
    torch_name,
)
from segjax.models.segmentation_model import SegmentationModel


def initialize(model: SegmentationModel, source: str | Path | Checkpoint, *, keep: Sequence[str] = ()) -> None:
    """Fills a model from any checkpoint; the log has what was loaded and what was not.

    Args:
      source: a `.pth`, a `.safetensors`, an orbax folder, the folder of a run or of transformers, the address
        hf:owner/name[@revision] of one, or one of these that was read. If it is an encoder only, the decoder stays as
        initialised.
      keep: patterns (`*` and `?`) of parameters that stay as initialised even if the checkpoint has them, for example
        "decode_head.linear_pred.*" for another number of classes. If the whole decoder is among them, the checkpoint
        may have any decoder.

    Raises:
      CheckpointError: a checkpoint that cannot be read or does not fit, or a pattern that matches no parameter; nothing
        is loaded.
    """
    names = [torch_name(path) for path in named_variables(model)]
    if unknown := [pattern for pattern in keep if not any(matches(name, (pattern,)) for name in names)]:
        raise CheckpointError(
            f"init.keep: no parameter of {model.spec.name} is called {' or '.join(map(repr, unknown))}; they are "
            f"called {names[0]!r} to {names[-1]!r}"
        )
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    try:
        _load(model, checkpoint.read_as(family=family_of(model.spec.name)), names, tuple(keep))
    except CheckpointError as error:
        place = checkpoint.source if isinstance(source, Checkpoint) else source
        raise CheckpointError(f"{place}: {error}") from None


def _load(model: SegmentationModel, checkpoint: Checkpoint, names: list[str], keep: tuple[str, ...]) -> None:
    found, arrays = checkpoint.recognised, checkpoint.state_dict
    log_recognised(found)
    if not arrays.keys() - found.of_encoder(arrays) - _extras_of_encoders(found):
        logger.info("encoder only: the decoder stays as initialised")
        keep = (*keep, *found.family.head)
    unused = _unused(found, names, keep)
    try:
        load_torch(model, checkpoint, drop=map(glob.escape, unused), keep=keep)
    except MisfitError as error:
        raise CheckpointError(error.problems + _advice(error, found)) from None
    logger.info("loaded %d arrays", len(arrays) - len(unused))


def _unused(found: Recognised, names: list[str], keep: tuple[str, ...]) -> list[str]:
    """Keys of the checkpoint whose parameters stay as initialised."""
    kept = {name for name in names if matches(name, keep)}
    unused = {key for name in kept for key in found.renaming.foreign_names(name)}
    unused -= {key for name in names if name not in kept for key in found.renaming.foreign_names(name)}
    if kept.issuperset(filter(found.family.in_head, names)):
        # Every key outside the encoder. Keys inside it that the model does not have are those of another size.
        unused |= found.shapes.keys() - found.of_encoder(found.shapes)
    return [key for key in found.shapes if key in unused]


def _extras_of_encoders(found: Recognised) -> set[str]:
    """Keys that come with an encoder in any dialect, and have no meaning in a whole model."""
    key_formats = [key_format for key_format in KEY_FORMATS if key_format.family == found.key_format.family]
    extras = [pattern for each in key_formats for pattern in (*each.backbone_extras, *each.unused)]
    return {key for key in found.shapes if matches(key, extras) and not found.renaming.fits(key)}


def _advice(error: MisfitError, found: Recognised) -> str:
    """The setting to change, where only the decoder does not fit."""
    in_head = found.family.in_head
    if not all(map(in_head, error.parameters)) or found.of_encoder(error.unexpected):
        return "\n  its encoder is another one: choose the model, and the sizes, of the checkpoint"
    if not error.parameters:
        return ""
    # With layers that the model does not have, the decoder is of another kind; else parts of it have another size.
    layers = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in error.parameters)
    patterns = found.family.head if error.unexpected else tuple(layers)
    return f'\n  to leave that part random: "--config.init.keep={patterns}"'
