"""Frames out of video files and H.264 out of frames, with the times that they have. Needs PyAV, the extra `video`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
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
    """What a video says before it is decoded.

    Attributes:
      frames: how many; None where the file does not say.
      rate: frames per second, the mean where it varies.
      time_base: unit of the frames' times, seconds.
    """

    frames: int | None
    rate: Fraction
    time_base: Fraction
    has_sound: bool


class Frame(NamedTuple):
    """uint8 (H, W, 3), turned as the file says; when it is shown and for how long, in units of the time base."""

    image: np.ndarray
    time: int
    duration: int


def pyav():
    """The package, or a VideoError that says how to get it."""
    try:
        import av
    except ModuleNotFoundError:
        raise VideoError("videos need PyAV: pip install 'segjax[video]'") from None
    return av


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Header, Iterator[Frame]]]:
    """The header of a video and its frames in the order of their times.

    Raises:
      VideoError: no video, a damaged one (also from the frames), or one whose frames change their size.
    """
    av = pyav()
    with contextlib.ExitStack() as stack:
        with _said(av, "cannot be opened as a video"):
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
    with _said(av, lambda: f"is damaged at frame {number}"):
        for frame in container.decode(stream):
            # In quarter turns, as a telephone stores what it filmed upright.
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
    """Writes an H.264 file in MP4, 4:2:0 and BT.709, which is at `path` once the body is done and not before."""
    with atomic.replacing_file(path, durable=False) as temporary:
        found = Writer(temporary, header)
        try:
            yield found
            found.finish()
        finally:
            found.close()


class Writer:
    """The encoder of one video, see `writer`.

    H.264 has only even sides: an odd one gets its last row or column twice.
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
        with _said(av, "cannot be encoded"):
            if self._output is None:
                self._output = self._open(av, height + height % 2, width + width % 2)
            container, stream = self._output
            padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            # Not left to the encoder: without a word on colours, players take large videos for BT.709 and small ones
            # for BT.601.
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
            with _said(pyav(), "cannot be encoded"):
                container.mux(stream.encode())

    def close(self) -> None:
        if self._output is not None:
            with _said(pyav(), "cannot be encoded"):
                self._output[0].close()


@contextlib.contextmanager
def _said(av, what):
    """Turns PyAV's errors into one VideoError; a full disk and the like stay what they are."""
    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
            raise
        raise VideoError(f"{what() if callable(what) else what} ({error.strerror or error})") from error
