"""Predictions for files, folders, patterns and videos."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segjax.checkpoints.format_version import refuse_newer, stamped
from segjax.data import codec, specs
from segjax.inference.engine import labels_of
from segjax.inference.images import read_image
from segjax.inference.overlapped import FAULTS, THREADS, overlapped
from segjax.inference.predictor import Predictor
from segjax.models.functional import FunctionalModel, params_sha256
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic, console
from segjax.runtime.console import ProgressBar
from segjax.viz import overlay, video
from segjax.viz.pictures import colourise

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
# What each kind becomes, for an image and for a video; a video without a suffix is a folder of its frames.
KINDS = {
    "labels": (".png", ""),
    "overlay": (".jpg", ".mp4"),
    "sidebyside": (".jpg", ".mp4"),
    "probabilities": (".npz", ""),
}
DRAWN = {"overlay": overlay.over, "sidebyside": overlay.beside}
FRAME_SUFFIX = {"labels": ".png", "probabilities": ".npz"}
# From here on memory is worth a word: SegFormer's attention takes 4 GiB for as many pixels.
LARGE = 2**22
LARGEST_JPEG = 65500  # pixels a side
MANY_SIZES = 8  # of images, each of which is compiled for


class Job(NamedTuple):
    """An input, and where each kind of output goes."""

    source: Path
    outputs: dict[str, Path]
    is_video: bool


# ------------------------------------------------------------------------------------------------------------- planning


def plan(inputs: Sequence[str], output: Path, kinds: Sequence[str]) -> tuple[list[Job], int]:
    """The jobs of files, folders and patterns, in their order, and how many files in folders are none.

    Raises:
      ValueError: everything that is wrong with them: missing, of another kind, or in each other's place.
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
                problems.append(f"{file}: of the suffixes {known} it has none")
            else:
                job = _job(file, file.relative_to(root), output, kinds)
                jobs.setdefault(file.resolve(), job)
    problems += _collisions(list(jobs.values()))
    if problems:
        raise ValueError("nothing was done:\n" + "\n".join(f"  {line}" for line in problems))
    return list(jobs.values()), skipped


def _files(given: str, output: Path) -> tuple[list[Path], Path, int]:
    """Files that an input stands for, what their outputs' folders are relative to, and how many were passed over."""
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
    # What is hidden is unfinished or the system's; what is below the output folder was written by an earlier call.
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
    return f"{given}: {'no file is like this' if glob.has_magic(given) else 'there is no such file or folder'}"


def _job(file: Path, relative: Path, output: Path, kinds: Sequence[str]) -> Job:
    is_video = file.suffix.lower() in video.SUFFIXES
    suffixes = {kind: KINDS[kind][is_video] for kind in kinds}
    # A folder of frames keeps the video's whole name, so that a folder of images may have the same without.
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
                overwritten.append(f"{sources[place]}: would be overwritten; take another --output")
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
    """What the files of an output folder are made by, for its `RECORD`."""
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
    """The inputs of which every output is there. Raises ValueError where they were made by something else."""
    path = output / RECORD
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        refuse_newer(old, path)
        compared = (record.keys() | old.keys()) - {"checkpoint", "format_version", "segjax_version"}
        differing = [key for key in compared if old.get(key) != record.get(key)]
        if differing:
            raise ValueError(
                f"{output} was made with other {', '.join(sorted(differing))} ({path}); omit --resume to make "
                "everything anew, or take another --output"
            )
    return {job.source for job in jobs if all(path.exists() for path in job.outputs.values())}


# -------------------------------------------------------------------------------------------------- reading and writing


class Prediction(NamedTuple):
    """labels: uint8 (H, W). probabilities: float32 (H, W, K), or None where nobody wants them."""

    labels: np.ndarray
    probabilities: np.ndarray | None


def save(path: Path, kind: str, image: np.ndarray, prediction: Prediction, spec: specs.DatasetSpec) -> None:
    """Writes one kind of output of an image, atomically."""
    with atomic.replacing_file(path, durable=False) as temporary:
        _write(temporary, kind, image, prediction, spec)


