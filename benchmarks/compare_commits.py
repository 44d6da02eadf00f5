"""Compares two checkouts of segjax: whether results are bitwise equal, and whether the new one is slower.

    git worktree add ../before COMMIT
    python -m benchmarks.compare_commits ../before
    python -m benchmarks.compare_commits ../before --family segnext hrnet --plain
    python -m benchmarks.compare_commits ../before --time

The new checkout is the one that runs this command. Each checkout computes in its own process, with the checkout as
PYTHONPATH, on the CPU. Every weight and running statistic is overwritten with random values that affect the output, in
float32 and float64, with three seeds each.

The comparison covers initial weights; logits and taps in evaluation, for images whose sides are multiples of 32 and,
where the model accepts them, for other images; and loss, gradients of all parameters, running statistics and counters
of random streams of a training step with all randomness enabled. Narrow models cover every kind of layer. Models of
full width also cover row tiles, tiled cross-entropy and, with SegFormer-B0, tiled attention. `--plain` compares the
plain implementations instead of the fast ones for CPUs. Nothing is cached on disk. This takes about half an hour on two
cores.

`--time` times the steps of the benchmark's table instead; the two checkouts take turns. This takes about twenty minutes
on two idle cores. `--time --augmentation` times the augmentation of a batch instead, which takes five.

The exit status is 1 if an array differs, or if a row of `--time` takes more than 1.05 times as long as before.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import subprocess
import sys
import time
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parents[1]
IGNORED = 255
LOSS = dict(cross_entropy=1, ohem=0, dice=0, focal=0, lovasz=0, label_smoothing=0, focal_gamma=2)
LOSS |= dict(ohem_threshold=0.7, ohem_min_kept=0.05, ohem_images=0, mean_over="labelled", aux="same")
LOSS |= dict(tversky=0, rmi=0, tversky_alpha=0.3, tversky_beta=0.7, tversky_power=1)
AUX_WEIGHT = 0.4
SEEDS = (0, 1, 2)
# Largest accepted ratio of the new time to the old.
SLOWER = 1.05
ROUNDS, ROUND_SECONDS, QUIET_SECONDS = 15, 0.5, 0.5
AUGMENTATION_ROUNDS = 25


class Subject(NamedTuple):
    """A model and the shapes of its input.

    Attributes:
      name: Key of `segjax.MODELS`.
      overrides: Further arguments of `segjax.create`.
      evaluated: Shapes (B, H, W) of images in evaluation; each is a program.
      trained: Shape (B, H, W) of images in training.
      dtypes: Dtypes of computation and parameters.
    """

    name: str
    overrides: Mapping = {}
    num_classes: int = 7
    evaluated: tuple[tuple[int, int, int], ...] = ((2, 64, 96), (3, 75, 101))
    trained: tuple[int, int, int] = (3, 64, 96)
    dtypes: tuple[str, ...] = ("float32", "float64")


_MULTIPLES = ((2, 64, 96), (3, 32, 160))
_MIT = dict(dims=(8, 16, 20, 32), depths=(2, 1, 2, 1), decoder_dim=24, drop_path_rate=0.4, dropout_rate=0.4)
_RATIOS = dict(mlp_ratios=(2, 3, 4, 5))
_HRNET = dict(width=6, stage1_channels=8, stage_modules=(1, 1, 2, 1), stage_blocks=(2, 1, 1, 2))
# 150 classes at this size use tiled cross-entropy, and the first stages use row tiles.
_FULL = dict(num_classes=150, evaluated=((2, 256, 320),), trained=(2, 128, 160))


def _without(sizes: Mapping, *names: str) -> dict:
    return {key: value for key, value in sizes.items() if key not in names}


SUBJECTS = {
    "segformer": Subject("segformer_b0", _MIT),
    "plain": Subject("segformer_plain_b0", _MIT | dict(fuse="conv")),
    "plain_norm": Subject("segformer_plain_b0", _MIT | dict(fuse="conv_bn")),
    "mmseg": Subject("segformer_mmseg_b0", _MIT),
    "simple": Subject(
        "segformer_simple", _without(_MIT, "drop_path_rate", "dropout_rate") | _RATIOS, evaluated=_MULTIPLES
    ),
    "zuppichini": Subject(
        "segformer_zuppichini",
        _without(_MIT, "dropout_rate") | _RATIOS | dict(num_heads=(1, 2, 5, 8)),
        evaluated=_MULTIPLES,
    ),
    "hrnet": Subject("hrnet_w18", _HRNET),
    "hrnet_corners": Subject("hrnet_w18", _HRNET | dict(align_corners=True)),
    "ocr": Subject("hrnet_w18_ocr", _HRNET | dict(ocr_channels=24, ocr_key_channels=12, dropout_rate=0.4)),
    "segnext": Subject("segnext_t", _without(_MIT, "decoder_dim") | _RATIOS | dict(ham_channels=64, ham_rank=8)),
    "segformer_b0": Subject("segformer_b0", **_FULL | dict(evaluated=((2, 256, 320), (1, 768, 1024)))),
    "segformer_plain_b0": Subject("segformer_plain_b0", **_FULL),
    "segformer_mmseg_b0": Subject("segformer_mmseg_b0", **_FULL),
    "segformer_simple": Subject("segformer_simple", **_FULL),
    "segformer_zuppichini": Subject("segformer_zuppichini", **_FULL),
    "hrnet_w18": Subject("hrnet_w18", **_FULL),
    "hrnet_w18_ocr": Subject("hrnet_w18_ocr", **_FULL),
    "segnext_t": Subject("segnext_t", **_FULL),
}


# Settings that add no work; the checkouts are compared with what both of them have.
_NEUTRAL = dict(base_size=None, scale_step=0.0, cat_max_ratio=1.0, class_balance=0.0, rotation=0.0, flip=0.5)
_NEUTRAL |= dict(photometric=True, brightness=0, cutmix=0.0, classmix=0.0, on_device="", on_host="", scale=(0.5, 2.0))


class Augmentation(NamedTuple):
    """A batch of images (B, H, W), the largest of a dataset, and the crops (h, w) taken from them."""

    title: str
    images: tuple[int, int, int]
    crop: tuple[int, int]
    photometric: bool = True


AUGMENTATIONS = (
    Augmentation("CamVid", (8, 360, 480), (352, 352)),
    Augmentation("CamVid, no colour", (8, 360, 480), (352, 352), photometric=False),
    Augmentation("ADE20K", (8, 512, 683), (512, 512)),
    Augmentation("Cityscapes", (4, 1024, 2048), (512, 1024)),
    Augmentation("Cityscapes, no colour", (4, 1024, 2048), (512, 1024), photometric=False),
)


# ------------------------------------------------------------------------------------------- in a checkout of its own


def _first_of(*names: str):
    """Returns the first "module:attribute" that this checkout has; names of internal modules differ between commits."""
    for name in names:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    raise LookupError(f"this checkout has none of {', '.join(names)}; add its name to {__file__}")


def _plain_implementations():
    return _first_of("segjax.layers:published_implementations", "segjax.models.layers:published_forms")()


def _named(state) -> dict[str, np.ndarray]:
    """Returns the arrays of a state by dotted name."""
    from flax import nnx

    flat = ((".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state))
    return {name: np.asarray(variable.get_value()) for name, variable in flat}


def _created(subject: Subject, dtype: str):
    import segjax

    settings = dict(num_classes=subject.num_classes, seed=3, dtype=dtype, param_dtype=dtype)
    return segjax.create(subject.name, **settings, **subject.overrides)


def _initial(subject: Subject) -> dict[str, np.ndarray]:
    """Returns the initial weights and statistics of a model by name."""
    from flax import nnx

    return _named(nnx.state(_created(subject, "float32"), nnx.Any(nnx.Param, nnx.BatchStat)))


class Model:
    """The model of a subject in one dtype, and its two programs."""

    def __init__(self, subject: Subject, dtype: str, *, plain: bool):
        import jax
        from flax import nnx

        from segjax import losses

        self.subject, self.dtype, self.plain = subject, dtype, plain
        # Without initial weights: their many small programs take longer to compile than the model.
        model = nnx.eval_shape(lambda: _created(subject, dtype))
        evaluation, self.params, self.stats, self.rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        model.train()
        training, *_ = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

        def forward(params, stats, rest, images):
            return nnx.merge(evaluation, params, stats, rest, copy=True)(images)

        def loss(params, stats, rest, images, labels):
            bound = nnx.merge(training, params, stats, rest, copy=True)
            logits, taps = bound(images)
            criterion = losses.criterion(LOSS, num_classes=subject.num_classes, ignore_label=IGNORED)
            counts = criterion.counts(labels)
            total = criterion.total(logits, labels, counts)
            if "aux_logits" in taps:
                total = total + AUX_WEIGHT * criterion.total(taps["aux_logits"], labels, counts)
            return total, (nnx.state(bound, nnx.BatchStat), nnx.state(bound, nnx.RngCount))

        self._forward = jax.jit(forward)
        self._step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def _random(self, seed: int) -> tuple:
        """Returns parameters, statistics and random streams; names and seed determine their values."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        def value(path, variable):
            like, number = variable.get_value(), zlib.crc32(".".join(map(str, path)).encode())
            if isinstance(variable, nnx.RngKey):
                return jax.random.fold_in(jax.random.key(seed), number)
            if isinstance(variable, nnx.RngCount):
                return jnp.zeros(like.shape, like.dtype)
            return _noise(np.random.default_rng([seed, number]), path[-1], like.shape).astype(like.dtype)

        return tuple(
            nnx.from_flat_state([(path, v.replace(value(path, v))) for path, v in nnx.to_flat_state(state)])
            for state in (self.params, self.stats, self.rest)
        )

    def evaluated(self, shape: tuple[int, int, int], seed: int) -> dict[str, np.ndarray]:
        """Returns logits and taps by name."""
        images = _images(shape, seed).astype(self.dtype)
        with _plain_implementations() if self.plain else contextlib.nullcontext():
            logits, taps = self._forward(*self._random(seed), images)
        return {"logits": np.asarray(logits)} | {f"taps.{name}": np.asarray(tap) for name, tap in taps.items()}

    def trained(self, shape: tuple[int, int, int], seed: int) -> dict[str, np.ndarray]:
        """Returns loss, gradients, running statistics and counters of random streams by name."""
        images, labels = _images(shape, seed).astype(self.dtype), _labels(shape, seed, self.subject.num_classes)
        with _plain_implementations() if self.plain else contextlib.nullcontext():
            (loss, (stats, counts)), gradients = self._step(*self._random(seed), images, labels)
        arrays = {"loss": np.asarray(loss)}
        for kind, state in (("gradient of", gradients), ("statistic", stats), ("counter", counts)):
            arrays |= {f"{kind} {name}": array for name, array in _named(state).items()}
        return arrays


