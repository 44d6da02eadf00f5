"""Evaluation as published: logits enlarged to the label's size, argmax, one confusion matrix over all images.

    python -m segjax.evaluate --workdir DIR [--best]
    python -m segjax.evaluate --checkpoint DIR_OR_FILE --data NAME[:SPLIT] [--source DIR] [--mode slide --crop H W] ...

The first evaluates a training's last weights, or its best ones, on its data and as the training itself does; the second
whatever segjax.convert reads, on any data set and with mmsegmentation's protocols. Both leave a report: index.html, and
the figures beside it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from segjax.commands.ending import run_command
from segjax.data import specs
from segjax.data.records import Records, records_of
from segjax.inference import evaluation
from segjax.inference.engine import Protocol, predict_labels
from segjax.inference.evaluation import Measured

PROTOCOL = ("mode", "crop", "stride", "scales", "flip", "size_divisor", "batch")


def _finish(
    measured: Measured,
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    folder: Path,
    *,
    path: Path,
    step: int | None,
    model: Mapping[str, object],
    split: str,
    protocol: Protocol,
) -> dict[str, object]:
    """Writes the report and prints the table.

    Args:
      path, step, model: of the weights; how to build their model, as a checkpoint records it.
    """
    from segjax.runtime import console
    from segjax.viz import report

    records, predicted = records_of(data), measured.predicted
    worst = [report.Shown(records.names[number], *records[number], predicted[number]) for _, number in measured.worst]
    facts = {
        "checkpoint": str(path) if step is None else f"{path}, step {step}",
        "data": f"{spec.name} {split}, {len(records)} images, {spec.num_classes} classes",
        "protocol": str(protocol),
    }
    about = {
        "checkpoint": str(path),
        "step": step,
        "model": model,
        "data": {"name": spec.name, "split": split, "images": len(records)},
        "protocol": protocol.record(),
    }
    title = f"{model['name']} on {spec.name} {split}"
    report.write(folder, measured.confusion, spec, worst, title=title, facts=facts, about=about)
    summary = report.summarise(measured.confusion, spec)
    _table(summary, step)
    console.say(f"report: {folder / 'index.html'}")
    return summary


def _table(summary: Mapping, step: int | None) -> None:
    """Figures by class, and the means, in 80 columns."""
    from segjax.runtime.console import say, score

    say("")
    say(f"{'class':<24} {'IoU':>8} {'accuracy':>9} {'precision':>10} {'Dice':>8} {'pixels':>15}")
    for entry in summary["classes"]:
        iou, accuracy, precision, dice = (score(entry[name]) for name in ("iou", "accuracy", "precision", "dice"))
        say(f"{entry['class']:<24.24} {iou:>8} {accuracy:>9} {precision:>10} {dice:>8} {entry['pixels']:>15,}")
    say("")
    means = ("mean_iou", "mIoU"), ("pixel_accuracy", "pixel accuracy"), ("mean_accuracy", "mean accuracy")
    line = "   ".join(f"{name} {score(summary[key])}" for key, name in means)
    say(line if step is None else f"{line}   step {step}")


def _refuse_unwritable(folder: Path) -> None:
    """Before hours are spent on what could not be written there."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"the report cannot go to {folder}: {there} is a file; choose another --output")
    if not os.access(there, os.W_OK):
        raise ValueError(f"the report cannot go to {folder}: {there} cannot be written to; choose another --output")


# ------------------------------------------------------------------------------------------------------ of a training


def evaluate_run(workdir: Path, *, best: bool, output: Path | None = None) -> dict[str, object]:
    """Evaluates what a training has saved, as the training itself does, prints the table and writes the report.

    Args:
      output: of the report; `workdir`/report or report-best unless given.

    Returns:
      `report.summarise`, and "step".

    Raises:
      CheckpointError: there is nothing saved, or it is damaged. ValueError: its data cannot be used.
    """
    from segjax.runtime import console

    source = workdir / "best" if best else workdir
    console.say(f"evaluates {source}, on its own data and as its training does")

    from segjax.checkpoints import orbax_folder
    from segjax.data.augment import normalise
    from segjax.models.functional import FunctionalModel
    from segjax.runtime.parallel import JitParallel

    config = orbax_folder.load_metadata(source).get("config")
    if not config:
        raise ValueError(f"{workdir} is no folder of a training; evaluate it with --checkpoint {workdir} --data NAME")
    folder = output or workdir / ("report-best" if best else "report")
    _refuse_unwritable(folder)
    # Of the settings only what evaluation needs: those of an older run may lack others.
    model, about = orbax_folder.load_model_and_metadata(source, dtype=jnp.dtype(config["model"]["dtype"]))
    split, step = config["data"]["eval_split"], about.get("step")
    data, spec = _load(config["data"]["name"], split, config["data"]["source"], config["data"]["dir"], config)
    parallel, skeleton = JitParallel(), FunctionalModel(model)
    arrays = parallel.replicate(skeleton.arrays())
    predict = partial(parallel.compile_eval(partial(predict_labels, skeleton, normalise=normalise)), *arrays)
    of = "" if step is None else f"step {step} "
    console.say(f"evaluating {of}on {len(records_of(data))} images ({split}) ...")
    measured = evaluation.measure(predict, data, spec, batch_size=config["eval"]["batch"])
    summary = _finish(
        measured,
        data,
        spec,
        folder,
        path=source,
        step=step,
        model=about["model"],
        split=split,
        protocol=Protocol(),
    )
    return summary | {"step": step}


