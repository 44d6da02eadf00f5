"""Results of a benchmark, as lines and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.benchmark.runner import OURS
from segjax.runtime.reading import checked, read_json

# ------------------------------------------------------------------------------------------------------------- records


class _Failed(TypedDict):
    failed: str


class _Timed(TypedDict):
    """A timed contender. Old records have no floor."""

    name: str
    milliseconds: Annotated[list[FiniteFloat], Field(min_length=1)]
    ours_over_theirs: Annotated[list[FiniteFloat], Field(min_length=1)]
    share_of_floor: NotRequired[FiniteFloat]
    images_per_second: NotRequired[FiniteFloat]


class _Result(TypedDict):
    """A comparison. A failed one has no `dtype` and no `seconds`."""

    model: str
    mode: str
    batch: int
    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    contenders: list[dict[str, Any]]
    dtype: NotRequired[str]
    num_classes: NotRequired[int]
    seconds: NotRequired[FiniteFloat]


class _Record(TypedDict):
    device: NotRequired[str]
    results: list[_Result]


def read_record(path: Path) -> dict[str, Any]:
    """Reads the record that an earlier command wrote with --json.

    Raises:
      UnreadableError: The file is damaged or not such a record; the message names the key.
    """
    record = read_json(path, _Record)
    for number, result in enumerate(record["results"]):
        for place, row in enumerate(result["contenders"]):
            kind = _Failed if "failed" in row else _Timed
            checked(row, kind, name=f"{path}: results.{number}.contenders.{place}")
    return record


# ------------------------------------------------------------------------------------------------------------- report


def report(result: Mapping, ceiling: Mapping) -> Iterator[str]:
    """The lines of one comparison, at most 80 columns."""
    height, width = result["size"]
    what = {"infer": "inference", "train": "training step"}[result["mode"]]
    shape = f"{result['batch']}x{height}x{width}, {result['num_classes']} classes"
    timed = [row for row in result["contenders"] if "failed" not in row]
    yield f"{result['model']}, {what}, {shape}, {result['dtype']}"
    yield f"{'':<26} {'ms':>9} {'quartiles':>17} {'segjax/it':>9} {'start s':>7} {'MiB':>6}"
    for row in timed:
        middle, low, high = row["milliseconds"]
        digits = 1 if middle >= 10 else 3
        spread = f"{low:.{digits}f}..{high:.{digits}f}"
        yield (
            f"{row['name']:<26} {middle:>9.{digits}f} {spread:>17} {row['ours_over_theirs'][0]:>9.2f} "
            f"{row['compile_seconds']:>7.1f} {row['memory_bytes'] / 2**20:>6.0f}"
        )
    for row in result["contenders"]:
        if "failed" in row:
            yield row["failed"][:80]
    floor = result["floor"]
    yield (
        f"floor {floor['milliseconds']:.3g} ms: {floor['flops'] / 1e9:.3g} GFLOP and {floor['bytes'] / 1e9:.3g} GB "
        "must be done"
    )
    yield f"{'':<26} {'images/s':>9} {'GFLOP/s':>9} {'of peak':>7} {'GB/s':>8} {'of peak':>7} {'of floor':>8}"
    for row in timed:
        rates = row["flops_per_second"], row["bytes_per_second"]
        shares = rates[0] / ceiling["flops_per_second"], rates[1] / ceiling["bytes_per_second"]
        yield (
            f"{row['name']:<26} {row['images_per_second']:>9.1f} {rates[0] / 1e9:>9.0f} {shares[0]:>7.0%} "
            f"{rates[1] / 1e9:>8.1f} {shares[1]:>7.0%} {row['share_of_floor']:>8.0%}"
        )


def markdown(record: Mapping) -> Iterator[str]:
    """The table for the README: segjax's time divided by that of each contender. Rows of the same work are merged."""
    merged: dict[tuple, dict[str, Mapping]] = {}
    for result in record["results"]:
        rows = merged.setdefault((result["model"], result["mode"], result["batch"], *result["size"]), {})
        for row in result["contenders"]:
            if "failed" not in row:
                rows.setdefault(row["name"], row)
    names = list(dict.fromkeys(name for rows in merged.values() for name in rows if name != OURS))
    # Old records have no floor.
    has_floor = any("share_of_floor" in row for rows in merged.values() for row in rows.values())
    extra = ["images/s", "of the floor"] if has_floor else []
    yield "| " + " | ".join(["model", "work", "segjax, ms", *extra, *names]) + " |"
    yield "|---" * (3 + len(extra) + len(names)) + "|"
    for (model, mode, batch, height, width), rows in merged.items():
        if OURS not in rows:
            continue
        ours = rows[OURS]
        time_of_ours = ours["milliseconds"][0]
        cells = [f"`{model}`", f"{mode} {batch}x{height}x{width}"]
        cells += [f"{time_of_ours:.0f}" if time_of_ours >= 10 else f"{time_of_ours:.2f}"]
        if has_floor:
            known = "share_of_floor" in ours
            cells += [f"{ours['images_per_second']:.0f}", f"{ours['share_of_floor']:.0%}"] if known else ["", ""]
        cells += [f"{rows[name]['ours_over_theirs'][0]:.2f}" if name in rows else "" for name in names]
        yield "| " + " | ".join(cells) + " |"
