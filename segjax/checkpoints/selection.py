"""Selects the weights in the content of a checkpoint file: unwraps them, and chooses one of several sets.

Training scripts keep averaged weights next to the raw ones: as separate entries of a file (`state_dict_ema`), under
prefixes of keys (`model_ema.`, `teacher.`), or under names without dots (`ema_backbone_conv1_weight`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.checkpoints.errors import CheckpointError, shorten, torch_module
from segjax.checkpoints.pickled import MOST_ENTRIES, Standin, StoredTensor
from segjax.checkpoints.recognition import network_prefix
from segjax.runtime.reading import stated, type_name

logger = logging.getLogger("segjax")

# Keys under which training scripts put the state dict next to other values.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# Prefixes of the network in a wrapper; they may precede the prefix of a set of weights.
_PREFIXES = ("module.", "model.", "online.")
# Modules with which torch.compile, FSDP, activation checkpoints, DeepSpeed and Opacus wrap others, at any depth.
_AROUND = re.compile(
    r"(?:(?<=\.)|^)_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module|module)\."
)
_WORDS = {
    **dict.fromkeys(("ema", "swa", "averaged", "average", "shadow", "momentum", "target"), "ema"),
    "student": "student",
    "teacher": "teacher",
}
_OF_TRAINING = {"optimizer", "optim", "scheduler", "scaler", "sampler"}
_NO_WEIGHTS = {*_OF_TRAINING, "loss", "criterion"}
_TITLES = {"ema": "averaged", "raw": "raw", "student": "student's", "teacher": "teacher's"}
# Counters that averages keep next to their weights.
_COUNTERS = ("decay", "num_updates", "n_averaged", "step", "steps", "initted")


def as_arrays(state_dict: Mapping, *, weights: str | None = None) -> dict[str, np.ndarray]:
    """Finds the network's weights in the content of a checkpoint, as numpy arrays, without importing torch.

    The keys are those below the prefix under which most keys fit a model of segjax. Other tensors, for example of a
    loss, are not used; the log names them.

    Args:
      state_dict: State dict, possibly wrapped and next to other values.
      weights: Set of weights to read, one of `key_maps.WEIGHT_SETS`; by default the raw weights. The log names the
        other sets.

    Raises:
      CheckpointError: There are no names with arrays; the set is missing; there are a student and a teacher, and
        `weights` names neither; or two arrays have one name.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"expected a state dict (names to arrays) but got {_kind(state_dict)}; save model.state_dict()"
        )
    try:
        state_dict, weights = _unwrapped(state_dict, weights, in_set=False)
        tensors, others = _flattened(state_dict)
    except RecursionError:
        raise CheckpointError("this is not a state dict (names to arrays): it contains itself") from None
    if not tensors:
        raise CheckpointError(f"this is not a state dict (names to arrays): {_what_else(others)}")
    tensors = _renamed(tensors, {key: _AROUND.sub("", key) for key in tensors})
    network = _of_network(_of_set(tensors, weights))
    if others:
        logger.info("not tensors, and not used (%d): %s", len(others), shorten(others))
    arrays = {key: as_array(key, value) for key, value in network.items()}
    if not any(array.size for array in arrays.values()):
        raise CheckpointError(
            "its tensors are empty, as DeepSpeed's ZeRO-3 and FSDP leave them; make one file of all weights with the "
            "zero_to_fp32.py that lies next to it, or save the full state dict"
        )
    return arrays


def _what_else(others: Mapping[str, object]) -> str:
    """Describes the content of a file without tensors."""
    found = [f"{key}: {_kind(value)}" for key, value in others.items()]
    if any(isinstance(value, Standin) for value in others.values()):
        return (
            f"it holds {shorten(found)}, whose weights only its packages can read, which would run code; where it was "
            "made, save model.state_dict()"
        )
    return f"it holds {shorten(found)}" if found else "it is empty"


def _flattened(given: Mapping) -> tuple[dict[str, Any], dict[str, object]]:
    """Tensors and other values of nested mappings, by dotted path."""
    tensors: dict[str, Any] = {}
    others: dict[str, object] = {}
    visited = 0

    def add(prefix: str, entries: Mapping) -> None:
        nonlocal visited
        for key, value in entries.items():
            visited += 1
            if visited > MOST_ENTRIES:
                raise CheckpointError(f"this is not a state dict: it holds more than {MOST_ENTRIES:,} entries")
            path = f"{prefix}{key}"
            if isinstance(value, Mapping):
                if not _OF_TRAINING.intersection(_words(str(key))):
                    add(f"{path}.", value)
            else:
                (tensors if _is_tensor(value) or isinstance(value, np.generic) else others)[path] = value

    add("", given)
    return tensors, others


