"""A checkpoint that was read: its weights, its metadata, and what its keys were recognised as."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.checkpoints import layout
from segjax.checkpoints.recognition import Recognised, recognise

# How training scripts wrap a state dict, and prefixes that torch's DataParallel, or a wrapper of a network and its
# loss, adds to every key.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, used or written; the message lists every problem."""


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, read once. Its keys are recognised at most once, when they are first needed.

    Attributes:
      weights: arrays by key, as stored; of an orbax folder by dotted path in segjax's model.
      metadata: the metadata next to them, as in `segjax.checkpoints.metadata`; of other packages a part of it, or none.
      source: name of the file or folder, or address of the repository with its commit.
      paths: the files of the weights, or the orbax folder; none where it was given as a state dict.
      is_orbax: whether it is an orbax folder of segjax, whose metadata defines the model.
      dialect: "auto", or the dialect to read it as. family: the family to read it as, or None.
    """

    weights: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = "state dict"
    paths: tuple[Path, ...] = ()
    is_orbax: bool = False
    dialect: str = "auto"
    family: str | None = None

    @classmethod
    def of(cls, state_dict: Mapping | Checkpoint) -> Checkpoint:
        """A state dict, as `as_arrays` takes it, as a checkpoint; a checkpoint itself."""
        return state_dict if isinstance(state_dict, Checkpoint) else cls(as_arrays(state_dict))

    @functools.cached_property
    def state_dict(self) -> Mapping[str, np.ndarray]:
        """The weights under the keys and in the layout of PyTorch."""
        if not self.is_orbax:
            return self.weights
        return {layout.torch_name(path): layout.to_torch_layout(path, value) for path, value in self.weights.items()}

    @functools.cached_property
    def recognised(self) -> Recognised:
        """The key format of the state dict, its key map, the family and the sizes.

        Raises:
          KeyError: `dialect` is unknown, or has no key format for `family`.
        """
        shapes = {key: value.shape for key, value in self.state_dict.items()}
        return recognise(shapes, dialect=self.dialect, family=self.family)

    def read_as(self, *, dialect: str = "auto", family: str | None = None) -> Checkpoint:
        """The checkpoint read as a dialect or family; itself where that changes nothing."""
        if "recognised" in vars(self):
            found = self.recognised.key_format
            if dialect in ("auto", found.dialect) and family in (None, found.family):
                return self
        dialect, family = self.dialect if dialect == "auto" else dialect, family or self.family
        if (dialect, family) == (self.dialect, self.family):
            return self
        return dataclasses.replace(self, dialect=dialect, family=family)

    @property
    def param_dtype(self) -> jnp.dtype:
        """The dtype of its floating-point arrays where all have the same one, so that none is rounded; else float32."""
        dtypes = {value.dtype for value in self.weights.values() if jnp.issubdtype(value.dtype, jnp.floating)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Name and hash of the checkpoint, and its own provenance under "made_from", as JSON."""
        before = self.metadata.get("provenance")
        made_from = {"made_from": before} if before else {}
        if self.is_orbax:
            # Its metadata has a hash of the arrays.
            kept = {key: self.metadata[key] for key in ("sha256", "step") if key in self.metadata}
            return {"source": self.source, **kept, **made_from}
        digest = {"sha256": _sha256(self.paths)} if self.paths else {}
        return {"source": self.source, **digest, **made_from}


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- state dicts as given


def as_arrays(state_dict: Mapping) -> dict[str, np.ndarray]:
    """Unwraps a state dict and turns torch tensors into numpy arrays, without importing torch.

    Raises:
      CheckpointError: it contains no mapping of names to arrays.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(
            f"expected a state dict (names to arrays) but got {type(state_dict).__name__}; "
            "save model.state_dict(), not the model"
        )
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            return as_arrays(state_dict[wrapper])
    arrays, others = {}, []
    for key, value in state_dict.items():
        try:
            array = _as_array(value)
        except (TypeError, RuntimeError, AttributeError) as error:
            # torch's own for a tensor that numpy cannot hold: sparse, quantized, without storage, float8.
            kind = f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}"
            raise CheckpointError(f"{key}: a {kind} that cannot be read as numbers ({error})") from None
        if array is None or not isinstance(key, str):
            others.append(f"{key}: {type(value).__name__}")
        else:
            arrays[key] = array
    if others or not arrays:
        found = f"it holds {shorten(others)}" if others else "it is empty"
        raise CheckpointError(f"this is not a state dict (names to arrays): {found}")
    for prefix in _PREFIXES:
        # Most keys, not all: next to the network there may be a loss with weights.
        if 2 * sum(key.startswith(prefix) for key in arrays) > len(arrays):
            arrays = {key.removeprefix(prefix): value for key, value in arrays.items()}
    return arrays


def _as_array(value) -> np.ndarray | None:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value)
    if not hasattr(value, "detach"):
        return None
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        # numpy has no bfloat16; jax's is bit for bit torch's.
        return tensor.contiguous().view(torch_module().int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def torch_module() -> ModuleType:
    """PyTorch. Raises CheckpointError where it is not installed."""
    try:
        import torch
    except ModuleNotFoundError:
        raise CheckpointError(
            "reading and writing .pth files needs PyTorch, which is not installed: "
            'pip install "segjax[parity]" (or convert a .safetensors file, which needs nothing)'
        ) from None
    return torch


def shorten(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
