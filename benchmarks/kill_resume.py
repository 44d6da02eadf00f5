"""Kills a training run repeatedly at random moments, and compares its files with those of an undisturbed run.

    python -m benchmarks.kill_resume --kills 100

Two runs of `train.py` have settings that use every part of a run's state. The second run is killed by SIGKILL at
moments drawn from a seeded generator: while it compiles, steps, saves and evaluates. At the end both must be bitwise
equal. A kill takes 5 to 10 s. The record is written to benchmarks/records/. A POSIX system is required.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from segjax.benchmark import machine
from segjax.checkpoints import orbax_folder
from segjax.runtime import atomic

REPO = Path(__file__).parents[1]
# Wall-clock measurements, and the first step of a process: values that no run can reproduce.
MEASURED = ("images_per_second", "waiting", "duration_s", "from_step")
# Averages, dropout, drop path, augmentation, evaluations and log lines between checkpoints.
SETTINGS = (
    "--config=configs/segformer.py:b0,streets",
    "--config.data.train_images=9",
    "--config.data.eval_images=5",
    "--config.data.size=(40,64)",
    "--config.augment.crop=(32,48)",
    "--config.augment.photometric=True",
    "--config.model.dropout_rate=0.1",
    "--config.model.drop_path_rate=0.1",
    "--config.train.batch=4",
    "--config.train.ema=0.9",
    "--config.train.log_every=4",
    "--config.optim.warmup_steps=5",
    "--config.eval.batch=4",
    "--config.eval.every=3",
    "--config.eval.pictures=1",
    "--config.checkpoint.every=5",
)
PHASES = ("compile", "step", "save", "evaluate")


# ------------------------------------------------------------------------------------------------- the files of a run


def records_of(workdir: Path) -> list[dict]:
    """Returns the records of metrics.jsonl without wall-clock measurements."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def events_of(workdir: Path) -> dict[str, list]:
    """Returns the TensorBoard events by tag: (step, number or hash of a picture), in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    found = collections.defaultdict(list)
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += length + 16
            for value in event.summary.value:
                is_picture = value.HasField("image")
                content = _hash(value.image.encoded_image_string) if is_picture else value.simple_value
                if value.tag not in MEASURED:
                    found[value.tag].append((event.step, content))
    return dict(found)


def remains(workdir: Path) -> dict[str, object]:
    """Returns what must be equal in two runs, by name: hashes of arrays on disk, records, scalars, pictures."""
    steps = {path.name: path for path in (workdir / "checkpoints").iterdir()}
    left = {"checkpoints": sorted(steps), "files": sorted(path.name for path in workdir.iterdir())}
    for step, folder in steps.items():
        weights, training, about = orbax_folder.read_items(folder, "weights", "training", "about")
        left |= {f"checkpoint {step}, {name}": _hash(array) for name, array in (weights | training).items()}
        left[f"checkpoint {step}, record"] = about
    weights, about = orbax_folder.load_weights(workdir / "best")
    left |= {f"best, {name}": _hash(array) for name, array in weights.items()} | {"best, record": about}
    left["metrics.jsonl"] = records_of(workdir)
    left |= {f"TensorBoard, {tag}": values for tag, values in events_of(workdir).items()}
    result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    left["result.json"] = {key: value for key, value in result.items() if key not in MEASURED}
    return left | {str(path.relative_to(workdir)): _hash(path.read_bytes()) for path in workdir.rglob("*.png")}


def differences(one: dict, other: dict) -> list[str]:
    """Returns the names of items that differ between two runs, and tags that have a step more than once."""
    lines = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    for name, values in other.items():
        if name.startswith("TensorBoard") and len({step for step, _ in values}) < len(values):
            lines.append(f"{name}: a step more than once")
    return sorted(lines)


def _hash(data) -> str:
    data = (
        data if isinstance(data, bytes) else f"{data.dtype}{data.shape}".encode() + np.ascontiguousarray(data).tobytes()
    )
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------------------- killing


class Process(Protocol):
    """The part of `subprocess.Popen` that is used here."""

    pid: int

    def poll(self) -> int | None: ...


def wait_for(phase: str, process: Process, workdir: Path, output: Path) -> None:
    """Waits until a run that has just started is in a phase, or has ended."""
    records = workdir / "metrics.jsonl"
    before = len(records.read_text(encoding="utf-8")) if records.exists() else 0

    def is_in_phase() -> bool:
        said = output.read_text(encoding="utf-8")
        if phase == "compile":
            return "compiling" in said
        if "compiled in" not in said:
            return False
        if phase == "save":
            return any((workdir / "checkpoints").glob("*tmp*")) or any(workdir.glob(".best.new*"))
        if phase == "evaluate":
            # The twelfth step is followed by a record, and then an evaluation.
            written = records.read_text(encoding="utf-8") if records.exists() else ""
            last = re.search(r'"step": (\d+), "loss".*\n\Z', written)
            return "evaluating" in said or (len(written) > before and last and int(last[1]) % 12 == 0)
        return True

    while process.poll() is None and not is_in_phase():
        time.sleep(0.002)


def kill_until_finished(
    start: Callable[[Path], Process],
    workdir: Path,
    output: Path,
    *,
    kills: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Kills a run a number of times, and then lets it finish.

    Args:
      start: Function that starts the run with its output in the given file.

    Returns:
      The number of kills by phase, fewer in total than requested if the run finished before.
    """
    rng = np.random.default_rng(seed)
    done = collections.Counter()
    while True:
        phase = rng.choice(PHASES) if sum(done.values()) < kills else None
        longest = {"compile": 1.0, "step": 0.4, "save": 0.1, "evaluate": 0.1, None: 0.0}[phase]
        delay = rng.uniform(0, longest)
        output.write_text("", encoding="utf-8")
        process = start(output)
        if phase is not None:
            wait_for(phase, process, workdir, output)
            time.sleep(delay)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.002)
        if process.poll() == 0:
            return dict(done)
        if process.poll() != -signal.SIGKILL:
            raise RuntimeError(f"the run ended with {process.poll()}:\n{output.read_text(encoding='utf-8')}")
        done[phase] += 1
        say(f"kill {sum(done.values())} of {kills}: {phase}, {1000 * delay:.0f} ms into it")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="default: benchmarks/records/<date>-kill-resume.json")
    arguments = parser.parse_args()
    if sys.platform == "win32":
        parser.error("runs are killed by SIGKILL, which Windows does not have")
    settings = [sys.executable, "train.py", *SETTINGS, f"--config.train.steps={arguments.steps}"]

    def start_in(workdir):
        def start(output):
            with output.open("a", encoding="utf-8") as file:
                command = [*settings, f"--workdir={workdir}"]
                return subprocess.Popen(command, cwd=REPO, stdout=file, stderr=subprocess.STDOUT)

        return start

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        since = time.perf_counter()
        kill_until_finished(start_in(folder / "alone"), folder / "alone", folder / "output", kills=0, seed=0)
        print(f"a run of {arguments.steps} undisturbed steps: {time.perf_counter() - since:.0f} s", flush=True)
        since = time.perf_counter()
        done = kill_until_finished(
            start_in(folder / "killed"),
            folder / "killed",
            folder / "output",
            kills=arguments.kills,
            seed=arguments.seed,
            say=lambda line: print(line, flush=True),
        )
        seconds = time.perf_counter() - since
        alone = remains(folder / "alone")
        differing = differences(alone, remains(folder / "killed"))
    verdict = "the same bits" if not differing else f"{len(differing)} differences"
    print(f"{sum(done.values())} kills in {seconds:.0f} s: {verdict}, {len(alone)} results compared")
    print("\n".join(f"  differs: {line}" for line in differing))
    record = {
        "command": " ".join(["python -m benchmarks.kill_resume", *sys.argv[1:]]),
        "settings": [*SETTINGS, f"--config.train.steps={arguments.steps}"],
        "date": time.strftime("%Y-%m-%d"),
        **machine.described(),
        "kills": sum(done.values()),
        "kills_by_phase": done,
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "compared": len(alone),
        "differing": differing,
        "params_sha256": alone["result.json"]["params_sha256"],
    }
    path = arguments.record or REPO / "benchmarks" / "records" / f"{record['date']}-kill-resume.json"
    atomic.write_text(path, json.dumps(record, indent=2) + "\n")
    return 1 if differing or sum(done.values()) < arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
