"""Evaluation as published: logits upsampled to the label's size, argmax, one confusion matrix over all images.

    segjax evaluate RUN [--best]
    segjax evaluate CHECKPOINT --data NAME[:SPLIT] [--source DIR] [--mode slide --crop H W] ...
    segjax evaluate FILE --reference RUN

The first evaluates the last or the best weights of a run on its own data, with the protocol of its config.eval, in the
same way as during training; the second evaluates any checkpoint on any dataset with mmsegmentation's protocols, and
published weights, by a name of `segjax weights`, with the protocol of their published figure unless another is given;
the third an exported file (.onnx, .xml of OpenVINO, .stablehlo, .pt2, .tflite) on the data of the run it came from, and
its difference from the run. All write a report: index.html, and its figures next to it.

Several processes, each started with the same command and its own --process_id, divide the images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segjax.commands.arguments import (
    CHECKPOINT,
    EXPORTED,
    Parser,
    add_checkpoint,
    add_exported,
    add_place_of_data,
    add_processes,
    add_protocol,
    add_temperature,
    as_path,
    connect,
    less_memory,
    problems_of_exported,
    problems_of_processes,
    protocol_of,
    summary_of,
    within,
)
from segjax.commands.ending import run_command
from segjax.data import specs
from segjax.inference.runtimes import exported_path
from segjax.runtime.console import cell, say, score
from segjax.train.constraints import BATCH


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax evaluate", description=summary_of(__doc__))
    takes = f"{CHECKPOINT}; {EXPORTED}"
    add_checkpoint(parser, arguments, names=("--checkpoint", "--workdir"), takes=takes)
    parser.add_argument(
        "--data",
        metavar="NAME[:SPLIT]",
        help=f"NAME is one of {', '.join(specs.DATASETS)}, SPLIT a split or a sum of them, as in train+val; without, "
        "CHECKPOINT is a run and is evaluated on its own data, or that of --reference",
    )
    add_exported(
        parser,
        "evaluated in the same way, for the difference from it; of an exported file the run it came from, which also "
        "says what the file does not: normalisation and classes. Without --data, on the data of this run",
    )
    parser.add_argument("--best", action="store_true", help="the weights of the run's best evaluation")
    parser.add_argument(
        "--output",
        type=as_path,
        metavar="DIR",
        help="folder of the report; default report/, or CHECKPOINT/report without --data",
    )
    add_place_of_data(parser)
    add_protocol(parser)
    add_temperature(parser)
    parser.add_argument(
        "--fit-temperature",
        action="store_true",
        help="fit the divisor of the logits to this split, and keep it with CHECKPOINT; of other images than those to "
        "evaluate on",
    )
    parser.add_argument(
        "--batch", type=within(BATCH), metavar="N", help="images or crops at a time; default one for each device"
    )
    parser.add_argument(
        "--corruptions",
        action="store_true",
        help="evaluate on corrupted images too: noise, blur, JPEG, brightness and contrast at five severities each, "
        "which takes 25 more evaluations",
    )
    add_processes(parser)
    options = parser.parse_args(arguments)
    if problems := _problems(options) + problems_of_exported(options) + problems_of_processes(options):
        parser.error("; ".join(problems))
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.prepare()
    return run_command(
        "segjax evaluate",
        lambda: _run(options),
        interrupted="no report was written; the same command goes on with what was counted until 30 s before",
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
        "--temperature and --fit-temperature: a temperature is either given or fitted; omit one of them": (
            options.temperature is not None and options.fit_temperature
        ),
        "--crop and --stride go with --mode slide": options.mode != "slide" and (options.crop or options.stride),
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]


def _run(options: argparse.Namespace) -> None:
    from segjax.data.sources import NoSourceError
    from segjax.inference import published_figure
    from segjax.inference.difference import compared
    from segjax.inference.evaluate_dataset import NoDataError, evaluate_dataset

    connect(options)
    checkpoint = options.checkpoint / "best" if options.best else options.checkpoint
    own_report = options.checkpoint / ("report-best" if options.best else "report")
    is_run = not options.data and (options.checkpoint / "checkpoints").is_dir()
    output = options.output or (own_report if is_run else Path("report"))
    of = "its own data" if options.reference is None else f"the data of {options.reference}"
    say(f"evaluates {checkpoint} on {options.data or f'{of}, as during training'}")
    if options.corruptions:
        say(
            "and on corrupted images, of 5 kinds at 5 severities each: 25 more evaluations, about 26 times the time "
            "of one"
        )
    try:
        summary = evaluate_dataset(
            checkpoint,
            options.data,
            data_source=options.source,
            data_dir=options.data_dir,
            reference=options.reference,
            mean=options.mean,
            std=options.std,
            output=output,
            progress=True,
            weights=options.weights,
            corruptions=options.corruptions,
            temperature=options.temperature,
            fit_temperature=options.fit_temperature,
            **_settings(options),
        )
    except NoDataError as error:
        remedy = "--data NAME, or --reference RUN to take its data" if exported_path(checkpoint) else "--data NAME"
        raise ValueError(f"{error}: {remedy}") from error
    except NoSourceError as error:
        raise ValueError(f"{error}: --source PATH") from error
    _print_table(summary)
    if "temperature" in summary:
        fitted = summary["temperature"]
        say(
            f"temperature {fitted['value']:.4g}, with which NLL is {score(fitted['nll'])} instead of "
            f"{score(fitted['nll_before'])}; --temperature fitted uses it, here and in predict and export"
        )
    if "published" in summary:
        say(published_figure.compared(summary["published"], summary["mean_iou"]))
    if "reference" in summary:
        say(compared(summary["reference"], summary))
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
    if calibration := summary.get("calibration"):
        names = {"ece": "ECE", "brier": "Brier", "nll": "NLL", "aurc": "AURC", "error_auroc": "AUROC of errors"}
        say("   ".join(f"{name} {score(calibration[key])}" for key, name in names.items()))
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