def _compare_with_result(workdir: Path, summary: Mapping) -> None:
    from segjax.runtime import console

    result = workdir / "result.json"
    if result.exists():
        recorded = json.loads(result.read_text())
        shared = ("mean_iou", "pixel_accuracy", "per_class_iou", "step")
        # Records of old runs do not say their step.
        same = all(recorded[key] == summary[key] for key in shared if summary[key] is not None)
        score = console.score(recorded["mean_iou"])
        if same:
            console.say(f"exactly what {result} says (mIoU {score})")
            return
        apart = abs((recorded["mean_iou"] or 0) - (summary["mean_iou"] or 0))
        console.say(
            f"NOT what {result} says (mIoU {score}, {apart:.1e} from this one); another device, or another version of "
            "jax or segjax, rounds otherwise"
        )


# --------------------------------------------------------------------------------------------------- of any checkpoint


def evaluate_checkpoint(
    path: Path,
    name: str,
    split: str,
    *,
    source: list[str] | None,
    data_dir: str | None,
    protocol: Protocol,
    batch: int | None,
    output: Path,
) -> dict[str, object]:
    """Evaluates the model of `path` on a data set, prints the table and writes the report.

    Args:
      batch: images at a time, or windows of one image; a device's one unless given.

    Returns:
      `report.summarise`.

    Raises:
      CheckpointError: no model can be read from `path`. ValueError: settings or data that cannot be used, or
      classes that are not those of the model.
    """
    from segjax.checkpoints import state_dict
    from segjax.checkpoints.load import load
    from segjax.inference.engine import Inference
    from segjax.runtime import console

    console.say(f"evaluates {path} on {name} {split}: {protocol}")
    _refuse_unwritable(output)
    trained = load(path)
    model, about = trained.model, trained.metadata
    data, spec = _load(name, split, source, data_dir, about.get("config"))
    _refuse_other_classes(path, trained, spec)
    count, batch = len(records_of(data)), batch or jax.local_device_count()
    console.say(f"model    {model.spec.name}, {model.spec.num_classes} classes")
    console.say(f"data     {spec.name} {split}, {count} images")
    if not trained.dataset:
        console.say(f"  the checkpoint does not name its classes: they are taken to be those of {spec.name}, in order")
    console.say(f"device   {jax.local_device_count()} x {jax.devices()[0].device_kind}")
    console.say(f"report   {output}")
    console.say("compiling; each size of image takes its time once ...")
    inference = Inference(model, protocol, batch=batch, normalise=trained.normalise)
    # Windows of one image make a batch, or whole images do.
    batch_size = batch if protocol.mode == "whole" else 1
    measured = evaluation.measure(inference.labels, data, spec, batch_size=batch_size)
    return _finish(
        measured,
        data,
        spec,
        output,
        path=path,
        step=about.get("step"),
        model=state_dict.model_metadata(model),
        split=split,
        protocol=protocol,
    )


def _load(
    name: str, split: str, source: list[str] | None, data_dir: str | None, config: Mapping | None
) -> tuple[specs.Split | Records, specs.DatasetSpec]:
    """A split with labels. Of a generated dataset, it has the images of the training with this `config`, if any."""
    from segjax.data.open import open_splits
    from segjax.runtime import console

    generated = {}
    if config and config["data"]["name"] == name and specs.DATASETS[name].kind == "generated":
        run = config["data"]
        only_trained_on = split == run["train_split"] != run["eval_split"]
        number = run["train_images"] if only_trained_on else run["eval_images"]
        generated = dict(num_images=[number], size=tuple(run["size"]), seed=config["seed"])
    (opened,) = open_splits(name, [split], source=source, data_dir=data_dir, say=console.say, **generated)
    return opened.data, opened.spec


