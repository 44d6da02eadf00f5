"""Predictions for the images and videos of a plan; see `segjax.inference.planning`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from typing_extensions import TypedDict

from segjax.checkpoints.format_version import refuse_newer, stamped
from segjax.data import specs
from segjax.inference import certainty, geotiff
from segjax.inference.engine import labels_of
from segjax.inference.exported_model import ExportedModel, identity_of, weights_sha256
from segjax.inference.images import has_more_images, read_bands, read_image, upright_size
from segjax.inference.outputs import MAPS, Job, Prediction, SceneOutputs, VideoOutputs, save, save_scene
from segjax.inference.overlapped import FAULTS, THREADS, overlapped
from segjax.inference.predictor import LARGEST_WHOLE, Predictor
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import atomic, console, distributed, lock, memory, reading
from segjax.runtime.console import ProgressBar
from segjax.viz import video

# Number of pixels of a whole image above which a hint about memory is printed: SegFormer's attention takes 4 GiB there.
LARGE = 2**22
MANY_SIZES = 8  # number of image sizes at which a hint about compilation is printed

# ------------------------------------------------------------------------------------------------------------- resuming

RECORD = "predict.json"
# Longest wait until one machine sees a file of another; network file systems take up to half a minute.
SECONDS_OF_FOLDER = 60


def record_of(
    predictor: Predictor, model: SegmentationModel | ExportedModel, checkpoint: str | Path
) -> dict[str, object]:
    """Metadata of an output folder, for its `RECORD`: checkpoint, protocol and classes."""
    is_exported = isinstance(model, ExportedModel)
    normalisation: dict[str, object] = {"mean": list(model.mean), "std": list(model.std)} if is_exported else {}
    protocol = predictor.protocol.record()
    if protocol["size_divisor"] == 1:
        # Omitted, so that folders from before this setting can be resumed.
        del protocol["size_divisor"]
    scale = {} if predictor.scale is None else {"scale": list(predictor.scale)}
    labels = zip(predictor.classes.label_names, predictor.classes.label_colors, strict=True)
    return stamped(
        {
            "checkpoint": str(checkpoint),
            "weights_sha256": weights_sha256(model),
            "model": identity_of(model),
            **normalisation,
            **protocol,
            **scale,
            "pad_multiple": predictor.pad_multiple,
            "classes": [{"name": name, "color": list(color)} for name, color in labels],
        }
    )


class Record:
    """The `RECORD` of an output folder."""

    def __init__(self, path: Path, content: Mapping[str, object], *, keeps_time: bool):
        """Writes nothing yet.

        Args:
          path: Path of the record.
          content: Result of `record_of`.
          keeps_time: Whether an existing record keeps its modification time, at which its outputs were begun.
        """
        self._path, self._content, self._is_shared = path, dict(content), False
        self._begun = path.stat().st_mtime_ns if keeps_time and path.exists() else None

    def write(self, incomplete: AllIncomplete) -> None:
        """Writes the record with these incomplete videos; after `share`, in addition to those of other processes."""
        if not self._is_shared:
            self._replace(incomplete)
            return
        place = self._path.with_name(f".{self._path.name}.lock")
        while True:
            with (
                contextlib.suppress(lock.HeldError),
                lock.held(place, what=str(self._path), remedy="this process waits"),
            ):
                self._replace(reading.read_json(self._path).get("incomplete", {}) | incomplete)
                return
            time.sleep(0.1)

    def _replace(self, incomplete: AllIncomplete) -> None:
        entry = {"incomplete": incomplete} if incomplete else {}
        atomic.write_text(self._path, json.dumps(self._content | entry, indent=1) + "\n")
        if self._begun is not None:
            os.utime(self._path, ns=(self._begun, self._begun))
        self._begun = self._path.stat().st_mtime_ns

    def share(self) -> None:
        """Makes this the record of all processes, after the first one has written it.

        Raises:
          ValueError: This process does not see it: each machine has a folder of its own there.
        """
        self._begun = distributed.gathered(self._begun)[0]
        # The checkpoint may have another path on each machine.
        expected = {name: value for name, value in self._content.items() if name != "checkpoint"}
        expected = json.loads(json.dumps(expected))
        until = time.monotonic() + SECONDS_OF_FOLDER
        while not self._is_shared:
            with contextlib.suppress(OSError, ValueError):
                known = reading.read_json(self._path)
                self._is_shared = all(known.get(name) == value for name, value in expected.items())
            if not self._is_shared and time.monotonic() > until:
                raise ValueError(
                    f"{self._path}, which process 0 has written, is not there: choose an --output that all processes "
                    "share, or give each machine a command of its own, with other inputs"
                )
            time.sleep(0 if self._is_shared else 0.5)


def part_of(jobs: Sequence[Job], number: int, count: int) -> list[Job]:
    """The jobs of one of several processes; each gets about as many images and as many videos as the others."""
    by_kind = sorted(range(len(jobs)), key=lambda place: jobs[place].is_video)
    return [jobs[place] for place in sorted(by_kind[number::count])]


class Incomplete(TypedDict):
    """A video with incomplete outputs: the reason, and the file's size and modification time, in bytes and ns."""

    reason: str
    size: int
    modified: int


