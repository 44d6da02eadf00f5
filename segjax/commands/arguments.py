"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from segjax.checkpoints.key_maps import WEIGHT_SETS
from segjax.commands.ending import run_command
from segjax.data import specs
from segjax.inference.runtimes import exported_path
from segjax.runtime import console, distributed
from segjax.runtime.reading import UnreadableError, user_path
from segjax.train.constraints import SIDE, Integer, Real

# As in `segjax.checkpoints.temperature`, which is not imported because it imports jax.
FITTED = "fitted"
# Message for an empty argument, which as a path would mean the current folder.
EMPTY = "the value is empty; a shell variable may be unset"
MOST_PROCESSES = 1_000_000
# Flags of several processes, with the placeholder of their value and their text.
PROCESSES = {
    "coordinator": (
        "HOST:PORT",
        "Several processes: address of the first, or auto to use that of SLURM, Open MPI, Kubernetes or Cloud TPU.",
    ),
    "num_processes": ("N", "Several processes: their number."),
    "process_id": ("I", "Several processes: number of this one, from 0."),
}


class Parser(argparse.ArgumentParser):
    """A parser that refuses empty arguments, escapes messages for the terminal, and ends its help like a command."""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for before, argument in zip(["", *args], args, strict=False):
            if not argument or re.fullmatch(r"--[a-z_-]+=", argument):
                name = argument[:-1] or (before if before.startswith("-") else f"the argument after {before or 'it'}")
                self.error(f"{name}: {EMPTY}")
        return super().parse_args(args, namespace)

    def print_help(self, file=None) -> None:
        self.exit(run_command(self.prog, lambda: print(self.format_help(), end="", file=file)))

    def error(self, message: str) -> NoReturn:
        super().error(console.one_line(message))


def summary_of(docstring: str | None) -> str:
    """The first paragraph of a module's docstring, which is the first line of its command's --help."""
    return (docstring or "").partition("\n\n")[0]


def within(allowed: Integer | Real) -> Callable[[str], int | float]:
    """The `type` of an argument: a number in a range; the message for other values states the range."""

    def parsed(text: str) -> int | float:
        try:
            number = int(text) if isinstance(allowed, Integer) else float(text)
        except ValueError:
            number = None
        if (must_be := allowed.problem(number)) or number is None:
            raise argparse.ArgumentTypeError(f"{console.one_line(text, most=40)}; must be {must_be}")
        return number

    return parsed


def as_path(text: str) -> Path:
    """The `type` of an argument: a path; expands ~, which shells do not expand after an equals sign."""
    try:
        return user_path(text)
    except UnreadableError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


CHECKPOINT = (
    "a .pth, .safetensors or .npz, a folder of segjax or transformers, the folder of a run, hf:owner/name, or a name "
    "of `segjax weights`"
)
EXPORTED = "or an exported file: .onnx, .xml of OpenVINO, .stablehlo, .pt2 or .tflite"


