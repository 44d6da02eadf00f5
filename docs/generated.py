"""Pages and tables that are made from the program and from records, so that nobody has to type them.

Commands come from their parsers, settings and published weights from their tables, and measured figures from the newest
record of their kind in benchmarks/records.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segjax import models
from segjax.__main__ import COMMANDS, main
from segjax.checkpoints.published import PublishedWeights, list_weights
from segjax.runtime.atomic import write_text
from segjax.train import constraints, schema

RECORDS = Path(__file__).parents[1] / "benchmarks" / "records"


def write(folder: Path) -> None:
    """Writes all pages and tables into the folder; a file that would not change is not touched."""
    pages = {
        "command_line.md": command_line(),
        "settings.md": settings(),
        "published_weights.md": published_weights(),
        "tables/choice.md": choice(record("speed-cpu"), record("gpu-static")),
        "tables/speed.md": speed(record("speed-cpu")),
        "tables/sizes.md": sizes(record("sizes-cpu")),
        "tables/feeding.md": feeding(record("feeding-sizes-cpu"), record("gpu-static")),
        "tables/gpu.md": gpu(record("gpu-static")),
        "tables/errors.md": errors(record("parity")),
        "tables/peers.md": peers(record("peers-b0-infer-cpu"), record("peers-b0-train-cpu"), record("b0-bf16-cpu")),
        "tables/int8.md": int8(record("int8-cpu")),
        "tables/audit.md": audit(record("audit-camvid-cpu")),
    }
    (folder / "tables").mkdir(exist_ok=True)
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text("utf-8") != text:
            write_text(path, text)


def help_of(*command: str) -> str:
    """What `segjax COMMAND --help` prints, at 80 columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return printed.getvalue().strip()


def command_line() -> str:
    """The page of all commands; each has its help as the terminal shows it."""
    lines = [
        "# Command line",
        "",
        "Every command prints this help with `--help`. The exit status is 0; 1 if a part of the work or a check",
        "failed, or after a bug; 2 for an error that you can correct; 130 or 143 after Ctrl-C or SIGTERM.",
        "`python -m segjax.convert` is the same as `segjax convert`, and so on.",
        "",
    ]
    for name, (_, summary) in COMMANDS.items():
        sentence = summary if summary.startswith("mIoU") else summary[0].upper() + summary[1:]
        lines += [f"## segjax {name}", "", f"{sentence}.", ""]
        if name == "train":
            lines += ["All settings, `--config.KEY=VALUE`, are on [a page of their own](settings.md).", ""]
        text = help_of(name).partition("\nsettings and their defaults")[0] if name == "train" else help_of(name)
        lines += ["```text", text.rstrip(), "```", ""]
        for further in ("show", "import") if name == "data" else ():
            lines += [f"### segjax data {further}", "", "```text", help_of(name, further), "```", ""]
    return "\n".join(lines)


def settings() -> str:
    """The page of all settings of a run, by section."""
    lines = [
        "# Settings of a run",
        "",
        "`--config.KEY=VALUE` of `segjax train` sets any of these. The defaults are those of a config without a",
        "recipe; a recipe changes some of them, and a run prints which. Every argument of the model's constructor is",
        "also a setting, such as `--config.model.decoder_dim=512`. `None` unsets an optional setting.",
        "",
    ]
    for section in schema.SECTIONS:
        title = section.title[0].upper() + section.title[1:]
        lines += [f"## {title} (`{section.name}`)" if section.name else f"## {title}", ""]
        for setting in section.settings:
            default = "unset" if setting.default is None else f"`{setting.default!r}`"
            allowed = "" if isinstance(setting.allowed, constraints.Text) else f" Must be {setting.allowed.words}."
            only = " Only for generated datasets." if setting.generated else ""
            text = setting.text if setting.text.endswith(".") else f"{setting.text}."
            lines += [f"`{section.key(setting)}`, default {default}", f": {_escaped(text + only + allowed)}", ""]
        if section.name == "model":
            lines += _settings_of_models()
    return "\n".join(lines)