def _refuse_other_classes(path: Path, trained, spec: specs.DatasetSpec) -> None:
    from segjax.data.sources import listed
    from segjax.runtime import console

    own, recorded = trained.model.spec.num_classes, trained.dataset
    of = f" of {recorded['name']}" if recorded else ""
    if own != spec.num_classes:
        raise ValueError(
            f"{path} tells {own} classes{of} apart, and {spec.name} has {spec.num_classes}: no figure would mean "
            "anything; choose the data set that it was trained on"
        )
    names = tuple(recorded["class_names"]) if recorded else spec.class_names
    if differing := [
        f"{k} is {mine!r}, not {theirs!r}"
        for k, (mine, theirs) in enumerate(zip(names, spec.class_names, strict=True))
        if mine.strip().casefold() != theirs.casefold()
    ]:
        if len(differing) <= own / 4:
            # Packages spell a few classes in their own ways.
            console.say(f"  classes that the checkpoint calls otherwise: {listed(differing)}")
            return
        raise ValueError(
            f"the classes of {path}{of} are not those of {spec.name}: {listed(differing)}; choose the data set "
            "that it was trained on, or one with the same classes in the same order"
        )


# -------------------------------------------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="segjax evaluate", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=Path, metavar="DIR", help="folder of a training, on its own data")
    what.add_argument("--checkpoint", type=Path, metavar="PATH", help="whatever segjax.convert reads; with --data")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="of the report; default report/, DIR/report of a run"
    )
    run = parser.add_argument_group("with --workdir")
    run.add_argument("--best", action="store_true", help="the weights of its best evaluation, not the last ones")
    data = parser.add_argument_group("with --checkpoint")
    data.add_argument("--data", metavar="NAME[:SPLIT]", help=f"one of {', '.join(specs.DATASETS)}")
    data.add_argument("--source", nargs="+", metavar="PATH", help="what the data is prepared from at first use")
    data.add_argument("--data-dir", metavar="DIR", help="where to; default TFDS_DATA_DIR or ~/tensorflow_datasets")
    data.add_argument("--mode", choices=("whole", "slide"), help="whole images (default), or windows")
    data.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="windows of slide; default 512 512")
    data.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="between them; default 3/4 of a window")
    data.add_argument("--scales", type=float, nargs="+", metavar="S", help="of the image; default 1")
    data.add_argument("--flip", action="store_true", default=None, help="beside each scale its mirror image")
    data.add_argument("--size-divisor", type=int, metavar="N", help="resize on to multiples of N (AlignedResize)")
    data.add_argument("--batch", type=int, metavar="N", help="images or windows at a time; default one a device")
    return parser


def _problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the options together."""
    of_checkpoint = ("data", "source", "data_dir", *PROTOCOL)
    stray = [f"--{name.replace('_', '-')}" for name in of_checkpoint if getattr(options, name) is not None]
    if options.workdir:
        what = "--workdir evaluates as the training does; for another protocol or data: --checkpoint DIR --data NAME"
        return [f"{', '.join(stray)}: {what}"] if stray else []
    name = (options.data or "").partition(":")[0]
    wrong = {
        "--best goes with --workdir; to evaluate such weights here: --checkpoint WORKDIR/best": options.best,
        "--checkpoint needs --data NAME[:SPLIT]": not options.data,
        f"--data is NAME or NAME:SPLIT with NAME one of {', '.join(specs.DATASETS)}, not {options.data!r}": (
            options.data and name not in specs.DATASETS
        ),
        f"{name} are drawn and need neither --source nor --data-dir": (
            name in specs.DATASETS and specs.DATASETS[name].kind == "generated" and (options.source or options.data_dir)
        ),
        "--crop and --stride go with --mode slide": options.mode != "slide" and (options.crop or options.stride),
        f"--batch is at least 1, not {options.batch}": options.batch is not None and options.batch < 1,
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]


def _protocol(options: argparse.Namespace) -> Protocol:
    given = {name: getattr(options, name) for name in PROTOCOL[:-1] if getattr(options, name) is not None}
    if options.crop and not options.stride:
        given["stride"] = [max(1, side * 3 // 4) for side in options.crop]
    return Protocol(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def main(arguments: list[str] | None = None) -> int:
    from segjax.runtime import environment

    parser = _parser()
    options = parser.parse_args(arguments)
    if problems := _problems(options):
        parser.error("; ".join(problems))
    environment.prepare()
    return run_command("segjax evaluate", lambda: _run(options), interrupted="no report was written")


def _run(options: argparse.Namespace) -> None:
    if options.workdir:
        summary = evaluate_run(options.workdir, best=options.best, output=options.output)
        if not options.best:
            _compare_with_result(options.workdir, summary)
        return
    name, _, split = options.data.partition(":")
    evaluate_checkpoint(
        options.checkpoint,
        name,
        split or specs.DATASETS[name].evaluated_split,
        source=options.source,
        data_dir=options.data_dir,
        protocol=_protocol(options),
        batch=options.batch,
        output=options.output or Path("report"),
    )
