"""Runs commands of docs/reproduce.md on generated archives, in one process with one device.

python -m tests.reproduce_commands FLAGS COMMAND ...

FLAGS is a JSON list that is added to every training command; it makes models, crops and runs small. Evaluations
at several scales keep only the smallest and the largest.
"""

import json
import shlex
import sys

import jax

from segjax.commands import data, evaluate, train
from segjax.data import specs
from tests.made_archives import few_images

COMMANDS = {"train": train.main, "evaluate": evaluate.main, "data": data.main}


def run(line: str, flags: list[str]) -> int:
    """Exit status of a command as it is typed."""
    words = [word for word in shlex.split(line) if not word.startswith("CUDA_VISIBLE_DEVICES=")]
    if words[0] != "segjax" or words[1] not in COMMANDS:
        raise ValueError(f"not a command of segjax: {line}")
    print(f"$ {line}", flush=True)
    if "--scales" in words:
        start = words.index("--scales") + 1
        end = next((at for at in range(start, len(words)) if words[at].startswith("--")), len(words))
        words[start + 1 : end - 1] = []
    return COMMANDS[words[1]]([*words[2:], *(flags if words[1] == "train" else [])])


def main(flags: str, *lines: str) -> int:
    jax.config.update("jax_platforms", "cpu")
    specs.DATASETS.update(few_images())
    for line in lines:
        if status := run(line, json.loads(flags)):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
