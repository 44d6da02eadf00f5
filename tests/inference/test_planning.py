"""The choice of files to predict: content decides, links are followed, each folder is read once, and no file is dropped
without a reason."""

import contextlib
import io
import os
import socket

import numpy as np
import pytest
from PIL import Image

from segjax.inference import planning
from tests.pixels import scene


def put(path, kind="PNG", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(seed, 8, 9)).save(path, kind)
    return path


def planned(inputs, output, folder):
    """Names of the sources below a folder, and what was skipped with its reason."""
    given = inputs if isinstance(inputs, list) else [inputs]
    jobs, skipped = planning.plan([str(path) for path in given], output, ["labels"])
    names = [str(job.source.relative_to(folder)) for job in jobs]
    return names, {str(path.relative_to(folder)): reason for path, reason in skipped}


def test_files_are_recognised_by_content_regardless_of_the_suffix(tmp_path):
    root = tmp_path / "in"
    for number, (name, kind) in enumerate(
        {
            "a.jfif": "JPEG",
            "b.jpe": "JPEG",
            "c.PNG": "PNG",
            "d.dat": "TIFF",
            "e": "WebP",
            "f.mp4": "GIF",
            "g.JPG_original": "BMP",
            "frame.0017": "PNG",
            "frame.0018": "PNG",
        }.items()
    ):
        put(root / name, kind, seed=number)
    (root / "h.png").write_bytes(b"<html>gone")
    (root / "i.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("BM: notes")
    (root / "data.bin").write_bytes(np.random.default_rng(0).bytes(4000))
    jobs, skipped = planning.plan([str(root)], tmp_path / "out", ["labels"])
    assert not any(job.is_video for job in jobs)
    outputs = {job.source.name: str(job.outputs["labels"].relative_to(tmp_path / "out" / "labels")) for job in jobs}
    assert outputs == {
        "a.jfif": "a.png",
        "b.jpe": "b.png",
        "c.PNG": "c.png",
        "d.dat": "d.dat.png",
        "e": "e.png",
        "f.mp4": "f.png",
        "g.JPG_original": "g.JPG_original.png",
        "frame.0017": "frame.0017.png",
        "frame.0018": "frame.0018.png",
        # Named like images, so that they are reported as ones that cannot be read.
        "h.png": "h.png",
        "i.jpg": "i.png",
    }
    assert {path.name for path, _ in skipped} == {"notes.txt", "data.bin"}
    assert planning.reasons(skipped).startswith("2; neither an image nor a video that can be read: ")


@pytest.mark.parametrize(
    ("head", "is_video"),
    [
        (b"\0\0\0\x20ftypisom" + bytes(40), True),
        (b"\0\0\0\x20ftypheic" + bytes(40), False),
        (b"\x1aE\xdf\xa3" + bytes(40), True),
        (b"RIFF\0\0\0\0AVI LIST", True),
        (b"RIFF\0\0\0\0WAVEfmt ", False),
        ((b"G" + bytes(187)) * 5, True),
        (b"Good morning, this is a text", False),
    ],
)
def test_videos_are_recognised_by_content(head, is_video, tmp_path):
    (tmp_path / "in").mkdir()
    put(tmp_path / "in" / "z.png")
    (tmp_path / "in" / "clip").write_bytes(head)
    jobs, skipped = planning.plan([str(tmp_path / "in")], tmp_path / "out", ["overlay"])
    assert [job.source.name for job in jobs if job.is_video] == ["clip"] * is_video
    assert len(skipped) == (not is_video)
    # Sound in the container of a video is none.
    os.rename(tmp_path / "in" / "clip", tmp_path / "in" / "clip.m4a")
    jobs, skipped = planning.plan([str(tmp_path / "in")], tmp_path / "out", ["overlay"])
    assert len(jobs) == 1 and len(skipped) == 1


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    put(tmp_path / "elsewhere" / "a.png")
    put(tmp_path / "in" / "b.png")
    put(tmp_path / "in" / "sub" / "c.png")
    put(tmp_path / "unrelated.png")
    for name, target in {
        "in/day1": "elsewhere",
        "in/day2": "elsewhere",
        "in/again": "in/sub",
        "in/self": "in",
        "in/sub/parent": "in",
        "in/around": ".",
        "elsewhere/back": "in",
    }.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    for given in (tmp_path / "in", tmp_path / "in" / "**", tmp_path / "i*" / "**" / "*"):
        names, skipped = planned(given, tmp_path / "out", tmp_path)
        assert names == ["in/b.png", "in/day1/a.png", "in/sub/c.png"]
        assert set(skipped) == {
            "in/day2",
            "in/again",
            "in/self",
            "in/sub/parent",
            "in/around",
            "in/day1/back",
        }
        assert skipped["in/around"] == "a link to an enclosing folder"
        assert skipped["in/day2"] == f"the same folder as {tmp_path / 'in' / 'day1'}"


def test_broken_links_are_not_dropped(tmp_path):
    put(tmp_path / "in" / "a.png")
    for name in ("b.png", "c", "loop.jpg"):
        target = name if name == "loop.jpg" else "nowhere"
        (tmp_path / "in" / name).symlink_to(tmp_path / "in" / target)
    names, skipped = planned(tmp_path / "in", tmp_path / "out", tmp_path / "in")
    assert names == ["a.png", "b.png", "loop.jpg"] and skipped == {"c": "a broken link"}
    with pytest.raises(ValueError, match=r"in/b\.png: No such file"):
        planned(tmp_path / "in" / "b.png", tmp_path / "out", tmp_path)


def test_two_names_of_one_file_are_predicted_once_with_a_message(tmp_path):
    first = put(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").symlink_to(first)
    names, skipped = planned(tmp_path / "in", tmp_path / "out", tmp_path / "in")
    assert names == ["a.png"] and skipped == {"b.png": f"the same file as {first}"}
    # The same name twice is no loss.
    names, skipped = planned([first, first, tmp_path / "in" / ".." / "in" / "a.png"], tmp_path / "out", tmp_path / "in")
    assert names == ["a.png"] and not skipped


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs and sockets")
def test_fifos_and_sockets_are_named_and_never_waited_for(tmp_path):
    put(tmp_path / "in" / "a.png")
    os.mkfifo(tmp_path / "in" / "b.png")
    os.mkfifo(tmp_path / "in" / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        # Their paths are short.
        with contextlib.chdir(tmp_path / "in"):
            server.bind("socket")
        names, skipped = planned(tmp_path / "in", tmp_path / "out", tmp_path / "in")
    assert names == ["a.png", "b.png"]
    assert skipped == {"pipe": "a FIFO, not a file", "socket": "a socket, not a file"}
    for given in (tmp_path / "in" / "b.png", "/dev/zero"):
        with pytest.raises(ValueError, match=r"a (FIFO|device), not a file"):
            planning.plan([str(given)], tmp_path / "out", ["labels"])


def test_a_pattern_may_match_folders_but_not_hidden_files(tmp_path):
    for name in ("in/a.png", "in/.b.png", "in/day/c.png", "in/day/deep/d.png", "in/day/e.txt"):
        put(tmp_path / name)
    (tmp_path / "in" / "day" / "e.txt").write_text("text")
    expected = {
        "in/*": (["in/a.png", "in/day/c.png", "in/day/deep/d.png"], {"in/day/e.txt"}),
        "in/*.png": (["in/a.png"], set()),
        "in/**/*.png": (["in/a.png", "in/day/c.png", "in/day/deep/d.png"], set()),
        "in/**/deep/*": (["in/day/deep/d.png"], set()),
        "**/d*/*.*": (["in/day/c.png", "in/day/deep/d.png"], {"in/day/e.txt"}),
        "in/**": (["in/a.png", "in/day/c.png", "in/day/deep/d.png"], {"in/day/e.txt"}),
    }
    for pattern, (wanted, passed) in expected.items():
        names, skipped = planned(tmp_path / pattern, tmp_path / "out", tmp_path)
        assert (names, set(skipped)) == (wanted, passed), pattern


def test_outputs_are_not_read_and_inputs_in_their_folder_are_named(tmp_path):
    put(tmp_path / "in" / "a.png")
    put(tmp_path / "in" / "out" / "labels" / "a.png")
    names, skipped = planned(tmp_path / "in", tmp_path / "in" / "out", tmp_path / "in")
    assert names == ["a.png"] and skipped == {"out": "the folder of outputs"}
    for output in (tmp_path / "in", tmp_path):
        with pytest.raises(ValueError, match="in: is inside --output, whose files are not read"):
            planned(tmp_path / "in", output, tmp_path)


def test_files_with_the_same_stem_are_refused_with_a_remedy(tmp_path):
    put(tmp_path / "in" / "a.jpg", "JPEG")
    put(tmp_path / "in" / "a.png", "PNG")
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.png would both be written to .*rename one of them"):
        planned(tmp_path / "in", tmp_path / "out", tmp_path)
    put(tmp_path / "b" / "a.png", "PNG")
    with pytest.raises(ValueError, match="give the folder that contains both instead"):
        planned([tmp_path / "in" / "a.png", tmp_path / "b" / "a.png"], tmp_path / "out", tmp_path)


def test_the_home_folder_of_an_unknown_user_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"~nobody-at-all/x\.png: there is no user 'nobody-at-all'"):
        planning.plan(["~nobody-at-all/x.png"], tmp_path / "out", ["labels"])


def test_many_skipped_files_are_counted_and_the_first_are_named(tmp_path):
    skipped = [planning.Skipped(tmp_path / f"{number}.txt", "hidden") for number in range(1234)]
    said = planning.reasons(skipped)
    assert said.startswith("1,234; hidden: ") and said.endswith("9.txt and 1,224 more") and len(said) < 2000


def test_the_first_bytes_of_a_file_identify_an_image(tmp_path):
    file = io.BytesIO()
    Image.fromarray(scene(0, 8, 9)).save(file, "BMP")
    (tmp_path / "tiny").write_bytes(file.getvalue()[:20])
    jobs, _ = planning.plan([str(tmp_path / "tiny")], tmp_path / "out", ["labels"])
    assert len(jobs) == 1