def add_checkpoint(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    *,
    names: Sequence[str] = ("--checkpoint",),
    takes: str = CHECKPOINT,
) -> None:
    """Adds the checkpoint, and `--weights`, the set of weights to read from it.

    The checkpoint is the next positional argument, or an option if `arguments` contain one of its names.

    Args:
      parser: The parser.
      arguments: Arguments of the command.
      names: Names of the option.
      takes: Possible checkpoints, for the help.
    """
    by_name = any(argument.partition("=")[0] in names for argument in arguments)
    means = "means" if len(names) == 1 else "mean"
    help = f"{takes}; {' and '.join(f'{name} CHECKPOINT' for name in names)} {means} the same"
    if by_name:
        parser.add_argument(*names, dest="checkpoint", required=True, type=as_path, metavar="CHECKPOINT", help=help)
    else:
        parser.add_argument("checkpoint", type=as_path, metavar="CHECKPOINT", help=help)
    parser.add_argument(
        "--weights",
        choices=WEIGHT_SETS,
        help="set of weights to read, if CHECKPOINT holds averaged and raw ones, or a student and a teacher",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the data as the next positional argument, and the options for its place."""
    parser.add_argument(
        "data",
        metavar="NAME[:SPLIT]",
        help=f"data: NAME is one of {', '.join(specs.DATASETS)}, SPLIT a split or a sum of them, as in train+val",
    )
    add_place_of_data(parser)


def add_place_of_data(parser: argparse.ArgumentParser) -> None:
    """Adds `--source` and `--data-dir`."""
    parser.add_argument(
        "--source", nargs="+", metavar="PATH", help="source from which the data are prepared at first use"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder of prepared data; default TFDS_DATA_DIR or ~/tensorflow_datasets"
    )


def data_problems(options: argparse.Namespace) -> list[str]:
    """Problems of the options of `add_data` and `add_protocol`."""
    name = options.data.partition(":")[0]
    wrong = {
        f"the data are NAME or NAME:SPLIT with NAME one of {', '.join(specs.DATASETS)}, not {options.data!r}": (
            name not in specs.DATASETS
        ),
        f"{name} are generated and need neither --source nor --data-dir": (
            specs.is_generated(name) and (options.source or options.data_dir)
        ),
        "--crop and --stride go with --mode slide": options.mode != "slide" and (options.crop or options.stride),
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]


def add_exported(parser: argparse.ArgumentParser, reference: str) -> None:
    """Adds the options for exported files; `reference` is the help of `--reference`."""
    parser.add_argument("--reference", type=as_path, metavar="CHECKPOINT", help=reference)
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="N",
        help="mean of each channel in units of 0..255, for an exported file that does not state it",
    )
    parser.add_argument(
        "--std", type=float, nargs="+", metavar="N", help="standard deviation of each channel, as --mean"
    )


def problems_of_exported(options: argparse.Namespace) -> list[str]:
    """Problems of the options of `add_exported`, for the argument of `add_checkpoint`."""
    is_exported = exported_path(options.checkpoint) is not None
    weights = {"--weights: an exported file holds one set of weights; omit it": is_exported and options.weights}
    return problems_of_normalisation(options, is_exported=is_exported) + [
        message for message, is_wrong in weights.items() if is_wrong
    ]


def problems_of_prediction(options: argparse.Namespace) -> list[str]:
    """Problems of the options of `add_protocol` and `add_exported`, and of --scale, for a command that predicts."""
    from segjax.inference.images import check_scale

    is_window = options.mode == "slide"
    is_exported = exported_path(options.checkpoint) is not None
    wrong = {
        "--crop and --stride go with --mode slide": not is_window and (options.crop or options.stride),
        "--reference is for exported files: a checkpoint says all itself": options.reference and not is_exported,
    }
    problems = [message for message, is_wrong in wrong.items() if is_wrong] + problems_of_exported(options)
    try:
        check_scale(options.scale)
    except ValueError as error:
        problems.append(f"--{error}")
    return problems


def problems_of_normalisation(options: argparse.Namespace, *, is_exported: bool) -> list[str]:
    """Problems of --mean and --std, with an exported file or without."""
    given = options.mean is not None or options.std is not None
    wrong = {
        "--mean and --std are for exported files: a checkpoint has its own": given and not is_exported,
        "--mean and --std belong together; give both": (options.mean is None) != (options.std is None),
    }
    return [message for message, is_wrong in wrong.items() if is_wrong]


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `segjax.inference.engine.Protocol`."""
    parser.add_argument("--mode", choices=("whole", "slide"), help="slide: a sliding window; default whole images")
    parser.add_argument(
        "--crop", type=within(SIDE), nargs=2, metavar=("H", "W"), help="size of the sliding window; default 512 512"
    )
    parser.add_argument(
        "--stride",
        type=within(SIDE),
        nargs=2,
        metavar=("H", "W"),
        help="step of the sliding window; default 3/4 of the crop",
    )
    parser.add_argument(
        "--scales",
        type=within(Real(above=0, most=100)),
        nargs="+",
        metavar="S",
        help="factors of the image size; probabilities are averaged; default 1",
    )
    parser.add_argument("--flip", action="store_true", default=None, help="score each scale mirrored too")
    parser.add_argument(
        "--base-size",
        type=within(SIDE),
        nargs=2,
        metavar=("LONG", "SHORT"),
        help="first resize each image to fit, keeping its aspect ratio; ADE20K: 2048 512",
    )
    parser.add_argument(
        "--size-divisor",
        type=within(Integer(1, 1024)),
        metavar="N",
        help="then resize up to multiples of N (AlignedResize)",
    )
    parser.add_argument(
        "--threshold",
        type=within(Real(above=0, below=1)),
        metavar="P",
        help="probability above which a pixel belongs to the class of a one-class model; default 0.5",
    )


def add_temperature(parser: argparse.ArgumentParser) -> None:
    """Adds `--temperature`, a number or `FITTED`."""
    number = within(Real(above=0, most=1000))
    parser.add_argument(
        "--temperature",
        type=lambda text: text if text == FITTED else number(text),
        metavar="T",
        help=f"divide the logits by T, a number, or {FITTED!r} for that of evaluate --fit-temperature; default 1",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of several processes, which are those of `segjax train`."""
    types: dict[str, Callable[[str], Any]] = {
        "num_processes": within(Integer(1, MOST_PROCESSES)),
        "process_id": within(Integer(0, MOST_PROCESSES)),
    }
    for name, (value, text) in PROCESSES.items():
        text = text[:1].lower() + text[1:].removesuffix(".")
        parser.add_argument(f"--{name}", type=types.get(name, str), metavar=value, help=text)


def problems_of_processes(options: argparse.Namespace) -> list[str]:
    """Problems of the options of `add_processes` together."""
    problem = distributed.problem(options.coordinator, options.num_processes, options.process_id)
    return [problem] if problem else []


def connect(options: argparse.Namespace) -> None:
    """Connects to the other processes, as the options of `add_processes` say.

    Raises:
      ValueError: The processes did not connect.
    """
    distributed.connect(options.coordinator, options.num_processes, options.process_id)


def protocol_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `add_protocol` that were given."""
    names = ("mode", "crop", "stride", "scales", "flip", "base_size", "size_divisor", "threshold")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def less_memory(options: argparse.Namespace) -> str:
    """Options of `add_protocol`, and `--batch`, that need less memory than the given ones, as text."""
    found = [f"a smaller --batch than {options.batch}"] if (options.batch or 1) > 1 else []
    if options.mode == "slide":
        found.append("a smaller --crop")
    else:
        found.append("--mode slide, and with it --crop H W for smaller windows than 512x512")
    if options.scales or options.flip or options.base_size:
        given = {"--scales": options.scales, "--flip": options.flip, "--base-size": options.base_size}
        found.append(f"less of {' and '.join(name for name, value in given.items() if value)}")
    return f"use {', or '.join(found)}"


def parse_overrides(pairs: Iterable[str]) -> dict[str, object]:
    """Parses KEY=VALUE with Python literals; ValueError for anything else."""
    overrides = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--overrides takes KEY=VALUE, for example 'num_heads=(1,2,5,8)'; got {pair!r}")
        try:
            overrides[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"--overrides {key}: {value!r} is not a Python literal; quote text as '\"text\"'"
            ) from None
    return overrides


@contextlib.contextmanager
def overrides_at_fault(overrides: Sequence[str]) -> Iterator[None]:
    """Raises Python's errors about settings of a wrong type as ValueError, if there are `overrides`."""
    try:
        yield
    except (TypeError, ArithmeticError) as error:
        if not overrides:
            raise
        raise ValueError(f"--overrides {' '.join(overrides)}: {error}") from error
