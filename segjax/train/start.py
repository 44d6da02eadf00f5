"""The start of a run: random weights, a checkpoint whose settings the model adopts, or the run's own checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from segjax import models
from segjax.checkpoints import published
from segjax.checkpoints.checkpoint import Checkpoint, CheckpointError
from segjax.checkpoints.files import provenance_at, read_checkpoint
from segjax.checkpoints.initialize import load_initial, read_settings
from segjax.checkpoints.metadata import licence_of
from segjax.models.segmentation_model import SegmentationModel
from segjax.runtime import console
from segjax.train import schema
from segjax.train.config import RunError, model_overrides


def read_start(settings: ConfigDict) -> Checkpoint | None:
    """The checkpoint that `config.init` names; None for random weights.

    Raises:
      CheckpointError: The checkpoint cannot be read.
    """
    if not settings.checkpoint:
        return None
    console.say(f"initial weights from {settings.checkpoint}")
    with console.log_to(console.say):
        try:
            return read_checkpoint(settings.checkpoint, weights=_chosen(settings))
        except CheckpointError as error:
            # The message names the flag of the other commands.
            raise CheckpointError(str(error).replace("--weights ", "--config.init.weights=")) from None


def _chosen(settings: ConfigDict) -> str | None:
    """The set of weights that `config.init` names, in the form of the argument of `read_checkpoint`."""
    return None if settings.weights == "auto" else settings.weights


def fitted(config: ConfigDict, checkpoint: Checkpoint, given: Collection[str] | None) -> ConfigDict:
    """A copy of the config of a new run, with the settings of the model taken from a checkpoint.

    Sizes and all other settings that the checkpoint contains, in its shapes or its metadata, replace those of the
    config. A different value that the user gave is an error. Settings that it does not contain, such as the eps of
    norms, are those published with its key format, unless the user gave them. Dropout rates are never read.

    Args:
      config: Config of the run.
      checkpoint: Checkpoint that the run starts from.
      given: Names of the settings in `config.model` that the user gave; None for all of them. `segjax train` counts
        those on the command line, and those that a config file sets to a value that no packaged recipe has for that
        model: the narrow sizes of a packaged `small` do not count.

    Raises:
      RunError: Given settings contradict the checkpoint; the message has both values of each.
      CheckpointError: The checkpoint is of another family, or its sizes cannot be read.
    """
    name, source = config.model.name, config.init.checkpoint
    try:
        found = read_settings(checkpoint, name, keep=config.init.keep)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    before, given = _effective(config.model), _given(config.model, given)
    contradictions = [
        f"  config.model.{key}: {before[key]} is given, the checkpoint has {value}"
        for key, value in found.known.items()
        if key in given and before[key] != value
    ]
    if contradictions:
        raise RunError(
            f"{source} does not fit the settings of the model:\n"
            + "\n".join(contradictions)
            + "\n  omit these settings to read them from the checkpoint, or start from another one"
        )
    settings = found.known | {key: value for key, value in found.assumed.items() if key not in given}
    changed = {key: value for key, value in settings.items() if before[key] != value}
    if changed:
        listed = ", ".join(f"{key}={value}" for key, value in changed.items())
        console.say(f"model settings from the checkpoint: {listed}")
    return _with_model(config, changed)


def resumed_config(config: ConfigDict, recorded: Mapping[str, Any], given: Collection[str] | None) -> ConfigDict:
    """A copy of the config of a resumed run, with the settings of the model that `fitted` chose.

    They come from the config that the run recorded, because its initial checkpoint may no longer exist.

    Args:
      config: Config of the run now.
      recorded: Config in the metadata of the run, as JSON.
      given: As for `fitted`.
    """
    recorded = schema.in_current_terms(recorded)
    of_run, source = recorded.get("model", {}), recorded.get("init", {}).get("checkpoint")
    if not source or source != config.init.checkpoint or of_run.get("name") != config.model.name:
        return config
    before, given = _effective(config.model), _given(config.model, given)
    effective = models.settings(config.model.name) | {key: _from_json(value) for key, value in of_run.items()}
    changed = {
        key: effective[key]
        for key, value in before.items()
        if key not in given and not key.endswith("_rate") and value != effective[key]
    }
    return _with_model(config, changed)


def _given(settings: ConfigDict, given: Collection[str] | None) -> Collection[str]:
    return model_overrides(settings) if given is None else given


def _effective(settings: ConfigDict) -> dict[str, Any]:
    """All settings of a model: those of `config.model`, and the defaults of its name."""
    overrides = {key: _from_json(value) for key, value in model_overrides(settings).items()}
    return models.settings(settings.name) | overrides


def _from_json(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _with_model(config: ConfigDict, changed: Mapping[str, Any]) -> ConfigDict:
    config = copy.deepcopy(config)
    # The command line locks its config.
    with config.model.unlocked(), config.model.ignore_type():
        config.model.update(changed)
    return config


def load_initial_weights(
    module: SegmentationModel, settings: ConfigDict, checkpoint: Checkpoint | None = None
) -> tuple[str, list[str]]:
    """Loads initial weights into the model of a new run.

    Args:
      module: Model with random weights.
      settings: `config.init`.
      checkpoint: Result of `read_start`, if it was called.

    Returns:
      A description of the weights' origin, and the dotted paths of arrays that the checkpoint does not have, see
      `load_initial`; none without a checkpoint.
    """
    checkpoint = checkpoint or read_start(settings)
    if checkpoint is None:
        return "random weights", []
    with console.log_to(console.say):
        text, random = load_initial(module, checkpoint, keep=settings.keep)
    return f"{settings.checkpoint}: {text}", random


def origin_metadata(model_name: str, settings: ConfigDict) -> dict[str, object]:
    """Metadata about the origin of a new run's weights; `settings` is `config.init`."""
    if not settings.checkpoint:
        return {
            "licence": "trained from random weights; the terms of the training data apply",
            "provenance": {"initial_weights": None},
        }
    row = published.find(settings.checkpoint)
    return {
        "licence": licence_of(model_name) if row is None else row.licence,
        "provenance": {"initial_weights": provenance_at(settings.checkpoint, weights=_chosen(settings))},
    }


def resumed_from(step: int, origin: Mapping[str, Any]) -> str:
    """A description of the start of a resumed run.

    Args:
      step: Step of the checkpoint.
      origin: Metadata of the run about the origin of its first weights.
    """
    provenance = origin.get("provenance")
    if not provenance:
        return f"step {step} of this run"
    initial = provenance.get("initial_weights")
    return f"step {step} of this run, which began with {initial['source'] if initial else 'random weights'}"
