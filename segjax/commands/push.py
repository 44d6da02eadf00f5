"""Uploads the model card and weights of a run to the Hugging Face Hub.

    segjax push RUN hf:USER/NAME [--licence apache-2.0]

A SegFormer becomes a folder for transformers, other models a model.safetensors of segjax;
segjax.load("hf:USER/NAME") loads both. The card is RUN/README.md if it exists, else the card of `segjax card RUN`. The
command needs segjax[hub] and a token with write access: `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from segjax.commands.arguments import Parser, as_path, summary_of
from segjax.commands.card import add_licence
from segjax.commands.ending import run_command
from segjax.runtime import console


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="segjax push", description=summary_of(__doc__))
    parser.add_argument("workdir", type=as_path, metavar="RUN", help="folder of a run that has ended")
    parser.add_argument("address", metavar="hf:USER/NAME", help="repository, created if there is none")
    add_licence(parser)
    options = parser.parse_args(arguments)
    # Imported after parsing, because it imports jax, which takes a second.
    from segjax.runtime import environment

    environment.keep_compiled_programs()
    return run_command("segjax push", lambda: _run(options), interrupted="the Hub has all files or none")


def _run(options: argparse.Namespace) -> None:
    from segjax.checkpoints.upload import repository_of, upload

    repository = repository_of(options.address)
    with tempfile.TemporaryDirectory(prefix="segjax-push-") as temporary:
        folder = Path(temporary) / "files"
        _write(options.workdir, folder, repository, options.licence)
        console.say(f"{options.workdir} -> https://huggingface.co/{repository}")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            console.say(f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes")
        console.say(f"uploaded: {upload(folder, repository)}")


def _write(workdir: Path, folder: Path, repository: str, licence: str | None) -> None:
    """Writes all files to upload into a folder."""
    from segjax.checkpoints.save import save
    from segjax.train.card import NAME, PLACEHOLDER, card_of, is_transformers

    card = card_of(workdir, licence=licence)
    own = workdir / NAME
    if own.exists() and licence is not None:
        raise ValueError(f"{own} exists and is uploaded as it is; write the licence there, and omit --licence")
    text = own.read_text(encoding="utf-8") if own.exists() else card.text
    if is_transformers(card.checkpoint):
        save(card.checkpoint, folder, dialect="hf")
    else:
        folder.mkdir()
        save(card.checkpoint, folder / "model.safetensors")
    (folder / NAME).write_text(text.replace(PLACEHOLDER, repository), encoding="utf-8")
    if card.picture is not None:
        place = folder / card.picture
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(workdir / card.picture, place)
