"""segjax train: trains a segmentation model.

    segjax train --config segformer:b2,camvid --config.data.source=DIR
    python train.py --config configs/segformer.py:b2,camvid

--config takes a packaged recipe or a Python file with a function get_config(argument); the words after the colon
select a variant and a dataset. Every setting is a flag, also every setting of the model, for example
--config.model.decoder_dim=512; --config.eval.crop=None unsets an optional setting. The run is saved in --workdir, and
the same command resumes it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import itertools
import os
import re
import signal
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from segjax import recipes
from segjax.commands.arguments import EMPTY, MOST_PROCESSES, PROCESSES
from segjax.commands.ending import message_of, run_command
from segjax.data.specs import DATASETS
from segjax.recipes import common
from segjax.runtime import console, distributed, native_log
from segjax.runtime.reading import user_path
from segjax.train import constraints, schema

PROGRAM = "segjax train"
HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")
DEFAULT_RECIPE = "segformer"
# Flags that are not settings: name -> (placeholder of the value, text of the help).
FLAGS = {
    "config": (
        "RECIPE",
        f"Packaged recipe or config file, RECIPE[:VARIANT,DATASET] or FILE[:ARGUMENT]; default {DEFAULT_RECIPE}. The "
        f"recipes are {', '.join(recipes.RECIPES)}.",
    ),
    "workdir": ("DIR", "Folder of the run; default runs/<label>-<dataset>. An existing run is resumed."),
    **PROCESSES,
}


class UsageError(ValueError):
    """Arguments that cannot be used; the message is one line."""


class Options(NamedTuple):
    """The parsed command line; `recipe` is the value of --config, `model_flags` names the model's settings on it."""

    recipe: str
    config: ConfigDict
    workdir: str | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    model_flags: frozenset[str]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
      Exit status: 0; 130 or 143 if Ctrl-C or SIGTERM stopped the run; 2 for an error that the user can correct; 1 for a
      bug.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if set(HELP) & set(arguments):
        return run_command(PROGRAM, lambda: print(help_text()))
    try:
        options = parse(arguments)
    except ValueError as error:
        console.show(f"{PROGRAM}: {message_of(error)}", to=sys.stderr)
        return 2

    def run() -> int:
        if not options.coordinator or options.process_id == 0:
            # Printed first, because JAX takes a second or more to import, and longer to find its devices.
            published = options.config.recipe
            console.show(f"recipe   {options.recipe}" + f"\nvalues   {published}" * bool(published))
        return _run(options)

    with _stops_at_once():
        full_disk = "earlier saves are complete: make room, and run the same command again"
        return run_command(PROGRAM, run, full_disk=full_disk, interrupted="the last complete save remains")


def _run(options: Options) -> int:
    # Imported here, so that an invalid command line is refused without waiting for JAX.
    from segjax.data.sources import NoSourceError
    from segjax.runtime import environment
    from segjax.train import config as train_config
    from segjax.train import loop

    logging.set_verbosity(logging.WARNING)
    environment.prepare()
    with _stops_at_once():
        distributed.connect(options.coordinator, options.num_processes, options.process_id)
        config = options.config
        workdir = user_path(options.workdir or loop.default_workdir(config))

        def changes(config: ConfigDict) -> list[str]:
            # Called after `train` checked the settings; before that, the dataset may not exist.
            default = common.get_config(config.data.name)
            # `main` printed it.
            default.recipe = config.recipe
            return train_config.changes(config, default)

        given = options.model_flags
        if config.init.checkpoint and config.data.name in DATASETS:
            given |= _not_of_recipes(config)
        try:
            with console.libraries_to(workdir / "warnings.log"):
                return loop.train(config, workdir, given=given, changes=changes)
        except NoSourceError as error:
            raise ValueError(f"{error}: --config.data.source=DIR") from error


def _not_of_recipes(config: ConfigDict) -> frozenset[str]:
    """The model's settings with values that no packaged recipe has, which a config file must have set."""
    packaged = [
        recipes.load(f"{recipe}:{words}").model
        for recipe in recipes.RECIPES
        for words in _words(recipe, config.data.name)
    ]
    alike = [model for model in packaged if model.name == config.model.name]
    return frozenset(key for key, value in config.model.items() if not any(value == model.get(key) for model in alike))


@contextlib.contextmanager
def _stops_at_once() -> Iterator[None]:
    """Ends the process at once after Ctrl-C; else each thread that saves or reads would report the shutdown."""
    try:
        yield
    except KeyboardInterrupt as error:
        print(f"{PROGRAM}: stopped at once; the last complete save remains", file=sys.stderr, flush=True)
        native_log.end()
        os._exit(error.args[0] if error.args else 128 + signal.SIGINT)


