"""The files that are written for a prediction: label maps, overlays, probabilities, and videos of them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segjax.data import codec, specs
from segjax.runtime import atomic
from segjax.viz import overlay, video
from segjax.viz.pictures import colourise

# Suffixes of each kind of output, for an image and for a video; a video without a suffix is a folder of its frames.
KINDS = {
    "labels": (".png", ""),
    "overlay": (".jpg", ".mp4"),
    "sidebyside": (".jpg", ".mp4"),
    "probabilities": (".npz", ""),
}
DRAWN = {"overlay": overlay.over, "sidebyside": overlay.side_by_side}
FRAME_SUFFIX = {"labels": ".png", "probabilities": ".npz"}
LARGEST_JPEG = 65500  # pixels a side


class Job(NamedTuple):
    """An input, and the path of each kind of output."""

    source: Path | video.Live
    outputs: dict[str, Path]
    is_video: bool


class Prediction(NamedTuple):
    """A prediction for one image.

    Attributes:
      labels: uint8 (H, W), or uint16 for more than 256 classes.
      probabilities: float32 (H, W, K), or None if they are not written.
    """

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
            file.write(_label_png(prediction.labels, spec))
        else:
            file.write(_jpeg(DRAWN[kind](image, prediction.labels, spec)))


def _label_png(labels: np.ndarray, spec: specs.DatasetSpec) -> bytes:
    """A palette PNG in the colours of the classes; of more than 256 classes, a grey one of 16 bits."""
    if labels.dtype == np.uint16:
        return codec.encode_mask(labels)
    return codec.encode_palette(labels, colourise(np.arange(256), spec))


def _jpeg(picture: np.ndarray) -> bytes:
    import cv2

    if max(picture.shape) > LARGEST_JPEG:
        raise ValueError(
            f"a picture of {picture.shape[0]}x{picture.shape[1]} is too large for JPEG; use --write labels"
        )
    # Colours at full resolution: at half of it, JPEG's default, the edges of classes and letters fray.
    flags = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), flags)[1].tobytes()


class VideoOutputs:
    """The outputs of one video: H.264 for overlays, a folder of numbered files for labels and for probabilities.

    They appear at their paths when the whole video is done.

    Attributes:
      made_even: (height, width) of pictures with an odd side, by output file; that side was extended by a pixel.
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
