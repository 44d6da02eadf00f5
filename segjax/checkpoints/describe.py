"""Describes the content and origin of a checkpoint, for `segjax inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from segjax.checkpoints import temperature
from segjax.checkpoints.checkpoint import Checkpoint
from segjax.checkpoints.files import read_checkpoint
from segjax.checkpoints.load import model_of
from segjax.checkpoints.metadata import classes_of
from segjax.checkpoints.state_dict import parameters_of
from segjax.data import specs
from segjax.runtime.console import NO_BREAK, one_line


def describe(source: str, *, weights: str | None = None) -> list[tuple[str, str]]:
    """Describes a checkpoint as (name, text) rows.

    Args:
      source, weights: As for `segjax.load`.

    Raises:
      CheckpointError: There is no checkpoint, or it fits no model; the message states what the file contains.
    """
    checkpoint = read_checkpoint(source, weights=weights)
    encoder_only = not checkpoint.is_orbax and not checkpoint.recognised.has_head
    model, metadata = model_of(checkpoint, num_classes=1 if encoder_only else None)
    metadata |= temperature.kept_with(source, model)
    overrides = metadata["model"]["overrides"]
    settings = ", ".join(f"{key}={_value(value)}" for key, value in sorted(overrides.items()))
    mean, std = (" ".join(f"{number:g}" for number in metadata["normalisation"][key]) for key in ("mean", "std"))
    by_default = " (ImageNet's, by default)" if model.in_channels == 3 else " (unknown: not applied)"
    default = "" if "normalisation" in checkpoint.metadata else by_default
    images = specs.ImageKind(model.in_channels, metadata.get("image_dtype"))
    size = metadata["input_size"]
    return [
        ("checkpoint", _kind(checkpoint, metadata)),
        ("model", f"{model.spec.name}, its encoder only" if encoder_only else model.spec.name),
        # A decoder that was added to an encoder does not count.
        ("parameters", f"{parameters_of(model, encoder_only=encoder_only):,}, {_dtypes(checkpoint)}"),
        ("overrides", settings or "none"),
        *([] if images == specs.ImageKind(dtype=None) else [("images", str(images))]),
        *([] if encoder_only else _classes(metadata, model.spec.num_classes)),
        ("normalisation", f"mean {mean}, deviation {std}{default}"),
        ("input size", f"{size[0]}x{size[1]} (height x width)" if size else "unknown"),
        *([("temperature", temperature.described(metadata["temperature"]))] if "temperature" in metadata else []),
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
    # Batch counters are not weights.
    dtypes = Counter(str(array.dtype) for array in checkpoint.weights.values() if array.dtype.kind != "i")
    return ", ".join(name for name, _ in dtypes.most_common())


def _value(value: object) -> str:
    # Not broken across lines.
    return (str(tuple(value)) if isinstance(value, list) else str(value)).replace(" ", NO_BREAK)


def _classes(metadata: Mapping, num_classes: int) -> Iterator[tuple[str, str]]:
    dataset = metadata.get("dataset")
    if dataset is None:
        yield "classes", f"{num_classes}, without names"
        return
    classes = classes_of(metadata, num_classes)
    if dataset.get("guessed"):
        yield "classes", f"{num_classes}, unnamed: probably those of {classes.name}, by their number"
    else:
        yield "classes", f"{num_classes}" + (f" of {classes.name}" if classes.name != "unknown" else "")
    colors = ("#" + bytes(color).hex() for color in classes.colors)
    names = (one_line(name, most=40).replace(" ", NO_BREAK) for name in classes.class_names)
    # A name and its colour stay on one line.
    entries = zip(map(str, range(len(classes.class_names))), names, colors, strict=True)
    yield "", ", ".join(map(NO_BREAK.join, entries))
    yield "ignore label", str(classes.ignore_label)


def _origin(provenance: Mapping) -> Iterator[str]:
    """Lines that describe the provenance, the nearest origin first."""
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
        # The first digits identify it; the metadata has all digits.
        yield f"sha256 {provenance['sha256'][:16]}..."
    if "weights" in provenance:
        yield f"its {provenance['weights']} weights"
    if "package" in provenance:
        yield f"read as {provenance['dialect']} ({provenance['package']})"
    if verified := provenance.get("verified"):
        yield f"verified against {verified['against']}: worst relative error {verified['error']:.1e}"
    if "made_from" in provenance:
        yield "made from:"
        yield from _origin(provenance["made_from"])
