"""Videos keep their frames, order and times; predictions are drawn in the colours of the classes."""

import functools
import http.server
import io
import os
import shutil
import socketserver
import struct
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from segjax.checkpoints.load import LoadedCheckpoint
from segjax.commands import predict
from segjax.inference.batch_run import Run
from segjax.viz import overlay, video
from tests.pixels import PROGRAMS, SPEC, Pixels, scene

MODEL = Pixels(5)


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setattr("segjax.checkpoints.load.load", lambda path, weights: LoadedCheckpoint(MODEL, SPEC, {}))
    monkeypatch.setattr("segjax.runtime.environment.prepare", lambda: None)


def film(path, frames, *, rate=Fraction(25), times=None, time_base=None, sound=False, codec="libx264rgb", title=""):
    """A video with these frames; `libx264rgb` keeps every pixel. `times` are in units of the time base."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        options = {"crf": "0"} if codec.startswith("libx264") else {}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24" if codec == "libx264rgb" else "yuv420p"
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if sound:
            audio = container.add_stream("aac", rate=16000)
            audio.layout = "mono"
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            for at in range(0, 16000, 1024):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 16000, at
                container.mux(audio.encode(samples))
            container.mux(audio.encode())
    return path


def seen(path):
    """Frames uint8 (N, H, W, 3) and their times in seconds, by PyAV alone."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        times = [frame.pts * stream.time_base for frame in frames]
        kinds = [stream.type for stream in container.streams]
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        # From PyAV 19 on a number of its own, without abs().
        return images, times, Fraction(stream.average_rate), kinds


def run(*arguments):
    return predict.main([*map(str, arguments), "--checkpoint", "x"])


def moving(number, height, width):
    """Frames that are all different: a scene that moves to the left, four pixels a frame."""
    wide = scene(7, height, width + 4 * number)
    return [np.ascontiguousarray(wide[:, 4 * at : 4 * at + width]) for at in range(number)]


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_keeps_its_frames_their_order_and_their_rate(rate, suffix, tmp_path, capsys):
    frames = moving(20, 96, 400)
    source = film(tmp_path / f"clip{suffix}", frames, rate=rate)
    out = tmp_path / "out"
    assert run(source, "--output", out, "--write", "labels", "overlay", "sidebyside") == 0
    _, times, expected_rate, _ = seen(source)
    for kind in ("overlay", "sidebyside"):
        drawn, drawn_times, drawn_rate, kinds = seen(out / kind / "clip.mp4")
        assert len(drawn) == 20 and kinds == ["video"]
        assert drawn_times == times
        assert abs(drawn_rate - expected_rate) < Fraction(1, 50)
        for number, image in enumerate(frames):
            labels = MODEL.labels(image)
            draw = overlay.over if kind == "overlay" else overlay.side_by_side
            error = np.abs(drawn[number].astype(int) - draw(image, labels, SPEC, still=False)).mean()
            # Four pixels further it would be far more.
            assert error < 6
    for number, image in enumerate(frames):
        with Image.open(out / "labels" / f"clip{suffix}" / f"{number:06d}.png") as labels:
            np.testing.assert_array_equal(np.array(labels), MODEL.labels(image))
    assert len(list((out / "labels" / f"clip{suffix}").iterdir())) == 20
    said = capsys.readouterr().out
    assert "wrote 1 video of 20 frames" in said and "sound" not in said


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_title_that_is_not_utf8_is_accepted(suffix, tmp_path):
    source = film(tmp_path / f"clip{suffix}", moving(3, 64, 96), codec="libx264", title="abcdefgh")
    content = source.read_bytes()
    assert content.count(b"abcdefgh") == 1
    source.write_bytes(content.replace(b"abcdefgh", "Fahrräd".encode("latin-1") + b"\xff"))
    assert run(source, "--output", tmp_path / "out", "--write", "overlay") == 0
    assert len(seen(tmp_path / "out" / "overlay" / "clip.mp4")[0]) == 3


def test_the_times_of_a_varying_rate_are_kept(tmp_path):
    times = [0, 3, 4, 10, 11, 30, 31, 55]
    source = film(tmp_path / "clip.mp4", moving(8, 64, 400), rate=30, times=times, time_base=Fraction(1, 60))
    assert run(source, "--output", tmp_path / "out", "--write", "overlay") == 0
    assert seen(source)[1] == [Fraction(time, 60) for time in times]
    assert seen(tmp_path / "out" / "overlay" / "clip.mp4")[1] == [Fraction(time, 60) for time in times]