# One model of each class, whose settings differ.
_MODELS = (
    "segformer_b0",
    "segformer_plain_b0",
    "segformer_mmseg_b0",
    "segformer_simple",
    "segformer_zuppichini",
    "hrnet_w18",
    "hrnet_w18_ocr",
    "segnext_t",
)


def _settings_of_models() -> list[str]:
    """Lines of a table with the constructor's arguments of every class of models."""
    lines = ["| model | further settings `config.model.*`, and their defaults |", "|---|---|"]
    for name in _MODELS:
        own = ", ".join(f"`{key}={value!r}`" for key, value in models.settings(name).items())
        lines.append(f"| `{name}` | {own} |")
    return [*lines, ""]


def _escaped(text: str) -> str:
    """Text in which no character is markup."""
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|$~" else char for char in text)


# ------------------------------------------------------------------------------------------------- published weights


def published_weights() -> str:
    """The page of published weights, a table for each model and dataset."""
    lines = [
        "# Published weights",
        "",
        "The names that `segjax weights` lists. mIoU is in percent, as published, at one scale; a star marks a figure",
        "of several scales. [Checkpoints](checkpoints.md) describes how they are loaded.",
        "",
    ]
    rows = [row for row in list_weights() if not row.is_encoder]
    for dataset in sorted({row.dataset for row in rows}):
        lines += [f"## {dataset}", "", "| name | crop | mIoU | licence | source |", "|---|---|---|---|---|"]
        lines += [_published_row(row) for row in rows if row.dataset == dataset]
        lines.append("")
    lines += ["## Encoders, pretrained on ImageNet", "", "| name | licence | source |", "|---|---|---|"]
    lines += [f"| `{row.name}` | {row.terms} | {row.publisher} |" for row in list_weights() if row.is_encoder]
    return "\n".join([*lines, ""])


def _published_row(row: PublishedWeights) -> str:
    figure = f"{row.miou:g}" if row.miou is not None else f"{row.miou_multi_scale or '-'}*".replace("-*", "-")
    return f"| `{row.name}` | {row.crop or '-'} | {figure} | {row.terms} | {row.publisher} |"


# ------------------------------------------------------------------------------------------------- measured figures


def record(kind: str) -> dict[str, Any]:
    """The newest record benchmarks/records/DATE-<kind>.json, with its file name as "file"."""
    path = max(RECORDS.glob(f"????-??-??-{kind}.json"))
    return {**json.loads(path.read_text("utf-8")), "file": path.name}


