"""Draws augmented training samples next to their labels, on one page.

segjax data show
segjax data show camvid --source DIR --crop 360 480 --scale 0.5 2.0 --num 12
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segjax.commands.arguments import Parser, as_path, summary_of, within
from segjax.commands.ending import run_command
from segjax.data import bands, specs
from segjax.runtime import console, memory
from segjax.train.constraints import SEED, SIDE, Integer, Real
from segjax.viz import pictures

if TYPE_CHECKING:
    from segjax.data.crops import AugmentSettings
    from segjax.data.open import OpenSplit
    from segjax.data.records import Records

# Maximum side of the default crop, which is not larger than the largest image either.
LARGEST_CROP = 512


def show(
    data: specs.Split | Records,
    spec: specs.DatasetSpec,
    settings: AugmentSettings,
    *,
    seed: int,
    num: int,
    path: Path,
    mean: Sequence[float] = specs.IMAGENET_MEAN,
    std: Sequence[float] = specs.IMAGENET_STD,
) -> None:
    """Writes a PNG of the first batch, of `num` samples, on which a run with this seed trains.

    Args:
      data: The split.
      spec: Classes of the dataset.
      settings: The `augment` section of a config.
      seed: Seed of the run.
      num: Number of samples.
      path: Path of the PNG.
      mean, std: Mean and standard deviation of each channel, C numbers each.

    Raises:
      RecordError: An image or a label cannot be used.
      TooLittleMemoryError: The samples do not fit into memory.
    """
    what = _refuse_too_large(num, settings.crop, len(mean))
    # Imported after parsing, because it imports jax, which takes a second.
    import jax

    from segjax.data.augment import augment, normalise, step_keys
    from segjax.data.pipeline import StreamBatches
    from segjax.data.records import records_of
    from segjax.runtime.parallel import JitParallel

    records, key = records_of(data), jax.random.key(seed)
    parallel = JitParallel(jax.local_devices()[:1])
    with StreamBatches(
        records,
        batch_size=num,
        seed=seed,
        parallel=parallel,
        settings=settings,
        ignore_label=spec.ignore_label,
        key=key,
        threads=1,
    ) as batches:
        batch, numbers = batches.at(0), batches.indices(0)
    keys, _ = step_keys(key, 0, batch["position"])
    normalised = partial(normalise, mean=mean, std=std)
    augmented = jax.jit(partial(augment, settings=settings, ignore_label=spec.ignore_label, normalise=normalised))
    program = augmented.lower(keys, batch).compile()
    memory.refuse_too_large(memory.needed(program), parallel.devices, what=what)
    images, labels = program(keys, batch)
    pixels = np.asarray(images) * np.array(std, np.float32) + np.array(mean, np.float32)
    if batch["image"].dtype == np.uint8:
        pixels = pixels.round().clip(0, 255).astype(np.uint8)
    shown = np.stack([bands.as_picture(image) for image in pixels])
    titles = [
        f"{records.names[number]}   {height}x{width} × {scaled / height:.2f}{'   flipped' if flip else ''}"
        for number, (height, width), (scaled, _), flip in zip(
            numbers, *map(np.asarray, (batch["size"], batch["crop"].scaled, batch["crop"].flip)), strict=True
        )
    ]
    pictures.save_samples(path, shown, np.asarray(labels), spec, titles=titles)


def _refuse_too_large(num: int, crop: Sequence[int], channels: int = 3) -> str:
    """Raises TooLittleMemoryError if the samples do not fit into memory; returns their name for messages."""
    what = f"a page of {num} samples of {crop[0]}x{crop[1]}"
    # float32 on the device and after the inverse normalisation, then uint8, and labels.
    memory.refuse_more_than_host(num * math.prod(crop) * (9 * channels + 1), what=what)
    return what


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="segjax data show", description=summary_of(__doc__))
    parser.add_argument("name", nargs="?", default="streets", metavar="NAME", help="dataset; default streets")
    parser.add_argument(
        "--source", nargs="+", metavar="PATH", help="source from which the dataset is prepared at first use"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of prepared data; default TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    parser.add_argument("--split", default="train")
    parser.add_argument("--num", type=within(Integer(1, 100)), default=8, help="number of samples; default 8")
    parser.add_argument(
        "--crop",
        type=within(SIDE),
        nargs=2,
        metavar=("H", "W"),
        help=f"default: the largest image, at most {LARGEST_CROP}",
    )
    parser.add_argument(
        "--scale",
        type=within(Real(above=0, most=100)),
        nargs=2,
        default=(0.5, 2.0),
        metavar=("A", "B"),
        help="default 0.5 2.0",
    )
    parser.add_argument("--seed", type=within(SEED), default=0)
    parser.add_argument("--output", type=as_path, metavar="FILE", help="default show-NAME.png")
    options = parser.parse_args(arguments)
    if options.scale[0] > options.scale[1]:
        parser.error(f"--scale is the smallest and the largest, not {options.scale}")
    return run_command("segjax data show", lambda: _run(options), less_memory="give a smaller --num or --crop")


def _run(options: argparse.Namespace) -> None:
    from segjax.data.records import records_of
    from segjax.data.sources import NoSourceError
    from segjax.train.schema import default_config

    if options.crop:
        # Checked before a dataset is prepared.
        _refuse_too_large(options.num, options.crop)
    try:
        opened = _data(options)
    except NoSourceError as error:
        raise ValueError(f"{error}: --source PATH") from error
    data, spec = opened.data, opened.spec
    largest = records_of(data).sizes.max(axis=0).tolist()
    crop = options.crop or [min(side, LARGEST_CROP) for side in largest]
    settings: Any = default_config(options.name).augment
    settings.update(crop=tuple(crop), scale=tuple(options.scale))
    path = options.output or Path(f"show-{options.name}.png")
    statistics: dict[str, Any] = {}
    if not opened.image_kind.is_rgb and opened.prepared:
        measured = opened.prepared.moments(options.split)
        statistics = dict(mean=measured.mean, std=measured.std)
    show(data, spec, settings, seed=options.seed, num=options.num, path=path, **statistics)
    console.say(
        f"{path}: {options.num} samples of {crop[0]}x{crop[1]} from {spec.name} {options.split}, seed {options.seed}"
    )


def _data(options: argparse.Namespace) -> OpenSplit:
    from segjax.data.open import open_splits

    (opened,) = open_splits(
        options.name,
        [options.split],
        source=options.source,
        data_dir=options.data_dir,
        num_images=[options.num],
        seed=options.seed,
    )
    return opened