def test_odd_sides_repeat_their_last_pixel_with_a_message(tmp_path, capsys):
    frames = moving(5, 63, 401)
    source = film(tmp_path / "clip.mkv", frames, codec="ffv1")
    assert run(source, "--output", tmp_path / "out") == 0
    drawn, *_ = seen(tmp_path / "out" / "overlay" / "clip.mp4")
    picture = overlay.over(frames[0], MODEL.labels(frames[0]), SPEC, still=False)
    height, width = picture.shape[:2]
    assert drawn.shape == (5, height + height % 2, width + 1, 3)
    assert np.abs(drawn[0, :, -1].astype(int) - drawn[0, :, -2]).mean() < 8
    with Image.open(tmp_path / "out" / "labels" / "clip.mkv" / "000004.png") as labels:
        assert labels.size == (401, 63)
    assert "H.264 needs even sides" in " ".join(capsys.readouterr().out.split())


def with_matrix(source, matrix):
    """Puts QuickTime's matrix (a b c d) into a video; it moves (x, y) to (ax + cy, bx + dy), y downwards."""
    data = bytearray(source.read_bytes())
    a, b, c, d = (np.array(value * 2**16, ">i4").tobytes() for value in matrix)
    # Of the track's header: 40 bytes from its name on to the matrix, which has three columns.
    at = data.index(b"tkhd") + 4 + 40
    assert data[at : at + 4] == b"\0\1\0\0"
    data[at : at + 8], data[at + 12 : at + 20] = a + b, c + d
    source.write_bytes(data)


TURNS = [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
MIRRORED = [((-1, 0, 0, 1), 0), ((1, 0, 0, -1), 2), ((0, 1, 1, 0), 1), ((0, -1, -1, 0), -1)]


@pytest.mark.parametrize(
    ("matrix", "turns", "is_mirrored"), [(*turn, False) for turn in TURNS] + [(*turn, True) for turn in MIRRORED]
)
def test_the_rotation_and_mirroring_in_a_video_file_are_applied(matrix, turns, is_mirrored, tmp_path):
    """A telephone's; and that of a camera at its front, which is mirrored first and then turned."""
    frames = moving(3, 64, 96)
    source = film(tmp_path / "clip.mp4", frames)
    with_matrix(source, matrix)
    assert run(source, "--output", tmp_path / "out", "--write", "labels") == 0
    for number, image in enumerate(frames):
        expected = np.rot90(image[:, ::-1] if is_mirrored else image, turns)
        # By the matrix: the pixel in the upper right corner of the stored image.
        (a, b, c, d), (height, width) = matrix, expected.shape[:2]
        x, y = a + (c < 0), b + (d < 0)
        np.testing.assert_array_equal(image[0, -1], expected[height - 1 if y > 0 else 0, width - 1 if x > 0 else 0])
        with Image.open(tmp_path / "out" / "labels" / "clip.mp4" / f"{number:06d}.png") as labels:
            np.testing.assert_array_equal(np.array(labels), MODEL.labels(expected))


def test_sound_is_dropped_with_a_message(tmp_path, capsys):
    source = film(tmp_path / "clip.mp4", moving(5, 64, 400), sound=True)
    assert seen(source)[3] == ["video", "audio"]
    assert run(source, "--output", tmp_path / "out", "--write", "overlay") == 0
    assert "its sound is dropped" in " ".join(capsys.readouterr().out.split())
    assert seen(tmp_path / "out" / "overlay" / "clip.mp4")[3] == ["video"]


def test_frames_are_predicted_in_batches_with_one_program(tmp_path):
    frames = moving(7, 64, 400)
    source = film(tmp_path / "clip.mp4", frames)
    PROGRAMS.clear()
    assert run(source, "--output", tmp_path / "out", "--write", "labels", "--batch", "3") == 0
    assert PROGRAMS == [(3, 64, 400, 3)]
    for number, image in enumerate(frames):
        with Image.open(tmp_path / "out" / "labels" / "clip.mp4" / f"{number:06d}.png") as labels:
            np.testing.assert_array_equal(np.array(labels), MODEL.labels(image))


def test_a_damaged_video_is_reported_and_leaves_no_partial_output(tmp_path, capsys):
    whole = film(tmp_path / "in" / "a.mkv", moving(30, 64, 400)).read_bytes()
    (tmp_path / "in" / "b.mp4").write_bytes(b"no video at all, but text that is long enough to look at" * 9)
    (tmp_path / "in" / "c.mkv").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "in" / "d.png").write_bytes(b"")
    film(tmp_path / "in" / "e.mkv", moving(3, 64, 400))
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "b.mp4: cannot be opened as a video" in said and "d.png: is empty" in said
    names = [path.name for path in (tmp_path / "out").rglob("*")]
    assert "a.mp4" in names and "e.mp4" in names and "b.mp4" not in names
    assert not [name for name in names if ".part" in name]


