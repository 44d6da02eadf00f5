"""Command line: weights between PyTorch and segjax.

    python -m segjax.convert SRC DST [--model NAME] [--num-classes K] [--dialect auto] [--to native|hf|smp|mmseg|...]
                                     [--overrides KEY=VALUE ...] [--verify]

SRC is a `.pth`, a `.safetensors` or an orbax folder, told apart by its content; DST is one of the three by its suffix.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import checkpoint, models, runtime
from segjax.dialects import DIALECTS, OF_VARIANT
from segjax.files import read_file, write_file
from segjax.weights import CheckpointError, form_of, from_torch, logger, named_variables, to_torch


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


def _storage_dtype(source: Mapping[str, np.ndarray]) -> jnp.dtype:
    """The type of the checkpoint's weights where all share one, so that nothing is rounded; else float32."""
    kinds = {value.dtype for value in source.values() if jnp.issubdtype(value.dtype, jnp.floating)}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m segjax.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, metavar="SRC", help=".pth, .safetensors or orbax folder")
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="*.pth, *.safetensors, anything else: orbax folder"
    )
    parser.add_argument("--model", default="auto", help=f"insist on one of {', '.join(models.MODELS)}")
    parser.add_argument("--num-classes", type=int, help="needed for a backbone alone, else checked")
    parser.add_argument("--dialect", default="auto", choices=["auto", *DIALECTS], help="whose names SRC has")
    parser.add_argument("--to", choices=DIALECTS, help="whose names DST gets (.pth, .safetensors); default native")
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="settings that SRC cannot tell")
    parser.add_argument("--verify", action="store_true", help="compare with PyTorch on one image before writing")
    options = parser.parse_args(arguments)
    runtime.keep_compiled_programs()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    try:
        return _run(options)
    except (KeyError, TypeError, ValueError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) else error
        print(f"segjax.convert: {message}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    logger.info("%s -> %s", options.source, options.destination)
    if options.destination.suffix in (".pt", ".bin", ".ckpt", ".npz", ".onnx"):
        raise CheckpointError(f"{options.destination}: write *.pth or *.safetensors; a name without suffix is a folder")
    if options.destination.exists() and options.source.exists() and options.destination.samefile(options.source):
        raise CheckpointError(f"{options.destination} is the source itself; choose another name")
    is_folder = options.destination.suffix not in (".pth", ".safetensors")
    if is_folder and options.to is not None:
        raise CheckpointError(
            f"--to names the keys of a .pth or .safetensors, and {options.destination} becomes an orbax folder, which "
            "has our own; leave --to out, or choose another name"
        )
    options.to = options.to or "native"
    if options.source.is_dir() and checkpoint.holds_float64(options.source):
        jax.config.update("jax_enable_x64", True)
    source = read_file(options.source)
    about: dict[str, object] = {"source": options.source.name}
    if isinstance(source, nnx.Module):
        model, foreign = source, to_torch(source)
        if options.model not in ("auto", model.spec.name):
            raise CheckpointError(f"{options.source} holds {model.spec.name}, not {options.model}")
        if options.num_classes not in (None, model.spec.num_classes):
            raise CheckpointError(f"{options.source} has {model.spec.num_classes} classes, not {options.num_classes}")
        if options.overrides or options.dialect != "auto":
            raise CheckpointError(
                "an orbax folder says how its model was made; --overrides and --dialect are for PyTorch checkpoints"
            )
    else:
        foreign = source
        about["sha256"] = hashlib.sha256(options.source.read_bytes()).hexdigest()
        storage = _storage_dtype(foreign)
        if storage == np.float64:
            jax.config.update("jax_enable_x64", True)
        model = from_torch(
            foreign,
            name=options.model,
            dialect=options.dialect,
            num_classes=options.num_classes,
            dtype=jnp.promote_types(storage, jnp.float32),
            param_dtype=storage,
            **parse_overrides(options.overrides),
        )
    parameters = sum(variable.get_value().size for variable in _parameters(model))
    logger.info("%s, %d classes, %s parameters", model.spec.name, model.spec.num_classes, f"{parameters:,}")
    # Before the verification, so that names which cannot express this model are refused at once.
    _warn_of_settings(model, options)
    if options.verify and not _verify(model, foreign):
        print("segjax.convert: not written, because the outputs differ", file=sys.stderr)
        return 1
    write_file(options.destination, model, dialect=options.to, about=about)
    kind = f"{options.to} names" if options.destination.suffix in (".pth", ".safetensors") else "orbax folder"
    logger.info("wrote %s (%s)", options.destination, kind)
    return 0


def _parameters(model: nnx.Module) -> list[nnx.Variable]:
    return [variable for variable in named_variables(model).values() if isinstance(variable, nnx.Param)]


def _warn_of_settings(model: nnx.Module, options: argparse.Namespace) -> None:
    """Says so where the package that DST is written for computes with other settings than this model."""
    if options.destination.suffix not in (".pth", ".safetensors"):
        return
    settings = models.settings(model.spec.name) | dict(model.spec.overrides)
    form = form_of(model, options.to)
    for setting, value in form.settings:
        if value is not OF_VARIANT and settings[setting] != value:
            logger.info(
                "note: %s computes with %s=%s, this model with %s",
                form.package,
                setting,
                value,
                settings[setting],
            )


def _verify(model: nnx.Module, foreign: Mapping[str, np.ndarray]) -> bool:
    # parity/ lies in the repository, beside the package, and is not installed.
    repository = Path(__file__).resolve().parent.parent
    if not (repository / "parity" / "compare.py").exists():
        raise CheckpointError("--verify needs the repository: clone it, pip install -e '.[parity]', and run it there")
    sys.path.insert(0, str(repository))
    try:
        from parity import compare
    except ModuleNotFoundError as error:
        raise CheckpointError(f"--verify needs {error.name}: pip install -e '.[parity]'") from None
    report = compare.verify(model, foreign)
    logger.info("%s", report)
    return report.passed


if __name__ == "__main__":
    sys.exit(main())
