"""Reads frames and their times from videos, cameras and streams, and writes frames as H.264.

It needs PyAV, the extra `video`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
import stat
import time
import urllib.parse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from segjax.data.codec import MAX_PIXELS, refuse_size
from segjax.runtime import atomic, reading

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".asf", ".flv", ".ogv"),
)
# Suffixes of files that may hold only sound in the containers of videos.
SOUND = (".m4a", ".m4b", ".mka", ".weba", ".ogg", ".oga", ".opus", ".wma", ".aac", ".mp3")
HEAD = 1024  # bytes of a file that `is_video` needs
# Demuxers of FFmpeg for these containers. Others, such as those of playlists, open files and addresses named in a file.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,m4v,h264,hevc"
# Demuxers for addresses, without playlists, which open further addresses.
_STREAMS = {"http": f"{_CONTAINERS},mpjpeg", "https": f"{_CONTAINERS},mpjpeg", "rtsp": "rtsp", "rtsps": "rtsp"}
# Protocols that these may open: that of the address, and those that carry it.
_PROTOCOLS = {scheme: "http,https,tcp,tls" if scheme[0] == "h" else "rtsp,rtp,udp,tcp,tls" for scheme in _STREAMS}
_CAMERA = "video4linux2,v4l2"
# Seconds that an address may take to answer, and to send more.
PATIENCE = 10
# Units per second of the clock for the frames of streams without times.
_CLOCK = 1000


@dataclasses.dataclass(frozen=True)
class Live:
    """A camera or an address, which sends frames while they are predicted; it may have no end.

    Attributes:
      address: Path of the device, or address, with its password.
      name: Name of its outputs.
    """

    address: str
    name: str

    @property
    def is_camera(self) -> bool:
        return "://" not in self.address

    def __str__(self) -> str:
        return _without_password(self.address)


def _without_password(address: str) -> str:
    return re.sub(r"(?<=://)[^/?#]*@", "", address)


def live(given: str) -> Live | None:
    """The camera or the address that an input names; None if it is neither.

    Raises:
      VideoError: The address is of a kind that cannot be read.
    """
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", given):
        if match[1].lower() not in _STREAMS:
            raise VideoError(f"{_without_password(given)}: not one of {', '.join(f'{each}://' for each in _STREAMS)}")
        try:
            parts = urllib.parse.urlsplit(given)
        except ValueError as error:
            raise VideoError(f"{_without_password(given)}: no address ({error})") from None
        found = urllib.parse.unquote(parts.path).rstrip("/").rpartition("/")[2] or parts.hostname or ""
        return Live(match[1].lower() + given[match.end(1) :], re.sub(r"[^\w.-]+|^\.+", "_", found) or "stream")
    path = Path(given)
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch(r"video\d+", path.name) and stat.S_ISCHR(path.stat().st_mode):
            return Live(given, path.name)
    return None


def is_video(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a container of videos."""
    if head[4:8] == b"ftyp":
        # These brands are images: HEIF and AVIF.
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
    """Raised when a video cannot be read, or PyAV is not installed."""


