"""Commands that replace a result leave the complete old or the complete new one if they are killed or fill the disk.

Each command runs in its own process (`tests/forks.py`), which ends right before its n-th disk operation: for each n
under `-m slow`, otherwise for a few n around the moves of files. Python does not see the operations of tensorstore and
array_record, so commands that use them are also killed after any number of files. For a full disk, they receive the
error that a file is too large.
"""

import itertools
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from segjax.checkpoints import orbax_folder
from segjax.models.functional import params_sha256
from tests.data.test_builders import make_tree
from tests.forks import DIED, Fork, Forks
from tests.killed import HAS_TORCH, MODULES
from tests.made_archives import Made
from tests.viz.test_video import film


def files(out: Path) -> dict[str, str]:
    """What a reader finds, as hashes: temporary files have hidden names, or TFDS's `incomplete`."""
    found = (path.relative_to(out) for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path): hash_of(out / path) for path in found if not any(map(is_temporary, path.parts))}


def hash_of(path: Path) -> str:
    """Of the bytes; of a video, of its frames and their times: x264 codes equal frames to other bytes at times."""
    if path.suffix != ".mp4":
        return sha256(path.read_bytes()).hexdigest()
    hashed = sha256()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            hashed.update(repr((frame.pts, frame.time_base)).encode() + frame.to_ndarray(format="rgb24").tobytes())
    return hashed.hexdigest()


def is_temporary(name: str) -> bool:
    return name.startswith(".") or name.startswith("incomplete.")


def temporary(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if is_temporary(path.name)]


def weights(out: Path) -> dict[str, str]:
    """Of a folder whose bytes are other ones each time."""
    return {path.name: params_sha256(orbax_folder.load_weights(path)[0]) for path in out.glob("x")}


# ------------------------------------------------------------------------------------- what may be there in between


def all_of_one(now: dict, old: dict, new: dict) -> bool:
    return now in (old, new)


def each_of_one(now: dict, old: dict, new: dict) -> bool:
    return now.keys() == old.keys() and all(now[name] in (old[name], new[name]) for name in now)


def companions_of_one(name: str) -> Callable[[dict, dict, dict], bool]:
    """Two names cannot change at once: companions of a file may be missing, but none belongs to another version."""

    def is_whole(now: dict, old: dict, new: dict) -> bool:
        return name in now and any(now.items() <= version.items() for version in (old, new))

    return is_whole


# -------------------------------------------------------------------------------------------------------- the commands


@dataclass
class Replacing:
    """A command that replaces an old result.

    Attributes:
      command: function of `tests/killed.py`.
      make: makes the inputs in a folder.
      flags: flags with {folder}, which has the inputs; {out}, the folder with the result; {version}, 1 or 2; and
        {name}, one of `DATASETS`.
      read: what readers find in that folder.
      is_whole: whether what is found, given the old and the new result, is what may be there.
      rooms: of full disks, the bytes that a file can have, more than of predict.json and less than of another file.
      again: flags of the next call in addition.
    """

    command: str
    make: Callable[[Path], None]
    flags: str
    read: Callable[[Path], dict] = files
    is_whole: Callable[[dict, dict, dict], bool] = all_of_one
    rooms: tuple[int, ...] = ()
    again: str = ""


def nothing(folder: Path) -> None:
    """For commands whose only input is a checkpoint."""


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(folder: Path) -> None:
    (folder / "in").mkdir()
    for seed in range(3):
        Image.fromarray(noise(seed, 90, 110)).save(folder / "in" / f"{seed}.png")


def clip(folder: Path) -> None:
    film(folder / "in" / "x.mp4", [noise(seed, 90, 110) for seed in range(3)])


def trees(folder: Path) -> None:
    make_tree(folder / "1", train=2, val=1)
    make_tree(folder / "2", train=3, val=2)


def archives(folder: Path) -> None:
    for name in DATASETS:
        Made(folder / "made" / name, name).packed(folder / name)