def test_a_failure_in_the_middle_of_a_video_removes_its_files(tmp_path, monkeypatch, capsys):
    source = film(tmp_path / "clip.mp4", moving(12, 64, 400))
    out = tmp_path / "out"
    original = video.Writer.write
    count = []

    def write(self, *arguments):
        count.append(1)
        if len(count) > 5:
            raise ValueError("the seventh picture is lost")
        original(self, *arguments)

    monkeypatch.setattr(video.Writer, "write", write)
    assert run(source, "--output", out) == 1
    assert "clip.mp4: the seventh picture is lost" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["predict.json"]
    assert not (out / "labels" / "clip.mp4").exists()
    monkeypatch.undo()


def test_a_finished_video_is_kept_when_resuming(tmp_path, capsys):
    source = film(tmp_path / "clip.mp4", moving(4, 64, 400))
    arguments = (source, "--output", tmp_path / "out", "--resume")
    assert run(*arguments) == 0
    (tmp_path / "out" / "labels" / "clip.mp4" / "000002.png").unlink()
    assert run(*arguments) == 0
    assert "everything is done already" in capsys.readouterr().out
    (tmp_path / "out" / "overlay" / "clip.mp4").unlink()
    assert run(*arguments) == 0
    assert len(list((tmp_path / "out" / "labels" / "clip.mp4").iterdir())) == 4


def test_the_colours_in_a_video_are_those_of_the_classes(tmp_path):
    """Through BT.709 and back: what a player shows that reads what the file says of its colours."""
    header = video.Header(2, Fraction(25), Fraction(1, 25), False)
    picture = np.zeros((64, 320, 3), np.uint8)
    for k, color in enumerate(SPEC.colors):
        picture[:, 64 * k : 64 * (k + 1)] = color
    with video.writer(tmp_path / "colours.mp4", header) as writer:
        for time in range(2):
            writer.write(picture, time, 1)
    with av.open(str(tmp_path / "colours.mp4")) as container:
        (frame, _) = container.decode(video=0)
        context = container.streams.video[0].codec_context
        assert context.name == "h264" and context.pix_fmt == "yuv420p"
        assert (frame.colorspace, frame.color_range) == (1, 1)
        shown = frame.to_ndarray(format="rgb24")
    for k, color in enumerate(SPEC.colors):
        middle = shown[16:48, 64 * k + 16 : 64 * k + 48].reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(middle, color, atol=4)


def cut(source, path, share):
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_video_shorter_than_its_header_states_is_written_and_named(suffix, tmp_path, capsys):
    codec = "mpeg4" if suffix == ".avi" else "libx264rgb"
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(30)]
    whole = film(tmp_path / f"whole{suffix}", frames, codec=codec)
    if suffix == ".mp4":
        # The header comes first, as for the web.
        with (
            av.open(str(whole)) as container,
            av.open(str(tmp_path / "web.mp4"), "w", options={"movflags": "+faststart"}) as output,
        ):
            stream = output.add_stream_from_template(container.streams.video[0])
            for packet in container.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    output.mux(packet)
        whole = tmp_path / "web.mp4"
    assert run(whole, "--output", tmp_path / "out", "--write", "labels") == 0
    assert "30 frames" in capsys.readouterr().out
    short = cut(whole, tmp_path / f"short{suffix}", 0.6)
    assert run(short, "--output", tmp_path / "out", "--write", "labels", "overlay") == 1
    said = capsys.readouterr()
    written = len(list((tmp_path / "out" / "labels" / short.name).iterdir()))
    assert 5 < written < 25
    assert f"wrote 1 video of {written} frames" in said.out
    assert f"short{suffix}: ends early: it has {written} frames" in " ".join(said.err.split())
    assert len(seen(tmp_path / "out" / "overlay" / "short.mp4")[0]) == written


