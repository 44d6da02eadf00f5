"""Initial weights of a run, and the model's settings that belong to them.

They come from a converted or PyTorch checkpoint, from an encoder only, or from parts of either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints import layout
from segjax.checkpoints.architectures import (
    DECODER_SETTINGS,
    FAMILIES,
    MissingKeyError,
    UnreadableShapeError,
    family_of,
    matches,
    nearest_variant,
)
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError, shorten
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.key_maps import KEY_FORMATS, OF_VARIANT
from segjax.checkpoints.load import settings_in
from segjax.checkpoints.recognition import Recognised
from segjax.checkpoints.state_dict import (
    MisfitError,
    load_torch,
    log_recognised,
    logger,
    named_variables,
    read_sizes,
    torch_name,
)
from segjax.data import specs
from segjax.models.segmentation_model import SegmentationModel

# ------------------------------------------------------------------------------------------------------------- settings


class ReadSettings(NamedTuple):
    """Settings of the model of a checkpoint; only the encoder's settings for an encoder.

    Attributes:
      known: Settings that were read from shapes and metadata.
      assumed: Settings that the checkpoint does not contain, as published with its key format.
    """

    known: dict[str, Any]
    assumed: dict[str, Any]


def read_settings(checkpoint: Checkpoint, name: str, *, keep: Sequence[str] = ()) -> ReadSettings:
    """Reads the settings with which the model `name` fits a checkpoint.

    Dropout rates, which belong to the run, and the number of channels, which belongs to its images, are not read.

    Args:
      checkpoint: The checkpoint.
      name: A name in `segjax.MODELS`; the checkpoint may be another variant of its family.
      keep: As for `initialize`. If it covers the whole decoder, only the encoder is read.

    Raises:
      CheckpointError: The checkpoint belongs to another family (the message names its recipe), or its sizes cannot be
        read.
    """
    family, defaults = family_of(name), models.settings(name)
    # First without the family, so that keys are recognised only once if the family is right.
    free = checkpoint.recognised
    checkpoint = checkpoint.read_as(family=family)
    found = checkpoint.recognised
    encoder_only = _is_encoder(found) or _keeps_decoder(name, keep)
    sizes = _sizes_of_encoder(found)
    if free.key_format.family != family and free.fitting > found.fitting and not (encoder_only and sizes is not None):
        raise CheckpointError(_why_other_family(found, free, name, has_encoder=sizes is not None))
    if not encoder_only:
        # Loading reports everything that a decoder lacks.
        with contextlib.suppress(MissingKeyError, UnreadableShapeError):
            sizes, _ = found.sizes
    if sizes is None:
        # Raises an error that names the missing keys of the encoder.
        sizes, _ = read_sizes(checkpoint)
    nearest = nearest_variant(found.family, sizes)
    published = found.key_format.settings_for(_num_classes(found, encoder_only=encoder_only))
    assumed = {key: models.settings(nearest)[key] if value is OF_VARIANT else value for key, value in published.items()}
    _, described = settings_in(checkpoint.metadata, "auto")

    def belongs(key: str) -> bool:
        is_of_run = key.endswith("_rate") or key == "in_channels"
        return key in defaults and not is_of_run and not (encoder_only and key in DECODER_SETTINGS)

    known = {key: value for key, value in (described | sizes).items() if belongs(key)}
    return ReadSettings(known, {key: value for key, value in assumed.items() if belongs(key) and key not in known})


def recipe_of(name: str) -> str:
    """The recipe of a model, as for `--config`: "segformer_b2" -> "segformer:b2"."""
    recipe, _, variant = name.partition("_")
    return name if variant in ("simple", "zuppichini") else f"{recipe}:{variant}"


def _num_classes(found: Recognised, *, encoder_only: bool) -> int | None:
    """Number of classes of a whole model; None for an encoder, or if the classifier cannot be read."""
    if not encoder_only:
        with contextlib.suppress(MissingKeyError, UnreadableShapeError):
            return found.sizes[1]
    return None


def _sizes_of_encoder(found: Recognised) -> dict[str, Any] | None:
    in_encoder = {key: shape for key, shape in found.native_shapes.items() if not found.family.in_head(key)}
    try:
        return found.family.read(in_encoder)[0]
    except (MissingKeyError, UnreadableShapeError):
        return None


def _keeps_decoder(name: str, keep: Sequence[str]) -> bool:
    """Whether `keep` covers every parameter of the decoder of the model `name`."""
    if not keep:
        return False
    model = nnx.eval_shape(functools.partial(models.create, name, num_classes=2))
    in_head = FAMILIES[family_of(name)].in_head
    return all(matches(name, keep) for name in map(torch_name, named_variables(model)) if in_head(name))


def _why_other_family(found: Recognised, free: Recognised, name: str, *, has_encoder: bool) -> str:
    sizes = _sizes_of_encoder(free)
    recipe = recipe_of(nearest_variant(free.family, sizes) if sizes else free.family.names[0])
    why = (
        f"it is {free.family.title} ({free.key_format.dialect}: {free.fitting} of {len(free.shapes)} keys fit), and "
        f"{name} is {found.family.title} ({found.fitting} fit)\n  to train that model: --config {recipe}"
    )
    if has_encoder and found.of_encoder(found.shapes):
        why += f'\n  to start from its encoder only: "--config.init.keep={found.family.head}"'
    return why


# -------------------------------------------------------------------------------------------------------------- weights


def initialize(model: SegmentationModel, source: str | Path | Checkpoint, *, keep: Sequence[str] = ()) -> str:
    """Loads the initial weights of a model from any checkpoint; the log lists loaded and skipped parts.

    If the checkpoint has another number of classes, its classifiers are not loaded, and the parameters of the model's
    classifiers stay as initialised.

    Args:
      model: The model to fill.
      source: A `.pth`, a `.safetensors`, an orbax folder, the folder of a run or of transformers, an address
        hf:owner/name[@revision], the name of published weights, or a `Checkpoint`. With an encoder only, the decoder
        stays as initialised.
      keep: Patterns (`*` and `?`) of parameters that stay as initialised even if the checkpoint has them, for example
        "decode_head.linear_fuse.*". If they cover the whole decoder, the checkpoint may have any decoder.

    Returns:
      Description of the loaded parts, such as "encoder; decoder random".

    Raises:
      CheckpointError: The checkpoint cannot be read or does not fit, or a pattern matches no parameter; nothing is
        loaded.

    Example:
      >>> import tempfile
      >>> import segjax
      >>> small = dict(dims=(4, 8, 10, 16), decoder_dim=8)
      >>> model = segjax.create("segformer_b0", num_classes=5, **small)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     segjax.save(segjax.create("segformer_b0", num_classes=3, **small), f"{folder}/three.safetensors")
      ...     print(segjax.initialize(model, f"{folder}/three.safetensors"))
      all weights, classifier random (3 classes there, 5 here)
    """
    return load_initial(model, source, keep=keep)[0]


def load_initial(
    model: SegmentationModel, source: str | Path | Checkpoint, *, keep: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """`initialize`, which also returns the dotted paths of the arrays that the checkpoint does not have as they are.

    They are those that stayed as initialised, and a first convolution that was adapted to other channels.
    """
    names = [torch_name(path) for path in named_variables(model)]
    if unknown := [pattern for pattern in keep if not any(matches(name, (pattern,)) for name in names)]:
        raise CheckpointError(
            f"init.keep: no parameter of {model.spec.name} is called {' or '.join(map(repr, unknown))}; they are "
            f"called {names[0]!r} to {names[-1]!r}"
        )
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    try:
        return _load(model, checkpoint.read_as(family=family_of(model.spec.name)), names, tuple(keep))
    except CheckpointError as error:
        place = checkpoint.source if isinstance(source, Checkpoint) else source
        raise CheckpointError(f"{place}: {error}") from None


def _load(
    model: SegmentationModel, checkpoint: Checkpoint, names: list[str], given: tuple[str, ...]
) -> tuple[str, list[str]]:
    log_recognised(checkpoint.recognised)
    checkpoint, adapted = _with_channels(model, checkpoint, given)
    found, arrays = checkpoint.recognised, checkpoint.state_dict
    keep = given
    if encoder_only := _is_encoder(found):
        logger.info("encoder only: the decoder stays as initialised")
        keep = (*keep, *found.family.head)
    classes, of_classes = _other_classes(model, found, keep)
    if of_classes:
        logger.info(
            "the checkpoint has %d classes, the data %d: %s stays random",
            classes,
            model.spec.num_classes,
            " and ".join(_modules(of_classes)),
        )
        keep = (*keep, *map(glob.escape, of_classes))
    unused = _unused(found, names, keep)
    try:
        left = load_torch(model, checkpoint, drop=map(glob.escape, unused), keep=keep)
    except MisfitError as error:
        raise CheckpointError(error.problems + _advice(error, found)) from None
    logger.info("loaded %d arrays", len(arrays) - len(unused))
    head = set(filter(found.family.in_head, names))
    kept = {name for name in names if matches(name, given)}
    no_decoder = encoder_only or kept.issuperset(head)
    parts = ["encoder; decoder random" if no_decoder else "all weights"]
    if of_classes:
        parts[0] += f", classifier random ({classes} classes there, {model.spec.num_classes} here)"
    parts += adapted
    if kept := sorted(kept - head if no_decoder else kept):
        parts.append(f"random by init.keep: {shorten(_modules(kept), most=4)}")
    changed = [path for path in named_variables(model) if adapted and torch_name(path) == found.family.stem]
    return "; ".join(parts), left + changed


def _with_channels(
    model: SegmentationModel, checkpoint: Checkpoint, keep: Sequence[str]
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with its first convolution adapted to the channels of the model, and a note if it was adapted.

    Raises:
      CheckpointError: The checkpoint has neither the channels of the model nor three.
    """
    found, channels = checkpoint.recognised, model.in_channels
    family = found.family
    keys = found.renaming.foreign_names(family.stem)
    shape = found.native_shapes.get(family.stem, ())
    inputs = shape[1] // family.stem_pixels if len(shape) == 4 and shape[1] % family.stem_pixels == 0 else channels
    if inputs == channels or matches(family.stem, keep) or len(keys) != 1:
        return checkpoint, []
    if inputs != 3:
        pattern = f"{family.stem.rpartition('.')[0]}.*"
        raise CheckpointError(
            f"its first convolution takes {specs.ImageKind(inputs, None)}, and the images have {channels}; only that "
            f'of three, RGB, can be adapted\n  to leave it random: "--config.init.keep={(pattern,)}"'
        )
    (key,) = keys
    weights = {**checkpoint.state_dict, key: adapted_stem(checkpoint.state_dict[key], channels, family.stem_pixels)}
    how = (
        "the sum of those of red, green and blue"
        if channels == 1
        else f"those of red, green and blue in turn, times 3/{channels}"
    )
    logger.info("the checkpoint has 3 channels, the images %d: filters of the first convolution are %s", channels, how)
    changed = dataclasses.replace(
        checkpoint, weights=weights, is_orbax=False, dialect=found.key_format.dialect, family=found.key_format.family
    )
    return changed, [f"first convolution adapted from 3 channels to {channels}"]


