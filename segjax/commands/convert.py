"""Converts weights between PyTorch and segjax.

    segjax convert CHECKPOINT DST [--model NAME] [--num-classes K] [--dialect auto] [--to native|hf|smp|mmseg|...]
                                  [--overrides KEY=VALUE ...] [--verify]
                                  [--drop PATTERN ...] [--keep PATTERN ...]
                                  [--weights ema|raw|student|teacher]

CHECKPOINT is a `.pth`, `.safetensors` or `.npz`, an orbax folder, a folder of transformers or of a LoRA adapter, or
hf:owner/name[@revision] on the Hub; its content decides the kind. DST is a `.pth` or `.safetensors` by its suffix; any
other name becomes an orbax folder, or with --to hf a folder for transformers. Class names, normalisation and provenance
are kept with the weights, except in a `.pth`.
"""

from __future__ import annotations

import sys

from segjax.checkpoints.key_maps import DIALECTS
from segjax.commands.arguments import Parser, add_checkpoint, as_path, overrides_at_fault, summary_of, within
from segjax.commands.ending import run_command
from segjax.train.constraints import CLASSES


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax convert", description=summary_of(__doc__))
    add_checkpoint(parser, arguments)
    parser.add_argument("destination", type=as_path, metavar="DST", help="*.pth, *.safetensors, else a folder")
    parser.add_argument("--model", default="auto", help="allow only this model, a name in segjax.MODELS")
    parser.add_argument(
        "--num-classes", type=within(CLASSES), help="required if CHECKPOINT is an encoder, otherwise checked"
    )
    parser.add_argument("--dialect", default="auto", choices=["auto", *DIALECTS], help="key format of CHECKPOINT")
    parser.add_argument(
        "--to", choices=DIALECTS, help="key format of DST, default native; with hf, a folder is for transformers"
    )
    parser.add_argument(
        "--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="settings that CHECKPOINT does not contain"
    )
    parser.add_argument(
        "--drop", nargs="+", default=[], metavar="PATTERN", help="skip these tensors of CHECKPOINT, as in 'head.*'"
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="parameters of the model that stay as initialised if CHECKPOINT lacks them, as in 'decode_head.*'",
    )
    parser.add_argument("--verify", action="store_true", help="compare with PyTorch on one image before writing")
    options = parser.parse_args(arguments)
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.keep_compiled_programs()

    def run() -> None:
        from segjax.commands.conversion import convert

        with overrides_at_fault(options.overrides):
            convert(options)

    return run_command("segjax convert", run)
