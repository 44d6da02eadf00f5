"""LoRA adapters as peft saves them: small matrices that change the weights of another checkpoint, their base.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021: W + alpha / rank * B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

import jax.numpy as jnp
import numpy as np
from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from segjax.checkpoints import published
from segjax.checkpoints.errors import CheckpointError, shorten
from segjax.runtime.reading import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Initialisations that also change the base: an adapter belongs to the changed base, which is not saved.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Entries of the config that change the equation or the model.
_OTHER_FORMS = (
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
_MERGE = "merge it where it was trained: model.merge_and_unload().save_pretrained(FOLDER)"
# Names of peft's wrappers around the network, and around modules in it.
NETWORK = "base_model.model."
_AROUND = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)")
_A, _B = re.compile(r"\.lora_A(?:\.default)?\.weight$"), ".lora_B"


class Config(TypedDict):
    """The entries of adapter_config.json that are read."""

    peft_type: str
    base_model_name_or_path: NotRequired[str | None]
    revision: NotRequired[str | None]
    lora_alpha: NotRequired[FiniteFloat]
    alpha_pattern: NotRequired[dict[str, FiniteFloat] | None]
    fan_in_fan_out: NotRequired[bool]
    use_rslora: NotRequired[bool]
    use_dora: NotRequired[bool]
    use_qalora: NotRequired[Any]
    use_bdlora: NotRequired[Any]
    alora_invocation_tokens: NotRequired[Any]
    arrow_config: NotRequired[Any]
    kasa_config: NotRequired[Any]
    monteclora_config: NotRequired[Any]
    layer_replication: NotRequired[Any]
    target_parameters: NotRequired[Any]
    trainable_token_indices: NotRequired[Any]
    r: NotRequired[Annotated[int, Field(ge=1)]]
    init_lora_weights: NotRequired[bool | str | None]


def is_folder(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def weight_file(folder: Path) -> Path:
    """The file of an adapter's weights. Raises CheckpointError if there is none."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder}: {CONFIG}, but neither {' nor '.join(WEIGHTS)}")


def read_config(folder: Path) -> Config:
    """Reads adapter_config.json.

    Raises:
      CheckpointError: The adapter cannot be merged.
      UnreadableError: The file is damaged.
    """
    config = read_json(folder / CONFIG, Config)
    kind = "DoRA" if config.get("use_dora") else config["peft_type"]
    if kind.upper() != "LORA":
        raise CheckpointError(f"{folder}: an adapter of the kind {kind}; segjax merges only LoRA: {_MERGE}")
    if others := [name for name in _OTHER_FORMS if config.get(name)]:
        raise CheckpointError(
            f"{folder}: an adapter with {' and '.join(others)}, which is more than W + scale * B A; {_MERGE}"
        )
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGE_BASE):
        raise CheckpointError(
            f"{folder}: an adapter whose init_lora_weights, {initial}, also changed its base; {_MERGE}"
        )
    return config


def base_of(folder: Path, config: Config) -> str:
    """Path or address (hf:owner/name) of an adapter's base. Raises CheckpointError if the config names none."""
    name = config.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{folder}: {CONFIG} names no base_model_name_or_path; {_MERGE}")
    for place in (Path(name), folder / name):
        if place.exists():
            return str(place)
    if published.find(name) is not None:
        return name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        revision = config.get("revision")
        return f"hf:{name}" + (f"@{revision}" if revision else "")
    raise CheckpointError(
        f"{folder}: its base {name} does not exist; set base_model_name_or_path in {CONFIG} to its path, or {_MERGE}"
    )


def own_name(key: str) -> str:
    """The key of an adapter's tensor without the names of peft's wrappers."""
    return _AROUND.sub("", key.removeprefix(NETWORK))


def changed_names(adapter: Iterable[str]) -> list[str]:
    """Keys of the base that an adapter changes or replaces."""
    return [_A.sub(".weight", name) for name in map(own_name, adapter) if _B not in name]


def merged(adapter: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Merges an adapter into its base: adds low-rank changes, and replaces whole arrays.

    Args:
      adapter, base: Arrays by key, as stored.
      config: Content of adapter_config.json.

    Raises:
      CheckpointError: `base` lacks an array that the adapter changes, or has it with another shape.
    """
    given = {own_name(key): value for key, value in adapter.items()}
    arrays, problems = dict(base), list[str]()
    for key, value in given.items():
        if _B in key and key.replace(_B, ".lora_A") in given:
            continue
        if not _A.search(key):
            if "lora_" in key:
                problems.append(key)
            arrays[key] = value
            continue
        module, other = _A.sub("", key), given.get(key.replace(".lora_A", _B))
        name = f"{module}.weight"
        if name not in base or other is None:
            problems.append(key)
            continue
        change = _change(value, other, is_transposed=config.get("fan_in_fan_out", False))
        if change is None or change.shape != base[name].shape:
            problems.append(f"{key}: {value.shape} and {getattr(other, 'shape', None)} for {base[name].shape}")
            continue
        scale = _alpha(module, config) / (math.sqrt(len(value)) if config.get("use_rslora") else len(value))
        # A base in float16 is not rounded again after the change.
        dtype = jnp.promote_types(base[name].dtype, value.dtype)
        arrays[name] = (base[name].astype(np.float64) + scale * change).astype(dtype)
    if problems:
        raise CheckpointError(f"its base has no place for {shorten(problems, most=6)}; {_MERGE}")
    return arrays


def _change(a: np.ndarray, b: np.ndarray, *, is_transposed: bool) -> np.ndarray | None:
    """B A of a linear layer, (out, in), or of a convolution, (out, in, h, w); None if the shapes do not match."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if a.ndim == b.ndim == 2 and b.shape[1] == len(a):
        return (b @ a).T if is_transposed else b @ a
    if a.ndim == b.ndim == 4 and b.shape[1:] == (len(a), 1, 1):
        return np.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    return None


def _alpha(module: str, config: Config) -> float:
    """lora_alpha of a module; the keys of alpha_pattern are ends of module names."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        # Regular expressions from a file could take unlimited time.
        if not re.fullmatch(r"[\w.]+", pattern):
            raise CheckpointError(f"alpha_pattern has the regular expression {pattern!r}, which is not used; {_MERGE}")
        if f".{module}".endswith(f".{pattern}"):
            return alpha
    return config.get("lora_alpha", 8)


def refuse_unmerged(keys: Iterable[str]) -> None:
    """Raises CheckpointError for low-rank matrices in a file without their scale."""
    if found := [key for key in keys if ".lora_" in key]:
        raise CheckpointError(
            f"it holds matrices of LoRA ({shorten(found, most=2)}) without their lora_alpha; give the folder with "
            f"{CONFIG}, or {_MERGE}"
        )
