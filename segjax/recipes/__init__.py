"""The packaged recipes, and the loader of recipes and config files.

A config file is a Python file with a function `get_config(argument)` that returns an ml_collections.ConfigDict. The
simplest one changes a recipe:

    from segjax.recipes import segformer

    def get_config(argument=""):
        config = segformer.get_config(argument)
        config.optim.lr = 1e-4
        return config
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import re
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from segjax.train import schema

RECIPES = ("segformer", "segformer_simple", "segformer_zuppichini", "hrnet", "segnext")


class ConfigError(ValueError):
    """Raised when a config cannot be made. The message is one line, with the file and line at fault if known."""


def load(reference: str) -> ConfigDict:
    """Load the config of a packaged recipe or of a file.

    Args:
      reference: RECIPE, FILE, RECIPE:ARGUMENT or FILE:ARGUMENT, for example "segformer:b2,camvid" or
        "configs/segformer.py:b2,camvid". ARGUMENT is the argument of `get_config`, which is called without one if there
        is no colon.

    Returns:
      The config.

    Raises:
      ConfigError: There is no such recipe or file; the file does not compile, raises, or returns no ConfigDict with all
        settings; or the recipe refuses the argument.

    Example:
      >>> from segjax import recipes
      >>> recipes.load("segformer:b2,camvid").model.name
      'segformer_b2'
    """
    name, colon, argument = _split(reference)
    if name in RECIPES:
        path, get_config = None, importlib.import_module(f"segjax.recipes.{name}").get_config
    else:
        path = Path(name)
        get_config = _get_config_of(path)
    try:
        config = get_config(argument) if colon else get_config()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{_place(error, path) or reference}: {_message(error)}") from error
    if not isinstance(config, ConfigDict):
        found = "None" if config is None else type(config).__name__
        raise ConfigError(
            f"{name}: get_config() returned {found}, not an ml_collections.ConfigDict; start from a recipe's config, "
            "as in segjax.recipes.segformer.get_config()"
        )
    if lacking := schema.missing(config):
        raise ConfigError(
            f"{name}: the config has no {', '.join(lacking)}; start from a recipe's config, as in "
            "segjax.recipes.segformer.get_config()"
        )
    return config


def _split(reference: str) -> tuple[str, str, str]:
    """Name, colon and argument of a reference. A colon before .py belongs to the path, as in C:\\configs\\mine.py."""
    if match := re.fullmatch(r"(.+?\.py)(?:(:)(.*))?", reference):
        return match[1], match[2] or "", match[3] or ""
    return reference.partition(":")


def _get_config_of(path: Path) -> Callable[..., object]:
    """The function `get_config` of a config file."""
    if not path.exists():
        close = difflib.get_close_matches(path.name, RECIPES, n=1)
        hint = f"did you mean {close[0]}? The recipes" if close else "the recipes"
        raise ConfigError(f"{path}: no such file or recipe; {hint} are {', '.join(RECIPES)}")
    if not path.is_file():
        raise ConfigError(f"{path}: is not a regular file")
    # Registered in sys.modules, where dataclasses and pickle look up their module.
    module = types.ModuleType("segjax_config_file")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{_place(error, path) or path}: {_message(error)}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{path}: defines no function get_config(argument)")
    return get_config


def _place(error: BaseException, path: Path | None) -> str | None:
    """FILE:LINE of an error: in source that does not compile, or the last executed line of the config file.

    None if no line is at fault: a packaged recipe refuses its argument, or get_config takes none.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}" if error.lineno else error.filename
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and frame.filename == str(path)]
    if own:
        return f"{path}:{own[-1].lineno}"
    last = frames[-1]
    return None if isinstance(error, ValueError) or last.filename == __file__ else f"{last.filename}:{last.lineno}"


def _message(error: BaseException) -> str:
    """The error in one line, with its type unless its text is written for users."""
    if isinstance(error, SyntaxError):
        return error.msg
    text = str(error)
    if isinstance(error, AttributeError | KeyError) and text[:1] in "\"'" and text[-1:] == text[:1]:
        # A KeyError quotes its message, and ml_collections turns KeyErrors into AttributeErrors. Python's own may only
        # begin and end with quoted names.
        with contextlib.suppress(SyntaxError, ValueError):
            text = ast.literal_eval(text)
    text = " ".join(text.split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