class Header(NamedTuple):
    """Properties of a video that are known before it is decoded.

    Attributes:
      frames: Number of frames; None if the file does not contain it.
      rate: Frames per second, on average.
      time_base: Unit of the times of frames, in seconds.
      has_sound: Whether the file has a sound track.
      duration: Duration of the picture in seconds; None if the file does not contain it.
    """

    frames: int | None
    rate: Fraction
    time_base: Fraction
    has_sound: bool
    duration: Fraction | None = None


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
      image: Upright image, uint8 (H, W, 3).
      time: Time in units of the time base.
      duration: Duration in units of the time base.
      is_damaged: Whether the decoder made up parts of it.
    """

    image: np.ndarray
    time: int
    duration: int
    is_damaged: bool = False


def pyav() -> ModuleType:
    """Imports PyAV. Raises VideoError, with the command that installs it, if it is missing."""
    try:
        import av
    except ModuleNotFoundError:
        raise VideoError("videos need PyAV: pip install 'segjax[video]'") from None
    return av


@contextlib.contextmanager
def opened(source: Path | Live, *, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Header, Iterator[Frame]]]:
    """The header of a video, and its frames in display order. The frames of a `Live` source begin at time 0.

    Raises:
      VideoError: The source is not a video, is damaged, or its frames differ in size; also while frames are read.
      ImageError: Its frames have more than `max_pixels` pixels.
      UnreadableError: The source is not a regular file.
    """
    av = pyav()
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(_open_live(av, source) if isinstance(source, Live) else _open_file(av, source))
        if not container.streams.video:
            raise VideoError("has no picture, only sound or data")
        stream = container.streams.video[0]
        # None for a format that FFmpeg does not know; PyAV then lacks the attributes of a decoder.
        if stream.codec_context is None:
            raise VideoError("has a format that cannot be decoded, or is damaged")
        if stream.width and stream.height:
            refuse_size((stream.height, stream.width), max_pixels)
        stream.thread_type = "AUTO"
        rate, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
        if not rate or not time_base:
            raise VideoError("does not state its frame rate")
        is_live = isinstance(source, Live)
        # A sequence of pictures has no times. FFmpeg would assume 25 frames per second.
        by_clock = "mpjpeg" in container.format.name
        header = Header(
            stream.frames or None,
            Fraction(rate),
            Fraction(1, _CLOCK) if by_clock else Fraction(time_base),
            bool(container.streams.audio),
            _duration(container, stream, Fraction(rate)),
        )
        yield header, _frames(av, container, stream, header, from_zero=is_live, by_clock=by_clock)


def _open_file(av, path: Path) -> InputContainer:
    reading.refuse_irregular(path)
    with _as_video_error(av, "cannot be opened as a video"):
        # With "file:", FFmpeg does not interpret a name as an address or a command.
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        return av.open(f"file:{path.absolute()}", options=options, **_any_text(av))


def _any_text(av) -> dict:
    """Arguments that make `av.open` accept text that is not UTF-8, such as a title. PyAV 19 always accepts it."""
    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def _open_live(av, source: Live) -> InputContainer:
    if source.is_camera:
        with _as_video_error(av, "cannot be opened as a camera"):
            return av.open(
                source.address,
                format="v4l2",
                options={"format_whitelist": _CAMERA},
                timeout=PATIENCE,
                **_any_text(av),
            )
    scheme = source.address.partition(":")[0]
    options = {"format_whitelist": _STREAMS[scheme], "protocol_whitelist": _PROTOCOLS[scheme]}
    if scheme[0] == "r":
        # Not UDP, FFmpeg's default, because lost packets would damage frames.
        options["rtsp_transport"] = "tcp"
    with _as_video_error(av, "cannot be opened as a video; other files are not read from addresses"):
        return av.open(source.address, options=options, timeout=PATIENCE, **_any_text(av))


def _duration(container, stream, rate: Fraction) -> Fraction | None:
    """Duration of the picture in seconds, from the header of the file."""
    if stream.frames and "mov" not in container.format.name:
        # Not the stream's duration, which FFmpeg shortens in a truncated AVI.
        return stream.frames / rate
    if stream.duration:
        return Fraction(stream.duration) * stream.time_base
    # Matroska stores the duration as text, "00:00:02.040000000", or for picture and sound together.
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    with contextlib.suppress(ValueError):
        return 3600 * Fraction(hours) + 60 * Fraction(minutes) + Fraction(seconds)
    microsecond = Fraction(1, 10**6)
    return container.duration * microsecond if container.duration and len(container.streams) == 1 else None


class Progress:
    """The frames of a video that were read, to report missing and damaged ones at its end.

    Attributes:
      count: Number of frames read.
    """

    def __init__(self, header: Header):
        self._header = header
        self.count = 0
        self._first: int | None = None
        self._end = 0
        self._damaged: list[int] = []

    def add(self, frame: Frame) -> None:
        if frame.is_damaged:
            self._damaged.append(self.count)
        self.count += 1
        self._first = frame.time if self._first is None else min(self._first, frame.time)
        self._end = max(self._end, frame.time + frame.duration)

    def faults(self) -> list[str]:
        """Faults of the whole video, after its last frame."""
        faults = []
        header, first = self._header, self._first or 0
        seconds = (self._end - first) * header.time_base
        is_short = header.duration is not None and header.duration - seconds > 1.5 / header.rate
        # Both time and frames must be missing: a count includes frames that an edit has cut out, and times may begin
        # late.
        if is_short and not (header.frames and self.count >= header.frames):
            expected = f"{header.frames} frames" if header.frames else f"{float(header.duration or 0):.2f} s"
            faults.append(
                f"ends early: it has {self.count} frames ({float(seconds):.2f} s), and its header states {expected}"
            )
        if self._damaged:
            named = ", ".join(map(str, self._damaged[:10])) + " ..." * (len(self._damaged) > 10)
            faults.append(f"parts of {len(self._damaged)} frames are damaged and were filled in: {named}")
        return faults


def _frames(av, container, stream, header: Header, *, from_zero: bool, by_clock: bool) -> Iterator[Frame]:
    """The frames, with the times of the file, with times `from_zero`, or with times of arrival `by_clock`."""
    usual = max(round(1 / (header.rate * header.time_base)), 1)
    number, expected, size, first, begun = 0, None, None, None, time.monotonic()
    with _as_video_error(av, lambda: f"is damaged at frame {number}"):
        for frame in _until_closed(av, container.decode(stream)) if by_clock else container.decode(stream):
            image = _upright(frame)
            size = size or image.shape
            if image.shape != size:
                raise VideoError(
                    f"changes from {size[0]}x{size[1]} to {image.shape[0]}x{image.shape[1]} at frame {number}"
                )
            at = round((time.monotonic() - begun) * _CLOCK) if by_clock else frame.pts
            at = at if at is not None else expected or 0
            duration = usual if by_clock else frame.duration or usual
            expected = at + duration
            if first is None:
                first = at if from_zero else 0
            yield Frame(np.ascontiguousarray(image), at - first, duration, frame.is_corrupt)
            number += 1
    if not number:
        raise VideoError("has no frames")


def _until_closed(av, frames: Iterator) -> Iterator:
    """The frames of a sequence of pictures. FFmpeg raises EIO at its end, where it expects another picture."""
    try:
        yield from frames
    except av.FFmpegError as error:
        if error.errno != errno.EIO:
            raise


def _upright(frame) -> np.ndarray:
    """The frame as uint8 (H, W, 3), rotated by quarter turns and mirrored by the display matrix, which phones store.

    The matrix a b . c d . maps (x, y) to (ax + cy, bx + dy), with y downwards. Angles are rounded to quarter turns.
    """
    image = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, x, y = image.transpose(1, 0, 2), c, b
    else:
        x, y = a, d
    return image[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]


@contextlib.contextmanager
def writer(path: Path, header: Header) -> Iterator[Writer]:
    """Writes an H.264 file in MP4, 4:2:0 and BT.709, which appears at `path` when the body has finished."""
    with atomic.replacing_file(path, durable=False) as temporary:
        found = Writer(temporary, header)
        try:
            yield found
            found.finish()
        finally:
            found.close()


class Writer:
    """The encoder of one video; see `writer`.

    H.264 needs even sides, so the last row or column of an odd side is repeated. It also needs increasing times. Screen
    recorders, and clocks that are set back, give frames at or before the time of the last one. Such a frame is shown
    one unit of the time base after the last one, and later frames are delayed equally until the times of the source
    have caught up.
    """

    def __init__(self, path: Path, header: Header):
        self._path = path
        self._header = header
        # Opened with the first picture, which has the size.
        self._output: tuple[OutputContainer, VideoStream] | None = None
        self._latest: int | None = None
        self._later = 0

    def write(self, picture: np.ndarray, time: int, duration: int) -> None:
        """Adds a picture, uint8 (H, W, 3), with time and duration in units of the header's time base."""
        av = pyav()
        height, width = picture.shape[:2]
        with _as_video_error(av, "cannot be encoded"):
            if self._output is None:
                self._output = self._open(av, height + height % 2, width + width % 2)
            container, stream = self._output
            padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            # The colour space is set, because without it players assume BT.709 for large videos and BT.601 for small.
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            if self._latest is None or time > self._latest:
                self._later = 0
            else:
                self._later = max(self._later, self._latest + 1 - time)
            time += self._later
            self._latest = time
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
        # FFmpeg's message for a time limit is "Immediate exit requested".
        waited = isinstance(error, av.error.ExitError)
        why = f"no data for {PATIENCE} seconds" if waited else error.strerror or error
        raise VideoError(f"{what() if callable(what) else what} ({why})") from error
