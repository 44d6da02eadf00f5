"""Predictions for files, folders, patterns and videos."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from segjax.checkpoints.format_version import refuse_newer, stamped
from segjax.inference.engine import labels_of
from segjax.inference.images import read_image
from segjax.inference.outputs import KINDS, Job, Prediction, VideoOutputs, save
from segjax.inference.overlapped import FAULTS, THREADS, overlapped
from segjax.inference.predictor import Predictor
from segjax.models.functional import FunctionalModel, params_sha256
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic, console
from segjax.runtime.console import ProgressBar
from segjax.viz import video

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# Pixels from which a whole image brings a hint about memory: SegFormer's attention takes 4 GiB for as many.
LARGE = 2**22
MANY_SIZES = 8  # different image sizes, at which a hint about compilation is due

# ------------------------------------------------------------------------------------------------------------- planning


def plan(inputs: Sequence[str], output: Path, kinds: Sequence[str]) -> tuple[list[Job], int]:
    """Makes a job of every image and video among files, folders and patterns.

    Args:
      inputs: paths and glob patterns, as they were given.
      output: folder of all outputs; what is in it is not read.
      kinds: keys of `KINDS`.

    Returns:
      The jobs, in the order of the inputs, and the number of files in folders that were skipped because they are
      neither images nor videos.

    Raises:
      ValueError: inputs that are missing or of another kind, and outputs that would overwrite an input or each other;
        the message lists all of them.
    """
    problems, jobs, skipped = [], {}, 0
    for given in inputs:
        files, root, passed = _files(given, output)
        skipped += passed
        if not files:
            problems.append(_nothing(given, passed))
        for file in files:
            if file.suffix.lower() not in (*IMAGES, *video.SUFFIXES):
                known = " ".join((*IMAGES, *video.SUFFIXES))
                problems.append(f"{file}: is no image or video by its suffix; those that can be read are {known}")
            else:
                job = _job(file, file.relative_to(root), output, kinds)
                jobs.setdefault(file.resolve(), job)
    problems += _collisions(list(jobs.values()))
    if problems:
        raise ValueError("nothing was done:\n" + "\n".join(f"  {line}" for line in problems))
    return list(jobs.values()), skipped


def _files(given: str, output: Path) -> tuple[list[Path], Path, int]:
    """Files of an input, the folder to which the paths of outputs are relative, and the number of skipped files."""
    path = Path(given).expanduser()
    if path.is_dir():
        root, found = path, path.rglob("*")
    elif path.exists():
        return [path], path.parent, 0
    elif glob.has_magic(given):
        parts = path.parts
        fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
        root, found = Path(*fixed), map(Path, glob.glob(str(path), recursive=True))
    else:
        return [], path, 0
    own = output.resolve()
    # Hidden files are unfinished or the system's, and files below the output folder are outputs of an earlier call.
    files = sorted(
        file
        for file in found
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and own not in file.resolve().parents
    )
    usable = [file for file in files if file.suffix.lower() in (*IMAGES, *video.SUFFIXES)]
    return usable, root, len(files) - len(usable)


def _nothing(given: str, passed: int) -> str:
    if passed:
        return f"{given}: {passed} files, of which none is an image or a video"
    if Path(given).expanduser().is_dir():
        return f"{given}: a folder without images or videos"
    return f"{given}: {'no file matches' if glob.has_magic(given) else 'there is no such file or folder'}"


def _job(file: Path, relative: Path, output: Path, kinds: Sequence[str]) -> Job:
    is_video = file.suffix.lower() in video.SUFFIXES
    suffixes = {kind: KINDS[kind][is_video] for kind in kinds}
    # A folder of frames keeps the suffix of its video: a folder of images may have the name without it.
    outputs = {
        kind: output / kind / (relative.with_suffix(suffix) if suffix else relative)
        for kind, suffix in suffixes.items()
    }
    return Job(file, outputs, is_video)


def _collisions(jobs: Sequence[Job]) -> list[str]:
    sources = {job.source.resolve(): job.source for job in jobs}
    owner, together, overwritten = {}, [], []
    for job in jobs:
        for path in job.outputs.values():
            place = path.resolve()
            if place in sources:
                overwritten.append(f"{sources[place]}: would be overwritten; choose another --output")
            if place in owner:
                together.append(f"{owner[place]} and {job.source} would both become {path}")
                break
            owner[place] = job.source
    if len(together) > 3:
        together[3:] = [f"and {len(together) - 3} more like this"]
    if together:
        together.append("give the folder that holds both, or use a command for each")
    return together + overwritten


# ------------------------------------------------------------------------------------------------------------- resuming

RECORD = "predict.json"


def record_of(predictor: Predictor, model: SegmentationModel, checkpoint: str | Path) -> dict[str, object]:
    """Metadata of an output folder, for its `RECORD`: checkpoint, protocol and classes."""
    params, batch_stats = FunctionalModel(model).arrays()
    protocol = {name: value for name, value in predictor.protocol.record().items() if name != "size_divisor"}
    labels = zip(predictor.classes.label_names, predictor.classes.label_colors, strict=True)
    return stamped(
        {
            "checkpoint": str(checkpoint),
            "weights_sha256": params_sha256(params | batch_stats),
            **protocol,
            "pad_multiple": predictor.pad_multiple,
            "classes": [{"name": name, "color": list(color)} for name, color in labels],
        }
    )


def done_before(jobs: Sequence[Job], output: Path, record: Mapping[str, object]) -> set[Path]:
    """The inputs whose outputs all exist. Raises ValueError where these were made with other weights or settings."""
    path = output / RECORD
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        refuse_newer(old, path)
        compared = (record.keys() | old.keys()) - {"checkpoint", "format_version", "segjax_version"}
        differing = [key for key in compared if old.get(key) != record.get(key)]
        if differing:
            raise ValueError(
                f"{output} was made with other {', '.join(sorted(differing))} ({path}); omit --resume to make "
                "everything anew, or choose another --output"
            )
    return {job.source for job in jobs if all(path.exists() for path in job.outputs.values())}


# ----------------------------------------------------------------------------------------------------------- predicting


class Run:
    """Predicts jobs one after the other.

    Attributes:
      failures: inputs, each with the reason why it could not be predicted.
      images, videos, frames: numbers of images, videos and frames of videos that were written.
    """

    def __init__(self, predictor: Predictor, kinds: Sequence[str]):
        self.failures: list[tuple[Path, str]] = []
        self.images = self.videos = self.frames = 0
        self._predictor, self._kinds = predictor, kinds
        self._sizes: set[tuple[int, int]] = set()
        self._warned: set[str] = set()

    def __call__(self, jobs: Sequence[Job]) -> None:
        for is_video, group in itertools.groupby(jobs, lambda job: job.is_video):
            if not is_video:
                self._predict_images(list(group))
                continue
            for job in group:
                try:
                    self._predict_video(job)
                except FAULTS as error:
                    self._failed(job, error)
        self._look_for_outputs(jobs)

    def _look_for_outputs(self, jobs: Sequence[Job]) -> None:
        """Counts an input as failed if one of its outputs was removed in the meantime."""
        failed = {source for source, _ in self.failures}
        for job in jobs:
            missing = [path for path in job.outputs.values() if not path.exists()]
            if missing and job.source not in failed:
                self.failures.append((job.source, f"{missing[0]} was written and is gone"))
                self.images -= not job.is_video
                self.videos -= job.is_video

    def _predict_images(self, jobs: Sequence[Job]) -> None:
        def write(job, image, prediction):
            for kind, path in job.outputs.items():
                save(path, kind, image, prediction, self._predictor.classes)

        def done(_):
            self.images += 1
            progress.advance()

        def failed(job, error):
            self._failed(job, error)
            progress.advance()

        with ProgressBar("", len(jobs), "images") as progress:
            overlapped(
                jobs,
                read=lambda job: read_image(job.source),
                key=lambda image: self._predictor.padded_size(image.shape),
                compute=lambda images: self._predicted(images),
                write=write,
                failed=failed,
                done=done,
                batch=self._predictor.batch,
                threads=THREADS,
            )

    def _predict_video(self, job: Job) -> None:
        def done(_):
            progress.advance()

        def failed(_, error):
            raise error

        with video.opened(job.source) as (header, frames):
            sound = "; its sound is dropped" * header.has_sound
            count = f"{header.frames} frames" if header.frames else "frames"
            console.say(f"{job.source}: {count}, {float(header.rate):g} per second{sound}")
            with (
                VideoOutputs(job, header, self._predictor.classes) as outputs,
                ProgressBar("", header.frames, "frames") as progress,
            ):
                overlapped(
                    itertools.count(),
                    read=lambda _: next(frames, None),
                    key=lambda frame: frame.image.shape,
                    compute=lambda group: self._predicted([frame.image for frame in group]),
                    write=outputs.write,
                    failed=failed,
                    done=done,
                    batch=self._predictor.batch,
                    threads=1,
                )
                written = progress
        self.videos += 1
        self.frames += written.count
        rate = f", {written.rate:.2f} per second" if written.rate else ""
        console.say(f"{job.source}: {written.count} frames done{rate}")
        for path, (height, width) in outputs.made_even.items():
            console.say(f"  {path}: H.264 needs even sides; the last row or column of {height}x{width} was repeated")

    def _predicted(self, images: list[np.ndarray]) -> list[Prediction]:
        self._advise(self._predictor.padded_size(images[0].shape))
        if "probabilities" not in self._kinds:
            return [Prediction(labels, None) for labels in self._predictor.labels(images)]
        # Labels are derived from the probabilities, so that both files agree.
        scores = self._predictor.probabilities_of(images)
        return [Prediction(labels_of(score, threshold=0.5).astype(np.uint8), score) for score in scores]

    def _advise(self, size: tuple[int, int]) -> None:
        if self._predictor.protocol.mode != "whole":
            return
        self._sizes.add(size)
        if size[0] * size[1] > LARGE and "large" not in self._warned:
            self._warned.add("large")
            console.say(
                f"images of {size[0]}x{size[1]} as a whole: some models need memory that grows with the square of the "
                "size; if there is not enough of it, use --mode slide"
            )
        if len(self._sizes) == MANY_SIZES and "sizes" not in self._warned:
            self._warned.add("sizes")
            console.say(
                f"{MANY_SIZES} image sizes so far, and each new one is compiled; --pad-multiple 32 makes them fewer, "
                "but changes some labels"
            )

    def _failed(self, job: Job, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
            raise error
        self.failures.append((job.source, _reason(error)))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "not enough memory; use --mode slide or a smaller --batch"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