def test_resume_names_a_video_that_ended_early_again_until_it_is_replaced(tmp_path, capsys):
    frames = list(np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), dtype=np.uint8))
    whole = film(tmp_path / "whole.avi", frames, codec="mpeg4")
    short = cut(whole, tmp_path / "short.avi", 0.6)
    Image.fromarray(moving(1, 32, 48)[0]).save(tmp_path / "other.png")
    out = tmp_path / "out"

    def resumed(*inputs):
        status = run(*inputs, "--output", out, "--write", "labels", "--resume")
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    assert run(short, "--output", out, "--write", "labels") == 1
    assert "ends early" in " ".join(capsys.readouterr().err.split())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    for inputs in ([short], [tmp_path / "other.png"], [short, tmp_path / "other.png"]):
        status, said, told = resumed(*inputs)
        assert (status, "short.avi: ends early" in told) == ((1, True) if short in inputs else (0, False))
        assert not told or f"1 of {len(inputs)} input" in told
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}.items()
    shutil.copy(whole, short)
    assert resumed(short)[0] == 0 and len(list((out / "labels" / "short.avi").iterdir())) == 30
    status, said, told = resumed(short)
    assert (status, told) == (0, "") and "everything is done already" in said


def test_a_video_trimmed_without_reencoding_is_complete(tmp_path):
    """Its header counts frames that are not shown; telephones trim like that."""
    whole = film(tmp_path / "whole.mp4", moving(30, 64, 96))
    with av.open(str(whole)) as container, av.open(str(tmp_path / "trimmed.mp4"), "w") as output:
        source = container.streams.video[0]
        stream = output.add_stream_from_template(source)
        for packet in container.demux(source):
            if packet.dts is not None:
                packet.pts -= int(Fraction(1, 2) / source.time_base)
                packet.dts -= int(Fraction(1, 2) / source.time_base)
                packet.stream = stream
                output.mux(packet)
    with video.opened(tmp_path / "trimmed.mp4") as (header, frames):
        progress = video.Progress(header)
        number = sum(progress.add(frame) is None for frame in frames)
    assert number < header.frames == 30 and not progress.faults()


def test_videos_with_frames_made_up_by_the_decoder_are_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(20)]
    whole = film(tmp_path / "whole.ts", frames, codec="mpeg2video")
    cut(whole, tmp_path / "cut.ts", 0.62)
    assert run(tmp_path / "cut.ts", "--output", tmp_path / "out", "--write", "labels") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "cut.ts: parts of 1 frames are damaged and were filled in: " in said
    assert run(whole, "--output", tmp_path / "out", "--write", "labels") == 0


@pytest.mark.parametrize("times", [[0, 40, 40, 80, 120, 120], [0, 0, 0, 1, 40], [5, 45, 45, 45]])
def test_repeated_times_are_moved_as_little_as_h264_requires(times, tmp_path):
    source = film(
        tmp_path / "clip.mkv", moving(len(times), 64, 400), times=times, time_base=Fraction(1, 1000), codec="ffv1"
    )
    assert run(source, "--output", tmp_path / "out", "--write", "overlay") == 0
    drawn, found, *_ = seen(tmp_path / "out" / "overlay" / "clip.mp4")
    assert len(drawn) == len(times) and all(np.diff(np.array(found, float)) > 0)
    expected, latest = [], -1
    for at in times:
        latest = max(at, latest + 1)
        expected.append(latest)
    assert [round(float(at) * 1000) for at in found] == [at - times[0] * (found[0] == 0) for at in expected]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # One frame too late; a clock that was set back; the same twice.
        ([0, 40, 80, 60, 120, 160], [0, 40, 80, 81, 120, 160]),
        ([1000, 1040, 1080, 0, 40, 80], [1000, 1040, 1080, 1081, 1121, 1161]),
        ([0, 40, 40, 80, 20, 60, 200], [0, 40, 41, 80, 81, 121, 200]),
    ],
)
def test_backward_times_continue_until_the_source_is_ahead_again(times, expected, tmp_path):
    header = video.Header(len(times), Fraction(25), Fraction(1, 1000), False)
    frames = moving(len(times), 64, 96)
    with video.writer(tmp_path / "clip.mp4", header) as writer:
        for image, at in zip(frames, times, strict=True):
            writer.write(image, at, 40)
    drawn, found, *_ = seen(tmp_path / "clip.mp4")
    assert [round(float(at) * 1000) for at in found] == expected
    for image, written in zip(frames, drawn, strict=True):
        assert np.abs(written.astype(int) - image).mean() < 12


