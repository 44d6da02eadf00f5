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
import contextlib
import glob
import itertools
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from segjax import console, overlay, runtime, video
from segjax.checkpoint import write_text
from segjax.data import codec, specs
from segjax.pictures import colourise
from segjax.predictor import Predictor, as_rgb
from segjax.state import Skeleton, params_sha256
from segjax.trained import Trained, load_trained

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
RECORD = "predict.json"
THREADS = 2  # that read images, and as many that write; each may be one image ahead or behind
# From here on memory is worth a word: SegFormer's attention takes 4 GiB for as many pixels.
LARGE = 2**22
LARGEST_JPEG = 65500  # pixels a side
MANY_SIZES = 8  # of images, each of which is compiled for
FAULTS = (ValueError, OSError, RuntimeError, MemoryError)  # of one input; jax's own are RuntimeErrors


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


# -------------------------------------------------------------------------------------------------- reading and writing


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3), upright. Raises ValueError for what is no image, is damaged, or has numbers of another kind."""
    data = path.read_bytes()
    if not data:
        raise ValueError("is empty")
    if data.startswith((codec.PNG, codec.JPEG)) and (fault := codec.damage(data)):
        raise ValueError(fault)
    image = codec.decode_upright(data)
    if image is None:
        raise ValueError(f"is no image that can be decoded; it begins with {data[:8]!r}")
    return as_rgb(image)


class Prediction(NamedTuple):
    """labels: uint8 (H, W). probabilities: float32 (H, W, K), or None where nobody wants them."""

    labels: np.ndarray
    probabilities: np.ndarray | None


def save(path: Path, kind: str, image: np.ndarray, prediction: Prediction, spec: specs.DatasetSpec) -> None:
    """Writes one kind of output of an image beside its place, and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            if kind == "probabilities":
                np.savez(file, probabilities=prediction.probabilities, class_names=np.array(spec.class_names))
            elif kind == "labels":
                palette = colourise(np.arange(256, dtype=np.uint8)[None], spec)
                file.write(codec.encode_palette(prediction.labels, palette))
            else:
                file.write(_jpeg(DRAWN[kind](image, prediction.labels, spec)))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


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
        self._job, self._spec = job, spec
        self._folders = {kind: path for kind, path in job.outputs.items() if kind in FRAME_SUFFIX}
        self._stack = contextlib.ExitStack()
        self.made_even: dict[Path, tuple[int, int]] = {}
        self._writers = {
            kind: video.Writer(path, header) for kind, path in job.outputs.items() if kind not in FRAME_SUFFIX
        }

    def write(self, number: int, frame: video.Frame, prediction: Prediction) -> None:
        for kind, writer in self._writers.items():
            drawn = DRAWN[kind](frame.image, prediction.labels, self._spec, still=False)
            if drawn.shape[0] % 2 or drawn.shape[1] % 2:
                self.made_even[self._job.outputs[kind]] = drawn.shape[:2]
            writer.write(drawn, frame.time, frame.duration)
        for kind, folder in self._folders.items():
            path = _unfinished(folder) / f"{number:06d}{FRAME_SUFFIX[kind]}"
            save(path, kind, frame.image, prediction, self._spec)

    def __enter__(self) -> VideoOutputs:
        for folder in self._folders.values():
            shutil.rmtree(_unfinished(folder), ignore_errors=True)
            self._stack.push(_moving(folder))
        for writer in self._writers.values():
            self._stack.enter_context(writer)
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _moving(folder: Path) -> Callable:
    def leave(kind, *_):
        if kind is None:
            shutil.rmtree(folder, ignore_errors=True)
            _unfinished(folder).replace(folder)
        shutil.rmtree(_unfinished(folder), ignore_errors=True)

    return leave


# ------------------------------------------------------------------------------------------------------------- pipeline


