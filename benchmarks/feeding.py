"""Measures whether data keeps up with training: images per second delivered and consumed, and the share spent waiting.

    python -m benchmarks.feeding --camvid DIR --json FILE
    python -m benchmarks.feeding --sizes --json FILE

`train.py` trains SegFormer-B0 with its config on CamVid in device memory, on CamVid streamed, and on streamed images of
1024x2048 pixels, which the script draws and stores as PNG files. No decoded images are cached between epochs
(data.cache_gb=0), as if the dataset were too large for memory, so every image is decoded at every use. Each run is
ended once it has been measured. This takes about seven minutes on two CPU cores.

`--sizes` measures only batches, of drawn images with the sizes of Cityscapes (PNG) and ADE20K (JPEG): decoded at every
use, cropped from decoded images in memory, and gathered on the device. It compares them with the images per second that
an H200 would train on according to `benchmarks.gpu_static`, which is a lower bound of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import recorded

# Steps before and during the measurement, and between two log records of a run.
WARM, STEPS, EVERY = 10, 40, 5
# The newest record.
ROOFLINE = max((recorded.REPO / "benchmarks" / "records").glob("????-??-??-gpu-static.json"))
TARGET = 0.05
STREAMED = {"data.resident_gb": 0.0, "data.cache_gb": 0.0}
LARGE_SIZE, LARGE_IMAGES = (1024, 2048), 32


def cases(camvid: Path, large: Path, prepared: Path, dtype: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Returns, by case, variant and dataset of configs/segformer.py, and further settings."""
    common = {"data.dir": str(prepared), "model.dtype": dtype, "train.log_every": EVERY, "eval.pictures": 0}
    # Neither a save nor the end of the run interrupts the measurement.
    common |= {"train.steps": 10**6, "checkpoint.every": 10**6}
    of_camvid = common | {"data.source": str(camvid)}
    # SegFormer's crops of 1024x1024 would give the data four times as long.
    of_large = common | {"data.source": str(large), "augment.crop": (512, 512), "train.batch": 4}
    return {
        "CamVid, resident": ("b0,camvid", of_camvid),
        "CamVid, streamed": ("b0,camvid", of_camvid | STREAMED),
        "1024x2048 PNG, streamed": ("b0,folder", of_large | STREAMED),
    }


