"""Command line: what a checkpoint is, before anything is done with it.

    segjax inspect CHECKPOINT

takes whatever `segjax convert` reads: also the folder of a training, a folder of transformers, and
hf:owner/name[@revision] on the Hub. Of a foreign checkpoint it tells what segjax makes of it.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import jax
from flax import nnx

from segjax.checkpoints.files import Contents, model_of, read_checkpoint
from segjax.checkpoints.metadata import spec_of
from segjax.checkpoints.state_dict import has_classifier, named_variables, parameters_of
from segjax.commands.arguments import add_checkpoint
from segjax.commands.ending import run_command
from segjax.runtime import environment
from segjax.runtime.console import log_to, printable

WIDTH, INDENT = 80, 15


def describe(source: str) -> list[tuple[str, str]]:
    """(what, text) rows.

    Raises:
      CheckpointError: nothing that can be read, or that fits no model; says what is there instead.
    """
    contents = read_checkpoint(source)
    is_ours = isinstance(contents.weights, nnx.Module)
    alone = not is_ours and not has_classifier(contents.weights)
    model, about = model_of(contents, num_classes=1 if alone else None)
    rows = [("checkpoint", _kind(contents, about))]
    rows.append(("model", f"{model.spec.name}, its encoder alone" if alone else model.spec.name))
    # The decoder that was made up for an encoder alone does not count.
    rows.append(("parameters", f"{parameters_of(model, encoder_alone=alone):,}, {_dtypes(contents)}"))
    overrides = about["model"]["overrides"]
    rows.append(
        ("overrides", ", ".join(f"{key}={_value(value)}" for key, value in sorted(overrides.items())) or "none")
    )
    if not alone:
        rows += list(_classes(about, model.spec.num_classes))
    mean, std = (" ".join(f"{number:g}" for number in about["normalisation"][key]) for key in ("mean", "std"))
    given = "normalisation" in contents.about
    rows.append(("normalisation", f"mean {mean}, deviation {std}" + ("" if given else " (ImageNet's; it tells none)")))
    size = about["input_size"]
    rows.append(("input size", f"{size[0]}x{size[1]} (height x width)" if size else "not told"))
    rows.append(("licence", about.get("licence", "not told")))
    rows.append(("provenance", "\n".join(_origin(about.get("provenance", {}))) or "not told"))
    return rows


def _kind(contents: Contents, about: Mapping) -> str:
    if not isinstance(contents.weights, nnx.Module):
        provenance = about["provenance"]
        return f"{contents.origin}, read as {provenance['dialect']} ({provenance['package']})"
    if "config" not in about:
        return f"{contents.origin}, a converted folder"
    reached = f", mIoU {about['mean_iou']:.4f}" if about.get("mean_iou") is not None else ""
    step = f", step {about['step']}" if "step" in about else ""
    return f"{contents.origin}, a training of segjax{step}{reached}"


def _dtypes(contents: Contents) -> str:
    if isinstance(contents.weights, nnx.Module):
        arrays = [variable.get_value() for variable in named_variables(contents.weights).values()]
    else:
        # Counters of batches are no weights.
        arrays = [array for array in contents.weights.values() if array.dtype.kind != "i"]
    return ", ".join(kind for kind, _ in Counter(str(array.dtype) for array in arrays).most_common())


def _value(value: object) -> str:
    # On one line, whatever is wrapped around it.
    return (str(tuple(value)) if isinstance(value, list) else str(value)).replace(" ", "\0")


def _classes(about: Mapping, num_classes: int) -> Iterator[tuple[str, str]]:
    record = about.get("dataset")
    if record is None:
        yield "classes", f"{num_classes}, without names"
        return
    spec = spec_of(about, num_classes)
    if record.get("guessed"):
        yield "classes", f"{num_classes}, unnamed: a guess that they are those of {spec.name}, which has as many"
    else:
        yield "classes", f"{num_classes}" + (f" of {spec.name}" if spec.name != "unknown" else "")
    colors = ("#" + bytes(color).hex() for color in spec.colors)
    names = (name.replace(" ", "\0") for name in spec.class_names)
    # A name and its colour stay on one line.
    yield "", ", ".join(f"{k}\0{name}\0{color}" for k, (name, color) in enumerate(zip(names, colors, strict=True)))
    yield "ignored label", str(spec.ignore_label)


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
        # Its beginning, which tells it from others; the record has all of it.
        yield f"sha256 {provenance['sha256'][:16]}..."
    if "package" in provenance:
        yield f"read as {provenance['dialect']} ({provenance['package']})"
    if verified := provenance.get("verified"):
        yield f"verified against {verified['against']}: worst relative error {verified['error']:.1e}"
    if "made_from" in provenance:
        yield "made from:"
        yield from _origin(provenance["made_from"])


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Rows at 80 columns, their texts beside their names."""
    lines = []
    for name, text in rows:
        settings = dict(width=WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
        pieces = [piece for line in text.splitlines() for piece in textwrap.wrap(line, **settings)]
        lines += [f"{name if number == 0 else '':<{INDENT}}{piece}" for number, piece in enumerate(pieces)]
    return "\n".join(lines).replace("\0", " ")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="segjax inspect", description=__doc__.split("\n\n")[0])
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


# Notes of the library that the rows tell too, or that are of the decoder that is made up for an encoder only.
_IN_ROWS = (
    *("read as", "it names no classes", "the checkpoint does not name", "unlike"),
    *("a backbone alone", "the decoder is as wide", "left as initialised"),
)
