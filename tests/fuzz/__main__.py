"""Fuzzes everything that segjax reads, and fails if it behaves badly.

    python -m tests.fuzz --minutes 60               # prints every fault with the command that repeats it
    python -m tests.fuzz --seed 0 --trial 117       # repeats one trial, prints its whole output, keeps its files

Each trial changes a real file (`subjects.py`, `mutations.py`) and runs its reader in a forked process. Faults are a
traceback, a crash, a message of Python itself or without the name of the file, status 0 for input that is known to be
bad, more than 60 s or 3 GiB, and leftover files. Trial n of a seed is always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.fuzz.subjects import SUBJECTS, Subject

SECONDS, GIB = 60, 3
# What Python says of a value that the code did not expect.
PYTHONS_WORDS = re.compile(
    r"object (is not|has no|does not)|has no attribute|unexpected keyword|list index out of|unhashable type|"
    r"invalid literal for|not supported between|must be real number|codec can't|unsupported operand|argument of type|"
    r"NoneType|not enough values to unpack|too many values to unpack|\[Errno|malformed node|zip\(\) argument|"
    r"out of bounds for"
)
# A config file is Python of its owner, whose errors are told in Python's words, by file and line.
OWN_CODE = re.compile(r"mine\.py:\d+: .*")
CACHE = "torchinductor_"  # of PyTorch, for all programs of a user
LEFT_BEHIND = re.compile(r"\.part\d|\.converting-|incomplete\.|\.orbax-checkpoint-tmp")
# Imported before the first fork, so that no trial waits for it. None of them starts a backend of JAX.
HEAVY = (
    "av",
    "cv2",
    "orbax.checkpoint",
    "rasterio",
    "matplotlib.figure",
    "tensorboardX",
    "tensorflow_datasets",
    "tifffile",
    "torch",
    "segjax.commands.convert",
    "segjax.commands.conversion",
    "segjax.commands.data",
    "segjax.commands.data_import",
    "segjax.commands.inspect",
    "segjax.commands.train",
    "segjax.data.builders",
    "segjax.inference.images",
    "segjax.torch_reference.verify",
    "segjax.train.loop",
    "tests.runs",
    "configs.segformer",
)


class Ending(NamedTuple):
    """How a command ended: its status or minus the signal, its output, and the limit that it broke."""

    status: int
    output: str
    broke: str = ""


def forked(function: Callable[[], int], folder: Path, *, seconds: float | None = None) -> Ending:
    """Runs a function in a forked process in a folder, within the limits; the status is what it returns."""
    log = folder.parent / "output"
    scratch = folder.parent / "tmp"
    scratch.mkdir(exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
                os.dup2(source, number)
            tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
            os.chdir(folder)
            status = function()
        except SystemExit as error:
            # As the interpreter does.
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    seconds = SECONDS if seconds is None else seconds
    broke, end = "", time.monotonic() + seconds
    while (ended := os.waitpid(child, 0 if broke else os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            broke = f"more than {seconds} s"
        elif _held(child) > GIB * 2**30:
            broke = f"more than {GIB} GiB"
        if broke:
            os.kill(child, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return Ending(os.waitstatus_to_exitcode(ended[1]), log.read_text(errors="replace"), broke)


def _held(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def originals(subject: Subject, folder: Path) -> None:
    """Makes the files of a subject, in a process of its own: models start a backend of JAX."""
    folder.mkdir(parents=True)

    def make() -> int:
        subject.make(folder)
        return 0

    # Models are compiled here.
    ending = forked(make, folder, seconds=600)
    if ending.status:
        raise RuntimeError(f"its files cannot be made, status {ending.status} {ending.broke}:\n{ending.output}")


def faults_of(subject: Subject, made: Path, work: Path, rng: np.random.Generator) -> tuple[str, list[str], str]:
    """One trial: what was changed, what is at fault, and the output."""
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "files"
    shutil.copytree(made, folder, symlinks=True)
    mutation = subject.mutate(folder, rng)
    before = _state(folder)
    faults, outputs, refused = [], [], False
    for command in subject.commands:
        shown = "" if callable(command) else " ".join(command[:2])

        def run(command=command) -> int:
            return command() if callable(command) else importlib.import_module("segjax.__main__").main(list(command))

        ending = forked(run, folder)
        outputs.append(ending.output)
        refused |= ending.status != 0
        faults += [f"{shown}: {fault}".removeprefix(": ") for fault in _faults_of_ending(ending, mutation.text)]
        faults += [f"{shown}: left {path}" for path in _left(work, folder, before, subject.outputs, ending.status)]
    if mutation.is_bad and not refused:
        faults.append("accepted in silence")
    return mutation.text, faults, "".join(outputs)


def _faults_of_ending(ending: Ending, changed: str) -> list[str]:
    if ending.broke:
        return [ending.broke]
    if ending.status < 0:
        return [f"ended by signal {-ending.status}"]
    last = (ending.output.strip().splitlines() or [""])[-1][:200]
    if "Traceback (most recent call last)" in ending.output:
        return [f"a traceback: {last}"]
    output = OWN_CODE.sub("", ending.output)
    found = PYTHONS_WORDS.search(output)
    faults = [f"Python's words: {output[max(0, found.start() - 80) : found.end() + 60]!r}"] if found else []
    if ending.status and not ending.output.strip():
        faults.append(f"status {ending.status} and no word")
    elif ending.status and not (set(re.findall(r"[\w-]{2,}", changed)) & set(re.findall(r"[\w-]{2,}", ending.output))):
        faults.append(f"the message does not name what was changed: {last}")
    return faults


def _state(folder: Path) -> dict[Path, tuple]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()}


def _left(work: Path, folder: Path, before: dict, outputs: tuple[str, ...], status: int) -> list[str]:
    """Files that a command should not have left, or that it should not have changed."""
    after = _state(folder)
    own = {path for path in after if path.relative_to(folder).parts[0] in outputs}
    left = [path for path in after.keys() - before.keys() if path not in own or LEFT_BEHIND.search(str(path))]
    left += [path for path in before.keys() - own if after.get(path) != before[path]]
    scratch = [path for path in (work / "tmp").iterdir() if not path.name.startswith(CACHE)]
    return [str(path.relative_to(folder)) for path in left] + [f"tmp/{path.name}" for path in scratch]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="for how long; default 1")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--trial", type=int, help="only this trial of the seed, with its output")
    kinds = [name for name, subject in SUBJECTS.items() if not subject.needs or find_spec(subject.needs)]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="these kinds of input")
    options = parser.parse_args()
    for name in HEAVY:
        # Some are optional.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    work = Path(tempfile.mkdtemp(prefix="segjax-fuzz-"))
    made, counts, faulty = {}, Counter(), 0
    # Before the time begins: to make them takes as long as a hundred trials.
    for name in options.only if options.trial is None else ():
        made[name] = work / name / "made"
        originals(SUBJECTS[name], made[name])
    end = time.monotonic() + 60 * options.minutes
    trial = options.trial or 0
    while time.monotonic() < end or options.trial is not None:
        rng = np.random.default_rng([options.seed, trial])
        name = str(rng.choice(options.only))
        if name not in made:
            made[name] = work / name / "made"
            originals(SUBJECTS[name], made[name])
        text, faults, output = faults_of(SUBJECTS[name], made[name], work / "trial", rng)
        counts[name] += 1
        if options.trial is not None:
            print(f"{text}\n{output}\nthe files are in {work / 'trial' / 'files'}")
        if faults:
            faulty += 1
            only = "" if options.only == kinds else f" --only {' '.join(options.only)}"
            print(f"\n{name}: {text}\n  " + "\n  ".join(faults))
            print(f"  python -m tests.fuzz --seed {options.seed} --trial {trial}{only}", flush=True)
        if options.trial is not None:
            return 1 if faults else 0
        trial += 1
    shutil.rmtree(work)
    print(
        f"\n{faulty} of {trial} trials are at fault; " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
    )
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