SAVED = "{version} {out}/x"
EXPORTED = "{version} {out}/x.stablehlo --format stablehlo --size 32 40"
PREDICTED = "{folder}/in --output {out} --checkpoint {version} --write labels overlay probabilities"
PREPARED = "folder --source {folder}/{version} --data-dir {out}"
# The second is prepared next to the first.
DATASETS = "voc", "pet"
COMMANDS = {
    "convert to .safetensors": Replacing("convert", nothing, SAVED + ".safetensors", rooms=(12_000,)),
    "convert for orbax": Replacing("convert", nothing, SAVED, read=weights, rooms=(12_000,)),
    "convert for transformers": Replacing("convert", nothing, SAVED + " --to hf", rooms=(12_000,)),
    "save": Replacing("save", nothing, SAVED + ".safetensors"),
    "export": Replacing("export", nothing, EXPORTED, is_whole=companions_of_one("x.stablehlo"), rooms=(2_000,)),
    "evaluate": Replacing(
        "evaluate",
        nothing,
        "{version} --data folder --output {out}",
        is_whole=companions_of_one("index.html"),
        rooms=(1_000, 60_000),
    ),
    "compare": Replacing(
        "compare",
        nothing,
        "{version} {version} folder --output {out}",
        is_whole=companions_of_one("index.html"),
        rooms=(1_000,),
    ),
    "audit": Replacing(
        "audit",
        nothing,
        "{version} folder --output {out}",
        is_whole=companions_of_one("index.html"),
        rooms=(1_000,),
    ),
    # Too little room for label maps, overlays or probabilities.
    "predict images": Replacing(
        "predict", pictures, PREDICTED, is_whole=each_of_one, rooms=(3_000, 10_000, 100_000), again=" --resume"
    ),
    "predict a video": Replacing(
        "predict", clip, PREDICTED, is_whole=each_of_one, rooms=(3_000, 10_000, 100_000), again=" --resume"
    ),
    "prepare a folder": Replacing("prepare", trees, PREPARED, rooms=(2_000, 20_000)),
    "prepare archives": Replacing(
        "prepare", archives, "{name} --source {folder}/{name} --data-dir {out}", rooms=(2_000, 20_000)
    ),
}
if HAS_TORCH:
    COMMANDS["convert to .pth"] = Replacing("convert", nothing, SAVED + ".pth", rooms=(12_000,))


class Stage:
    """Where a command runs again and again, each time over the old result."""

    def __init__(self, replacing: Replacing, forks: Forks, folder: Path):
        self._replacing, self._forks, self._folder = replacing, forks, folder
        self.out, self._old = folder / "out", folder / "old"
        replacing.make(folder)
        self.run(1)
        self.old = replacing.read(self.out)
        self.out.rename(self._old)
        self.put_old()
        operations = folder / "operations"
        self.run(2, operations=operations)
        self.operations = operations.read_text().split()
        self.new = replacing.read(self.out)
        assert self.old != self.new and temporary(self.out) == []

    def put_old(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self._old, self.out)

    def start(self, version: int, more: str = "", **how) -> Fork:
        output = self._folder / "output"
        output.write_text("")
        given = dict(folder=self._folder, out=self.out, version=version, name=DATASETS[version - 1])
        flags = (self._replacing.flags + more).format_map(given).split()
        return self._forks.start(output, *flags, command=f"tests.killed:{self._replacing.command}", **how)

    def said(self) -> str:
        return " ".join((self._folder / "output").read_text().split())

    def run(self, version: int, more: str = "", **how) -> int:
        status = self.start(version, more, **how).wait()
        assert status in (0, DIED), self.said()
        return status

    def die(self, moment: int) -> int:
        self.put_old()
        return self.run(2, operations=self._folder / "operations", dies_at=moment)

    def kill(self, after: int | None, delay: float = 0) -> int:
        """Kills it so many seconds after this number of new files and folders has been there; returns their number."""
        self.put_old()
        before = self._paths()
        process, new = self.start(2), set()
        while process.poll() is None and (after is None or len(new) < after):
            new |= self._paths() - before
            time.sleep(0.0005)
        time.sleep(delay)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL), self.said()
        return len(new)

    def _paths(self) -> set[str]:
        return {os.path.join(folder, name) for folder, *both in os.walk(self.out) for names in both for name in names}

    def check(self, what: object) -> str:
        """That the old or the new is there, which is returned, and that the next call ends with the new one."""
        now = self._replacing.read(self.out)
        assert self._replacing.is_whole(now, self.old, self.new), what
        # Nothing is resumed where nothing was begun.
        self.run(2, "" if now == self.old else self._replacing.again)
        assert self._replacing.read(self.out) == self.new, what
        assert temporary(self.out) == [], what
        return "old" if now == self.old else "new" if now == self.new else "between"


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Callable[[str], Stage]]:
    cache = tmp_path_factory.mktemp("cache")
    forks, stages = Forks(cache, MODULES), {}

    def make(name: str) -> Stage:
        if name not in stages:
            stages[name] = Stage(COMMANDS[name], forks, tmp_path_factory.mktemp("stage"))
        return stages[name]

    yield make
    forks.close()


