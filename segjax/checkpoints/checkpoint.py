"""A checkpoint that was read: its weights, its metadata, and the key format that was recognised."""

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
      weights: Arrays by key, as stored; for an orbax folder, by dotted path in segjax's model.
      metadata: Metadata of the checkpoint, see `segjax.checkpoints.metadata`; for other packages, a part of it or none.
      source: Name of the file or folder, or address of the repository with its commit.
      paths: Files of the weights, or the orbax folder; none for a state dict.
      is_orbax: Whether it is an orbax folder of segjax, whose metadata defines the model.
      chosen: The requested set of weights, one of `key_maps.WEIGHT_SETS`; None if none was requested.
      dialect: Dialect to read the checkpoint as, or "auto".
      family: Family to read the checkpoint as, or None.
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
        """A checkpoint from a state dict as for `as_arrays`; a checkpoint is returned unchanged."""
        return state_dict if isinstance(state_dict, Checkpoint) else cls(as_arrays(state_dict))

    @functools.cached_property
    def state_dict(self) -> Mapping[str, np.ndarray]:
        """The weights with PyTorch's keys and layout."""
        if not self.is_orbax:
            return self.weights
        return {layout.torch_name(path): layout.to_torch_layout(path, value) for path, value in self.weights.items()}

    @functools.cached_property
    def recognised(self) -> Recognised:
        """Key format, key map, family and sizes of the state dict.

        Raises:
          KeyError: `dialect` is unknown, or has no key format for `family`.
        """
        shapes = {key: value.shape for key, value in self.state_dict.items()}
        return recognise(shapes, dialect=self.dialect, family=self.family)

    def read_as(self, *, dialect: str = "auto", family: str | None = None) -> Checkpoint:
        """The checkpoint read as this dialect or family; the same object if nothing changes."""
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
        """The dtype of all floating-point arrays, so that none is rounded; float32 if they differ."""
        dtypes = {value.dtype for value in self.weights.values() if jnp.issubdtype(value.dtype, jnp.floating)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    @functools.cached_property
    def provenance(self) -> dict[str, Any]:
        """Name and hash of the checkpoint, as JSON; "made_from" has the provenance that it stores."""
        before = self.metadata.get("provenance")
        made_from = {"made_from": before} if before else {}
        if self.is_orbax:
            # The metadata has a hash of the arrays.
            kept = {key: self.metadata[key] for key in ("sha256", "step") if key in self.metadata}
            return {"source": self.source, **kept, **made_from}
        digest = {"sha256": sha256_of(self.paths)} if self.paths else {}
        chosen = {"weights": self.chosen} if self.chosen else {}
        return {"source": self.source, **digest, **chosen, **made_from}
