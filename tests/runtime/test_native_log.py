"""Log messages of native libraries on descriptor 2 go to the run's log, and to the terminal only after a crash."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
ALARM = b"""E1130 01:38:11.519223   30601 slow_operation_alarm.cc:73] Constant folding an instruction is taking > 1s:

  %reduce_window_sum.7 = f32[20,20]{1,0} reduce-window(%broadcast_in_dim.1), window={size=64x64}

This isn't necessarily a bug; constant-folding is inherently a trade-off between compilation time and speed.

If you'd like to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=/tmp/foo and attach the results.
"""
COMPILE = b"""2026-11-30 01:38:11.519223: E external/xla/xla/service/slow_operation_alarm.cc:65]
********************************
[Compiling module jit_f] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS.
********************************
"""
FEATURES = b"""WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
E0000 00:00:1732931891.519   30601 cpu_aot_loader.cc:105] Loading XLA:CPU AOT result. Target feature +x is missing
2026-11-30 01:38:11.519223: W external/xla/cpu_feature_guard.cc:210] This TensorFlow binary is optimized
I0000 00:00:1732931891.519   30601 gpu_device.cc:2022] Created device
"""
OTHERS = (
    b"terminate called without an active exception\n\n  %name\nF1130 01:38:11.519223   30601 a.cc:7] Check failed\n"
)
START = """
import os, sys
from pathlib import Path
from segjax.runtime import console, native_log, signals
from segjax.__main__ import run_process
native_log.divert()
def write(text):
    os.write(2, text)
{body}
"""


def ended(body, **settings):
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    code = START.format(body=body)
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, **settings)


def test_log_records_go_to_the_log_and_other_output_to_the_terminal(tmp_path):
    log = tmp_path / "a\nb.log"
    body = f"""
write({FEATURES!r})
with console.libraries_to(Path({str(log)!r})):
    write({OTHERS!r})
    for part in {[ALARM, COMPILE, FEATURES]!r}:
        write(part)
    write({OTHERS!r})
write({FEATURES!r})
print("an error", file=sys.stderr)
write(b"an unfinished line")
"""
    done = ended(body)
    assert done.returncode == 0
    assert sorted(done.stderr.splitlines()) == sorted([*(2 * OTHERS).splitlines(), b"an error", b"an unfinished line"])
    logged = [line.partition(b" native: ")[2] for line in log.read_bytes().splitlines()]
    assert logged == [line for line in (ALARM + COMPILE + FEATURES).splitlines() if line.strip()]


CRASHES = {
    "an abort": ("os.abort()", -signal.SIGABRT),
    "a kill": ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    "an exit by native code": ("os._exit(7)", 7),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_prints_the_last_log_lines(name):
    code, status = CRASHES[name]
    done = ended(f"for _ in range(100): write({FEATURES!r})\nwrite({ALARM!r})\nwrite(b'Check failed')\n{code}")
    assert done.returncode == status and b"Check failed" in done.stderr
    lines = done.stderr.splitlines()
    assert set(ALARM.splitlines()) <= set(lines) and len(lines) < 60


def test_an_unknown_error_is_printed_with_the_last_log_lines():
    body = f"""
from segjax.commands.ending import run_command
def fails():
    write({ALARM!r})
    raise ZeroDivisionError("a bug")
sys.exit(run_command("segjax try", fails))
"""
    done = ended(body)
    assert done.returncode == 1 and b"Traceback" in done.stderr and ALARM.splitlines()[0] in done.stderr


def test_stderr_is_still_a_terminal_and_a_second_signal_ends_the_process():
    ours, theirs = os.openpty()
    body = f"""
import signal, time
def run():
    write({ALARM!r})
    print(sys.stderr.isatty(), os.isatty(2))
    signal.signal(signal.SIGTERM, lambda *_: None)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    time.sleep(60)
sys.exit(signals.run_process("segjax try", run))
"""
    done = ended(body, stderr=theirs)
    os.close(theirs)
    told = os.read(ours, 1 << 16)
    os.close(ours)
    assert (done.returncode, done.stdout) == (143, b"True False\n")
    assert b"stopped at once" in told and b"Constant folding" not in told


def test_a_process_without_stderr_works():
    closed = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m segjax --version 2>&-"],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert closed.returncode == 0 and closed.stdout.startswith(b"segjax ")
