"""The end of commands: exit status, and one message on stderr in lines of 80 columns."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segjax import __main__
from segjax.commands.ending import CheckError, run_command
from segjax.runtime import console


def ended(capsys, error, **settings):
    """Status, stdout and stderr of a command that raises `error`."""

    def run():
        raise error

    status = run_command("segjax try", run, **settings)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (3, 3)])
def test_the_exit_status_of_a_command_is_its_return_value(returned, status, capsys):
    assert run_command("segjax try", lambda: returned) == status
    assert capsys.readouterr() == ("", "")


def missing():
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a b/photo.png")


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("photo.png: is empty"), 2, "photo.png: is empty"),
        (KeyError("no model 'x'"), 2, "no model 'x'"),
        (missing(), 2, "a b/photo.png: No such file or directory"),
        (OSError("cannot be fetched"), 2, "cannot be fetched"),
        (ValueError(), 2, "ValueError"),
        (CheckError("not written, because the outputs differ"), 1, "not written, because the outputs differ"),
        (KeyboardInterrupt(), 130, "stopped; nothing was written"),
    ],
)
def test_wrong_input_failed_checks_and_ctrl_c_give_one_message(error, status, message, capsys):
    assert ended(capsys, error) == (status, "", f"segjax try: {message}\n")


def test_an_internal_error_keeps_its_traceback(capsys):
    status, out, err = ended(capsys, ZeroDivisionError("division by zero"))
    assert (status, out) == (1, "")
    assert err.startswith("Traceback") and err.endswith("ZeroDivisionError: division by zero\n") and "in run" in err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_message_for_a_full_disk_has_advice(number, capsys):
    status, _, err = ended(capsys, OSError(number, os.strerror(number), "o.pth"), full_disk="make room, then --resume")
    assert status == 2
    assert err == f"segjax try: o.pth: {os.strerror(number)}.\n  Make room, then --resume\n"


def test_messages_are_wrapped_and_control_characters_are_escaped(capsys):
    _, _, err = ended(capsys, ValueError("word " * 40 + "\x1b[2J\udc80\n  a line   as it is"))
    lines = err.splitlines()
    assert all(len(line) <= 80 for line in lines) and len(lines) > 2
    assert "\\x1b[2J\\udc80" in err and "\x1b" not in err and lines[-1] == "  a line   as it is"


def test_log_messages_are_printed_only_during_the_command(capsys):
    logger = logging.getLogger("segjax")
    before = logger.handlers, logger.level, logger.propagate

    def run():
        logger.info("read as %s", "native")
        logger.debug("unseen")
        notes = []
        with console.log_to(notes.append):
            logger.info("a note")
        assert notes == ["a note"]
        logger.info("word " * 30)

    run_command("segjax try", run)
    logger.info("afterwards")
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "read as native" and len(others) == 2 and all(len(line) <= 80 for line in others)
    assert (logger.handlers, logger.level, logger.propagate) == before


PRINTS = """if True:
    import sys, time
    from segjax.commands.ending import run_command
    def run():
        print("first", flush=True)
        time.sleep(0.2)
        for number in range(100_000):
            print(number)
    sys.exit(run_command("segjax try", run))
"""


def test_a_closed_pipe_ends_a_command_quietly():
    with subprocess.Popen([sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize(
    "command", [["train", "--help"], ["predict", "--help"], ["data", "show", "--help"], ["--help"]]
)
def test_help_that_cannot_be_printed_gives_no_traceback(command, capfd, monkeypatch):
    name = " ".join(["segjax", *command[:-1]])
    (reading, writing), full = os.pipe(), os.open("/dev/full", os.O_WRONLY)
    os.close(reading)
    reasons = {writing: (141, ""), full: (2, f"{name}: cannot write: No space left on device. Make room, and run the")}
    for handle, (status, message) in reasons.items():
        with os.fdopen(handle, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            try:
                found = __main__.main(command)
            except SystemExit as ended:
                found = ended.code
        err = " ".join(capfd.readouterr().err.split())
        # The stream is closed without an error, as at the end of the process.
        assert found == status and err.startswith(message) and bool(err) == bool(message)


def test_a_process_without_stdout_prints_nothing(capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run_command("segjax try", lambda: console.say("a table")) == 0
    assert run_command("segjax try", lambda: [][1]) == 1
    assert "IndexError" in capfd.readouterr().err


def test_a_system_error_without_a_file_is_printed_without_its_number(capsys):
    assert ended(capsys, OSError(errno.ENOTCONN, "Not connected"))[2] == "segjax try: Not connected\n"


def _raised_below(path):
    raise ValueError(f"{path}: is empty;\n  use another")


@pytest.mark.parametrize("chained", [False, True])
def test_line_breaks_are_escaped_in_paths_and_kept_in_messages(chained, capsys):
    def run():
        paths = [Path("in/a\nb.png"), Path("c.png")]
        if not chained:
            _raised_below(paths[0])
        try:
            _raised_below(paths[0])
        except ValueError as error:
            paths = []
            raise ValueError(f"nothing was done:\n  {error}") from None

    assert run_command("segjax try", run) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        *(["segjax try: nothing was done:"] * chained),
        f"{'  ' if chained else 'segjax try: '}in/a\\nb.png: is empty;",
        "  use another",
    ]


def test_line_breaks_in_the_file_name_of_a_system_error_are_escaped(capsys):
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), b"a\nb\xff.png")
    assert ended(capsys, error)[2] == "segjax try: a\\nb\\udcff.png: No such file or directory\n"
