"""Converts a checkpoint by the parsed arguments of `segjax convert`."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints import huggingface, temperature
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.key_maps import KEY_FORMATS, OF_VARIANT
from segjax.checkpoints.load import model_of
from segjax.checkpoints.metadata import carried
from segjax.checkpoints.save import is_folder, require_destination, write_checkpoint
from segjax.checkpoints.state_dict import (
    from_values,
    key_format_of,
    logger,
    model_metadata,
    named_variables,
    parameters_of,
    settings_of,
)
from segjax.commands.arguments import parse_overrides
from segjax.commands.ending import CheckError
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime.reading import user_path


def convert(options: argparse.Namespace) -> None:
    """Converts by the options of `segjax.commands.convert`.

    Raises:
      CheckError: `--verify` found different outputs.
      ValueError, KeyError, OSError: The user can correct the cause.
    """
    logger.info("%s -> %s", options.checkpoint, options.destination)
    _refuse_destination(options)
    checkpoint = read_checkpoint(options.checkpoint, weights=options.weights).read_as(dialect=options.dialect)
    dialect, to_folder = options.to or "native", is_folder(options.destination)
    with jax.enable_x64(True) if checkpoint.param_dtype == np.float64 else contextlib.nullcontext():
        model, metadata = (
            _model_of_folder(checkpoint, options) if checkpoint.is_orbax else _model_of(checkpoint, options)
        )
        metadata |= temperature.kept_with(options.checkpoint, model)
        # Before the verification, so that a dialect without keys for this model is refused at once.
        if not to_folder or dialect == "hf":
            _log_other_settings(model, dialect, stored=("num_heads",) if to_folder else ())
        if options.verify:
            metadata["provenance"] |= {"verified": _verified(model, checkpoint)}
        if to_folder and dialect == "hf":
            _measure_transformers(model)
        write_checkpoint(options.destination, model, dialect=dialect, metadata=metadata)
    if options.destination.suffix == ".pth" and "dataset" in metadata:
        logger.info("note: a .pth contains only weights; .safetensors keeps class names and more")
    folder = "a folder for transformers" if dialect == "hf" else "orbax folder"
    logger.info("wrote %s (%s)", options.destination, folder if to_folder else f"{dialect} names")


def _refuse_destination(options: argparse.Namespace) -> None:
    require_destination(options.destination, options.to)
    source = None if huggingface.is_address(options.checkpoint) else user_path(options.checkpoint)
    if source and source.exists() and options.destination.exists() and options.destination.samefile(source):
        raise CheckpointError(f"{options.destination} is the source itself; choose another name")


def _model_of_folder(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[SegmentationModel, dict[str, Any]]:
    """The model in an orbax folder of segjax, and the metadata to write."""
    if options.overrides or options.dialect != "auto" or options.drop or options.keep:
        raise CheckpointError(
            "an orbax folder contains a whole model and its settings; --overrides, --dialect, --drop and --keep are "
            "for PyTorch checkpoints"
        )
    model, known = model_of(checkpoint)
    if options.model not in ("auto", model.spec.name):
        raise CheckpointError(f"{options.checkpoint} holds {model.spec.name}, not {options.model}")
    if options.num_classes not in (None, model.spec.num_classes):
        raise CheckpointError(f"{options.checkpoint} has {model.spec.num_classes} classes, not {options.num_classes}")
    _log_model(model)
    return model, carried(known, checkpoint.provenance)


def _model_of(checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[SegmentationModel, dict[str, Any]]:
    """The model of a PyTorch checkpoint, and the metadata to write."""
    to_encoder = any(key_format.encoder_only for key_format in KEY_FORMATS if key_format.dialect == options.to)
    encoder_only = options.num_classes is None and to_encoder and not checkpoint.recognised.has_head
    storage = checkpoint.param_dtype
    model, metadata = model_of(
        checkpoint,
        name=options.model,
        # A decoder that is added to an encoder is not written.
        num_classes=1 if encoder_only else options.num_classes,
        drop=options.drop,
        keep=options.keep,
        dtype=jnp.promote_types(storage, jnp.float32),
        param_dtype=storage,
        **parse_overrides(options.overrides),
    )
    _log_model(model, encoder_only=encoder_only)
    return model, metadata


def _log_model(model: SegmentationModel, *, encoder_only: bool = False) -> None:
    part = "its encoder only" if encoder_only else f"{model.spec.num_classes} classes"
    parameters = parameters_of(model, encoder_only=encoder_only)
    logger.info("%s, %s, %s parameters", model.spec.name, part, f"{parameters:,}")


def _log_other_settings(model: SegmentationModel, dialect: str, *, stored: tuple[str, ...]) -> None:
    """Logs the settings in which the package of the dialect differs from this model.

    Args:
      model: The model.
      dialect: Dialect that is written.
      stored: Settings that the written checkpoint contains.
    """
    settings, key_format = settings_of(model), key_format_of(model, dialect)
    for setting, value in key_format.settings_for(model.spec.num_classes).items():
        if setting not in stored and value is not OF_VARIANT and settings[setting] != value:
            logger.info(
                "note: %s computes with %s=%s, this model with %s",
                key_format.package,
                setting,
                value,
                settings[setting],
            )


def _measure_transformers(model: SegmentationModel) -> None:
    """Logs the change of the logits of a random image with transformers' LayerNorm eps, the only difference."""
    eps = dict.fromkeys(("block_norm_eps", "patch_norm_eps"), huggingface.LAYER_NORM_EPS)
    settings = settings_of(model)
    if settings == settings | eps:
        logger.info("transformers computes with the same settings")
        return
    kinds: dict[str, Any] = dict(num_classes=model.spec.num_classes, dtype=model.dtype)
    kinds |= settings | eps | {"param_dtype": model_metadata(model)["param_dtype"]}
    values = {path: variable.get_value() for path, variable in named_variables(model).items()}
    moved = from_values(nnx.eval_shape(lambda: models.create(model.spec.name, **kinds)), values)
    image = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128, 160, model.in_channels)), jnp.float32)
    logits, others = (np.asarray(_logits(one, image)) for one in (model, moved))
    difference, largest = np.abs(logits - others).max(), np.abs(logits).max()
    logger.info("logits in transformers differ by at most %.1e (the largest is %.1f)", difference, largest)


@nnx.jit
def _logits(model: SegmentationModel, images: jax.Array) -> jax.Array:
    return model(images)[0]


def _verified(model: SegmentationModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """Compares the model with PyTorch on the checkpoint; returns the result. Raises CheckError if they differ."""
    report = _verify(model, checkpoint)
    if not report.passed:
        raise CheckError("not written, because the outputs differ")
    return {"against": report.against, "error": float(report.error)}


def _verify(model: SegmentationModel, checkpoint: Checkpoint):
    """Returns a torch_reference.verify.Report."""
    try:
        from segjax.torch_reference import verify
    except ModuleNotFoundError as error:
        raise CheckpointError(f"--verify needs {error.name}: pip install 'segjax[parity]'") from None
    report = verify.verify(model, checkpoint)
    logger.info("%s", report)
    return report
