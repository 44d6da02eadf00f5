"""Processes of contenders end with the command and print nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
# A contender that computes for a minute. The child prints its number and is then ready for the signal.
SCRIPT = """
import os, signal, sys, threading, time
from segjax.benchmark import runner
from segjax.runtime import signals

def serve(connection, name, work):
    threading.Thread(target=runner._end_with_the_parent, daemon=True).start()
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)

if __name__ == "__main__":
    # What was started in the background of a shell ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runner._serve = serve

    def run():
        with signals.raising():
            contender = runner.Runner("x", ())
            try:
                contender.make()
            finally:
                contender.close()

    sys.exit(signals.run_process("segjax try", run))
"""


def started(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return process, int(process.stdout.readline())


def has_ended(number, within=10):
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_ctrl_c_ends_a_benchmark_and_its_contenders_with_one_line(tmp_path):
    process, contender = started(tmp_path)
    # A terminal sends it to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.decode()) == (130, "segjax try: stopped\n")
    assert has_ended(contender)


def test_a_contender_ends_when_its_command_is_killed(tmp_path):
    process, contender = started(tmp_path)
    process.kill()
    assert has_ended(contender)
    assert process.communicate(timeout=30)[1] == b""