def draw_images(root: Path, *, size: tuple[int, int], number: int, suffix: str = "png") -> None:
    """Draws street scenes into a folder for segjax.data.folder; its evaluation split is not read here."""
    import cv2
    import numpy as np

    from segjax.data import specs, streets

    spec = specs.STREETS
    described = {"names": list(spec.class_names), "colors": np.array(spec.colors).tolist(), "ignore": spec.ignore_label}
    shown = set()
    for split, count in (("train", number), ("test", 1)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image, label = streets.scene(0, index, size)
            cv2.imwrite(str(root / "images" / split / f"{index:04d}.{suffix}"), image[..., ::-1])
            cv2.imwrite(str(root / "labels" / split / f"{index:04d}.png"), label)
            shown.update(np.unique(label).tolist())
    # A few scenes do not show every class.
    described["absent"] = [name for number, name in enumerate(spec.class_names) if number not in shown]
    (root / "classes.json").write_text(json.dumps(described), encoding="utf-8")


class Official(NamedTuple):
    """Images with the size of a dataset's.

    Attributes:
      size: (height, width) of the stored images.
      crop: Training crop.
      base_size: Value of `augment.base_size`.
    """

    suffix: str
    size: tuple[int, int]
    crop: tuple[int, int]
    number: int
    base_size: tuple[int, int] | None = None


# The short side of most images of ADE20K's scene parsing benchmark is 512.
OFFICIAL = {
    "Cityscapes, 1024x1024": Official("png", (1024, 2048), (1024, 1024), 24),
    "Cityscapes, 512x1024": Official("png", (1024, 2048), (512, 1024), 24),
    "ADE20K, 512x512": Official("jpg", (512, 683), (512, 512), 48, (2048, 512)),
}
WAYS = {
    "decoded": STREAMED,
    "cut": {"data.resident_gb": 0.0, "data.cache_gb": 100.0},
    "gathered": {"data.resident_gb": 100.0},
}


def official_settings(kind: Official, source: Path, prepared: Path, way: str) -> dict[str, object]:
    """Returns settings of configs/segformer.py:b0,folder for `delivered`."""
    return {
        "data.source": str(source),
        "data.dir": str(prepared),
        "augment.crop": kind.crop,
        "augment.base_size": kind.base_size,
        "train.batch": 8,
        **WAYS[way],
    }


def needed(path: Path) -> dict[str, float]:
    """Returns images per second that an H200 would train on, by model, from a record of `benchmarks.gpu_static`."""
    programs = json.loads(path.read_text(encoding="utf-8"))["programs"]
    return {row["name"]: 1e3 * row["batch"] / row["ms"] for row in programs if row["mode"] == "train"}


def report_of_sizes(results: Mapping[str, Mapping[str, float]], cores: int) -> Iterator[str]:
    """Yields the table of images per second and core, at most 80 columns wide."""
    yield f"{'images per second and core':<30}" + "".join(f" {way:>12}" for way in WAYS)
    for name, found in results.items():
        yield f"{name:<30}" + "".join(f" {found[way] / cores:>12.1f}" for way in WAYS)


def report_of_needs(
    results: Mapping[str, Mapping[str, float]], cores: int, models: Mapping[str, float]
) -> Iterator[str]:
    """Yields the table of cores that would feed each model crops of 512x512, at most 80 columns wide."""
    rates = results["ADE20K, 512x512"]
    yield f"{'cores that feed one H200':<30} {'images/s':>12}" + "".join(f" {way:>12}" for way in ("decoded", "cut"))
    for name, rate in models.items():
        yield f"{name:<30} {rate:>12.0f}" + "".join(
            f" {rate * cores / rates[way]:>12.1f}" for way in ("decoded", "cut")
        )


# ------------------------------------------------------------------------------------------------------------ measuring


def delivered(argument: str, settings: Mapping[str, object], warm: int, steps: int) -> float:
    """Returns the images per second of batches when nothing else runs. Sets up its process."""
    from segjax.runtime import environment

    environment.prepare()
    import jax

    from configs import segformer
    from segjax.runtime.parallel import parallel_for
    from segjax.train import setup, unset

    config = segformer.get_config(argument)
    config.update_from_flattened_dict(settings)
    config, _ = unset.filled(config)
    (split, _), parallel = setup.load_data(config.data, seed=config.seed), parallel_for(config.parallel)
    labels = dict(ignore_label=split.spec.ignore_label, class_pixels=None)
    common = labels | dict(batch_size=config.train.batch, seed=config.seed, cache_gb=config.data.cache_gb)
    key = jax.random.key(config.seed)
    with setup.make_batches(split.data, config.augment, parallel=parallel, key=key, start=0, **common) as batches:
        for step in range(warm):
            jax.block_until_ready(batches.at(step))
        since = time.perf_counter()
        for step in range(warm, warm + steps):
            jax.block_until_ready(batches.at(step))
        return steps * config.train.batch / (time.perf_counter() - since)


def trained(argument: str, settings: Mapping[str, object], warm: int, steps: int, folder: Path) -> dict[str, float]:
    """Returns the figures that a run of train.py logs, see `between`; ends the run once it has logged them.

    Raises:
      RuntimeError: The run ends before that.
    """
    flags = [f"--config=configs/segformer.py:{argument}", f"--workdir={folder / 'run'}"]
    flags += [f"--config.{key}={value}" for key, value in settings.items()]
    output, log = folder / "output", folder / "run" / "metrics.jsonl"
    with output.open("w", encoding="utf-8") as file:
        command = [sys.executable, "train.py", *flags]
        process = subprocess.Popen(command, cwd=recorded.REPO, stdout=file, stderr=subprocess.STDOUT)
    try:
        while True:
            ended = process.poll() is not None
            found = records(log)
            if warm in found and warm + steps in found:
                return between(found[warm], found[warm + steps])
            if ended:
                raise RuntimeError(
                    f"{' '.join(command)} ended with {process.returncode}:\n{output.read_text(encoding='utf-8')}"
                )
            time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def records(path: Path) -> dict[int, dict[str, float]]:
    """Returns the records of a run so far by step; the last line may be incomplete."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found[record["step"]] = record
    return found


def between(first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, float]:
    """Returns the speed of a run between two of its records.

    A record has the means since the end of step 1 (`segjax.train.progress.Meter`).

    Returns:
      "waiting", the share of the time; "rate", images per second of the run between `first` and `last`; "consumed", the
      same without the time spent waiting.
    """
    # Seconds divided by the batch size, so that steps / value is in images per second.
    ends = [(record["step"] - 1) / record["images_per_second"] for record in (first, last)]
    waits = [(record["waiting"] or 0.0) * end for record, end in zip((first, last), ends, strict=True)]
    seconds, waited = ends[1] - ends[0], waits[1] - waits[0]
    rate = (last["step"] - first["step"]) / seconds
    return {"waiting": waited / seconds, "rate": rate, "consumed": rate / (1 - waited / seconds)}


def measure(argument: str, settings: Mapping[str, object], warm: int, steps: int) -> dict[str, float]:
    """Returns `between`, and "delivered" in images per second."""
    alone = recorded.in_a_process(delivered, argument, settings, warm, steps)
    with tempfile.TemporaryDirectory() as folder:
        return {"delivered": alone} | trained(argument, settings, warm, steps, Path(folder))


def report(results: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Yields the lines of the table, at most 80 columns wide."""
    yield f"{'images per second':<26} {'delivered':>10} {'consumed':>10} {'of the run':>11} {'waiting':>9}"
    for name, found in results.items():
        rates = f"{found['delivered']:>10.1f} {found['consumed']:>10.1f} {found['rate']:>11.1f}"
        yield f"{name:<26} {rates} {found['waiting']:>9.1%}"
    yield f"delivered without training, consumed without waiting; the goal is to wait less than {TARGET:.0%}"


def _sizes(options: argparse.Namespace, words: list[str]) -> int:
    cores = len(os.sched_getaffinity(0))
    record = recorded.about("benchmarks.feeding", words) | {"steps": options.steps, "results": {}}
    results = record["results"]
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in OFFICIAL.items():
            print(f"{name} ...", flush=True)
            source = Path(folder) / f"{kind.suffix}-{kind.size[0]}"
            if not source.exists():
                draw_images(source, size=kind.size, number=kind.number, suffix=kind.suffix)
            results[name] = {}
            for way in WAYS:
                settings = official_settings(kind, source, Path(folder) / f"prepared-{source.name}", way)
                # The first epoch fills the memory.
                warm = -(-kind.number // settings["train.batch"]) + 2
                results[name][way] = recorded.in_a_process(delivered, "b0,folder", settings, warm, options.steps)
            recorded.write(options.json, record)
    print("\n".join(report_of_sizes(results, cores)))
    print("\n".join(report_of_needs(results, cores, needed(options.roofline))))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feeding", description=__doc__.split("\n\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--camvid", type=Path, metavar="DIR", help="images/, labels/, classes.json")
    given.add_argument("--sizes", action="store_true", help="batches only, of images of official sizes")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"measured ones, a multiple of {EVERY}; more on a GPU")
    parser.add_argument("--roofline", type=Path, default=ROOFLINE, metavar="FILE", help="record of gpu_static")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the record is written")
    options = parser.parse_args(arguments)
    if options.steps < EVERY or options.steps % EVERY:
        parser.error(f"--steps is a multiple of {EVERY}, not {options.steps}")
    if options.sizes:
        return _sizes(options, sys.argv[1:] if arguments is None else arguments)
    dtype = "bfloat16" if recorded.has_gpu() else "float32"
    record = recorded.about("benchmarks.feeding", sys.argv[1:] if arguments is None else arguments)
    record |= {"model": "segformer_b0", "dtype": dtype, "warm": WARM, "steps": options.steps, "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"drawing {LARGE_IMAGES} images ...", flush=True)
        draw_images(folder / "large", size=LARGE_SIZE, number=LARGE_IMAGES)
        for name, case in cases(options.camvid.absolute(), folder / "large", folder / "prepared", dtype).items():
            print(f"{name} ...", flush=True)
            record["results"][name] = measure(*case, WARM, options.steps)
            recorded.write(options.json, record)
    print("\n".join(report(record["results"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