def _write(path: Path, kind: str, image: np.ndarray, prediction: Prediction, spec: specs.DatasetSpec) -> None:
    with path.open("wb") as file:
        if kind == "probabilities":
            if prediction.probabilities is None:
                raise ValueError("no probabilities were computed")
            np.savez(file, probabilities=prediction.probabilities, class_names=np.array(spec.class_names))
        elif kind == "labels":
            palette = colourise(np.arange(256, dtype=np.uint8)[None], spec)
            file.write(codec.encode_palette(prediction.labels, palette))
        else:
            file.write(_jpeg(DRAWN[kind](image, prediction.labels, spec)))


def _jpeg(picture: np.ndarray) -> bytes:
    import cv2

    if max(picture.shape) > LARGEST_JPEG:
        raise ValueError(
            f"a picture of {picture.shape[0]}x{picture.shape[1]} is too large for JPEG; take --write labels"
        )
    # Colours at full resolution: the usual half of it would fray the edges of classes and letters.
    flags = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), flags)[1].tobytes()


class VideoOutputs:
    """What is written of one video: H.264 for what is drawn, a folder of numbered files for labels and probabilities.

    Everything is at its place once the whole video is done.

    Attributes:
      made_even: height and width of pictures with an odd one, by the file they went to.
    """

    def __init__(self, job: Job, header: video.Header, spec: specs.DatasetSpec):
        self._job, self._header, self._spec = job, header, spec
        self._stack = contextlib.ExitStack()
        self._folders: dict[str, Path] = {}
        self._writers: dict[str, video.Writer] = {}
        self.made_even: dict[Path, tuple[int, int]] = {}

    def write(self, number: int, frame: video.Frame, prediction: Prediction) -> None:
        for kind, writer in self._writers.items():
            drawn = DRAWN[kind](frame.image, prediction.labels, self._spec, still=False)
            if drawn.shape[0] % 2 or drawn.shape[1] % 2:
                self.made_even[self._job.outputs[kind]] = drawn.shape[:2]
            writer.write(drawn, frame.time, frame.duration)
        for kind, folder in self._folders.items():
            _write(folder / f"{number:06d}{FRAME_SUFFIX[kind]}", kind, frame.image, prediction, self._spec)

    def __enter__(self) -> VideoOutputs:
        with contextlib.ExitStack() as stack:
            for kind, path in self._job.outputs.items():
                if kind in FRAME_SUFFIX:
                    self._folders[kind] = stack.enter_context(atomic.replacing_folder(path, durable=False))
                    self._folders[kind].mkdir()
                else:
                    self._writers[kind] = stack.enter_context(video.writer(path, self._header))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)


class Run:
    """Predicts jobs one after the other.

    Attributes:
      failures: (input, what was wrong with it).
      images, frames: how many were written, of how many videos.
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
        """Counts inputs as failed whose outputs somebody has removed in the meantime."""
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
            console.say(f"  {path}: H.264 has even sides alone; {height}x{width} got its last row or column twice")

    def _predicted(self, images: list[np.ndarray]) -> list[Prediction]:
        self._advise(self._predictor.padded_size(images[0].shape))
        if "probabilities" not in self._kinds:
            return [Prediction(labels, None) for labels in self._predictor.labels(images)]
        # Of these and not computed on their own, so that both files say the same.
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
                "size; where it is not enough, take --mode slide"
            )
        if len(self._sizes) == MANY_SIZES and "sizes" not in self._warned:
            self._warned.add("sizes")
            console.say(
                f"{MANY_SIZES} sizes so far, and each new one is compiled for; --pad-multiple 32 makes them fewer, and "
                "changes some labels"
            )

    def _failed(self, job: Job, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
            raise error
        self.failures.append((job.source, _reason(error)))


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "memory is not enough; take --mode slide, or a smaller --batch"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