# -------------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str]) -> Options:
    """Loads the recipe and applies the flags to it. No global state is read or changed, not even sys.argv.

    Raises:
      UsageError, recipes.ConfigError: A flag or recipe cannot be used.
    """
    # absl's own flags would open any file, and accept mistyped flags.
    if found := next(filter(None, (re.match(r"--?(flagfile|undefok)(=|$)", argument) for argument in arguments)), None):
        raise UsageError(f"there is no flag --{found[1]}; a file with settings is a recipe: --config FILE.py")
    recipe, arguments = _split_off_config(arguments)
    config = recipes.load(recipe)
    model_flags = _add_model_settings(arguments, config)
    _refuse_unknown_settings(arguments, config)
    unset, arguments = _split_off_unset(arguments)
    values, argv = flags.FlagValues(), [PROGRAM, *arguments]
    for name in ("workdir", "coordinator"):
        flags.DEFINE_string(name, None, FLAGS[name][1], flag_values=values)
    for name in ("num_processes", "process_id"):
        flags.DEFINE_integer(name, None, FLAGS[name][1], lower_bound=0, upper_bound=MOST_PROCESSES, flag_values=values)
    with _in_one_line(config.model.name):
        # Defines a flag for each setting that the arguments name; parsing then changes `config`.
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        _, *stray = values(argv)
    if stray:
        raise UsageError(_why_stray(stray))
    if empty := next((name for name in FLAGS if name != "config" and values[name].value == ""), None):
        raise UsageError(f"--{empty}: {EMPTY}")
    if problem := distributed.problem(*(values[name].value for name in PROCESSES)):
        raise UsageError(problem)
    for key in unset:
        schema.unset(config, key)
    # --config.optim="{...}" replaces a whole section.
    schema.require_complete(config)
    given = {name: values[name].value for name in FLAGS if name != "config"}
    return Options(recipe, config, **given, model_flags=model_flags)


def _split_off_config(arguments: list[str]) -> tuple[str, list[str]]:
    """The value of the last --config, and the other arguments."""
    recipe, others, pending = DEFAULT_RECIPE, [], iter(arguments)
    for argument in pending:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            recipe = value if equals else next(pending, "")
            if not recipe:
                raise UsageError(f"--config needs a recipe or a file, as in --config {DEFAULT_RECIPE}:b2,camvid")
        else:
            others.append(argument)
    return str(user_path(recipe)) if recipe.startswith("~") else recipe, others


def _split_off_unset(arguments: list[str]) -> tuple[set[str], list[str]]:
    """The settings to unset, and the other arguments.

    --config.KEY=None unsets an optional setting; the last flag of a setting counts. --config.eval.mode=whole also
    unsets
    the sliding window of a recipe.
    """
    last = dict(_settings_in(arguments))
    unset = {
        key
        for key, value in last.items()
        if value == "None" and key in schema.SETTINGS and schema.SETTINGS[key].optional
    }
    others, pending = [], iter(arguments)
    for argument in pending:
        match = re.match(r"--?config\.([\w.]+)(=)?", argument)
        if not match or match[1] not in unset:
            others.append(argument)
        elif not match[2]:
            next(pending, None)
    if last.get("eval.mode") == "whole":
        unset |= {"eval.crop", "eval.stride"} - last.keys()
    return unset, others


