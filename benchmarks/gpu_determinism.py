"""Measures whether two runs on this GPU are bitwise equal, and what the flag that guarantees it costs.

    python -m benchmarks.gpu_determinism segformer_b0 hrnet_w18 segnext_t --json FILE

Each run repeats the training step of `segjax.benchmark` a few times in its own process, in bfloat16. Two runs use XLA's
defaults, and two use `--xla_gpu_deterministic_ops=true`. The final parameters are hashed, and the steps are timed.
`--rehearse` uses a tiny batch, for a CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import recorded

FLAG = "--xla_gpu_deterministic_ops=true"
STEPS, WARM = 10, 3


def run(name: str, size: tuple[int, int], batch: int, flag: str) -> dict[str, object]:
    """Runs in a new process; returns "params_sha256" after the steps, and "milliseconds", the median of later steps."""
    # Before jax is imported. A process with the flag must not load cached programs compiled without it.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    import jax

    import segjax
    from segjax.benchmark import contenders
    from segjax.models.functional import params_sha256

    work = contenders.Work(name, size, batch, "train", "bfloat16")
    model = segjax.create(name, num_classes=work.num_classes, dtype=work.dtype)
    step, compile_train, state, examples, key = contenders.training(work, model)
    program = compile_train(step)
    times = []
    for _ in range(STEPS):
        since = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, examples, key))
        times.append(time.perf_counter() - since)
    params = step.model.stacks.apart(state.params)
    return {
        "params_sha256": params_sha256(jax.device_get(params)),
        "milliseconds": 1e3 * statistics.median(times[WARM:]),
        "platform": jax.default_backend(),
    }


def compared(name: str, size: tuple[int, int], batch: int) -> dict[str, object]:
    """Compares two runs without and two with the flag: hashes, times, "equal" for each pair, the flag's "cost"."""
    runs = {flag: [recorded.in_a_process(run, name, size, batch, flag) for _ in range(2)] for flag in ("", FLAG)}
    equal = {flag or "default": len({one["params_sha256"] for one in both}) == 1 for flag, both in runs.items()}
    times = [min(one["milliseconds"] for one in both) for both in runs.values()]
    return {
        "equal": equal,
        "cost": times[1] / times[0],
        "runs": {flag or "default": both for flag, both in runs.items()},
    }


def line(name: str, found: dict) -> str:
    """Returns a line of at most 80 columns."""
    words = {True: "the same bits", False: "DIFFERENT bits"}
    default, flagged = (words[found["equal"][key]] for key in ("default", FLAG))
    return f"{name:<22} {default}; with the flag {flagged}, {found['cost']:.2f} of the time"[:80]


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_determinism", description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names of segjax.MODELS")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rehearse", action="store_true", help="one tiny batch: for a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written, after every model")
    options = parser.parse_args(words)
    size, batch = ((32, 64), 2) if options.rehearse else ((512, 512), options.batch)
    if not options.rehearse and not recorded.has_gpu():
        print("gpu_determinism: there is no GPU here; --rehearse runs a tiny batch on the CPU", file=sys.stderr)
        return 2
    record = recorded.about("benchmarks.gpu_determinism", words) | {"flag": FLAG, "models": {}}
    for name in options.models:
        record["models"][name] = found = compared(name, size, batch)
        print(line(name, found), flush=True)
        recorded.write(options.json, record)
    return 0 if all(found["equal"][FLAG] for found in record["models"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
