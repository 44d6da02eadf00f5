"""The published mIoU of weights that are evaluated by their name: its protocol, and the comparison with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from segjax.checkpoints import published
from segjax.checkpoints.published import PublishedWeights
from segjax.checkpoints.state_dict import logger
from segjax.data.class_lists import CLASS_LISTS
from segjax.data.open import OpenSplit
from segjax.data.specs import DATASETS
from segjax.inference.engine import Protocol
from segjax.runtime.console import score

_OF_WINDOW = frozenset({"mode", "crop", "stride"})


class PublishedFigure(TypedDict):
    """A published mIoU to compare a measured one with.

    Attributes:
      mean_iou: In 0..1; None where none is published.
      source: Where it is.
      is_multi_scale: Whether it is that of several scales.
      is_same_protocol: Whether it was measured in the same way on the same split, as far as that is known.
    """

    mean_iou: float | None
    source: str
    is_multi_scale: bool
    is_same_protocol: bool


def row_of(source: object, data: str | OpenSplit | None) -> PublishedWeights | None:
    """The row of published weights that are evaluated on the dataset that they were trained on; None for all else."""
    row = published.find(source) if isinstance(source, str | os.PathLike) else None
    if row is None or data is None:
        return None
    name = data.partition(":")[0] if isinstance(data, str) else data.spec.name
    # Datasets without a reader are folders, which have any name.
    is_folder = name not in DATASETS or DATASETS[name].spec is None
    return row if name == row.dataset or (is_folder and row.dataset in CLASS_LISTS) else None


def protocol_of(row: PublishedWeights | None, given: Mapping[str, Any]) -> Protocol:
    """The settings that were given, else those of the published figure, else the defaults.

    Raises:
      ValueError: Settings that contradict each other.
    """
    own = {} if row is None else dict(row.protocol)
    if _OF_WINDOW & given.keys():
        own = {key: value for key, value in own.items() if key not in _OF_WINDOW}
    return Protocol(**{**own, **given})


def log_notes(row: PublishedWeights, data: str) -> None:
    """Logs how the published evaluation differs from the one of a dataset called `data`."""
    if row.protocol_note:
        logger.info("note: the published figure was measured otherwise: %s", row.protocol_note)
    if row.zero_label_ignored and row.dataset in CLASS_LISTS:
        logger.info(
            "note: in the published masks of %s the label 0 is ignored, and label k is class k - 1; in those of %s "
            "labels are the numbers of the classes",
            row.dataset,
            data,
        )


def figure_of(row: PublishedWeights, protocol: Protocol, split: str) -> PublishedFigure:
    """The figure to compare one measured with `protocol` with: that of several scales where it has several, or where
    no other is published.

    Args:
      split: That is evaluated; "" if it is unknown.
    """
    own, has_several = Protocol(**row.protocol), len(protocol.scales) > 1
    is_multi_scale = has_several or row.miou is None
    figure = row.miou_multi_scale if is_multi_scale else row.miou
    same_scales = has_several and protocol.flip if is_multi_scale else protocol.scales == (1.0,)
    same_flip = is_multi_scale or protocol.flip == own.flip
    # A temperature changes probabilities, and labels only where those of several passes are summed.
    temperature = protocol.temperature if protocol.passes > 1 else own.temperature
    same_rest = dataclasses.replace(protocol, scales=own.scales, flip=own.flip, temperature=temperature) == own
    same_split = row.dataset not in DATASETS or split in ("", DATASETS[row.dataset].evaluated_split)
    return PublishedFigure(
        mean_iou=None if figure is None else round(figure / 100, 6),
        source=row.figure_source,
        is_multi_scale=is_multi_scale,
        is_same_protocol=same_scales and same_flip and same_rest and same_split and not row.protocol_note,
    )


def compared(figure: PublishedFigure, measured: float | None) -> str:
    """A published figure next to a measured one, in words."""
    if figure["mean_iou"] is None:
        return "no figure is published"
    scales = " at several scales and mirrored" if figure["is_multi_scale"] else ""
    text = f"mIoU {score(figure['mean_iou'])} published{scales} ({figure['source']}), {score(measured)} here"
    if not figure["is_same_protocol"]:
        return f"{text}, with another protocol or split"
    return text if measured is None else f"{text}: {measured - figure['mean_iou']:+.4f}"
