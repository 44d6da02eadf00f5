"""Runs of train.py that are killed, stopped, damaged or short of disk space end with the same bits as undisturbed ones.

Each run is a separate process; `forks` states how they start at once.
"""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.kill_resume import SETTINGS, differences, kill_until_finished, records_of, remains
from tests.forks import Forks
from tests.tiny import SIZES

STEPS = 30
TINY = f"""
from configs import segformer

def get_config(argument=""):
    config = segformer.get_config(argument)
    config.model.update({SIZES!r})
    return config
"""
# Larger than anything but the training state of a checkpoint, whose list of arrays alone has 74,515 (how arrays are
# divided into files depends on time); than best/ and a checkpoint's weights; than
# metrics.jsonl after a dozen steps. Bytes.
ALL_BUT_TRAINING, ALL_BUT_WEIGHTS, RECORDS_ALONE = 72_000, 30_000, 6_000


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(workdir, **limits) starts a run, whose output is in `output`; the first one is compiled for all."""
    folder = tmp_path_factory.mktemp("survival")
    (folder / "tiny.py").write_text(TINY)
    server = Forks(folder / "cache")
    flags = (f"--config={folder / 'tiny.py'}:b0,streets", *SETTINGS[1:], f"--config.train.steps={STEPS}")

    def start(workdir, output=folder / "output", **limits):
        output.write_text("")
        process = server.start(output, *flags, f"--workdir={workdir}", **limits)
        process.said = lambda: flat(output.read_text().replace(str(workdir), "runs/name"))
        return process

    yield start
    server.close()


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """The run that is let alone: its folder and what is in it."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    process = train(workdir)
    assert process.wait() == 0, process.said()
    return workdir, remains(workdir)


def flat(text):
    """What was said in one line, wherever long paths have broken it."""
    return " ".join(text.split())


FULL = "[Ee]arlier saves are complete: make room, and run the same command again"


def differing(alone, workdir):
    """Stops leave checkpoints that the other run has not; the last one must be the same."""
    lines = differences(alone[1], remains(workdir))
    return [line for line in lines if not line.startswith("checkpoint") or line.startswith(f"checkpoint {STEPS},")]


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.said()
        time.sleep(0.005)


def wait_for_step(workdir, step, process):
    path = workdir / "metrics.jsonl"
    wait_until(lambda: path.exists() and f'{{"step": {step}, "loss"' in path.read_text(), process)


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_often_ends_with_the_same_bits(kills, train, alone, tmp_path):
    output = tmp_path / "output"
    done = kill_until_finished(
        lambda output: train(tmp_path / "run", output), tmp_path / "run", output, kills=kills, seed=0
    )
    # A machine that is slow to kill may let the run end before.
    assert sum(done.values()) > kills // 2 and len(done) >= min(3, kills // 2), done
    assert differing(alone, tmp_path / "run") == []
    assert len(alone[1]) > 500
    steps = [step for step, _ in alone[1]["TensorBoard, mean_iou"]]
    assert steps == [*range(3, STEPS, 3), STEPS]
    assert not [path for path in tmp_path.rglob("*tmp*") if path.is_dir()]


# --------------------------------------------------------------------------------------------- signals and a full disk


