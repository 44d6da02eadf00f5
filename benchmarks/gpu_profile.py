"""Measures every kernel of a training step or forward pass on this GPU, and prints its time next to its roofline.

    python -m benchmarks.gpu_profile segformer_b0 hrnet_w48 --mode train --batch 32 --json FILE

The program is that of `segjax.benchmark`, in bfloat16. jax's profiler times the kernels of a few calls;
`benchmarks.gpu_static` computes their rooflines from the same compiled program. The twenty kernels that lose most
against their roofline are listed. `--rehearse` uses tiny sizes on a CPU, which has no kernels, so its figures are
meaningless.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

import segjax
from benchmarks import gpu_static, recorded
from segjax.benchmark import contenders

CALLS, WORST = 5, 20


def measured(folder: Path) -> dict[str, float]:
    """Returns the seconds of each instruction of compiled programs, by name, from a trace of `jax.profiler.trace`.

    The trace is read as JSON: `jax.profiler.ProfileData` aborts the process in jax 0.12.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    for path in folder.rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {kind: {} for kind in ("process_name", "thread_name")}
        for event in events:
            if event.get("ph") == "M" and event["name"] in names:
                names[event["name"]][event["pid"], event.get("tid")] = event["args"]["name"]
        devices = {pid for (pid, _), name in names["process_name"].items() if name.startswith("/device:")}
        for event in events:
            operation = event.get("args", {}).get("hlo_op")
            if not operation or "dur" not in event or (devices and event["pid"] not in devices):
                continue
            # A device's lines of whole operations repeat the events of its streams.
            if devices and not names["thread_name"].get((event["pid"], event["tid"]), "").startswith("Stream"):
                continue
            seconds[operation] += event["dur"] * 1e-6
    return dict(seconds)


def joined(text: str, seconds: Mapping[str, float], calls: int) -> dict[str, object]:
    """Returns the kernels of an optimised program with their measured times, the largest loss first.

    Args:
      text: Text of the program.
      seconds: Seconds by instruction, over all calls.
      calls: Number of calls.

    Returns:
      "milliseconds" and "roofline_ms" per call; "unmatched_ms", the time of kernels that the program does not name;
      "kernels", each with "name", "kind", "shape", "source", "bound", "count", "milliseconds" and "roofline_ms".
    """
    rows = []
    for kernel in gpu_static.Program(text).kernels:
        spent = seconds.get(kernel.name, 0.0) / calls
        rows.append(
            {
                **{key: getattr(kernel, key) for key in ("name", "kind", "shape", "source", "bound")},
                "count": kernel.times,
                "milliseconds": 1e3 * spent,
                "roofline_ms": 1e3 * kernel.times * (kernel.seconds - gpu_static.LAUNCH),
            }
        )
    rows.sort(key=lambda row: row["roofline_ms"] - row["milliseconds"])
    total = 1e3 * sum(seconds.values()) / calls
    return {
        "milliseconds": total,
        "roofline_ms": sum(row["roofline_ms"] for row in rows),
        "unmatched_ms": total - sum(row["milliseconds"] for row in rows),
        "kernels": rows,
    }


def profiled(work: contenders.Work, calls: int = CALLS) -> dict[str, object]:
    """Returns `joined` for the program that `segjax.benchmark` times for `work`."""
    model = segjax.create(work.model, num_classes=work.num_classes, dtype=work.dtype)
    wrapped, arguments = contenders.program(work, model)
    program = wrapped.lower(*arguments).compile()
    step = contenders.stepping(program, work.mode, arguments)
    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(step())
        return joined(program.as_text(), measured(Path(folder)), calls)


def report(found: Mapping, worst: int = WORST) -> Iterator[str]:
    """Yields lines of at most 80 columns."""
    yield (
        f"  {found['milliseconds']:.2f} ms in kernels, roofline {found['roofline_ms']:.2f} ms; "
        f"{found['unmatched_ms']:.2f} ms are of no instruction"
    )
    yield f"  {'ms':>8} {'roofline':>8} {'x':>4}  {'bound':<10} kind, shape, source"
    for row in found["kernels"][:worst]:
        what = f"{row['kind']} {row['shape']} {row['source']}"
        yield (
            f"  {row['milliseconds']:>8.3f} {row['roofline_ms']:>8.3f} {row['count']:>4}  {row['bound']:<10} {what}"
        )[:80]


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names of segjax.MODELS")
    parser.add_argument("--mode", choices=["infer", "train"], default="train")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--rehearse", action="store_true", help="one tiny batch: for a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written, after every model")
    options = parser.parse_args(words)
    if jax.default_backend() != "gpu" and not options.rehearse:
        print("gpu_profile: there is no GPU here; --rehearse runs a tiny batch on the CPU", file=sys.stderr)
        return 2
    size, batch = ((32, 64), 2) if options.rehearse else (tuple(options.size), options.batch)
    record = recorded.about("benchmarks.gpu_profile", words) | {
        "device": jax.devices()[0].device_kind,
        "mode": options.mode,
        "batch": batch,
        "size": size,
        "models": {},
    }
    for name in options.models:
        work = contenders.Work(name, size, batch, options.mode, "bfloat16")
        record["models"][name] = found = profiled(work)
        print(f"{name}, {options.mode} {batch}x{size[0]}x{size[1]}, bfloat16", flush=True)
        print("\n".join(report(found)), flush=True)
        recorded.write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