def _settings_in(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yields key and value of each --config.KEY=VALUE or --config.KEY VALUE."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if match := re.match(r"--?(?:no)?config\.([\w.]+)(?:(=)|$)", argument):
            yield match[1], argument.partition("=")[2] if match[2] else following


def _add_model_settings(arguments: list[str], config: ConfigDict) -> frozenset[str]:
    """Adds the model's settings that the arguments name to the config, with their defaults, if the recipe lacks them.

    Returns:
      The model's settings that the arguments name.

    Raises:
      UsageError: The model has no such setting.
    """
    flagged = dict(_settings_in(arguments))
    keys = {key.removeprefix("model.") for key in flagged if key.startswith("model.")} - {"name", "dtype"}
    if "model" in flagged:
        return frozenset(config.model)
    if keys <= set(config.model):
        return frozenset(keys)
    # Imported here, because the settings of a model are the arguments of its constructor, and models import JAX.
    from segjax import models
    from segjax.train.config import why_no_model_setting

    name = flagged.get("model.name") or config.model.name
    if name not in models.MODELS:
        raise UsageError(f"--config.model.name: {name!r}; no such model; the models are {', '.join(models.MODELS)}")
    defaults = models.settings(name)
    for key in sorted(keys - set(config.model)):
        if why := why_no_model_setting(name, key, prefix="--config."):
            raise UsageError(f"--config.model.{key}: {why}")
        with config.model.unlocked():
            config.model[key] = defaults[key]
    return frozenset(keys)


def _refuse_unknown_settings(arguments: list[str], config: ConfigDict) -> None:
    """Raises UsageError for --config.KEY if there is no such setting, or if the value of a section is not a dict."""
    keys = schema.flattened(config)
    for argument in arguments:
        key = argument.partition("=")[0].partition("config.")
        if key[0] in ("--", "-") and key[1] and not re.fullmatch(r"[\w.]+", key[2]):
            raise UsageError(f"{key[0]}config.{key[2]}: no such setting; a setting is --config.KEY=VALUE, see --help")
    for key, value in _settings_in(arguments):
        if key not in keys and key not in config:
            raise UsageError(f"--config.{key}: {schema.why_unknown(key, prefix='--config.')}")
        if key not in keys and not _is_section(value):
            example = next(name for name in keys if name.startswith(f"{key}."))
            raise UsageError(
                f"--config.{key}={value}: {key} is a section of settings; give one of them, as in "
                f"--config.{example}={keys[example]}, or all of them as a Python dict"
            )


def _is_section(value: str) -> bool:
    try:
        return isinstance(ast.literal_eval(value), dict)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False


def _why_stray(stray: list[str]) -> str:
    hint = "settings are flags, as in --config.train.steps=100"
    if stray[0].partition(":")[0] in recipes.RECIPES or ".py" in stray[0]:
        hint = f"did you mean --config {stray[0]}?"
    return f"unexpected argument {' '.join(stray)!r}; {hint}"


def _did_you_mean(settings: list[str]) -> str:
    return f"; did you mean {' or '.join(f'--config.{key}' for key in settings)}?" if settings else ""


@contextlib.contextmanager
def _in_one_line(model: str = "") -> Iterator[None]:
    """Raises all errors of absl and ml_collections about flags as UsageErrors of one line.

    Args:
      model: Name of the model, if the flags are settings.
    """
    try:
        yield
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if close := difflib.get_close_matches(name.replace("-", "_"), FLAGS, n=1, cutoff=0.75):
            raise UsageError(f"there is no flag --{name}; did you mean --{close[0]}?") from None
        raise UsageError(f"there is no flag --{name}{_did_you_mean(schema.similar(name))}") from None
    except flags.IllegalFlagValueError as error:
        text = " ".join(str(error).split()).removeprefix("flag ")
        match = re.match(r"(--config\.([\w.]+)=(.*?)): ", text)
        if match and match[2] in schema.SETTINGS:
            text = f"{match[1]}: must be {schema.SETTINGS[match[2]].problem(match[3])}"
        elif match and match[2].startswith("model."):
            # Imported here, because it imports JAX.
            from segjax import models

            text = f"{match[1]}: must be {models.problem_of(model, match[2].removeprefix('model.'), match[3])}"
        elif match := re.match(r"(--(?:num_processes|process_id)=.*?): ", text):
            text = f"{match[1]}: must be a whole number, at least 0 and at most {MOST_PROCESSES:,}"
        raise UsageError(text) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error.args[0] if error.args else error).split())) from None


# ---------------------------------------------------------------------------------------------------------------- help


def help_text() -> str:
    """The flags, the recipes with their variants, and every setting with its default, in lines of 80 columns."""
    summary = (__doc__ or "").partition("\n\n")[2].rpartition("\n\n")
    lines = [f"usage: {PROGRAM} [--config RECIPE] [--workdir DIR] [--config.KEY=VALUE ...]", ""]
    lines += [*summary[0].splitlines(), "", _filled(summary[2], ""), "", "flags:"]
    for name, (value, text) in FLAGS.items():
        lines += [f"  --{name} {value}", _filled(text, "      ")]
    lines += ["", "variants of the recipes, the first of each is the default:"]
    for name in recipes.RECIPES:
        lines.append(_filled(f"{name}: {', '.join(_variants(name))}", "  "))
    lines += ["", "datasets, the first is the default:", _filled(", ".join(DATASETS), "  ")]
    lines += ["", "settings and their defaults; a recipe changes some of them:"]
    for section in schema.SECTIONS:
        lines += ["", f"{section.name}: {section.title}" if section.name else section.title]
        for setting in section.settings:
            only = " Only for generated datasets." if setting.generated else ""
            is_plain = isinstance(setting.allowed, constraints.Boolean | constraints.Text)
            allowed = "" if is_plain else f" [{setting.allowed.words}]"
            lines.append(f"  --config.{section.key(setting)}={_as_typed(setting.default)}")
            lines.append(_filled(f"{setting.text}{only}{allowed}", "      "))
    return "\n".join(lines)


def _variants(recipe: str) -> tuple[str, ...]:
    return importlib.import_module(f"segjax.recipes.{recipe}").VARIANTS


def _words(recipe: str, dataset: str) -> Iterator[str]:
    """The words after the colon of every recipe of a family for a dataset."""
    sources = getattr(importlib.import_module(f"segjax.recipes.{recipe}"), "SOURCES", {})
    for variant in _variants(recipe):
        yield f"{variant},{dataset}"
        yield from (f"{variant},{dataset},{source}" for source, datasets in sources.items() if dataset in datasets)


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(
        text, 80, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _as_typed(value: object) -> str:
    """A default as it is typed in a shell; "" if it is unset."""
    if value is None:
        return ""
    return f'"{value}"' if isinstance(value, tuple) else str(value)