# The entry "incomplete" of a `RECORD`, by the real path of the video.
AllIncomplete = dict[str, Incomplete]


def place_of(source: Path | video.Live) -> str:
    """The name of a source in a `RECORD`: its real path, or its address without password."""
    return str(source) if isinstance(source, video.Live) else os.path.realpath(source)


def _state(source: Path | video.Live) -> tuple[int, int]:
    if isinstance(source, video.Live):
        return 0, 0
    status = source.stat()
    return status.st_size, status.st_mtime_ns


def done_before(
    jobs: Sequence[Job], output: Path, record: Mapping[str, object]
) -> tuple[set[Path | video.Live], AllIncomplete]:
    """The inputs whose outputs all exist, and the videos known to be incomplete, including those of other commands.

    Outputs that are older than the record count as missing, because an earlier run made them. So do those of an
    incomplete video that has been replaced since. Temporary files of killed runs are removed.

    Args:
      jobs: Jobs of this command.
      output: Folder of all outputs.
      record: Metadata of this command, from `record_of`.

    Raises:
      ValueError: Outputs were made with other weights or settings, or the record of these is missing.
    """
    path = output / RECORD
    remedy = "omit --resume to predict everything again, or choose another --output"
    try:
        old = reading.read_json(path)
    except FileNotFoundError:
        if any(all(output.exists() for output in job.outputs.values()) for job in jobs):
            raise ValueError(
                f"{path}, which records the settings of the files next to it, is missing; {remedy}"
            ) from None
        return set(), {}
    except reading.UnreadableError as error:
        raise ValueError(f"{error}; {remedy}") from None
    refuse_newer(old, path)
    try:
        found = reading.checked(old.get("incomplete", {}), AllIncomplete, name=f"{path}: incomplete")
    except reading.UnreadableError as error:
        raise ValueError(f"{error}; {remedy}") from None
    compared = (record.keys() | old.keys()) - {"checkpoint", "format_version", "segjax_version", "incomplete"}
    if "model" not in old:
        # A folder from before this entry.
        compared.discard("model")
    if differing := sorted(key for key in compared if old.get(key) != record.get(key)):
        raise ValueError(f"{output} was made with other {', '.join(differing)} ({path}); {remedy}")
    for target in (path, *(output for job in jobs if job.is_video for output in job.outputs.values())):
        atomic.clear(target)
    begun = path.stat().st_mtime_ns
    done = {
        job.source
        for job in jobs
        if all(output.exists() and output.stat().st_mtime_ns >= begun for output in job.outputs.values())
    }
    places = {job.source: place_of(job.source) for job in jobs}
    for source, place in places.items():
        entry = found.get(place)
        if entry and source in done and _state(source) != (entry["size"], entry["modified"]):
            done.remove(source)
    again = {place for source, place in places.items() if source not in done}
    return done, {place: entry for place, entry in found.items() if place not in again}


# ----------------------------------------------------------------------------------------------------------- predicting


class Outcome(NamedTuple):
    """What a run has done; see `Run`."""

    failures: list[tuple[Path | video.Live, str]]
    images: int
    videos: int
    frames: int
    first_only: list[Path]