def report(name: str, points: str, found: list[str]) -> None:
    """For `pytest -s`: what was there after each death."""
    print(f"\n{name}: {points}; " + ", ".join(f"{found.count(kind)} {kind}" for kind in sorted(set(found))))


def turning_points(operations: list[str], most: int) -> list[int]:
    """Numbers of operations that move or remove something, and of those right afterwards."""
    moves = [i for i, name in enumerate(operations) if name in ("os.rename", "exchange", "os.remove", "os.rmdir")]
    points = sorted({i + after for i in moves for after in (0, 1) if i + after < len(operations)})
    return [points[i] for i in np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dying_command_leaves_the_old_or_the_new_result_intact(name, stage):
    on = stage(name)
    for moment in turning_points(on.operations, 4):
        on.die(moment)
        on.check((moment, on.operations[moment]))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_dying_at_any_operation_leaves_the_old_or_the_new_result_intact(name, stage):
    on, found = stage(name), []
    for moment in itertools.count():
        if on.die(moment) == 0:
            break
        found.append(on.check((moment, on.operations[moment : moment + 1])))
    report(name, f"{moment} operations", found)
    assert "old" in found and moment > 5


@pytest.mark.parametrize("name", ["convert for orbax", "prepare a folder", "prepare archives"])
@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_while_native_code_writes_leaves_the_old_or_the_new_result(name, kills, stage):
    on, rng = stage(name), np.random.default_rng(0)
    most, found = on.kill(None), []
    for after in np.linspace(1, most, kills).round().astype(int):
        on.kill(after, delay=rng.uniform(0, 0.003))
        found.append(on.check(after))
    report(name, f"{kills} kills among {most} files", found)


# ---------------------------------------------------------------------------------------------------------- a full disk


ROOMS = [(name, room) for name, replacing in COMMANDS.items() for room in replacing.rooms]


@pytest.mark.parametrize("name, room", ROOMS)
def test_a_full_disk_gives_one_message_and_leaves_only_the_old_result(name, room, stage):
    on = stage(name)
    on.put_old()
    assert on.start(2, largest_file=room).wait() == 2, on.said()
    said = on.said()
    assert said.count("File too large") == said.count("ake room, and run the ") == 1 and "Traceback" not in said
    assert re.search(r"segjax \w+: [^ :]*: (cannot be written \()?File too large", said), said
    # A preparation keeps what it has checked, for the next call.
    assert [path.name for path in temporary(on.out) if not path.name.startswith(".converting-")] == []
    on.check(room)
