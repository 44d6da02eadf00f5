"""Trains on CamVid from random weights with several seeds, and reports mean and spread of mIoU on the test split.

    python -m benchmarks.camvid --source DIR --seeds 0 1 2 --json FILE [-- FLAGS OF train.py]

Each seed is one run of `train.py` with the recipe of configs/hrnet.py, in bfloat16 if jax finds a GPU, otherwise in
float32. The variants `small` and `small_ocr` are trained on crops, and then in a second, short run on whole images. The
last weights (their moving average) are evaluated on the 233 whole images of test, at one scale and, reported
separately, at several scales and mirrored (in float32). No weights or settings are chosen by a score on test. The same
command continues where it ended. `--train-split train+val` trains on 468 images instead of 367. Arguments after `--`
are flags of the runs, for example for a rehearsal:

    python -m benchmarks.camvid --source DIR --variant small --seeds 0 --scales 0.5 --workdir runs/rehearsal -- \\
        --config.train.steps=20 --config.optim.warmup_steps=2 --config.train.batch=2 "--config.augment.crop=(96,128)"
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import recorded
from configs import hrnet

# Published results from random weights at 360x480, by training split: train (367 images), or train and val (468).
# From papers and repositories. The split of LETNet and FBSNet is inferred from the name of a checkpoint, and ENet's
# figure is that of a reimplementation, davidtvs/PyTorch-ENet.
PUBLISHED = {
    "train": {"FC-DenseNet103": 0.669, "ENet": 0.52},
    "train+val": {"LETNet": 0.705, "LMFFNet": 0.691, "FBSNet": 0.689, "DABNet": 0.664, "CGNet": 0.656},
}
# A second run on whole images, at scales close to 1 and a low learning rate, for variants that are trained on crops.
WHOLE_IMAGES = (
    "--config.augment.crop=(360,480)",
    "--config.augment.scale=(0.9,1.4)",
    "--config.optim.lr=1e-4",
    "--config.optim.warmup_steps=50",
    "--config.train.steps=900",
    "--config.train.ema=0.995",
)
TRAINED_ON_CROPS = ("small", "small_ocr")
SCALES = (0.75, 1.0, 1.25, 1.5)
SINGLE, MULTI = "report", "report-scales"


class FailedError(Exception):
    """Raised when a command fails; `status` is its exit status."""

    def __init__(self, command: Sequence[str], status: int):
        super().__init__(f"ended with {status}: {' '.join(command)}\n  the same command again goes on from there")
        self.status = status


def training(options: argparse.Namespace, seed: int, workdir: Path, dtype: str, *, start: Path | None) -> list[str]:
    """Returns the command that trains with one seed; the user's flags come last and take precedence.

    Args:
      start: Run on crops that a run on whole images starts from; None for the first run.
    """
    flags = [
        f"--config=configs/hrnet.py:{options.variant},camvid",
        f"--config.data.source={options.source}",
        f"--config.data.train_split={options.train_split}",
        f"--config.seed={seed}",
        f"--config.model.dtype={dtype}",
        f"--workdir={workdir}",
    ]
    flags += [f"--config.init.checkpoint={start}", *WHOLE_IMAGES] if start else []
    flags += [f"--config.train.steps={options.steps}"] if options.steps and not start else []
    flags += [f"--config.data.dir={options.data_dir}"] if options.data_dir else []
    return [sys.executable, "train.py", *flags, *options.flags]


def evaluations(options: argparse.Namespace, workdir: Path) -> dict[str, list[str]]:
    """Returns the commands that evaluate the final weights of a run, by the folder of their report in `workdir`."""
    several = [
        "--checkpoint",
        workdir,
        "--data",
        "camvid:test",
        "--source",
        options.source,
        "--output",
        workdir / MULTI,
    ]
    several += ["--data-dir", options.data_dir] if options.data_dir else []
    several += ["--scales", *options.scales, "--flip"]
    evaluate = [sys.executable, "-m", "segjax.evaluate"]
    return {
        SINGLE: [*evaluate, "--workdir", str(workdir), "--output", str(workdir / SINGLE)],
        MULTI: [*evaluate, *map(str, several)],
    }


def call(command: Sequence[str]) -> None:
    """Runs a command in the root of the repository.

    Raises:
      FailedError: The command fails.
    """
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    if status := subprocess.run(command, cwd=recorded.REPO).returncode:
        raise FailedError(command, status)


def of_seed(options: argparse.Namespace, seed: int, dtype: str) -> dict[str, object]:
    """Trains and evaluates with one seed, and skips what is already done.

    Returns:
      "single" and "multi" mIoU; "per_class_iou" of "single" by class; "curves", the result of `curve` of each
      training; "step", "images_per_second", "params_sha256" and "config" of the last training.
    """
    workdir = options.workdir.absolute() / f"{options.variant}-{options.train_split}-seed-{seed}"
    call(training(options, seed, workdir, dtype, start=None))
    curves = [curve(workdir)]
    if options.variant in TRAINED_ON_CROPS:
        crops, workdir = workdir, workdir.with_name(f"{workdir.name}-whole")
        call(training(options, seed, workdir, dtype, start=crops))
        curves.append(curve(workdir))
    result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    reports = {}
    for folder, command in evaluations(options, workdir).items():
        path = workdir / folder / "results.json"
        # A run that was extended has to be evaluated again.
        if not path.exists() or json.loads(path.read_text(encoding="utf-8"))["step"] != result["step"]:
            call(command)
        reports[folder] = json.loads(path.read_text(encoding="utf-8"))
    single = reports[SINGLE]
    return {
        "seed": seed,
        "single": single["mean_iou"],
        "multi": reports[MULTI]["mean_iou"],
        "per_class_iou": {entry["class"]: entry["iou"] for entry in single["classes"]},
        "curves": curves,
        **{key: result[key] for key in ("step", "images_per_second", "params_sha256", "config")},
    }


def curve(workdir: Path, most: int = 100) -> list[tuple[int, float]]:
    """The steps of a run and their losses, at most `most` of them, evenly spaced."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [(line["step"], round(line["loss"], 4)) for line in map(json.loads, lines) if "loss" in line]
    picked = sorted({round(k * (len(points) - 1) / (most - 1)) for k in range(most)})
    return [points[k] for k in picked]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Returns mean, sample standard deviation (None for a single value), minimum and maximum."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "smallest": min(values), "largest": max(values)}


