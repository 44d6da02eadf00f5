"""Command line: weights between PyTorch and segjax.

    segjax convert CHECKPOINT DST [--model NAME] [--num-classes K] [--dialect auto] [--to native|hf|smp|mmseg|...]
                                  [--overrides KEY=VALUE ...] [--verify]

CHECKPOINT is a `.pth`, a `.safetensors`, an orbax folder, a folder of transformers or hf:owner/name[@revision] on the
Hub, told apart by its content. DST is a `.pth` or `.safetensors` by its suffix; else an orbax folder, or with --to hf a
folder that transformers loads. Class names, normalisation and origin go with the weights, except into a `.pth`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import models
from segjax.checkpoints import huggingface, metadata, orbax_folder
from segjax.checkpoints.files import model_of, provenance_of, read_checkpoint, write_file
from segjax.checkpoints.key_maps import DIALECTS, FORMS, OF_VARIANT
from segjax.checkpoints.state_dict import (
    CheckpointError,
    form_of,
    from_values,
    has_classifier,
    logger,
    model_record,
    named_variables,
    parameters_of,
    to_torch,
)
from segjax.commands.arguments import add_checkpoint, overrides_at_fault, parse_overrides
from segjax.commands.ending import CheckError, run_command
from segjax.runtime import environment


def _storage_dtype(source: Mapping[str, np.ndarray]) -> jnp.dtype:
    """The type of the checkpoint's weights where all share one, so that nothing is rounded; else float32."""
    kinds = {value.dtype for value in source.values() if jnp.issubdtype(value.dtype, jnp.floating)}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="segjax convert", description=__doc__.split("\n\n")[0])
    add_checkpoint(parser, arguments)
    parser.add_argument("destination", type=Path, metavar="DST", help="*.pth, *.safetensors, anything else: a folder")
    parser.add_argument("--model", default="auto", help=f"insist on one of {', '.join(models.MODELS)}")
    parser.add_argument("--num-classes", type=int, help="needed for a backbone only, else checked")
    parser.add_argument("--dialect", default="auto", choices=["auto", *DIALECTS], help="whose names CHECKPOINT has")
    parser.add_argument(
        "--to", choices=DIALECTS, help="whose names DST gets, default native; of folders hf is one for transformers"
    )
    parser.add_argument(
        "--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="settings that CHECKPOINT does not tell"
    )
    parser.add_argument("--verify", action="store_true", help="compare with PyTorch on one image before writing")
    options = parser.parse_args(arguments)
    environment.keep_compiled_programs()

    def run() -> None:
        with overrides_at_fault(options.overrides):
            _run(options)

    return run_command("segjax convert", run)