class Run:
    """Predicts jobs.

    Attributes:
      has_begun: Whether the record is written.
      failures: Inputs that could not be predicted, each with the reason.
      images: Number of images written.
      videos: Number of videos written.
      frames: Number of frames of videos written.
      first_only: Files with several images, of which only the first was predicted.
    """

    def __init__(
        self,
        predictor: Predictor,
        kinds: Sequence[str],
        *,
        less_memory: str,
        incomplete: AllIncomplete,
        write_record: Callable[[AllIncomplete], None],
    ):
        """Creates a run, which computes nothing yet.

        Args:
          predictor: Predictor.
          kinds: Kinds of outputs, keys of `outputs.KINDS`.
          less_memory: Remedy to report if there is not enough memory.
          incomplete: Incomplete videos of earlier commands, to be recorded again.
          write_record: Function that writes the record, given the incomplete videos; called before the first output,
            and before the outputs of each incomplete video.
        """
        self.failures: list[tuple[Path | video.Live, str]] = []
        self.images = self.videos = self.frames = 0
        self.first_only: list[Path] = []
        self._predictor, self._kinds = predictor, kinds
        self._has_maps = not set(MAPS).isdisjoint(kinds)
        self._incomplete = dict(incomplete)
        self._less_memory, self._write_record, self.has_begun = less_memory, write_record, False
        self._exhausted: list[Exception] = []
        # What to change so that scenes are predicted in parts; "" if they already are.
        self._in_parts = "; ".join(_for_parts(predictor, kinds))
        self._sizes: set[tuple[int, int]] = set()
        self._warned: set[str] = set()

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Predicts the jobs.

        Raises:
          TooLittleMemoryError, or another out-of-memory error: There is not enough memory for any job; nothing was
            written.
        """
        if not self.has_begun:
            self._refuse_too_large(jobs)
        for predict, group in itertools.groupby(jobs, self._way_of):
            if predict is None:
                self._predict_images(list(group))
                continue
            for job in group:
                try:
                    predict(job)
                except FAULTS as error:
                    self._failed(job, error)
        if self._exhausted and len(self._exhausted) == len(self.failures) and not self.has_begun:
            raise self._exhausted[0]
        self._look_for_outputs(jobs)

    def outcome(self) -> Outcome:
        """What this run has done so far."""
        return Outcome(self.failures, self.images, self.videos, self.frames, self.first_only)

    def include(self, outcomes: Sequence[Outcome]) -> None:
        """Replaces the outcome of this run by the sum of the outcomes of all processes."""
        self.failures = [failure for outcome in outcomes for failure in outcome.failures]
        self.first_only = [path for outcome in outcomes for path in outcome.first_only]
        self.images, self.videos, self.frames = (
            sum(getattr(outcome, name) for outcome in outcomes) for name in ("images", "videos", "frames")
        )

    def _way_of(self, job: Job) -> Callable[[Job], None] | None:
        """The function that predicts a job by itself; None for images, which are predicted in batches."""
        if job.is_video:
            return self._predict_video
        if not job.is_scene or self._in_parts:
            return None
        with contextlib.suppress(ValueError, OSError):
            own = self._predictor
            why = geotiff.why_whole(
                cast(Path, job.source), scale=own.scale, max_pixels=own.max_pixels, images=own.image_kind
            )
            if why is None:
                return self._predict_scene
        return None

    def _refuse_too_large(self, jobs: Sequence[Job]) -> None:
        """Raises TooLittleMemoryError if no image can be predicted. If some can, the others become failures."""
        if any(job.is_video for job in jobs):
            return
        files = [job.source for job in jobs if isinstance(job.source, Path)]
        sizes = [size for file in files if (size := upright_size(file))]
        is_whole = self._predictor.protocol.mode == "whole"
        most = min(self._predictor.max_pixels, LARGEST_WHOLE if is_whole else math.inf)
        if sizes and math.prod(smallest := min(sizes, key=math.prod)) <= most:
            # Other problems are reported image by image.
            with contextlib.suppress(ValueError):
                self._predictor.refuse_too_large(smallest)

    def _look_for_outputs(self, jobs: Sequence[Job]) -> None:
        """Counts an input as failed if one of its outputs has disappeared."""
        failed = {source for source, _ in self.failures}
        for job in jobs:
            missing = [path for path in job.outputs.values() if not path.exists()]
            if missing and job.source not in failed:
                self.failures.append((job.source, f"{missing[0]} was written but no longer exists"))
                self.images -= not job.is_video
                self.videos -= job.is_video

    def _predict_images(self, jobs: Sequence[Job]) -> None:
        def read(job):
            scale, max_pixels, kind = self._predictor.scale, self._predictor.max_pixels, self._predictor.image_kind
            if job.is_scene:
                return geotiff.read(
                    job.source,
                    scale=scale,
                    max_pixels=max_pixels,
                    in_parts=self._in_parts,
                    images=kind,
                    fill=self._predictor.mean,
                )
            if kind.is_rgb:
                return read_image(job.source, scale=scale, max_pixels=max_pixels)
            return read_bands(job.source, kind, max_pixels=max_pixels)

        def write(job, image, prediction):
            if job.is_scene:
                save_scene(job, image, prediction, self._predictor.classes, self._predictor.image_kind)
                return
            for kind, path in job.outputs.items():
                save(path, kind, image, prediction, self._predictor.classes)

        def done(job):
            self.images += 1
            self._look_for_more_images(job)
            progress.advance()

        def failed(job, error):
            self._failed(job, error)
            progress.advance()

        with ProgressBar("", len(jobs), "images") as progress:
            overlapped(
                jobs,
                read=read,
                key=lambda image: self._predictor.padded_size(image.shape),
                compute=lambda images: self._predicted(images),
                write=write,
                failed=failed,
                done=done,
                batch=self._predictor.batch,
                threads=THREADS,
            )

    def _predict_scene(self, job: Job) -> None:
        """Predicts a scene of any size in parts."""
        source = cast(Path, job.source)
        own = self._predictor
        with geotiff.opened(source, scale=own.scale, images=own.image_kind, fill=own.mean) as scene:
            height, width = scene.shape[:2]
            with (
                SceneOutputs(job, scene, self._predictor.classes) as outputs,
                ProgressBar(source.name, height, "rows") as progress,
            ):
                pixels = 0
                tiles = own.mapped_tiles(scene) if self._has_maps else own.label_tiles(scene)
                for top, left, labels, *maps in tiles:
                    self.begin()
                    outputs.write(top, left, labels, *maps)
                    # In a wide scene, a part covers only some of its rows' pixels.
                    pixels += labels.size
                    progress.advance(pixels // width - progress.count)
                    memory.release_freed_memory()
        self.images += 1
        self._look_for_more_images(job)

    def _look_for_more_images(self, job: Job) -> None:
        source = cast(Path, job.source)
        if has_more_images(source):
            self.first_only.append(source)

    def _predict_video(self, job: Job) -> None:
        """Predicts a video. After Ctrl-C it raises KeyboardInterrupt; an endless stream is written up to that point."""
        if not self._predictor.image_kind.is_rgb:
            raise ValueError(f"videos are 8-bit RGB, but the model takes {self._predictor.image_kind}")
        broken: list[str] = []
        stopped: KeyboardInterrupt | None = None
        has_begun = False

        def done(_):
            progress.advance()

        def failed(_, error):
            raise error

        def read(_):
            nonlocal has_begun
            try:
                frame = next(frames, None)
            except video.VideoError as error:
                # A broken file gives no output, because it can be repaired. The frames of a stream do not come again.
                if not has_begun or not isinstance(job.source, video.Live):
                    raise
                broken.append(str(error))
                return None
            has_begun = True
            return frame

        def write(number, frame, prediction):
            outputs.write(number, frame, prediction)
            seen.add(frame)

        with video.opened(job.source, max_pixels=self._predictor.max_pixels) as (header, frames):
            seen = video.Progress(header)
            is_endless = isinstance(job.source, video.Live) and header.duration is None
            sound = "; its sound is dropped" * header.has_sound
            end = "; it ends with Ctrl-C" * is_endless
            count = f"{header.frames} frames" if header.frames else "frames"
            console.say(f"{job.source}: {count}, {float(header.rate):g} per second{sound}{end}")
            with (
                VideoOutputs(job, header, self._predictor.classes) as outputs,
                ProgressBar("", header.frames, "frames") as progress,
            ):
                try:
                    overlapped(
                        itertools.count(),
                        read=read,
                        key=lambda frame: frame.image.shape,
                        compute=lambda group: self._predicted([frame.image for frame in group]),
                        write=write,
                        failed=failed,
                        done=done,
                        batch=self._predictor.batch,
                        threads=1,
                    )
                except KeyboardInterrupt as error:
                    if not is_endless or not seen.count:
                        raise
                    stopped = error
                rate = progress.rate
                if faults := broken or ([] if stopped else seen.faults()):
                    # The existing frames are written. The record comes first, so that --resume reports the video again.
                    (size, modified), reason = _state(job.source), "; ".join(faults)
                    self.failures.append((job.source, reason))
                    self._incomplete[place_of(job.source)] = Incomplete(reason=reason, size=size, modified=modified)
                    self._write_record(self._incomplete)
        self.videos += 1
        self.frames += seen.count
        console.say(f"{job.source}: {seen.count} frames done{f', {rate:.2f} per second' if rate else ''}")
        for path, (height, width) in outputs.made_even.items():
            console.say(f"  {path}: H.264 needs even sides; the last row or column of {height}x{width} was repeated")
        if stopped:
            raise stopped

    def _predicted(self, images: list[np.ndarray]) -> list[Prediction]:
        self._advise(images[0].shape)
        if "probabilities" not in self._kinds and self._has_maps:
            predictions = [Prediction(labels, None, maps) for labels, maps in self._predictor.mapped(images)]
        elif "probabilities" not in self._kinds:
            predictions = [Prediction(labels, None) for labels in self._predictor.labels(images)]
        else:
            # Labels and maps are computed from the probabilities, so that all files agree.
            scores = self._predictor.probabilities_of(images)
            dtype = specs.dtype_of_labels(self._predictor.classes.num_classes - 1)
            threshold = self._predictor.protocol.threshold
            labels = [labels_of(score, threshold=threshold).astype(dtype) for score in scores]
            predictions = [Prediction(*pair, self._maps_of(*pair)) for pair in zip(labels, scores, strict=True)]
        self.begin()
        return predictions

    def _maps_of(self, labels: np.ndarray, scores: np.ndarray) -> np.ndarray | None:
        """`certainty.maps` of probabilities (H, W, K), if one of them is written."""
        if not self._has_maps:
            return None
        return np.asarray(certainty.maps(scores[None], labels[None], are_logits=False))[0]

    def begin(self) -> None:
        """Writes the record before the first output."""
        if not self.has_begun:
            self._write_record(self._incomplete)
            self.has_begun = True

    def _advise(self, shape: tuple[int, ...]) -> None:
        protocol = self._predictor.protocol
        if protocol.mode != "whole":
            return
        size = max(protocol.input_sizes(self._predictor.padded_size(shape)), key=math.prod)
        self._sizes.add(size)
        if math.prod(size) > LARGE and "large" not in self._warned:
            self._warned.add("large")
            console.say(
                f"predicts images of {size[0]}x{size[1]} as a whole: some models need memory that grows with the "
                "square of the number of pixels; if memory runs out, use --mode slide"
            )
        if len(self._sizes) == MANY_SIZES and "sizes" not in self._warned:
            self._warned.add("sizes")
            console.say(
                f"{MANY_SIZES} input sizes so far, and each new one is compiled; "
                f"{'--pad-multiple' if protocol.base_size is None else '--size-divisor'} 32 reduces their number, but "
                "changes some labels"
            )

    def _failed(self, job: Job, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
            raise error
        if memory.is_exhausted(error):
            self._exhausted.append(error)
        self.failures.append((job.source, _reason(error, job.source, self._less_memory)))


def _for_parts(predictor: Predictor, kinds: Sequence[str]) -> Iterator[str]:
    if predictor.protocol.mode != "slide":
        yield "use --mode slide"
    if not predictor.protocol.is_one_pass:
        yield "omit --scales, --flip, --base-size and --size-divisor"
    if predictor.pad_multiple > 1:
        yield "omit --pad-multiple"
    if "probabilities" in kinds:
        yield "omit probabilities from --write"


def _reason(error: Exception, source: object, less_memory: str) -> str:
    """The reason why an input failed, in one line that does not name it, but names any other file at fault."""
    if isinstance(error, memory.TooLittleMemoryError):
        return f"{error}; {less_memory}"
    if memory.is_exhausted(error):
        return f"not enough memory; {less_memory}"
    if isinstance(error, OSError) and error.strerror:
        # If a rename failed, the second name is the one that users know.
        name = error.filename2 or error.filename
        if name and os.fsdecode(name) != str(source):
            return f"{os.fsdecode(name)}: {error.strerror}"
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0].removeprefix(f"{source}: ")
