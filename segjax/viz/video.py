"""Reads the frames of videos with their times, and writes frames as H.264. Needs PyAV, the extra `video`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from segjax.runtime import atomic

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv")


class VideoError(ValueError):
    """A video that cannot be read, or PyAV that is not installed."""


class Header(NamedTuple):
    """Properties of a video that are known before it is decoded.

    Attributes:
      frames: number of frames; None if the file does not contain it.
      rate: frames per second, on average.
      time_base: unit of the times of frames, seconds.
      has_sound: whether the file has a sound track.
    """

    frames: int | None
    rate: Fraction
    time_base: Fraction
    has_sound: bool


class Frame(NamedTuple):
    """A frame, uint8 (H, W, 3), upright; its time and duration in units of the time base."""

    image: np.ndarray
    time: int
    duration: int


def pyav() -> ModuleType:
    """Imports PyAV. Raises VideoError, with the command that installs it, where it is missing."""
    try:
        import av
    except ModuleNotFoundError:
        raise VideoError("videos need PyAV: pip install 'segjax[video]'") from None
    return av


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Header, Iterator[Frame]]]:
    """The header of a video and its frames in the order of their times.

    Raises:
      VideoError: the file is no video, is damaged, or its frames differ in size; also while frames are read.
    """
    av = pyav()
    with contextlib.ExitStack() as stack:
        with _as_video_error(av, "cannot be opened as a video"):
            container = stack.enter_context(av.open(str(path)))
        if not container.streams.video:
            raise VideoError("has no picture, only sound or data")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
        if not rate or not time_base:
            raise VideoError("does not say how many frames it has a second")
        header = Header(stream.frames or None, Fraction(rate), Fraction(time_base), bool(container.streams.audio))
        yield header, _frames(av, container, stream, header)


def _frames(av, container, stream, header: Header) -> Iterator[Frame]:
    usual = max(round(1 / (header.rate * header.time_base)), 1)
    number, expected, size = 0, None, None
    with _as_video_error(av, lambda: f"is damaged at frame {number}"):
        for frame in container.decode(stream):
            # Telephones store upright videos with a rotation of quarter turns.
            image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
            size = size or image.shape
            if image.shape != size:
                raise VideoError(
                    f"changes from {size[0]}x{size[1]} to {image.shape[0]}x{image.shape[1]} at frame {number}"
                )
            time = frame.pts if frame.pts is not None else expected or 0
            duration = frame.duration or usual
            expected = time + duration
            yield Frame(np.ascontiguousarray(image), time, duration)
            number += 1
    if not number:
        raise VideoError("has no frames")


@contextlib.contextmanager
def writer(path: Path, header: Header) -> Iterator[Writer]:
    """Writes an H.264 file in MP4, 4:2:0 and BT.709; it appears at `path` when the body has finished."""
    with atomic.replacing_file(path, durable=False) as temporary:
        found = Writer(temporary, header)
        try:
            yield found
            found.finish()
        finally:
            found.close()


class Writer:
    """The encoder of one video, see `writer`.

    H.264 needs even sides: the last row or column of an odd one is repeated.
    """

    def __init__(self, path: Path, header: Header):
        self._path = path
        self._header = header
        # Open from the first picture on, which has the size.
        self._output: tuple[OutputContainer, VideoStream] | None = None

    def write(self, picture: np.ndarray, time: int, duration: int) -> None:
        """Adds uint8 (H, W, 3); times in units of the header's time base."""
        av = pyav()
        height, width = picture.shape[:2]
        with _as_video_error(av, "cannot be encoded"):
            if self._output is None:
                self._output = self._open(av, height + height % 2, width + width % 2)
            container, stream = self._output
            padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            # The colour space is set, because players assume BT.709 for large videos without one and BT.601 for small.
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts, frame.time_base, frame.duration = time, self._header.time_base, duration
            container.mux(stream.encode(frame))

    def _open(self, av, height: int, width: int) -> tuple[OutputContainer, VideoStream]:
        container = av.open(str(self._path), "w", format="mp4", options={"movflags": "+faststart"})
        options = {"preset": "veryfast", "crf": "18"}
        stream = container.add_stream("libx264", rate=self._header.rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.time_base = self._header.time_base
        bt709, studio_range = 1, 1
        context.colorspace = context.color_primaries = context.color_trc = bt709
        context.color_range = studio_range
        return container, stream

    def finish(self) -> None:
        """Writes the frames that the encoder still holds."""
        if self._output is not None:
            container, stream = self._output
            with _as_video_error(pyav(), "cannot be encoded"):
                container.mux(stream.encode())

    def close(self) -> None:
        if self._output is not None:
            with _as_video_error(pyav(), "cannot be encoded"):
                self._output[0].close()


@contextlib.contextmanager
def _as_video_error(av, what):
    """Turns errors of PyAV into a VideoError, except those of a full disk."""
    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
            raise
        raise VideoError(f"{what() if callable(what) else what} ({error.strerror or error})") from error