def test_a_video_with_restarting_times_is_written_to_its_end(tmp_path, capsys):
    """Recorders append to transport streams, with a clock that begins anew."""
    (tmp_path / "clip.ts").write_bytes(3 * endless(8))
    assert run(tmp_path / "clip.ts", "--output", tmp_path / "out", "--write", "overlay") == 0
    drawn, found, *_ = seen(tmp_path / "out" / "overlay" / "clip.mp4")
    assert len(drawn) == 24 and "24 frames done" in " ".join(capsys.readouterr().out.split())
    steps = [round(float(step) * 90000) for step in np.diff(found)]
    assert steps == 2 * [*7 * [3600], 1] + 7 * [3600]


# Cameras and addresses


class Quiet(http.server.BaseHTTPRequestHandler):
    """Sends `content`, and what `more` gives as long as it gives something."""

    def __init__(self, *arguments, content=b"", more=None, kind="video/x-matroska", status=200):
        self.content, self.more, self.kind, self.status = content, more, kind, status
        super().__init__(*arguments)

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Type", self.kind)
        length = ("Connection", "close") if self.more else ("Content-Length", str(len(self.content)))
        self.send_header(*length)
        self.end_headers()
        try:
            self.wfile.write(self.content)
            while data := self.more and self.more():
                self.wfile.write(data)
        except OSError:
            # The reader has enough.
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    """A function (settings of Quiet) -> the address of a server that ends with the test."""
    servers = []

    def serve(**settings):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, **settings))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://user:secret@127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def endless(number=8):
    """The content of a stream of so many frames that has neither length nor duration, as of a camera."""
    data = io.BytesIO()
    with av.open(data, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for image in moving(number, 64, 96):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return data.getvalue()


def stop_after(monkeypatch, number):
    """Ctrl-C, in the main thread, when so many batches have been computed."""
    original, count = Run._predicted, []

    def predicted(self, images):
        count.append(1)
        if len(count) > number:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(Run, "_predicted", predicted)


def test_a_video_at_an_address_keeps_its_times_and_hides_its_password(tmp_path, capsys, served):
    times = [0, 10, 55, 300, 310, 900]
    frames = moving(6, 64, 96)
    source = film(tmp_path / "clip.mkv", frames, times=times, time_base=Fraction(1, 1000))
    address = served(content=source.read_bytes())
    out = tmp_path / "out"
    assert run(f"{address}/videos/clip%20x.mkv?key=1", "--output", out, "--write", "labels", "overlay") == 0
    drawn, found, *_ = seen(out / "overlay" / "clip_x.mp4")
    assert len(drawn) == 6 and [round(float(at) * 1000) for at in found] == times
    for number, image in enumerate(frames):
        with Image.open(out / "labels" / "clip_x.mkv" / f"{number:06d}.png") as labels:
            np.testing.assert_array_equal(np.array(labels), MODEL.labels(image))
    said = capsys.readouterr().out
    assert "wrote 1 video of 6 frames" in said
    assert "secret" not in said and "secret" not in (out / "predict.json").read_text()


def test_ctrl_c_ends_an_endless_stream_with_a_complete_video(tmp_path, capsys, served, monkeypatch):
    monkeypatch.setattr(video, "PATIENCE", 0.5)
    ended = threading.Event()
    address = served(content=endless(), more=lambda: ended.wait(20) or b"")
    stop_after(monkeypatch, 3)
    flags = ("--batch", 1, "--write", "overlay", "labels")
    assert run(f"{address}/live", "--output", tmp_path / "out", *flags) == 130
    ended.set()
    drawn, found, *_ = seen(tmp_path / "out" / "overlay" / "live.mp4")
    captured = capsys.readouterr()
    said = " ".join(captured.out.split())
    assert 1 <= len(drawn) <= 3 and f"{len(drawn)} frames done" in said and "it ends with Ctrl-C" in said
    assert found == [Fraction(number, 25) for number in range(len(drawn))]
    assert len(list((tmp_path / "out" / "labels" / "live").iterdir())) == len(drawn)
    assert "stopped" in captured.err and not list(tmp_path.rglob(".*part*"))


def test_ctrl_c_in_a_video_file_leaves_no_output(tmp_path, monkeypatch):
    source = film(tmp_path / "clip.mkv", moving(8, 64, 96))
    stop_after(monkeypatch, 3)
    assert run(source, "--output", tmp_path / "out", "--batch", 1, "--write", "overlay") == 130
    assert not (tmp_path / "out" / "overlay" / "clip.mp4").exists() and not list(tmp_path.rglob(".*part*"))


def test_a_stream_that_stops_is_written_so_far_and_named_again(tmp_path, capsys, served, monkeypatch):
    monkeypatch.setattr(video, "PATIENCE", 0.5)
    gone = threading.Event()
    address = served(content=endless(12), more=lambda: gone.wait(20) or b"")
    arguments = (f"{address}/live.ts", "--output", tmp_path / "out", "--write", "labels")
    assert run(*arguments) == 1
    gone.set()
    told = " ".join(capsys.readouterr().err.split())
    assert "no data for 0.5 seconds" in told and "secret" not in told
    written = len(list((tmp_path / "out" / "labels" / "live.ts").iterdir()))
    assert written >= 5
    assert run(*arguments, "--resume") == 1
    assert "no data for" in " ".join(capsys.readouterr().err.split())


def test_pictures_without_times_get_their_arrival_times(tmp_path, served):
    frames, pauses = moving(5, 64, 96), [0, 0.1, 0.1, 0.4, 0.1]
    parts = []
    for image in frames:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(file.getvalue())}\r\n\r\n"
        parts.append(head.encode() + file.getvalue() + b"\r\n")
    # FFmpeg looks at one picture and the beginning of the next before it gives any.
    sent = iter(zip(pauses, parts, strict=True))

    def more():
        pause, part = next(sent, (0, b""))
        time.sleep(pause)
        return part

    address = served(more=more, kind="multipart/x-mixed-replace; boundary=frame")
    assert run(f"{address}/mjpg", "--output", tmp_path / "out", "--write", "overlay") == 0
    drawn, found, *_ = seen(tmp_path / "out" / "overlay" / "mjpg.mp4")
    assert len(drawn) == 5 and found[0] == 0
    # The longest pause is before the fourth picture, and it is known where the machine is not too busy to tell.
    assert 0.4 <= float(found[-1]) < 30 and np.argmax(np.diff(np.array(found, float))) in (2, 3)