def block(workdir, process):
    """Has the run wait for ever as it writes the next line of its log, and returns when it does."""
    fifo = workdir.with_name("fifo")
    os.mkfifo(fifo)
    os.replace(fifo, workdir / "metrics.jsonl")
    idle, before = 0, None
    while idle < 10:
        assert process.poll() is None, process.said()
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        idle = idle + 1 if fields[0] == "S" and fields[11] == before else 0
        before = fields[11]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def hard_life(train, alone, tmp_path_factory):
    """One run that is stopped, stopped at once, and out of room three times: what became of it each time."""
    workdir = tmp_path_factory.mktemp("hard") / "run"
    stages = {}

    def end(name, process):
        status = process.wait()
        checkpoints = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
        stages[name] = SimpleNamespace(status=status, said=process.said(), checkpoints=checkpoints)

    process = train(workdir)
    wait_for_step(workdir, 8, process)
    os.kill(process.pid, signal.SIGTERM)
    end("told to stop", process)

    process = train(workdir)
    wait_for_step(workdir, 4 * (stages["told to stop"].checkpoints[-1] // 4 + 1), process)
    log = (workdir / "metrics.jsonl").read_text()
    block(workdir, process)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
        time.sleep(0.2)
    end("told twice", process)
    (workdir / "metrics.jsonl").unlink()
    (workdir / "metrics.jsonl").write_text(log)

    for room in (ALL_BUT_TRAINING, ALL_BUT_WEIGHTS, RECORDS_ALONE):
        end(room, train(workdir, largest_file=room))
    end("with room", train(workdir))
    return workdir, stages


def test_sigterm_ends_a_run_with_143_after_saving_and_prints_advice(hard_life):
    stage = hard_life[1]["told to stop"]
    newest = stage.checkpoints[-1]
    assert stage.status == 143 and 8 <= newest < STEPS
    assert " stopping after this step and saving; press again to stop at once " in stage.said
    assert stage.said.endswith(
        f" stopped at step {newest} of {STEPS} and saved in runs/name to continue: run the same command"
    )


def test_a_second_signal_ends_a_run_at_once_with_an_intact_last_save(hard_life):
    _, stages = hard_life
    stage = stages["told twice"]
    assert stage.status == 143 and "segjax train: stopped at once; the last complete save remains" in stage.said
    assert "stopped at step" not in stage.said and "Traceback" not in stage.said
    # The next start goes on from what is whole.
    assert f"resuming at step {stage.checkpoints[-1]} of {STEPS} " in stages[ALL_BUT_TRAINING].said


@pytest.mark.parametrize(
    "room, where",
    [
        (ALL_BUT_TRAINING, r"runs/name/checkpoints: cannot be written \(File too large\)\."),
        (ALL_BUT_WEIGHTS, r"runs/name/(best|checkpoints): cannot be written \(File too large\)\."),
        (RECORDS_ALONE, r"runs/name/(metrics\.jsonl|tensorboard): File too large\."),
    ],
)
def test_a_full_disk_ends_a_run_with_the_reason_and_an_intact_last_save(hard_life, room, where):
    _, stages = hard_life
    stage, before = stages[room], stages["told twice"].checkpoints
    assert stage.status == 2 and stage.checkpoints[-1] >= before[-1]
    complaint = re.search(f" segjax train: {where} {FULL}$", stage.said)
    assert complaint, stage.said[-600:]
    assert "Traceback" not in stage.said and "rror" not in stage.said[: complaint.start()]


def test_after_all_interruptions_a_run_ends_with_the_same_bits(hard_life, alone):
    workdir, stages = hard_life
    assert stages["with room"].status == 0, stages["with room"].said
    assert differing(alone, workdir) == []
    assert not [path for path in workdir.rglob("*tmp*") if path.is_dir()]


def test_a_full_disk_after_training_loses_no_training(train, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(alone[0], workdir)
    (workdir / "result.json").unlink()
    process = train(workdir, largest_file=ALL_BUT_WEIGHTS)
    # A picture, or best/ where the last evaluation was the best.
    assert process.wait() == 2 and re.search(
        rf" segjax train: [^:]*(: [^:]*)?File too large\)?\. {FULL}$", process.said()
    )
    assert not (workdir / "result.json").exists()
    process = train(workdir)
    assert process.wait() == 0 and differing(alone, workdir) == []


# -------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.slow
def test_with_a_damaged_newest_checkpoint_a_run_ends_with_the_same_bits(train, alone, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(alone[0], workdir)
    (workdir / "result.json").unlink()
    older, newer = sorted((workdir / "checkpoints").iterdir())
    arrays = max((newer / "training" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    process = train(workdir)
    assert process.wait() == 0, process.said()
    said = process.said()
    assert f" runs/name/checkpoints/{newer.name}: a damaged checkpoint (" in said
    assert f" moved to runs/name/damaged/{newer.name} " in said
    assert f" resuming at step {older.name} of {STEPS} " in said
    shutil.rmtree(workdir / "damaged")
    assert differing(alone, workdir) == [] and [r["step"] for r in records_of(workdir)][-1] == STEPS
