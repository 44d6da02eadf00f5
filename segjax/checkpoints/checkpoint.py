"""A checkpoint that was read: its weights, its metadata, and what its keys were recognised as."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from segjax.checkpoints import layout
from segjax.checkpoints.errors import CheckpointError, shorten, torch_module
from segjax.checkpoints.recognition import Recognised, recognise
from segjax.checkpoints.selection import as_arrays
from segjax.runtime.reading import sha256_of

__all__ = ["Checkpoint", "CheckpointError", "as_arrays", "shorten", "torch_module"]


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint, read once. Its keys are recognised at most once, when they are first needed.

    Attributes:
      weights: Arrays by key, as stored; of an orbax folder by dotted path in segjax's model.
      metadata: The metadata next to them, as in `segjax.checkpoints.metadata`; of other packages a part of it, or none.
      source: Name of the file or folder, or address of the repository with its commit.
      paths: The files of the weights, or the orbax folder; none where it was given as a state dict.
      is_orbax: Whether it is an orbax folder of segjax, whose metadata defines the model.
      chosen: The set of weights that was asked for where it holds several, one of `key_maps.WEIGHT_SETS`; else None.
      dialect: "auto", or the dialect to read it as. family: the family to read it as, or None.
    """

    weights: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = "state dict"
    paths: tuple[Path, ...] = ()
    is_orbax: bool = False
    chosen: str | None = None
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
        digest = {"sha256": sha256_of(self.paths)} if self.paths else {}
        chosen = {"weights": self.chosen} if self.chosen else {}
        return {"source": self.source, **digest, **chosen, **made_from}