def _noise(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws kernels of variance 1 / fan-in, scales and variances around 1, biases and means around 0."""
    if name in ("scale", "g", "var"):
        return rng.uniform(0.5, 1.5, shape)
    if name.startswith("layer_scale"):
        # As published; with values near 1 the products of gated blocks grow from block to block.
        return rng.uniform(0.005, 0.015, shape)
    if name in ("mean", "b") or name.endswith("bias"):
        return 0.2 * rng.standard_normal(shape)
    # torch's layout, (out, in), where the model keeps torch's name.
    fan_in = shape[-1] if name.endswith("weight") else np.prod(shape[:-1])
    return rng.standard_normal(shape) / np.sqrt(fan_in)


def _images(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, 3))


def _labels(shape: tuple[int, int, int], seed: int, num_classes: int) -> np.ndarray:
    """Draws labels, uint8 (B, H, W), a tenth of them ignored."""
    rng = np.random.default_rng([seed, 1])
    labels = rng.integers(0, num_classes, shape).astype(np.uint8)
    labels[rng.random(shape) < 0.1] = IGNORED
    return labels


def _results(subject: Subject, dtype: str, *, plain: bool) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields name and arrays of every case of a subject."""
    import jax

    with jax.enable_x64(dtype == "float64"):
        if dtype == "float32":
            yield "initial weights", _initial(subject)
        model = Model(subject, dtype, plain=plain)
        for seed in SEEDS:
            for shape in subject.evaluated:
                yield f"{dtype}, evaluation {_by(shape)}, seed {seed}", model.evaluated(shape, seed)
            yield f"{dtype}, training {_by(subject.trained)}, seed {seed}", model.trained(subject.trained, seed)
    jax.clear_caches()


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _checked(case: str, arrays: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """Raises ValueError if the arrays are such that their equality would prove nothing."""
    if not_finite := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{case}: not finite: {', '.join(not_finite)}")
    for name in ("logits", "loss"):
        if name in arrays and not np.any(arrays[name]):
            raise ValueError(f"{case}: {name} zero everywhere")
    return case, arrays


def _contender(work: tuple):
    """Returns a step of the benchmark in this checkout."""
    _first_of("segjax.runtime.environment:keep_freed_memory", "segjax.runtime:keep_freed_memory")()
    contenders = ("segjax.benchmark.contenders", "benchmarks.contenders")
    make = _first_of(*(f"{module}:CONTENDERS" for module in contenders))["segjax"]
    return make(_first_of(*(f"{module}:Work" for module in contenders))(*work))


class Augmenting:
    """Augmentation as in a training step: each run is one batch, with the keys of its step."""

    def __init__(self, case: Augmentation):
        import jax
        import jax.numpy as jnp

        from segjax.data import augment

        settings = types.SimpleNamespace(**_NEUTRAL | dict(crop=case.crop, photometric=case.photometric))
        batch, (height, width) = case.images[0], case.images[1:]
        rng = np.random.default_rng(0)
        # Blocks of one value, as photographs have.
        coarse = rng.integers(0, 256, (batch, height // 8 + 1, width // 8 + 1, 3), np.uint8)
        self._batch = {
            "image": jnp.asarray(coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]),
            "label": jnp.asarray(rng.integers(0, 11, (batch, height, width), np.uint8)),
            "size": jnp.tile(jnp.array([[height, width]], jnp.int32), (batch, 1)),
        }

        def step(number, batch):
            keys, _ = augment.step_keys(jax.random.key(0), number, jnp.arange(len(batch["size"])))
            return augment.augment(keys, batch, settings, ignore_label=IGNORED)

        self._step = jax.jit(step).lower(0, self._batch).compile()
        self.memory = self._step.memory_analysis().temp_size_in_bytes
        images, labels = self._step(0, self._batch)
        self.outcome = np.concatenate([np.ravel(images), np.ravel(labels)])
        self._number = 0

    def run(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._number += 1
            result = self._step(self._number, self._batch)
        result[0].block_until_ready()


def _serve(connection: Connection) -> None:
    """Answers requests until the connection ends; an answer is a stream that ends with None or an error's text."""
    # The finder of an editable install would load modules that this checkout lacks from another checkout.
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if "__editable__" not in str(getattr(finder, "__module__", ""))
    ]
    contender = None
    try:
        import segjax

        connection.send(segjax.__file__)
        while True:
            kind, *arguments = connection.recv()
            if kind == "compare":
                subject, dtype, plain = arguments
                for case, arrays in _results(Subject(*subject), dtype, plain=plain):
                    connection.send(_checked(case, arrays))
            elif kind == "prepare":
                contender = _contender(*arguments)
                connection.send((np.asarray(contender.outcome), contender.memory))
            elif kind == "prepare augmentation":
                (fields,) = arguments
                contender = Augmenting(Augmentation(*fields))
                connection.send((np.asarray(contender.outcome), contender.memory))
            else:
                (steps,) = arguments
                # Refills the caches, and brings back memory that the kernel reclaimed as idle.
                contender.run()
                since = time.perf_counter()
                contender.run(steps)
                connection.send((time.perf_counter() - since) / steps)
            connection.send(None)
    except EOFError:
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise


# --------------------------------------------------------------------------------------------------- the two checkouts


class CheckoutError(ValueError):
    """Raised when a checkout cannot be compared."""


class Checkout:
    """A process that computes with the segjax of one checkout."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "segjax" / "__init__.py").exists():
            raise CheckoutError(f"{folder} is no checkout of segjax: it has no segjax/__init__.py")
        self._connection, theirs = Pipe()
        environment = os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        # Without -P, the folder of this file would precede PYTHONPATH.
        command = [sys.executable, "-P", __file__, "--serve", str(theirs.fileno()), str(folder)]
        self._process = subprocess.Popen(command, cwd=folder, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def check(self) -> None:
        """Raises CheckoutError if the process has imported another segjax."""
        imported = Path(self._received())
        if self.folder not in imported.parents:
            raise CheckoutError(f"{self.folder}: its process imported {imported}")

    def ask(self, *request) -> None:
        self._connection.send(request)

    def answers(self) -> Iterator:
        while (answer := self._received(may_be_text=False)) is not None:
            yield answer

    def _received(self, *, may_be_text: bool = True):
        try:
            answer = self._connection.recv()
        except EOFError:
            raise CheckoutError(f"{self.folder}: its process died, exit status {self._process.wait()}") from None
        if isinstance(answer, str) and (not may_be_text or not answer.startswith("/")):
            raise CheckoutError(f"{self.folder}: {answer}")
        return answer

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def both(old: Path, new: Path):
    """Context of the processes of two checkouts, old first; they end with it."""
    with contextlib.ExitStack() as stack:
        checkouts = []
        for folder in (old, new):
            checkouts.append(Checkout(folder))
            stack.callback(checkouts[-1].close)
        for checkout in checkouts:
            checkout.check()
        yield checkouts


class Difference(NamedTuple):
    """Largest difference of an array relative to its largest value; inf if shape or dtype differ."""

    relative: float
    where: str


def differences(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> list[Difference]:
    """Returns the differences of all arrays that are not bitwise equal."""
    found = [Difference(float("inf"), f"{name} (only in one checkout)") for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        one, other = old[name], new[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            kinds = f"{one.dtype}{one.shape}, {other.dtype}{other.shape}"
            found.append(Difference(float("inf"), f"{name} ({kinds})"))
        elif one.tobytes() != other.tobytes():
            wide = one.astype(np.float64), other.astype(np.float64)
            largest = max(np.abs(wide[0]).max(), np.finfo(np.float64).tiny)
            found.append(Difference(float(np.abs(wide[0] - wide[1]).max() / largest), name))
    return found


def compare(name: str, checkouts: Sequence[Checkout], *, plain: bool = False) -> bool:
    """Returns whether all arrays of a subject are equal; prints the cases that differ, and a line for each dtype."""
    subject, all_equal = SUBJECTS[name], True
    for dtype in subject.dtypes:
        for checkout in checkouts:
            checkout.ask("compare", tuple(subject), dtype, plain)
        arrays = cases = 0
        worst: list[Difference] = []
        reached: dict[str, bool] = {}
        for (case, old), (same_case, new) in zip(*(checkout.answers() for checkout in checkouts), strict=True):
            assert case == same_case
            arrays, cases = arrays + len(old), cases + 1
            for array in old:
                if array.startswith("gradient of"):
                    reached[array] = reached.get(array, False) or bool(np.any(old[array]))
            if found := differences(old, new):
                most, where = max(found)
                worst.append(Difference(most, f"{case}: {where}"))
                print(f"  {name}, {case}: {len(found)} of {len(old)} arrays differ, at most by {most:.1e}: {where}")
        if unreached := [array for array, is_reached in reached.items() if not is_reached]:
            raise CheckoutError(f"{name}, {dtype}: zero for every seed, so that nothing is compared: {unreached}")
        line = f"{name}, {dtype}: {arrays} arrays of {cases} cases"
        if worst:
            print(f"{line} DIFFER, at most by {max(worst).relative:.1e}: {max(worst).where}", flush=True)
        else:
            print(f"{line} bit-identical", flush=True)
        all_equal &= not worst
    return all_equal


def timed(request: tuple, checkouts: Sequence[Checkout], *, rounds: int = ROUNDS) -> dict[str, object]:
    """Times one row; the checkouts take turns.

    Args:
      request: "prepare" and the fields of the benchmark's `Work` (model, size, batch, mode, dtype, number
        of classes), or "prepare augmentation" and the fields of an `Augmentation`.
      checkouts: The two processes, old first.
      rounds: Number of turns of each.

    Returns:
      "milliseconds", medians of old and new; "ratio" of new to old, quartiles over rounds, median first; "bytes" of
      temporaries of each; "difference" of their outputs.
    """
    outcomes, memory = [], []
    for checkout in checkouts:
        checkout.ask(*request)
        ((outcome, temporaries),) = checkout.answers()
        outcomes.append({"outcome": outcome})
        memory.append(temporaries)

    def seconds(checkout: Checkout, steps: int) -> float:
        checkout.ask("run", steps)
        (value,) = checkout.answers()
        return value

    steps = max(1, round(ROUND_SECONDS / seconds(checkouts[0], 2)))
    times = np.zeros((2, rounds))
    for number in range(rounds):
        # The second may find a warmer machine, so the order alternates.
        for which in (0, 1) if number % 2 else (1, 0):
            # The other's threads may spin for some tenths of a second.
            time.sleep(QUIET_SECONDS)
            times[which, number] = seconds(checkouts[which], steps)
    ratio = np.percentile(times[1] / times[0], (50, 25, 75))
    return {
        "milliseconds": list(1e3 * np.median(times, axis=1)),
        "ratio": list(ratio),
        "bytes": memory,
        "difference": max([0.0, *(one.relative for one in differences(*outcomes))]),
    }


def _rows_of_models(models: Sequence[str] | None) -> Iterator[tuple[str, tuple]]:
    """Yields title and request of each row of the benchmark's table."""
    for row in _first_of("segjax.benchmark.rows:TABLE", "segjax.benchmark:TABLE"):
        if not models or row.model in models:
            title = f"{row.model}, {row.mode} {_by((row.batch, *row.size))}"
            yield title, ("prepare", (row.model, row.size, row.batch, row.mode, "float32", 150))


def _rows_of_augmentation() -> Iterator[tuple[str, tuple]]:
    for case in AUGMENTATIONS:
        yield f"{case.title}, {_by(case.images)}", ("prepare augmentation", tuple(case))


def _time_table(old: Path, new: Path, rows: Iterable[tuple[str, tuple]], *, rounds: int) -> bool:
    """Times the rows, and returns whether none is slower."""
    good = True
    print(f"{'':34s}{'old':>9s}{'new':>9s}   new/old (quartiles)    temporaries MiB   outcome")
    for title, request in rows:
        # A new process for every row, so that memory left by another row does not count.
        with both(old, new) as checkouts:
            result = timed(request, checkouts, rounds=rounds)
        before, now = result["milliseconds"]
        ratio, low, high = result["ratio"]
        slower = ratio > SLOWER
        good &= not slower
        memory = " -> ".join(f"{value / 2**20:.0f}" for value in result["bytes"])
        same = "same bits" if not result["difference"] else f"off by {result['difference']:.1e}"
        print(
            f"{title:34s}{before:7.1f}ms{now:7.1f}ms   {ratio:.3f} ({low:.3f} to {high:.3f})   {memory:>16s}   {same}"
            + ("   SLOWER" if slower else ""),
            flush=True,
        )
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_commits", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder with a checkout of the commit to compare with")
    parser.add_argument(
        "--family", nargs="+", choices=list(SUBJECTS), metavar="NAME", help=f"all unless given: {', '.join(SUBJECTS)}"
    )
    parser.add_argument("--plain", action="store_true", help="the plain implementations instead of the fast ones")
    parser.add_argument("--time", action="store_true", help="time the rows of the benchmark's table")
    parser.add_argument("--model", nargs="+", help="with --time: only the rows of these models")
    parser.add_argument("--augmentation", action="store_true", help="with --time: augmentation instead of models")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if sys.platform == "win32":
        parser.error("the processes of both commits inherit a pipe, which Windows does not support")
    if (options.augmentation or options.model) and not options.time:
        parser.error(f"{'--augmentation' if options.augmentation else '--model'} needs --time")
    if options.augmentation and options.model:
        parser.error("--augmentation times no models; leave out --model")
    if options.serve is not None:
        _serve(Connection(options.serve))
        return 0
    old = options.old.resolve()
    try:
        if options.time:
            if options.augmentation:
                good = _time_table(old, HERE, _rows_of_augmentation(), rounds=AUGMENTATION_ROUNDS)
            else:
                good = _time_table(old, HERE, _rows_of_models(options.model), rounds=ROUNDS)
            return 0 if good else 1
        with both(old, HERE) as checkouts:
            names = options.family or list(SUBJECTS)
            equal = [compare(name, checkouts, plain=options.plain) for name in names]
    except CheckoutError as error:
        print(f"benchmarks.compare_commits: {error}", file=sys.stderr)
        return 2
    print(f"{sum(equal)} of {len(equal)} bit-identical")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
