"""A minute of fuzzing finds no fault, and the fuzzer detects the faults that it looks for."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="the fuzzer forks"), pytest.mark.one_python]


def python(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_minute_of_fuzzing_gives_only_results_or_messages():
    ended = python("-m", "tests.fuzz", "--minutes", "1", "--seed", "0")
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-3000:]
    trials = re.search(r"^0 of (\d+) trials are at fault", ended.stdout, re.MULTILINE)
    assert trials and int(trials[1]) >= 10


# Commands that behave badly, and two that do not; each reads the file xy, of which a trial has changed a byte.
COMMANDS = textwrap.dedent(
    """
    import json, os, sys, tempfile, time
    from pathlib import Path
    import numpy as np
    from tests.fuzz import __main__ as fuzz
    from tests.fuzz.mutations import Mutation
    from tests.fuzz.subjects import Subject

    fuzz.SECONDS, fuzz.GIB = 5, 0.5

    def says(text, status=2):
        print(text)
        return status

    COMMANDS = {
        "result": lambda: says("done", 0),
        "message": lambda: says("xy: is damaged"),
        "traceback": lambda: 1 // 0,
        "crash": lambda: os.abort(),
        "exit": lambda: sys.exit("xy: is damaged"),
        "endless": lambda: time.sleep(60),
        "memory": lambda: len((b"x" * 2**30, time.sleep(60))),
        "words": lambda: says("xy: 'list' object has no attribute 'get'"),
        "nameless": lambda: says("something is damaged"),
        "mute": lambda: 2,
        "left": lambda: (Path(".xy.part0").touch(), says("xy: is damaged"))[1],
        "changed": lambda: (Path("xy").write_text("new"), says("xy: is damaged"))[1],
        "scratch": lambda: (tempfile.mkstemp(), says("xy: is damaged"))[1],
    }
    found = {}
    for is_bad in (False, True):
        for name, command in COMMANDS.items():
            subject = Subject(lambda folder: None, lambda folder, rng: Mutation("xy: byte", is_bad), [command])
            with tempfile.TemporaryDirectory() as work:
                (Path(work) / "made").mkdir()
                (Path(work) / "made/xy").write_text("old")
                _, faults, _ = fuzz.faults_of(subject, Path(work) / "made", Path(work) / "t", np.random.default_rng(0))
            found[f"{name} {is_bad}"] = faults
    print(json.dumps(found))
    """
)


def test_the_fuzzer_finds_every_kind_of_fault():
    ended = python("-c", COMMANDS)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    expected = {
        "message": "",
        "exit": "",
        "traceback": "a traceback: ZeroDivisionError",
        "crash": "ended by signal 6",
        "endless": "more than 5 s",
        "memory": "more than 0.5 GiB",
        "words": "Python's words",
        "nameless": "does not name",
        "mute": "no word",
        "left": "left .xy.part0",
        "changed": "left xy",
        "scratch": "left tmp/",
    }
    for name, fault in expected.items():
        for is_bad in (False, True):
            faults = found[f"{name} {is_bad}"]
            assert [fault in each for each in faults] == [True] * bool(fault), (name, is_bad, faults)
    assert found["result False"] == []
    assert found["result True"] == ["accepted in silence"]
