"""Measures compile time, start-up time and memory of a deep model's training step, and the cost of reducing them.

    python -m benchmarks.compiling --json FILE

SegFormer-B5 with 150 classes, in three equivalent forms: `unrolled`; `scan`, whose long group of equal blocks is
compiled once (`train.scan_blocks`); `scan_remat`, where this holds for every group, and the backward pass recomputes
the blocks (`train.remat`). Each is compiled in a new process, first with an empty compilation cache, then with the
cache that the first left. Then the three take turns in one process. This takes about ten minutes on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import recorded
from segjax.benchmark.machine import quartiles

NUM_CLASSES = 150
FORMS = {
    "unrolled": {"scan_blocks": False, "remat": False},
    "scan": {"scan_blocks": True, "remat": False},
    "scan_remat": {"scan_blocks": True, "remat": True},
}
# Batch, height, width: of compile time and run time, and of memory.
TIMED, LARGE = (2, 256, 256), (1, 512, 512)
# Goals: seconds to compile with an empty and a full cache, bytes, seconds to the first line, and run time divided by
# that of the unrolled form.
TARGETS = {"cold": 15.0, "cached": 3.0, "temporaries": 1.2 * 2**30, "first_line": 2.0, "ratio": 1.1}
ROUNDS, STARTS = 9, 5
COMMANDS = {
    "python train.py --config configs/segformer.py": ("train.py", "--config=configs/segformer.py"),
    "python -m segjax.summary segformer_b0 --size 512 512": (
        *("-m", "segjax.summary", "segformer_b0"),
        *("--size", "512", "512"),
    ),
    "python -m segjax.convert --help": ("-m", "segjax.convert", "--help"),
}


# ------------------------------------------------------------------------------------------------------- training steps


def training(model_name: str, shape: tuple[int, int, int], form: str, overrides: Mapping[str, object]):
    """Returns a training step as in `segjax.benchmark.contenders`: AdamW, nothing random, no augmentation.

    Returns:
      The jitted step; its arguments as shapes and dtypes on one device; and a function that creates the arguments.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    import segjax
    from segjax import models
    from segjax.benchmark.training import example, training_step
    from segjax.models.functional import FunctionalModel
    from segjax.runtime.parallel import JitParallel

    still = {key: 0.0 for key in ("drop_path_rate", "dropout_rate") if key in models.settings(model_name)}

    def create():
        return segjax.create(model_name, num_classes=NUM_CLASSES, **still, **overrides)

    parallel = JitParallel(jax.devices()[:1])
    step, start = training_step(nnx.eval_shape(create), num_classes=NUM_CLASSES, **FORMS[form])

    def arguments():
        rng = np.random.default_rng(0)
        images = rng.normal(size=(*shape, 3)).astype(np.float32)
        batch = example(images, rng.integers(0, NUM_CLASSES, shape).astype(np.uint8))
        # Copies, because a step donates its buffers, and the arrays of a new optimizer share zeros.
        state = jax.tree.map(jnp.copy, start(*FunctionalModel(create()).arrays()))
        return parallel.replicate((state, batch, jax.random.key(0)))

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=parallel.whole)

    abstract = jax.tree.map(placed, jax.eval_shape(arguments))
    return parallel.compile_train(step), abstract, arguments


def _set_up(cache: str) -> None:
    import jax

    from segjax.runtime import environment

    # jax may be imported already, and has then read its environment variables.
    environment.prepare()
    jax.config.update("jax_compilation_cache_dir", cache)


