"""Command line: what a checkpoint is, before anything is done with it.

    segjax inspect CHECKPOINT

reads whatever `segjax convert` reads: also the folder of a run, a folder of transformers, and hf:owner/name[@revision]
on the Hub. For checkpoints of other packages it shows the model that segjax would make of them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from segjax.checkpoints.checkpoint import Checkpoint
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.load import model_of
from segjax.checkpoints.metadata import classes_of
from segjax.checkpoints.state_dict import parameters_of
from segjax.commands.arguments import add_checkpoint, summary_of
from segjax.commands.ending import run_command
from segjax.runtime import environment
from segjax.runtime.console import log_to, printable

WIDTH, INDENT = 80, 15


def describe(source: str) -> list[tuple[str, str]]:
    """Rows of a name and a text.

    Raises:
      CheckpointError: there is no checkpoint, or it fits no model; the message says what is there instead.
    """
    checkpoint = read_checkpoint(source)
    encoder_only = not checkpoint.is_orbax and not checkpoint.recognised.has_head
    model, metadata = model_of(checkpoint, num_classes=1 if encoder_only else None)
    overrides = metadata["model"]["overrides"]
    settings = ", ".join(f"{key}={_value(value)}" for key, value in sorted(overrides.items()))
    mean, std = (" ".join(f"{number:g}" for number in metadata["normalisation"][key]) for key in ("mean", "std"))
    default = "" if "normalisation" in checkpoint.metadata else " (ImageNet's, by default)"
    size = metadata["input_size"]
    return [
        ("checkpoint", _kind(checkpoint, metadata)),
        ("model", f"{model.spec.name}, its encoder only" if encoder_only else model.spec.name),
        # The decoder that was made for an encoder does not count.
        ("parameters", f"{parameters_of(model, encoder_only=encoder_only):,}, {_dtypes(checkpoint)}"),
        ("overrides", settings or "none"),
        *([] if encoder_only else _classes(metadata, model.spec.num_classes)),
        ("normalisation", f"mean {mean}, deviation {std}{default}"),
        ("input size", f"{size[0]}x{size[1]} (height x width)" if size else "unknown"),
        ("licence", metadata.get("licence", "unknown")),
        ("provenance", "\n".join(_origin(metadata.get("provenance", {}))) or "unknown"),
    ]


def _kind(checkpoint: Checkpoint, metadata: Mapping) -> str:
    if not checkpoint.is_orbax:
        provenance = metadata["provenance"]
        return f"{checkpoint.source}, read as {provenance['dialect']} ({provenance['package']})"
    if "config" not in metadata:
        return f"{checkpoint.source}, a converted folder"
    reached = f", mIoU {metadata['mean_iou']:.4f}" if metadata.get("mean_iou") is not None else ""
    step = f", step {metadata['step']}" if "step" in metadata else ""
    return f"{checkpoint.source}, a run of segjax{step}{reached}"


def _dtypes(checkpoint: Checkpoint) -> str:
    # Counters of batches are no weights.
    dtypes = Counter(str(array.dtype) for array in checkpoint.weights.values() if array.dtype.kind != "i")
    return ", ".join(name for name, _ in dtypes.most_common())


def _value(value: object) -> str:
    # Never broken across lines.
    return (str(tuple(value)) if isinstance(value, list) else str(value)).replace(" ", "\0")


def _classes(metadata: Mapping, num_classes: int) -> Iterator[tuple[str, str]]:
    dataset = metadata.get("dataset")
    if dataset is None:
        yield "classes", f"{num_classes}, without names"
        return
    classes = classes_of(metadata, num_classes)
    if dataset.get("guessed"):
        yield "classes", f"{num_classes}, unnamed: a guess that they are those of {classes.name}, which has as many"
    else:
        yield "classes", f"{num_classes}" + (f" of {classes.name}" if classes.name != "unknown" else "")
    colors = ("#" + bytes(color).hex() for color in classes.colors)
    names = (name.replace(" ", "\0") for name in classes.class_names)
    # A name and its colour stay on one line.
    yield "", ", ".join(f"{k}\0{name}\0{color}" for k, (name, color) in enumerate(zip(names, colors, strict=True)))
    yield "ignored label", str(classes.ignore_label)


def _origin(provenance: Mapping) -> Iterator[str]:
    """Lines, the nearest origin first."""
    if "initial_weights" in provenance:
        if provenance["initial_weights"] is None:
            yield "trained from random weights"
            return
        yield "trained from:"
        yield from _origin(provenance["initial_weights"])
        return
    if "source" in provenance:
        yield str(provenance["source"]) + (f", step {provenance['step']}" if "step" in provenance else "")
    if "sha256" in provenance:
        # Its beginning identifies it; the metadata has all of it.
        yield f"sha256 {provenance['sha256'][:16]}..."
    if "package" in provenance:
        yield f"read as {provenance['dialect']} ({provenance['package']})"
    if verified := provenance.get("verified"):
        yield f"verified against {verified['against']}: worst relative error {verified['error']:.1e}"
    if "made_from" in provenance:
        yield "made from:"
        yield from _origin(provenance["made_from"])


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows in 80 columns, with texts next to their names."""
    lines = []
    for name, text in rows:
        settings: dict[str, Any] = dict(width=WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
        pieces = [piece for line in text.splitlines() for piece in textwrap.wrap(line, **settings)]
        lines += [f"{name if number == 0 else '':<{INDENT}}{piece}" for number, piece in enumerate(pieces)]
    return "\n".join(lines).replace("\0", " ")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="segjax inspect", description=summary_of(__doc__))
    add_checkpoint(parser, arguments)
    options = parser.parse_args(arguments)
    environment.keep_compiled_programs()
    return run_command("segjax inspect", lambda: _run(str(options.checkpoint)), interrupted="nothing was changed")


def _run(source: str) -> None:
    notes = []
    try:
        # For float64 weights; others keep their type.
        with log_to(notes.append), jax.enable_x64(True):
            rows = describe(source)
    except (KeyError, TypeError, ValueError, OSError) as error:
        if source in str(error):
            raise
        raise ValueError(f"{source}: {error.args[0] if isinstance(error, KeyError) else error}") from error
    notes = [text for text in notes if not text.startswith(_IN_ROWS)]
    rows += [("" if number else "notes", text) for number, text in enumerate(notes)]
    print(printable(table(rows)))


# Notes of the library that are in the rows, too, or that concern the decoder that is made for an encoder.
_IN_ROWS = (
    *("read as", "it names no classes", "the checkpoint does not name", "unlike"),
    *("encoder only", "the decoder is as wide", "left as initialised"),
)
