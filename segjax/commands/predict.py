"""Predictions for images and videos: label maps, overlays, probabilities.

    segjax predict runs/mine photos/ 'more/**/*.jpg' clip.mp4 --output out

Everything is below DIR by kind, in the folders that it had: of trip/a.jpg in
photos/ the label map is DIR/labels/trip/a.png. Images are PNG, JPEG, BMP, TIFF
and WebP: turned upright as EXIF says, grey repeated in three channels, alpha
dropped, 16 bits scaled to 8. Videos become H.264 at the times of their frames,
without sound; an odd side gets its last row or column twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segjax.commands.arguments import add_checkpoint, add_protocol, protocol_of
from segjax.commands.ending import run_command
from segjax.inference.outputs import KINDS, Job
from segjax.runtime import console
from segjax.runtime.atomic import write_text
from segjax.viz import video

if TYPE_CHECKING:
    from segjax.checkpoints.load import LoadedCheckpoint
    from segjax.inference.batch_run import Run
    from segjax.inference.predictor import Predictor


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="segjax predict",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser, arguments)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, video, folder (with everything below), or 'pattern'"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where everything goes")
    parser.add_argument(
        "--write",
        nargs="+",
        choices=KINDS,
        default=["labels", "overlay"],
        metavar="KIND",
        help=f"of {', '.join(KINDS)}; default labels overlay",
    )
    add_protocol(parser)
    parser.add_argument(
        "--pad-multiple", type=int, default=1, metavar="N", help="pad sizes up to multiples: fewer programs"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="B",
        help="images of a size, or crops, at a time; a multiple of the devices uses them all",
    )
    parser.add_argument("--resume", action="store_true", help="skip what is done")
    options = parser.parse_args(arguments)
    if options.mode != "slide" and (options.crop or options.stride):
        parser.error("--crop and --stride go with --mode slide")
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.prepare()
    return run_command(
        "segjax predict",
        lambda: _run(options),
        interrupted="the files that were written are complete; --resume continues",
        full_disk="make room, and run the command again with --resume",
    )


def _run(options: argparse.Namespace) -> int:
    from segjax.checkpoints.load import load
    from segjax.inference import batch_run
    from segjax.inference.batch_run import Run
    from segjax.inference.predictor import Predictor

    jobs, skipped = batch_run.plan(options.inputs, options.output, options.write)
    if any(job.is_video for job in jobs):
        video.pyav()
    checkpoint = load(options.checkpoint)
    settings = dict(pad_multiple=options.pad_multiple, batch=options.batch)
    predictor = Predictor(checkpoint, **protocol_of(options), **settings)
    record = batch_run.record_of(predictor, checkpoint.model, options.checkpoint)
    done = batch_run.done_before(jobs, options.output, record) if options.resume else set()
    _describe(checkpoint, predictor, jobs, skipped, len(done), options)
    if len(done) == len(jobs):
        console.say("everything is done already")
        return 0
    write_text(options.output / batch_run.RECORD, json.dumps(record, indent=1) + "\n")
    run, since = Run(predictor, options.write), time.perf_counter()
    run([job for job in jobs if job.source not in done])
    _report(run, jobs, time.perf_counter() - since)
    return 1 if run.failures else 0


def _describe(
    checkpoint: LoadedCheckpoint,
    predictor: Predictor,
    jobs: Sequence[Job],
    skipped: int,
    done: int,
    options: argparse.Namespace,
) -> None:
    import jax

    from segjax.models.functional import FunctionalModel

    classes, model = predictor.classes, checkpoint.model
    count = sum(array.size for array in FunctionalModel(model).arrays()[0].values())
    origin = "" if checkpoint.dataset else f" (the file names none; {classes.name} has as many)"
    console.say(f"checkpoint  {options.checkpoint}: {model.spec.name}, {count:,} parameters")
    console.say(f"classes     {classes.num_classes} of {classes.name}{origin}")
    videos = sum(job.is_video for job in jobs)
    parts = [_counted(len(jobs) - videos, "image"), _counted(videos, "video")]
    passed = f"; {_counted(skipped, 'other file')} skipped" * bool(skipped)
    console.say(f"inputs      {', '.join(part for part in parts if part[0] != '0')}{passed}")
    if done:
        console.say(f"resuming    {done} of {len(jobs)} are done")
    padded = f", padded to multiples of {predictor.pad_multiple}" if predictor.pad_multiple > 1 else ""
    console.say(f"mode        {predictor.protocol}{padded}")
    console.say(f"device      {len(jax.devices())} x {jax.devices()[0].device_kind}")
    console.say(f"output      {options.output}: {', '.join(options.write)}")
    console.say("compiling for the first size ...")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _report(run: Run, jobs: Sequence[Job], seconds: float) -> None:
    parts = [_counted(run.images, "image")] * bool(run.images)
    if run.videos:
        parts.append(f"{_counted(run.videos, 'video')} of {_counted(run.frames, 'frame')}")
    failed = {path for path, _ in run.failures}
    console.say(f"wrote {' and '.join(parts) or 'nothing'} in {seconds:.1f} s")
    for path in next((job.outputs.values() for job in jobs if job.source not in failed), ()):
        console.say(f"  {path}")
    if run.failures:
        console.say(f"{len(failed)} of {_counted(len(jobs), 'input')} failed:", to=sys.stderr)
        for path, reason in run.failures:
            console.say(console.filled(f"{path}: {reason}", indent="  "), to=sys.stderr)