def test_a_camera_is_read_until_ctrl_c_with_times_from_zero(tmp_path, capsys, monkeypatch):
    """A stand-in for a camera: a character device of the name, and FFmpeg's test pictures behind it."""
    (tmp_path / "video0").symlink_to(os.devnull)
    opened = []

    def stand_in(name, *, format, **settings):
        opened.append((name, format))
        return real("testsrc=size=96x64:rate=10,setpts=PTS+7000/TB", format="lavfi")

    real = av.open
    monkeypatch.setattr(av, "open", lambda *given, **more: (real if len(given) > 1 else stand_in)(*given, **more))
    stop_after(monkeypatch, 4)
    assert run(tmp_path / "video0", "--output", tmp_path / "out", "--batch", 1, "--write", "overlay") == 130
    monkeypatch.undo()
    assert opened == [(str(tmp_path / "video0"), "v4l2")]
    drawn, found, *_ = seen(tmp_path / "out" / "overlay" / "video0.mp4")
    assert 1 <= len(drawn) <= 4 and found == [Fraction(number, 10) for number in range(len(drawn))]


class Rtsp(socketserver.StreamRequestHandler):
    """A camera that sends one transport stream, in RTP packets inside the connection (RFC 2326, 2250), and hangs up."""

    def handle(self):
        method = ""
        while method != "PLAY":
            method, *_ = self.rfile.readline().decode().split()
            headers = dict(line.decode().strip().split(": ", 1) for line in iter(self.rfile.readline, b"\r\n"))
            more, body = "", ""
            if method == "DESCRIBE":
                more = "Content-Type: application/sdp\r\n"
                body = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
            if method == "SETUP":
                more = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n"
            head = f"RTSP/1.0 200 OK\r\nCSeq: {headers['CSeq']}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
            self.wfile.write((head + body).encode())
        data, step = endless(20), 7 * 188
        for number, start in enumerate(range(0, len(data), step)):
            packet = struct.pack(">BBHII", 0x80, 33, number, 3600 * number, 7) + data[start : start + step]
            self.wfile.write(b"$\0" + struct.pack(">H", len(packet)) + packet)


