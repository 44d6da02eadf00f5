"""Predictions for images and videos: label maps, overlays, probabilities.

    python -m segjax.predict photos/ 'more/**/*.jpg' clip.mp4 \\
        --checkpoint runs/mine --output out

Everything is below DIR by kind, in the folders that it had: of trip/a.jpg in
photos/ the label map is DIR/labels/trip/a.png. Images are PNG, JPEG, BMP, TIFF
and WebP: turned upright as EXIF says, grey repeated in three channels, alpha
left out, 16 bits scaled to 8. Videos become H.264 at the times of their frames,
without sound; an odd side gets its last row or column twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from segjax.checkpoints.load import LoadedCheckpoint, load
from segjax.commands.ending import run_command
from segjax.inference import batch_run
from segjax.inference.batch_run import Job, Run
from segjax.inference.predictor import Predictor
from segjax.models.functional import FunctionalModel, params_sha256
from segjax.runtime import console, environment
from segjax.runtime.atomic import write_text
from segjax.viz import video

RECORD = "predict.json"


# -------------------------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="segjax predict",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, video, folder (with what is below), or 'pattern'"
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="X", help="workdir, orbax folder, .pth, .safetensors"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where everything goes")
    parser.add_argument(
        "--write",
        nargs="+",
        choices=batch_run.KINDS,
        default=["labels", "overlay"],
        metavar="KIND",
        help=f"of {', '.join(batch_run.KINDS)}; default labels overlay",
    )
    parser.add_argument("--mode", choices=("whole", "slide"), default="whole", help="slide: in windows, for any size")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="of a window; default 512 512")
    parser.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="default 3/4 of the crop")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="probabilities averaged")
    parser.add_argument("--flip", action="store_true", help="average with the mirror image")
    parser.add_argument(
        "--pad-multiple", type=int, default=1, metavar="N", help="pad sizes up to multiples: fewer programs"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="B",
        help="images of a size, or windows, at a time; a multiple of the devices uses them all",
    )
    parser.add_argument("--resume", action="store_true", help="leave out what is done")
    options = parser.parse_args(arguments)
    environment.prepare()
    return run_command(
        "segjax predict",
        lambda: _run(options),
        interrupted="what was written is whole. --resume goes on",
        full_disk="make room, and give the command again with --resume",
    )


def _run(options: argparse.Namespace) -> int:
    jobs, skipped = batch_run.plan(options.inputs, options.output, options.write)
    if any(job.is_video for job in jobs):
        video.pyav()
    trained = load(options.checkpoint)
    predictor = Predictor(
        trained,
        mode=options.mode,
        crop=options.crop,
        stride=options.stride,
        scales=options.scales,
        flip=options.flip,
        pad_multiple=options.pad_multiple,
        batch=options.batch,
    )
    params, batch_stats = FunctionalModel(trained.model).arrays()
    record = _record(predictor, params_sha256(params | batch_stats), options.checkpoint)
    done = _done(jobs, options.output, record) if options.resume else set()
    _describe(trained, params, predictor, jobs, skipped, len(done), options)
    if len(done) == len(jobs):
        console.say("everything is done already")
        return 0
    write_text(options.output / RECORD, json.dumps(record, indent=1) + "\n")
    run, since = Run(predictor, options.write), time.perf_counter()
    run([job for job in jobs if job.source not in done])
    _report(run, jobs, options.output, time.perf_counter() - since)
    return 1 if run.failures else 0


def _record(predictor: Predictor, sha256: str, checkpoint: Path) -> dict[str, object]:
    """What the files of an output folder were made by."""
    protocol, spec = predictor.protocol, predictor.classes
    windows = {"crop": list(protocol.crop), "stride": list(protocol.stride)} if protocol.mode == "slide" else {}
    return {
        "checkpoint": str(checkpoint),
        "weights_sha256": sha256,
        "mode": protocol.mode,
        **windows,
        "scales": list(protocol.scales),
        "flip": protocol.flip,
        "pad_multiple": predictor.pad_multiple,
        "classes": [{"name": n, "color": list(c)} for n, c in zip(spec.label_names, spec.label_colors, strict=True)],
    }


def _done(jobs: Sequence[Job], output: Path, record: dict[str, object]) -> set[Path]:
    """Inputs of which every output is there. Raises ValueError where they were made by something else."""
    path = output / RECORD
    if path.exists():
        old = json.loads(path.read_text())
        differing = [
            key for key in record.keys() | old.keys() if key != "checkpoint" and old.get(key) != record.get(key)
        ]
        if differing:
            raise ValueError(
                f"{output} was made with other {', '.join(sorted(differing))} ({path}); leave --resume out to make "
                "everything anew, or take another --output"
            )
    return {job.source for job in jobs if all(path.exists() for path in job.outputs.values())}


def _describe(trained: LoadedCheckpoint, params, predictor: Predictor, jobs, skipped: int, done: int, options) -> None:
    import jax

    spec, protocol = predictor.classes, predictor.protocol
    count = sum(array.size for array in params.values())
    origin = "" if trained.dataset else f" (the file names none; {spec.name} has as many)"
    console.say(f"checkpoint  {options.checkpoint}: {trained.model.spec.name}, {count:,} parameters")
    console.say(f"classes     {spec.num_classes} of {spec.name}{origin}")
    videos = sum(job.is_video for job in jobs)
    parts = [_counted(len(jobs) - videos, "image"), _counted(videos, "video")]
    passed = f"; {_counted(skipped, 'other file')} passed over" * bool(skipped)
    console.say(f"inputs      {', '.join(part for part in parts if part[0] != '0')}{passed}")
    if done:
        console.say(f"resuming    {done} of {len(jobs)} are done")
    mode = "images as a whole"
    if protocol.mode == "slide":
        mode = "windows of {}x{} every {}x{}".format(*protocol.crop, *protocol.stride)
    if protocol.scales != (1.0,):
        mode += f", scales {' '.join(f'{scale:g}' for scale in protocol.scales)}"
    mode += ", flipped too" * protocol.flip
    if predictor.pad_multiple > 1:
        mode += f", padded to multiples of {predictor.pad_multiple}"
    console.say(f"mode        {mode}")
    console.say(f"device      {len(jax.devices())} x {jax.devices()[0].device_kind}")
    console.say(f"output      {options.output}: {', '.join(options.write)}")
    console.say("compiling for the first size ...")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _report(run: Run, jobs: Sequence[Job], output: Path, seconds: float) -> None:
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
