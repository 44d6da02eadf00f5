"""The command `segjax`: `segjax COMMAND ...`, where each command is a module that is imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import sys

from segjax.runtime import native_log, signals

# Command: the module whose `main(arguments) -> int` it is, and the line of --help.
COMMANDS = {
    "train": ("segjax.commands.train", "train a model on a dataset, or resume a run"),
    "evaluate": ("segjax.commands.evaluate", "mIoU of a checkpoint on a dataset, with a report"),
    "compare": ("segjax.commands.compare", "the difference of two models on the same images"),
    "audit": ("segjax.commands.audit", "regions of masks that a model contradicts"),
    "predict": ("segjax.commands.predict", "label maps and overlays of images and videos"),
    "demo": ("segjax.commands.demo", "a page that shows predictions of your images"),
    "convert": ("segjax.commands.convert", "weights between PyTorch, transformers and segjax"),
    "inspect": ("segjax.commands.inspect", "what a checkpoint holds and where it came from"),
    "export": ("segjax.commands.export", "a model as a StableHLO, ONNX, OpenVINO or torch.export file"),
    "weights": ("segjax.commands.weights", "the published weights that have a name"),
    "card": ("segjax.commands.card", "the model card of a run, for the Hugging Face Hub"),
    "push": ("segjax.commands.push", "card and weights of a run to the Hugging Face Hub"),
    "summary": ("segjax.commands.summary", "parameters, multiply-adds and memory of a model"),
    "benchmark": ("segjax.commands.benchmark", "speed of a model next to PyTorch's"),
    "data": ("segjax.commands.data", "import or prepare a dataset, or draw its samples"),
}
USAGE = "usage: segjax COMMAND ...   (segjax COMMAND --help lists its arguments)"


def run_process(command: str | None = None) -> int:
    """Runs a command with the arguments of this process, which a signal ends from now on as `signals` describes.

    Args:
      command: a key of `COMMANDS`; by default the first argument is one.
    """
    arguments = sys.argv[1:] if command is None else [command, *sys.argv[1:]]
    name = f"segjax {arguments[0]}" if arguments and arguments[0] in COMMANDS else "segjax"

    def run() -> int:
        native_log.divert()
        return main(arguments)

    return signals.run_process(name, run)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status; 2 where there is no such command.

    Args:
      arguments: by default those of this process, see `run_process`.
    """
    if arguments is None:
        return run_process()
    name, *rest = arguments or [""]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    if name in ("-h", "--help", "--version"):
        from segjax import __version__
        from segjax.commands.ending import run_command

        table = [USAGE, "", *(f"  {command:<11}{line}" for command, (_, line) in COMMANDS.items())]
        return run_command(
            "segjax", lambda: print(f"segjax {__version__}" if name == "--version" else "\n".join(table))
        )
    if not name:
        print(f"{USAGE}\nsegjax: no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
    print(f"segjax: no command {name!r}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run_process())
