"""Reads the frames of videos with their times, and writes frames as H.264. Needs PyAV, the extra `video`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from segjax.data.codec import MAX_PIXELS, refuse_size
from segjax.runtime import atomic, reading

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".asf", ".flv", ".ogv"),
)
# Suffixes of files that may hold only sound in the containers of videos.
SOUND = (".m4a", ".m4b", ".mka", ".weba", ".ogg", ".oga", ".opus", ".wma", ".aac", ".mp3")
HEAD = 1024  # bytes of a file that `is_video` needs
# Demuxers of FFmpeg for these containers. Others open files and addresses that the file names: playlists do.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,m4v,h264,hevc"


def is_video(head: bytes) -> bool:
    """Whether a file that begins with these bytes is of a container of videos."""
    if head[4:8] == b"ftyp":
        # Others are images: HEIF and AVIF.
        return head[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"crx ")
    is_transport_stream = any(
        len(head) > start + 2 * step and all(head[start + n * step] == 0x47 for n in range(3))
        for start, step in ((0, 188), (4, 192))
    )
    return (
        head[4:8] in (b"moov", b"mdat", b"wide")
        or head.startswith((b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"0&\xb2u\x8ef\xcf\x11", b"FLV\1", b"OggS"))
        or (head.startswith(b"RIFF") and head[8:12] == b"AVI ")
        or is_transport_stream
    )


class VideoError(ValueError):
    """A video that cannot be read, or PyAV that is not installed."""


class Header(NamedTuple):
    """Properties of a video that are known before it is decoded.

    Attributes:
      frames: number of frames; None if the file does not contain it.
      rate: frames per second, on average.
      time_base: unit of the times of frames, seconds.
      has_sound: whether the file has a sound track.
      duration: seconds of the picture; None if the file does not contain it.
    """

    frames: int | None
    rate: Fraction
    time_base: Fraction
    has_sound: bool
    duration: Fraction | None = None


class Frame(NamedTuple):
    """A frame, uint8 (H, W, 3), upright; its time and duration in units of the time base.

    Attributes:
      is_damaged: whether the decoder made up parts of it.
    """

    image: np.ndarray
    time: int
    duration: int
    is_damaged: bool = False


def pyav() -> ModuleType:
    """Imports PyAV. Raises VideoError, with the command that installs it, where it is missing."""
    try:
        import av
    except ModuleNotFoundError:
        raise VideoError("videos need PyAV: pip install 'segjax[video]'") from None
    return av


@contextlib.contextmanager
def opened(path: Path, *, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Header, Iterator[Frame]]]:
    """The header of a video and its frames in the order of their times.

    Raises:
      VideoError: the file is no video, is damaged, or its frames differ in size; also while frames are read.
      ImageError: its frames have more than `max_pixels` pixels.
      UnreadableError: something other than a file is there.
    """
    av = pyav()
    reading.refuse_irregular(path)
    with contextlib.ExitStack() as stack:
        with _as_video_error(av, "cannot be opened as a video"):
            # With "file:", FFmpeg does not take a name for an address or a command.
            options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
            container = stack.enter_context(av.open(f"file:{path.absolute()}", options=options))
        if not container.streams.video:
            raise VideoError("has no picture, only sound or data")
        stream = container.streams.video[0]
        # None of a format that FFmpeg does not know; PyAV then lacks the attributes of a decoder.
        if stream.codec_context is None:
            raise VideoError("has a format that cannot be decoded, or is damaged")
        if stream.width and stream.height:
            refuse_size((stream.height, stream.width), max_pixels)
        stream.thread_type = "AUTO"
        rate, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
        if not rate or not time_base:
            raise VideoError("does not say how many frames it has a second")
        header = Header(
            stream.frames or None,
            Fraction(rate),
            Fraction(time_base),
            bool(container.streams.audio),
            _duration(container, stream, Fraction(rate)),
        )
        yield header, _frames(av, container, stream, header)


def _duration(container, stream, rate: Fraction) -> Fraction | None:
    """Seconds of the picture by the header of the file."""
    if stream.frames and "mov" not in container.format.name:
        # FFmpeg cuts the duration of a truncated AVI.
        return stream.frames / rate
    if stream.duration:
        return Fraction(stream.duration) * stream.time_base
    # Matroska has it as text, "00:00:02.040000000", or for picture and sound together.
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    with contextlib.suppress(ValueError):
        return 3600 * Fraction(hours) + 60 * Fraction(minutes) + Fraction(seconds)
    microsecond = Fraction(1, 10**6)
    return container.duration * microsecond if container.duration and len(container.streams) == 1 else None


class Progress:
    """Which frames of a video were read, to find what is missing or damaged at its end."""

    def __init__(self, header: Header):
        self._header = header
        self._count = 0
        self._first: int | None = None
        self._end = 0
        self._damaged: list[int] = []

    def add(self, frame: Frame) -> None:
        if frame.is_damaged:
            self._damaged.append(self._count)
        self._count += 1
        self._first = frame.time if self._first is None else min(self._first, frame.time)
        self._end = max(self._end, frame.time + frame.duration)

    def faults(self) -> list[str]:
        """What is wrong with the video as a whole, after its last frame."""
        faults = []
        header, first = self._header, self._first or 0
        seconds = (self._end - first) * header.time_base
        is_short = header.duration is not None and header.duration - seconds > 1.5 / header.rate
        # Both must be missing. A count includes frames that an edit of the video has cut out, and times may begin late.
        if is_short and not (header.frames and self._count >= header.frames):
            expected = f"{header.frames} frames" if header.frames else f"{float(header.duration or 0):.2f} s"
            faults.append(
                f"ends early: it has {self._count} frames ({float(seconds):.2f} s), and its header promises {expected}"
            )
        if self._damaged:
            named = ", ".join(map(str, self._damaged[:10])) + " ..." * (len(self._damaged) > 10)
            faults.append(f"parts of {len(self._damaged)} frames are damaged and made up: {named}")
        return faults


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
            yield Frame(np.ascontiguousarray(image), time, duration, frame.is_corrupt)
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

    H.264 needs even sides: the last row or column of an odd one is repeated. It also needs times that grow: a frame at
    the time of the one before, as screen recorders write them, is shown one unit of the time base later.
    """

    def __init__(self, path: Path, header: Header):
        self._path = path
        self._header = header
        # Open from the first picture on, which has the size.
        self._output: tuple[OutputContainer, VideoStream] | None = None
        self._latest: int | None = None

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
            self._latest = time if self._latest is None else max(time, self._latest + 1)
            time = self._latest
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