def summary(runs: Sequence[Mapping]) -> dict[str, object]:
    """Summarises the runs of all seeds; a class without pixels has no IoU and no mean."""
    by_class = {}
    for name in runs[0]["per_class_iou"]:
        ious = [run["per_class_iou"][name] for run in runs if run["per_class_iou"][name] is not None]
        by_class[name] = statistics.fmean(ious) if ious else None
    return {kind: spread([run[kind] for run in runs]) for kind in ("single", "multi")} | {"per_class_iou": by_class}


def report(runs: Sequence[Mapping], train_split: str = "train") -> Iterator[str]:
    """Yields the lines of the table, at most 80 columns wide."""
    total = summary(runs)
    yield f"{'seed':<22} {'one scale':>10} {'scales, flip':>13}"
    for run in runs:
        yield f"{run['seed']:<22} {run['single']:>10.4f} {run['multi']:>13.4f}"
    yield f"{'mean':<22} {total['single']['mean']:>10.4f} {total['multi']['mean']:>13.4f}"
    if len(runs) > 1:
        yield f"{'standard deviation':<22} {total['single']['deviation']:>10.4f} {total['multi']['deviation']:>13.4f}"
    for name, iou in total["per_class_iou"].items():
        yield f"  {name:<20} {math.nan if iou is None else iou:>10.4f}"
    yield f"published from random weights, trained on {train_split}:"
    published = PUBLISHED.get(train_split, {})
    yield "  " + (", ".join(f"{name} {score:.3f}" for name, score in published.items()) or "none known")


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    own, flags = _cut(words)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.camvid", description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="CamVid: images/, labels/, classes")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where it is prepared; TFDS's own unless given")
    parser.add_argument(
        "--variant", default="w32_ocr", choices=hrnet.VARIANTS, help="of configs/hrnet.py; small on a CPU"
    )
    parser.add_argument("--train-split", default="train", metavar="SPLIT", help="train, or train+val")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of the (first) run; the recipe's unless given, for a slower machine"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, metavar="S", help="of the second figure")
    parser.add_argument("--workdir", type=Path, default=Path("runs/camvid"), metavar="DIR", help="of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written, after every seed")
    options = parser.parse_args(own)
    options.flags, options.source = flags, options.source.absolute()
    if options.data_dir:
        options.data_dir = options.data_dir.absolute()
    dtype = "bfloat16" if recorded.has_gpu() else "float32"
    record = recorded.about("benchmarks.camvid", words) | {
        "variant": options.variant,
        "train_split": options.train_split,
        "scales": options.scales,
        "runs": [],
    }
    try:
        for seed in options.seeds:
            run = of_seed(options, seed, dtype)
            # Folders of this machine are private, and the rest is the same for all seeds.
            config = run.pop("config")
            config["data"] |= {"source": None, "dir": None}
            config["init"]["checkpoint"] = Path(config["init"]["checkpoint"]).name
            record["config"] = config | {"seed": None}
            record["runs"].append(run)
            record["summary"] = summary(record["runs"])
            recorded.write(options.json, record)
            print("\n".join(report(record["runs"], options.train_split)), flush=True)
    except FailedError as error:
        print(f"benchmarks.camvid: {error}", file=sys.stderr)
        return error.status if error.status > 0 else 1
    return 0


def _cut(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments at `--`."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
