"""Runs everything that only a GPU can answer, in order of importance, each part within ten minutes.

    python -m benchmarks.on_gpu --output DIR
    python -m benchmarks.on_gpu --output DIR --only parity implementations

Each part is a separate command, which is printed. Its output goes to DIR/PART.log and its record to DIR/PART.json. A
part that fails or exceeds its time limit does not stop the others. DIR/on-gpu.json states how each part ended. Parts
that succeeded are not run again unless --only names them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import recorded

LIMIT = 600
MODELS = ("segformer_b0", "segnext_t", "hrnet_w48", "segformer_b2", "segnext_b", "segformer_b5")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


class Part(NamedTuple):
    """A command and its purpose.

    Attributes:
      words: The command. `{json}` is the path of its record.
      rehearsal: The command that replaces it on a machine without a GPU.
    """

    what: str
    words: tuple[str, ...]
    rehearsal: tuple[str, ...]


def module(name: str, *words: str) -> tuple[str, ...]:
    return sys.executable, "-m", name, *words


def parts(camvid: Path | None) -> dict[str, Part]:
    """Returns the parts by name, in order of importance."""
    found = {
        "parity": Part(
            "parity with PyTorch, products of float32 as float32",
            (*PYTEST, "parity", "-m", "not gpu and not slow"),
            (*PYTEST, "-n", "0", "parity/test_forward.py", "--collect-only"),
        ),
        "implementations": Part(
            "implementations for GPUs against the plain ones, float32 and bfloat16; two steps, the same bits",
            (*PYTEST, "parity/test_gpu.py"),
            (*PYTEST, "-n", "0", "parity/test_gpu.py", "--collect-only", "-m", "gpu"),
        ),
        "forms": Part(
            "equal forms of single layers, timed",
            module("benchmarks.gpu_forms", "--json", "{json}"),
            module("benchmarks.gpu_forms", "--rehearse", "--only", "norms", "--json", "{json}"),
        ),
        "determinism": Part(
            "whether two runs give the same bits, and what the flag for it costs",
            module("benchmarks.gpu_determinism", *MODELS[:3], "--json", "{json}"),
            module("benchmarks.gpu_determinism", "segformer_b0", "--rehearse", "--json", "{json}"),
        ),
        "resume": Part(
            "runs that are killed and resumed end with the bits of an undisturbed one",
            module("benchmarks.kill_resume", "--kills", "12", "--record", "{json}"),
            module("benchmarks.kill_resume", "--help"),
        ),
        "speed": Part(
            "segjax next to PyTorch, eager and compiled, bfloat16",
            module("segjax.benchmark", "--table", "gpu", "--minutes", "9", "--json", "{json}"),
            module("segjax.benchmark", "--help"),
        ),
        "training-kernels": Part(
            "the kernels of training steps, measured and by roofline",
            module("benchmarks.gpu_profile", *MODELS, "--json", "{json}"),
            module("benchmarks.gpu_profile", "segformer_b0", "--rehearse", "--json", "{json}"),
        ),
        "inference-kernels": Part(
            "the kernels of one image's forward pass, measured and by roofline",
            module("benchmarks.gpu_profile", *MODELS, "--mode", "infer", "--batch", "1", "--json", "{json}"),
            module("benchmarks.gpu_profile", "hrnet_w18", "--mode", "infer", "--rehearse", "--json", "{json}"),
        ),
    }
    if camvid is not None:
        words = ("--source", str(camvid), "--seeds", "0", "--json", "{json}")
        found["camvid"] = Part(
            "CamVid from random weights",
            module("benchmarks.camvid", *words),
            module("benchmarks.camvid", "--help"),
        )
    return found


def run(words: Sequence[str], log: Path, limit: float) -> tuple[str, float]:
    """Runs a command with its output in a file, and ends it and all its children after `limit` seconds.

    Returns:
      "ok", "failed (status N)" or "out of time", and the seconds taken.
    """
    since = time.monotonic()
    # pytest's workers share the card.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, stdout=out, stderr=subprocess.STDOUT, cwd=recorded.REPO, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time", time.monotonic() - since
    return "ok" if status == 0 else f"failed (status {status})", time.monotonic() - since


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    every = list(parts(Path()))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of logs and records")
    parser.add_argument("--only", nargs="+", choices=every, metavar="PART", help=", ".join(every))
    parser.add_argument("--camvid", type=Path, metavar="DIR", help="CamVid: images/, labels/, classes; last part")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help="seconds of each part")
    parser.add_argument("--rehearse", action="store_true", help="small commands in their places: for a CPU")
    options = parser.parse_args(words)
    if not options.rehearse and not recorded.has_gpu():
        print("on_gpu: there is no GPU here; --rehearse runs small commands on the CPU", file=sys.stderr)
        return 2
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "on-gpu.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    record = recorded.about("benchmarks.on_gpu", words) | {"parts": earlier}
    for name, part in parts(options.camvid and options.camvid.absolute()).items():
        if name not in (options.only or every) or (not options.only and earlier.get(name, {}).get("ended") == "ok"):
            continue
        given = part.rehearsal if options.rehearse else part.words
        command = [word.replace("{json}", str(output / f"{name}.json")) for word in given]
        print(f"{name}: {part.what}\n$ " + " ".join(["python", *command[1:]]), flush=True)
        ended, seconds = run(command, output / f"{name}.log", options.limit)
        print(f"  {ended} after {seconds:.0f} s; {name}.log", flush=True)
        record["parts"][name] = {"ended": ended, "seconds": round(seconds, 1)}
        recorded.write(path, record)
    return 0 if all(part["ended"] == "ok" for part in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
