"""The output files of predictions: label maps, overlays, probabilities, and videos of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from segjax.data import codec, specs
from segjax.inference import geotiff
from segjax.runtime import atomic
from segjax.viz import overlay, video
from segjax.viz.pictures import colourise

# Kinds of output that `certainty.maps` computes, in its order.
MAPS = ("confidence", "entropy")

# Suffixes of each kind of output, for an image and for a video; "" for a folder of the video's frames.
KINDS = {
    "labels": (".png", ""),
    "overlay": (".jpg", ".mp4"),
    "sidebyside": (".jpg", ".mp4"),
    "probabilities": (".npz", ""),
    "confidence": (".png", ""),
    "entropy": (".png", ""),
}
DRAWN = {"overlay": overlay.over, "sidebyside": overlay.side_by_side}
FRAME_SUFFIX = {"labels": ".png", "probabilities": ".npz", "confidence": ".png", "entropy": ".png"}
LARGEST_JPEG = 65500  # pixels per side
LARGEST_PICTURE = 2048  # pixels per side of a scene's picture


class Job(NamedTuple):
    """An input, and the path of each kind of output.

    Attributes:
      source: Path or live video.
      outputs: Path of each kind of output.
      is_video: Whether the input is a video.
      is_scene: Whether `geotiff.kind` is "scene".
      is_unplaced: Whether `geotiff.kind` is "unplaced".
    """

    source: Path | video.Live
    outputs: dict[str, Path]
    is_video: bool
    is_scene: bool = False
    is_unplaced: bool = False


class Prediction(NamedTuple):
    """The prediction for one image.

    Attributes:
      labels: Train ids (H, W), uint8, or uint16 for more than 256 classes.
      probabilities: Float32 (H, W, K), or None if they are not written.
      maps: `certainty.maps`, uint8 (H, W, 2), or None if none is written.
    """

    labels: np.ndarray
    probabilities: np.ndarray | None
    maps: np.ndarray | None = None

    def map_of(self, kind: str) -> np.ndarray:
        """One of the maps, uint8 (H, W)."""
        if self.maps is None:
            raise ValueError("no maps were computed")
        return np.ascontiguousarray(self.maps[..., MAPS.index(kind)])


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
        elif kind in MAPS:
            file.write(codec.encode_mask(prediction.map_of(kind)))
        else:
            file.write(_jpeg(DRAWN[kind](image, prediction.labels, spec)))


def _label_png(labels: np.ndarray, spec: specs.DatasetSpec) -> bytes:
    """A palette PNG in the colours of the classes, or a 16-bit greyscale PNG for more than 256 classes."""
    if labels.dtype == np.uint16:
        return codec.encode_mask(labels)
    return codec.encode_palette(labels, colourise(np.arange(256), spec))


def _jpeg(picture: np.ndarray) -> bytes:
    import cv2

    if max(picture.shape) > LARGEST_JPEG:
        raise ValueError(
            f"a picture of {picture.shape[0]}x{picture.shape[1]} is too large for JPEG; use --write labels"
        )
    # Chroma has full resolution: at half of it, JPEG's default, the edges of classes and letters fray.
    flags = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), flags)[1].tobytes()


class SceneOutputs:
    """The outputs of a scene that is predicted in parts: GeoTIFFs, and pictures of every nth row and column.

    The files appear at their paths when the whole scene is done.
    """

    def __init__(self, job: Job, scene: geotiff.Scene, spec: specs.DatasetSpec):
        self._scene, self._spec, self._step = scene, spec, _step(scene.shape)
        self._rasters = {kind: path for kind, path in job.outputs.items() if kind in ("labels", *MAPS)}
        self._pictures = {kind: path for kind, path in job.outputs.items() if kind in DRAWN}
        size = [-(-side // self._step) for side in scene.shape[:2]] if self._pictures else [0, 0]
        # Pictures show three bands; a fourth marks an image that is not RGB.
        channels = min(scene.shape[2], 4)
        self._image, self._labels = np.zeros((*size, channels), scene.dtype), np.zeros(size, spec.label_dtype)
        self._stack = contextlib.ExitStack()
        self._writers: dict[str, Callable[[int, int, np.ndarray], None]] = {}

    def write(self, top: int, left: int, labels: np.ndarray, maps: np.ndarray | None = None) -> None:
        """Writes the labels (h, w) of a part with this upper left corner, and its maps, as in `Prediction`."""
        prediction = Prediction(labels, None, maps)
        bottom, right = top + labels.shape[0], left + labels.shape[1]
        labels = self._scene.masked(top, left, labels, self._spec)
        for kind, write in self._writers.items():
            write(top, left, labels if kind == "labels" else prediction.map_of(kind))
        if self._pictures:
            step = self._step
            part = np.s_[-top % step :: step, -left % step :: step]
            there = np.s_[-(-top // step) : -(-bottom // step), -(-left // step) : -(-right // step)]
            self._labels[there] = labels[part]
            self._image[there] = self._scene[top:bottom, left:right][part][..., : self._image.shape[2]]

    def __enter__(self) -> SceneOutputs:
        for kind, path in self._rasters.items():
            raster = (
                geotiff.label_map(path, self._scene, self._spec)
                if kind == "labels"
                else geotiff.certainty_map(path, self._scene)
            )
            self._writers[kind] = self._stack.enter_context(raster)
        return self

    def __exit__(self, *error) -> None:
        if error[0] is not None:
            self._stack.__exit__(*error)
            return
        with self._stack:
            for kind, path in self._pictures.items():
                save(path, kind, self._image, Prediction(self._labels, None), self._spec)


def save_scene(
    job: Job,
    image: np.ndarray,
    prediction: Prediction,
    spec: specs.DatasetSpec,
    images: specs.ImageKind = specs.RGB,
) -> None:
    """Writes all outputs of a scene that was predicted as a whole, with pictures as in `SceneOutputs`.

    Args:
      job: Scene and its outputs.
      image: (H, W, C).
      prediction: Prediction for the image.
      spec: Classes of the model.
      images: Kind of images that the model takes.
    """
    with geotiff.opened(cast(Path, job.source), scale=None, images=images) as scene:
        labels = scene.masked(0, 0, prediction.labels, spec)
        step = _step(scene.shape)
        for kind, path in job.outputs.items():
            if kind == "labels":
                geotiff.save_labels(path, scene, labels, spec)
            elif kind in MAPS:
                with geotiff.certainty_map(path, scene) as write:
                    write(0, 0, prediction.map_of(kind))
            elif kind in DRAWN:
                reduced = Prediction(np.ascontiguousarray(labels[::step, ::step]), None)
                save(path, kind, np.ascontiguousarray(image[::step, ::step]), reduced, spec)
            else:
                save(path, kind, image, prediction, spec)


def _step(shape: tuple[int, ...]) -> int:
    """The distance between the rows, and columns, of a scene that are in its pictures."""
    return -(-max(shape[:2]) // LARGEST_PICTURE)


class VideoOutputs:
    """The outputs of one video: H.264 for overlays, a folder of numbered files for labels and for probabilities.

    The files appear at their paths when the whole video is done.

    Attributes:
      made_even: (height, width) of pictures with an odd side, which was extended by a pixel, by output file.
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