def test_an_rtsp_camera_is_read_with_times_from_zero(tmp_path, capsys):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Rtsp) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        address = f"rtsp://user:secret@127.0.0.1:{server.server_address[1]}/live"
        status = run(address, "--output", tmp_path / "out", "--write", "overlay")
        server.shutdown()
    captured = capsys.readouterr()
    assert status == 0 and "secret" not in captured.out, captured.err
    drawn, found, *_ = seen(tmp_path / "out" / "overlay" / "live.mp4")
    # Without a frame that FFmpeg does not know to be whole.
    assert 18 <= len(drawn) <= 20 and found == [Fraction(number, 25) for number in range(len(drawn))]


@pytest.mark.parametrize(
    ("settings", "path", "said"),
    [
        ({"status": 404}, "x.mp4", "404 Not Found"),
        ({"content": b"<html>no video</html>" * 99}, "x.mp4", "cannot be opened as a video"),
        # It would open other addresses and files.
        ({"content": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"}, "x.m3u8", "cannot be opened"),
    ],
)
def test_an_address_without_a_video_is_named(tmp_path, capsys, served, settings, path, said):
    assert run(f"{served(**settings)}/{path}", "--output", tmp_path / "out", "--write", "labels") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert said in told and "secret" not in told and not (tmp_path / "out" / "labels").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["ftp://me:secret@host/x.mp4"], "ftp://host/x.mp4: not one of http://, https://, rtsp://"),
        (["file:///etc/passwd"], "file:///etc/passwd: not one of"),
        (["http://[x"], "no address"),
        (["rtsp://host/a", "rtsp://host/a"], "rtsp://host/a: was given twice"),
        (["rtsp://one/a", "rtsp://two/a"], "would both be written to"),
    ],
)
def test_unreadable_addresses_are_named_before_anything_starts(tmp_path, capsys, given, said):
    assert run(*given, "--output", tmp_path / "out") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told and "secret" not in told and not (tmp_path / "out").exists()


def test_the_size_in_the_header_of_a_video_is_limited(tmp_path, capsys):
    source = film(tmp_path / "clip.mp4", moving(3, 64, 96))
    arguments = (source, "--output", tmp_path / "out", "--write", "labels")
    assert run(*arguments, "--max-pixels", 64 * 96 - 1) == 1
    assert "clip.mp4: has 64x96 pixels, 6,144, more than 6,143" in " ".join(capsys.readouterr().err.split())
    assert run(*arguments, "--max-pixels", 64 * 96) == 0


def test_a_video_never_names_other_files_to_open(tmp_path, capsys):
    """FFmpeg would open what a playlist or a concatenation names, and waits for FIFOs."""
    film(tmp_path / "real.mp4", moving(3, 64, 96))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/real.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "in" / "concat.mp4").write_text("ffconcat version 1.0\nfile ../real.mp4\n")
    os.mkfifo(tmp_path / "in" / "pipe.mp4")
    assert run(tmp_path / "in", "--output", tmp_path / "out", "--write", "labels") == 1
    said = " ".join(capsys.readouterr().err.split())
    for name in ("list.mp4: cannot be opened", "concat.mp4: cannot be opened", "pipe.mp4: a FIFO, not a file"):
        assert name in said
    # A name that FFmpeg takes for a protocol is a file all the same.
    os.rename(tmp_path / "real.mp4", tmp_path / "concat:a|b.mp4")
    assert run(tmp_path / "concat:a|b.mp4", "--output", tmp_path / "out", "--write", "labels") == 0
