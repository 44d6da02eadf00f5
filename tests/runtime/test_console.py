"""Output of commands: wrapped prose, and the progress of a loop on a terminal and elsewhere."""

import io
import logging
import os
import sys
import time
import warnings

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segjax.runtime import console, distributed
from segjax.runtime.console import ProgressBar
from segjax.train.progress import Meter, Progress


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    Clock.now = 0.0
    return Clock


class Terminal(io.StringIO):
    """Understands what tqdm sends: carriage returns, line breaks, and the cursor's way up and down."""

    def isatty(self):
        return True

    @property
    def screen(self):
        """The lines that a person sees."""
        lines, column = [""], 0
        for character in self.getvalue():
            if character == "\r":
                column = 0
            elif character == "\n":
                lines.append("")
                column = 0
            else:
                lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


def both_streams(monkeypatch, stream):
    """Has a test print to one stream; not a fixture, because pytest sets its own streams after those."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def test_prose_is_wrapped_and_indented_lines_are_kept(capsys):
    console.say("word " * 30 + "\n  a  table   of lines" + "x" * 80)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines[:2]) and lines[2] == "  a  table   of lines" + "x" * 80
    console.say("to the other stream", to=sys.stderr)
    assert capsys.readouterr() == ("", "to the other stream\n")


@pytest.mark.parametrize("text", ["é 中 😀 ü", "a\x1b[2Jb", "tab\there", "bytes \udcff", "c1 \x9b31m"])
def test_control_characters_are_escaped_and_all_others_are_kept(text, capsys):
    console.say(text)
    shown = capsys.readouterr().out
    assert shown.isprintable() or shown[:-1].isprintable()
    assert (shown == f"{text}\n") == text.isprintable()


def test_without_a_terminal_a_line_is_printed_every_ten_seconds(clock, monkeypatch):
    pipe = both_streams(monkeypatch, io.StringIO())
    with ProgressBar("checking", 12, "images") as progress:
        for _ in range(12):
            clock.now += 4
            progress.advance()
    assert pipe.getvalue().splitlines() == [
        "checking 3/12 images  0.25 per second  0.6 min left",
        "checking 6/12 images  0.25 per second  0.4 min left",
        "checking 9/12 images  0.25 per second  0.2 min left",
        "checking 12/12 images  0.25 per second",
    ]


def test_the_rate_does_not_count_the_first_item_which_compiles(clock):
    progress = ProgressBar("", 5, "images")
    clock.now = 60.0
    progress.advance()
    assert progress.rate is None
    clock.now = 62.0
    progress.advance(4)
    assert progress.rate == 2 and progress.count == 5


def test_notes_the_time_left_and_an_immediate_line_can_be_requested(clock, monkeypatch):
    pipe = both_streams(monkeypatch, io.StringIO())
    progress = ProgressBar("step", 9, start=3)
    progress.advance(1, notes=["loss 1.5", "4.0 img/s"], left=120.0, now=True)
    progress.advance(5, notes=[], left=0.0, now=True)
    assert pipe.getvalue().splitlines() == ["step 4/9  loss 1.5  4.0 img/s  2.0 min left", "step 9/9"]


def test_items_of_unknown_number_and_bytes_are_counted(clock, monkeypatch):
    pipe = both_streams(monkeypatch, io.StringIO())
    for arguments, number in ((("", None, "frames"), 7), (("unpacking {x}.tar.gz", 3 * 2**20, "B"), 2**20)):
        progress = ProgressBar(*arguments)
        progress.advance(number)
        clock.now += 10
        progress.advance(number)
    assert pipe.getvalue().splitlines() == [
        "14 frames  0.70 per second",
        "unpacking {x}.tar.gz 2.0 MiB/3.0 MiB  0.1 MiB per second  0.2 min left",
    ]


@pytest.mark.parametrize("total, unit", [(40, "images"), (None, "frames"), (5 * 2**30, "B")])
def test_a_terminal_shows_one_bar_of_80_columns_and_clears_it(total, unit, monkeypatch):
    terminal = both_streams(monkeypatch, Terminal())
    with ProgressBar("a {strange} name", total, unit) as progress:
        for _ in range(10):
            time.sleep(0.02)
            progress.advance(2 if unit != "B" else 2**28)
        bar = terminal.screen[-1]
        assert len(terminal.screen) == 1 and len(bar) <= 80 and bar.startswith("a {strange} name ")
    assert "".join(terminal.screen) == ""


def test_lines_are_printed_above_the_bar(monkeypatch):
    terminal = both_streams(monkeypatch, Terminal())
    with ProgressBar("evaluating", 4, "images") as progress:
        progress.advance()
        console.say("step 3: mIoU 0.5")
        assert terminal.screen[0] == "step 3: mIoU 0.5" and terminal.screen[-1].startswith("evaluating ")
        console.say("an error", to=sys.stderr)
        assert terminal.screen[1] == "an error"
    assert [line for line in terminal.screen if line] == ["step 3: mIoU 0.5", "an error"]
    console.say("afterwards")
    assert terminal.getvalue().endswith("afterwards\n")


def test_the_bar_advances_when_the_next_item_is_requested(monkeypatch):
    terminal = both_streams(monkeypatch, Terminal())
    progress = ProgressBar("", 3, "images")
    seen = []
    for item in progress.over("abc"):
        seen.append((item, progress.count))
    assert seen == [("a", 0), ("b", 1), ("c", 2)] and progress.count == 3
    assert "".join(terminal.screen) == "" and console._bars == []
    for _ in ProgressBar("", 3, "images").over("abc"):
        break
    assert console._bars == []


def test_only_one_of_several_processes_shows_the_bar(clock, monkeypatch):
    terminal = both_streams(monkeypatch, Terminal())
    monkeypatch.setattr(distributed, "is_lead", lambda: False)
    with ProgressBar("checking", 3, "images") as progress:
        for _ in range(3):
            clock.now += 20
            progress.advance()
        console.say("unsaid")
    assert terminal.getvalue() == "" and progress.count == 3


def test_the_first_process_is_known_without_starting_jax(monkeypatch):
    def process_index():
        raise AssertionError("starts the backends")

    monkeypatch.setattr(jax, "process_index", process_index)
    assert distributed.is_lead()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert not distributed.is_lead()
    monkeypatch.delitem(sys.modules, "jax")
    assert distributed.is_lead()


# --------------------------------------------------------------------------------------------------- text from outside

UNSEEN = {
    "escape": "\x1b[2J",
    "carriage return": "a\rb",
    "tab": "a\tb",
    "C1 control": "\x9b31m",
    "line separator": "a\u2028b\x85c\x0bd",
    "right-to-left override": "\u202egnp.exe",
    "isolate": "\u2066a",
    "zero width": "a\u200bb\u200dc\u2060\ufeff",
    "filler": "\u3164",
    "tag": "\U000e0041",
    "bytes that are no text": os.fsdecode(b"caf\xe9"),
    "lone surrogate": "\ud800",
    "private use": "\ue000",
}


@pytest.mark.parametrize("text", UNSEEN.values(), ids=UNSEEN)
def test_control_and_invisible_characters_are_escaped(text, capsys):
    console.say(text)
    printed = capsys.readouterr().out.removesuffix("\n")
    assert printed.isprintable() and "\\" in printed
    # Nothing is lost.
    assert printed.encode("latin-1").decode("unicode_escape") == text


@pytest.mark.parametrize("text", ["Straße", "道路", "🚗", "طريق", "e\u0301", "a\u00a0b", "C:\\x"])
def test_letters_of_any_language_are_printed_unchanged(text, capsys):
    console.say(text)
    assert capsys.readouterr().out == f"{text}\n"


@given(st.text(st.characters(exclude_categories=[]), max_size=60), st.integers(4, 30))
def test_a_cell_of_a_table_has_its_width_for_any_name(name, width):
    cell = console.cell(name, width)
    assert console.columns(cell) == width and "\n" not in cell and console.printable(cell) == cell


@pytest.mark.parametrize("name", ["x" * 10_000_000, "道" * 1000, "é" * 300 + "\n" * 300])
def test_a_long_name_is_shortened_in_the_middle(name):
    text = console.one_line(name, most=31)
    assert 29 <= console.columns(text) <= 31 and "…" in text and text[0] == name[0]


def test_wide_letters_count_as_two_columns_in_wrapping(capsys):
    console.say("道路 " * 40)
    lines = capsys.readouterr().out.splitlines()
    # A word and its space are five columns.
    assert [console.columns(line) for line in lines] == [79, 79, 39]


@pytest.mark.parametrize("encoding, printed", [("ascii", b"\\xe9 \\u9053"), ("latin-1", b"\xe9 \\u9053")])
def test_characters_that_a_terminal_cannot_encode_are_escaped(encoding, printed):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console.say("é 道", to=terminal)
    assert terminal.buffer.getvalue() == printed + b"\n"


def test_a_bar_is_labelled_on_one_line(clock, capsys):
    with ProgressBar("unpacking a\nb\x1b[2J", 9, "images") as progress:
        clock.now = 20
        progress.advance()
    assert "unpacking a\\nb\\x1b[2J 1/9 images" in capsys.readouterr().out


def test_library_warnings_go_to_a_log_and_errors_also_to_the_terminal(tmp_path, capsys):
    with warnings.catch_warnings(), console.libraries_to(tmp_path / "log"):
        warnings.simplefilter("always")
        warnings.warn("a cache \x1b[2J\udc80", UserWarning, stacklevel=1)
        logging.getLogger("absl").warning("slow %s", "read")
        logging.getLogger("absl").info("nothing")
        logging.getLogger("library").error("broken")
    assert capsys.readouterr() == ("", "library: broken\n")
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert lines == ["UserWarning: a cache \x1b[2J\\udc80", "absl: slow read", "library: broken"]
    with console.libraries_to(tmp_path / "no folder" / "log"):
        logging.getLogger("absl").warning("slow")
    assert capsys.readouterr() == ("", "") and not (tmp_path / "no folder").exists()


def test_training_progress_is_printed_by_time_and_its_last_line_once(clock, capsys):
    Clock.now = 0.0
    with Progress(0, 4) as bar:
        meter = Meter(2)
        for step in (1, 2, 3):
            Clock.now += 6
            bar.tick(step, meter)
        Clock.now += 11
        meter.lap(4, 0.0)
        bar.show(4, 0.5, meter)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == ["step 2/4", "step 4/4"]
    assert "loss 0.5000" in printed[-1]