def adapted_stem(weight: np.ndarray, channels: int, pixels: int = 1) -> np.ndarray:
    """Adapts a first convolution of three channels to another number of channels, as timm does.

    For one channel, the filters are summed, so that a grey image gives the output of the same image in RGB. For other
    numbers, the filters are repeated in turn and scaled by 3 / channels, so that outputs keep their magnitude.

    Args:
      weight: Weight (out, 3, h, w), or (out, 3 * pixels, 1, 1) for patches, with the pixels of a channel together.
      channels: Number of channels of the images.
      pixels: Number of pixels of a patch.

    Returns:
      Weight of the same shape with `channels` in place of 3.
    """
    out, _, height, width = weight.shape
    filters = weight.reshape(out, 3, pixels, height, width).astype(np.float64)
    in_turn = filters[:, np.arange(channels) % 3] * (3 / channels)
    new = filters.sum(axis=1) if channels == 1 else in_turn
    return new.reshape(out, channels * pixels, height, width).astype(weight.dtype)


def _modules(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _is_encoder(found: Recognised) -> bool:
    """Whether a checkpoint has an encoder and no weights for a decoder."""
    return not found.shapes.keys() - found.of_encoder(found.shapes) - _extras_of_encoders(found)


def _other_classes(model: SegmentationModel, found: Recognised, keep: Sequence[str]) -> tuple[int | None, list[str]]:
    """Number of classes of a checkpoint, and the parameters of `model` that do not fit only because of it.

    These are the parameters outside `keep` whose shape in the checkpoint is not that of `model`, but that of the same
    model with the checkpoint's number of classes.
    """
    try:
        _, classes = found.sizes
    except (MissingKeyError, UnreadableShapeError):
        return None, []
    spec = model.spec
    if classes in (None, spec.num_classes):
        return classes, []
    other = nnx.eval_shape(functools.partial(models.create, spec.name, num_classes=classes, **dict(spec.overrides)))
    own, theirs = _torch_shapes(model), _torch_shapes(other)
    names = [name for name, shape in theirs.items() if shape != own[name] and shape == found.native_shapes.get(name)]
    return classes, [name for name in names if not matches(name, keep)]


def _torch_shapes(model: SegmentationModel) -> dict[str, tuple[int, ...]]:
    return {
        torch_name(path): layout.blank_of(path, variable.get_value().shape).shape
        for path, variable in named_variables(model).items()
    }


def _unused(found: Recognised, names: list[str], keep: tuple[str, ...]) -> list[str]:
    """Keys of the checkpoint whose parameters stay as initialised."""
    kept = {name for name in names if matches(name, keep)}
    unused = {key for name in kept for key in found.renaming.foreign_names(name)}
    unused -= {key for name in names if name not in kept for key in found.renaming.foreign_names(name)}
    if kept.issuperset(filter(found.family.in_head, names)):
        # Every key outside the encoder. Unknown keys in the encoder belong to a larger variant and remain errors.
        unused |= found.shapes.keys() - found.of_encoder(found.shapes)
    return [key for key in found.shapes if key in unused]


def _extras_of_encoders(found: Recognised) -> set[str]:
    """Keys that accompany an encoder in any dialect, without a meaning in a whole model."""
    key_formats = [key_format for key_format in KEY_FORMATS if key_format.family == found.key_format.family]
    extras = [pattern for each in key_formats for pattern in (*each.backbone_extras, *each.unused)]
    return {key for key in found.shapes if matches(key, extras) and not found.renaming.fits(key)}


def _advice(error: MisfitError, found: Recognised) -> str:
    """Advice on the setting to change."""
    in_head = found.family.in_head
    if not all(map(in_head, error.parameters)) or found.of_encoder(error.unexpected):
        return "\n  its encoder is another one: choose the model, and the sizes, of the checkpoint"
    if not error.parameters:
        return ""
    # If the checkpoint has other layers, its decoder is of another kind; else parts of it have another size.
    layers = dict.fromkeys(f"{name.rpartition('.')[0]}.*" for name in error.parameters)
    patterns = found.family.head if error.unexpected else tuple(layers)
    return f'\n  to leave that part random: "--config.init.keep={patterns}"'