def compile_once(
    cache: str, model: str, shape: tuple[int, int, int], form: str, overrides: Mapping[str, object]
) -> dict[str, float]:
    """Compiles a step in this process, with `cache` as the folder of the compilation cache.

    Returns:
      "trace", seconds in jax; "compile", seconds in the compiler or the cache; and "temporaries", bytes.
    """
    _set_up(cache)
    step, abstract, _ = training(model, shape, form, overrides)
    since = time.perf_counter()
    lowered = step.lower(*abstract)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    return {
        "trace": traced - since,
        "compile": compiled - traced,
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


def run_in_turn(
    cache: str, model: str, shape: tuple[int, int, int], rounds: int, overrides: Mapping[str, object]
) -> dict[str, dict[str, list[float]]]:
    """Runs steps of all forms in turn, each on its own copy of the same initial state.

    Returns:
      By form: quartiles of "seconds" per step, and of its "ratio" to the unrolled step of the same round.
    """
    _set_up(cache)
    programs, states = {}, {}
    for form in FORMS:
        step, abstract, arguments = training(model, shape, form, overrides)
        programs[form] = step.lower(*abstract).compile()
        states[form], batch, key = arguments()
    seconds = {form: [] for form in FORMS}
    # The first round is a warm-up.
    for number in range(rounds + 1):
        # A step after a heavy one may find a warmer machine, so the order alternates.
        names = list(FORMS)
        for form in names[number % len(names) :] + names[: number % len(names)]:
            since = time.perf_counter()
            states[form], scalars = programs[form](states[form], batch, key)
            scalars["loss"].block_until_ready()
            if number:
                seconds[form].append(time.perf_counter() - since)
    return {
        form: {
            "seconds": quartiles(own),
            "ratio": quartiles([a / b for a, b in zip(own, seconds["unrolled"], strict=True)]),
        }
        for form, own in seconds.items()
    }


def forms(
    model: str,
    *,
    timed: tuple[int, int, int],
    large: tuple[int, int, int],
    rounds: int,
    overrides: Mapping[str, object],
    say: Callable[[str], None],
) -> dict[str, dict[str, object]]:
    """Returns the cost of each form; see `compile_once` and `run_in_turn`.

    Returns:
      By form: "cold" and "cached" for a step on `timed`, "large" for a cold one on `large`, and the results of
      `run_in_turn`.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        # One folder for all forms, because no two of their programs are equal.
        cache = str(Path(folder) / "cache")
        for form in FORMS:
            say(f"compiling, {form} ...")
            found[form] = {
                "cold": recorded.in_a_process(compile_once, cache, model, timed, form, overrides),
                "cached": recorded.in_a_process(compile_once, cache, model, timed, form, overrides),
            }
        say("stepping, in turn ...")
        for form, times in recorded.in_a_process(run_in_turn, cache, model, timed, rounds, overrides).items():
            found[form] |= times
        for form in FORMS:
            say(f"compiling the large step, {form} ...")
            found[form]["large"] = recorded.in_a_process(compile_once, cache, model, large, form, overrides)
    return found


# ------------------------------------------------------------------------------------------------------------- starting


def first_line(words: Sequence[str]) -> float:
    """Returns the seconds from the start of `python WORDS` to its first line; the process is ended then.

    Raises:
      RuntimeError: The process ends without a line.
    """
    since = time.perf_counter()
    command = [sys.executable, *words]
    with subprocess.Popen(command, cwd=recorded.REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - since
        process.kill()
        if not line:
            raise RuntimeError(f"{' '.join(words)} said nothing:\n{process.stderr.read().decode()}")
    return seconds


def starts(times: int) -> dict[str, list[float]]:
    """Returns, by command, quartiles of the seconds to its first line, after one start that warms the disk cache."""
    found = {}
    for name, words in COMMANDS.items():
        seconds = []
        for _ in range(times + 1):
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(
                    first_line([*words, *(["--workdir", f"{folder}/run"] if words[0] == "train.py" else [])])
                )
        found[name] = quartiles(seconds[1:])
    return found


# -------------------------------------------------------------------------------------------------------------- report


def report(record: Mapping) -> Iterator[str]:
    """Yields the lines of the tables, at most 80 columns wide."""
    (batch, height, width), (large_batch, large_height, large_width) = record["timed"], record["large"]
    yield f"{record['model']}, training step, {record['num_classes']} classes, float32"
    yield f"  at {batch}x{height}x{width}: seconds to compile (to trace), of a step, over unrolled"
    yield f"{'':<12} {'cold':>15} {'from the cache':>15} {'step':>7} {'ratio':>6} {'MiB':>6}"
    for form, found in record["forms"].items():
        cold, cached = (
            f"{found[kind]['trace'] + found[kind]['compile']:.1f} ({found[kind]['trace']:.1f})"
            for kind in ("cold", "cached")
        )
        yield (
            f"{form:<12} {cold:>15} {cached:>15} {found['seconds'][0]:>7.3f} {found['ratio'][0]:>6.2f} "
            f"{found['cold']['temporaries'] / 2**20:>6.0f}"
        )
    yield f"  targets: {TARGETS['cold']:.0f} cold, {TARGETS['cached']:.0f} from the cache, ratio {TARGETS['ratio']:.2f}"
    yield f"  temporaries at {large_batch}x{large_height}x{large_width}, GiB:"
    for form, found in record["forms"].items():
        yield f"{form:<12} {found['large']['temporaries'] / 2**30:>15.2f}"
    yield f"  target: {TARGETS['temporaries'] / 2**30:.1f}"
    yield from starts_report(record["starts"])


def starts_report(found: Mapping[str, Sequence[float]]) -> Iterator[str]:
    yield f"seconds to the first line, median and quartiles (target: {TARGETS['first_line']:.0f})"
    for name, (middle, low, high) in found.items():
        yield f"  {name:<54} {middle:>5.2f} {low:>6.2f}..{high:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="segformer_b5", help="a name of segjax.MODELS")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each form")
    parser.add_argument("--starts", type=int, default=STARTS, help="starts of each command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written")
    options = parser.parse_args(arguments)

    def say(text):
        print(text, flush=True)

    record = recorded.about("benchmarks.compiling", sys.argv[1:] if arguments is None else arguments) | {
        "model": options.model,
        "num_classes": NUM_CLASSES,
        "dtype": "float32",
        "timed": TIMED,
        "large": LARGE,
        "rounds": options.rounds,
        "targets": TARGETS,
        "starts": starts(options.starts),
    }
    say("\n".join(starts_report(record["starts"])))
    record["forms"] = forms(options.model, timed=TIMED, large=LARGE, rounds=options.rounds, overrides={}, say=say)
    say("\n".join(report(record)))
    recorded.write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
