"""Evaluation as published: logits upsampled to the label's size, argmax, one confusion matrix over all images.

    segjax evaluate RUN [--best]
    segjax evaluate CHECKPOINT --data NAME[:SPLIT] [--source DIR] [--mode slide --crop H W] ...

The first evaluates the last or the best weights of a run on its own data, with the protocol of its config.eval, in the
same way as during training; the second evaluates any checkpoint on any dataset with mmsegmentation's protocols, and
published weights, by a name of `segjax weights`, with the protocol of their published figure unless another is given.
Both write a report: index.html, and its figures next to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segjax.commands.arguments import (
    Parser,
    add_checkpoint,
    add_protocol,
    as_path,
    less_memory,
    protocol_of,
    summary_of,
    within,
)
from segjax.commands.ending import run_command
from segjax.data import specs
from segjax.runtime.console import cell, say, score
from segjax.train.constraints import BATCH


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax evaluate", description=summary_of(__doc__))
    add_checkpoint(parser, arguments, names=("--checkpoint", "--workdir"))
    parser.add_argument(
        "--data",
        metavar="NAME[:SPLIT]",
        help=f"NAME is one of {', '.join(specs.DATASETS)}, SPLIT a split or a sum of them, as in train+val; without, "
        "CHECKPOINT is a run and is evaluated on its own data",
    )
    parser.add_argument("--best", action="store_true", help="of a run: the weights of its best evaluation")
    parser.add_argument(
        "--output",
        type=as_path,
        metavar="DIR",
        help="of the report; default report/, without --data CHECKPOINT/report",
    )
    parser.add_argument("--source", nargs="+", metavar="PATH", help="what the data is prepared from at first use")
    parser.add_argument("--data-dir", metavar="DIR", help="where to; default TFDS_DATA_DIR or ~/tensorflow_datasets")
    add_protocol(parser)
    parser.add_argument(
        "--batch", type=within(BATCH), metavar="N", help="images or crops at a time; default one for each device"
    )
    parser.add_argument(
        "--corruptions",
        action="store_true",
        help="evaluate on corrupted images too: noise, blur, JPEG, brightness and contrast at five severities each, "
        "which takes 25 more evaluations",
    )
    options = parser.parse_args(arguments)
    if problems := _problems(options):
        parser.error("; ".join(problems))
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.prepare()
    return run_command(
        "segjax evaluate",
        lambda: _run(options),
        interrupted="no report was written",
        less_memory=less_memory(options) if options.data else f"give --data NAME too, and {less_memory(options)}",
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, as `evaluate_dataset` takes them."""
    return protocol_of(options) | ({} if options.batch is None else {"batch": options.batch})


def _problems(options: argparse.Namespace) -> list[str]:
    """Everything that is wrong with the options together."""
    name = (options.data or "").partition(":")[0]
    generated = specs.is_generated(name)
    stray = ", ".join(f"--{key.replace('_', '-')}" for key in _settings(options))
    wrong = {
        f"{stray}: without --data a run is evaluated as during training; give --data NAME too": (
            stray and not options.data
        ),
        f"--data is NAME or NAME:SPLIT with NAME one of {', '.join(specs.DATASETS)}, not {options.data!r}": (
            options.data and name not in specs.DATASETS
        ),
        f"{name} are generated and need neither --source nor --data-dir": (
            generated and (options.source or options.data_dir)
        ),
        "--weights: the folder of a run holds one set of weights; omit it": options.weights and not options.data,
        "--crop and --stride go with --mode slide": options.mode != "slide" and (options.crop or options.stride),
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]