def overlapped(
    items: Iterable,
    *,
    read: Callable,
    key: Callable[[object], Hashable],
    compute: Callable[[list], list],
    write: Callable[[object, object, object], None],
    failed: Callable[[object, Exception], None],
    done: Callable[[object], None],
    batch: int,
    threads: int,
) -> None:
    """Reads ahead, computes, and writes behind, all at the same time; each in the order of the items.

    With one thread a read or write begins after the one before it. No more than two batches and twice the threads are
    held at a time.

    Args:
      read: item -> what is computed with; None ends it all, as the end of the items does.
      key: neighbours that are equal in this go together, up to `batch` of them.
      compute: what was read of several items -> a result for each.
      write: called with an item, what was read of it, and its result.
      failed, done: told of each item, here; `failed` may raise the error again, which stops everything.
    """
    writing: deque[tuple[object, Future]] = deque()

    def settle(most: int) -> None:
        while len(writing) > most:
            item, future = writing.popleft()
            with _told(failed, [item]):
                future.result()
                done(item)

    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        try:
            for group in _neighbours(_read_ahead(items, read, failed, readers, threads), key, batch):
                results = None
                with _told(failed, [item for item, _ in group]):
                    results = compute([content for _, content in group])
                for (item, content), result in zip(group, results or (), strict=False):
                    settle(max(threads, batch) - 1)
                    writing.append((item, writers.submit(write, item, content, result)))
            settle(0)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _told(failed: Callable, items: Sequence) -> Iterator[None]:
    try:
        yield
    except FAULTS as error:
        if isinstance(error, OSError) and error.errno in video.NO_ROOM:
            raise
        for item in items:
            failed(item, error)


def _read_ahead(items, read, failed, readers, ahead: int) -> Iterator[tuple[object, object]]:
    items, pending = iter(items), deque()
    while True:
        pending += [(item, readers.submit(read, item)) for item in itertools.islice(items, ahead + 1 - len(pending))]
        if not pending:
            return
        item, future = pending.popleft()
        content = _FAILED
        with _told(failed, [item]):
            content = future.result()
        if content is None:
            return
        if content is not _FAILED:
            yield item, content


_FAILED = object()


def _neighbours(pairs: Iterable[tuple], key: Callable, most: int) -> Iterator[list[tuple]]:
    """Runs of pairs whose contents are equal in their key, at most so long."""
    group = []
    for item, content in pairs:
        if group and key(group[0][1]) != key(content):
            yield group
            group = []
        group.append((item, content))
        if len(group) == most:
            yield group
            group = []
    if group:
        yield group


