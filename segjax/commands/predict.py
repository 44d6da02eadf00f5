"""Predictions for images and videos: label maps, overlays, probabilities.

    segjax predict runs/mine photos/ 'more/**/*.jpg' clip.mp4 --output out
    segjax predict runs/mine rtsp://camera/live --output out

Everything is below DIR by kind, in the folders that it had: of trip/a.jpg in
photos/ the label map is DIR/labels/trip/a.png. Images are PNG, JPEG, TIFF, BMP,
WebP and GIF, by their content: turned upright as EXIF says, grey repeated in
three channels, alpha dropped. Numbers of 16 bits that use less than 16 bits,
signed ones and floats need --scale. For models of other channels, or of uint16
or float32, a TIFF has all of its bands, in its numbers; so has a .npy (H, W, C).
Their overlays show the first three bands, or the first, each from its 2nd to
its 98th percentile. Videos become H.264 at the times of their
frames, without sound; an odd side gets its last row or column twice. Cameras
(/dev/video0) and http(s):// and rtsp(s):// addresses of videos are written
until they end, or until Ctrl-C.

confidence and entropy are grey PNGs: 255 times the probability of the class
that is predicted, and 255 times the entropy of the probabilities over its
largest value, log K (log 2 for a model of one class). Of GeoTIFFs they are
GeoTIFFs, where 0 is no data.

Label maps of GeoTIFFs are GeoTIFFs (needs segjax[geo]) with the CRS and the
transform, GCPs or RPCs of the input; where it has no data (nodata value, mask,
alpha 0) they have their own nodata value, the ignore label of the classes: 255,
or 65535 for more than 255 classes. With --mode slide, TIFFs of any size are
read and written in parts, in memory that does not grow. Overlays of GeoTIFFs
show every nth row and column, so that no side has more than 2048.

Several processes, each started with the same command and its own --process_id,
divide the inputs. They write to one folder, which all of them must reach.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from segjax.commands.arguments import (
    CHECKPOINT,
    EXPORTED,
    Parser,
    add_checkpoint,
    add_exported,
    add_processes,
    add_protocol,
    add_temperature,
    as_path,
    connect,
    less_memory,
    problems_of_prediction,
    problems_of_processes,
    protocol_of,
    within,
)
from segjax.commands.ending import run_command
from segjax.data.codec import MAX_PIXELS
from segjax.data.sources import listed
from segjax.inference import geotiff, planning
from segjax.inference.outputs import KINDS, Job
from segjax.runtime import console, distributed, versions
from segjax.runtime.atomic import why_not_writable
from segjax.train.constraints import BATCH, SIDE
from segjax.viz import video

if TYPE_CHECKING:
    from segjax.inference.batch_run import Run
    from segjax.inference.open_exported import Loaded
    from segjax.inference.planning import Skipped
    from segjax.inference.predictor import Predictor


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="segjax predict",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser, arguments, takes=f"{CHECKPOINT}; {EXPORTED}")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, video, folder, 'pattern', camera or address")
    parser.add_argument("--output", required=True, type=as_path, metavar="DIR", help="output folder")
    parser.add_argument(
        "--write",
        nargs="+",
        choices=KINDS,
        default=["labels", "overlay"],
        metavar="KIND",
        help=f"of {', '.join(KINDS)}; default labels overlay",
    )
    add_exported(parser, "that an exported file was made from: says what the file does not, normalisation and classes")
    add_protocol(parser)
    add_temperature(parser)
    parser.add_argument(
        "--pad-multiple", type=within(SIDE), default=1, metavar="N", help="pad sizes up to multiples: fewer programs"
    )
    parser.add_argument(
        "--batch",
        type=within(BATCH),
        metavar="B",
        help="images of a size, or crops, at a time; default one for each device",
    )
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of black and white, for images of more than 8 bits; reflectances: 0 3000, say",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"refuse larger images that are read as a whole; default {MAX_PIXELS:,}",
    )
    parser.add_argument("--resume", action="store_true", help="skip files whose outputs are complete")
    add_processes(parser)
    options = parser.parse_args(arguments)
    if problems := problems_of_prediction(options) + problems_of_processes(options):
        parser.error("; ".join(problems))
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.prepare()
    return run_command(
        "segjax predict",
        lambda: _run(options),
        interrupted="the files that were written are complete; --resume continues",
        full_disk="make room, and run the command again with --resume",
        less_memory=less_memory(options),
    )


def _run(options: argparse.Namespace) -> int:
    connect(options)
    import jax

    from segjax.checkpoints.load import load
    from segjax.inference import batch_run
    from segjax.inference.batch_run import Run
    from segjax.inference.exported_model import ExportedModel
    from segjax.inference.open_exported import opened
    from segjax.inference.predictor import Predictor

    jobs, skipped = distributed.from_lead(
        lambda: planning.plan(options.inputs, options.output, options.write, max_pixels=options.max_pixels)
    )
    # Asked before anything is computed.
    for folder in dict.fromkeys(path.parent for job in jobs for path in job.outputs.values()):
        if problem := why_not_writable(folder):
            raise ValueError(f"nothing can be written to {folder}: {problem}; choose another --output")
    if any(job.is_video for job in jobs):
        video.pyav()
    reference = None if options.reference is None else load(options.reference)
    checkpoint = opened(
        options.checkpoint, weights=options.weights, mean=options.mean, std=options.std, reference=reference
    )
    # The package of an exported file does not divide a batch among devices.
    batch = options.batch or (1 if isinstance(checkpoint.model, ExportedModel) else jax.local_device_count())
    if options.mode != "slide" and not any(job.is_video for job in jobs):
        # More than there are images would only be filled up with copies.
        batch = min(batch, _rounded_up(-(-len(jobs) // jax.process_count()), jax.local_device_count()))
    gives_labels = isinstance(checkpoint.model, ExportedModel) and checkpoint.model.output == "labels"
    if gives_labels and "probabilities" in options.write:
        raise ValueError(f"{options.checkpoint} gives labels; --write probabilities needs a file that gives scores")
    settings = dict(
        pad_multiple=options.pad_multiple,
        batch=batch,
        scale=None if options.scale is None else tuple(options.scale),
        max_pixels=options.max_pixels,
    )
    predictor = Predictor(checkpoint, **protocol_of(options), temperature=options.temperature, **settings)
    record = batch_run.record_of(predictor, checkpoint.model, options.checkpoint)
    same = {key: value for key, value in record.items() if key != "checkpoint"}
    distributed.refuse_different(same | {"write": sorted(options.write), "resume": options.resume})
    done, incomplete = distributed.from_lead(
        lambda: batch_run.done_before(jobs, options.output, record) if options.resume else (set(), {})
    )
    _describe(checkpoint, predictor, jobs, skipped, len(done), options)
    written = batch_run.Record(options.output / batch_run.RECORD, record, keeps_time=options.resume)
    run = Run(
        predictor,
        options.write,
        less_memory=less_memory(options),
        incomplete=incomplete,
        write_record=written.write,
    )
    partly = [(source, entry["reason"]) for source in done if (entry := incomplete.get(batch_run.place_of(source)))]
    if len(done) == len(jobs) and not partly:
        console.say("everything is done already")
        return 0
    since = time.perf_counter()
    remaining = [job for job in jobs if job.source not in done]
    if jax.process_count() == 1:
        run(remaining)
    else:
        # Before the first output of any process, because older outputs count as those of an earlier command.
        distributed.from_lead(run.begin)
        written.share()
        run.has_begun = True
        run(batch_run.part_of(remaining, jax.process_index(), jax.process_count()))
        distributed.wait_for_all()
        run.include(distributed.gathered(run.outcome()))
    # They would be the same again.
    run.failures += sorted(partly, key=str)
    _report(run, jobs, time.perf_counter() - since)
    return 1 if run.failures else 0


def _describe(
    checkpoint: Loaded,
    predictor: Predictor,
    jobs: Sequence[Job],
    skipped: Sequence[Skipped],
    done: int,
    options: argparse.Namespace,
) -> None:
    from segjax.inference.exported_model import ExportedModel
    from segjax.models.functional import FunctionalModel

    classes, model = predictor.classes, checkpoint.model
    if isinstance(model, ExportedModel):
        of_model = f"run by {model.runnable.package}"
    else:
        count = sum(array.size for array in FunctionalModel(model).arrays()[0].values())
        of_model = f"{count:,} parameters"
    is_guess = (checkpoint.metadata.get("dataset") or {}).get("guessed", False)
    of = f" of {classes.name}" if checkpoint.dataset or is_guess else ""
    origin = (
        "" if checkpoint.dataset else " (the file names none" + (f"; {classes.name} has as many)" if is_guess else ")")
    )
    console.say(f"checkpoint  {options.checkpoint}: {model.spec.name}, {of_model}")
    if not predictor.image_kind.is_rgb:
        drawn = " (overlays: the first three)" if predictor.image_kind.channels > 3 else ""
        console.say(f"takes       images of {predictor.image_kind}{drawn}")
    console.say(f"classes     {classes.num_classes}{of}{origin}")
    videos = sum(job.is_video for job in jobs)
    parts = [_counted(len(jobs) - videos, "image"), _counted(videos, "video")]
    console.say(f"inputs      {', '.join(part for part in parts if part[0] != '0')}")
    if skipped:
        console.say(f"skipped     {planning.reasons(skipped)}")
    if unplaced := [job.source for job in jobs if job.is_unplaced]:
        more = f" and of {len(unplaced) - 1} more" if len(unplaced) > 1 else ""
        remedy = "rasterio cannot read it" if geotiff.is_available() else "to keep it: pip install 'segjax[geo]'"
        console.say(f"GeoTIFF     the georeference of {console.one_line(unplaced[0])}{more} is lost; {remedy}")
    if done:
        console.say(f"resuming    {done} of {len(jobs)} are done")
    padded = f", padded to multiples of {predictor.pad_multiple}" if predictor.pad_multiple > 1 else ""
    console.say(f"mode        {predictor.protocol}{padded}")
    console.say(f"device      {versions.devices_in_words()}")
    console.say(f"output      {options.output}: {', '.join(options.write)}")
    console.say("compiling for the first size ...")


def _rounded_up(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


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
    if run.first_only:
        files = _counted(len(run.first_only), "file")
        has = "has" if len(run.first_only) == 1 else "have"
        names = listed(run.first_only)
        console.say(f"{files} {has} several pages or frames, of which only the first was predicted: {names}")
    if run.failures:
        console.say(f"{len(failed)} of {_counted(len(jobs), 'input')} failed:", to=sys.stderr)
        for path, reason in run.failures:
            console.say(
                console.filled(f"{console.one_line(path)}: {console.printable(reason)}", indent="  "), to=sys.stderr
            )