def _origin(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    path = f"../benchmarks/records/{found['file']}"
    return f"*{found['date']}, `{found['command']}`; {versions}. [Record]({path})*"


def speed_rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """Model, work, milliseconds of segjax, and its time over that of eager PyTorch and of torch.compile."""
    for result in found["results"]:
        rows = {row["name"]: row for row in result["contenders"] if "failed" not in row}
        ratios = [f"{rows[name]['ours_over_theirs'][0]:.2f}" for name in ("torch", "torch-compile")]
        work = {"infer": "inference", "train": "training"}[result["mode"]]
        shape = "x".join(map(str, [result["batch"], *result["size"]]))
        yield [f"`{result['model']}`", f"{work} {shape}", f"{rows['segjax']['milliseconds'][0]:.0f}", *ratios]


def speed(found: dict[str, Any]) -> str:
    """Table of time on a CPU next to PyTorch's."""
    head = ["model", "work", "segjax, ms", "over PyTorch eager", "over `torch.compile`"]
    return _table(head, speed_rows(found)) + _origin(found) + "\n"


def peers(*found: dict[str, Any]) -> str:
    """Table of SegFormer-B0's time over that of other PyTorch implementations, a row for each record."""

    def rows() -> Iterator[list[str]]:
        for each in found:
            (result,) = each["results"]
            others = {row["name"]: row for row in result["contenders"] if "failed" not in row}
            ratios = [
                f"{others[name]['ours_over_theirs'][0]:.2f}" if name in others else ""
                for name in ("torch", "torch-compile", "torch-fused")
            ]
            work = {"infer": "inference", "train": "training"}[result["mode"]]
            shape = "x".join(map(str, [result["batch"], *result["size"]]))
            dtype = "bfloat16" if "--dtype bf16" in each["command"] else "float32"
            yield [f"{work} {shape}, {dtype}", f"{others['segjax']['milliseconds'][0]:.0f}", *ratios]

    head = ["work", "segjax, ms", "over PyTorch eager", "over `torch.compile`", "over the same order of operations"]
    return _table(head, rows()) + "\n\n".join(map(_origin, found)) + "\n"


def sizes(found: dict[str, Any]) -> str:
    """Tables of time on a CPU over the size of the image, one for inference and one for training."""
    tables = []
    for mode, title in (("infer", "Inference"), ("train", "Training step")):
        # Some models take only multiples of 32. Their times stand in the column of the size that was rounded up.
        cells: dict[str, dict[tuple[int, int], str]] = {}
        columns: dict[tuple[int, int], tuple[int, int]] = {}
        for result in found["results"]:
            rows = {row["name"]: row for row in result["contenders"] if "failed" not in row}
            if result["mode"] == mode and {"segjax", "torch"} <= rows.keys():
                others = [name for name in ("torch", "torch-compile") if name in rows]
                ratios = ", ".join(f"{rows[name]['ours_over_theirs'][0]:.2f}" for name in others)
                height, width = result["size"]
                rounded = height + -height % 32, width + -width % 32
                columns[rounded] = min(columns.get(rounded, rounded), (height, width))
                time = f"{rows['segjax']['milliseconds'][0]:.0f} ({ratios})"
                cells.setdefault(result["model"], {})[rounded] = time
        order = sorted(columns, key=lambda size: size[0] * size[1])
        head = [title, *("x".join(map(str, columns[size])) for size in order)]
        rows = ([f"`{name}`", *(of_model.get(size, "-") for size in order)] for name, of_model in cells.items())
        tables.append(_table(head, rows))
    return "".join(tables) + _origin(found) + "\n"


def feeding(found: dict[str, Any], gpu: dict[str, Any]) -> str:
    """Table of the images per second that the input delivers, and table of the CPU cores that feed an H200."""
    cores, results = found["cores"], found["results"]
    head = ["images per second and core", "decoded at every use", "cut from decoded images", "in device memory"]
    ways = ("decoded", "cut", "gathered")
    delivered = ([name, *(f"{rates[way] / cores:,.0f}" for way in ways)] for name, rates in results.items())
    small = results["ADE20K, 512x512"]
    needs = []
    for row in gpu["programs"]:
        if row["mode"] == "train":
            rate = 1e3 * row["batch"] / row["ms"]
            of_cores = (f"{rate * cores / small[way]:.1f}" for way in ("decoded", "cut"))
            needs.append([f"`{row['name']}`", f"{rate:,.0f}", *of_cores])
    second = ["model", "images per second at the lower bound", "cores that decode", "cores that cut"]
    return _table(head, delivered) + _table(second, iter(needs)) + f"{_origin(found)} {_origin(gpu)}\n"


def choice(speed: dict[str, Any], gpu: dict[str, Any]) -> str:
    """Table to choose a model by: published mIoU at one scale, and the times that are known of its programs."""
    figures: dict[str, dict[str, float]] = {}
    for row in list_weights():
        if not row.is_encoder and row.miou is not None and row.dataset in ("cityscapes", "ade20k"):
            of_model = figures.setdefault(row.name.partition(".")[0], {})
            of_model[row.dataset] = max(row.miou, of_model.get(row.dataset, 0))
    inference = {row[0]: row[2] for row in speed_rows(speed) if row[1] == "inference 1x512x512"}
    training = {row["name"]: f"{row['ms']:.0f}" for row in gpu["programs"] if row["mode"] == "train"}
    head = ["model", "Cityscapes", "ADE20K", "an image on two CPU cores, ms", "a training step on an H200, ms"]
    rows = (
        [
            f"`{name}`",
            *(f"{found[key]:.1f}" if key in found else "-" for key in ("cityscapes", "ade20k")),
            inference.get(f"`{name}`", "-"),
            training.get(name, "-"),
        ]
        for name, found in figures.items()
    )
    return _table(head, rows) + f"{_origin(speed)} {_origin(gpu)}\n"


def gpu(found: dict[str, Any]) -> str:
    """Table of the training programs that XLA compiles for an H200."""
    head = ["model", "kernels", "memory traffic, GB", "temporaries, GiB", "lower bound, ms"]
    rows = (
        [
            f"`{row['name']}`",
            f"{row['kernels']:,}",
            f"{row['GB']:.0f}",
            f"{row['temporaries_GiB']:.1f}",
            f"{row['ms']:.1f}",
        ]
        for row in found["programs"]
        if row["mode"] == "train"
    )
    return _table(head, rows) + _origin(found) + "\n"


def audit(found: dict[str, Any]) -> str:
    """Table of the share of relabelled regions among the first ones, as means over the seeds of the record."""
    rankings = {
        "audit": "`segjax audit`",
        "lowest probability": "lowest mean probability of the mask's class",
        "lowest probability, from 100 pixels": "the same, without small regions",
    }
    seeds = list(found["results"].values())
    rows = (
        [title, *(f"{sum(seed[ranking][first] for seed in seeds) / len(seeds):.1%}" for first in ("50", "200"))]
        for ranking, title in rankings.items()
    )
    return _table(["ranking", "relabelled among the first 50", "first 200"], rows) + _origin(found) + "\n"


def errors(found: dict[str, Any]) -> str:
    """Table of every error that `pytest parity/` measures, with its bound."""
    head = ["quantity", "dtype", "largest error", "bound", "compared"]
    rows = (
        [row["kind"], row["dtype"], f"{row['error']:.1e}", f"{row['bound']:.0e}", row["what"]]
        for row in found["errors"]
    )
    return _table(head, rows) + _origin(found) + "\n"


def proof_rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """The README's table of what is proven: largest float64 errors of four families."""
    families = ("segformer", "hrnet", "hrnet_ocr", "segnext")
    goldens = ("segformer_nvlabs", "hrnet_official", "hrnet_ocr_official", "segnext_official")

    def worst(kind: str, *names: str) -> str:
        of_kind = [row for row in found["errors"] if row["kind"] == kind and row["dtype"] == "float64"]
        return f"{max(row['error'] for row in of_kind if row['what'].startswith(names)):.1e}"

    yield ["outputs, against the original code", *(worst("output", f"golden {name}") for name in goldens)]
    yield [
        "gradients of every parameter, against the original code",
        *(worst("gradient", f"golden {name}") for name in goldens),
    ]
    yield ["20 optimizer steps, against PyTorch", *(worst("trajectory", f"{name}, 20 steps") for name in families)]


def int8(found: dict[str, Any]) -> str:
    """Table of what INT8 changes, a row for each exported file of the record."""
    rows = (
        [
            row["model"],
            row["data"],
            row["quantised_by"],
            *(f"{100 * row[kind]['mean_iou']:.1f}" for kind in ("float32", "int8")),
            f"{row['agreement']:.1%}",
            " → ".join(f"{row[kind]['bytes'] / 2**20:.1f}" for kind in ("float32", "int8")),
        ]
        for row in found["results"]
    )
    head = ["model", "data", "quantised by", "mIoU in float32", "in INT8", "equal labels", "size, MiB"]
    return _table(head, rows) + _origin(found) + "\n"


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"
