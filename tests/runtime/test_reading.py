"""Files from elsewhere are refused, by name, if they are irregular, too large, or JSON with unexpected types."""

import os
import socket
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NotRequired

import pytest
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from segjax.runtime import reading
from segjax.runtime.reading import UnreadableError

if not hasattr(os, "mkfifo"):
    pytest.skip("Windows has no FIFOs or device files", allow_module_level=True)


class Normalisation(TypedDict):
    mean: list[FiniteFloat]


class Known(TypedDict):
    name: str
    normalisation: NotRequired[Normalisation]


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_fifos_sockets_and_devices_are_refused_at_once(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for function in (reading.read_bytes, reading.refuse_irregular):
        with pytest.raises(UnreadableError, match=f"{path}: a {kind}, not a file"):
            function(path)


def test_a_file_is_read_through_links_up_to_its_limit(tmp_path):
    path, link = tmp_path / "x", tmp_path / "y"
    path.write_bytes(b"12345")
    link.symlink_to(path)
    assert reading.read_bytes(link, most=5) == b"12345"
    with pytest.raises(UnreadableError, match=r"larger than 4 bytes"):
        reading.read_bytes(link, most=4)
    with pytest.raises(FileNotFoundError):
        reading.read_bytes(tmp_path / "z")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"\\ud800"', "not JSON"),
        ("[1]", "should be a valid dictionary, not [1]"),
        ("{}", "name is missing"),
        ('{"name": 3}', "name should be a valid string, not 3"),
        (
            '{"name": "a", "normalisation": {"mean": [1, "2"]}}',
            "normalisation.mean.1 should be a valid number, not '2'",
        ),
        ('{"name": "a", "normalisation": {"mean": [NaN]}}', "normalisation.mean.0 should be a finite number, not nan"),
    ],
)
def test_json_of_wrong_types_is_refused_with_file_and_key(tmp_path, text, fault):
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(UnreadableError) as caught:
        reading.read_json(path, Known)
    assert str(caught.value).startswith(f"{path}: {fault}")


def test_valid_json_is_returned_unchanged():
    content = {"name": "ä", "normalisation": {"mean": [1, 2.5], "more": None}, "other": [True]}
    assert reading.checked(content, Known, name="f") is content
    with_mark = '{"name": "ä"}'.encode("utf-8-sig")
    assert reading.parse_json(with_mark, Known, name="f") == {"name": "ä"}


def test_the_home_folder_of_an_unknown_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reading.user_path("~/a") == tmp_path / "a" and reading.user_path("a/~b") == Path("a/~b")
    with pytest.raises(reading.UnreadableError, match=r"~nobody9/x: there is no user 'nobody9'.*\./~nobody9/x"):
        reading.user_path("~nobody9/x")


@pytest.mark.parametrize(
    "fault",
    [
        lambda: int("\x01"),
        lambda: b"a" > 1,
        lambda: [][3],
        lambda: {}["tag"],
        lambda: b"\xf4".decode(),
        lambda: None.width,
        lambda: 1 // 0,
        lambda: struct.unpack("<I", b"a"),
        lambda: (lambda a, b: None)(*[1, 2, 3]),
    ],
)
def test_pythons_error_messages_are_not_given_as_the_reason(fault):
    with pytest.raises(Exception) as caught:
        fault()
    assert reading.stated(caught.value) == "a value in it does not fit"


def test_the_reason_of_a_library_is_given_in_one_line():
    with pytest.raises(zlib.error) as caught:
        zlib.decompress(b"not deflated")
    assert reading.stated(caught.value) == str(caught.value) and "header" in str(caught.value)
    assert reading.stated(zipfile.BadZipFile("Bad CRC-32\nof a member")) == "Bad CRC-32"
    assert reading.stated(FileNotFoundError(2, "No such file", "x")) == "No such file"
    assert reading.stated(OSError()) == "a value in it does not fit"
