"""The table of published weights, published.csv: each row is one file that can be loaded by its name.

A name is MODEL.DATASET, with a suffix if there are several rows of this pair: size of the crop, length of the schedule,
`-small`, or the source. MODEL.imagenet is an encoder only. The columns are the attributes of `PublishedWeights`;
`settings` and `protocol` have the format KEY=VALUE; KEY=VALUE, with Python literals.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import difflib
import fnmatch
import functools
import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from segjax.checkpoints.errors import CheckpointError
from segjax.runtime import console
from segjax.runtime.reading import UnreadableError, user_path

FILE = "published.csv"
NON_COMMERCIAL = "non-commercial"


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
    """One file of published weights, with information that it does not contain itself.

    Attributes:
      name: Name for `segjax.load`, and in place of the path of a checkpoint.
      model: Name of the model in `segjax.MODELS`.
      dataset: Name of the training dataset; "" for an encoder trained on ImageNet.
      classes: Number of classes, K; None for an encoder.
      crop: Training crop, height x width in pixels; "" if it is not known.
      schedule: Length of the training.
      source: Address, https://... or hf:owner/name[@revision].
      digits: First eight digits of the sha256, if published, else "".
      miou, miou_multi_scale: Published mean IoU in percent, at a single scale and at several; None if there is none.
      figure_source: Source of both figures.
      licence: Licence as stated by the source.
      keys: Dialects that the keys may have.
      settings: Settings of the trained model, or of the trained encoder, that shapes do not contain.
      protocol: Protocol of `miou`, as arguments of `segjax.inference.engine.Protocol`; {} for an encoder.
      protocol_note: Differences of the published evaluation that `protocol` cannot express.
      zero_label_ignored: Whether label 0 of the published masks is ignored, and label k is class k - 1.
      note: Further remarks.
    """

    name: str
    model: str
    dataset: str
    classes: int | None
    crop: str
    schedule: str
    source: str
    digits: str
    miou: float | None
    miou_multi_scale: float | None
    figure_source: str
    licence: str
    keys: str
    settings: Mapping[str, Any]
    protocol: Mapping[str, Any]
    protocol_note: str
    zero_label_ignored: bool
    note: str

    @property
    def is_encoder(self) -> bool:
        """Whether the file has only an encoder, from which a training can start."""
        return not self.dataset

    @property
    def is_non_commercial(self) -> bool:
        return NON_COMMERCIAL in self.licence

    @property
    def terms(self) -> str:
        """The licence in one or two words."""
        if self.is_non_commercial:
            return NON_COMMERCIAL
        first = self.licence.partition(" ")[0].rstrip(";")
        return f"{first}, ask" if "commercial use" in self.licence else first

    @property
    def address(self) -> str:
        """The address for a browser."""
        repository, _, revision = self.source.removeprefix("hf:").partition("@")
        if not self.source.startswith("hf:"):
            return self.source
        return f"https://huggingface.co/{repository}" + (f"/tree/{revision}" if revision else "")

    @property
    def publisher(self) -> str:
        """Publisher of the file: hf:owner, github/owner, or a part of the host name."""
        if self.source.startswith("hf:"):
            return self.source.partition("/")[0]
        host, owner = self.source.split("/")[2:4]
        return f"github/{owner}" if host == "github.com" else host.split(".")[1]

    def __str__(self) -> str:
        """Name, crop, figure, protocol, licence and publisher on one line."""
        return " ".join(_cells(self))


def _cells(row: PublishedWeights) -> tuple[str, ...]:
    figure, several = (row.miou_multi_scale, "*") if row.miou is None else (row.miou, "")
    shown = "encoder" if row.is_encoder else "-" if figure is None else f"{figure:g}{several}"
    return row.name, row.crop or "-", shown, _short(row.protocol), row.terms, row.publisher


def _short(protocol: Mapping[str, Any]) -> str:
    """A protocol in few columns: "whole", or the side of the sliding window; after @, the resized short side."""
    if not protocol:
        return "-"
    how = f"slide {protocol['crop'][0]}" if protocol["mode"] == "slide" else "whole"
    return how + (f"@{protocol['base_size'][1]}" if "base_size" in protocol else "")


class WeightsList(tuple[PublishedWeights, ...]):
    """Rows of the table, printed as one line each.

    Only rows of the same model and dataset are aligned, to keep most lines within 80 columns.
    """

    def __repr__(self) -> str:
        groups = itertools.groupby(self, key=lambda row: (row.model, row.dataset))
        return "\n".join(line for _, rows in groups for line in _aligned([_cells(row) for row in rows]))

    __str__ = __repr__


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([f"{text:<{width}}" for text, width in zip(line, widths, strict=True)] for line in lines)
    return [" ".join(line).rstrip() for line in padded]


# --------------------------------------------------------------------------------------------------------- the table


@functools.cache
def table() -> Mapping[str, PublishedWeights]:
    """Rows by name, in the order of the file."""
    text = resources.files("segjax.checkpoints").joinpath(FILE).read_text(encoding="utf-8")
    return {entry["name"]: _row(entry) for entry in csv.DictReader(text.splitlines())}


def _row(entry: Mapping[str, str]) -> PublishedWeights:
    numbers = {key: float(entry[key]) if entry[key] else None for key in ("miou", "miou_multi_scale")}
    literals = {key: _literals(entry[key]) for key in ("settings", "protocol")}
    classes = int(entry["classes"]) if entry["classes"] else None
    ignored = entry["zero_label_ignored"] == "True"
    return PublishedWeights(**{**entry, **numbers, **literals, "classes": classes, "zero_label_ignored": ignored})


def _literals(text: str) -> dict[str, Any]:
    """Parses "KEY=VALUE; KEY=VALUE" into {KEY: VALUE}."""
    pairs = (pair.partition("=") for pair in text.split("; ") if pair)
    return {key: ast.literal_eval(value) for key, _, value in pairs}


def list_weights(pattern: str = "*") -> WeightsList:
    """The published weights whose name matches a pattern, in the order of the table.

    Each row prints as one line: name, size of the training crop (height x width), published mean IoU in percent (with a
    star if only that of several scales is published), protocol of the evaluation ("slide 1024" is a sliding window,
    "whole@512" resizes the short side first), licence and publisher. A row has more attributes, see
    `segjax.checkpoints.published.PublishedWeights`.

    Args:
      pattern: Shell-style pattern (`*` and `?`), or a part of a name.

    Returns:
      One row for each set of weights, at least one.

    Raises:
      ValueError: Nothing matches; the message has the nearest names.

    Example:
      >>> import segjax
      >>> [row.name for row in segjax.list_weights("segnext_*.ade20k")]
      ['segnext_t.ade20k', 'segnext_s.ade20k', 'segnext_b.ade20k', 'segnext_l.ade20k']
    """
    if not set("*?[") & set(pattern):
        pattern = f"*{pattern}*"
    found = WeightsList(row for name, row in table().items() if fnmatch.fnmatchcase(name, pattern))
    if not found:
        raise ValueError(f"no published weights match {pattern!r}; {_nearest_named(pattern.replace('*', ''))}")
    return found


def find(source: object) -> PublishedWeights | None:
    """The row with this name; None if there is none, or if a file or folder of this name exists."""
    row = table().get(str(source))
    if row is None:
        return None
    try:
        return None if user_path(str(source)).exists() else row
    except (UnreadableError, OSError):
        return None


def hint_for(source: str | Path) -> str:
    """End of a message about a missing path, with similar names of published weights; "" if there are none."""
    near = nearest(str(source))
    return f", and no published weights have this name; the nearest: {', '.join(near)}" if near else ""


def nearest(name: str) -> list[str]:
    """At most three names of the table: those that begin with `name` and a dot, or else the most similar ones."""
    if "/" in name or not name:
        return []
    same = [other for other in table() if other.startswith(f"{name}.")]
    return same[:3] or difflib.get_close_matches(name, table(), n=3, cutoff=0.72)


def _nearest_named(name: str) -> str:
    near = difflib.get_close_matches(name, table(), n=3, cutoff=0.3)
    return f"the nearest: {', '.join(near)}" if near else "`segjax weights` lists all"


def refuse_encoder(source: object) -> None:
    """Raises CheckpointError for the name of an encoder; the message states its use."""
    row = find(source)
    if row is not None and row.is_encoder:
        raise CheckpointError(
            f"{row.name}: an encoder that was trained on ImageNet, without a decoder: train from it (segjax train "
            f"--config.init.checkpoint={row.name}), or load one of {_trained(row)}"
        )


def _trained(row: PublishedWeights) -> str:
    """Names of up to three whole models, of the same architecture if there are any."""
    names = [other.name for other in table().values() if other.model == row.model and not other.is_encoder]
    names = names or [other.name for other in table().values() if not other.is_encoder]
    return console.one_line(", ".join(names[:3]))
