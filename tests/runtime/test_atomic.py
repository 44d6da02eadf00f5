"""Atomic writes: what a reader finds if writers fail, are killed at any moment, or write at the same time."""

import errno
import itertools
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from segjax.runtime import atomic


def below(folder):
    """Every file below a folder with its content, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_folder(path, text):
    with atomic.replacing_folder(path) as new:
        (new / "inside").mkdir(parents=True)
        (new / "inside" / "a.txt").write_text(text)
        (new / "b.txt").write_text(text)


def write_files(path, text):
    with atomic.replacing_files(path) as new:
        new.write_text(text)
        new.with_name(f"{path.name}.json").write_text(text)
        new.with_name("below").mkdir()
        (new.parent / "below" / "c.txt").write_text(text)


WRITERS = {"file": atomic.write_text, "folder": write_folder, "files": write_files}
RESULTS = {
    "file": lambda text: {"x": text},
    "folder": lambda text: {"x/inside/a.txt": text, "x/b.txt": text},
    "files": lambda text: {"x": text, "x.json": text, "below/c.txt": text},
}


@pytest.mark.parametrize("kind", WRITERS)
def test_writing_replaces_the_old_version_and_leaves_nothing_else(kind, tmp_path):
    for text in ("old", "new"):
        WRITERS[kind](tmp_path / "sub" / "x", text)
        assert below(tmp_path / "sub") == RESULTS[kind](text)
    expected = {name.split("/")[0] for name in RESULTS[kind]("")}
    assert {path.name for path in (tmp_path / "sub").iterdir()} == expected


def test_stale_companion_files_are_removed_with_the_old_version(tmp_path):
    path, companion = tmp_path / "x", tmp_path / "x.json"
    write_files(path, "old")
    with pytest.raises(ValueError), atomic.replacing_files(path, stale=[companion]) as new:
        raise ValueError
    assert companion.read_text() == "old"
    with atomic.replacing_files(path, stale=[companion, tmp_path / "never"]) as new:
        new.write_text("new")
    assert below(tmp_path) == {"x": "new", "below/c.txt": "old"}


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EIO, "x"), KeyboardInterrupt()])
@pytest.mark.parametrize("replacing", [atomic.replacing_file, atomic.replacing_folder, atomic.replacing_files])
def test_a_body_that_raises_leaves_only_the_old_version(replacing, error, tmp_path):
    WRITERS[replacing.__name__.split("_")[1]](tmp_path / "x", "old")
    before = below(tmp_path)
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "x") as temporary:
        if replacing is atomic.replacing_folder:
            temporary.mkdir()
            temporary /= "part"
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert below(tmp_path) == before


def test_a_body_that_writes_nothing_is_an_error_and_the_old_folder_stays(tmp_path):
    write_folder(tmp_path / "x", "old")
    with pytest.raises(FileNotFoundError), atomic.replacing_folder(tmp_path / "x"):
        pass
    assert below(tmp_path) == RESULTS["folder"]("old")


class ForeignError(Exception):
    """Like an error raised by safetensors, torch or tensorstore."""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("kind", [OSError, ForeignError])
@pytest.mark.parametrize("replacing", [atomic.replacing_file, atomic.replacing_folder, atomic.replacing_files])
def test_a_full_disk_is_reported_for_the_target_whatever_writes_it(replacing, kind, number, tmp_path):
    WRITERS[replacing.__name__.split("_")[1]](tmp_path / "x", "old")
    before = below(tmp_path)
    said = (number, os.strerror(number), ".x.part0/y") if kind is OSError else (f"I/O: {os.strerror(number)} (os)",)
    with pytest.raises(OSError) as caught, replacing(tmp_path / "x"):
        raise kind(*said)
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "x"))
    assert below(tmp_path) == before


@pytest.mark.parametrize("replacing", [atomic.replacing_file, atomic.replacing_folder, atomic.replacing_files])
def test_an_error_without_a_reason_means_a_full_disk_only_if_it_is_full(replacing, tmp_path):
    def fails():
        with replacing(tmp_path / "x") as temporary:
            if replacing is atomic.replacing_folder:
                temporary.mkdir()
                temporary /= "part"
            temporary.write_bytes(bytes(1000))
            raise ForeignError("enforce fail")

    with pytest.raises(ForeignError):
        fails()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            fails()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_and_folders_have_the_permissions_that_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        atomic.write_text(tmp_path / "file", "x")
        write_folder(tmp_path / "folder", "x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "folder/b.txt")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask, 0o666 & ~mask]


# For each number on stdin, a child writes the new version of KIND and ends right before its operation on the disk of
# that number, counted from 0. Prints the status of the child: 0 where it made fewer.
DIES = """if True:
    import os, pathlib, sys
    from tests.runtime import test_atomic
    from segjax.runtime import atomic
    _, kind, parent, can_exchange = sys.argv
    def write(target, moment):
        left = [moment]
        def operation(event, arguments=()):
            if event in CHANGES:
                if left[0] == 0:
                    os._exit(99)
                left[0] -= 1
        fsync, exchange = os.fsync, atomic._exchange
        os.fsync = lambda handle: (operation("fsync"), fsync(handle))
        atomic._exchange = lambda *names: (operation("exchange"), can_exchange == "True" and exchange(*names))[1]
        sys.addaudithook(operation)
        test_atomic.WRITERS[kind](target, "new")
        os._exit(0)
    CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fsync", "exchange"}
    for line in sys.stdin:
        child = os.fork()
        if not child:
            write(pathlib.Path(parent) / line.strip() / "x", int(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("kind, can_exchange", [("file", True), ("folder", True), ("folder", False), ("files", True)])
def test_a_writer_dying_at_any_operation_leaves_the_old_or_the_new_version(kind, can_exchange, tmp_path):
    environment, pipe = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, subprocess.PIPE
    command = [sys.executable, "-c", DIES, kind, str(tmp_path), str(can_exchange)]
    found, status = set(), 99
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1) as server:
        for moment in itertools.count():
            target = tmp_path / str(moment) / "x"
            WRITERS[kind](target, "old")
            server.stdin.write(f"{moment}\n")
            status = int(server.stdout.readline())
            assert status in (0, 99)
            # If the writer died between two renames, readers undo the first.
            atomic.recover(target)
            visible = {name: text for name, text in below(target.parent).items() if not name.startswith(".")}
            if kind == "files":
                # Two names cannot change at once: a companion may be missing, but none belongs to another version.
                assert set(visible.values()) == {visible["x"]}
            else:
                assert visible in (RESULTS[kind]("old"), RESULTS[kind]("new"))
            found.add(visible["x" if kind != "folder" else "x/b.txt"])
            # The next writer of the same target clears what the dead one has left.
            WRITERS[kind](target, "third")
            assert below(target.parent) == RESULTS[kind]("third")
            if status == 0:
                break
        server.stdin.close()
    assert found == {"old", "new"} and moment >= 5


def test_a_folder_set_aside_by_a_dead_writer_survives_a_failing_writer(tmp_path):
    write_folder(tmp_path / "x", "old")
    (tmp_path / ".x.part2").mkdir()
    (tmp_path / "x").rename(tmp_path / ".x.part2" / "old")
    with pytest.raises(ValueError), atomic.replacing_folder(tmp_path / "x"):
        raise ValueError
    assert below(tmp_path) == RESULTS["folder"]("old")


def test_recovery_does_not_take_a_folder_from_a_running_writer(tmp_path):
    with atomic.replacing_folder(tmp_path / "x") as new:
        new.mkdir()
        (new.parent / "old").mkdir()
        atomic.recover(tmp_path / "x")
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", WRITERS)
def test_simultaneous_writers_of_one_target_do_not_mix(kind, tmp_path):
    target, errors, stop = tmp_path / "x", [], threading.Event()
    WRITERS[kind](target, "0" * 1000)

    def write(number):
        try:
            for _ in range(15):
                WRITERS[kind](target, str(number) * 1000)
        except BaseException as error:
            errors.append(error)

    def read():
        while not stop.is_set() and kind == "file":
            text = target.read_text()
            if len(text) != 1000 or len(set(text)) != 1:
                errors.append(ValueError(text[:20]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 7)]
    reader = threading.Thread(target=read)
    for thread in (*threads, reader):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    reader.join()
    assert not errors
    found = below(tmp_path)
    assert found.keys() == RESULTS[kind]("").keys() and {len(text) for text in found.values()} == {1000}
    if kind != "files":
        assert len({text for text in found.values()}) == 1 and len(set("".join(found.values()))) == 1


def test_the_temporary_file_of_a_running_writer_is_kept(tmp_path):
    with atomic.replacing_file(tmp_path / "x") as first:
        first.write_text("first")
        with atomic.replacing_file(tmp_path / "x") as second:
            second.write_text("second")
            assert first != second
        assert first.exists() and (tmp_path / "x").read_text() == "second"
    assert below(tmp_path) == {"x": "first"}


def test_without_exchange_a_folder_is_replaced_by_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        write_folder(tmp_path / "x", text)
        assert below(tmp_path) == RESULTS["folder"](text)


@pytest.mark.skipif(sys.platform != "linux", reason="on macOS another call does it, on Windows none")
def test_linux_exchanges_two_folders_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    # ext4, XFS, Btrfs, tmpfs and overlays of them can; on another file system, give pytest a --basetemp that can.
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert below(tmp_path) == {"a/b": "", "b/a": ""}


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "道" * 83 + ".png", "é" * 127])
def test_a_name_as_long_as_file_systems_allow_is_written(name, tmp_path):
    for text in ("old", "new"):
        atomic.write_text(tmp_path / name, text)
        assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text
    (tmp_path / name).unlink()
    with atomic.replacing_folder(tmp_path / name) as folder:
        folder.mkdir()
        (folder / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / "a").read_text() == "new"