def _of_network(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors below the network's prefix in this file, by key without the prefix."""
    prefix = network_prefix(tensors)
    network = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if elsewhere := [key for key in tensors if not key.startswith(prefix)]:
        if twice := [key for key in elsewhere if key in network]:
            raise CheckpointError(
                f"two tensors are called {twice[0]}: {twice[0]} and {prefix}{twice[0]}; remove one of them"
            )
        log_unused(elsewhere)
    return network


def log_unused(keys: Collection[str]) -> None:
    """Logs keys of a checkpoint that are not used."""
    logger.info("not used from the checkpoint (%d): %s", len(keys), shorten(sorted(keys)))


def as_array(key: str, value: Any) -> np.ndarray:
    """Converts a tensor or array to numpy. Raises CheckpointError, which names its key, if numpy cannot hold it."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        # JAX supports only the native byte order.
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    if isinstance(value, Standin):
        raise CheckpointError(f"{key}: a tensor of the kind {value.origin}, which cannot be read as numbers")
    try:
        if isinstance(value, StoredTensor):
            return value.read()
        tensor = value.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            # numpy has no bfloat16; that of jax has the same bits as torch's.
            return tensor.contiguous().view(torch_module().int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from None
    except (TypeError, RuntimeError, AttributeError) as error:
        # torch raises these for tensors that numpy cannot hold: sparse, quantized, without storage, float8.
        kind = f"{_kind(value)} of {getattr(value, 'dtype', 'no dtype')}"
        raise CheckpointError(f"{key}: a {kind} that cannot be read as numbers ({stated(error)})") from None


def _kind(value: object) -> str:
    return value.origin if isinstance(value, Standin) else type_name(value)


def _renamed(arrays: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    before: dict[str, str] = {}
    for key, value in arrays.items():
        name = names[key]
        if name in renamed:
            raise CheckpointError(f"two tensors are called {name}: {before[name]} and {key}; remove one of them")
        renamed[name], before[name] = value, key
    return renamed


# ------------------------------------------------------------------------------------------------------ several sets


def _set_of(name: object) -> str | None:
    """The set of weights under an entry or prefix of this name; None for other names."""
    words = _words(name) if isinstance(name, str) else []
    return None if _NO_WEIGHTS.intersection(words) else next((_WORDS[word] for word in words if word in _WORDS), None)


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def _unwrapped(given: Mapping, weights: str | None, *, in_set: bool) -> tuple[Mapping, str | None]:
    """The mapping of names to arrays inside all wrappers, and the set that remains to be chosen in it."""
    entries: dict[str, str] = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and (found := _set_of(key)) and _holds_tensors(value):
            entries.setdefault(found, key)
    wrapper = next((key for key in _WRAPPERS if isinstance(given.get(key), Mapping)), None)
    if wrapper is None and entries:
        wrapper = _only_other(given, entries.values())
    meta = given.get("meta")
    if entries.get("ema") == "ema_state_dict" and wrapper and isinstance(meta, Mapping) and "mmengine_version" in meta:
        # mmengine swaps the two when it saves, so that `state_dict` has the weights that it evaluates.
        entries = {"raw": "ema_state_dict", "ema": wrapper}
        weights = weights or "ema"
    if wrapper is not None:
        _log_passed_over(given, {wrapper, *entries.values()})
    if not entries:
        if wrapper is not None:
            return _unwrapped(given[wrapper], weights, in_set=in_set)
        if not in_set:
            return given, weights
        given = _without_counters(given)
        inner = [value for value in given.values() if isinstance(value, Mapping)]
        if len(inner) == 1 and not any(map(_is_tensor, given.values())):
            return _unwrapped(inner[0], weights, in_set=True)
        return given, weights
    _require_choice(entries, weights)
    if wrapper is None and "raw" not in entries and not any(map(_is_tensor, given.values())):
        if weights == "raw":
            raise CheckpointError(_no_such(weights, entries))
        weights = weights or next(iter(entries))
    if weights in entries:
        logger.info("reads the %s weights (%s)", _TITLES[weights], entries[weights])
        return _unwrapped(given[entries[weights]], None, in_set=True)
    if weights not in (None, "raw"):
        raise CheckpointError(_no_such(weights, entries))
    _log_others(entries)
    return (given, weights) if wrapper is None else _unwrapped(given[wrapper], None, in_set=in_set)


def _only_other(given: Mapping, of_sets: Collection[str]) -> str | None:
    """The key of the only entry with tensors, apart from sets and optimizers; None if there are several or none."""
    if any(map(_is_tensor, given.values())):
        return None
    holders = [
        key
        for key, value in given.items()
        if isinstance(key, str) and key not in of_sets and not _NO_WEIGHTS.intersection(_words(key))
        if isinstance(value, Mapping) and _holds_tensors(value)
    ]
    return holders[0] if len(holders) == 1 else None


def _log_passed_over(given: Mapping, used: set[str]) -> None:
    """Logs unused entries with more than a few tensors, which may be weights under unknown names."""
    passed = [
        key
        for key, value in given.items()
        if isinstance(key, str) and key not in used and not _OF_TRAINING.intersection(_words(key))
        if isinstance(value, Mapping | list | tuple) and _holds_tensors({key: value}, more_than=4)
    ]
    if passed:
        logger.info("tensors that are not read: the entries %s", shorten(passed))


def _is_tensor(value: object) -> bool:
    if isinstance(value, Standin):
        return value.is_tensor
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def _holds_tensors(given: Mapping, *, more_than: int = 0) -> bool:
    # Visits each container once, because a pickle can repeat a container any number of times.
    waiting: list[Any] = [given]
    seen, found = {id(given)}, 0
    while waiting:
        container = waiting.pop()
        for value in container.values() if isinstance(container, Mapping) else container:
            found += _is_tensor(value)
            if found > more_than:
                return True
            if isinstance(value, Mapping | list | tuple) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
    return False


def _without_counters(given: Mapping) -> Mapping:
    return {k: v for k, v in given.items() if not (isinstance(k, str) and k.rpartition(".")[2] in _COUNTERS)}


CHOOSE = "choose with --weights student or --weights teacher"


def _require_choice(found: Mapping[str, str], weights: str | None) -> None:
    """Raises CheckpointError if there are a student and a teacher, and `weights` names neither."""
    if {"student", "teacher"} <= found.keys() and weights not in ("student", "teacher"):
        raise CheckpointError(
            f"it holds the weights of a student ({found['student']}) and of a teacher ({found['teacher']}); {CHOOSE}"
        )


def _no_such(weights: str, found: Iterable[str] = ()) -> str:
    others = f", but {' and '.join(_TITLES[each] for each in found)} ones" if found else ""
    return f"it holds no {_TITLES[weights]} weights{others}; omit --weights {weights}, or choose another set"


def _log_others(found: Mapping[str, str]) -> None:
    for each, name in found.items():
        logger.info("reads the raw weights; its %s weights (%s) are the set %r", _TITLES[each], name, each)


def _of_set(arrays: dict[str, Any], weights: str | None) -> dict[str, Any]:
    """The arrays of one set, if prefixes of keys name several."""
    sets: dict[str, dict[str, str]] = {}
    for key in arrays:
        name = _bare(key)
        part, dot, rest = name.partition(".")
        found = _set_of(part) if dot else "ema" if name.startswith("ema_") else None
        sets.setdefault(found or "raw", {})[key] = name if found is None else rest if dot else name.removeprefix("ema_")
    raw, largest = sets.pop("raw", {}), max(map(len, sets.values()), default=0)
    # A few arrays are only an additional layer with such a name.
    sets = {found: keys for found, keys in sets.items() if 4 * len(keys) >= max(largest, len(raw))}
    if not sets:
        if weights not in (None, "raw"):
            raise CheckpointError(_no_such(weights))
        return arrays
    shown = {found: next(iter(keys)) for found, keys in sets.items()}
    _require_choice(shown, weights)
    if weights is None and 4 * len(raw) < largest:
        weights = next(iter(sets))
    if weights in (None, "raw"):
        if not raw:
            raise CheckpointError(_no_such("raw", sets))
        _log_others(shown)
        others = {key for keys in sets.values() for key in keys}
        return {key: value for key, value in arrays.items() if key not in others}
    if weights not in sets:
        raise CheckpointError(_no_such(weights, sets))
    logger.info("reads the %s weights (%s and the like)", _TITLES[weights], shown[weights])
    # Some averages have names without dots, and no running statistics.
    dotted = {name.replace(".", by): name for name in raw.values() for by in ("_", "")}
    names = {key: dotted.get(name, name) for key, name in sets[weights].items() if name not in _COUNTERS}
    chosen = _renamed({key: arrays[key] for key in names}, names)
    if weights == "ema":
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        raw_only = {name: key for key, name in raw.items() if name.endswith(statistics) and name not in chosen}
        if raw_only:
            logger.info("running statistics are not averaged: %d are those of the raw weights", len(raw_only))
        chosen |= {name: arrays[key] for name, key in raw_only.items()}
    return chosen


def _bare(key: str) -> str:
    """A key without the prefixes of wrappers."""
    while prefix := next((each for each in _PREFIXES if key.startswith(each)), None):
        key = key.removeprefix(prefix)
    return key
