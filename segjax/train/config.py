"""Whether the settings of a run can be used, and whether two runs have the same."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from segjax import losses, models
from segjax.checkpoints import huggingface
from segjax.train import optim

# Settings that may differ when a run is taken up again: none of them changes what was computed so far.
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
    """A run that cannot go on as asked; the message says why and what to do."""


def check(config: ConfigDict, workdir: Path) -> None:
    """Everything that is wrong with the settings, in one error, before anything slow happens.

    Raises:
      RunError: lists each by its key.
    """
    train, optimizer, augment = config.train, config.optim, config.augment
    parts = jax.device_count() * max(train.accumulate, 1)
    wrong = {
        f"model.name: no model {config.model.name!r}": config.model.name not in models.MODELS,
        f"model.dtype is 'float32' or 'bfloat16', not {config.model.dtype!r}": (
            config.model.dtype not in ("float32", "bfloat16")
        ),
        f"parallel is 'jit' or 'pmap', not {config.parallel!r}": config.parallel not in ("jit", "pmap"),
        f"optim.name is 'adamw' or 'sgd', not {optimizer.name!r}": optimizer.name not in ("adamw", "sgd"),
        f"optim.schedule is one of {', '.join(optim.SCHEDULES)}, not {optimizer.schedule!r}": (
            optimizer.schedule not in optim.SCHEDULES
        ),
        f"optim.clip_norm must not be negative: {optimizer.clip_norm}": optimizer.clip_norm < 0,
        f"optim.warmup_steps must not be negative: {optimizer.warmup_steps}": optimizer.warmup_steps < 0,
        f"optim.lr_multipliers are (pattern, factor) pairs, as in (('head', 10.0),), not {optimizer.lr_multipliers}": (
            not all(map(_is_multiplier, optimizer.lr_multipliers))
        ),
        f"train.accumulate must be at least 1: {train.accumulate}": train.accumulate < 1,
        f"train.batch={train.batch} does not divide among {jax.device_count()} devices"
        + (f" and {train.accumulate} micro-batches" if train.accumulate > 1 else ""): (
            train.batch < 1 or train.batch % parts
        ),
        f"train.ema lies in [0, 1), 0 for none: {train.ema}": not 0 <= train.ema < 1,
        f"train.may_skip must not be negative: {train.may_skip}": train.may_skip < 0,
        f"train.steps must not be negative: {train.steps}": train.steps < 0,
        f"train.log_every must be at least 1: {train.log_every}": train.log_every < 1,
        f"eval.batch={config.eval.batch} does not divide among {jax.device_count()} devices": (
            config.eval.batch < 1 or config.eval.batch % jax.device_count()
        ),
        f"eval.every must not be negative: {config.eval.every}": config.eval.every < 0,
        f"eval.patience must not be negative: {config.eval.patience}": config.eval.patience < 0,
        f"eval.patience={config.eval.patience} needs eval.every": config.eval.patience > 0 and not config.eval.every,
        f"eval.pictures must not be negative: {config.eval.pictures}": config.eval.pictures < 0,
        f"checkpoint.every must be at least 1: {config.checkpoint.every}": config.checkpoint.every < 1,
        f"checkpoint.keep must be at least 1: {config.checkpoint.keep}": config.checkpoint.keep < 1,
        f"augment.crop is (height, width), at least 32 each, not {tuple(augment.crop)}": (
            len(augment.crop) != 2 or not all(isinstance(side, int) and side >= 32 for side in augment.crop)
        ),
        f"augment.scale is (smallest, largest), not {tuple(augment.scale)}": (
            len(augment.scale) != 2 or not 0 < augment.scale[0] <= augment.scale[1]
        ),
        f"augment.flip is a probability, not {augment.flip}": not 0 <= augment.flip <= 1,
        f"init.from: {_why_no_start(config.init.from_)}": _why_no_start(config.init.from_),
        "init.keep names what stays random of a checkpoint, and needs init.from": (
            bool(config.init.keep) and not config.init.from_
        ),
    }
    patterns = [("optim.no_decay", optimizer.no_decay)]
    patterns += [("optim.frozen", pattern) for pattern in optimizer.frozen]
    patterns += [("optim.lr_multipliers", pair[0]) for pair in optimizer.lr_multipliers if _is_multiplier(pair)]
    wrong |= {f"{key} is no regular expression: {text!r}": not _is_pattern(text) for key, text in patterns}
    problems = [f"config.{message}" for message, is_wrong in wrong.items() if is_wrong]
    problems += [f"config.loss.{message}" for message in losses.problems_of(config.loss)]
    if reason := _why_not_writable(workdir):
        problems.append(f"--workdir {workdir}: {reason}")
    if problems:
        raise RunError("the settings cannot be used:\n" + "\n".join(f"  {line}" for line in problems))


def check_crop(config: ConfigDict, sizes: np.ndarray) -> float:
    """What share of the pixels of training crops is padding, on average over images and scales.

    Args:
      sizes: (N, 2), height and width of each training image.

    Raises:
      RunError: no image fills a crop, even at the largest scale.
    """
    crop, (smallest, largest) = np.array(config.augment.crop), config.augment.scale
    enlarged = np.round(sizes * largest).astype(int)
    if not (enlarged >= crop).all(axis=1).any():
        height, width = enlarged[np.minimum(enlarged, crop).prod(axis=1).argmax()].tolist()
        raise RunError(
            f"config.augment.crop={tuple(config.augment.crop)} is larger than every training image, even at "
            f"augment.scale's largest, {largest}: the best is {height}x{width} then. Give a crop that fits, or a "
            "larger scale"
        )
    scales = np.linspace(smallest, largest, 101)[:, None, None]
    kinds, counts = np.unique(sizes, axis=0, return_counts=True)
    covered = np.minimum(scales * kinds / crop, 1).prod(axis=-1).mean(axis=0)
    return 1 - np.average(covered, weights=counts).item()


def _is_multiplier(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], int | float) and pair[1] >= 0


def _is_pattern(text: object) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


def _why_no_start(source: str | None) -> str | None:
    """Why training cannot start from there; whether a repository has weights is found out when they are fetched."""
    if not source:
        return None
    if huggingface.is_address(source):
        problem = huggingface.problem_of(source)
        return problem and f"{source}: {problem}"
    return None if Path(source).expanduser().exists() else f"there is nothing at {source}"


def _why_not_writable(folder: Path) -> str | None:
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        return f"{existing} is a file"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"no permission to write in {existing}"


def model_overrides(config: ConfigDict) -> dict[str, object]:
    """The settings of the model's own class."""
    return {key: value for key, value in config.model.items() if key not in ("name", "dtype")}


def plain(config: ConfigDict) -> dict[str, object]:
    """The config as JSON has it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def changes(config: ConfigDict, default: ConfigDict) -> list[str]:
    """KEY=VALUE for every setting that a config has otherwise than another, or that the other lacks."""
    new, old = _flat(plain(config)), _flat(plain(default))
    return [f"{key}={value}" for key, value in new.items() if key not in old or old[key] != value]


def differing(before: dict, now: dict) -> list[str]:
    """One line for each entry that two nested records do not share, by dotted key."""
    old, new = _flat(before), _flat(now)
    return [
        f"  {key}: {old.get(key)} there, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse_other_run(before: dict, now: dict, workdir: Path) -> None:
    """Raises RunError where the run in `workdir` was made with settings or data that cannot be mixed with these."""
    lines = [
        line
        for line in differing(
            *({part: about.get(part, {}) for part in ("config", "dataset")} for about in (before, now))
        )
        if not line.strip().removeprefix("config.").startswith(FREE_ON_RESUME)
    ]
    if lines:
        raise RunError(
            f"{workdir} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\n  give those settings again to go on with it, or another --workdir to start anew"
        )


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