def _run(options: argparse.Namespace) -> None:
    logger.info("%s -> %s", options.checkpoint, options.destination)
    if options.destination.suffix in (".pt", ".bin", ".ckpt", ".npz", ".onnx"):
        raise CheckpointError(f"{options.destination}: write *.pth or *.safetensors; a name without suffix is a folder")
    place, origin = huggingface.fetched(options.checkpoint)
    if options.destination.exists() and place.exists() and options.destination.samefile(place):
        raise CheckpointError(f"{options.destination} is the source itself; choose another name")
    is_folder = options.destination.suffix not in (".pth", ".safetensors")
    if is_folder and options.to not in (None, "hf"):
        raise CheckpointError(
            f"--to names the keys of a .pth or .safetensors, and {options.destination} becomes a folder: an orbax "
            "folder, which has our own, or with --to hf one for transformers; leave --to out, or choose another name"
        )
    options.to = options.to or "native"
    if place.is_dir() and not huggingface.is_folder(place) and orbax_folder.holds_float64(place):
        jax.config.update("jax_enable_x64", True)
    # Of a repository this commit, whatever happens there in between.
    contents = read_checkpoint(origin if huggingface.is_address(origin) else options.checkpoint)
    num_classes = options.num_classes
    if isinstance(contents.weights, nnx.Module):
        model, about = model_of(contents)
        about = {key: about[key] for key in metadata.LASTING if key in about} | {"provenance": provenance_of(contents)}
        foreign = to_torch(model)
        if options.model not in ("auto", model.spec.name):
            raise CheckpointError(f"{options.checkpoint} holds {model.spec.name}, not {options.model}")
        if options.num_classes not in (None, model.spec.num_classes):
            raise CheckpointError(
                f"{options.checkpoint} has {model.spec.num_classes} classes, not {options.num_classes}"
            )
        if options.overrides or options.dialect != "auto":
            raise CheckpointError(
                "an orbax folder says how its model was made; --overrides and --dialect are for PyTorch checkpoints"
            )
    else:
        foreign = contents.weights
        storage = _storage_dtype(foreign)
        if storage == np.float64:
            jax.config.update("jax_enable_x64", True)
        to_encoder = any(form.encoder_only for form in FORMS if form.dialect == options.to)
        if num_classes is None and to_encoder and not has_classifier(foreign, dialect=options.dialect):
            # The decoder that is made for it is left out again.
            num_classes = 1
        model, about = model_of(
            contents,
            name=options.model,
            dialect=options.dialect,
            num_classes=num_classes,
            dtype=jnp.promote_types(storage, jnp.float32),
            param_dtype=storage,
            **parse_overrides(options.overrides),
        )
    left_out = num_classes != options.num_classes
    parameters = f"{parameters_of(model, encoder_alone=left_out):,} parameters"
    kind = "its encoder alone" if left_out else f"{model.spec.num_classes} classes"
    logger.info("%s, %s, %s", model.spec.name, kind, parameters)
    # Before the verification, so that names which cannot express this model are refused at once.
    if not is_folder or options.to == "hf":
        _warn_of_settings(model, options.to, told=("num_heads",) if is_folder else ())
    if options.verify:
        report = _verify(model, foreign)
        if not report.passed:
            raise CheckError("not written, because the outputs differ")
        about["provenance"] |= {"verified": {"against": report.against, "error": float(report.error)}}
    if is_folder and options.to == "hf":
        _measure_transformers(model)
    write_file(options.destination, model, dialect=options.to, about=about)
    if options.destination.suffix == ".pth" and "dataset" in about:
        logger.info("note: a .pth holds weights alone; .safetensors keeps class names and more")
    folder = "a folder for transformers" if options.to == "hf" else "orbax folder"
    logger.info("wrote %s (%s)", options.destination, folder if is_folder else f"{options.to} names")


def _warn_of_settings(model: nnx.Module, dialect: str, *, told: tuple[str, ...]) -> None:
    """Says so where the package that DST is written for computes with other settings than this model.

    Args:
      told: settings that stand in DST.
    """
    settings = models.settings(model.spec.name) | dict(model.spec.overrides)
    form = form_of(model, dialect)
    for setting, value in form.settings:
        if setting not in told and value is not OF_VARIANT and settings[setting] != value:
            logger.info(
                "note: %s computes with %s=%s, this model with %s",
                form.package,
                setting,
                value,
                settings[setting],
            )


def _measure_transformers(model: nnx.Module) -> None:
    """Says how far the logits of one random image move under the LayerNorm eps of transformers, all that can differ."""
    theirs = dict.fromkeys(("block_norm_eps", "patch_norm_eps"), huggingface.LAYER_NORM_EPS)
    settings = models.settings(model.spec.name) | dict(model.spec.overrides)
    if settings == settings | theirs:
        logger.info("transformers computes with the same settings")
        return
    kinds = dict(num_classes=model.spec.num_classes, dtype=model.dtype, param_dtype=model_record(model)["param_dtype"])
    values = {path: variable.get_value() for path, variable in named_variables(model).items()}
    moved = from_values(nnx.eval_shape(lambda: models.create(model.spec.name, **kinds, **settings | theirs)), values)
    image = np.random.default_rng(0).standard_normal((1, 128, 160, 3)).astype(np.float32)
    logits, others = (np.asarray(_logits(one, image)) for one in (model, moved))
    difference, largest = np.abs(logits - others).max(), np.abs(logits).max()
    logger.info("logits in transformers differ by at most %.1e (the largest is %.1f)", difference, largest)


@nnx.jit
def _logits(model: nnx.Module, images: jax.Array) -> jax.Array:
    return model(images)[0]


def _verify(model: nnx.Module, foreign: Mapping[str, np.ndarray]):
    """-> torch_reference.verify.Report."""
    try:
        from segjax.torch_reference import verify
    except ModuleNotFoundError as error:
        raise CheckpointError(f"--verify needs {error.name}: pip install 'segjax[parity]'") from None
    report = verify.verify(model, foreign)
    logger.info("%s", report)
    return report
