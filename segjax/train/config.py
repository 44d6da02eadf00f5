"""Whether the settings of a run can be used, and whether two runs have the same."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from segjax import losses, models
from segjax.checkpoints import huggingface
from segjax.runtime.atomic import why_not_writable
from segjax.train import schema

# Settings that may differ when a run is resumed: none of them changes the steps that were computed before.
FREE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.remat",
    "train.scan_blocks",
    "eval.",
    "checkpoint.",
    "data.source",
    "data.dir",
    "data.resident_gb",
    "data.cache_gb",
    "debug.",
    "parallel",
)


class RunError(ValueError):
    """A run that cannot start or continue; the message states the reason and the remedy."""


def check(config: ConfigDict, workdir: Path) -> None:
    """Reports every problem of the settings in one error, before anything slow happens.

    Raises:
      RunError: settings that cannot be used, each by its key; a `workdir` that cannot be written.
    """
    wrong = schema.problems(config)
    if not schema.missing(config):
        wrong |= _problems_of_model(config.model, wrong) | _contradictions(config, wrong)
    problems = [f"config.{key}: {problem}" for key, problem in wrong.items()]
    if reason := why_not_writable(workdir):
        problems.append(f"--workdir {workdir}: {reason}")
    if problems:
        raise RunError("the settings cannot be used:\n" + "\n".join(f"  {line}" for line in problems))


def _problems_of_model(settings: ConfigDict, wrong: Collection[str]) -> dict[str, str]:
    """An unknown model, or settings in `config.model` that its constructor does not have.

    Args:
      wrong: keys of settings that are wrong by themselves.
    """
    name = settings.name
    if "model.name" in wrong:
        return {}
    if name not in models.MODELS:
        close = difflib.get_close_matches(name, models.MODELS, n=1)
        hint = f"did you mean {close[0]!r}? The models" if close else "the models"
        return {"model.name": f"{name!r}; no such model; {hint} are {', '.join(models.MODELS)}"}
    known, found = models.settings(name), {}
    for key in model_overrides(settings):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean model.{close[0]}? It" if close else "it"
            found[f"model.{key}"] = f"no such setting of {name}; {hint} has {', '.join(known)}"
    return found


def _contradictions(config: ConfigDict, wrong: Collection[str]) -> dict[str, str]:
    """Settings that do not fit other settings, the devices, or the files that exist.

    Args:
      wrong: keys of settings that are wrong by themselves, which are not compared with others.
    """

    def sound(*keys: str) -> bool:
        return not any(key in wrong for key in keys)

    found, devices, accumulate = {}, jax.device_count(), config.train.accumulate
    if sound("train.batch", "train.accumulate") and config.train.batch % (devices * accumulate):
        parts = f" and {accumulate} micro-batches" if accumulate > 1 else ""
        found["train.batch"] = f"{config.train.batch}; does not divide among {devices} devices{parts}"
    if sound("eval.batch") and config.eval.batch % devices:
        found["eval.batch"] = f"{config.eval.batch}; does not divide among {devices} devices"
    if sound("eval.patience", "eval.every") and config.eval.patience and not config.eval.every:
        found["eval.patience"] = f"{config.eval.patience}; needs eval.every, the steps between two evaluations"
    if sound("init.checkpoint") and (reason := _why_no_start(config.init.checkpoint)):
        found["init.checkpoint"] = reason
    if sound("init.keep", "init.checkpoint") and config.init.keep and not config.init.checkpoint:
        found["init.keep"] = f"{config.init.keep}; names parameters of a checkpoint, and needs init.checkpoint"
    if not any(config.loss[name] for name in losses.TERMS):
        found["loss.cross_entropy"] = f"{config.loss.cross_entropy}; {losses.ALL_ZERO}"
    return found


def check_crop(settings: ConfigDict, sizes: np.ndarray) -> float:
    """Returns the share of padding in training crops, the mean over images and scales, for `config.augment`.

    Args:
      sizes: (N, 2), height and width of each training image in pixels.

    Raises:
      RunError: no image fills a crop, even at the largest scale.
    """
    crop, (smallest, largest) = np.array(settings.crop), settings.scale
    scaled = np.round(sizes * largest).astype(int)
    if not (scaled >= crop).all(axis=1).any():
        height, width = scaled[np.minimum(scaled, crop).prod(axis=1).argmax()].tolist()
        raise RunError(
            f"config.augment.crop={tuple(settings.crop)} is larger than every training image, even at the largest "
            f"factor of augment.scale, {largest}, where the best image has {height}x{width}. Give a smaller crop or a "
            "larger scale"
        )
    scales = np.linspace(smallest, largest, 101)[:, None, None]
    kinds, counts = np.unique(sizes, axis=0, return_counts=True)
    covered = np.minimum(scales * kinds / crop, 1).prod(axis=-1).mean(axis=0)
    return 1 - np.average(covered, weights=counts).item()


def _why_no_start(source: str | None) -> str | None:
    """Why training cannot start from a checkpoint; a repository on the Hub is asked for its weights only later."""
    if not source:
        return None
    if huggingface.is_address(source):
        problem = huggingface.problem_of(source)
        return problem and f"{source}: {problem}"
    return None if Path(source).expanduser().exists() else f"there is nothing at {source}"


def model_overrides(settings: ConfigDict) -> dict[str, Any]:
    """The settings in `config.model` that the constructor of the model takes."""
    return {key: value for key, value in settings.items() if key not in ("name", "dtype")}


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def changes(config: ConfigDict, default: ConfigDict) -> list[str]:
    """KEY=VALUE of every setting in `config` whose value is not that in `default`, or that `default` lacks."""
    new, old = _flat(plain(config)), _flat(plain(default))
    return [f"{key}={value}" for key, value in new.items() if key not in old or old[key] != value]


def differing(before: dict, now: dict) -> list[str]:
    """A line for each entry in which two nested dicts differ, by dotted key."""
    old, new = _flat(before), _flat(now)
    return [
        f"  {key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse_other_run(before: dict, now: dict, workdir: Path) -> None:
    """Raises RunError where the run in `workdir` has other settings or data, with which it cannot be resumed.

    Args:
      before: metadata of the run in `workdir`. now: metadata of the run as it is configured now.
    """
    compared = [
        {"config": schema.with_current_names(metadata.get("config", {})), "dataset": metadata.get("dataset", {})}
        for metadata in (before, now)
    ]
    lines = [
        line for line in differing(*compared) if not line.strip().removeprefix("config.").startswith(FREE_ON_RESUME)
    ]
    if lines:
        raise RunError(
            f"{workdir} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\n  give those settings again to resume it, or another --workdir for a new run"
        )


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
