"""Locks have one holder at a time, which others can name, and are released when it dies."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from segjax.runtime import lock

HOLDS = """
import sys, time
from pathlib import Path
from segjax.runtime.lock import held
with held(Path(sys.argv[1]), what="runs/a", remedy=""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path`/sub/lock."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "sub" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_holds_a_lock_and_the_remedy(holder, tmp_path):
    with (
        pytest.raises(lock.HeldError) as caught,
        lock.held(tmp_path / "sub" / "lock", what="runs/a", remedy="give another --workdir"),
    ):
        pytest.fail("both hold it")
    said = str(caught.value)
    assert said.startswith(f"runs/a is being written by process {holder.pid} on {socket.gethostname()}, since 20")
    assert said.endswith(": give another --workdir")
    assert holder.poll() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_its_holder_frees_a_lock(holder, number, tmp_path):
    holder.send_signal(number)
    holder.wait()
    assert (tmp_path / "sub" / "lock").exists()
    with lock.held(tmp_path / "sub" / "lock", what="runs/a", remedy=""):
        assert f"process {os.getpid()} on" in (tmp_path / "sub" / "lock").read_text()
    assert list((tmp_path / "sub").iterdir()) == []


def test_only_one_thread_at_a_time_holds_a_lock(tmp_path):
    inside, most, rounds = [0], [0], []

    def take():
        while len(rounds) < 200:
            try:
                with lock.held(tmp_path / "a" / "lock", what="it", remedy=""):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    rounds.append(inside[0])
                    inside[0] -= 1
            except lock.HeldError:
                pass

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and not (tmp_path / "a" / "lock").exists()


def test_empty_folders_made_for_a_lock_are_removed_at_the_end(tmp_path):
    with pytest.raises(ValueError), lock.held(tmp_path / "a" / "b" / "lock", what="it", remedy=""):
        assert (tmp_path / "a" / "b").is_dir()
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with lock.held(tmp_path / "a" / "b" / "lock", what="it", remedy=""):
        (tmp_path / "a" / "result").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_without_file_system_locks_the_work_continues(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.held(tmp_path / "a" / "lock", what="it", remedy=""):
        with lock.held(tmp_path / "a" / "lock", what="it", remedy=""):
            pass
        assert list((tmp_path / "a").iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_if_no_lock_file_can_be_made_the_body_reports_the_reason(tmp_path):
    (tmp_path / "file").write_text("kept")
    with (
        pytest.raises(NotADirectoryError, match="of the body"),
        lock.held(tmp_path / "file" / "lock", what="it", remedy=""),
    ):
        raise NotADirectoryError("of the body")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_link_in_place_of_a_lock_file_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with lock.held(tmp_path / "lock", what="it", remedy=""):
        pass
    assert (tmp_path / "elsewhere").read_text() == "kept"
