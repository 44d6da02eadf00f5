"""Checks of the settings of a run, and comparison of two runs' settings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from segjax import losses, models
from segjax.checkpoints import huggingface, published
from segjax.data import hooks
from segjax.data.crops import AugmentSettings, discrete_scales, scaled_size
from segjax.inference.engine import window_contradictions
from segjax.runtime import console, memory
from segjax.runtime.atomic import why_not_writable
from segjax.runtime.reading import UnreadableError, user_path
from segjax.train import optim, schema, trackers

# Settings that may differ when a run is resumed: none of them affects the steps already taken.
FREE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.trackers",
    "train.remat",
    "train.scan_blocks",
    "eval.",
    "checkpoint.",
    "data.source",
    "data.dir",
    "data.resident_gb",
    "data.cache_gb",
    "data.changed",
    "debug.",
    "parallel",
    "recipe",
    "init.expected",
    # If classes.json has no name, the name of a data folder depends on its path.
    "dataset.name",
)


class RunError(ValueError):
    """Raised when a run cannot start or continue; the message states the reason and the remedy.

    Example:
      >>> from segjax import train
      >>> issubclass(train.RunError, ValueError)
      True
    """


def check(config: ConfigDict, workdir: Path, *, resumes: bool = False) -> None:
    """Reports every problem of the settings in one error, before anything slow starts.

    Args:
      config: Config of the run.
      workdir: Folder of the run.
      resumes: Whether `workdir` already holds the run, which then needs no initial checkpoint.

    Raises:
      RunError: Settings cannot be used, or `workdir` cannot be written; the message lists them by key.
    """
    wrong = schema.problems(config)
    if not schema.missing(config):
        wrong |= _problems_of_model(config.model, wrong) | _contradictions(config, wrong, resumes)
    problems = [f"config.{key}: {problem}" for key, problem in wrong.items()]
    if reason := why_not_writable(workdir):
        problems.append(f"--workdir {workdir}: {reason}")
    if problems:
        raise RunError("the settings cannot be used:\n" + "\n".join(f"  {console.one_line(line)}" for line in problems))


def _problems_of_model(settings: ConfigDict, wrong: Collection[str]) -> dict[str, str]:
    """Problems of an unknown model, or of settings in `config.model` that its constructor lacks or refuses.

    Args:
      settings: `config.model`.
      wrong: Keys of settings whose own values are wrong.
    """
    name = settings.name
    if "model.name" in wrong:
        return {}
    if name not in models.MODELS:
        close = difflib.get_close_matches(name, models.MODELS, n=1)
        hint = f"did you mean {close[0]!r}? The models" if close else "the models"
        return {"model.name": f"{name!r}; no such model; {hint} are {', '.join(models.MODELS)}"}
    found = {}
    for key, value in model_overrides(settings).items():
        if why := why_no_model_setting(name, key, prefix=""):
            found[f"model.{key}"] = why
        elif f"model.{key}" not in wrong and (must_be := models.problem_of(name, key, value)):
            found[f"model.{key}"] = f"{value!r}; must be {must_be}"
    return found


def why_no_model_setting(name: str, key: str, *, prefix: str) -> str | None:
    """The reason why the model `name` lacks a setting, with a similar name after `prefix`; None if it has it."""
    known = models.settings(name)
    if key in known:
        return None
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}model.{close[0]}? It" if close else "it"
    return f"no such setting of {name}; {hint} has {', '.join(known)}"


def _contradictions(config: ConfigDict, wrong: Collection[str], resumes: bool) -> dict[str, str]:
    """Problems of settings that do not fit other settings, the devices, or the files that exist.

    Args:
      config: Config of the run.
      wrong: Keys of settings whose own values are wrong, which are not compared with others.
      resumes: As for `check`.
    """

    def sound(*keys: str) -> bool:
        return not any(key in wrong for key in keys)

    found = {}
    if sound("train.batch", "train.accumulate") and (why := _why_uneven(config.train.batch, config.train.accumulate)):
        found["train.batch"] = why
    elif sound("train.batch", "train.accumulate", "loss.ohem", "loss.ohem_images"):
        found |= _problem_of_groups(config.loss, config.train)
    for name in ("cutmix", "classmix"):
        if sound("train.batch", f"augment.{name}") and config.augment[name] and config.train.batch == 1:
            found[f"augment.{name}"] = f"{config.augment[name]}; mixes samples of a batch, and train.batch is 1"
    if sound("eval.batch") and (why := _why_uneven(config.eval.batch, 1)):
        found["eval.batch"] = why
    if sound("eval.patience", "eval.every") and config.eval.patience and not config.eval.every:
        found["eval.patience"] = f"{config.eval.patience}; needs eval.every, the steps between two evaluations"
    if sound("eval.mode", "eval.crop", "eval.stride"):
        window = config.eval.mode, config.eval.crop, config.eval.stride
        for name, problem in window_contradictions(*window).items():
            found[f"eval.{name}"] = f"{config.eval[name]}; {problem}"
    if sound("init.checkpoint") and not resumes and (reason := _why_no_start(config.init.checkpoint)):
        found["init.checkpoint"] = reason
    if sound("loss.distill", "loss.distill_cwd", "loss.distill_kl") and config.loss.distill:
        if not resumes and (reason := _why_no_start(config.loss.distill)):
            found["loss.distill"] = reason
        elif not config.loss.distill_cwd and not config.loss.distill_kl:
            found["loss.distill"] = (
                f"{config.loss.distill}; teaches nothing, because loss.distill_cwd and loss.distill_kl are 0"
            )
    if sound("init.keep", "init.checkpoint") and config.init.keep and not config.init.checkpoint:
        found["init.keep"] = f"{config.init.keep}; names parameters of a checkpoint, and needs init.checkpoint"
    if sound("lora.rank", "optim.frozen", "init.checkpoint") and config.lora.rank:
        if not config.init.checkpoint:
            found["lora.rank"] = (
                f"{config.lora.rank}; adapters change the weights of a checkpoint: give init.checkpoint"
            )
        if config.optim.frozen:
            found["optim.frozen"] = (
                f"{config.optim.frozen}; with lora.rank everything is frozen except adapters and lora.full; omit it"
            )
    if "data.train_images" in schema.flattened(config) and sound("data.train_images", "data.eval_images", "data.size"):
        found |= _problem_of_scenes(config.data)
    # The images of a folder may have other numbers of channels, which only `setup.build` knows.
    channels = None if config.data.name == "folder" else 3
    found |= _contradictions_of_augment(config.augment, sound, channels)
    if sound(*(key for key in schema.SETTINGS if key.startswith("optim."))):
        try:
            optim.check(config.optim)
        except optim.SettingError as error:
            found[error.key] = error.problem
    if sound("train.trackers") and (why := trackers.why_missing(config.train.trackers)):
        found["train.trackers"] = f"{config.train.trackers}; {why}"
    if not any(config.loss[name] for name in losses.TERMS):
        found["loss.cross_entropy"] = f"{config.loss.cross_entropy}; {losses.ALL_ZERO}"
    if config.loss.tversky and config.loss.tversky_alpha == config.loss.tversky_beta == 0:
        found["loss.tversky_alpha"] = f"0; {losses.NO_ERRORS}"
    return found


def _problem_of_scenes(data: ConfigDict) -> dict[str, str]:
    """The problem that the generated scenes, all kept in memory, do not fit into it."""
    height, width = data.size
    # Bytes of RGB and a label.
    needed = 4 * height * width * (data.train_images + data.eval_images)
    if (available := memory.host()) is None or needed <= available:
        return {}
    return {
        "data.train_images": f"{data.train_images}; with data.eval_images={data.eval_images} and data.size="
        f"{tuple(data.size)} the scenes need {console.amount(needed)} of memory, and {console.amount(available)} are "
        "available"
    }


def _problem_of_groups(loss: ConfigDict, training: ConfigDict) -> dict[str, str]:
    """The problem that `loss.ohem_images` does not divide each device's micro-batches."""
    group, batch, devices, accumulate = loss.ohem_images, training.batch, jax.device_count(), training.accumulate
    if not loss.ohem or not group or batch % (devices * accumulate * group) == 0:
        return {}
    least = devices * accumulate * group
    batches = dict.fromkeys((max(batch // least, 1) * least, (batch // least + 1) * least))
    fewer = [number for number in range(1, devices) if batch % (number * accumulate * group) == 0]
    remedies = f"train.batch={' or '.join(map(str, batches))}"
    if fewer:
        remedies += f", or {' or '.join(map(str, fewer))} device{'s' * (fewer != [1])}{_visible(fewer[-1])}"
    return {
        "loss.ohem_images": f"{group}; train.batch={batch} on {devices} device{'s' * (devices > 1)}, "
        f"train.accumulate={accumulate}, gives parts of {batch // (devices * accumulate)} images, which do not divide "
        f"into groups of {group}; possible: {remedies}"
    }


def _visible(devices: int) -> str:
    """The variable that restricts jax to this number of GPUs, in parentheses; empty without GPUs."""
    if jax.default_backend() != "gpu" or jax.process_count() > 1:
        return ""
    return f" (CUDA_VISIBLE_DEVICES={','.join(map(str, range(devices)))})"


def _why_uneven(batch: int, accumulate: int) -> str | None:
    """The reason why a batch does not divide among devices and micro-batches, with remedies; None if it divides."""
    devices = jax.device_count()
    multiple = devices * accumulate
    if batch % multiple == 0:
        return None
    sizes = [size for size in (batch // multiple * multiple, -(-batch // multiple) * multiple) if size]
    others = [f"{' or '.join(map(str, sizes))} images do"]
    fewer = [number for number in range(2, accumulate) if batch % (devices * number) == 0]
    if batch % devices == 0:
        parts = " or ".join(map(str, fewer[-3:])) or "1"
        others.append(f"or train.accumulate={parts}")
    few = next((number for number in range(devices - 1, 0, -1) if batch % (number * accumulate) == 0), None)
    if few:
        others.append(f"or {few} device{'s' if few > 1 else ''}{_visible(few)}")
    among = f"{devices} device{'s' if devices > 1 else ''}"
    among += f" and {accumulate} micro-batches" if accumulate > 1 else ""
    return f"{batch}; does not divide among {among}: {', '.join(others)}"


def _contradictions_of_augment(
    settings: ConfigDict, sound: Callable[..., bool], channels: int | None
) -> dict[str, str]:
    """Problems of settings in `config.augment` that do not fit each other, and of functions that cannot be used.

    Args:
      settings: `config.augment`.
      sound: Function from keys to whether their own values are valid.
      channels: Number of channels of the images; None if still unknown.
    """
    found = {}
    if sound("augment.photometric", "augment.brightness") and settings.photometric and settings.brightness:
        found["augment.brightness"] = (
            f"{settings.brightness}; augment.photometric changes the brightness too; set it to false, or this to 0"
        )
    if sound("augment.cutmix", "augment.classmix") and settings.cutmix + settings.classmix > 1:
        found["augment.classmix"] = (
            f"{settings.classmix}; the sum of the probabilities augment.cutmix, {settings.cutmix}, and "
            "augment.classmix must be at most 1"
        )
    if sound("augment.scale", "augment.scale_step") and settings.scale_step:
        steps = (settings.scale[1] - settings.scale[0]) / settings.scale_step
        if abs(steps - round(steps)) > 1e-6 * max(steps, 1):
            found["augment.scale_step"] = (
                f"{settings.scale_step}; must divide the range of augment.scale, {tuple(settings.scale)}"
            )
    for name, why_not in (
        ("on_device", lambda: hooks.problem_on_device(settings.on_device, settings.crop or (64, 96), channels)),
        ("on_host", lambda: hooks.problem_on_host(settings.on_host)),
    ):
        if sound(f"augment.{name}", "augment.crop") and settings[name] and (reason := why_not()):
            found[f"augment.{name}"] = reason
    return found


def check_crop(settings: AugmentSettings, sizes: np.ndarray) -> float:
    """Returns the share of padding in training crops, the mean over images and scales.

    Corners that `rotation` turns out of the image are not counted.

    Args:
      settings: `config.augment`.
      sizes: (N, 2), height and width of each training image in pixels.

    Raises:
      RunError: No image fills a crop, even at the largest scale.
    """
    crop, (smallest, largest) = np.array(settings.crop), settings.scale
    kinds, counts = np.unique(sizes, axis=0, return_counts=True)
    scaled = np.asarray(scaled_size(kinds, largest, settings.base_size))
    if not (scaled >= crop).all(axis=1).any():
        height, width = scaled[np.minimum(scaled, crop).prod(axis=1).argmax()].tolist()
        at_base = f" with augment.base_size={tuple(settings.base_size)}" if settings.base_size else ""
        raise RunError(
            f"config.augment.crop={tuple(settings.crop)} is larger than every training image, even at the largest "
            f"factor of augment.scale, {largest}, where the best image has {height}x{width}{at_base}. Give a smaller "
            "crop or a larger scale"
        )
    step = settings.scale_step
    factors = discrete_scales(settings.scale, step) if step else np.linspace(smallest, largest, 101)
    base = kinds
    if settings.base_size:
        edges = np.sort(settings.base_size) / np.sort(kinds, axis=1)
        base = kinds * edges.min(axis=1, keepdims=True)
    covered = np.minimum(np.array(factors)[:, None, None] * base / crop, 1).prod(axis=-1).mean(axis=0)
    return 1 - np.average(covered, weights=counts).item()


def _why_no_start(source: str | None) -> str | None:
    """The reason why a checkpoint cannot be read, or None. It downloads nothing."""
    if not source:
        return None
    if huggingface.is_address(source):
        problem = huggingface.problem_of(source)
        return problem and f"{source}: {problem}"
    if published.find(source) is not None:
        return None
    try:
        return None if user_path(source).exists() else f"{source} does not exist{published.hint_for(source)}"
    except (UnreadableError, OSError) as error:
        return str(error)


def model_overrides(settings: ConfigDict) -> dict[str, Any]:
    """The settings in `config.model` for the constructor of the model."""
    return {key: value for key, value in settings.items() if key not in ("name", "dtype")}


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config in terms of JSON: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def changes(config: ConfigDict, default: ConfigDict) -> list[str]:
    """KEY=VALUE of every setting in `config` that has another value in `default`, or none."""
    new, old = _flat(plain(config)), _flat(plain(default))
    return [f"{key}={value}" for key, value in new.items() if key not in old or old[key] != value]


def differing(before: dict, now: dict) -> list[str]:
    """A line for each entry, by dotted key, in which two nested dicts differ."""
    old, new = _flat(before), _flat(now)
    return [
        f"  {key}: {old.get(key)} in the run, {new.get(key)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse_other_run(before: dict, now: dict, workdir: Path) -> None:
    """Checks that the run in `workdir` can be resumed with these settings and data.

    Args:
      before: Metadata of the run in `workdir`.
      now: Metadata of the run as configured now.
      workdir: Folder of the run.

    Raises:
      RunError: Settings or data differ; the message lists them.
    """
    compared = [
        {
            "config": schema.in_current_terms(metadata.get("config", {})),
            "dataset": metadata.get("dataset", {}),
            "teacher": metadata.get("teacher", {}),
        }
        for metadata in (before, now)
    ]
    of_model = [entry["config"].get("model", {}) for entry in compared]
    if of_model[0].get("name") == of_model[1].get("name") in models.MODELS:
        # A setting of the model that is not in a config has the model's default.
        for settings in of_model:
            for key, value in models.settings(settings["name"]).items():
                settings.setdefault(key, list(value) if isinstance(value, tuple) else value)
    lines = [
        line for line in differing(*compared) if not line.strip().removeprefix("config.").startswith(FREE_ON_RESUME)
    ]
    # A teacher may have moved.
    if len({entry["teacher"].get("sha256") for entry in compared}) == 1:
        lines = [line for line in lines if not line.startswith(("  config.loss.distill:", "  teacher.source:"))]
    of_classes = [line for line in lines if line.startswith("  dataset.")]
    number = [len(metadata.get("dataset", {}).get("class_names", ())) for metadata in (before, now)]
    if number[0] == number[1] and now["config"].get("data", {}).get("changed") == "accept":
        lines = [line for line in lines if line not in of_classes]
    elif of_classes and number[0] == number[1]:
        lines.append("  --config.data.changed=accept continues with the current classes")
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
