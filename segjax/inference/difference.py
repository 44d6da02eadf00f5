"""The difference of an evaluation from that of the checkpoint that an exported file was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from segjax.inference.engine import Protocol
from segjax.runtime.console import score


class Reference(TypedDict):
    """The figures to compare measured ones with.

    Attributes:
      source: Name of the checkpoint, or "its export" where the file itself has the figure.
      mean_iou: MIoU of the checkpoint, in 0..1; None if no pixel counts.
      difference: Measured mIoU minus this one; None if one is missing.
      per_class_iou: IoU of each class; None where it is not known.
      is_same_protocol: Whether both were measured in the same way.
    """

    source: str
    mean_iou: float | None
    difference: float | None
    per_class_iou: Sequence[float | None] | None
    is_same_protocol: bool


def evaluated(source: str, summary: Mapping[str, Any], measured: Mapping[str, Any]) -> Reference:
    """The reference on the same images with the same protocol, from the summary of its evaluation."""
    return Reference(
        source=source,
        mean_iou=summary["mean_iou"],
        difference=_difference(measured["mean_iou"], summary["mean_iou"]),
        per_class_iou=summary["per_class_iou"],
        is_same_protocol=True,
    )


def recorded(
    metadata: Mapping[str, Any], measured: Mapping[str, Any], *, data: str, protocol: Protocol
) -> Reference | None:
    """The reference that a file's own metadata name; None where there is none on this data.

    Args:
      metadata: Metadata of the opened file.
      measured: Summary of its evaluation.
      data: "NAME:SPLIT" of the evaluation.
      protocol: Protocol of the evaluation.
    """
    known = metadata.get("evaluated")
    if known is None or known["data"] != data:
        return None
    try:
        is_same = Protocol.of(known["protocol"]) == protocol
    except (TypeError, ValueError):
        is_same = False
    figure = known["mean_iou"]
    difference = _difference(measured["mean_iou"], figure)
    return Reference(
        source="its export", mean_iou=figure, difference=difference, per_class_iou=None, is_same_protocol=is_same
    )


def _difference(measured: float | None, figure: float | None) -> float | None:
    return None if measured is None or figure is None else measured - figure


def compared(reference: Reference, summary: Mapping[str, Any]) -> str:
    """A reference next to the summary of an evaluation, in words, with the class that lost most."""
    text = f"mIoU {score(reference['mean_iou'])} of {reference['source']}, {score(summary['mean_iou'])} here"
    if not reference["is_same_protocol"]:
        return f"{text}, with another protocol"
    if reference["difference"] is not None:
        text = f"{text}: {reference['difference']:+.4f}"
    losses = [
        (other - entry["iou"], entry["class"])
        for entry, other in zip(summary["classes"], reference["per_class_iou"] or (), strict=False)
        if entry["iou"] is not None and other is not None
    ]
    most, name = max(losses, default=(0.0, ""))
    return f"{text}; most in {name}, {-most:+.4f}" if most >= 5e-5 else text