class Progress:
    """A bar on a terminal, else a line every ten seconds; and how many are done a second, once the first one is."""

    def __init__(self, total: int | None, unit: str):
        self._total, self._unit = total, unit
        self.count, self._since = 0, None
        self._said = time.perf_counter()
        form = "{percentage:3.0f}%|{bar}| " if total else ""
        form += (
            "{n_fmt}"
            + "/{total_fmt}" * bool(total)
            + f" {unit} [{{elapsed}}"
            + "<{remaining}" * bool(total)
            + "{postfix}]"
        )
        # Some terminals say that they have no rows, where tqdm would show nothing.
        self._bar = tqdm(
            total=total, bar_format=form, ncols=80, nrows=20, file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @property
    def rate(self) -> float | None:
        """Per second, from the end of the first one on, which compiles."""
        seconds = time.perf_counter() - (self._since or 0)
        return (self.count - 1) / seconds if self.count > 1 else None

    def advance(self) -> None:
        self.count += 1
        now = time.perf_counter()
        self._since = self._since or now
        rate = f"{self.rate:.2f} per second" if self.rate else ""
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(1)
        if self._bar.disable and now - self._said >= 10:
            total = f"/{self._total}" if self._total else ""
            console.say(f"{self.count}{total} {self._unit}  {rate}".rstrip())
            self._said = now

    def say(self, text: str) -> None:
        """Lines of their own, above the bar."""
        if self._bar.disable:
            console.say(text)
        else:
            self._bar.write(console.wrapped(text), file=sys.stdout)


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

    def _predict_images(self, jobs: Sequence[Job]) -> None:
        def write(job, image, prediction):
            for kind, path in job.outputs.items():
                save(path, kind, image, prediction, self._predictor.spec)

        def done(_):
            self.images += 1
            progress.advance()

        def failed(job, error):
            self._failed(job, error)
            progress.advance()

        with Progress(len(jobs), "images") as progress:
            overlapped(
                jobs,
                read=lambda job: read_image(job.source),
                key=lambda image: self._predictor.padded_size(image.shape),
                compute=lambda images: self._predicted(images, progress),
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
                VideoOutputs(job, header, self._predictor.spec) as outputs,
                Progress(header.frames, "frames") as progress,
            ):
                overlapped(
                    itertools.count(),
                    read=lambda _: next(frames, None),
                    key=lambda frame: frame.image.shape,
                    compute=lambda group: self._predicted([frame.image for frame in group], progress),
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

    def _predicted(self, images: list[np.ndarray], progress: Progress) -> list[Prediction]:
        self._advise(self._predictor.padded_size(images[0].shape), progress)
        if "probabilities" not in self._kinds:
            return [Prediction(labels, None) for labels in self._predictor.labels(images)]
        # Of these and not computed on their own, so that both files say the same.
        scores = self._predictor.probabilities_of(images)
        return [Prediction(_labels_of(score), score) for score in scores]

    def _advise(self, size: tuple[int, int], progress: Progress) -> None:
        if self._predictor.protocol.mode != "whole":
            return
        self._sizes.add(size)
        if size[0] * size[1] > LARGE and "large" not in self._warned:
            self._warned.add("large")
            progress.say(
                f"images of {size[0]}x{size[1]} as a whole: some models need memory that grows with the square of the "
                "size; where it is not enough, take --mode slide"
            )
        if len(self._sizes) == MANY_SIZES and "sizes" not in self._warned:
            self._warned.add("sizes")
            progress.say(
                f"{MANY_SIZES} sizes so far, and each new one is compiled for; --pad-multiple 32 makes them fewer, and "
                "changes some labels"
            )

    def _failed(self, job: Job, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in video.NO_ROOM:
            raise error
        self.failures.append((job.source, _reason(error)))


def _labels_of(scores: np.ndarray) -> np.ndarray:
    """uint8 (H, W) of probabilities (H, W, K)."""
    return (scores[..., 0] > 0.5 if scores.shape[-1] == 1 else scores.argmax(axis=-1)).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "memory is not enough; take --mode slide, or a smaller --batch"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


# -------------------------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m segjax.predict",
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
        choices=KINDS,
        default=["labels", "overlay"],
        metavar="KIND",
        help=f"of {', '.join(KINDS)}; default labels overlay",
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
    runtime.prepare()
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("segjax.predict: stopped; what was written is whole. --resume goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        room = (
            "\n  Make room, and give the command again with --resume"
            if getattr(error, "errno", None) in video.NO_ROOM
            else ""
        )
        print(console.wrapped(f"segjax.predict: {error}{room}"), file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    jobs, skipped = plan(options.inputs, options.output, options.write)
    if any(job.is_video for job in jobs):
        video.pyav()
    with console.log_said():
        trained = load_trained(options.checkpoint)
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
    params, batch_stats = Skeleton(trained.model).arrays()
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
    protocol, spec = predictor.protocol, predictor.spec
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


def _describe(trained: Trained, params, predictor: Predictor, jobs, skipped: int, done: int, options) -> None:
    import jax

    spec, protocol = predictor.spec, predictor.protocol
    count = sum(array.size for array in params.values())
    origin = "" if trained.named else f" (the file names none; {spec.name} has as many)"
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
        print(f"{len(failed)} of {_counted(len(jobs), 'input')} failed:", file=sys.stderr)
        for path, reason in run.failures:
            print(console.filled(f"{path}: {reason}", indent="  "), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