def _run(options: argparse.Namespace) -> None:
    from segjax.data.sources import NoSourceError
    from segjax.inference import published_figure
    from segjax.inference.evaluate_dataset import NoDataError, evaluate_dataset

    checkpoint = options.checkpoint / "best" if options.best else options.checkpoint
    own_report = options.checkpoint / ("report-best" if options.best else "report")
    is_run = not options.data and (options.checkpoint / "checkpoints").is_dir()
    output = options.output or (own_report if is_run else Path("report"))
    say(f"evaluates {checkpoint} on {options.data or 'its own data, as during training'}")
    try:
        summary = evaluate_dataset(
            checkpoint,
            options.data,
            data_source=options.source,
            data_dir=options.data_dir,
            output=output,
            corruptions=options.corruptions,
            progress=True,
            weights=options.weights,
            **_settings(options),
        )
    except NoDataError as error:
        raise ValueError(f"{error}: --data NAME") from error
    except NoSourceError as error:
        raise ValueError(f"{error}: --source PATH") from error
    _print_table(summary)
    if "published" in summary:
        say(published_figure.compared(summary["published"], summary["mean_iou"]))
    say(f"report: {output / 'index.html'}")
    if is_run and not options.best:
        _compare_with_result(options.checkpoint / "result.json", summary)


def _print_table(summary: Mapping) -> None:
    """Figures by class, and the means, in 80 columns."""
    say("")
    say(f"{'class':<24} {'IoU':>8} {'accuracy':>9} {'precision':>10} {'Dice':>8} {'pixels':>15}")
    for entry in summary["classes"]:
        iou, accuracy, precision, dice = (score(entry[name]) for name in ("iou", "accuracy", "precision", "dice"))
        say(f"{cell(entry['class'], 24)} {iou:>8} {accuracy:>9} {precision:>10} {dice:>8} {entry['pixels']:>15,}")
    say("")
    means = ("mean_iou", "mIoU"), ("pixel_accuracy", "pixel accuracy"), ("mean_accuracy", "mean accuracy")
    line = "   ".join(f"{name} {score(summary[key])}" for key, name in means)
    say(line if summary["step"] is None else f"{line}   step {summary['step']}")
    further = ("mean_boundary_iou", "boundary IoU"), ("image_iou", "IoU per image"), ("worst_image_iou", "worst 5%")
    say("   ".join(f"{name} {score(summary[key])}" for key, name in further))
    if interval := summary["mean_iou_interval"]:
        say(f"95% interval of mIoU, by drawing the images again: {score(interval[0])} to {score(interval[1])}")
    if corrupted := summary.get("corruptions"):
        _print_corruptions(corrupted)


def _print_corruptions(corrupted: Mapping) -> None:
    """mIoU by kind and severity, and its mean."""
    say("")
    say(f"{'mIoU on corrupted images':<24} {'mean':>8}   severity 1 to 5")
    for kind, figures in corrupted["kinds"].items():
        say(f"{kind:<24} {score(figures['mean_iou']):>8}   {'  '.join(map(score, figures['severities']))}")
    relative = "" if corrupted["relative"] is None else f", {corrupted['relative']:.3f} of that without"
    say(f"mean over kinds and severities {score(corrupted['mean_iou'])}{relative}")


def _compare_with_result(result: Path, summary: Mapping) -> None:
    """Prints whether the figures are those that the training wrote."""
    from segjax.train.resume import read_result

    try:
        recorded = read_result(result)
    except FileNotFoundError:
        return
    except (ValueError, OSError) as error:
        # The evaluation itself is complete.
        say(f"not compared with the result of the training: {error}")
        return
    shared = ("mean_iou", "pixel_accuracy", "per_class_iou", "step")
    # Checkpoints of old runs do not contain their step.
    if all(recorded[key] == summary[key] for key in shared if summary[key] is not None):
        say(f"exactly as in {result} (mIoU {score(recorded['mean_iou'])})")
        return
    apart = abs((recorded["mean_iou"] or 0) - (summary["mean_iou"] or 0))
    say(
        f"NOT as in {result} (mIoU {score(recorded['mean_iou'])}, {apart:.1e} from this one); another device, or "
        "another version of jax or segjax, rounds differently"
    )
