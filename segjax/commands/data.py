"""Prepares a dataset for training, shows its images, and imports annotations of other tools.

    segjax data import coco|labelme|yolo|voc SRC DIR
    segjax data prepare NAME --source PATH [PATH ...] [--data-dir DIR] [--subset]
    segjax data prepare folder --source DIR --val-share 0.2 [--seed N] [--group-by REGEX]
    segjax data show NAME [--crop H W] [--num N] [--output FILE] ...

A PATH is a folder or an archive. A prepared dataset needs no source; the command then only describes it. --val-share
divides the only split into train and val; training and evaluation from the same source use this division. `show` writes
a page of augmented samples, see `show --help`; `import` writes a folder for `prepare folder`, see `import --help`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from segjax.commands.arguments import Parser, summary_of, within
from segjax.commands.ending import run_command
from segjax.data import class_weights, specs
from segjax.runtime import console
from segjax.train.constraints import SEED, Real

if TYPE_CHECKING:
    from segjax.data.prepared import Prepared


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["show"]:
        from segjax.commands import data_show

        return data_show.main(arguments[1:])
    if arguments[:1] == ["import"]:
        from segjax.commands import data_import

        return data_import.main(arguments[1:])
    parser = Parser(
        prog="segjax data",
        description=f"{summary_of(__doc__)} `segjax data show --help` and `segjax data import --help` list those of "
        "the other two.",
    )
    names = specs.prepared_names()
    parser.add_argument("command", choices=["prepare", "show", "import"])
    parser.add_argument("name", metavar="NAME", choices=names, help=", ".join(names))
    parser.add_argument(
        "--source", nargs="+", metavar="PATH", help="folder of the dataset, its archives, or a folder with them"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of prepared data; default TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    parser.add_argument("--subset", action="store_true", help="prepare the available part of a published dataset")
    share = within(Real(above=0, below=1))
    parser.add_argument("--val-share", type=share, metavar="SHARE", help="divide the only split into train and val")
    parser.add_argument("--seed", type=within(SEED), metavar="N", help="seed of the choice of val images; default 0")
    parser.add_argument(
        "--group-by",
        metavar="REGEX",
        help="images whose names have the same match of it, or of its first group, stay together",
    )
    options = parser.parse_args(arguments)
    if options.val_share is None and (options.seed is not None or options.group_by is not None):
        parser.error("--seed and --group-by need --val-share")

    def run() -> None:
        from segjax.data import builders
        from segjax.data.division import Division
        from segjax.data.sources import NoSourceError

        try:
            division = None
            if options.val_share is not None:
                division = Division(options.val_share, options.seed or 0, options.group_by)
            prepared = builders.prepare(
                options.name,
                source=options.source,
                data_dir=options.data_dir,
                subset=options.subset,
                division=division,
            )
        except NoSourceError as error:
            raise ValueError(f"{error}: --source PATH") from error
        console.say("\n".join(describe(prepared)))

    return run_command("segjax data", run, interrupted="the same command continues")


def describe(prepared: Prepared) -> list[str]:
    """Images per split, and classes of a labelled split, in lines of at most 80 columns, except the path."""
    lines = ["", f"{'split':<20} {'images':>9}  labels"]
    published = _published(prepared)
    for split, count in prepared.splits.items():
        labels = "yes" if split in prepared.labelled else "not published"
        of = f", a subset of {published[split]:,}" if split in published else ""
        lines.append(f"{console.cell(split, 20)} {count:>9,}  {labels}{of}")
    split = "train" if "train" in prepared.labelled else prepared.labelled[0]
    if not prepared.kind.is_rgb:
        lines += ["", *_of_images(prepared, split)]
    counts = np.array(prepared.pixel_counts(split), np.float64)
    rows = zip(prepared.spec.label_names, counts, class_weights.median_frequency(counts), strict=True)
    labelled = max(counts.sum(), 1)
    cells = [
        f"{console.cell(name, 18)} {100 * count / labelled:>8.4f} {f'{weight:.4f}' if weight else '-':>9}"
        for name, count, weight in rows
    ]
    half = (len(cells) + 1) // 2 if len(cells) > 12 else len(cells)
    head = f"{'class':<18} {'% pixels':>8} {'weight':>9}"
    lines += ["", f"labelled pixels of {split}, and weights that balance them (median frequency)"]
    lines.append(head if half == len(cells) else f"{head}    {head}")
    lines += [f"{cells[i]}    {cells[i + half] if i + half < len(cells) else ''}".rstrip() for i in range(half)]
    return [*lines, "", f"{prepared.spec.name}: {prepared.path}"]


def _of_images(prepared: Prepared, split: str) -> list[str]:
    """Channels and dtype of the images, and mean and deviation of each channel."""
    measured = prepared.moments(split)
    lines = [f"images of {prepared.kind}; channels of {split}, by which training normalises:"]
    lines.append(f"{'channel':>7} {'mean':>14} {'deviation':>14}")
    for number, (mean, (_, squares)) in enumerate(zip(measured.mean, measured.of, strict=True)):
        deviation = f"{measured.std[number]:.6g}" if squares else "0, used as 1"
        lines.append(f"{number:>7} {mean:>14.6g} {deviation:>14}")
    return lines


def _published(prepared: Prepared) -> dict[str, int]:
    """Published numbers of images of a dataset if only a subset is prepared; {} for any other dataset."""
    dataset = specs.DATASETS.get(prepared.path.parent.name.removeprefix("segjax_"))
    return dict(dataset.spec.splits) if dataset and dataset.spec and not prepared.spec.splits else {}
